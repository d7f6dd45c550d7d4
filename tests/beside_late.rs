//! A `C_SetAttributeValue` that is late (`file` backend): SoftHSM has found the object and is stopped before it writes, and by the time that
//! it writes, the object has another name or is gone. SoftHSM makes the file anew then, whoever took it away.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod mount_common;
mod support;
mod write_common;

use std::fs;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::*;
use write_common::*;

const OTHER: &str = "11111111-2222-4333-8444-555555555555";

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
                .contains("has made it anew after it was removed")
        });
        assert!(bench.has(&bench.data));
        // As the log says.
        bench.quiet("rm -r $o && sync .");
        bench.settle();
        assert!(!bench.has(&bench.data));
        bench.assert_no_leftovers();
        bench.assert_sessions_agree();
    }
}
