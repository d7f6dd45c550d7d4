//! What two threads, or a failure in the middle, do to what is written: the tree without a mount, on the `file` backend. Each of these was
//! found in a review, and lost something.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokenfs::diagnostics::Diagnostics;
use tokenfs::store::attribute::{Attributes, Value};
use tokenfs::store::file::encode;
use tokenfs::store::watch::Change;
use tokenfs::store::{ObjectId, ObjectName, Options, Patience, Store, TokenName};
use tokenfs::tree::node::ROOT;
use tokenfs::tree::*;

const PRIVATE: u64 = 2;
fn patient() -> Patience {
    Patience::at_most(Duration::from_secs(5))
}
fn os(s: &str) -> &OsStr {
    OsStr::new(s)
}
fn me() -> Caller {
    Caller {
        uid: 0,
        gid: 0,
        pid: std::process::id(),
    }
}
struct F {
    tree: Tree,
    dir: tempfile::TempDir,
    token: Ino,
    object: Ino,
}
impl F {
    fn create(&self, directory: Ino, name: &str) -> HandleId {
        let how = Creation {
            mode: 0o600,
            ..Creation::default()
        };
        let created = self.tree.create(directory, os(name), how, me(), patient());
        created.unwrap().1
    }
    fn open(&self, file: Ino) -> HandleId {
        let opened = self
            .tree
            .open_for_writing(file, OpenForWriting::default(), patient());
        opened.unwrap()
    }
    fn close(&self, handle: HandleId) {
        self.tree.flush(handle, patient()).unwrap();
        self.tree.release(handle, patient()).unwrap();
    }
    /// A new file with that in it.
    fn put(&self, directory: Ino, name: &str, content: &[u8]) {
        let handle = self.create(directory, name);
        self.tree.write(handle, 0, content, patient()).unwrap();
        self.close(handle);
    }
    fn make_dir(&self, directory: Ino, name: &str) -> Ino {
        let made = self
            .tree
            .make_dir(directory, os(name), 0o700, me(), patient());
        made.unwrap().attributes.ino
    }
    /// Gives something a time.
    fn date(&self, ino: Ino, mtime: SystemTime) {
        let mut change = SetAttributes::default();
        change.metadata.mtime = Some(tokenfs::store::Time::At(mtime));
        let set = self.tree.set_attributes(ino, None, &change, patient());
        set.unwrap();
    }
    fn find(&self, directory: Ino, name: &str) -> Ino {
        let found = self.tree.lookup(directory, os(name), patient());
        found.unwrap().attributes.ino
    }
}
fn fixture() -> F {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("t")).unwrap();
    let mut own = Attributes::new();
    own.insert(
        tokenfs::pkcs11::CKA_OS_TOKENLABEL,
        Value::Bytes(b"one".to_vec()),
    );
    fs::write(dir.path().join("t/token.object"), encode(1, &own)).unwrap();
    let mut a = Attributes::new();
    a.insert(0, Value::Ulong(0));
    a.insert(PRIVATE, Value::Bool(false));
    a.insert(3, Value::Bytes(b"old".to_vec()));
    fs::write(dir.path().join("t/key.object"), encode(1, &a)).unwrap();
    fs::write(dir.path().join("t/key.lock"), b"").unwrap();
    std::thread::sleep(Duration::from_millis(700));
    let log = Arc::new(Diagnostics::new());
    let options = Options {
        lock_wait: Duration::from_secs(1),
        ..Options::default()
    };
    let store = Store::open(dir.path(), options, Arc::clone(&log)).unwrap();
    let tree = Tree::new(store, Settings::default(), log);
    let token = tree
        .lookup(ROOT, os("t"), patient())
        .unwrap()
        .attributes
        .ino;
    let object = tree
        .lookup(token, os("key"), patient())
        .unwrap()
        .attributes
        .ino;
    F {
        tree,
        dir,
        token,
        object,
    }
}
fn lock(path: &std::path::Path, kind: i32) -> File {
    let f = File::options().read(true).write(true).open(path).unwrap();
    let l = libc::flock {
        l_type: kind as i16,
        l_whence: 0,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let fd = nix::fcntl::fcntl(&f, nix::fcntl::FcntlArg::F_OFD_SETLK(&l));
    fd.unwrap();
    let _ = f.as_raw_fd();
    f
}
fn labels(f: &F) -> (bool, bool) {
    let seen = f.tree.lookup(f.object, os("CKA_LABEL"), patient()).is_ok();
    let bytes = fs::read(f.dir.path().join("t/key.object")).unwrap();
    let stored = bytes.windows(3).any(|w| w == b"new");
    (seen, stored)
}

#[test]
fn what_is_committed_beside_a_removal_that_waits_stays() {
    let f = fixture();
    f.tree.unlink(f.object, os("CKA_LABEL"), patient()).unwrap();
    std::thread::sleep(Duration::from_millis(250));
    // create again before the settle, so object is cached and readable
    std::thread::scope(|s| {
        let held = lock(&f.dir.path().join("t/key.lock"), libc::F_RDLCK);
        s.spawn(|| {
            f.tree.settle();
        }); // busy: waits for .lock until lock_wait (1 s)
        std::thread::sleep(Duration::from_millis(200));
        let h = f.create(f.object, "CKA_LABEL");
        f.tree.write(h, 0, b"new", patient()).unwrap();
        s.spawn(|| {
            std::thread::sleep(Duration::from_millis(1300));
            drop(held);
        });
        f.close(h); // close() said 0
    });
    println!("after close: (seen in mount, in store) = {:?}", labels(&f));
    std::thread::sleep(Duration::from_millis(1500));
    f.tree.settle();
    println!("2 s later: {:?}", labels(&f));
    println!("{}", f.tree.diagnostics().render());
    assert_eq!(labels(&f), (true, true));
}

#[test]
fn what_is_committed_beside_the_removal_of_another_stays() {
    let f = fixture();
    // X unlinked and made again (open), Y unlinked: only Y is due.
    f.tree.unlink(f.object, os("CKA_LABEL"), patient()).unwrap();
    f.tree.unlink(f.object, os("CKA_CLASS"), patient()).unwrap();
    let h = f.create(f.object, "CKA_LABEL");
    std::thread::sleep(Duration::from_millis(250));
    std::thread::scope(|s| {
        let held = lock(&f.dir.path().join("t/key.lock"), libc::F_RDLCK);
        s.spawn(|| {
            f.tree.settle();
        });
        std::thread::sleep(Duration::from_millis(100));
        f.tree.write(h, 0, b"new", patient()).unwrap();
        s.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            drop(held);
        });
        f.close(h);
    });
    println!("after close: {:?}", labels(&f));
    std::thread::sleep(Duration::from_millis(400));
    f.tree.settle();
    println!("later: {:?}", labels(&f));
    assert_eq!(labels(&f), (true, true));
}

#[test]
fn what_is_open_in_a_scratch_directory_follows_it_into_its_object() {
    let f = fixture();
    let d = f.make_dir(f.token, ".x");
    for (n, v) in [
        ("CKA_CLASS", "0\n"),
        ("CKA_PRIVATE", "false\n"),
        ("CKA_LABEL", "old"),
    ] {
        f.put(d, n, v.as_bytes());
    }
    let l = f.find(d, "CKA_LABEL");
    let h = f.open(l);
    f.tree
        .rename(
            (f.token, os(".x")),
            (f.token, os("obj")),
            RenameHow::default(),
            patient(),
        )
        .unwrap();
    f.tree.write(h, 0, b"new", patient()).unwrap();
    f.close(h);
    let bytes = fs::read(f.dir.path().join("t/obj.object")).unwrap();
    assert!(
        bytes.windows(3).any(|w| w == b"new"),
        "close said 0 and nothing was written"
    );
}

#[test]
fn an_object_in_which_scratch_is_written_is_not_finished() {
    let f = fixture();
    let d = f.make_dir(f.token, "obj");
    for (n, v) in [("CKA_CLASS", "0\n"), ("CKA_PRIVATE", "false\n")] {
        f.put(d, n, v.as_bytes());
    }
    let h = f.create(d, ".CKA_VALUE.x8Kd2p");
    for i in 0..10 {
        f.tree.write(h, i, b"x", patient()).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        f.tree.settle();
    }
    assert!(
        !f.dir.path().join("t/obj.object").exists(),
        "half an object is in the store while rsync writes"
    );
}

#[test]
fn a_rename_of_an_object_that_fails_leaves_one_of_it() {
    let f = fixture();
    let held = lock(&f.dir.path().join("t/key.lock"), libc::F_RDLCK);
    let r = f.tree.rename(
        (f.token, os("key")),
        (f.token, os("other")),
        RenameHow::default(),
        Patience::at_most(Duration::from_secs(1)),
    );
    drop(held);
    println!("{:?}", r.as_ref().map_err(|e| e.to_string()));
    assert!(r.is_err());
    assert!(
        !f.dir.path().join("t/other.object").exists(),
        "the rename failed and the copy is there"
    );
}

#[test]
fn scratch_that_is_extended_by_path_is_limited_too() {
    let f = fixture();
    for i in 0..6 {
        let n = format!(".big{i}");
        let h = f.create(f.object, &n);
        f.tree.release(h, patient()).unwrap();
        let c = SetAttributes {
            size: Some(64 << 20),
            ..SetAttributes::default()
        };
        let r = f
            .tree
            .set_attributes(f.find(f.object, &n), None, &c, patient());
        if i >= 4 {
            assert!(r.is_err(), "{i}: more than 256 MiB of scratch");
        }
    }
}

