//! `tokenfs umount`.

use super::Failure;
use super::args::UmountArgs;
use crate::fuse::unmount::{Unmount, find_mount, unmount};

/// Unmounts, if it is a mount of tokenfs and nobody uses it.
///
/// # Errors
/// See [`Failure`].
pub fn run(args: &UmountArgs) -> Result<(), Failure> {
    let point = find_mount(&args.point)?;
    unmount(&point, Unmount::IfUnused)?;
    Ok(())
}
