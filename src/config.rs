//! `softhsm2.conf`: where SoftHSM looks for it, and what it makes of it.
//!
//! The reader follows SoftHSM's own (`SimpleConfigLoader.cpp`), with its quirks, since a file that SoftHSM reads one way
//! and tokenfs another would show the wrong store. Where SoftHSM skips something with a warning, so does this; where
//! SoftHSM would not start at all (a backend that it does not know), this is an error too.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::stat::Mode;
use nix::unistd::{AccessFlags, User, access, getuid};

use crate::error::{Error, ErrorKind, Result};
use crate::store::Backend;

#[cfg(test)]
mod tests;

/// The file below a home directory.
const USER_FILE: &str = ".config/softhsm2/softhsm2.conf";
/// The files of the system: Debian's, then the one that SoftHSM is built with by default.
const SYSTEM_FILES: [&str; 2] = ["/etc/softhsm/softhsm2.conf", "/etc/softhsm2.conf"];
/// SoftHSM's `DEFAULT_TOKENDIR`, as Debian and the upstream build have it.
const DEFAULT_TOKENDIR: &str = "/var/lib/softhsm/tokens/";
/// SoftHSM's `DEFAULT_UMASK` (2.7.0); before that, modes were 0600 and 0700, which is the same.
const DEFAULT_UMASK: u32 = 0o077;
/// What `fgets` in SoftHSM's 1024-byte buffer takes of a line at a time.
const PIECE: usize = 1023;
/// Names that SoftHSM knows and that say nothing about the store.
const OTHER_NAMES: [&str; 5] = [
    "log.level",
    "log.file",
    "slots.removable",
    "slots.mechanisms",
    "library.reset_on_fork",
];

/// A line of the file that SoftHSM skips.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// The file.
    pub path: PathBuf,
    /// The line in it, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub text: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path.display(), self.line, self.text)
    }
}

/// What `softhsm2.conf` says about the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The file that was read, if one was.
    pub path: Option<PathBuf>,
    /// `directories.tokendir`, as written: a relative one is relative to the current directory, as in SoftHSM.
    pub tokendir: PathBuf,
    /// `objectstore.backend`.
    pub backend: Backend,
    /// `objectstore.umask`.
    pub umask: u32,
    /// The lines that were skipped.
    pub warnings: Vec<Warning>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            path: None,
            tokendir: PathBuf::from(DEFAULT_TOKENDIR),
            backend: Backend::File,
            umask: DEFAULT_UMASK,
            warnings: Vec::new(),
        }
    }
}

/// What the search for the file depends on.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// `$SOFTHSM2_CONF`.
    pub variable: Option<OsString>,
    /// `$HOME`, or else the home directory in the password database.
    pub home: Option<PathBuf>,
}

impl Places {
    /// Those of this process.
    #[must_use]
    pub fn of_this_process() -> Self {
        let home = env::var_os("HOME")
            .filter(|home| !home.is_empty())
            .map(PathBuf::from)
            .or_else(|| Some(User::from_uid(getuid()).ok()??.dir));
        Self {
            variable: env::var_os("SOFTHSM2_CONF"),
            home,
        }
    }

    /// The file that SoftHSM would read; `None` if there is none. The file of a user counts only if it can be read.
    #[must_use]
    pub fn find(&self) -> Option<PathBuf> {
        if let Some(path) = &self.variable {
            return Some(PathBuf::from(path));
        }
        if let Some(home) = &self.home {
            let path = home.join(USER_FILE);
            if access(&path, AccessFlags::R_OK).is_ok() {
                return Some(path);
            }
        }
        // A directory that cannot be searched may well hold the file, and is to be complained about, not passed over.
        SYSTEM_FILES
            .into_iter()
            .map(PathBuf::from)
            .find(|path| match fs::metadata(path) {
                Ok(_) => true,
                Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
            })
    }
}