#[test]
fn scratch_directories_can_be_deep() {
    let f = fixture();
    let mut d = f.make_dir(f.token, ".x");
    let top = d;
    for (n, v) in [("CKA_CLASS", "0\n"), ("CKA_PRIVATE", "false\n")] {
        let h = f.create(top, n);
        f.tree.write(h, 0, v.as_bytes(), patient()).unwrap();
        f.tree.release(h, patient()).unwrap();
    }
    for _ in 0..90_000 {
        d = f.make_dir(d, ".d");
    }
    println!("made");
    std::thread::scope(|s| {
        s.spawn(|| {
            f.tree
                .rename(
                    (f.token, os(".x")),
                    (f.token, os("obj")),
                    RenameHow::default(),
                    patient(),
                )
                .unwrap()
        });
    });
}

#[test]
fn a_copy_that_pauses_before_it_says_whether_it_is_private_is_not_finished() {
    let f = fixture();
    let d = f.make_dir(f.token, "obj");
    for (n, v) in [
        ("CKA_CLASS", "0\n"),
        ("CKA_LABEL", "label"),
        ("CKA_PRIVATE", "false\n"),
    ] {
        let tmp = format!(".{n}.x8Kd2p");
        f.put(d, &tmp, v.as_bytes());
        std::thread::sleep(Duration::from_millis(250)); // the network
        f.tree.settle();
        let r = f
            .tree
            .rename((d, os(&tmp)), (d, os(n)), RenameHow::default(), patient());
        println!("{n}: {:?}", r.map_err(|e| e.to_string()));
        f.tree.settle();
    }
    std::thread::sleep(Duration::from_millis(250));
    f.tree.settle();
    let l = f.tree.lookup(d, os("CKA_LABEL"), patient());
    assert!(l.is_ok());
}

#[test]
fn a_scratch_directory_that_became_a_map_is_the_map() {
    let f = fixture();
    let mut left = 0;
    {
        let d = f.make_dir(f.object, ".m");
        let h = f.create(d, "CKA_EXTRACTABLE");
        f.tree.write(h, 0, b"true\n", patient()).unwrap();
        f.tree.release(h, patient()).unwrap();
        // one only, to see where a write goes
        f.tree
            .rename(
                (f.object, os(".m")),
                (f.object, os("CKA_WRAP_TEMPLATE")),
                RenameHow::default(),
                patient(),
            )
            .unwrap();
        let r = f.tree.create(
            d,
            os("CKA_SIGN"),
            Creation {
                mode: 0o600,
                ..Creation::default()
            },
            me(),
            patient(),
        );
        if let Ok((_, h)) = r {
            f.tree.write(h, 0, b"true\n", patient()).unwrap();
            f.close(h);
            left += 1;
        }
    }
    let m = f.find(f.object, "CKA_WRAP_TEMPLATE");
    assert!(
        left == 0 || f.tree.lookup(m, os("CKA_SIGN"), patient()).is_ok(),
        "written through the directory that was renamed, acknowledged, and nowhere"
    );
}

fn rewrite(f: &F, label: &[u8]) {
    let mut a = Attributes::new();
    a.insert(0, Value::Ulong(0));
    a.insert(PRIVATE, Value::Bool(false));
    a.insert(3, Value::Bytes(label.to_vec()));
    fs::write(f.dir.path().join("t/key.object"), encode(2, &a)).unwrap();
}

#[test]
fn a_rename_of_an_object_loses_nothing_that_softhsm_writes() {
    let f = fixture();
    let held = lock(&f.dir.path().join("t/key.lock"), libc::F_RDLCK);
    std::thread::scope(|s| {
        let t = s.spawn(|| {
            f.tree.rename(
                (f.token, os("key")),
                (f.token, os("other")),
                RenameHow::default(),
                patient(),
            )
        });
        std::thread::sleep(Duration::from_millis(300));
        rewrite(&f, b"new"); // a SoftHSM that got the lock first
        drop(held);
        println!("{:?}", t.join().unwrap().map_err(|e| e.to_string()));
    });
    let bytes = fs::read(f.dir.path().join("t/other.object")).unwrap();
    assert!(
        bytes.windows(3).any(|w| w == b"new"),
        "SoftHSM's update is lost"
    );
}

#[test]
fn a_rename_of_an_attribute_moves_what_is_stored_at_that_moment() {
    let f = fixture();
    let held = lock(&f.dir.path().join("t/key.lock"), libc::F_RDLCK);
    std::thread::scope(|s| {
        let t = s.spawn(|| {
            f.tree.rename(
                (f.object, os("CKA_LABEL")),
                (f.object, os("CKA_ID")),
                RenameHow::default(),
                patient(),
            )
        });
        std::thread::sleep(Duration::from_millis(300));
        rewrite(&f, b"new");
        drop(held);
        println!("{:?}", t.join().unwrap().map_err(|e| e.to_string()));
    });
    let bytes = fs::read(f.dir.path().join("t/key.object")).unwrap();
    assert!(
        bytes.windows(3).any(|w| w == b"new"),
        "SoftHSM's update is lost"
    );
}

#[test]
fn of_two_writers_of_what_was_unlinked_the_one_that_is_refused_takes_nothing_away() {
    let f = fixture();
    f.tree.unlink(f.object, os("CKA_CLASS"), patient()).unwrap();
    let a = f.create(f.object, "CKA_CLASS");
    let b = f.create(f.object, "CKA_CLASS");
    // What only close can refuse.
    f.tree.write(a, 0, b"CKO_", patient()).unwrap();
    f.tree.write(b, 0, b"3\n", patient()).unwrap();
    let held = lock(&f.dir.path().join("t/key.lock"), libc::F_RDLCK);
    std::thread::scope(|s| {
        let ta = s.spawn(|| f.tree.flush(a, patient()));
        std::thread::sleep(Duration::from_millis(100));
        let tb = s.spawn(|| f.tree.flush(b, patient()));
        std::thread::sleep(Duration::from_millis(100));
        drop(held);
        println!(
            "a {:?} b {:?}",
            ta.join().unwrap().is_ok(),
            tb.join().unwrap().is_ok()
        );
    });
    f.tree.release(b, patient()).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    f.tree.settle();
    let (seen, _) = (
        f.tree.lookup(f.object, os("CKA_CLASS"), patient()).is_ok(),
        0,
    );
    assert!(seen, "b's close said 0");
}

#[test]
fn a_rename_that_fails_leaves_what_had_the_name() {
    let f = fixture();
    let h = f.create(f.object, "CKA_LABEL~");
    f.tree.write(h, 0, b"backup", patient()).unwrap();
    f.tree.release(h, patient()).unwrap();
    // busy draft: an unlink of another attribute is being written and waits
    f.tree.unlink(f.object, os("CKA_CLASS"), patient()).unwrap();
    std::thread::sleep(Duration::from_millis(250));
    let held = lock(&f.dir.path().join("t/key.lock"), libc::F_RDLCK);
    std::thread::scope(|s| {
        s.spawn(|| f.tree.settle());
        std::thread::sleep(Duration::from_millis(100));
        let r = f.tree.rename(
            (f.object, os("CKA_LABEL")),
            (f.object, os("CKA_LABEL~")),
            RenameHow::default(),
            Patience::at_most(Duration::from_millis(300)),
        );
        println!("{:?}", r.map_err(|e| e.to_string()));
        drop(held);
    });
    assert!(
        f.tree.lookup(f.object, os("CKA_LABEL~"), patient()).is_ok(),
        "the rename failed and the target is gone"
    );
}

#[test]
fn what_is_unlinked_while_it_is_committed_is_gone() {
    let f = fixture();
    f.tree.unlink(f.object, os("CKA_LABEL"), patient()).unwrap();
    let a = f.create(f.object, "CKA_LABEL");
    f.tree.write(a, 0, b"new", patient()).unwrap();
    let held = lock(&f.dir.path().join("t/key.lock"), libc::F_RDLCK);
    std::thread::scope(|s| {
        let ta = s.spawn(|| f.tree.flush(a, patient()));
        std::thread::sleep(Duration::from_millis(100));
        f.tree.unlink(f.object, os("CKA_LABEL"), patient()).unwrap();
        println!(
            "after unlink visible: {}",
            f.tree.lookup(f.object, os("CKA_LABEL"), patient()).is_ok()
        );
        drop(held);
        println!("flush {:?}", ta.join().unwrap().is_ok());
    });
    f.tree.release(a, patient()).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    f.tree.settle();
    println!("later: {:?}", labels(&f));
    assert!(
        f.tree.lookup(f.object, os("CKA_LABEL"), patient()).is_err(),
        "unlink said 0"
    );
}

