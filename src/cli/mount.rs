//! `tokenfs mount`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};
use std::time::Duration;

use fuser::Notifier;
use nix::mount::MsFlags;
use nix::unistd::{getegid, geteuid};

use super::args::{MountArgs, StoreArgs};
use super::daemon::{self, Stage};
use super::{Failure, set_limits, watch};
use crate::config::{self, Config, Places};
use crate::diagnostics::Diagnostics;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::adapter::Adapter;
use crate::fuse::invalidate::{self, Invalidation};
use crate::fuse::mount::{Request, check_point, check_tokendir};
use crate::fuse::options::{MountOptions, Unknown};
use crate::fuse::settle;
use crate::fuse::signals::Signals;
use crate::fuse::{server, session};
use crate::store::{self, Store};
use crate::tree::{self, Tree};

/// A mount, as the user wants it.
#[derive(Debug)]
pub struct Wish {
    /// Which store.
    pub store: StoreArgs,
    /// `--umask`
    pub umask: Option<u32>,
    /// `-o`
    pub options: MountOptions,
    /// Where.
    pub point: PathBuf,
}

/// A mount that has been checked. All paths are absolute and without links.
#[derive(Debug)]
pub struct Plan {
    /// The store.
    pub tokendir: PathBuf,
    /// How it is read.
    pub store: store::Options,
    /// The effective mask.
    pub mask: u32,
    /// Whether the kernel is asked to report changes; otherwise answers hold for half a second.
    pub notify: bool,
    /// Whether the store is shown as it is now, from memory.
    pub snapshot: bool,
    /// Whether to unmount even if the server is killed.
    pub auto_unmount: bool,
    /// What is mounted where.
    pub request: Request,
    /// What is odd about the configuration.
    pub warnings: Vec<String>,
}

/// Where log messages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Log {
    ToStderr,
    Nowhere,
}

/// Mounts, and leaves a server in the background unless `-f` is given.
///
/// # Errors
/// See [`Failure`].
pub fn run(args: &MountArgs, argv: &[OsString], stage: Stage) -> Result<(), Failure> {
    let mut options = MountOptions::parse(
        args.options.iter().map(OsString::as_os_str),
        Unknown::Refuse,
    )
    .map_err(Failure::Usage)?;
    options.snapshot |= args.snapshot;
    let wish = Wish {
        store: args.store.clone(),
        umask: args.umask,
        options,
        point: args.point.clone(),
    };
    if args.foreground && stage == Stage::First {
        return Ok(mount(wish, Log::ToStderr, || Ok(()))?);
    }
    in_background(wish, argv, stage)
}

/// Mounts from a process in the background; in the first process, starts that one.
///
/// # Errors
/// See [`Failure`].
pub fn in_background(wish: Wish, argv: &[OsString], stage: Stage) -> Result<(), Failure> {
    match stage {
        Stage::Daemon => {
            daemon::detach()?;
            Ok(mount(wish, Log::Nowhere, daemon::ready)?)
        }
        Stage::First | Stage::Watch => daemon::start(argv),
    }
}

/// Mounts and serves until the end; calls `ready` when the tree can be used.
fn mount(wish: Wish, log: Log, ready: impl FnOnce() -> Result<()>) -> Result<()> {
    // Before anything that might start a thread.
    let signals = Signals::start()?;
    let plan = plan(wish, "tokenfs")?;
    // No directory is kept in use, and all paths are absolute by now.
    std::env::set_current_dir("/").map_err(|error| Error::io("chdir", &error).at("/"))?;
    serve(&plan, &signals, log, ready)
}

/// Puts the layers together.
fn serve(
    plan: &Plan,
    signals: &Signals,
    log: Log,
    ready: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let diagnostics = Arc::new(Diagnostics::new());
    for warning in &plan.warnings {
        diagnostics.warning(warning);
    }
    if let Some(warning) = set_limits() {
        diagnostics.warning(warning);
    }
    // After the warnings, which the user has seen already.
    if log == Log::ToStderr {
        let filter = env_logger::Env::default().default_filter_or("warn");
        // It fails if there is a logger, as in a test.
        let _ = env_logger::Builder::from_env(filter).try_init();
    }
    let mut store = Store::open(&plan.tokendir, plan.store.clone(), Arc::clone(&diagnostics))?;
    let settings = tree::Settings {
        mask: plan.mask,
        uid: geteuid().as_raw(),
        gid: getegid().as_raw(),
        server: server::this_process(),
        ..tree::Settings::default()
    };
    // What a crash left behind, before anybody looks.
    store.recover();
    if plan.snapshot {
        store = store.snapshot()?;
    }
    let tree = Arc::new(Tree::new(store, settings, diagnostics));
    let filesystem = Adapter::new(Arc::clone(&tree));
    // What was written into the mount is not all in the store yet when that ends.
    let end = {
        let (tree, filesystem, once) = (Arc::clone(&tree), filesystem.clone(), Once::new());
        let limit = 2 * plan.store.lock_wait + Duration::from_secs(1);
        Arc::new(move |end: session::End| {
            once.call_once(|| {
                filesystem.drain(limit);
                if end == session::End::Unmounted {
                    tree.release_closed();
                }
                tree.finish();
            });
        })
    };
    signals.before_the_end({
        let end = Arc::clone(&end);
        move || end(session::End::Aborted)
    });
    let outcome = session::serve(
        filesystem.clone(),
        &plan.request,
        signals,
        |notifier| {
            let settling = settle::start(&tree)?;
            invalidate::tell(&tree, notifier.clone())?;
            Ok((watch_store(&tree, notifier, plan.notify), settling))
        },
        |mount| {
            let watcher = plan.auto_unmount.then(|| watch::start(mount)).transpose()?;
            ready()?;
            Ok(watcher)
        },
    );
    end(*outcome.as_ref().unwrap_or(&session::End::Aborted));
    outcome.map(drop)
}

