//! `tokenfs convert`: tokens made anew in another store, of either backend, without a mount.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;

use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::signal::{SigSet, Signal};

use super::args::{ConvertArgs, StoreArgs};
use super::mount::{configuration, one_token};
use super::select::chosen;
use super::{Failure, count, set_limits};
use crate::diagnostics::Diagnostics;
use crate::error::{Error, ErrorKind, Result};
use crate::store::convert::{Step, convert, open_target};
use crate::store::{self, Patience, Store, TokenName};

/// The exit code when something was not converted.
const NOT_ALL: u8 = 1;
/// The exit code when there was nothing to begin with.
const COULD_NOT_LOOK: u8 = 2;

/// Makes the tokens anew, says which could not be and why, and what was made.
///
/// # Errors
/// See [`Failure`]; its codes are those of this command.
pub fn run(args: &ConvertArgs) -> Result<(), Failure> {
    match work(args) {
        Ok(report) if report.left == 0 => Ok(()),
        Ok(_) => Err(Failure::Reported(NOT_ALL)),
        Err(error) => {
            eprintln!("tokenfs: {error}");
            Err(Failure::Reported(COULD_NOT_LOOK))
        }
    }
}

/// How many were made, and how many were not.
#[derive(Debug, Default)]
struct Report {
    tokens: usize,
    objects: usize,
    left: usize,
}

fn work(args: &ConvertArgs) -> Result<Report> {
    let interrupt = Interrupt::start()?;
    if let Some(warning) = set_limits() {
        eprintln!("tokenfs: warning: {warning}");
    }
    let wish = StoreArgs {
        config: args.config.clone(),
        tokendir: Some(args.source.clone()),
        backend: args.backend,
    };
    let (config, warnings) = configuration(&wish, args.umask)?;
    for warning in &warnings {
        eprintln!("tokenfs: warning: {warning}");
    }
    let mut options = store::Options {
        backend: config.backend,
        read_only: true,
        ..store::Options::default()
    };
    options.lock_wait = args.lock_wait.unwrap_or(options.lock_wait);
    let log = Arc::new(Diagnostics::new());
    let source = Store::open(&config.tokendir, options.clone(), Arc::clone(&log))?;
    check_places(&source, &args.target)?;
    let names = chosen(&source, &args.tokens, Patience::at_most(options.lock_wait))?;
    options.backend = args.to;
    options.read_only = false;
    let (target, made) = open_target(&args.target, &source, options, Arc::clone(&log))?;

    let report = convert_all(&names, &source, &target, config.umask, &interrupt);
    for line in log.render().lines() {
        eprintln!("tokenfs: {line}");
    }
    if made && report.tokens == 0 {
        // Nothing is there that was not there before. What is not empty stays.
        let _ = fs::remove_dir(target.path());
    }
    say(&report, args, target.path())?;
    Ok(report)
}

/// That neither place is one token, and that the new tokens are not among the old ones.
fn check_places(source: &Store, target: &Path) -> Result<()> {
    if let Some(why) = one_token(source.path()).or_else(|| one_token(target)) {
        return Err(Error::new(ErrorKind::Invalid, why));
    }
    let identity = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino()));
    // One that is not there yet is where its parent is.
    let (place, is_there) = match identity(target) {
        Ok(_) => (target, true),
        Err(_) => (target.parent().unwrap_or(target), false),
    };
    let place = if place.as_os_str().is_empty() {
        Path::new(".")
    } else {
        place
    };
    let Ok(place) = place.canonicalize() else {
        // Opening it says why.
        return Ok(());
    };
    let same = is_there && identity(&place).ok() == identity(source.path()).ok();
    let detail = if same {
        "the tokens are in this directory, and cannot be converted into it"
    } else if place.starts_with(source.path()) {
        "it is in the directory of the tokens that are to be converted, and would be one of them to SoftHSM"
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Invalid, format!("{detail}; choose another one")).at(target))
}

fn convert_all(
    names: &[TokenName],
    source: &Store,
    target: &Store,
    mask: u32,
    interrupt: &Interrupt,
) -> Report {
    let mut report = Report::default();
    let bar = progress_bar();
    for (index, name) in names.iter().enumerate() {
        bar.reset();
        bar.set_prefix(format!("{}/{}", index + 1, names.len()));
        bar.set_message(name.to_string());
        let mut watch = |step| {
            match step {
                // Each is read, and then made.
                Step::Found(objects) => bar.set_length(2 * objects as u64),
                Step::Read | Step::Made => bar.inc(1),
                Step::Again => {}
            }
            interrupt.check()
        };
        let converted = interrupt
            .check()
            .and_then(|()| source.token(name))
            .map_err(|error| vec![error])
            .and_then(|token| {
                let place = source.path().join(name.as_os_str());
                convert(&*token, &place, target, mask, &mut watch)
            });
        let failures = match converted {
            Ok(made) => {
                report.tokens += 1;
                report.objects += made.objects;
                Vec::from_iter(made.undated)
            }
            Err(failures) => {
                report.left += 1;
                failures
            }
        };
        bar.suspend(|| {
            for failure in failures {
                eprintln!("tokenfs: {failure}");
            }
        });
        if interrupt.check().is_err() {
            report.left += names.len() - index - 1;
            break;
        }
    }
    bar.finish_and_clear();
    report
}

/// On the standard error, if that is a terminal.
fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    let template = "{prefix} {wide_bar} {percent:>3}%  {msg}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

/// `2 tokens, 14 objects converted to db in /path`
fn say(report: &Report, args: &ConvertArgs, place: &Path) -> Result<()> {
    let mut text = format!(
        "{}, {} converted to {} in {}",
        count(report.tokens, "token", "tokens"),
        count(report.objects, "object", "objects"),
        args.to,
        place.display().to_string().escape_debug()
    );
    if report.left > 0 {
        text.push_str("; ");
        text.push_str(&count(report.left, "token was not", "tokens were not"));
    }
    match writeln!(io::stdout(), "{text}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::io("write to stdout", &error))
        }
        _ => Ok(()),
    }
}

/// Whether a signal asks for the end. The first one lets what was begun be removed; a second one ends the process at once.
#[derive(Debug)]
struct Interrupt(Arc<AtomicI32>);

impl Interrupt {
    /// To be called before any other thread is started.
    ///
    /// # Errors
    /// The signals cannot be blocked, or no thread started.
    fn start() -> Result<Self> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            set.add(signal);
        }
        set.thread_block()
            .map_err(|errno| Error::system("cannot block signals", errno))?;
        let received = Arc::new(AtomicI32::new(0));
        let sender = Arc::clone(&received);
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                while let Ok(signal) = set.wait() {
                    if sender.swap(signal as i32, Ordering::Relaxed) != 0 {
                        std::process::exit(i32::from(NOT_ALL));
                    }
                }
            })
            .map_err(|error| Error::io("cannot start a thread", &error))?;
        Ok(Self(received))
    }

    fn check(&self) -> Result<()> {
        match Signal::try_from(self.0.load(Ordering::Relaxed)) {
            Ok(signal) => Err(Error::new(
                ErrorKind::System(nix::libc::EINTR),
                format!("stopped by {signal}"),
            )),
            Err(_) => Ok(()),
        }
    }
}