/// Reads the configuration: `file` if it is given, else the one that SoftHSM would read.
///
/// # Errors
/// There is no file, it cannot be read, or it says something that SoftHSM would not start with.
pub fn load(file: Option<&Path>, places: &Places) -> Result<Config> {
    let Some(path) = file.map(Path::to_path_buf).or_else(|| places.find()) else {
        return Err(Error::not_found(format!(
            "no softhsm2.conf found ($SOFTHSM2_CONF, ~/{USER_FILE}, {}, {}); name one with --config, or the store with --tokendir",
            SYSTEM_FILES[0], SYSTEM_FILES[1]
        )));
    };
    if path.as_os_str().is_empty() {
        return Err(Error::not_found(
            "$SOFTHSM2_CONF is set but empty; unset it, or let it name a softhsm2.conf",
        ));
    }
    match fs::read(&path) {
        Ok(bytes) => parse(&path, &bytes),
        Err(error) => {
            let from = if file.is_none() && places.variable.is_some() {
                " ($SOFTHSM2_CONF names it)"
            } else {
                ""
            };
            let kind = error
                .raw_os_error()
                .map_or(ErrorKind::System(libc::EIO), ErrorKind::from_errno);
            let detail = match kind {
                ErrorKind::NotFound => {
                    format!("no such configuration file{from}; name another one with --config")
                }
                ErrorKind::PermissionDenied => format!(
                    "no permission to read the configuration file{from}; become a user who may (on Debian: root or a member of the group softhsm), or name another one with --config"
                ),
                _ => format!("cannot read the configuration file{from}: {error}"),
            };
            Err(Error::new(kind, detail).at(path))
        }
    }
}

/// Reads the bytes of a configuration file, as SoftHSM does; `path` is for messages.
///
/// # Errors
/// The backend is unknown, or the umask is not an octal number up to 0777.
pub fn parse(path: &Path, bytes: &[u8]) -> Result<Config> {
    let mut config = Config {
        path: Some(path.to_path_buf()),
        ..Config::default()
    };
    // The last one wins, so what an overridden line says does not matter.
    let mut backend = None;
    let mut umask = None;
    for (line, piece) in pieces(bytes) {
        let text = match setting(piece) {
            Setting::Nothing => continue,
            Setting::Bad => "not of the form \"name = value\", ignored".to_owned(),
            Setting::Value(b"directories.tokendir", value) => {
                config.tokendir = PathBuf::from(OsString::from_vec(value.to_vec()));
                continue;
            }
            Setting::Value(b"objectstore.backend", value) => {
                backend = Some((line, value));
                continue;
            }
            Setting::Value(b"objectstore.umask", value) => {
                umask = Some((line, value));
                continue;
            }
            Setting::Value(name, _) if OTHER_NAMES.iter().any(|known| known.as_bytes() == name) => {
                continue;
            }
            Setting::Value(name, _) => {
                format!("SoftHSM has no setting \"{}\", ignored", printable(name))
            }
        };
        config.warnings.push(Warning {
            path: path.to_path_buf(),
            line,
            text,
        });
    }
    if let Some((line, value)) = backend {
        config.backend = parse_backend(OsStr::from_bytes(value))
            .map_err(|why| in_line(path, line, &format!("objectstore.backend: {why}")))?;
    }
    if let Some((line, value)) = umask {
        config.umask = parse_umask(OsStr::from_bytes(value))
            .map_err(|why| in_line(path, line, &format!("objectstore.umask: {why}")))?;
    }
    Ok(config)
}

/// `file` or `db`; otherwise a sentence that says so.
///
/// # Errors
/// Anything else.
pub fn parse_backend(value: &OsStr) -> Result<Backend, String> {
    match value.as_bytes() {
        b"file" => Ok(Backend::File),
        b"db" => Ok(Backend::Db),
        other => Err(format!(
            "unknown backend \"{}\", it can be \"file\" or \"db\"",
            printable(other)
        )),
    }
}

