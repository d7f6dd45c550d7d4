//! Dying at each system call of each kind of write, on both backends; and the order in which data is synced.
//!
//! In the plain run a process dies before each call that changes something on disk, and after the last: what it leaves is the same
//! anywhere between two of them. With `TOKENFS_TEST_FULL` it dies before each call of whatever kind.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod crash_common;
mod mount_common;
mod support;
mod write_common;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use crash_common::trace::{Call, Order, calls_after, killing, tracing};
use crash_common::*;
use support::*;
use write_common::leftovers;

const READY: &str = "tokenfs-step-ready";

/// The calls of the operations of a story.
fn calls(stage: &Stage, story: &Story) -> Vec<Call> {
    let operations = &story.operations;
    stage.reset_for(story);
    let output = stage.softhsm.directory.path().join("trace");
    run(&mut stage.step(&tracing(&output), operations));
    let calls = calls_after(&fs::read_to_string(&output).unwrap(), READY);
    assert!(!calls.is_empty(), "no calls after {READY}");
    calls
}

/// The calls to die before: in a full run all but those that concern nothing but the process itself, otherwise up to `most` of those
/// that change something, at equal distances, and always the last.
fn chosen(calls: &[Call], most: usize) -> Vec<&Call> {
    const OWN: [&str; 8] = [
        "exit_group",
        "exit",
        "sigaltstack",
        "rt_sigprocmask",
        "munmap",
        "brk",
        "mmap",
        "futex",
    ];
    if full() {
        let calls = calls.iter();
        return calls.filter(|call| !OWN.contains(&&*call.name)).collect();
    }
    let calls: Vec<&Call> = calls.iter().filter(|c| c.changes_something()).collect();
    let every = calls.len().div_ceil(most).max(1);
    let last = calls.len().saturating_sub(1);
    let indexed = calls.into_iter().enumerate();
    indexed
        .filter(|(index, _)| index % every == seed() % every || *index == last)
        .map(|(_, call)| call)
        .collect()
}

fn die_everywhere(
    stage: &mut Stage,
    name: &str,
    operations: &[Vec<String>],
    states: &[Stored],
    wanted: fn(&Call) -> bool,
    most: usize,
    prepare: &dyn Fn(&Stage),
) -> usize {
    prepare(stage);
    let output = stage.softhsm.directory.path().join("trace");
    run(&mut stage.step(&tracing(&output), operations));
    let mut calls = calls_after(&fs::read_to_string(&output).unwrap(), READY);
    calls.retain(wanted);
    let mut deaths = 0;
    for call in chosen(&calls, most) {
        prepare(stage);
        let mut step = stage.step(&killing(&call.name, call.number), operations);
        match ended(&step.output().unwrap()) {
            Ok(End::Killed) => deaths += 1,
            // It took another way this time.
            Ok(End::Finished) => {}
            Err(why) => stage.wrong(format!("{name}, killed before {}: {why}", shown(call))),
        }
        let what = format!("{name}, killed before {}", shown(call));
        stage.judge(&what, states);
    }
    deaths
}

fn shown(call: &Call) -> String {
    let arguments: String = call.arguments.chars().take(200).collect();
    format!("{}({arguments}), number {}", call.name, call.number)
}