#[test]
fn what_somebody_else_writes_over_what_was_unlinked_stays() {
    let f = fixture();
    f.tree.unlink(f.object, os("CKA_LABEL"), patient()).unwrap();
    let label = || f.tree.lookup(f.object, os("CKA_LABEL"), patient());
    assert!(label().is_err());
    // Another mount, or a SoftHSM, whose call has returned.
    let other = Store::open(f.dir.path(), Options::default(), Arc::default()).unwrap();
    let token = other.token(&TokenName::new(os("t")).unwrap()).unwrap();
    let id = ObjectId::Object(ObjectName::new(os("key")).unwrap());
    let mut relabel = |attributes: &mut Attributes| {
        attributes.insert(3, Value::Bytes(b"theirs".to_vec()));
        Ok(())
    };
    token.update(&id, &mut relabel, None, patient()).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let label = label().expect("it is there again at once").attributes.ino;
    let reopened = f.open(label);
    assert_eq!(f.tree.read(reopened, 0, 10).unwrap(), b"theirs");
    f.close(reopened);
    std::thread::sleep(Duration::from_millis(300));
    f.tree.settle();
    let stored = token.object(&id, patient()).unwrap();
    assert_eq!(stored.attributes.bytes(3), Some(&b"theirs"[..]));
    let log = f.tree.diagnostics().render();
    assert!(
        log.contains("t/key/CKA_LABEL: it was removed here"),
        "{log}"
    );
}

#[test]
fn what_was_unlinked_is_not_seen_while_something_new_is_committed() {
    let f = fixture();
    f.tree.unlink(f.object, os("CKA_LABEL"), patient()).unwrap();
    let a = f.create(f.object, "CKA_LABEL");
    f.tree.write(a, 0, b"new", patient()).unwrap();
    let held = lock(&f.dir.path().join("t/key.lock"), libc::F_RDLCK);
    std::thread::scope(|s| {
        let ta = s.spawn(|| f.tree.flush(a, patient()));
        std::thread::sleep(Duration::from_millis(100));
        let h = f
            .tree
            .open(f.find(f.object, "CKA_LABEL"), patient())
            .unwrap();
        let seen = f.tree.read(h, 0, 100).unwrap();
        drop(held);
        ta.join().unwrap().unwrap();
        assert_ne!(seen, b"old");
    });
}

#[test]
fn the_time_that_a_token_is_given_stays_beside_the_last_object_that_is_written() {
    let f = fixture();
    let given = std::time::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    for round in 0..300 {
        let name = format!("00000000-0000-4000-8000-{round:012}");
        let directory = f.make_dir(f.token, &name);
        for (name, value) in [("CKA_CLASS", "CKO_DATA\n"), ("CKA_PRIVATE", "false\n")] {
            f.put(directory, name, value.as_bytes());
        }
        let start = std::sync::Barrier::new(2);
        std::thread::scope(|s| {
            s.spawn(|| {
                start.wait();
                f.date(directory, given);
            });
            start.wait();
            std::thread::sleep(Duration::from_micros(round * 7 % 1500));
            f.date(f.token, given);
        });
        let shown = f
            .tree
            .attributes(f.token, patient())
            .unwrap()
            .attributes
            .mtime;
        let stored = fs::metadata(f.dir.path().join("t"))
            .unwrap()
            .modified()
            .unwrap();
        assert_eq!((shown, stored), (given, given), "in round {round}");
    }
}

#[test]
fn an_attribute_has_the_time_that_it_was_given_while_its_directory_is_given_one() {
    let f = fixture();
    let at = |seconds| std::time::UNIX_EPOCH + Duration::from_secs(1_000_000_000 + seconds);
    let shown = |name| {
        let found = f.tree.lookup(f.object, os(name), patient()).unwrap();
        found.attributes.mtime
    };
    for round in 0..400u64 {
        // As a restore by rsync: one process gives the directory its time, and the other one brings a value with the same time.
        let (before, given) = (at(2 * round), at(2 * round + 1));
        for name in ["CKA_CLASS", "CKA_LABEL"] {
            f.date(f.find(f.object, name), before);
        }
        f.put(f.object, ".CKA_LABEL.x", b"new");
        f.date(f.find(f.object, ".CKA_LABEL.x"), given);
        let start = std::sync::Barrier::new(2);
        std::thread::scope(|s| {
            s.spawn(|| {
                start.wait();
                for turn in 0..40 {
                    f.date(f.object, given + Duration::from_millis(turn));
                }
            });
            start.wait();
            let (from, to) = (os(".CKA_LABEL.x"), os("CKA_LABEL"));
            let how = RenameHow::default();
            let renamed = f
                .tree
                .rename((f.object, from), (f.object, to), how, patient());
            renamed.unwrap();
        });
        let times = (shown("CKA_LABEL"), shown("CKA_CLASS"));
        assert_eq!(times, (given, before), "in round {round}");
    }
}

#[test]
fn what_is_given_a_time_has_it_while_what_was_unlinked_before_is_written() {
    let f = fixture();
    let at = |seconds| std::time::UNIX_EPOCH + Duration::from_secs(1_000_000_000 + seconds);
    let class = f.find(f.object, "CKA_CLASS");
    for round in 0..12u64 {
        f.put(f.object, "CKA_LABEL", b"new");
        f.tree.unlink(f.object, os("CKA_LABEL"), patient()).unwrap();
        // One attribute, as by `cp -p`, or all of the object.
        let dated = if round % 2 == 0 { class } else { f.object };
        // Both wait, and now one comes first, now the other.
        let held = lock(&f.dir.path().join("t/key.lock"), libc::F_WRLCK);
        std::thread::scope(|s| {
            s.spawn(|| f.date(dated, at(round)));
            std::thread::sleep(Duration::from_millis(30));
            s.spawn(|| f.tree.sync_dir(f.object, patient()).unwrap());
            std::thread::sleep(Duration::from_millis(30 + 3 * round));
            drop(held);
        });
        let shown = f.tree.attributes(dated, patient()).unwrap();
        assert_eq!(shown.attributes.mtime, at(round), "in round {round}");
    }
}

#[test]
fn what_was_scratch_and_is_an_attribute_is_told_of_under_the_number_of_the_scratch() {
    let f = fixture();
    f.put(f.object, ".CKA_LABEL.x", b"new");
    let scratch = f.find(f.object, ".CKA_LABEL.x");
    let (from, to) = (os(".CKA_LABEL.x"), os("CKA_LABEL"));
    let how = RenameHow::default();
    f.tree
        .rename((f.object, from), (f.object, to), how, patient())
        .unwrap();
    // Whoever looks the name up comes by that number too, and whoever changes the attribute says so under it.
    assert_eq!(f.find(f.object, "CKA_LABEL"), scratch);
    let name = |name| TokenName::new(os(name)).unwrap();
    let id = ObjectId::Object(ObjectName::new(os("key")).unwrap());
    let (stale, _) = f.tree.stale(&[Change::Object(name("t"), id)], patient());
    assert!(stale.contains(&Stale::Content(scratch)), "{stale:?}");
}

#[test]
fn who_comes_by_the_number_of_what_was_renamed_over_finds_what_has_its_name() {
    let f = fixture();
    let number = f.find(f.object, "CKA_LABEL");
    let reading = f.tree.open(number, patient()).unwrap();
    f.put(f.object, ".t", b"next");
    let rename = |from, to| {
        f.tree.rename(
            (f.object, os(from)),
            (f.object, os(to)),
            RenameHow::default(),
            patient(),
        )
    };
    rename(".t", "CKA_LABEL").unwrap();
    // Who has it open reads it to the end, and whoever opens that once more.
    let again = f.tree.open(number, patient()).unwrap();
    for open in [reading, again] {
        assert_eq!(f.tree.read(open, 0, 100).unwrap(), b"old");
        f.tree.release(open, patient()).unwrap();
    }
    // Nobody has: who asks by that number found it by its name a moment ago.
    let now = f.tree.open(number, patient()).unwrap();
    assert_eq!(f.tree.read(now, 0, 100).unwrap(), b"next");
    let attributes = f.tree.attributes(number, patient()).unwrap().attributes;
    assert_eq!((attributes.ino, attributes.size), (number, 4));
    let writing = f.open(number);
    f.tree.write(writing, 0, b"last", patient()).unwrap();
    f.close(writing);
    assert_eq!(label_of(&f, "key"), b"last");
    // What is unlinked is gone when nobody has it open.
    let number = f.find(f.object, "CKA_LABEL");
    let reading = f.tree.open(number, patient()).unwrap();
    f.tree.unlink(f.object, os("CKA_LABEL"), patient()).unwrap();
    f.tree.release(reading, patient()).unwrap();
    let error = f.tree.open(number, patient()).unwrap_err();
    assert_eq!(error.kind(), tokenfs::error::ErrorKind::NotFound);
}

/// Who is about to open a file by its name when it loses that, while somebody is in the middle of writing it, sees a value that somebody meant.
#[test]
fn what_is_being_written_and_loses_its_name_is_opened_as_it_was() {
    for truncate in [false, true] {
        for is_replaced in [false, true] {
            let f = fixture();
            let number = f.find(f.object, "CKA_LABEL");
            let how = OpenForWriting {
                truncate,
                ..OpenForWriting::default()
            };
            let writing = f.tree.open_for_writing(number, how, patient()).unwrap();
            f.tree.write(writing, 0, b"n", patient()).unwrap();
            if is_replaced {
                f.put(f.object, ".t", b"next");
                let (from, to) = ((f.object, os(".t")), (f.object, os("CKA_LABEL")));
                let renamed = f.tree.rename(from, to, RenameHow::default(), patient());
                renamed.unwrap();
            } else {
                f.tree.unlink(f.object, os("CKA_LABEL"), patient()).unwrap();
            }
            f.tree.write(writing, 1, b"e", patient()).unwrap();
            let reading = f.tree.open(number, patient()).unwrap();
            assert_eq!(f.tree.read(reading, 0, 100).unwrap(), b"old");
            f.tree.release(reading, patient()).unwrap();
            // What its writer has closed once is what he meant.
            f.tree.flush(writing, patient()).unwrap();
            let reading = f.tree.open(number, patient()).unwrap();
            let meant = if truncate { "ne" } else { "ned" };
            assert_eq!(f.tree.read(reading, 0, 100).unwrap(), meant.as_bytes());
            f.tree.release(reading, patient()).unwrap();
            f.close(writing);
        }
    }
}

