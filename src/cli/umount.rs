//! `tokenfs umount`.

use std::fs::File;
use std::path::Path;

use super::Failure;
use super::args::UmountArgs;
use crate::error::{Error, Result};
use crate::fuse::unmount::{Unmount, find_mount, unmount};

/// Unmounts, if it is a mount of tokenfs and nobody uses it. What is pending is written before, so that the store is complete when
/// this returns.
///
/// # Errors
/// See [`Failure`].
pub fn run(args: &UmountArgs) -> Result<(), Failure> {
    let point = find_mount(&args.point)?;
    write_pending(&point)?;
    unmount(&point, Unmount::IfUnused)?;
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
