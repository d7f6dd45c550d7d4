//! Dying at each named crash point, in each kind of write, on both backends: in the store layer, and in a mount.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod crash_common;
mod mount_common;
mod support;
mod write_common;

use std::collections::BTreeMap;
use std::fs;
use std::sync::Mutex;

use crash_common::*;
use support::*;
use write_common::leftovers;

/// Which points were passed, and by how many deaths, in all tests of this file.
type Covered = BTreeMap<&'static str, usize>;

/// Kills `step` at every passing of every point in every story; the points that were met, with the first story that did.
fn die_in_the_store(
    backend: Backend,
    covered: &Mutex<Covered>,
) -> BTreeMap<&'static str, &'static str> {
    let mut stage = Stage::new(backend);
    let mut stories_of = BTreeMap::new();
    let (mut deaths, mut wrong) = (0, Vec::new());
    let mut hits = Vec::new();
    for story in stage.stories() {
        let states = stage.states(&story);
        let (began, started) = (deaths, std::time::Instant::now());
        let other = match backend {
            Backend::File => "db.",
            Backend::Db => "file.",
        };
        let points = tokenfs::store::crash::POINTS.iter();
        for point in points.filter(|point| !point.starts_with(other)) {
            // A point may be passed several times: for each row, say.
            for time in 1..=if full() { usize::MAX } else { 2 } {
                stage.reset();
                let mut step = stage.step(&[], &story.operations);
                let output = step
                    .env("TOKENFS_CRASH_POINT", format!("{point}:{time}"))
                    .output();
                match ended(&output.unwrap()) {
                    Ok(End::Finished) => break,
                    Ok(End::Killed) => {}
                    Err(why) => {
                        panic!("{backend}: {}: killed at {point}:{time}: {why}", story.name)
                    }
                }
                deaths += 1;
                stories_of.entry(*point).or_insert(story.name);
                hits.push((story.clone(), states.clone(), format!("{point}:{time}")));
                *covered.lock().unwrap().entry(*point).or_default() += 1;
                if let Err(why) = stage.judge(&states) {
                    wrong.push(format!("{}, killed at {point}:{time}: {why}", story.name));
                }
            }
        }
        println!(
            "{backend}: {}: {} deaths, {:?}",
            story.name,
            deaths - began,
            started.elapsed()
        );
    }
    // Points that only whoever puts something right gets to.
    let points = tokenfs::store::crash::POINTS.iter();
    for point in points.filter(|point| point.contains("recover")) {
        for (story, states, first) in &hits {
            stage.reset();
            let mut step = stage.step(&[], &story.operations);
            let _ = step.env("TOKENFS_CRASH_POINT", first).output().unwrap();
            let mut recover = stage.step(&[], &[vec!["recover".to_owned()]]);
            let output = recover.env("TOKENFS_CRASH_POINT", point).output();
            if ended(&output.unwrap()) != Ok(End::Killed) {
                continue;
            }
            deaths += 1;
            *covered.lock().unwrap().entry(*point).or_default() += 1;
            if let Err(why) = stage.judge(states) {
                wrong.push(format!(
                    "{}, killed at {first}, put right until {point}: {why}",
                    story.name
                ));
            }
            if !full() {
                break;
            }
        }
    }
    println!("{backend}: {deaths} deaths at {} points", stories_of.len());
    assert!(
        wrong.is_empty(),
        "{backend}: {} of {deaths} deaths left something wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    stories_of
}

/// The same stories as shells tell them in a mount.
fn in_a_shell(story: &str) -> &'static str {
    match story {
        "change an attribute" | "change and sync" => "printf changed >$o/CKA_LABEL",
        "make an object longer than a page" => {
            "for i in {1..3000}; do printf 'long '; done >$o/CKA_VALUE"
        }
        "make it shorter again" => "printf a >$o/CKA_VALUE",
        "remove an attribute" => "rm $o/CKA_APPLICATION; sync $o",
        "create an object" => "cp -a $k 00000000-0000-4000-8000-00000000000a",
        "create, change and remove" => "cp -a $k 00000000-0000-4000-8000-00000000000a; rm -r 0*a",
        "remove an object" => "mv $k .gone",
        "chmod" => "chmod 640 $o/CKA_LABEL",
        "set the time" => "touch -d @1500000000 $o",
        "change the token's own" | "make the token's own longer" => {
            "printf '%-32s' test! >token/CKA_OS_TOKENLABEL"
        }
        // Two tokens with one serial number are more than SoftHSM can live with.
        "create a token" => concat!(
            "rm -rf $out/copy; cp -a . $out/copy; printf 0011223344556677 >$out/copy/token/CKA_OS_TOKENSERIAL; ",
            "printf '%-32s' copied >$out/copy/token/CKA_OS_TOKENLABEL; ",
            "cp -a $out/copy ../c0000000-0000-4000-8000-00000000000c; sync .."
        ),
        "remove a token" => "rm -r ../$second; sync ..",
        other => panic!("no shell for {other}"),
    }
}