#[test]
fn a_scratch_file_that_is_an_attribute_does_not_count_as_scratch() {
    let f = fixture();
    let name = "00000000-0000-4000-8000-000000000000";
    let directory = f.make_dir(f.token, name);
    // More than the limit for scratch: the kernel may remember all of them, and a restore makes one for each attribute.
    for _ in 0..100_001 {
        f.put(directory, ".CKA_ID.x", b"1");
        let renamed = f.tree.rename(
            (directory, os(".CKA_ID.x")),
            (directory, os("CKA_ID")),
            RenameHow::default(),
            patient(),
        );
        renamed.unwrap();
    }
}

#[test]
fn what_is_being_written_has_a_limit_however_it_is_spread() {
    let f = fixture();
    let most = 64 * 1024 * 1024;
    let open = |name: &str| f.create(f.object, name);
    // Nothing but the last byte: what is before it takes memory all the same.
    let fill = |handle| f.tree.write(handle, most - 1, b"x", patient());
    let files = [
        ".scratch",
        "CKA_VALUE",
        "CKA_ID",
        "CKA_SUBJECT",
        "CKA_ISSUER",
    ]
    .map(open);
    let (last, first) = files.split_last().unwrap();
    for handle in first {
        fill(*handle).unwrap();
    }
    let refused = fill(*last).unwrap_err();
    assert_eq!(refused.kind(), tokenfs::error::ErrorKind::NoSpace);
    // Others go on when one of them is gone.
    f.tree.release(files[0], patient()).unwrap();
    f.tree.unlink(f.object, os(".scratch"), patient()).unwrap();
    fill(*last).unwrap();
}

#[test]
fn there_is_a_limit_on_how_much_is_scratch_or_pending() {
    let f = fixture();
    let directory = f.make_dir(f.token, ".many");
    let kind = |outcome: Result<_, tokenfs::error::Error>| outcome.map(drop).map_err(|e| e.kind());
    let full = Err(tokenfs::error::ErrorKind::NoSpace);
    let make = |at, name: &str| kind(f.tree.make_dir(at, os(name), 0o700, me(), patient()));
    // The directory itself is one.
    for number in 1..100_000 {
        make(directory, &number.to_string()).unwrap();
    }
    assert_eq!(make(directory, "more"), full);
    f.tree
        .remove_dir(directory, os("1"), None, patient())
        .unwrap();
    assert_eq!(make(directory, "more"), Ok(()));
    for number in 0..100_000 {
        let name = format!("00000000-0000-4000-8000-{number:012}");
        make(f.token, &name).unwrap();
    }
    let name = |number| format!("00000000-0000-4000-8000-{number:012}");
    assert_eq!(make(f.token, &name(100_000)), full);
    let first = name(0);
    f.tree
        .remove_dir(f.token, os(&first), None, patient())
        .unwrap();
    assert_eq!(make(f.token, &name(100_000)), Ok(()));
    assert_eq!(make(f.token, &name(100_001)), full);
}

#[test]
fn what_is_appended_to_what_has_grown_meanwhile_has_a_limit_too() {
    let f = fixture();
    let label = f.find(f.object, "CKA_LABEL");
    let how = OpenForWriting {
        append: true,
        ..OpenForWriting::default()
    };
    let appending = f.tree.open_for_writing(label, how, patient()).unwrap();
    let growing = f.open(label);
    let most: u64 = 64 << 20;
    f.tree.write(growing, most - 1, b"x", patient()).unwrap();
    f.close(growing);
    f.tree.write(appending, 0, b"ab", patient()).unwrap();
    let refused = f.tree.flush(appending, patient()).unwrap_err();
    assert_eq!(refused.kind(), tokenfs::error::ErrorKind::TooLarge);
    f.tree.release(appending, patient()).unwrap();
    let seen = f.tree.attributes(label, patient()).unwrap();
    assert_eq!(seen.attributes.size, most, "what was there stays");
}

/// `touch f` beside `echo x >f`: its `close` comes when somebody has given it a value.
#[test]
fn a_file_that_is_closed_empty_takes_no_value_away() {
    let f = fixture();
    for round in 0..20 {
        let name = format!("0x800010{round:02}.bytes");
        let touched = f.create(f.object, &name);
        let written = f.open(f.find(f.object, &name));
        f.tree.write(written, 0, b"value", patient()).unwrap();
        let held = lock(&f.dir.path().join("t/key.lock"), libc::F_WRLCK);
        std::thread::scope(|scope| {
            scope.spawn(|| f.close(touched));
            scope.spawn(|| f.close(written));
            std::thread::sleep(Duration::from_millis(20));
            drop(held);
        });
        let read = f.tree.open(f.find(f.object, &name), patient()).unwrap();
        let content = f.tree.read(read, 0, 64).unwrap();
        assert_eq!(content, b"value", "round {round}");
        f.tree.release(read, patient()).unwrap();
    }
}

/// The kernel drops what it was about to tell of when the last one who uses a mount that is out of sight lets go: that a file was closed for good.
#[test]
fn what_was_closed_when_the_mount_ended_is_closed() {
    let f = fixture();
    let label = f.find(f.object, "CKA_LABEL");
    let how = OpenForWriting {
        truncate: true,
        ..OpenForWriting::default()
    };
    // Somebody is in the middle of writing that: he has cut it, and goes on.
    let open = f.tree.open_for_writing(label, how, patient()).unwrap();
    f.tree.write(open, 0, b"a part", patient()).unwrap();
    let made = f.create(f.object, "CKA_APPLICATION");
    f.tree.flush(made, patient()).unwrap();
    f.tree.release_closed();
    f.tree.finish();
    assert_eq!(label_of(&f, "key"), b"old");
    let bytes = fs::read(f.dir.path().join("t/key.object")).unwrap();
    let stored = tokenfs::store::file::decode(&bytes).unwrap().attributes;
    assert_eq!(stored.bytes(0x10), Some(&b""[..]));
    let f = fixture();
    let label = f.find(f.object, "CKA_LABEL");
    let cut = f.tree.open_for_writing(label, how, patient()).unwrap();
    f.tree.flush(cut, patient()).unwrap();
    f.tree.release_closed();
    f.tree.finish();
    assert_eq!(label_of(&f, "key"), b"");
}

/// `: >f; rm f`: the first would be refused, of which nobody hears, and perhaps it is its turn only when the second has been done: then it is nothing.
#[test]
fn what_is_unlinked_while_something_is_refused_for_it_is_gone() {
    let f = fixture();
    let class = f.find(f.object, "CKA_CLASS");
    let how = OpenForWriting {
        truncate: true,
        ..OpenForWriting::default()
    };
    let cut = f.tree.open_for_writing(class, how, patient()).unwrap();
    let held = lock(&f.dir.path().join("t/key.lock"), libc::F_WRLCK);
    std::thread::scope(|scope| {
        let refused = scope.spawn(|| f.tree.release(cut, patient()));
        std::thread::sleep(Duration::from_millis(100));
        let unlinked = f.tree.unlink(f.object, os("CKA_CLASS"), patient());
        drop(held);
        unlinked.unwrap();
        refused.join().unwrap().unwrap();
    });
    // Longer than a removed class is held back.
    for _ in 0..15 {
        std::thread::sleep(Duration::from_millis(100));
        f.tree.settle();
    }
    let seen = f.tree.lookup(f.object, os("CKA_CLASS"), patient());
    assert!(seen.is_err(), "{}", f.tree.diagnostics().render());
    let stored = fs::read(f.dir.path().join("t/key.object")).unwrap();
    let stored = tokenfs::store::file::decode(&stored).unwrap().attributes;
    assert!(stored.of_type(0).is_none());
}

#[test]
fn what_could_not_be_written_to_its_end_is_no_value_until_it_is() {
    use tokenfs::error::ErrorKind::TooLarge;
    let f = fixture();
    let label = f.find(f.object, "CKA_LABEL");
    let open = f.open(label);
    f.tree.write(open, 0, b"newer", patient()).unwrap();
    let refused = f.tree.write(open, 64 << 20, b"x", patient()).unwrap_err();
    assert_eq!(refused.kind(), TooLarge);
    f.tree.write(open, 1, b"ZZ", patient()).unwrap();
    assert_eq!(f.tree.flush(open, patient()).unwrap_err().kind(), TooLarge);
    assert_eq!(labels(&f), (true, false));
    // What is missing is cut off.
    let cut = SetAttributes {
        size: Some(0),
        ..SetAttributes::default()
    };
    f.tree
        .set_attributes(label, Some(open), &cut, patient())
        .unwrap();
    f.tree.write(open, 0, b"new", patient()).unwrap();
    f.close(open);
    assert_eq!(labels(&f), (true, true));
}

