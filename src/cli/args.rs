//! The definition of the command line. Help, man page and completions are made from it.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand};

use crate::config::{parse_backend, parse_umask, parse_wait};
use crate::store::Backend;

const AFTER_HELP: &str = "\
Examples:
  mkdir ~/tokens
  tokenfs mount ~/tokens                 mount the store that SoftHSM uses
  ls ~/tokens/*                          one directory per token, one per object in it
  cat ~/tokens/*/token/CKA_OS_TOKENLABEL
  tokenfs umount ~/tokens
  tokenfs mount --tokendir ./tokens --backend db /mnt/tokens
  tokenfs mount --snapshot /mnt/now      for a copy of one moment of a store that is in use
  tokenfs tree                           print the store without mounting it
  tokenfs check                          say what is damaged or left over in it
  tokenfs convert ./tokens ./new --to db copy it into another backend

Which store:
  SoftHSM's configuration says it: the file that --config names, or else $SOFTHSM2_CONF, or else
  ~/.config/softhsm2/softhsm2.conf, or else /etc/softhsm/softhsm2.conf, or else /etc/softhsm2.conf.
  With --tokendir no configuration is needed.

Exit codes:
  0  it is done
  1  it failed; a line on stderr says why, and what to do
  2  the command line is wrong
  \"tokenfs check\" and \"tokenfs convert\" have their own, see \"tokenfs check --help\".";

const MOUNT_AFTER_HELP: &str = "\
Options for -o, separated by commas (a backslash takes a comma into a value):
  ro                  never write to the store, not even to let SQLite roll back what a crashed
                      writer left in a database; that database is EIO then
  rw                  the opposite, which is the default
  snapshot            as --snapshot
  allow_other         let all users use the mount, as far as the modes of its files let them
                      (for ordinary users only if /etc/fuse.conf has user_allow_other)
  allow_root          let root use it (root is the owner of its own mounts; others use allow_other)
  auto_unmount        unmount even if the server is killed
  config=FILE         as --config
  tokendir=DIR        as --tokendir
  backend=file|db     as --backend
  umask=OCTAL         as --umask
  lock_wait=SECONDS   how long to wait for a lock that SoftHSM holds, before EBUSY (5)
  noinotify           look for changes every half second instead of being told by the kernel
  fsname=NAME         the source that mount and df show (the token directory)
  subtype=NAME        the part of the type behind \"fuse.\" (tokenfs); another one hides the mount
                      from \"tokenfs umount\"
  max_read=BYTES      the longest read
  [no]dev [no]suid [no]exec [no]atime [no]diratime relatime strictatime lazytime sync async dirsync
                      as in mount(8); nodev and nosuid unless told otherwise
  default_permissions, nonempty
                      accepted; it is always so
  defaults auto noauto user users owner group nofail _netdev comment= x-*
                      accepted and ignored, for /etc/fstab

In /etc/fstab, with tokenfs linked to /sbin/mount.tokenfs:
  /var/lib/softhsm/tokens  /mnt/tokens  tokenfs  allow_other  0  0

Exit codes:
  0  the tree is mounted and can be used (with -f: it was, and is unmounted)
  1  it failed; a line on stderr says why, and what to do
  2  the command line is wrong";

const CHECK_AFTER_HELP: &str = "\
Examples:
  tokenfs check                          the store that SoftHSM uses
  tokenfs check --tokendir ./tokens --backend file
  tokenfs check a3f2c1d0-1234-5678-abcd-000000000001
  tokenfs check | grep ': torn: '        what SoftHSM cannot read any more
  tokenfs check --repair                 mend what can be mended without a guess

One line for each finding, PATH: WORD: SENTENCE (WHAT TO DO), and a last line that says which directory
was looked at, and sums up. The words:
  torn        it does not hold what the format allows; the sentence ends with the byte
  suspicious  SoftHSM takes it, and would not have written it: a file that was cut off between two
              attributes, bytes behind the last one, a value that stops SoftHSM from searching; what
              crashes it: a label or serial number that is too long, two tokens in one slot
  missing     a lock file, or the token's generation              (--repair makes it)
  lax         its mode lets in more than objectstore.umask allows (--repair takes that away);
              the umask of the shell does not count
  unreadable  a token of the backend that SoftHSM is not configured for
  leftover    what a crash left of a write or of a deletion       (--repair completes or undoes it)
  foreign     nothing that belongs into a store