/// Has the kernel told of changes, where that can be. Without, its memory is short, and nothing else is amiss.
fn watch_store(tree: &Arc<Tree>, notifier: Notifier, wanted: bool) -> Option<Invalidation> {
    if !wanted {
        return None;
    }
    match invalidate::start(tree, notifier) {
        Ok(invalidation) => Some(invalidation),
        Err(error) => {
            tree.diagnostics().warning(format!(
                "{error}; changes are looked for instead, and show up within a second"
            ));
            None
        }
    }
}

/// Reads the configuration and checks everything that can be checked before the mount. What the command line says
/// counts more than what `-o` says, and that more than the configuration. Warnings go to stderr after `name`, also
/// when something else fails: they may be the reason.
///
/// # Errors
/// The first thing that is wrong.
pub fn plan(wish: Wish, name: &str) -> Result<Plan> {
    let options = wish.options;
    let store = StoreArgs {
        config: wish.store.config.or(options.config),
        tokendir: wish.store.tokendir.or(options.tokendir),
        backend: wish.store.backend.or(options.backend),
    };
    let (config, warnings) = configuration(&store, wish.umask.or(options.umask))?;
    for warning in &warnings {
        eprintln!("{name}: warning: {warning}");
    }
    let tokendir = check_tokendir(&config.tokendir)?;
    if let Some(warning) = one_token(&tokendir) {
        eprintln!("{name}: warning: {warning}");
    }
    let point = check_point(&wish.point, &tokendir)?;
    let mask = config::effective_mask(config.umask);
    let mut flags = options.flags;
    flags.set(MsFlags::MS_RDONLY, options.read_only || options.snapshot);
    let defaults = store::Options::default();
    Ok(Plan {
        store: store::Options {
            backend: config.backend,
            read_only: options.read_only,
            lock_wait: options.lock_wait.unwrap_or(defaults.lock_wait),
        },
        mask,
        // Nothing changes in a snapshot.
        notify: !options.noinotify && !options.snapshot,
        snapshot: options.snapshot,
        auto_unmount: options.auto_unmount,
        request: Request {
            fsname: options
                .fsname
                .unwrap_or_else(|| tokendir.clone().into_os_string()),
            subtype: options.subtype.unwrap_or_else(|| "tokenfs".to_owned()),
            sharing: options.sharing,
            flags,
            max_read: options.max_read,
            point,
        },
        tokendir,
        warnings,
    })
}

/// What to say where somebody names the directory of a token, in which there are no tokens.
#[must_use]
pub fn one_token(tokendir: &Path) -> Option<String> {
    let is_token = ["token.object", "sqlite3.db"]
        .iter()
        .any(|name| tokendir.join(name).exists());
    is_token.then(|| {
        format!(
            "{}: this is the directory of one token, and has no tokens in it; name the directory that it is in",
            tokendir.display()
        )
    })
}

/// The configuration with what the command line says instead, and what is odd about it. A configuration file that
/// nobody named need not be there, or be readable, if the command line says which store.
///
/// # Errors
/// See [`config::load`].
pub fn configuration(args: &StoreArgs, umask: Option<u32>) -> Result<(Config, Vec<String>)> {
    let (mut config, mut warnings) = (Config::default(), Vec::new());
    let places = Places::of_this_process();
    match config::load(args.config.as_deref(), &places) {
        Ok(loaded) => config = loaded,
        Err(error) => {
            let there = matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::PermissionDenied
            );
            if args.config.is_some() || args.tokendir.is_none() || !there {
                return Err(error);
            }
            // One that SoftHSM would read might say something that we do not know.
            if let Some(path) = places.find()
                && (args.backend.is_none() || umask.is_none())
            {
                warnings.push(format!(
                    "{}: cannot be read, so it does not count; the backend is {} and the umask {:04o} (see --backend and --umask)",
                    path.display(),
                    args.backend.unwrap_or(config.backend),
                    umask.unwrap_or(config.umask)
                ));
            }
        }
    }
    warnings.extend(config.warnings.iter().map(ToString::to_string));
    if let Some(tokendir) = &args.tokendir {
        config.tokendir.clone_from(tokendir);
    }
    config.backend = args.backend.unwrap_or(config.backend);
    config.umask = umask.unwrap_or(config.umask);
    Ok((config, warnings))
}