#[test]
fn what_is_appended_after_something_failed_comes_behind_all_that_was_written() {
    let f = fixture();
    let label = f.find(f.object, "CKA_LABEL");
    let write = |open, text: &[u8]| f.tree.write(open, 0, text, patient());
    for (truncate, expected) in [(false, &b"oldaaabbb"[..]), (true, b"aaabbb")] {
        for is_busy in [false, true] {
            rewrite(&f, b"old");
            let how = OpenForWriting {
                append: true,
                truncate,
                ..OpenForWriting::default()
            };
            let open = f.tree.open_for_writing(label, how, patient()).unwrap();
            write(open, b"aaa").unwrap();
            if is_busy {
                let held = locked(&f, "key");
                f.tree.flush(open, patient()).unwrap_err();
                drop(held);
            } else {
                write(open, &vec![b'x'; 64 << 20]).unwrap_err();
            }
            write(open, b"bbb").unwrap();
            f.close(open);
            let when = format!("truncated: {truncate}, busy: {is_busy}");
            let found = String::from_utf8_lossy(&label_of(&f, "key")).into_owned();
            assert_eq!(found.as_bytes(), expected, "{when}: {found}");
        }
    }
}

#[test]
fn who_syncs_once_more_what_could_not_be_committed_commits_it() {
    let f = fixture();
    let label = f.find(f.object, "CKA_LABEL");
    for append in [false, true] {
        rewrite(&f, b"old");
        let how = OpenForWriting {
            append,
            truncate: true,
            ..OpenForWriting::default()
        };
        let open = f.tree.open_for_writing(label, how, patient()).unwrap();
        let held = locked(&f, "key");
        f.tree.write(open, 0, b"new", patient()).unwrap();
        for _ in 0..2 {
            f.tree.sync_file(label, open, patient()).unwrap_err();
        }
        // Whoever closes it hears of it, and does not wait once more.
        f.tree.flush(open, patient()).unwrap_err();
        drop(held);
        f.tree.flush(open, patient()).unwrap_err();
        assert_eq!(label_of(&f, "key"), b"old");
        f.tree.sync_file(label, open, patient()).unwrap();
        assert_eq!(label_of(&f, "key"), b"new");
        f.close(open);
        assert_eq!(label_of(&f, "key"), b"new");
    }
}

/// The same of what was scratch when it was opened.
#[test]
fn what_was_scratch_and_could_not_be_committed_is_committed_when_it_is_synced_once_more() {
    for append in [false, true] {
        let f = fixture();
        f.put(f.object, ".t", b"");
        let how = OpenForWriting {
            append,
            ..OpenForWriting::default()
        };
        let scratch = f.find(f.object, ".t");
        let open = f.tree.open_for_writing(scratch, how, patient()).unwrap();
        f.tree.write(open, 0, b"abc", patient()).unwrap();
        let (from, to) = ((f.object, os(".t")), (f.object, os("CKA_LABEL")));
        f.tree
            .rename(from, to, RenameHow::default(), patient())
            .unwrap();
        f.tree.write(open, 3, b"def", patient()).unwrap();
        let held = locked(&f, "key");
        f.tree.sync_file(scratch, open, patient()).unwrap_err();
        drop(held);
        f.tree.sync_file(scratch, open, patient()).unwrap();
        assert_eq!(label_of(&f, "key"), b"abcdef");
        f.close(open);
        assert_eq!(label_of(&f, "key"), b"abcdef");
    }
}

/// A cut is no more than that only if nothing else was done that is not stored.
#[test]
fn what_was_appended_and_then_cut_is_stored() {
    let f = fixture();
    let label = f.find(f.object, "CKA_LABEL");
    let how = OpenForWriting {
        append: true,
        ..OpenForWriting::default()
    };
    let open = f.tree.open_for_writing(label, how, patient()).unwrap();
    f.tree.write(open, 0, b"new", patient()).unwrap();
    let held = locked(&f, "key");
    f.tree.sync_file(label, open, patient()).unwrap_err();
    drop(held);
    let cut = SetAttributes {
        size: Some(5),
        ..SetAttributes::default()
    };
    f.tree
        .set_attributes(label, Some(open), &cut, patient())
        .unwrap();
    rewrite(&f, b"other");
    f.tree.sync_file(label, open, patient()).unwrap();
    assert_eq!(label_of(&f, "key"), b"oldne");
    f.close(open);
}

/// Nobody says how deep a scratch directory is, and it is looked through when it becomes an object.
#[test]
fn a_deep_scratch_directory_is_refused_like_any_other() {
    let f = fixture();
    f.tree
        .make_dir(f.token, os(".d"), 0o700, me(), patient())
        .unwrap();
    let mut directory = f.find(f.token, ".d");
    for _ in 0..10_000 {
        directory = f.make_dir(directory, "CKA_WRAP_TEMPLATE");
    }
    let how = RenameHow {
        by: Some(Caller { uid: 1000, ..me() }),
        ..RenameHow::default()
    };
    let to = os("00000000-0000-4000-8000-000000000000");
    let started = Instant::now();
    let renamed = f
        .tree
        .rename((f.token, os(".d")), (f.token, to), how, patient());
    renamed.unwrap_err();
    assert!(
        started.elapsed() < Duration::from_secs(20),
        "{:?}",
        started.elapsed()
    );
}

#[test]
fn of_what_is_refused_in_the_middle_nothing_is_a_value() {
    let f = fixture();
    let (name, before) = ("CKA_ALLOWED_MECHANISMS", "CKM_RSA_PKCS\nCKM_SHA256\n");
    f.put(f.object, name, before.as_bytes());
    let file = f.find(f.object, name);
    let read = || {
        let handle = f.tree.open(file, patient()).unwrap();
        let text = f.tree.read(handle, 0, 1000).unwrap();
        f.tree.release(handle, patient()).unwrap();
        String::from_utf8(text).unwrap()
    };
    let how = OpenForWriting {
        truncate: true,
        ..OpenForWriting::default()
    };
    let half = || {
        let open = f.tree.open_for_writing(file, how, patient()).unwrap();
        f.tree.write(open, 0, b"CKM_MD5\n", patient()).unwrap();
        let refused = f.tree.write(open, 8, b"CKM_TYPO\n", patient());
        refused.unwrap_err();
        open
    };
    for is_synced in [false, true] {
        let open = half();
        if is_synced {
            let _ = f.tree.sync_file(file, open, patient());
        }
        let _ = f.tree.flush(open, patient());
        f.tree.release(open, patient()).unwrap();
        assert_eq!(read(), before, "synced: {is_synced}");
    }
    // All of it is said of the file that it is about.
    let log = f.tree.diagnostics().render();
    assert!(log.lines().all(|line| line.contains("t/key/")), "{log}");
    // Unless what is meant follows.
    let open = half();
    f.tree.write(open, 8, b"CKM_SHA_1\n", patient()).unwrap();
    f.close(open);
    assert_eq!(read(), "CKM_MD5\nCKM_SHA_1\n");
}

/// A label is closed, unlinked while that waits for a lock, and something else done, which waits for the lock too; it is free again after so many
/// milliseconds.
fn unlink_while_a_close_waits(f: &F, milliseconds: u64, then: impl FnOnce() + Send) {
    let open = f.open(f.find(f.object, "CKA_LABEL"));
    f.tree.write(open, 0, b"late", patient()).unwrap();
    let held = locked(f, "key");
    std::thread::scope(|s| {
        let closing = s.spawn(|| f.tree.flush(open, patient()));
        std::thread::sleep(Duration::from_millis(80));
        f.tree.unlink(f.object, os("CKA_LABEL"), patient()).unwrap();
        assert!(f.tree.lookup(f.object, os("CKA_LABEL"), patient()).is_err());
        let doing = s.spawn(then);
        std::thread::sleep(Duration::from_millis(milliseconds));
        drop(held);
        closing.join().unwrap().unwrap();
        doing.join().unwrap();
    });
    f.tree.release(open, patient()).unwrap();
}

#[test]
fn what_is_unlinked_while_its_commit_waits_is_gone_for_good() {
    for round in 0..6 {
        let f = fixture();
        let sync = || f.tree.sync_dir(f.object, patient()).unwrap();
        unlink_while_a_close_waits(&f, 100 + 7 * round, sync);
        assert!(!labels(&f).0, "round {round}");
    }
}

#[test]
fn what_is_made_anew_is_not_overwritten_by_what_was_unlinked_before_it() {
    for round in 0..8 {
        let f = fixture();
        let make = || f.put(f.object, "CKA_LABEL", b"anew");
        unlink_while_a_close_waits(&f, 60 + 7 * round, make);
        let found = String::from_utf8(label_of(&f, "key")).unwrap();
        assert_eq!(found, "anew", "round {round}");
    }
}

#[test]
fn what_softhsm_has_given_a_file_without_a_value_is_removed_with_it() {
    let f = fixture();
    let name = "CKA_COPYABLE";
    f.close(f.create(f.object, name));
    let mut a = Attributes::new();
    a.insert(0, Value::Ulong(0));
    a.insert(PRIVATE, Value::Bool(false));
    a.insert(3, Value::Bytes(b"old".to_vec()));
    a.insert(0x171, Value::Bool(true));
    std::thread::sleep(Duration::from_millis(20));
    fs::write(f.dir.path().join("t/key.object"), encode(2, &a)).unwrap();
    f.tree.unlink(f.object, os(name), patient()).unwrap();
    assert!(f.tree.lookup(f.object, os(name), patient()).is_err());
    f.tree.sync_dir(f.object, patient()).unwrap();
    let stored = fs::read(f.dir.path().join("t/key.object")).unwrap();
    let stored = tokenfs::store::file::decode(&stored).unwrap().attributes;
    assert!(stored.of_type(0x171).is_none());
}