It can run beside a SoftHSM that uses the store: what may be a step on somebody's way is looked at
again a second later, and for half a minute if somebody writes all the while. Without --repair
nothing is written, and --repair never changes what an object holds: what is torn has to come from
a backup.

Exit codes:
  0  clean (with --repair: it is now)
  1  something was found (with --repair: something is left, for it cannot or could not be mended)
  2  the store, or some part of it, could not be looked at; what was found elsewhere is printed";

const CONVERT_AFTER_HELP: &str = "\
Examples:
  tokenfs convert /var/lib/softhsm/tokens ./tokens --to db
  tokenfs convert ./tokens ./one --to file my-token

Each token is made anew in DST-TOKENDIR under the name of its directory, with all that it holds:
objects with their UUIDs and times, labels, PINs. It appears whole or not at all. One that is there
already, or whose slot is taken, is refused and stays as it is. Modes are those of the source less
the bits of objectstore.umask, and owners are kept where they can be given. What is in SRC-TOKENDIR
stays, and may be in use: a token is read as it was at one moment. One that has a damaged object is
not converted, and every such object is named. DST-TOKENDIR is made if there is none.

The last line on stdout says what was converted.

Exit codes:
  0  all of it is converted
  1  some of it is not; stderr says what and why
  2  the command line is wrong, or a TOKENDIR cannot be used; nothing was converted";

/// Mount a SoftHSM v2 token store as a tree of files
///
/// A token is a directory, an object of it is a directory, and an attribute of that is a file.
#[derive(Debug, Parser)]
#[command(name = "tokenfs", version, after_help = AFTER_HELP, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Mount the token store on a directory
    Mount(MountArgs),
    /// Unmount it
    ///
    /// Works for whoever mounted it and for root, and also if the server of the mount is dead.
    Umount(UmountArgs),
    /// Print the token store without mounting it
    Tree(TreeArgs),
    /// Say what is damaged, missing or left over in the token store, and mend it
    Check(CheckArgs),
    /// Copy tokens into another store, of either backend, without a mount
    Convert(ConvertArgs),
}

/// Which store.
#[derive(Clone, Debug, Default, Args)]
pub struct StoreArgs {
    /// SoftHSM's configuration file, instead of the one that SoftHSM finds
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The directory of the tokens, instead of the configured one
    #[arg(long, value_name = "DIR")]
    pub tokendir: Option<PathBuf>,
    /// The backend, file or db, instead of the configured one: a directory that holds both kinds of token is read as that; all
    /// others are read as what they are
    #[arg(long, value_name = "BACKEND", value_parser = |text: &str| parse_backend(text.as_ref()))]
    pub backend: Option<Backend>,
}

/// `tokenfs mount`
///
/// Returns when the tree can be used, and leaves a server in the background.
#[derive(Debug, Args)]
#[command(after_help = MOUNT_AFTER_HELP)]
pub struct MountArgs {
    /// Which store.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Bits that no mode in the tree has, instead of the configured ones; the umask of the shell is added
    #[arg(long, value_name = "OCTAL", value_parser = |text: &str| parse_umask(text.as_ref()))]
    pub umask: Option<u32>,
    /// Show the store as it is at this moment, read-only, for as long as the mount lives, whatever happens to the store. All of it is
    /// in memory until then, keys included. With -o ro, taking it does not write either
    #[arg(long)]
    pub snapshot: bool,
    /// Options of the mount, see below
    #[arg(short = 'o', value_name = "OPT[,OPT...]", action = ArgAction::Append)]
    pub options: Vec<OsString>,
    /// Stay in the foreground; Ctrl-C unmounts. $RUST_LOG says how much is logged to stderr (warn)
    #[arg(short = 'f', long)]
    pub foreground: bool,
    /// The directory to mount on
    #[arg(value_name = "MOUNTPOINT")]
    pub point: PathBuf,
}

/// `tokenfs umount`
#[derive(Debug, Args)]
pub struct UmountArgs {
    /// The directory that tokenfs is mounted on
    #[arg(value_name = "MOUNTPOINT")]
    pub point: PathBuf,
}

/// `tokenfs tree`
#[derive(Debug, Args)]
pub struct TreeArgs {
    /// Which store.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Only this token, by its directory name, serial number or label
    #[arg(value_name = "TOKEN")]
    pub token: Option<OsString>,
}

