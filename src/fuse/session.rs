//! A file system that is being served, from its mount to its end.

use std::path::Path;

use fuser::{Config, Filesystem, Notifier, Session, SessionACL};

use super::mount::{
    Request, acl, check_ordinary_user, explain_fusermount, fuser_options, mount_as_root,
    open_device,
};
use super::mountinfo::{self, Mount};
use super::signals::{Signals, abort, is_there};
use super::unmount::{Unmount, unmount};
use crate::error::{Error, Result};

/// How a session has ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was unmounted, and nobody uses it any more.
    Unmounted,
    /// Somebody may have files of it open, and gets errors.
    Aborted,
}

/// Mounts `filesystem` and serves it until it is unmounted: with umount, by a signal, or because the server fails. On
/// return the mount is gone.
///
/// `on_start` gets what it takes to tell the kernel of changes, and what it returns is dropped at the end of the session.
/// `on_ready` is called when the tree can be used; it gets the mount. If either fails, the mount is taken away again.
///
/// # Errors
/// It cannot be mounted; the kernel and `fuser` do not understand each other; what `on_start` or `on_ready` returned.
pub fn serve<FS: Filesystem, Guard, Kept>(
    filesystem: FS,
    request: &Request,
    signals: &Signals,
    on_start: impl FnOnce(Notifier) -> Result<Guard>,
    on_ready: impl FnOnce(&Mount) -> Result<Kept>,
) -> Result<End> {
    // Dropped last to first: the session ends before the mount is looked for.
    let mut cleanup = Cleanup {
        mount: None,
        signals,
        is_over: false,
    };
    let (session, mount) = signals.mounting(|| start(filesystem, request, &mut cleanup))?;
    let _guard = on_start(session.notifier())?;
    let _kept = on_ready(&mount)?;
    log::info!("{}: mounted", mount.point.display());
    let outcome = session
        .run()
        .map_err(|error| Error::io("the FUSE session failed", &error).at(&request.point));
    let mut is_aborted = true;
    // If it has failed nobody answers any more, and who waits for an answer would hold up the end.
    if outcome.is_ok() || abort(&mount) {
        // From here on a signal would take away what is not ours any more, or end the process before what was written is in the store.
        let was_aborted = signals.ended();
        // What is there without anybody who serves it was ended by somebody else (`umount -f`).
        is_aborted = was_aborted || outcome.is_err() || is_there(&mount);
    }
    // It ends well only when the kernel has ended it. What is mounted there by now is somebody else's, and may have got the
    // device number that ours had.
    cleanup.is_over = outcome.is_ok();
    outcome.map(|()| {
        if is_aborted {
            End::Aborted
        } else {
            End::Unmounted
        }
    })
}

/// Mounts, and shakes hands with the kernel.
fn start<FS: Filesystem>(
    filesystem: FS,
    request: &Request,
    cleanup: &mut Cleanup<'_>,
) -> Result<(Session<FS>, Mount)> {
    let mut config = Config::default();
    config.acl = acl(request.sharing);
    config.n_threads = Some(1);
    let device = open_device()?;
    let session = if mount_as_root(request, &device)?.is_some() {
        cleanup.mount = Some(made(&request.point)?);
        // Where the kernel keeps all others out it is better at it: `fuser` would refuse the `close` of a descriptor that somebody else has
        // inherited.
        let acl = match config.acl {
            SessionACL::Owner => SessionACL::All,
            acl => acl,
        };
        Session::from_fd(filesystem, device, acl, config).map_err(|error| {
            Error::io("the kernel and tokenfs cannot agree", &error).at(&request.point)
        })?
    } else {
        drop(device);
        check_ordinary_user(request)?;
        config.mount_options = fuser_options(request);
        let session = Session::new(filesystem, &request.point, &config)
            .map_err(|error| explain_fusermount(request, &error.to_string()))?;
        cleanup.mount = Some(made(&request.point)?);
        session
    };
    match &cleanup.mount {
        Some(mount) => Ok((session, mount.clone())),
        None => Err(gone(&request.point)),
    }
}

/// The mount that was just made.
fn made(point: &Path) -> Result<Mount> {
    mountinfo::find(point)?.ok_or_else(|| gone(point))
}

fn gone(point: &Path) -> Error {
    Error::not_found("somebody unmounted it at once").at(point)
}

/// Sees to it that the mount is gone in the end, whatever happened.
struct Cleanup<'a> {
    mount: Option<Mount>,
    signals: &'a Signals,
    is_over: bool,
}

impl Drop for Cleanup<'_> {
    fn drop(&mut self) {
        if let Some(mount) = self.mount.take() {
            self.signals.ended();
            if !self.is_over
                && is_there(&mount)
                && let Err(error) = unmount(&mount.point, Unmount::Lazily)
            {
                log::error!("{error}");
            }
        }
    }
}