#[test]
fn nothing_is_no_object() {
    let f = fixture();
    let is_stored = |name: &str| f.dir.path().join(format!("t/{name}.object")).exists();
    let made = f.make_dir(f.token, NAMES[0]);
    f.tree.sync_dir(made, patient()).unwrap();
    f.make_dir(made, "CKA_WRAP_TEMPLATE");
    f.tree.sync_dir(made, patient()).unwrap();
    f.date(made, SystemTime::now());
    assert!(!is_stored(NAMES[0]));
    let scratch = f.make_dir(f.token, ".n");
    f.make_dir(scratch, "CKA_WRAP_TEMPLATE");
    let (from, to) = ((f.token, os(".n")), (f.token, os(NAMES[1])));
    let renamed = f.tree.rename(from, to, RenameHow::default(), patient());
    renamed.unwrap();
    assert!(!is_stored(NAMES[1]));
    // They are what was made by mkdir.
    for name in [NAMES[0], NAMES[1]] {
        let made = f.find(f.token, name);
        f.put(made, "CKA_CLASS", b"CKO_DATA\n");
        f.put(made, "CKA_LABEL", b"in the clear");
        f.put(made, "CKA_PRIVATE", b"false\n");
        f.tree.sync_dir(made, patient()).unwrap();
        assert!(is_stored(name));
        assert_eq!(label_of(&f, name), b"in the clear");
    }
}

#[test]
fn what_is_cut_after_something_was_refused_is_cut() {
    let f = fixture();
    let label = f.find(f.find(f.token, "token"), "CKA_OS_TOKENLABEL");
    let open = f.open(label);
    // No token label has 33 bytes.
    f.tree.write(open, 0, &[b'x'; 33], patient()).unwrap_err();
    let cut = SetAttributes {
        size: Some(2),
        ..SetAttributes::default()
    };
    let cut = f.tree.set_attributes(label, Some(open), &cut, patient());
    cut.unwrap();
    f.tree.sync_file(label, open, patient()).unwrap();
    f.close(open);
    let reading = f.tree.open(label, patient()).unwrap();
    assert_eq!(f.tree.read(reading, 0, 100).unwrap(), b"on");
}

#[test]
fn what_is_written_and_closed_while_it_is_renamed_is_not_lost() {
    let f = fixture();
    f.put(f.object, ".x", b"one");
    let open = f.open(f.find(f.object, ".x"));
    let held = lock(&f.dir.path().join("t/key.lock"), libc::F_RDLCK);
    std::thread::scope(|s| {
        let renaming = s.spawn(|| {
            let (from, to) = ((f.object, os(".x")), (f.object, os("CKA_LABEL")));
            f.tree.rename(from, to, RenameHow::default(), patient())
        });
        std::thread::sleep(Duration::from_millis(200));
        f.tree.write(open, 0, b"two", patient()).unwrap();
        f.close(open);
        drop(held);
        renaming.join().unwrap().unwrap();
    });
    let handle = f
        .tree
        .open(f.find(f.object, "CKA_LABEL"), patient())
        .unwrap();
    assert_eq!(f.tree.read(handle, 0, 10).unwrap(), b"two");
}

/// The kernel goes by the mode that it remembers, and who may rename files in the store can put another file there meanwhile.
#[test]
fn who_may_open_a_file_is_decided_by_the_mode_that_it_has() {
    use std::os::unix::fs::PermissionsExt;
    use tokenfs::error::ErrorKind::Stale;
    let f = fixture();
    let path = f.dir.path().join("t/key.object");
    let set_mode = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    let look = || {
        let looked = f.tree.lookup(f.object, os("CKA_LABEL"), patient()).unwrap();
        looked.attributes.ino
    };
    // The mask leaves the owner's bits only.
    set_mode(0o600);
    let ino = look();
    set_mode(0o200);
    let how = OpenForWriting::default();
    assert_eq!(f.tree.open(ino, patient()).unwrap_err().kind(), Stale);
    let opened = f.tree.open_for_writing(ino, how, patient());
    assert_eq!(opened.unwrap_err().kind(), Stale);
    assert_eq!(look(), ino, "the kernel asks anew, and decides again");
    f.tree.open(ino, patient()).unwrap();
    // More may be done with it than the kernel believes: it asks soon enough.
    set_mode(0o600);
    f.tree.open(ino, patient()).unwrap();
}

/// A second object, which was there before.
fn second_object(f: &F, name: &str, label: &[u8]) -> Ino {
    let object = f.make_dir(f.token, name);
    f.put(object, "CKA_CLASS", b"CKO_DATA\n");
    f.put(object, "CKA_PRIVATE", b"false\n");
    f.put(object, "CKA_LABEL", label);
    f.tree.sync_dir(object, patient()).unwrap();
    object
}
fn label_of(f: &F, object: &str) -> Vec<u8> {
    let object = f.find(f.token, object);
    let handle = f.tree.open(f.find(object, "CKA_LABEL"), patient()).unwrap();
    let label = f.tree.read(handle, 0, 100).unwrap();
    f.tree.release(handle, patient()).unwrap();
    label
}
const NAMES: [&str; 2] = [
    "00000000-0000-4000-8000-000000000001",
    "00000000-0000-4000-8000-000000000002",
];

#[test]
fn a_directory_that_is_renamed_while_it_is_listed_lists_what_is_in_it() {
    let f = fixture();
    let directory = second_object(&f, NAMES[0], b"first");
    second_object(&f, NAMES[1], b"second");
    let handle = f.tree.open_dir(directory, patient()).unwrap();
    let rename = |from: &str, to: &str| {
        let (from, to) = ((f.token, os(from)), (f.token, os(to)));
        let renamed = f.tree.rename(from, to, RenameHow::default(), patient());
        renamed.unwrap();
    };
    let other = "00000000-0000-4000-8000-000000000003";
    rename(NAMES[0], other);
    let listed = f.tree.read_dir(handle).unwrap();
    assert!(!listed.is_empty());
    for entry in &*listed {
        f.tree
            .look_at(directory, &listed, entry, patient())
            .unwrap();
    }
    // Another one under the name that it had.
    rename(NAMES[1], NAMES[0]);
    for entry in &*listed {
        let (_, found) = f
            .tree
            .look_at(directory, &listed, entry, patient())
            .unwrap();
        if entry.name == "CKA_LABEL" {
            let handle = f.open(found.entry.attributes.ino);
            f.tree.write(handle, 0, b"FIRST", patient()).unwrap();
            f.close(handle);
        }
    }
    assert_eq!(label_of(&f, other), b"FIRST");
    assert_eq!(label_of(&f, NAMES[0]), b"second");
}

#[test]
fn who_has_a_file_open_follows_it_from_object_to_scratch_to_object() {
    let f = fixture();
    let object = second_object(&f, NAMES[0], b"first");
    let second = second_object(&f, NAMES[1], b"second");
    let handle = f.create(object, ".tmp");
    let rename = |from: (Ino, &str), to: (Ino, &str)| {
        let (from, to) = ((from.0, os(from.1)), (to.0, os(to.1)));
        let renamed = f.tree.rename(from, to, RenameHow::default(), patient());
        renamed.unwrap();
    };
    f.tree.write(handle, 0, b"01", patient()).unwrap();
    rename((object, ".tmp"), (object, "CKA_ID"));
    rename((f.token, NAMES[0]), (f.token, ".gone"));
    let gone = f.find(f.token, ".gone");
    let scratch = f.find(gone, "CKA_ID");
    rename((gone, "CKA_ID"), (second, "CKA_ID"));
    // The kernel has heard of it once.
    f.tree.forget(scratch, 1);
    f.tree.write(handle, 0, b"23", patient()).unwrap();
    f.close(handle);
    let read = f.tree.open(f.find(second, "CKA_ID"), patient()).unwrap();
    assert_eq!(f.tree.read(read, 0, 10).unwrap(), b"23");
}

#[test]
fn a_new_object_is_finished_when_what_was_open_in_it_is_unlinked() {
    let f = fixture();
    // By somebody who has ended since.
    let maker = Caller {
        pid: u32::MAX - 1,
        ..me()
    };
    let made = f
        .tree
        .make_dir(f.token, os(NAMES[0]), 0o700, maker, patient());
    let object = made.unwrap().attributes.ino;
    f.put(object, "CKA_CLASS", b"CKO_DATA\n");
    f.put(object, "CKA_PRIVATE", b"false\n");
    let open = f.create(object, ".tmp");
    let stop = std::sync::atomic::AtomicBool::new(false);
    let file = f.dir.path().join(format!("t/{}.object", NAMES[0]));
    std::thread::scope(|s| {
        // As the thread of a mount does.
        s.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Acquire) {
                f.tree.wait_for_work(f.tree.settle());
            }
        });
        std::thread::sleep(Duration::from_millis(500));
        let was_open = file.exists();
        f.tree.unlink(object, os(".tmp"), patient()).unwrap();
        let begun = std::time::Instant::now();
        while !file.exists() && begun.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let is_written = file.exists();
        stop.store(true, std::sync::atomic::Ordering::Release);
        f.tree.wake();
        assert_eq!((was_open, is_written), (false, true));
    });
    f.tree.release(open, patient()).unwrap();
}