/// An octal number up to 0777; otherwise a sentence that says so.
///
/// # Errors
/// Anything else.
pub fn parse_umask(value: &OsStr) -> Result<u32, String> {
    let digits = value.as_bytes();
    std::str::from_utf8(digits)
        .ok()
        .filter(|text| !text.is_empty() && text.bytes().all(|byte| matches!(byte, b'0'..=b'7')))
        .and_then(|text| u32::from_str_radix(text, 8).ok())
        .filter(|umask| *umask <= 0o777)
        .ok_or_else(|| {
            format!(
                "\"{}\" is not an octal number from 0 to 0777, such as 0077",
                printable(digits)
            )
        })
}

/// Longer waits for a lock are taken for a mistake.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// A number of seconds up to 3600, with or without a fraction; otherwise a sentence that says so.
///
/// # Errors
/// Anything else.
pub fn parse_wait(value: &OsStr) -> Result<Duration, String> {
    value
        .to_str()
        .and_then(|text| text.parse().ok())
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|wait| *wait <= LONGEST_WAIT)
        .ok_or_else(|| {
            format!(
                "\"{}\" is not a number of seconds up to 3600",
                printable(value.as_bytes())
            )
        })
}

/// The mask that modes are shown through: `objectstore.umask` and the umask of this process together.
#[must_use]
pub fn effective_mask(umask: u32) -> u32 {
    (umask | process_umask()) & 0o777
}

/// The umask of this process.
fn process_umask() -> u32 {
    // The system call can only exchange it, which another thread would notice; the kernel tells it since Linux 4.7.
    fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| umask_in(&status))
        .unwrap_or_else(|| {
            let umask = nix::sys::stat::umask(Mode::from_bits_truncate(0o077));
            nix::sys::stat::umask(umask);
            umask.bits()
        })
}

/// The line `Umask:` of `/proc/self/status`.
fn umask_in(status: &str) -> Option<u32> {
    let value = status
        .lines()
        .find_map(|line| line.strip_prefix("Umask:"))?;
    u32::from_str_radix(value.trim(), 8).ok()
}

/// One line, or a piece of a long one.
enum Setting<'a> {
    /// Empty, or a comment.
    Nothing,
    /// Skipped with a warning.
    Bad,
    /// A name and its value.
    Value(&'a [u8], &'a [u8]),
}

/// What `fgets` returns one after the other, each with the number of the line that it is from.
fn pieces(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    bytes
        .split_inclusive(|byte| *byte == b'\n')
        .enumerate()
        .flat_map(|(index, line)| line.chunks(PIECE).map(move |piece| (index + 1, piece)))
}

/// What SoftHSM makes of a piece: `strcspn`, then `strtok` on `=` twice, then trimming.
fn setting(piece: &[u8]) -> Setting<'_> {
    // The zero ends a string in C.
    let end = piece
        .iter()
        .position(|byte| matches!(byte, b'#' | b'\n' | b'\r' | 0))
        .unwrap_or(piece.len());
    let piece = &piece[..end];
    if piece.is_empty() {
        return Setting::Nothing;
    }
    // strtok passes over any number of separators before a word, so the value ends at the second `=` behind it.
    let mut words = piece.split(|byte| *byte == b'=').filter(|w| !w.is_empty());
    match (words.next().map(trim), words.next().map(trim)) {
        (Some(name), Some(value)) if !name.is_empty() && !value.is_empty() => {
            Setting::Value(name, value)
        }
        // SoftHSM warns of a line of blanks too, which would only puzzle here.
        (Some([]), None) => Setting::Nothing,
        _ => Setting::Bad,
    }
}

/// Without what `isspace` calls a space at both ends.
fn trim(text: &[u8]) -> &[u8] {
    let space = |byte: &u8| matches!(byte, b' ' | b'\t'..=b'\r');
    let Some(start) = text.iter().position(|byte| !space(byte)) else {
        return &[];
    };
    let end = text.iter().rposition(|byte| !space(byte)).unwrap_or(start);
    &text[start..=end]
}

fn printable(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

fn in_line(path: &Path, line: usize, what: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("line {line}: {what}")).at(path)
}
