//! What stands behind `-o`: options of the mount, of tokenfs, and what mount(8) passes on from `/etc/fstab`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Duration;

use nix::mount::MsFlags;

use crate::config::{parse_backend, parse_umask, parse_wait};
use crate::store::Backend;

#[cfg(test)]
mod tests;

/// Who can use a mount besides the user who made it. The modes of files and directories count for everybody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharing {
    /// Nobody.
    #[default]
    Owner,
    /// Root.
    Root,
    /// Everybody.
    Everybody,
}

/// The options of one mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// `allow_other`, `allow_root`.
    pub sharing: Sharing,
    /// `auto_unmount`: unmount even if the server is killed.
    pub auto_unmount: bool,
    /// `fsname=`: what `mount` and `df` show as the source.
    pub fsname: Option<OsString>,
    /// `subtype=`: the part of the type behind `fuse.`.
    pub subtype: Option<String>,
    /// What the kernel takes as flags. Always read-only.
    pub flags: MsFlags,
    /// `max_read=`: the longest read in bytes.
    pub max_read: Option<u32>,
    /// `config=`: softhsm2.conf.
    pub config: Option<PathBuf>,
    /// `tokendir=`
    pub tokendir: Option<PathBuf>,
    /// `backend=`
    pub backend: Option<Backend>,
    /// `umask=`: in place of `objectstore.umask`.
    pub umask: Option<u32>,
    /// `lock_wait=`: the longest wait for a lock of SoftHSM.
    pub lock_wait: Option<Duration>,
    /// `noinotify`: look every half second instead of being told of changes.
    pub noinotify: bool,
    /// `ro`: the store is not written to at all, not even to roll back what a crashed writer left in a database.
    pub read_only: bool,
    /// `snapshot`: the store as it is now, from memory. Takes no writes, whatever `rw` says.
    pub snapshot: bool,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            sharing: Sharing::default(),
            auto_unmount: false,
            fsname: None,
            subtype: None,
            flags: MsFlags::MS_NODEV | MsFlags::MS_NOSUID,
            max_read: None,
            config: None,
            tokendir: None,
            backend: None,
            umask: None,
            lock_wait: None,
            noinotify: false,
            read_only: false,
            snapshot: false,
        }
    }
}

/// What to do with an option that nobody knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unknown {
    /// Refuse it.
    Refuse,
    /// Ignore it (`mount -s`).
    Ignore,
}

/// Options that change nothing: because it is always so, because they are for mount(8) and others who read fstab, or
/// because a mount that takes no writes has no use for them.
const IGNORED: &[&str] = &[
    "default_permissions",
    "nonempty",
    "defaults",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "owner",
    "group",
    "nofail",
    "_netdev",
    "silent",
    "loud",
    "nomand",
    "noiversion",
    "norelatime",
    "nostrictatime",
    "nolazytime",
    "async",
];

/// Prefixes of such options.
const IGNORED_PREFIXES: &[&[u8]] = &[b"x-", b"X-", b"comment=", b"user=", b"uhelper=", b"helper="];

/// Options that are flags of the kernel: their name, the flags, and whether they are set or taken away.
const FLAGS: &[(&str, MsFlags, bool)] = &[
    ("dev", MsFlags::MS_NODEV, false),
    ("nodev", MsFlags::MS_NODEV, true),
    ("suid", MsFlags::MS_NOSUID, false),
    ("nosuid", MsFlags::MS_NOSUID, true),
    ("exec", MsFlags::MS_NOEXEC, false),
    ("noexec", MsFlags::MS_NOEXEC, true),
    ("atime", MsFlags::MS_NOATIME, false),
    ("noatime", MsFlags::MS_NOATIME, true),
    ("diratime", MsFlags::MS_NODIRATIME, false),
    ("nodiratime", MsFlags::MS_NODIRATIME, true),
    ("relatime", MsFlags::MS_RELATIME, true),
    ("strictatime", MsFlags::MS_STRICTATIME, true),
    ("lazytime", MsFlags::MS_LAZYTIME, true),
    ("sync", MsFlags::MS_SYNCHRONOUS, true),
    ("dirsync", MsFlags::MS_DIRSYNC, true),
];