#[test]
fn what_is_made_in_the_place_of_an_object_gets_nothing_of_what_is_open_of_that() {
    let f = fixture();
    let object = second_object(&f, NAMES[0], b"first");
    let open = f.open(f.find(object, "CKA_LABEL"));
    f.tree.write(open, 0, b"of the first", patient()).unwrap();
    // A SoftHSM destroys it, and a backup is copied back.
    for file in ["object", "lock"] {
        fs::remove_file(f.dir.path().join(format!("t/{}.{file}", NAMES[0]))).unwrap();
    }
    second_object(&f, NAMES[0], b"restored");
    f.close(open);
    assert_eq!(label_of(&f, NAMES[0]), b"restored");
    // The same where one is renamed to its name.
    let open = f.open(f.find(f.find(f.token, NAMES[0]), "CKA_LABEL"));
    f.tree.write(open, 0, b"of the second", patient()).unwrap();
    for file in ["object", "lock"] {
        fs::remove_file(f.dir.path().join(format!("t/{}.{file}", NAMES[0]))).unwrap();
    }
    second_object(&f, NAMES[1], b"renamed");
    let (from, to) = ((f.token, os(NAMES[1])), (f.token, os(NAMES[0])));
    f.tree
        .rename(from, to, RenameHow::default(), patient())
        .unwrap();
    f.close(open);
    assert_eq!(label_of(&f, NAMES[0]), b"renamed");
}

#[test]
fn the_times_of_attributes_are_those_of_their_object_and_of_no_other_that_had_its_name() {
    let f = fixture();
    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let time_of = |object: Ino| {
        let found = f.tree.lookup(object, os("CKA_LABEL"), patient());
        found.unwrap().attributes.mtime
    };
    let make = |name: &str, seconds| {
        let object = f.make_dir(f.token, name);
        f.put(object, "CKA_CLASS", b"CKO_DATA\n");
        f.put(object, "CKA_PRIVATE", b"false\n");
        f.put(object, "CKA_LABEL", b"label");
        f.date(object, at(seconds));
        f.tree.sync_dir(object, patient()).unwrap();
        object
    };
    let rename = |from: &str, to: &str| {
        let (from, to) = ((f.token, os(from)), (f.token, os(to)));
        let renamed = f.tree.rename(from, to, RenameHow::default(), patient());
        renamed.unwrap();
    };
    let object = make(NAMES[0], 2_000_000_000);
    // As rsync does first. It keeps them under another name, and the next one of its own does not get them.
    let before = time_of(object);
    assert_eq!(before, at(2_000_000_000));
    f.date(object, at(1_500_000_000));
    assert_eq!(time_of(object), before);
    rename(NAMES[0], NAMES[1]);
    assert_eq!(time_of(f.find(f.token, NAMES[1])), before);
    assert_eq!(time_of(make(NAMES[0], 1_500_000_000)), at(1_500_000_000));
    // Nor does one that is made when it was removed.
    rename(NAMES[1], ".gone");
    assert_eq!(time_of(make(NAMES[1], 1_500_000_000)), at(1_500_000_000));
}

#[test]
fn an_answer_that_is_taken_back_was_not_given() {
    let f = fixture();
    let label = f.find(f.object, "CKA_LABEL");
    let handle = f.tree.open_dir(f.object, patient()).unwrap();
    let listed = f.tree.read_dir(handle).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o400);
    fs::set_permissions(f.dir.path().join("t/key.object"), mode).unwrap();
    for entry in &*listed {
        let (_, answer) = f.tree.look_at(f.object, &listed, entry, patient()).unwrap();
        f.tree.take_back_answer(answer);
    }
    let opened = f
        .tree
        .open_for_writing(label, OpenForWriting::default(), patient());
    assert_eq!(opened.unwrap_err().kind(), tokenfs::error::ErrorKind::Stale);
}

#[test]
fn what_was_moved_out_of_a_scratch_directory_is_not_listed_in_it_any_more() {
    let f = fixture();
    let (from, to) = (f.make_dir(f.token, ".d"), f.make_dir(f.token, ".e"));
    f.put(from, "CKA_LABEL", b"label");
    let handle = f.tree.open_dir(from, patient()).unwrap();
    let (old, new) = ((from, os("CKA_LABEL")), (to, os("CKA_LABEL")));
    f.tree
        .rename(old, new, RenameHow::default(), patient())
        .unwrap();
    let listed = f.tree.read_dir(handle).unwrap();
    for entry in &*listed {
        let found = f.tree.look_at(from, &listed, entry, patient());
        assert_eq!(
            found.unwrap_err().kind(),
            tokenfs::error::ErrorKind::NotFound
        );
    }
}

#[test]
fn what_is_open_of_a_token_that_is_gone_can_be_synced() {
    let f = fixture();
    let label = f.find(f.object, "CKA_LABEL");
    let open = f.open(label);
    fs::remove_dir_all(f.dir.path().join("t")).unwrap();
    f.tree.sync_file(label, open, patient()).unwrap();
    f.tree.sync_dir(f.token, patient()).unwrap();
    f.tree.sync_dir(f.object, patient()).unwrap();
}

/// As another process holds it.
fn locked(f: &F, object: &str) -> File {
    lock(
        &f.dir.path().join(format!("t/{object}.lock")),
        libc::F_RDLCK,
    )
}
fn destroy(f: &F, object: &str) {
    for file in ["object", "lock"] {
        fs::remove_file(f.dir.path().join(format!("t/{object}.{file}"))).unwrap();
    }
}

#[test]
fn a_close_that_waits_does_not_get_into_the_next_object_of_that_name() {
    let f = fixture();
    let object = second_object(&f, NAMES[0], b"first");
    let open = f.open(f.find(object, "CKA_LABEL"));
    f.tree.write(open, 0, b"of the first", patient()).unwrap();
    let held = locked(&f, NAMES[0]);
    std::thread::scope(|s| {
        let closing = s.spawn(|| f.tree.flush(open, patient()));
        std::thread::sleep(Duration::from_millis(200));
        destroy(&f, NAMES[0]);
        s.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            drop(held);
        });
        second_object(&f, NAMES[0], b"restored");
        let _ = closing.join().unwrap();
    });
    let _ = f.tree.release(open, patient());
    assert_eq!(label_of(&f, NAMES[0]), b"restored");
}

#[test]
fn a_removal_that_waits_takes_nothing_from_the_next_object_of_that_name() {
    let f = fixture();
    let object = second_object(&f, NAMES[0], b"label");
    f.tree.unlink(object, os("CKA_LABEL"), patient()).unwrap();
    let held = locked(&f, NAMES[0]);
    std::thread::scope(|s| {
        let syncing = s.spawn(|| f.tree.sync_dir(object, patient()));
        std::thread::sleep(Duration::from_millis(200));
        destroy(&f, NAMES[0]);
        s.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            drop(held);
        });
        second_object(&f, NAMES[0], b"label");
        let _ = syncing.join().unwrap();
    });
    assert_eq!(label_of(&f, NAMES[0]), b"label");
}

#[test]
fn what_was_pending_in_a_token_that_is_gone_is_not_in_the_next_one_of_its_name() {
    let f = fixture();
    let object = f.make_dir(f.token, NAMES[0]);
    f.put(object, "CKA_PRIVATE", b"false\n");
    fs::remove_dir_all(f.dir.path().join("t")).unwrap();
    // What is synced then, as `tokenfs umount` does, waits for nothing of it.
    f.tree.sync_dir(ROOT, patient()).unwrap();
    let object = f.make_dir(ROOT, "t");
    let handle = f.tree.open_dir(object, patient()).unwrap();
    assert!(f.tree.read_dir(handle).unwrap().is_empty());
    let log = f.tree.diagnostics().render();
    assert!(log.contains("its token was removed"), "{log}");
}

