//! A restore that is broken off in the middle: the program is ended, or the server of the mount is.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::Scope;
use super::cell::{Work, said};
use super::stores::{FIRST, OTHER_PIN, SECOND, token_name};
use crate::mount_common::{Tree, expected};
use crate::support::*;
use crate::write_common::HELD;

/// How often each restore is broken off.
const TIMES: usize = 4;

/// The latest moment; by then even a debug build has nearly done it.
const LATEST: u64 = 600;

/// A moment for the cell and the round, from the seed of this run.
fn moment(work: &Work<'_>, round: usize) -> Duration {
    let mut hasher = DefaultHasher::new();
    (seed(), work.cell.to_string(), round).hash(&mut hasher);
    // Later and later, so that each round gets further than the one before.
    let latest = LATEST * (round as u64 + 1) / TIMES as u64;
    let moment = Duration::from_millis(5 + hasher.finish() % latest);
    println!(
        "{}, round {round}: after {moment:?}, TOKENFS_TEST_SEED={}",
        work.cell,
        seed()
    );
    moment
}

/// The restore, in a group of processes of its own.
fn begin(work: &Work<'_>) -> Child {
    let mut shell = work.shell(&work.cell.tool.back());
    shell
        .process_group(0)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    shell.spawn().unwrap()
}

/// Ends the program, politely and not, and looks at what is there then.
pub fn clients(work: &mut Work<'_>) {
    let mut broken_off = 0;
    for round in 0..TIMES {
        let child = begin(work);
        std::thread::sleep(moment(work, round));
        let signal = if round % 2 == 0 {
            Signal::SIGINT
        } else {
            Signal::SIGKILL
        };
        let _ = killpg(Pid::from_raw(child.id().cast_signed()), signal);
        // Its pipes end with the last of its processes.
        let output = child.wait_with_output().unwrap();
        broken_off += usize::from(!output.status.success());
        let lower = said(&output).to_lowercase();
        assert!(!lower.contains("failed"), "round {round}: {lower}");
        std::thread::sleep(HELD);
        assert_usable(work, 1);
    }
    assert_broken_off(work, broken_off);
}

/// Kills the server of the mount, and mounts anew.
pub fn servers(work: &mut Work<'_>) {
    let mut broken_off = 0;
    for round in 0..TIMES {
        let child = begin(work);
        std::thread::sleep(moment(work, round));
        let mut mount = work.to.take().expect("the mount");
        mount.kill(Signal::SIGKILL);
        // It gets errors for the rest, or had finished.
        let output = child.wait_with_output().unwrap();
        broken_off += usize::from(!output.status.success());
        drop(mount);
        assert_usable(work, 0);
        work.to = Some(Mount::new(&work.target));
        assert_usable(work, 0);
    }
    assert_broken_off(work, broken_off);
}

/// That the moments were not all too late. A single object may be restored before any of them.
#[track_caller]
fn assert_broken_off(work: &Work<'_>, times: usize) {
    println!("{}: broken off {times} times of {TIMES}", work.cell);
    assert!(
        times > 0 || work.cell.scope == Scope::Object,
        "never broken off"
    );
}

/// What a SoftHSM finds in a store whose restore was broken off: each token that is whole can be opened and listed, and no more than
/// `halves` objects, a token's own among them, are new and lack something.
#[track_caller]
fn assert_usable(work: &Work<'_>, halves: usize) {
    let stored = expected(&work.target);
    let half = half_objects(work, &stored);
    assert!(half.len() <= halves, "not whole: {half:#?}");
    let mut client = work.target.p11();
    let labels: Vec<String> = client
        .tokens()
        .unwrap()
        .into_iter()
        .map(|(label, _)| label.trim_end().to_owned())
        .collect();
    let is_whole =
        |label: &str| !half.contains(&format!("{}/token", token_name(work.source, label)));
    for label in labels
        .iter()
        .filter(|label| [FIRST, SECOND].contains(&label.as_str()) && is_whole(label))
    {
        let opened = [PIN, OTHER_PIN]
            .iter()
            .any(|pin| client.open(label, Some(pin)).is_ok());
        assert!(opened, "{label}: no PIN fits");
        client.find(&[]).unwrap();
    }
}

/// The objects that were not there, and lack an attribute which they have in the backup.
fn half_objects(work: &Work<'_>, stored: &Tree) -> Vec<String> {
    let backup = expected(work.source);
    let is_new =
        |path: &&PathBuf| path.components().count() == 2 && !work.before.contains_key(*path);
    let objects = stored.keys().filter(is_new);
    let lacks = |object: &&Path| {
        let mut attributes = backup.keys().filter(|path| path.starts_with(object));
        attributes.any(|path| !stored.contains_key(path))
    };
    let half = objects.map(|path| path.as_path()).filter(lacks);
    half.map(|path| path.display().to_string()).collect()
}
