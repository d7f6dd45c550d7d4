//! The command line: `tokenfs`, and `mount.tokenfs` under that name.
//!
//! - [`args`]: its definition.
//! - [`mount`], [`umount`], [`tree`], [`check`], [`convert`]: the commands. [`select`]: which tokens they are about.
//! - [`helper`]: `mount.tokenfs`, which mount(8) calls.
//! - [`daemon`]: the server in the background.
//! - [`watch`]: the process behind `auto_unmount`.
//!
//! Every failure is one line on stderr, and the exit codes are part of the contract.

pub mod args;
pub mod check;
pub mod convert;
pub mod daemon;
pub mod helper;
pub mod mount;
pub mod select;
pub mod tree;
pub mod umount;
pub mod watch;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind as ClapKind;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::error::Error;
use args::{Cli, Command};

/// The name under which the binary is called by mount(8).
pub const HELPER_NAME: &str = "mount.tokenfs";

/// Why a command did not do what it should.
#[derive(Debug)]
pub enum Failure {
    /// The command line makes no sense.
    Usage(String),
    /// It was tried and failed.
    Failed(Error),
    /// It has been said why, and this is the exit code: of the daemon, or of `tokenfs check`.
    Reported(u8),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// The exit codes for the two kinds of failure.
#[derive(Clone, Copy, Debug)]
struct Codes {
    name: &'static str,
    usage: u8,
    failed: u8,
}

const CODES: Codes = Codes {
    name: "tokenfs",
    usage: 2,
    failed: 1,
};

/// mount(8).
const HELPER_CODES: Codes = Codes {
    name: HELPER_NAME,
    usage: 1,
    failed: 32,
};

/// Does what the command line says; `argv` begins with the name of the program.
#[must_use]
pub fn run(argv: &[OsString]) -> ExitCode {
    let stage = daemon::Stage::of_this_process();
    if stage == daemon::Stage::Watch {
        return watch::run(argv);
    }
    let name = argv.first().map(|name| Path::new(name).file_name());
    if name == Some(Some(OsStr::new(HELPER_NAME))) {
        let outcome = match args::HelperArgs::try_parse_from(argv) {
            Ok(args) => helper::run(&args, argv, stage),
            Err(error) => return command_line(&error, HELPER_CODES),
        };
        return conclude(outcome, HELPER_CODES);
    }
    let outcome = match Cli::try_parse_from(argv) {
        Ok(Cli { command }) => match command {
            Command::Mount(args) => mount::run(&args, argv, stage),
            Command::Umount(args) => umount::run(&args),
            Command::Tree(args) => tree::run(&args),
            Command::Check(args) => check::run(&args),
            Command::Convert(args) => convert::run(&args),
        },
        Err(error) => return command_line(&error, CODES),
    };
    conclude(outcome, CODES)
}

fn conclude(outcome: Result<(), Failure>, codes: Codes) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(text)) => {
            eprintln!("{}: {text}", codes.name);
            ExitCode::from(codes.usage)
        }
        Err(Failure::Failed(error)) => {
            eprintln!("{}: {error}", codes.name);
            ExitCode::from(codes.failed)
        }
        Err(Failure::Reported(code)) => ExitCode::from(code),
    }
}

/// What a process that holds keys, and many tokens, asks of the kernel; a warning if it does not get that.
fn set_limits() -> Option<String> {
    // Each token keeps a descriptor.
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
    // Keys are in memory from now on, and are not to reach a disk by way of a crash.
    let refused = setrlimit(Resource::RLIMIT_CORE, 0, 0).err()?;
    Some(format!(
        "core dumps cannot be turned off: {}",
        refused.desc()
    ))
}

/// `1 token`, `2 tokens`
fn count(count: usize, one: &str, more: &str) -> String {
    match count {
        1 => format!("1 {one}"),
        count => format!("{count} {more}"),
    }
}

/// What clap has to say: help and version on stdout, the rest on stderr.
fn command_line(error: &clap::Error, codes: Codes) -> ExitCode {
    // A closed stdout is nobody's failure.
    let _ = error.print();
    match error.kind() {
        ClapKind::DisplayHelp | ClapKind::DisplayVersion => ExitCode::SUCCESS,
        _ => ExitCode::from(codes.usage),
    }
}