#[test]
fn a_mode_that_waits_is_not_given_to_another_object_of_that_name() {
    let f = fixture();
    let object = second_object(&f, NAMES[0], b"first");
    let at = |file: &str| f.dir.path().join(format!("t/{}.{file}", NAMES[0]));
    let held = locked(&f, NAMES[0]);
    std::thread::scope(|s| {
        let setting = s.spawn(|| {
            let mut change = SetAttributes::default();
            change.metadata.mode = Some(0o400);
            f.tree.set_attributes(object, None, &change, patient())
        });
        std::thread::sleep(Duration::from_millis(200));
        // Others put another one there.
        let bytes = fs::read(at("object")).unwrap();
        destroy(&f, NAMES[0]);
        fs::write(at("lock"), b"").unwrap();
        fs::write(at("object"), bytes).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(at("object"), mode).unwrap();
        drop(held);
        let _ = setting.join().unwrap();
    });
    let mode = fs::metadata(at("object")).unwrap().permissions();
    let mode = std::os::unix::fs::PermissionsExt::mode(&mode);
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_file_that_was_cut_and_closed_gives_its_object_no_later_time_than_it_is_given_then() {
    let f = fixture();
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let class = f.find(f.object, "CKA_CLASS");
    for _ in 0..2 {
        let how = OpenForWriting {
            truncate: true,
            ..OpenForWriting::default()
        };
        f.put(f.object, "CKA_LABEL", b"label");
        let label = f.find(f.object, "CKA_LABEL");
        let open = f.tree.open_for_writing(label, how, patient()).unwrap();
        let held = lock(&f.dir.path().join("t/key.lock"), libc::F_RDLCK);
        // close(2) has returned by now, and a thread goes on with it.
        let closed = f.tree.release(open, Patience::Now);
        assert!(closed.is_err());
        std::thread::scope(|s| {
            s.spawn(|| {
                std::thread::sleep(Duration::from_millis(100));
                f.tree.release(open, patient()).unwrap();
            });
            s.spawn(|| f.date(class, time));
            std::thread::sleep(Duration::from_millis(20));
            drop(held);
        });
        let found = f.tree.attributes(class, patient()).unwrap();
        assert_eq!(found.attributes.mtime, time);
    }
}

#[test]
fn what_is_closed_later_is_written_later() {
    let f = fixture();
    let how = |truncate, append| OpenForWriting {
        truncate,
        append,
        read: false,
    };
    let label = f.find(f.object, "CKA_LABEL");
    let open = |how| f.tree.open_for_writing(label, how, patient()).unwrap();
    let (cut, appending) = (open(how(true, false)), open(how(false, true)));
    f.tree.write(appending, 0, b"more", patient()).unwrap();
    let held = lock(&f.dir.path().join("t/key.lock"), libc::F_RDLCK);
    assert!(f.tree.release(cut, Patience::Now).is_err());
    std::thread::scope(|s| {
        // The thread that goes on with it takes its time.
        s.spawn(|| {
            std::thread::sleep(Duration::from_millis(200));
            f.tree.release(cut, patient()).unwrap();
        });
        s.spawn(|| f.close(appending));
        std::thread::sleep(Duration::from_millis(20));
        drop(held);
    });
    assert_eq!(label_of(&f, "key"), b"more");
}

#[test]
fn a_time_that_a_token_is_given_is_there_while_something_is_written_in_it() {
    let f = fixture();
    f.tree.unlink(f.object, os("CKA_LABEL"), patient()).unwrap();
    let given = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    f.date(f.token, given);
    let directory = f.dir.path().join("t");
    let stored = || fs::metadata(&directory).unwrap().modified().unwrap();
    // As a commit does for a moment, which gives the directory then the time that it had before.
    File::open(&directory)
        .unwrap()
        .set_modified(SystemTime::now())
        .unwrap();
    let shown = f.tree.attributes(f.token, patient()).unwrap();
    assert_eq!(shown.attributes.mtime, given);
    // It is unlinked for good.
    std::thread::sleep(Duration::from_millis(300));
    f.tree.settle();
    assert_eq!(stored(), given);
    let shown = f.tree.attributes(f.token, patient()).unwrap();
    assert_eq!(shown.attributes.mtime, given);
}

/// Renames the scratch file `.x` to the label.
fn publish(f: &F) {
    let (from, to) = ((f.object, os(".x")), (f.object, os("CKA_LABEL")));
    f.tree
        .rename(from, to, RenameHow::default(), patient())
        .unwrap();
}

#[test]
fn who_looks_a_scratch_file_up_while_it_is_renamed_does_not_take_it_from_who_has_it_open() {
    let f = fixture();
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    if let Ok(entry) = f.tree.lookup(f.object, os(".x"), patient()) {
                        f.tree.forget(entry.attributes.ino, 1);
                    }
                }
            });
        }
        for round in 0..300 {
            let handle = f.create(f.object, ".x");
            f.tree.write(handle, 0, b"first", patient()).unwrap();
            publish(&f);
            let text = format!("value {round}");
            f.tree.write(handle, 0, text.as_bytes(), patient()).unwrap();
            f.close(handle);
            let label = label_of(&f, "key");
            if label != text.as_bytes() {
                over.store(true, std::sync::atomic::Ordering::Relaxed);
            }
            assert_eq!(String::from_utf8_lossy(&label), text);
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn who_reads_a_scratch_file_does_not_close_it_for_who_writes_it() {
    let f = fixture();
    let handle = f.create(f.object, ".x");
    let reader = f.tree.open(f.find(f.object, ".x"), patient()).unwrap();
    f.close(reader);
    f.tree.write(handle, 0, b"written", patient()).unwrap();
    publish(&f);
    assert_eq!(label_of(&f, "key"), b"written");
    f.close(handle);
}

#[test]
fn what_is_closed_later_is_written_later_whatever_it_was_when_it_was_opened() {
    let f = fixture();
    f.put(f.object, ".x", b"one");
    let how = |truncate| OpenForWriting {
        truncate,
        append: false,
        read: false,
    };
    let ino = f.find(f.object, ".x");
    let cut = f.tree.open_for_writing(ino, how(true), patient()).unwrap();
    publish(&f);
    assert_eq!(label_of(&f, "key"), b"one");
    let held = lock(&f.dir.path().join("t/key.lock"), libc::F_RDLCK);
    assert!(f.tree.release(cut, Patience::Now).is_err());
    std::thread::scope(|s| {
        // The thread that goes on with it takes its time.
        s.spawn(|| {
            std::thread::sleep(Duration::from_millis(400));
            f.tree.release(cut, patient()).unwrap();
        });
        s.spawn(|| {
            let later = f.tree.open_for_writing(ino, how(true), patient()).unwrap();
            f.tree.write(later, 0, b"later", patient()).unwrap();
            f.close(later);
        });
        std::thread::sleep(Duration::from_millis(20));
        drop(held);
    });
    assert_eq!(label_of(&f, "key"), b"later");
}

#[test]
fn who_has_no_time_renames_what_is_open() {
    let f = fixture();
    f.put(f.object, ".x", b"one");
    let how = OpenForWriting {
        truncate: true,
        append: false,
        read: false,
    };
    let ino = f.find(f.object, ".x");
    let open = f.tree.open_for_writing(ino, how, patient()).unwrap();
    // A duplicate of it is closed.
    f.tree.flush(open, patient()).unwrap();
    let (from, to) = ((f.object, os(".x")), (f.object, os(".y")));
    let at_once = Patience::at_most(Duration::ZERO);
    f.tree
        .rename(from, to, RenameHow::default(), at_once)
        .unwrap();
    f.close(open);
}

#[test]
fn what_is_cut_is_no_matter_of_room() {
    let f = fixture();
    let most = 64 * 1024 * 1024;
    let name = |number: usize| format!(".{number}");
    for number in 0..4 {
        let handle = f.create(f.object, &name(number));
        f.tree.write(handle, most - 1, b"x", patient()).unwrap();
        f.close(handle);
    }
    let open = f.open(f.find(f.object, ".0"));
    // It is kept until this is closed, and there is no room for it twice.
    let refused = f.tree.write(open, 0, b"y", patient()).unwrap_err();
    assert_eq!(refused.kind(), tokenfs::error::ErrorKind::NoSpace);
    let cut = SetAttributes {
        size: Some(0),
        ..SetAttributes::default()
    };
    let ino = f.find(f.object, ".0");
    f.tree
        .set_attributes(ino, Some(open), &cut, patient())
        .unwrap();
    f.close(open);
    let open = f.open(f.find(f.object, ".1"));
    f.tree.write(open, 0, b"y", patient()).unwrap();
    f.close(open);
    let handle = f.create(f.object, ".more");
    f.tree.write(handle, most - 1, b"x", patient()).unwrap();
    f.close(handle);
}

#[test]
fn a_time_that_a_token_was_given_does_not_come_back_over_what_softhsm_does_later() {
    let f = fixture();
    let given = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let directory = f.dir.path().join("t");
    let shown = || {
        f.tree
            .attributes(f.token, patient())
            .unwrap()
            .attributes
            .mtime
    };
    let later = |what: &str| {
        f.tree.settle();
        let now = SystemTime::now();
        let opened = File::open(&directory).unwrap();
        opened.set_modified(now).unwrap();
        assert_eq!(shown(), now, "{what}");
        f.put(f.object, "CKA_LABEL", what.as_bytes());
        let stored = fs::metadata(&directory).unwrap().modified().unwrap();
        assert_eq!(stored, now, "{what}");
    };
    f.make_dir(f.token, NAMES[0]);
    f.date(f.token, given);
    f.tree
        .remove_dir(f.token, os(NAMES[0]), None, patient())
        .unwrap();
    later("a new object that was removed again");
    let fresh = f.create(f.object, "CKA_KEY_TYPE");
    let _ = f.tree.release(fresh, patient());
    f.date(f.token, given);
    later("a file without a value");
}

#[test]
fn who_has_an_old_version_open_does_not_cut_the_file_for_others() {
    let f = fixture();
    f.put(f.object, "CKA_LABEL", b"short");
    let label = f.find(f.object, "CKA_LABEL");
    let (one, other) = (std::process::id(), 1);
    let reader = f.tree.open(label, patient()).unwrap();
    f.tree.used_by(reader, one);
    let how = OpenForWriting {
        read: true,
        ..OpenForWriting::default()
    };
    let writer = f.tree.open_for_writing(label, how, patient()).unwrap();
    f.tree.used_by(writer, other);
    f.tree.write(writer, 0, &[b'x'; 8000], patient()).unwrap();
    f.tree.sync_file(label, writer, patient()).unwrap();
    let told = |pid| {
        let told = f.tree.attributes_for(label, pid, patient());
        told.unwrap().attributes.size
    };
    // The kernel has one length for both, and the other one may have it mapped.
    assert_eq!((told(other), told(one)), (8000, 8000));
    f.close(writer);
    assert_eq!((told(other), told(one)), (8000, 5));
    f.close(reader);
    assert_eq!(told(one), 8000);
}