both_backends! {
    fn a_death_at_each_call_leaves_the_store_as_before_or_as_after(backend) {
        let mut stage = Stage::new(backend);
        let mut deaths = 0;
        let stories = stage.stories();
        for story in &stories {
            let states = stage.states(story);
            let died = die_everywhere(&mut stage, story.name, &story.operations, &states, |_| true, 10, &|stage| stage.reset_for(story));
            println!("{backend}: {}: {died} deaths", story.name);
            deaths += died;
        }
        report!("{backend}: {deaths} deaths in {} kinds of write, TOKENFS_TEST_SEED={}", stories.len(), seed());
        stage.verdict(&format!("{deaths} deaths at calls"));
        assert!(deaths > 50, "only {deaths} deaths");
    }

    fn a_death_while_it_is_put_right_does_no_harm(backend) {
        let mut stage = Stage::new(backend);
        let mut deaths = 0;
        let recover = vec![vec!["recover".to_owned()]];
        for story in stage.stories() {
            let states = stage.states(&story);
            let calls: Vec<Call> = calls(&stage, &story).into_iter().filter(Call::changes_something).collect();
            let mut places = 0;
            for place in chosen(&calls, 6) {
                stage.reset_for(&story);
                let _ = stage.step(&killing(&place.name, place.number), &story.operations).output().unwrap();
                if leftovers(&stage.softhsm.tokendir).is_empty() || (!full() && places == 2) {
                    continue;
                }
                places += 1;
                let again = |stage: &Stage| {
                    stage.reset_for(&story);
                    let _ = stage.step(&killing(&place.name, place.number), &story.operations).output().unwrap();
                };
                let name = format!("{}, after a death before {}, put right", story.name, shown(place));
                deaths += die_everywhere(&mut stage, &name, &recover, &states, Call::changes_something, 4, &again);
            }
        }
        report!("{backend}: {deaths} deaths while it was put right, TOKENFS_TEST_SEED={}", seed());
        stage.verdict(&format!("{deaths} deaths while it was put right"));
    }

    fn data_is_synced_before_what_refers_to_it(backend) {
        let stage = Stage::new(backend);
        let mut wrong = Vec::new();
        for story in stage.stories() {
            let calls = calls(&stage, &story);
            let order = Order::of(&calls);
            println!("{backend}: {}: {} calls, {} syncs", story.name, calls.len(), order.syncs);
            let more = order.wrong.iter().map(|why| format!("{}: {why}", story.name));
            wrong.extend(more);
            let changes = calls.iter().any(|call| call.name.contains("rename") || call.name.contains("pwrite"));
            if order.syncs == 0 && changes && !["chmod", "set the time", "remove an object", "rename an object", "rename an object and back"].contains(&story.name) {
                wrong.push(format!("{}: nothing was synced at all", story.name));
            }
            if story.name == "change and sync" && !order.unsynced().is_empty() {
                wrong.push(format!("{}: not synced in the end: {:?}", story.name, order.unsynced()));
            }
        }
        assert!(wrong.is_empty(), "{backend}:\n{}", wrong.join("\n"));
    }

    fn a_mount_dies_at_its_calls(backend) {
        let mut stage = Stage::new(backend);
        let mut deaths = 0;
        let lines = [
            "printf changed >$o/CKA_LABEL", "cp -a $k 00000000-0000-4000-8000-00000000000a", "mv $k .gone",
            "printf x >$o/.n && mv $o/.n $o/CKA_LABEL",
        ];
        let mut calls_of_all = 0;
        for line in lines {
            stage.reset();
            let before = stage.softhsm.read();
            let mount = Mount::new(&stage.softhsm);
            let output = stage.softhsm.directory.path().join("trace");
            let mut strace = attach(mount.pid(), &tracing(&output));
            assert!(shell(&stage, &mount, line).status.success(), "{line}");
            std::thread::sleep(write_common::HELD);
            mount.unmount();
            let _ = strace.wait();
            let states = [before, stage.softhsm.read()];
            let calls: Vec<Call> = calls_after(&fs::read_to_string(&output).unwrap(), "").into_iter().filter(Call::changes_something).collect();
            let calls: Vec<Call> = calls.into_iter().filter(|call| !call.arguments.contains("/dev/fuse")).collect();
            calls_of_all += calls.len();
            for call in chosen(&calls, 5) {
                stage.reset();
                let mut mount = Mount::new(&stage.softhsm);
                let mut strace = attach(mount.pid(), &killing(&call.name, call.number));
                let output = shell(&stage, &mount, line);
                if dies(&mount) {
                    deaths += 1;
                } else {
                    // Its threads have shared the work in another way this time.
                    mount.kill(nix::sys::signal::Signal::SIGKILL);
                }
                let _ = strace.wait();
                drop(mount);
                let what = format!("`{line}`, killed before {} (the shell: {})", shown(call), said(&output).trim_end());
                stage.judge_by_mount(&what, &states);
            }
        }
        report!("{backend}: {deaths} mounts died at one of {calls_of_all} calls that change something, TOKENFS_TEST_SEED={}", seed());
        stage.verdict(&format!("{deaths} deaths of mounts"));
        assert!(deaths > 5, "only {deaths} mounts died");
    }
}

fn shell(stage: &Stage, mount: &Mount, line: &str) -> std::process::Output {
    // The mount may be dead already: then the shell says so.
    let directory = mount.join(&stage.token);
    let mut shell = tool("bash");
    shell
        .arg("-c")
        .arg(format!("cd {} && {{ {line}; }}", directory.display()));
    shell.env("o", &stage.data).env("k", &stage.private);
    shell.output().unwrap()
}

/// `strace` with these arguments on a running process.
fn attach(pid: u32, arguments: &[OsString]) -> std::process::Child {
    let (strace, arguments) = arguments.split_first().unwrap();
    let mut strace = Command::new(strace);
    strace.args(arguments).args(["-p", &pid.to_string()]);
    let child = strace.stderr(Stdio::null()).spawn().unwrap();
    let tracer = || {
        let tasks = fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten();
        let traced: BTreeSet<bool> = tasks
            .map(|task| {
                let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
                status
                    .lines()
                    .any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
            })
            .collect();
        traced.is_empty() || traced == BTreeSet::from([true])
    };
    eventually(Duration::from_secs(5), "strace on the mount", tracer);
    child
}