impl MountOptions {
    /// Takes in the lists behind all `-o`; of two that contradict each other the later one counts.
    ///
    /// # Errors
    /// A sentence that names the option that is unknown or has a bad value.
    pub fn parse<'a>(
        lists: impl IntoIterator<Item = &'a OsStr>,
        unknown: Unknown,
    ) -> Result<Self, String> {
        let mut options = Self::default();
        for list in lists {
            for option in split(list.as_bytes()) {
                if !options.take(&option)? && unknown == Unknown::Refuse {
                    return Err(format!(
                        "unknown option \"{}\" behind -o; \"tokenfs mount --help\" lists those that exist",
                        option.escape_ascii()
                    ));
                }
            }
        }
        Ok(options)
    }

    /// Takes in one option; `false` if it is unknown.
    fn take(&mut self, option: &[u8]) -> Result<bool, String> {
        if IGNORED.iter().any(|name| name.as_bytes() == option)
            || IGNORED_PREFIXES
                .iter()
                .any(|prefix| option.starts_with(prefix))
        {
            return Ok(true);
        }
        if let Some((_, flag, on)) = FLAGS.iter().find(|(name, _, _)| name.as_bytes() == option) {
            self.flags.set(*flag, *on);
            return Ok(true);
        }
        match option.iter().position(|byte| *byte == b'=') {
            None => self.take_word(option),
            Some(at) => {
                let value = OsStr::from_bytes(&option[at + 1..]);
                self.take_value(&option[..at], value)
            }
        }
    }

    fn take_word(&mut self, word: &[u8]) -> Result<bool, String> {
        match word {
            b"allow_other" => self.share(Sharing::Everybody)?,
            b"allow_root" => self.share(Sharing::Root)?,
            b"auto_unmount" => self.auto_unmount = true,
            b"noinotify" => self.noinotify = true,
            b"snapshot" => self.snapshot = true,
            // The last one counts, as for mount(8).
            b"ro" => {
                self.read_only = true;
                self.flags |= MsFlags::MS_RDONLY;
            }
            b"rw" => {
                self.read_only = false;
                self.flags -= MsFlags::MS_RDONLY;
            }
            b"remount" => {
                return Err(
                    "a mount of tokenfs cannot be remounted; unmount it and mount it again".into(),
                );
            }
            b"fsname" | b"subtype" | b"max_read" | b"config" | b"tokendir" | b"backend"
            | b"umask" | b"lock_wait" => {
                return Err(format!(
                    "-o {0} needs a value: -o {0}=…",
                    word.escape_ascii()
                ));
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn take_value(&mut self, name: &[u8], value: &OsStr) -> Result<bool, String> {
        let bad = |why: &str| {
            let value = value.as_bytes().escape_ascii();
            format!("-o {}: \"{value}\" {why}", name.escape_ascii())
        };
        match name {
            b"fsname" => self.fsname = Some(value.to_owned()),
            b"subtype" => {
                let subtype = value.to_str().filter(|subtype| {
                    !subtype.is_empty()
                        && subtype
                            .bytes()
                            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
                });
                let why = "is not made of letters, digits, - and _";
                self.subtype = Some(subtype.ok_or_else(|| bad(why))?.to_owned());
            }
            b"max_read" => {
                let bytes = value.to_str().and_then(|text| text.parse().ok());
                self.max_read = Some(bytes.ok_or_else(|| bad("is not a number of bytes"))?);
            }
            b"config" if value.is_empty() => return Err(bad("is not the path of a file")),
            b"config" => self.config = Some(value.into()),
            b"tokendir" if value.is_empty() => return Err(bad("is not the path of a directory")),
            b"tokendir" => self.tokendir = Some(value.into()),
            b"backend" => {
                let backend = parse_backend(value).map_err(|why| format!("-o backend: {why}"))?;
                self.backend = Some(backend);
            }
            b"umask" => {
                let umask = parse_umask(value).map_err(|why| format!("-o umask: {why}"))?;
                self.umask = Some(umask);
            }
            b"lock_wait" => {
                let wait = parse_wait(value).map_err(|why| format!("-o lock_wait: {why}"))?;
                self.lock_wait = Some(wait);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn share(&mut self, sharing: Sharing) -> Result<(), String> {
        if self.sharing != Sharing::Owner && self.sharing != sharing {
            return Err(
                "allow_other and allow_root exclude each other; leave one of them out".into(),
            );
        }
        self.sharing = sharing;
        Ok(())
    }
}

/// The options of a list. As in libfuse, a backslash takes the meaning from a comma behind it, and from itself, and
/// three octal digits behind it are a byte.
fn split(list: &[u8]) -> Vec<Vec<u8>> {
    let mut options = vec![Vec::new()];
    let mut rest = list;
    while let Some((&first, tail)) = rest.split_first() {
        let (byte, after) = match (first, tail) {
            (b',', _) => {
                options.push(Vec::new());
                rest = tail;
                continue;
            }
            (
                b'\\',
                [
                    a @ b'0'..=b'3',
                    b @ b'0'..=b'7',
                    c @ b'0'..=b'7',
                    after @ ..,
                ],
            ) => ((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'), after),
            (b'\\', [escaped, after @ ..]) => (*escaped, after),
            _ => (first, tail),
        };
        if let Some(option) = options.last_mut() {
            option.push(byte);
        }
        rest = after;
    }
    options.retain(|option| !option.is_empty());
    options
}

/// `value` such that libfuse's reader gives it back (ours does the same).
#[must_use]
pub fn escape(value: &OsStr) -> OsString {
    let mut out = Vec::with_capacity(value.len());
    for byte in value.as_bytes() {
        if matches!(byte, b',' | b'\\') {
            out.push(b'\\');
        }
        out.push(*byte);
    }
    OsString::from_vec(out)
}
