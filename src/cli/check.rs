//! `tokenfs check`: what is wrong with a store, and mending what can be mended without a guess.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use super::args::CheckArgs;
use super::mount::{configuration, one_token};
use super::{Failure, count};
use crate::config::Config;
use crate::diagnostics::Diagnostics;
use crate::error::{Error, Result};
use crate::fuse::mount::check_tokendir;
use crate::store::check::{Finding, LONGEST, Remedy, Report, Settings, check, repair};
use crate::store::{self, Store};

/// The exit code when something was found; with `--repair`, when something is left, be it that it could not be mended.
const FOUND: u8 = 1;
/// The exit code when something could not be looked at.
const COULD_NOT_LOOK: u8 = 2;

/// Looks at the store and prints what is wrong with it, one line each, and a summary.
///
/// # Errors
/// See [`Failure`]; its codes are those of this command.
pub fn run(args: &CheckArgs) -> Result<(), Failure> {
    match report(args) {
        Ok(0) => Ok(()),
        Ok(code) => Err(Failure::Reported(code)),
        Err(error) => {
            eprintln!("tokenfs: {error}");
            Err(Failure::Reported(COULD_NOT_LOOK))
        }
    }
}

fn report(args: &CheckArgs) -> Result<u8> {
    let (config, warnings) = configuration(&args.store, args.umask)?;
    for warning in &warnings {
        eprintln!("tokenfs: warning: {warning}");
    }
    let tokendir = check_tokendir(&config.tokendir)?;
    if let Some(warning) = one_token(&tokendir) {
        eprintln!("tokenfs: warning: {warning}");
    }
    let settings = settings(args, &config);
    let options = store::Options {
        backend: config.backend,
        read_only: true,
        ..store::Options::default()
    };
    let store = Store::open(&tokendir, options, Arc::new(Diagnostics::new()))?;
    let mut found = check(&store, &settings)?;
    let (mut mended, mut failed) = (Vec::new(), Vec::new());
    if args.repair
        && found
            .findings
            .iter()
            .any(|finding| finding.remedy.is_some())
    {
        let repaired = repair(&store, &found);
        for line in repaired.log.lines() {
            eprintln!("tokenfs: {line}");
        }
        let after = check(&store, &settings)?;
        let left: HashSet<_> = after.findings.iter().map(Finding::thing).collect();
        mended = found
            .findings
            .iter()
            .filter(|it| it.remedy.is_some() && after.has_seen(&it.path))
            .filter(|it| !left.contains(&it.thing()))
            .cloned()
            .collect();
        found = after;
        failed = repaired.failures;
    }

    let mut out = String::new();
    if args.verbose {
        for (path, sentence) in &found.notes {
            let _ = writeln!(out, "{}: note: {sentence}", escaped(path));
        }
    }
    for finding in &mended {
        let _ = writeln!(out, "{finding} (mended)");
    }
    for finding in &found.findings {
        let end = match (finding.remedy, finding.advice) {
            (Some(Remedy::Recover), _) if args.repair => {
                "could not be mended: it is in use, or not what a crash of tokenfs leaves; look at it, and move it out of the store"
            }
            (Some(_), _) if args.repair => "could not be mended",
            (Some(_), _) => "--repair mends it",
            (None, Some(advice)) => advice,
            (None, None) => {
                let _ = writeln!(out, "{finding}");
                continue;
            }
        };
        let _ = writeln!(out, "{finding} ({end})");
    }
    let place = escaped(&tokendir);
    let _ = writeln!(out, "{place}: {}", summary(&found, mended.len()));
    // What cannot be said has been looked at all the same, and the code is the same.
    match io::stdout().write_all(out.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            return Err(Error::io("write to stdout", &error));
        }
        _ => {}
    }
    for failure in found.failures.iter().chain(&failed) {
        eprintln!("tokenfs: {failure}");
    }
    Ok(if !found.failures.is_empty() {
        COULD_NOT_LOOK
    } else if !found.findings.is_empty() {
        FOUND
    } else {
        0
    })
}

fn settings(args: &CheckArgs, config: &Config) -> Settings {
    // Where nothing is configured, a token of either backend is as good.
    let known = config.path.is_some() || args.store.backend.is_some();
    Settings {
        only: args.tokens.clone(),
        configured: known.then_some(config.backend),
        mask: config.umask,
        longest: LONGEST,
    }
}

fn escaped(path: &Path) -> String {
    path.display().to_string().escape_debug().to_string()
}

/// `3 tokens, 120 objects: clean`
fn summary(report: &Report, mended: usize) -> String {
    let mut text = format!(
        "{}, {}: ",
        count(report.tokens, "token", "tokens"),
        count(report.objects, "object", "objects")
    );
    let left = report.findings.len();
    if left + mended > 0 {
        text.push_str(&count(left + mended, "finding", "findings"));
        if mended > 0 {
            let _ = write!(text, ", {mended} mended");
        }
    } else if report.failures.is_empty() {
        text.push_str("clean");
    } else {
        text.push_str("nothing found");
    }
    if !report.failures.is_empty() {
        let failures = report.failures.len();
        let _ = write!(text, ", {failures} could not be looked at");
    }
    text
}
