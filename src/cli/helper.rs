//! `mount.tokenfs`, which mount(8) calls for the type `tokenfs` in `/etc/fstab`.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use super::Failure;
use super::args::{HelperArgs, StoreArgs};
use super::daemon::Stage;
use super::mount::{Wish, in_background, plan};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::options::{MountOptions, Unknown};

/// Sources that stand for what SoftHSM is configured for.
const CONFIGURED: [&str; 3] = ["none", "tokenfs", "softhsm"];

/// Mounts as mount(8) asks for it.
///
/// # Errors
/// See [`Failure`].
pub fn run(args: &HelperArgs, argv: &[OsString], stage: Stage) -> Result<(), Failure> {
    if args.namespace.is_some() {
        let text = "-N is not supported; enter the mount namespace with nsenter(1)";
        return Err(Failure::Usage(text.to_owned()));
    }
    let unknown = if args.sloppy {
        Unknown::Ignore
    } else {
        Unknown::Refuse
    };
    let lists = args.options.iter().map(OsString::as_os_str);
    let mut options = MountOptions::parse(lists, unknown).map_err(Failure::Usage)?;
    // As it stands in fstab, so that mount(8) knows it again ("mount -a", "umount SOURCE").
    options
        .fsname
        .get_or_insert_with(|| args.source.clone().into_os_string());
    let wish = Wish {
        store: source(&args.source)?,
        umask: None,
        options,
        point: args.point.clone(),
    };
    if args.fake {
        plan(wish, super::HELPER_NAME)?;
        return Ok(());
    }
    in_background(wish, argv, stage)?;
    if args.verbose && stage == Stage::First {
        println!(
            "mount.tokenfs: {} mounted on {}",
            args.source.display(),
            args.point.display()
        );
    }
    Ok(())
}

/// Which store a source means.
fn source(source: &Path) -> Result<StoreArgs> {
    let mut store = StoreArgs::default();
    if CONFIGURED.iter().any(|name| source.as_os_str() == *name) {
        return Ok(store);
    }
    match fs::metadata(source) {
        Ok(metadata) if metadata.is_dir() => store.tokendir = Some(source.to_path_buf()),
        Ok(metadata) if metadata.is_file() => store.config = Some(source.to_path_buf()),
        Ok(_) => return Err(unfit(source, "is neither a directory nor a file")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(unfit(source, "does not exist"));
        }
        Err(error) => return Err(Error::io("cannot use the source", &error).at(source)),
    }
    Ok(store)
}

fn unfit(source: &Path, why: &str) -> Error {
    let detail = format!(
        "the source {why}; it can be a token directory, a softhsm2.conf, or \"none\" for what SoftHSM uses"
    );
    Error::new(ErrorKind::NotFound, detail).at(source)
}
