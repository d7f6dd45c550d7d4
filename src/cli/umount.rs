//! `tokenfs umount`.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use super::Failure;
use super::args::UmountArgs;
use crate::error::{Error, Result};
use crate::fuse::server::Server;
use crate::fuse::unmount::{Unmount, find_mount, unmount};

/// How long the end of the server is waited for. It is busy for `2 × lock_wait` and a second at most, unless the mount is seen
/// elsewhere, in another container, and goes on there.
const LONGEST: Duration = Duration::from_secs(30);

/// Unmounts, if it is a mount of tokenfs and nobody uses it. What is pending is written before, and the server has ended, so that when this
/// returns the store is complete and nobody of ours uses it.
///
/// # Errors
/// See [`Failure`].
pub fn run(args: &UmountArgs) -> Result<(), Failure> {
    let point = find_mount(&args.point)?;
    write_pending(&point)?;
    let server = Server::of(&point);
    unmount(&point, Unmount::IfUnused)?;
    if let Some(server) = server
        && !server.has_ended_within(LONGEST)
    {
        eprintln!(
            "tokenfs: warning: unmounted, but the server (process {}) has not ended after {} s, and keeps the store in use",
            server.number,
            LONGEST.as_secs()
        );
    }
    Ok(())
}

/// Syncs the root of a mount, which writes what is pending anywhere in it.
fn write_pending(point: &Path) -> Result<()> {
    // One that cannot be opened has nothing pending that could be written: its server is dead, or the mount is somebody else's.
    let Ok(root) = File::open(point) else {
        return Ok(());
    };
    root.sync_all().map_err(|error| {
        let detail = "what was written into the mount and is pending cannot be written to the store, so it stays mounted; \
                      .tokenfs/log has the reason";
        Error::io(detail, &error).at(point)
    })
}
