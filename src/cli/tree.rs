//! `tokenfs tree`.

use super::Failure;
use super::args::TreeArgs;
use super::mount::configuration;
use crate::error::{Error, ErrorKind};
use crate::fuse::mount::check_tokendir;

/// Prints the store.
///
/// # Errors
/// See [`Failure`].
pub fn run(args: &TreeArgs) -> Result<(), Failure> {
    let (config, warnings) = configuration(&args.store, None)?;
    for warning in &warnings {
        eprintln!("tokenfs: warning: {warning}");
    }
    let _tokendir = check_tokendir(&config.tokendir)?;
    // GLUE: the tree layer prints it.
    Err(Error::new(ErrorKind::Unsupported, "tree is not built yet").into())
}