/// `tokenfs check`
#[derive(Debug, Args)]
#[command(after_help = CHECK_AFTER_HELP)]
pub struct CheckArgs {
    /// Which store.
    #[command(flatten)]
    pub store: StoreArgs,
    /// Bits that no mode in the store may have, instead of the configured ones (objectstore.umask)
    #[arg(long, value_name = "OCTAL", value_parser = |text: &str| parse_umask(text.as_ref()))]
    pub umask: Option<u32>,
    /// Mend what can be mended without a guess: lock files, modes, what a crash left
    #[arg(long)]
    pub repair: bool,
    /// Say what was looked at, too, and what is odd without being wrong
    #[arg(short = 'v', long)]
    pub verbose: bool,
    /// Only these tokens, by the names of their directories
    #[arg(value_name = "TOKEN")]
    pub tokens: Vec<OsString>,
}

/// `tokenfs convert`
#[derive(Debug, Args)]
#[command(after_help = CONVERT_AFTER_HELP)]
pub struct ConvertArgs {
    /// SoftHSM's configuration file, instead of the one that SoftHSM finds
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The backend of a directory in SRC-TOKENDIR that holds both kinds of token, file or db, instead of the configured one; all
    /// others are read as what they are
    #[arg(long, value_name = "BACKEND", value_parser = |text: &str| parse_backend(text.as_ref()))]
    pub backend: Option<Backend>,
    /// Bits that no mode of a new token has, instead of the configured ones (objectstore.umask)
    #[arg(long, value_name = "OCTAL", value_parser = |text: &str| parse_umask(text.as_ref()))]
    pub umask: Option<u32>,
    /// How long to wait for a lock that SoftHSM holds, and for a moment in which it does not write (5)
    #[arg(long, value_name = "SECONDS", value_parser = |text: &str| parse_wait(text.as_ref()))]
    pub lock_wait: Option<Duration>,
    /// The backend of the new tokens: file or db
    #[arg(long, value_name = "BACKEND", value_parser = |text: &str| parse_backend(text.as_ref()))]
    pub to: Backend,
    /// The directory of the tokens that are converted
    #[arg(value_name = "SRC-TOKENDIR")]
    pub source: PathBuf,
    /// The directory that the new tokens are made in
    #[arg(value_name = "DST-TOKENDIR")]
    pub target: PathBuf,
    /// Only these tokens, by their directory names, serial numbers or labels
    #[arg(value_name = "TOKEN")]
    pub tokens: Vec<OsString>,
}

/// Mount a SoftHSM v2 token store; called by mount(8)
#[derive(Debug, Parser)]
#[command(
    name = "mount.tokenfs",
    version,
    after_help = "Options for -o: see \"tokenfs mount --help\".\n\n\
                  Exit codes, as in mount(8): 0 mounted, 1 wrong command line, 2 system error, 32 mount failure"
)]
pub struct HelperArgs {
    /// The directory of the tokens, or a softhsm2.conf, or "none", "tokenfs" or "softhsm" for what SoftHSM uses
    #[arg(value_name = "SOURCE")]
    pub source: PathBuf,
    /// The directory to mount on
    #[arg(value_name = "MOUNTPOINT")]
    pub point: PathBuf,
    /// Options of the mount
    #[arg(short = 'o', value_name = "OPT[,OPT...]", action = ArgAction::Append)]
    pub options: Vec<OsString>,
    /// Ignore options that do not exist
    #[arg(short = 's')]
    pub sloppy: bool,
    /// Check everything and do not mount
    #[arg(short = 'f')]
    pub fake: bool,
    /// Accepted and ignored: there is no mtab
    #[arg(short = 'n')]
    pub no_mtab: bool,
    /// Say what was mounted
    #[arg(short = 'v')]
    pub verbose: bool,
    /// Not supported: another mount namespace
    #[arg(short = 'N', value_name = "NAMESPACE")]
    pub namespace: Option<OsString>,
    /// Accepted and ignored: the type
    #[arg(short = 't', value_name = "TYPE")]
    pub fstype: Option<OsString>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definitions_hold_together() {
        Cli::command().debug_assert();
        HelperArgs::command().debug_assert();
    }

    #[test]
    fn mount_calls_its_helper_like_this() {
        let args = HelperArgs::try_parse_from([
            "mount.tokenfs",
            "/t",
            "/m",
            "-sfnv",
            "-o",
            "rw,x=y",
            "-t",
            "tokenfs",
        ])
        .unwrap();
        assert!(args.sloppy && args.fake && args.no_mtab && args.verbose);
        assert_eq!(args.options, ["rw,x=y"]);
    }
}
