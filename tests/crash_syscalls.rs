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
use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use crash_common::trace::{Call, Order, calls_after, killing, tracing};
use crash_common::*;
use support::*;
use write_common::leftovers;

const READY: &str = "tokenfs-step-ready";

/// The calls of the operations of a story.
fn calls(stage: &Stage, operations: &[Vec<String>]) -> Vec<Call> {
    stage.reset();
    let output = stage.softhsm.directory.path().join("trace");
    run(&mut stage.step(&tracing(&output), operations));
    let calls = calls_after(&fs::read_to_string(&output).unwrap(), READY);
    assert!(!calls.is_empty(), "no calls after {READY}");
    calls
}

fn die_everywhere(
    stage: &mut Stage,
    name: &str,
    operations: &[Vec<String>],
    states: &[Stored],
    prepare: &dyn Fn(&Stage),
) -> (usize, Vec<String>) {
    prepare(stage);
    let output = stage.softhsm.directory.path().join("trace");
    run(&mut stage.step(&tracing(&output), operations));
    let calls = calls_after(&fs::read_to_string(&output).unwrap(), READY);
    let (mut deaths, mut wrong) = (0, Vec::new());
    let chosen: Vec<&Call> = calls
        .iter()
        .filter(|call| full() || call.changes_something())
        .collect();
    for (index, call) in chosen.iter().enumerate() {
        // Long stories, such as the building of a token, repeat themselves in the middle.
        let inside = index > 15 && index + 15 < chosen.len();
        if !full() && inside && index % (chosen.len() / 30).max(1) != 0 {
            continue;
        }
        if [
            "exit_group",
            "exit",
            "sigaltstack",
            "rt_sigprocmask",
            "munmap",
            "brk",
            "mmap",
            "futex",
        ]
        .contains(&call.name.as_str())
        {
            continue;
        }
        prepare(stage);
        let mut step = stage.step(&killing(&call.name, call.number), operations);
        match ended(&step.output().unwrap()) {
            Ok(End::Killed) => deaths += 1,
            // It took another way this time.
            Ok(End::Finished) => {}
            Err(why) => wrong.push(format!("{name}, killed before {}: {why}", shown(call))),
        }
        if let Err(why) = stage.judge(states) {
            wrong.push(format!("{name}, killed before {}: {why}", shown(call)));
        }
    }
    (deaths, wrong)
}

fn shown(call: &Call) -> String {
    let arguments: String = call.arguments.chars().take(200).collect();
    format!("{}({arguments}), number {}", call.name, call.number)
}

