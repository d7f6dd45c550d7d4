//! `/proc/self/mountinfo`: the mounts that this process sees, without asking the mounts themselves, so that one whose
//! server is dead or stuck can be looked up too.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The file system type that a mount of tokenfs has.
pub const FSTYPE: &str = "fuse.tokenfs";

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The device number, `major:minor`: it tells this mount from another one that takes its place.
    pub device: String,
    /// Where it is mounted.
    pub point: PathBuf,
    /// The type, such as `fuse.tokenfs`.
    pub fstype: String,
    /// What is mounted.
    pub source: OsString,
}

impl Mount {
    /// Whether tokenfs serves it.
    #[must_use]
    pub fn is_tokenfs(&self) -> bool {
        self.fstype == FSTYPE
    }
}

/// What is mounted at `point`, a path without links; of several mounts over each other the topmost.
///
/// # Errors
/// The list cannot be read.
pub fn find(point: &Path) -> Result<Option<Mount>> {
    Ok(list()?.into_iter().rfind(|mount| mount.point == point))
}

/// All mounts, in the order in which they were made.
///
/// # Errors
/// The list cannot be read.
pub fn list() -> Result<Vec<Mount>> {
    let path = "/proc/self/mountinfo";
    let bytes =
        fs::read(path).map_err(|error| Error::io("cannot list the mounts", &error).at(path))?;
    Ok(bytes
        .split(|byte| *byte == b'\n')
        .filter_map(parse)
        .collect())
}

/// One line (proc(5)): `36 35 98:0 /root /point rw,noatime master:1 - ext3 /dev/root rw,errors=continue`.
fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = text(fields.nth(2)?);
    let point = PathBuf::from(unescape(fields.nth(1)?));
    // Behind the options of the mount is any number of optional fields, then a dash.
    fields.next()?;
    fields.by_ref().find(|field| *field == b"-")?;
    let fstype = text(fields.next()?);
    let source = unescape(fields.next()?);
    Some(Mount {
        device,
        point,
        fstype,
        source,
    })
}

fn text(field: &[u8]) -> String {
    unescape(field).to_string_lossy().into_owned()
}

/// The kernel writes blanks, newlines and backslashes as three octal digits behind a backslash.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        match (first, tail) {
            (
                b'\\',
                [
                    a @ b'0'..=b'3',
                    b @ b'0'..=b'7',
                    c @ b'0'..=b'7',
                    after @ ..,
                ],
            ) => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => {
                out.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_line_of_the_kernel_is_read() {
        let mount = parse(
            b"36 35 0:98 / /mnt/a\\040b\\134c rw,noatime master:1 shared:2 - fuse.tokenfs /var\\040x ro,user_id=0",
        )
        .unwrap();
        assert_eq!(mount.device, "0:98");
        assert_eq!(mount.point, Path::new("/mnt/a b\\c"));
        assert!(mount.is_tokenfs());
        assert_eq!(mount.source, "/var x");
        let plain = parse(b"1 1 8:1 / / rw - ext4 /dev/sda rw").unwrap();
        assert_eq!((plain.fstype.as_str(), plain.is_tokenfs()), ("ext4", false));
    }

    #[test]
    fn escapes_that_the_kernel_does_not_write_stay() {
        assert_eq!(unescape(b"a\\"), "a\\");
        assert_eq!(unescape(b"\\04"), "\\04");
        assert_eq!(unescape(b"\\999\\011"), "\\999\t");
        assert_eq!(
            unescape(b"\\303\\244\\012"),
            OsString::from_vec(b"\xc3\xa4\n".to_vec())
        );
    }

    #[test]
    fn the_root_is_always_mounted() {
        assert_eq!(find(Path::new("/")).unwrap().unwrap().point, Path::new("/"));
        assert_eq!(find(Path::new("/proc/self")).unwrap(), None);
    }

    proptest! {
        #[test]
        fn any_line_can_be_read(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&line);
        }
    }
}
