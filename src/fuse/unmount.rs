//! Taking a mount away: as root by system call, otherwise through fusermount3.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use super::mount::{fusermount, invalid};
use super::mountinfo::{self, FSTYPE};
use crate::error::{Error, ErrorKind, Result};

/// How to unmount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmount {
    /// Only if nobody uses it.
    IfUnused,
    /// Out of sight at once, away when its last user lets go of it.
    Lazily,
}

/// Unmounts `point`, a path without links, as root by system call, else through fusermount3.
///
/// # Errors
/// [`ErrorKind::Busy`] if it is in use; not ours to unmount.
pub fn unmount(point: &Path, how: Unmount) -> Result<()> {
    let flags = match how {
        Unmount::IfUnused => MntFlags::UMOUNT_NOFOLLOW,
        Unmount::Lazily => MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH,
    };
    match umount2(point, flags) {
        Ok(()) => Ok(()),
        Err(Errno::EBUSY) => Err(in_use(point)),
        Err(Errno::EPERM) => fusermount_unmount(point, how),
        Err(errno) => Err(Error::system("cannot unmount", errno).at(point)),
    }
}

fn fusermount_unmount(point: &Path, how: Unmount) -> Result<()> {
    let Some(program) = fusermount() else {
        return Err(Error::not_found(
            "an ordinary user needs fusermount3 to unmount; install the package fuse3, or unmount as root",
        ));
    };
    let mut command = Command::new(program);
    command.env("LC_ALL", "C").arg("-u");
    if how == Unmount::Lazily {
        command.arg("-z");
    }
    let output = command
        .arg("--")
        .arg(point)
        .output()
        .map_err(|error| Error::io("cannot run fusermount3", &error))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(if said.contains("busy") {
        in_use(point)
    } else if said.contains("not found in") || said.contains("not permitted") {
        Error::new(
            ErrorKind::PermissionDenied,
            "somebody else mounted it; only that user or root can unmount it",
        )
        .at(point)
    } else {
        let said = said.trim().replace('\n', "; ");
        Error::new(
            ErrorKind::System(libc::EIO),
            format!("cannot unmount: {said}"),
        )
        .at(point)
    })
}

fn in_use(point: &Path) -> Error {
    Error::new(
        ErrorKind::Busy,
        format!(
            "in use, so not unmounted; \"fuser -vm {}\" shows by whom",
            quoted(point)
        ),
    )
    .at(point)
}

/// A path as a shell takes it.
#[must_use]
pub fn quoted(path: &Path) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-+@%".contains(byte);
    if path.as_os_str().as_bytes().iter().all(plain) {
        path.display().to_string()
    } else {
        format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
    }
}

/// The mount of tokenfs that `point` means: relative, through links, with a slash at its end, and without touching the
/// mount itself, whose server may be dead.
///
/// # Errors
/// It is none.
pub fn find_mount(point: &Path) -> Result<PathBuf> {
    let path = resolve(point)
        .map_err(|error| Error::io("cannot find the mount point", &error).at(point))?;
    match mountinfo::find(&path)? {
        Some(mount) if mount.is_tokenfs() => Ok(path),
        Some(mount) => Err(invalid(format!(
            "not a mount of tokenfs ({} instead of {FSTYPE}); use umount",
            mount.fstype
        ))
        .at(point)),
        None => Err(invalid(
            "nothing is mounted there; \"findmnt -t fuse.tokenfs\" lists the mounts of tokenfs",
        )
        .at(point)),
    }
}

/// `path` without links, where what it names need not answer.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    // As many links as the kernel follows.
    let mut path = std::path::absolute(path)?;
    for _ in 0..40 {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return fs::canonicalize(&path);
        };
        let parent = fs::canonicalize(parent)?;
        let here = parent.join(name);
        match fs::read_link(&here) {
            Ok(target) => path = std::path::absolute(parent.join(target))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(error),
            Err(_) => return Ok(here),
        }
    }
    Err(Errno::ELOOP.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_path_is_resolved_without_touching_what_it_names() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("a/b")).unwrap();
        symlink("../a/b", root.join("a/link")).unwrap();
        symlink("a", root.join("start")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        let resolved = |path: &str| resolve(&root.join(path)).ok();
        let b = Some(root.join("a/b"));
        for path in [
            "a/b",
            "a/b/",
            "a/./b/.",
            "start/b//",
            "start/link/",
            "a/b/../b",
            "a/b/../../start/link",
        ] {
            assert_eq!(resolved(path), b, "{path}");
        }
        assert_eq!(resolved("a/b/.."), Some(root.join("a")));
        assert_eq!(resolved("gone"), None);
        assert_eq!(resolved("loop"), None);
        assert_eq!(resolve(Path::new("/")).unwrap(), Path::new("/"));
    }

    #[test]
    fn only_a_mount_of_ours_is_found() {
        let refused = |path: &str| find_mount(Path::new(path)).unwrap_err().to_string();
        assert!(refused("/proc").contains("not a mount of tokenfs (proc instead of fuse.tokenfs)"));
        assert!(refused("/proc/self").contains("nothing is mounted there"));
        assert!(refused("/nowhere/at/all").contains("cannot find the mount point"));
    }

    #[test]
    fn a_command_in_a_message_can_be_pasted() {
        assert_eq!(quoted(Path::new("/mnt/a-b_1")), "/mnt/a-b_1");
        assert_eq!(quoted(Path::new("/mnt/it's a")), r"'/mnt/it'\''s a'");
    }
}
