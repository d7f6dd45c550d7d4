//! The checks before a mount, and the mount itself.
//!
//! As root tokenfs mounts by itself; an ordinary user's mount goes through fusermount3, by way of `fuser`. Every failure
//! that can be foreseen is one sentence that says what is wrong and what to do.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use fuser::{MountOption, SessionACL};
use nix::errno::Errno;
use nix::mount::MsFlags;
use nix::unistd::{AccessFlags, access, getgid, getuid};

use super::mountinfo;
use super::options::{Sharing, escape};
use crate::error::{Error, ErrorKind, Result};

const DEVICE: &str = "/dev/fuse";

/// What is mounted where.
#[derive(Clone, Debug)]
pub struct Request {
    /// The mount point, from [`check_point`].
    pub point: PathBuf,
    /// What `mount` and `df` show as the source.
    pub fsname: OsString,
    /// The part of the type behind `fuse.`; `tokenfs` unless the user wants another one.
    pub subtype: String,
    /// Who can use it.
    pub sharing: Sharing,
    /// Flags of the kernel; read-only in any case.
    pub flags: MsFlags,
    /// The longest read in bytes.
    pub max_read: Option<u32>,
}

pub(super) fn invalid(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, detail)
}

fn kind_of(error: &io::Error) -> ErrorKind {
    error
        .raw_os_error()
        .map_or(ErrorKind::System(libc::EIO), ErrorKind::from_errno)
}

/// A directory that exists and can be listed, without links in its path.
///
/// # Errors
/// It is not that.
pub fn check_tokendir(dir: &Path) -> Result<PathBuf> {
    let found = fs::canonicalize(dir).and_then(|path| fs::read_dir(&path).map(|_| path));
    found.map_err(|error| {
        let kind = kind_of(&error);
        let detail = match kind {
            ErrorKind::NotFound => "there is no such token directory; name another one with --tokendir, or in softhsm2.conf with directories.tokendir".to_owned(),
            ErrorKind::NotADirectory => "the token directory is not a directory; name another one with --tokendir, or in softhsm2.conf with directories.tokendir".to_owned(),
            ErrorKind::PermissionDenied => "no permission to read the token directory; become a user who may (on Debian: root or a member of the group softhsm)".to_owned(),
            _ => format!("cannot read the token directory: {error}"),
        };
        Error::new(kind, detail).at(dir)
    })
}

/// A directory that can be mounted on, without links in its path. `tokendir` is from [`check_tokendir`].
///
/// # Errors
/// It is not that.
pub fn check_point(point: &Path, tokendir: &Path) -> Result<PathBuf> {
    let wrong = |error: &io::Error| {
        let kind = kind_of(error);
        let detail = match kind {
            ErrorKind::NotFound => "there is no such mount point; make it with mkdir".to_owned(),
            ErrorKind::NotADirectory => "the mount point is not a directory".to_owned(),
            ErrorKind::PermissionDenied => "no permission to reach the mount point".to_owned(),
            ErrorKind::System(libc::ENOTCONN) => {
                "a mount whose server is dead is in the way; take it away with \"tokenfs umount\", then try again"
                    .to_owned()
            }
            _ => format!("cannot use the mount point: {error}"),
        };
        Error::new(kind, detail).at(point)
    };
    let path = fs::canonicalize(point).map_err(|error| wrong(&error))?;
    // The list comes before stat, which a mount in the way might not answer.
    if let Some(mount) = mountinfo::find(&path)? {
        let detail = if mount.is_tokenfs() {
            "tokenfs is mounted there already; \"tokenfs umount\" takes it away".to_owned()
        } else {
            format!(
                "something else ({}) is mounted there already; unmount it, or choose another directory",
                mount.fstype
            )
        };
        return Err(Error::new(ErrorKind::Busy, detail).at(point));
    }
    let metadata = fs::metadata(&path).map_err(|error| wrong(&error))?;
    if !metadata.is_dir() {
        return Err(wrong(&Errno::ENOTDIR.into()));
    }
    let overlap = if path == tokendir {
        Some("is")
    } else if path.starts_with(tokendir) {
        Some("lies inside")
    } else if tokendir.starts_with(&path) {
        Some("contains")
    } else {
        None
    };
    if let Some(how) = overlap {
        return Err(invalid(format!(
            "the mount point {how} the token directory {}; choose another mount point",
            tokendir.display()
        ))
        .at(point));
    }
    Ok(path)
}

