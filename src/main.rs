//! The command `tokenfs`, and `mount.tokenfs` under that name.

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let argv: Vec<OsString> = std::env::args_os().collect();
    tokenfs::cli::run(&argv)
}