both_backends! {
    fn a_death_at_each_call_leaves_the_store_as_before_or_as_after(backend) {
        let mut stage = Stage::new(backend);
        let (mut deaths, mut wrong) = (0, Vec::new());
        let stories = stage.stories();
        for story in &stories {
            let states = stage.states(story);
            let (died, more) = die_everywhere(&mut stage, story.name, &story.operations, &states, &Stage::reset);
            println!("{backend}: {}: {died} deaths", story.name);
            deaths += died;
            wrong.extend(more);
        }
        println!("{backend}: {deaths} deaths in {} kinds of write", stories.len());
        assert!(wrong.is_empty(), "{backend}: {} of {deaths} deaths left something wrong:\n{}", wrong.len(), wrong.join("\n"));
        assert!(deaths > 50, "only {deaths} deaths");
    }

    fn a_death_while_it_is_put_right_does_no_harm(backend) {
        let mut stage = Stage::new(backend);
        let (mut deaths, mut wrong) = (0, Vec::new());
        let recover = vec![vec!["recover".to_owned()]];
        for story in stage.stories() {
            let states = stage.states(&story);
            let changing: Vec<Call> = calls(&stage, &story.operations).into_iter().filter(Call::changes_something).collect();
            // Two of the places where something is left over; all of them in a full run.
            let places: Vec<_> = changing.iter().filter(|call| {
                stage.reset();
                let _ = stage.step(&killing(&call.name, call.number), &story.operations).output().unwrap();
                !leftovers(&stage.softhsm.tokendir).is_empty()
            }).collect();
            let every = if full() { 1 } else { (places.len() / 2).max(1) };
            for place in places.into_iter().step_by(every) {
                let again = |stage: &Stage| {
                    stage.reset();
                    let _ = stage.step(&killing(&place.name, place.number), &story.operations).output().unwrap();
                };
                let (died, more) = die_everywhere(&mut stage, story.name, &recover, &states, &again);
                deaths += died;
                wrong.extend(more.into_iter().map(|why| format!("after a death before {}: {why}", shown(place))));
            }
        }
        println!("{backend}: {deaths} deaths while it was put right");
        assert!(wrong.is_empty(), "{backend}: {} of {deaths} deaths left something wrong:\n{}", wrong.len(), wrong.join("\n"));
    }

    fn data_is_synced_before_what_refers_to_it(backend) {
        let stage = Stage::new(backend);
        let mut wrong = Vec::new();
        for story in stage.stories() {
            let calls = calls(&stage, &story.operations);
            let order = Order::of(&calls);
            println!("{backend}: {}: {} calls, {} syncs", story.name, calls.len(), order.syncs);
            let more = order.wrong.iter().map(|why| format!("{}: {why}", story.name));
            wrong.extend(more);
            let changes = calls.iter().any(|call| call.name.contains("rename") || call.name.contains("pwrite"));
            if order.syncs == 0 && changes && !["chmod", "set the time", "remove an object"].contains(&story.name) {
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
        let (mut deaths, mut wrong) = (0, Vec::new());
        let lines = [
            "printf changed >$o/CKA_LABEL", "cp -a $k 00000000-0000-4000-8000-00000000000a", "mv $k .gone",
            "printf x >$o/.n && mv $o/.n $o/CKA_LABEL",
        ];
        let names = ["pwrite64", "write", "fsync", "fdatasync", "renameat2", "linkat", "unlinkat", "unlink", "openat", "ftruncate", "fchmod"];
        for line in lines {
            stage.reset();
            let before = stage.softhsm.read();
            let mount = Mount::new(&stage.softhsm);
            shell(&stage, &mount, line);
            mount.unmount();
            let states = [before, stage.softhsm.read()];
            for name in names {
                let limit = if full() { 100 } else { 3 };
                for number in 1..=limit {
                    stage.reset();
                    let mut mount = Mount::new(&stage.softhsm);
                    let mut strace = attach(mount.pid(), name, number);
                    let output = shell(&stage, &mount, line);
                    std::thread::sleep(if line.starts_with("cp") { write_common::HELD } else { Duration::from_millis(20) });
                    let died = fs::read_dir(mount.path()).is_err();
                    if !died {
                        mount.kill(nix::sys::signal::Signal::SIGKILL);
                    }
                    let _ = strace.wait();
                    drop(mount);
                    deaths += usize::from(died);
                    if let Err(why) = stage.judge(&states) {
                        wrong.push(format!("`{line}`, killed at {name} number {number}: {why}\nthe shell: {}", said(&output)));
                    }
                    if !died {
                        break;
                    }
                }
            }
        }
        println!("{backend}: {deaths} mounts died at a call");
        assert!(wrong.is_empty(), "{backend}: {} of {deaths} deaths left something wrong:\n{}", wrong.len(), wrong.join("\n"));
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

/// `strace` on a running process, which it kills at the `number`th call of a name.
fn attach(pid: u32, name: &str, number: usize) -> std::process::Child {
    let mut strace: Command = tool("strace");
    strace.args([
        "-f",
        "-o",
        "/dev/null",
        "-p",
        &pid.to_string(),
        "-e",
        &format!("trace={name}"),
    ]);
    strace.args(["-e", &format!("inject={name}:signal=KILL:when={number}")]);
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