/// `/dev/fuse`, closed on exec.
///
/// # Errors
/// There is none, or we may not open it.
pub fn open_device() -> Result<OwnedFd> {
    match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(file) => Ok(file.into()),
        Err(error) => {
            let kind = kind_of(&error);
            let detail = match kind {
                ErrorKind::NotFound | ErrorKind::System(libc::ENODEV | libc::ENXIO) => {
                    "there is no FUSE here; load it (as root: modprobe fuse), and run a container with --device /dev/fuse"
                        .to_owned()
                }
                ErrorKind::PermissionDenied => {
                    "no permission to open it; let root do \"chmod 0666 /dev/fuse\" (the usual mode), and run a container with --device /dev/fuse"
                        .to_owned()
                }
                _ => format!("cannot open it: {error}"),
            };
            Err(Error::new(kind, detail).at(DEVICE))
        }
    }
}

/// Mounts by system call; `None` if that is for root only and we are not root.
///
/// # Errors
/// The kernel refuses.
pub fn mount_as_root(request: &Request, device: &OwnedFd) -> Result<Option<()>> {
    let mode = File::open(&request.point)
        .and_then(|dir| dir.metadata())
        .map_err(|error| Error::io("cannot open the mount point", &error).at(&request.point))?
        .mode();
    let mut data = format!(
        "fd={},rootmode={:o},user_id={},group_id={},default_permissions",
        device.as_raw_fd(),
        mode & libc::S_IFMT,
        getuid(),
        getgid()
    );
    // To the kernel root is like everybody; but for a mount of root's own there is nobody to let in besides.
    let everybody = match request.sharing {
        Sharing::Everybody => true,
        Sharing::Root => !getuid().is_root(),
        Sharing::Owner => false,
    };
    if everybody {
        data.push_str(",allow_other");
    }
    if let Some(bytes) = request.max_read {
        data.push_str(&format!(",max_read={bytes}"));
    }
    let fstype = format!("fuse.{}", request.subtype);
    let mounted = nix::mount::mount(
        Some(request.fsname.as_os_str()),
        &request.point,
        Some(fstype.as_str()),
        request.flags,
        Some(data.as_str()),
    );
    match mounted {
        Ok(()) => Ok(Some(())),
        Err(Errno::EPERM) => Ok(None),
        Err(Errno::ENODEV) => Err(Error::new(
            ErrorKind::System(libc::ENODEV),
            "this kernel has no FUSE; load it with \"modprobe fuse\"",
        )),
        Err(errno) => Err(Error::system("the kernel refuses the mount", errno).at(&request.point)),
    }
}

/// Who `fuser` lets in.
#[must_use]
pub fn acl(sharing: Sharing) -> SessionACL {
    match sharing {
        Sharing::Owner => SessionACL::Owner,
        Sharing::Root if getuid().is_root() => SessionACL::Owner,
        Sharing::Root => SessionACL::RootAndOwner,
        Sharing::Everybody => SessionACL::All,
    }
}