fn shell(stage: &Stage, mount: &Mount, line: &str) -> std::process::Output {
    // The mount may be dead already: then the shell says so.
    let directory = mount.join(&stage.token);
    let mut shell = tool("bash");
    shell
        .arg("-c")
        .arg(format!("cd {} && {{ {line}; }}", directory.display()));
    shell
        .env("o", &stage.data)
        .env("k", &stage.private)
        .env("second", &stage.second)
        .env("out", stage.softhsm.directory.path());
    shell.output().unwrap()
}

fn die_in_a_mount(backend: Backend, stories: &BTreeMap<&'static str, &'static str>) {
    let mut stage = Stage::new(backend);
    let (mut deaths, mut survived, mut wrong) = (0, Vec::new(), Vec::new());
    for (point, story) in stories {
        let line = in_a_shell(story);
        stage.reset();
        let before = stage.softhsm.read();
        let mount = Mount::new(&stage.softhsm);
        let output = shell(&stage, &mount, line);
        assert!(
            output.status.success(),
            "{backend}: `{line}`: {}",
            said(&output)
        );
        mount.unmount();
        let mut states = vec![before, stage.softhsm.read()];
        // What removes several things removes them one by one.
        if story.contains("token") || story.contains("create") {
            for name in [&stage.second, &stage.token] {
                let mut between = states[0].clone();
                if let Some(token) = between.get_mut(name)
                    && *name == stage.second
                {
                    token.objects.clear();
                    states.push(between);
                }
            }
        }
        if *story == "create, change and remove" {
            stage.reset();
            let mount = Mount::new(&stage.softhsm);
            shell(
                &stage,
                &mount,
                "cp -a $k 00000000-0000-4000-8000-00000000000a",
            );
            mount.unmount();
            states.push(stage.softhsm.read());
        }
        stage.reset();
        let options = MountOptions::new().environment("TOKENFS_CRASH_POINT", point);
        let Ok(mut mount) =
            options.mount_with(&["--config".into(), stage.softhsm.conf.clone().into()])
        else {
            panic!("{backend}: cannot mount with {point}");
        };
        let output = shell(&stage, &mount, line);
        let alive = || fs::read_dir(mount.path()).is_ok();
        std::thread::sleep(write_common::HELD);
        if alive() {
            mount.kill(nix::sys::signal::Signal::SIGKILL);
            survived.push(*point);
        } else {
            deaths += 1;
        }
        drop(mount);
        if let Err(why) = stage.judge_by_softhsm(&states) {
            wrong.push(format!(
                "`{line}`, killed at {point}: SoftHSM: {why}\nthe shell: {}",
                said(&output)
            ));
        }
        // The next mount puts it right.
        Mount::new(&stage.softhsm).unmount();
        let left = leftovers(&stage.softhsm.tokendir);
        if !left.is_empty() {
            wrong.push(format!(
                "`{line}`, killed at {point}: left after the next mount: {left:?}"
            ));
        }
        if let Err(why) = stage.check(&stage.softhsm.tokendir, &[], &[0]) {
            wrong.push(format!(
                "`{line}`, killed at {point}, after the next mount: {why}"
            ));
        }
        if let Err(why) = stage.judge_by_softhsm(&states) {
            wrong.push(format!(
                "`{line}`, killed at {point}: SoftHSM after the next mount: {why}"
            ));
        }
    }
    println!("{backend}: {deaths} mounts died at a point; not met: {survived:?}");
    assert!(wrong.is_empty(), "{backend}:\n{}", wrong.join("\n"));
    assert!(deaths > 0, "no mount died");
}

#[test]
fn a_death_at_each_point_leaves_the_store_as_before_or_as_after() {
    let covered = Mutex::new(Covered::new());
    let (covered_ref, results) = (&covered, Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for backend in BACKENDS {
            let results = &results;
            scope.spawn(move || {
                let stories = die_in_the_store(backend, covered_ref);
                die_in_a_mount(backend, &stories);
                results.lock().unwrap().push(backend);
            });
        }
    });
    let covered = covered.into_inner().unwrap();
    let points = tokenfs::store::crash::POINTS;
    let missed: Vec<_> = points
        .iter()
        .filter(|point| !covered.contains_key(*point))
        .collect();
    println!(
        "{} of {} points, {} deaths: {covered:?}",
        covered.len(),
        points.len(),
        covered.values().sum::<usize>()
    );
    assert!(!points.is_empty(), "there are no crash points");
    assert!(missed.is_empty(), "no kind of write gets to {missed:?}");
}
