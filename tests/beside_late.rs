//! A `C_SetAttributeValue` that is late (`file` backend): SoftHSM has found the object and is stopped before it writes, and by the time that
//! it writes, the object has another name or is gone. SoftHSM makes the file anew then, whoever took it away. What somebody else does to the
//! same names is not taken for that.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod mount_common;
mod support;
mod write_common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use mount_common::entries;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::template::{Attribute, boolean, bytes, ulong};
use support::*;
use tokenfs::store::file::{decode, encode};
use write_common::*;

/// Is set when it goes, so that whoever looks at it ends with whatever else ends.
struct Raised<'a>(&'a AtomicBool);

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Has the session of `bench` change the label of the data object, and `act` done while it is stopped between the object's lock and its
/// file.
fn late(bench: &mut Bench, act: impl FnOnce(&mut Bench)) {
    let lock = bench.backing(&bench.data).with_extension("lock");
    let held = exclusively(&lock);
    bench.client.begin_label(bench.handles.0, "late");
    let pid = bench.client.pid();
    eventually(SOON, "SoftHSM waits for the lock", || {
        let locks = fs::read_to_string("/proc/locks").unwrap();
        let waiting = |line: &str| line.contains(" -> ") && line.contains(&format!(" {pid} "));
        locks.lines().any(waiting)
    });
    let process = Pid::from_raw(i32::try_from(pid).unwrap());
    kill(process, Signal::SIGSTOP).unwrap();
    eventually(SOON, "it is stopped, and waits no more", || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        status.contains("State:\tT")
    });
    drop(held);
    act(bench);
    // Longer than a rename waits.
    std::thread::sleep(Duration::from_millis(100));
    kill(process, Signal::SIGCONT).unwrap();
    bench.client.finish().expect("C_SetAttributeValue");
}

/// What SoftHSM itself does is what this goes by.
#[test]
fn softhsm_brings_back_what_another_softhsm_has_destroyed() {
    let mut bench = Bench::new(Backend::File);
    let mut other = bench.softhsm.p11();
    other.open("test", Some(PIN)).unwrap();
    late(&mut bench, |_| {
        let found = other.find_label("data").unwrap();
        other.destroy(found[0]).unwrap();
    });
    assert!(bench.has(&bench.data));
    assert_eq!(bench.stored_data("CKA_LABEL").unwrap(), b"late");
}

#[test]
fn what_comes_back_after_a_rename_is_put_in_the_place_of_what_was_renamed() {
    for to in [OTHER, "zzz"] {
        let mut bench = Bench::new(Backend::File);
        late(&mut bench, |bench| {
            bench.quiet(&format!("mv $o {to}"));
        });
        eventually(SOON, "it is there once", || !bench.has(&bench.data));
        let label = format!("{to}/CKA_LABEL");
        assert_eq!(bench.stored(&label).unwrap(), b"late", "the change is lost");
        bench.settle();
        assert_eq!(fs::read(bench.at(&label)).unwrap(), b"late");
        bench.assert_no_leftovers();
        bench.assert_sessions_agree();
        assert!(!bench.log().contains("there are both"), "{}", bench.log());
    }
}