/// The request as `fuser` takes it for a mount through fusermount3. Flags that fusermount3 does not know (they are about
/// access times, which a read-only mount does not change) are left out.
#[must_use]
pub fn fuser_options(request: &Request) -> Vec<MountOption> {
    let mut options = vec![
        // fuser joins all with commas and escapes nothing.
        MountOption::FSName(escape(&request.fsname).to_string_lossy().into_owned()),
        MountOption::Subtype(request.subtype.clone()),
        MountOption::DefaultPermissions,
    ];
    let flags = [
        (MsFlags::MS_RDONLY, MountOption::RO),
        (MsFlags::MS_NODEV, MountOption::NoDev),
        (MsFlags::MS_NOSUID, MountOption::NoSuid),
        (MsFlags::MS_NOEXEC, MountOption::NoExec),
        (MsFlags::MS_NOATIME, MountOption::NoAtime),
        (MsFlags::MS_SYNCHRONOUS, MountOption::Sync),
        (MsFlags::MS_DIRSYNC, MountOption::DirSync),
    ];
    options.extend(
        flags
            .into_iter()
            .filter(|(flag, _)| request.flags.contains(*flag))
            .map(|(_, option)| option),
    );
    if let Some(bytes) = request.max_read {
        options.push(MountOption::CUSTOM(format!("max_read={bytes}")));
    }
    options
}

/// What an ordinary user needs for a mount.
///
/// # Errors
/// There is no fusermount3, or it would refuse.
pub fn check_ordinary_user(request: &Request) -> Result<()> {
    if fusermount().is_none() {
        return Err(Error::not_found(
            "an ordinary user needs fusermount3 to mount; install the package fuse3, or mount as root",
        ));
    }
    if request.sharing == Sharing::Root {
        // fuser lets everybody in and sends all but root away by itself, which what the kernel has cached never passes.
        return Err(Error::new(
            ErrorKind::Unsupported,
            "allow_root would not keep other users out; use allow_other, and let the modes of the files decide, or mount as root",
        ));
    }
    let all = AccessFlags::R_OK | AccessFlags::W_OK | AccessFlags::X_OK;
    access(&request.point, all).map_err(|_| not_yours(&request.point))
}

fn not_yours(point: &Path) -> Error {
    Error::new(
        ErrorKind::PermissionDenied,
        "an ordinary user can mount only on a directory that they own; make one with mkdir, or mount as root",
    )
    .at(point)
}

/// fusermount3, where `fuser` looks for it too.
pub(super) fn fusermount() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("FUSERMOUNT_PATH") {
        return Some(PathBuf::from(path));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/bin".into(), "/sbin".into()]);
    dirs.flat_map(|dir| [dir.join("fusermount3"), dir.join("fusermount")])
        .find(|program| access(program, AccessFlags::X_OK).is_ok())
}

/// Our sentence for what fusermount3 said, or `fuser` about it.
#[must_use]
pub fn explain_fusermount(request: &Request, said: &str) -> Error {
    let said = said.trim();
    if said.contains("user_allow_other") {
        return Error::new(
            ErrorKind::PermissionDenied,
            "allow_other and allow_root are not permitted to ordinary users here; let root put the line \"user_allow_other\" into /etc/fuse.conf, or mount as root",
        );
    }
    if said.contains("no write access") || said.contains("not owned by user") {
        return not_yours(&request.point);
    }
    if said.contains("mount_max") {
        return Error::new(
            ErrorKind::Busy,
            "there are too many FUSE mounts; unmount some, or let root raise mount_max in /etc/fuse.conf",
        );
    }
    if said.contains("Operation not permitted") {
        return Error::new(
            ErrorKind::PermissionDenied,
            "mounting is not permitted here: fusermount3 must be setuid root, and a container needs --cap-add SYS_ADMIN and --device /dev/fuse",
        );
    }
    // One line, without the name of the program before each.
    let lines: Vec<&str> = said
        .lines()
        .map(|line| line.split_once(": ").map_or(line, |(_, rest)| rest))
        .collect();
    let detail = if lines.is_empty() {
        "for no reason that it gave".to_owned()
    } else {
        lines.join("; ")
    };
    Error::new(
        ErrorKind::System(libc::EIO),
        format!("fusermount3 refuses the mount: {detail}"),
    )
    .at(&request.point)
}

#[cfg(test)]
mod tests;