/// One that does not wait between two changes has made more than one by the time that it is noticed.
#[test]
fn what_is_changed_without_a_pause_is_renamed_and_is_there_once() {
    const RENAMES: usize = 60;
    let bench = Bench::new(Backend::File);
    let mut session = bench.softhsm.p11();
    session.open("test", Some(PIN)).unwrap();
    let (over, set) = (AtomicBool::new(false), AtomicU64::new(0));
    let present = || {
        let mut names = entries(&bench.directory()).unwrap();
        for other in ["token", &*bench.public, &*bench.private] {
            names.remove(Path::new(other));
        }
        names
    };
    let label_of = |name: &Path| {
        let label = fs::read(bench.at(name).join("CKA_LABEL")).unwrap();
        String::from_utf8(label).unwrap().parse::<u64>().unwrap()
    };
    let data = [ulong(0, 0)];
    let mut name = PathBuf::from(&bench.data);
    let label = session.find(&data).unwrap()[0].handle;
    session.set_label(label, "0").unwrap();
    let mut change = || {
        let mut handle = label;
        while !over.load(Relaxed) {
            let number = set.load(Relaxed) + 1;
            if session.set_label(handle, &number.to_string()).is_ok() {
                set.store(number, Relaxed);
            } else if let Some(found) = session.find(&data).unwrap().first() {
                handle = found.handle;
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(&mut change);
        let end = Raised(&over);
        for round in 0..RENAMES {
            let before = set.load(Relaxed);
            let new = PathBuf::from(format!("11111111-2222-4333-8444-{round:012}"));
            fs::rename(bench.at(&name), bench.at(&new)).unwrap();
            for _ in 0..200 {
                if present().len() == 1 {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            assert!(
                present().len() == 1,
                "{round} {:?} {}",
                present(),
                bench.log()
            );
            assert!(label_of(&new) >= before, "a change of SoftHSM's is lost");
            name = new;
            eventually(SOON, "the session goes on", || {
                set.load(Relaxed) > before + 5
            });
        }
        drop(end);
    });
    let changes = set.load(Relaxed);
    assert_eq!(label_of(&name), changes, "the last change is lost");
    assert!(!bench.log().contains("there are both"), "{}", bench.log());
    report!("{RENAMES} renames beside {changes} changes");
}

/// A SoftHSM that has read an object before a change of ours, and writes what it has read after it: who looks at the log only is told too.
#[test]
fn what_is_overwritten_is_said_before_anybody_reads_it() {
    let bench = Bench::new(Backend::File);
    let path = bench.backing(&bench.data);
    let stale = decode(&fs::read(&path).unwrap()).unwrap();
    bench.quiet("printf ours >$o/CKA_LABEL");
    let generation = decode(&fs::read(&path).unwrap()).unwrap().generation;
    let late = encode(generation.unwrap() + 1, &stale.attributes);
    // In place, as SoftHSM does.
    fs::write(&path, &late).unwrap();
    eventually(SOON, "the log names it", || {
        bench.log().contains("overwrote a change of CKA_LABEL")
    });
}

/// Each of two mounts makes a new file of an object with each change, which is no object that SoftHSM is just making.
#[test]
fn two_mounts_that_write_the_same_object_take_turns() {
    let bench = Bench::new(Backend::File);
    let second = Mount::new(&bench.softhsm);
    let there = second.path().join(&bench.token).join(&bench.data);
    let (here, over) = (bench.at(&bench.data), AtomicBool::new(false));
    let write = |path: PathBuf| {
        let mut written = 0_u32;
        while !over.load(Relaxed) {
            fs::write(&path, format!("value {written}")).unwrap();
            written += 1;
        }
        written
    };
    let [one, two] = std::thread::scope(|scope| {
        let writers = [here.join("CKA_LABEL"), there.join("CKA_LABEL")]
            .map(|path| scope.spawn(|| write(path)));
        std::thread::sleep(Duration::from_secs(3));
        over.store(true, Relaxed);
        writers.map(|writer| writer.join().unwrap())
    });
    report!("{one} writes in one mount, {two} in the other");
    assert!(one.min(two) * 20 > one.max(two), "{one} and {two}");
}

#[test]
fn what_comes_back_although_the_renamed_one_has_changed_is_said() {
    let mut bench = Bench::new(Backend::File);
    late(&mut bench, |bench| {
        bench.quiet(&format!("mv $o {OTHER} && echo -n ours >{OTHER}/CKA_LABEL"));
    });
    eventually(SOON, "the log says so", || {
        bench.log().contains("there are both")
    });
    assert_eq!(bench.stored(format!("{OTHER}/CKA_LABEL")).unwrap(), b"ours");
    assert_eq!(bench.stored_data("CKA_LABEL").unwrap(), b"late");
}

#[test]
fn what_comes_back_after_it_was_removed_is_said() {
    for line in ["mv $o .gone", "rm -r $o && sync ."] {
        let mut bench = Bench::new(Backend::File);
        late(&mut bench, |bench| {
            bench.quiet(line);
            eventually(SOON, "it is removed", || {
                !bench.backing(&bench.data).exists()
            });
        });
        eventually(SOON, "the log says so", || {
            bench
                .log()
                .contains("as a SoftHSM brings it back that was changing it")
        });
        assert!(bench.has(&bench.data));
        assert!(!bench.log().contains("remove it"), "{}", bench.log());
        bench.quiet("rm -r $o && sync .");
        bench.settle();
        assert!(!bench.has(&bench.data));
        bench.assert_no_leftovers();
        bench.assert_sessions_agree();
    }
}

/// The lock files of objects that are not there.
fn lonely_locks(bench: &Bench) -> Vec<PathBuf> {
    let entries = fs::read_dir(bench.softhsm.tokendir.join(&bench.token)).unwrap();
    let mut lonely: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    lonely.retain(|path| {
        path.extension().is_some_and(|suffix| suffix == "lock")
            && !path.with_extension("object").exists()
    });
    lonely.retain(|path| path.file_stem().is_some_and(|stem| stem != "token"));
    lonely
}

both_backends! {
    /// An operator who restores a key must not be told that it is one too many.
    fn what_is_put_back_through_the_mount_is_not_said_to_be_back(backend) {
        for line in [
            "cp -a $o $out/o && rm -r $o && cp -a $out/o $o",
            "cp -a $o $out/o && rm -r $o && sync . && sleep 0.3 && cp -a $out/o $o",
            "mv $o .gone && mv .gone $o",
            "cp -a $o $out/o && rmdir $o && cp -a $out/o $o",
            "tar -C . -cf $out/o.tar $o && tar --recursive-unlink -xf $out/o.tar",
            "mv $o $other && mv $other $o",
            "mv $o ${o}x && mv ${o}x $o",
            "mv $o zzz && cp -a zzz $o && rm -r zzz",
        ] {
            let names_are_uuids = backend == Backend::Db;
            if names_are_uuids && (line.contains("{o}x") || line.contains("zzz")) {
                continue;
            }
            let bench = Bench::new(backend);
            for _ in 0..3 {
                let output = bench.shell(&format!("other={OTHER}; rm -rf $out/o; {line}; sync .")).output().unwrap();
                assert!(output.status.success(), "{backend} `{line}`: {output:?}");
                // What is reported of it is seen to within a moment.
                bench.settle();
                assert_eq!(bench.log(), "", "{backend} `{line}`");
                if backend == Backend::File {
                    assert_eq!(lonely_locks(&bench), Vec::<PathBuf>::new(), "`{line}`");
                }
            }
            bench.quiet("rm -r $o && sync .");
            if backend == Backend::File {
                assert_eq!(lonely_locks(&bench), Vec::<PathBuf>::new(), "`{line}`");
            }
            bench.assert_no_leftovers();
        }
    }
}

/// Who puts a backup into the store's own directory is no SoftHSM that is late: it is not given the place of what was renamed.
#[test]
fn what_somebody_else_puts_into_the_store_is_his() {
    // What SoftHSM made, and what a restore did, whose first version could be taken for the first of a SoftHSM.
    let restored = "cp -a $o $out/o && rm -r $o && cp -a $out/o $o && sync .";
    for (made, line, said) in [
        (":", "mv $o .gone", "is there again"),
        (":", "mv $o zzz", "now there are both"),
        (restored, "mv $o zzz", "now there are both"),
    ] {
        let bench = Bench::new(Backend::File);
        let path = bench.backing(&bench.data);
        bench.quiet(made);
        let old = fs::read(&path).unwrap();
        bench.quiet("echo -n newer >$o/CKA_LABEL");
        bench.quiet(line);
        eventually(SOON, "it is gone", || !path.exists());
        // Longer than a rename waits.
        std::thread::sleep(Duration::from_millis(100));
        fs::write(&path, &old).unwrap();
        eventually(SOON, "the log says so", || bench.log().contains(said));
        assert_eq!(fs::read(&path).unwrap(), old);
        let log = bench.log();
        assert!(
            !log.contains("remove it") && !log.contains("as a SoftHSM"),
            "{log}"
        );
        if line.ends_with("zzz") {
            assert_eq!(bench.stored("zzz/CKA_LABEL").unwrap(), b"newer");
        }
        assert_eq!(lonely_locks(&bench), Vec::<PathBuf>::new());
    }
}

fn labelled(label: &str) -> Vec<Attribute> {
    vec![
        ulong(0, 0),
        boolean(1, true),
        boolean(2, false),
        bytes(3, label),
    ]
}

/// A SoftHSM that makes or destroys an object takes the number that it writes to `generation` for one that it has read by
/// (`OSToken::createObject`, `Generation::commit`), and so steps over what others have made and removed since it has looked.
#[test]
fn a_session_that_makes_or_destroys_something_first_sees_what_was_made_and_removed() {
    for way in ["C_CreateObject", "C_DestroyObject"] {
        for change in ["made", "removed", "renamed"] {
            let mut bench = Bench::new(Backend::File);
            let name = bench.data.clone();
            let (spare, next) = ("spare", "next");
            bench.client.create(&labelled(spare)).unwrap();
            let count = |bench: &mut Bench| bench.client.find(&[]).unwrap().len();
            let spare = bench.client.find_label(spare).unwrap()[0];
            let before = count(&mut bench);
            let line = match change {
                "made" => format!("cp -a $o {OTHER} && sync -f ."),
                "removed" => format!("rm -r {name}"),
                _ => format!("mv {name} {OTHER}"),
            };
            bench.quiet(&line);
            let place = if change == "made" { OTHER } else { &*name };
            eventually(SOON, "it has reached the store", || {
                bench.has(place) == (change == "made")
            });
            // Without having looked: it finds by its handle what it destroys.
            if way == "C_CreateObject" {
                bench.client.create(&labelled(next)).unwrap();
            } else {
                bench.client.destroy(spare).unwrap();
            }
            let made = usize::from(way == "C_CreateObject") + usize::from(change == "made");
            let gone = usize::from(way == "C_DestroyObject") + usize::from(change == "removed");
            eventually(SOON, &format!("{way} and {change}"), || {
                count(&mut bench) == before + made - gone
            });
            if change == "renamed" {
                assert_eq!(bench.client.find_label("data").unwrap().len(), 1);
            }
        }
    }
}

/// Two mounts do not answer each other for ever.
#[test]
fn what_is_told_again_is_told_once() {
    let bench = Bench::new(Backend::File);
    let _second = Mount::new(&bench.softhsm);
    let generation = bench.softhsm.token_directory().join("generation");
    let number = || u64::from_be_bytes(fs::read(&generation).unwrap().try_into().unwrap());
    let raise = |by: u64| fs::write(&generation, (number() + by).to_be_bytes()).unwrap();
    let settled = |what: &str| {
        let mut seen = (number(), std::time::Instant::now());
        eventually(SOON, what, || {
            let now = number();
            if now != seen.0 {
                seen = (now, std::time::Instant::now());
            }
            seen.1.elapsed() > Duration::from_millis(300)
        });
        seen.0
    };
    bench.quiet(&format!("cp -a $o {OTHER} && sync -f ."));
    let first = settled("one creation");
    raise(1);
    let second = settled("a raise of somebody else");
    assert_eq!(second, first + 1 + 2, "ours has not followed once");
    raise(1);
    assert_eq!(
        settled("another one"),
        second + 1,
        "nothing of ours was stepped over"
    );
}
