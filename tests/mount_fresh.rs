//! What a SoftHSM changes shows up in a mount that has answered before: labels, objects, tokens, modes, and what replaces
//! them, and how soon.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::fstatat;
use nix::unistd::Pid;
use support::template::{Attribute, boolean, bytes, ulong};
use support::*;

const CKA_VALUE: u64 = 0x11;

/// Far more than it ever takes, so that a busy machine is no failure; what is lost would take a minute.
const SOON: Duration = Duration::from_secs(1);

/// A public data object that can be changed.
fn data(label: &str, value: impl AsRef<[u8]>) -> Vec<Attribute> {
    vec![
        ulong(0, 0),
        boolean(1, true),
        boolean(2, false),
        bytes(3, label),
        bytes(CKA_VALUE, value),
    ]
}

fn names(directory: &Path) -> BTreeSet<OsString> {
    let entries =
        fs::read_dir(directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    entries.map(|entry| entry.unwrap().file_name()).collect()
}

/// The directory of the only token.
fn token_in(softhsm: &Softhsm, mount: &Mount) -> PathBuf {
    mount.join(softhsm.token_directory().file_name().unwrap())
}

/// The directory of an object by its label.
fn object_in(token: &Path, label: &str) -> PathBuf {
    let mut objects: Vec<_> = names(token)
        .into_iter()
        .map(|name| token.join(name))
        .collect();
    objects
        .retain(|object| fs::read(object.join("CKA_LABEL")).is_ok_and(|l| l == label.as_bytes()));
    assert_eq!(objects.len(), 1, "{label} in {}", token.display());
    objects.remove(0)
}

/// All that a kernel could remember of an object, and of the directories around it.
fn warm(object: &Path) {
    for _ in 0..2 {
        let token = object.parent().unwrap();
        names(token.parent().unwrap());
        names(token);
        for name in names(object) {
            let path = object.join(name);
            let stat = fs::metadata(&path).unwrap();
            if stat.is_file() {
                assert_eq!(
                    fs::read(&path).unwrap().len() as u64,
                    stat.len(),
                    "{}",
                    path.display()
                );
            }
        }
    }
}

/// Waits for something and says how long it took.
fn soon(what: &str, condition: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    eventually(SOON, what, condition);
    println!("{what}: {:?}", start.elapsed());
    start.elapsed()
}

fn is_gone(path: &Path) -> bool {
    matches!(fs::metadata(path), Err(e) if e.kind() == io::ErrorKind::NotFound)
}

/// A text of a length that its beginning tells from all others.
fn version(number: usize, length: usize) -> String {
    let start = format!("{number:06}.");
    start.chars().cycle().take(length).collect()
}

both_backends! {
    fn a_changed_label_shows_within_milliseconds(backend) {
        let (softhsm, mut client) = Softhsm::with_token(backend);
        let mut old = version(0, 20);
        let handle = client.create(&data(&old, "x")).unwrap();
        let mount = Mount::new(&softhsm);
        let token = token_in(&softhsm, &mount);
        let object = object_in(&token, &old);
        let label = object.join("CKA_LABEL");
        let mut took = Vec::new();
        for number in 1..=if full() { 1000 } else { 150 } {
            warm(&object);
            assert_eq!(fs::read_to_string(&label).unwrap(), old);
            // Answers that have just been given, and such that have been for a while.
            std::thread::sleep(Duration::from_millis([0, 1, 7, 60][number % 4]));
            let new = version(number, [7, 200, 40, 4096, 5000][number % 5]);
            client.set_label(handle, &new).unwrap();
            let start = Instant::now();
            loop {
                let seen = fs::read_to_string(&label).unwrap();
                if seen == new {
                    break;
                }
                assert_eq!(seen, old, "neither the old label nor the new one");
                assert!(start.elapsed() < SOON, "label {number} is not seen");
                std::thread::sleep(Duration::from_micros(50));
            }
            took.push(start.elapsed());
            eventually(SOON, "the size", || fs::metadata(&label).unwrap().len() == new.len() as u64);
            old = new;
        }
        took.sort_unstable();
        let at = |part: usize| took[(took.len() - 1) * part / 100];
        println!("{backend}: {} labels, seen after min {:?} median {:?} p99 {:?} max {:?}", took.len(), at(0), at(50), at(99), at(100));
        assert!(at(50) <= Duration::from_millis(10), "median {:?}", at(50));
    }

    fn a_size_changes_with_the_content_when_only_stat_is_asked(backend) {
        // Nothing reads, so that nothing but the report of the change can renew what `stat` says.
        let (softhsm, mut client) = Softhsm::with_token(backend);
        let handle = client.create(&data("short", "x")).unwrap();
        let mount = Mount::new(&softhsm);
        let label = object_in(&token_in(&softhsm, &mount), "short").join("CKA_LABEL");
        let mut took = Vec::new();
        for number in 0..60 {
            let new = version(number, 10 + number * 100);
            for _ in 0..3 {
                fs::metadata(&label).unwrap();
            }
            client.set_label(handle, &new).unwrap();
            let start = Instant::now();
            eventually(SOON, "the size", || fs::metadata(&label).unwrap().len() == new.len() as u64);
            took.push(start.elapsed());
        }
        took.sort_unstable();
        println!("{backend}: size, median {:?} max {:?}", took[took.len() / 2], took[took.len() - 1]);
        assert!(took[took.len() / 2] <= Duration::from_millis(10));
    }

    fn objects_come_and_go(backend) {
        let (softhsm, mut client) = Softhsm::with_token(backend);
        let first = client.create(&data("first", "x")).unwrap();
        let mount = Mount::new(&softhsm);
        let token = token_in(&softhsm, &mount);
        let object = object_in(&token, "first");
        let links = mount.join(".tokenfs/by-label/test");
        warm(&object);
        assert_eq!(names(&links), BTreeSet::from(["first.data".into()]));
        let second = client.create(&data("second", "y")).unwrap();
        soon("an object is listed", || names(&token).len() == 3);
        soon("and by its label", || fs::read(links.join("second.data/CKA_VALUE")).is_ok_and(|v| v == b"y"));
        warm(&object_in(&token, "second"));

        // What is held open and asked for by its old name goes too.
        let held = File::open(object.join("CKA_LABEL")).unwrap();
        client.destroy(first).unwrap();
        soon("an object is gone", || is_gone(&object));
        soon("and its attributes", || is_gone(&object.join("CKA_LABEL")));
        soon("and its link", || names(&links) == BTreeSet::from(["second.data".into()]));
        assert_eq!(names(&token).len(), 2);
        assert_eq!(io::read_to_string(held).unwrap(), "first");
        client.destroy(second).unwrap();
        soon("a token is empty", || names(&token) == BTreeSet::from(["token".into()]));
        soon("and so are its links", || names(&links).is_empty());
    }

    fn tokens_come_and_go(backend) {
        let (softhsm, mut client) = Softhsm::with_token(backend);
        client.create(&data("stays", "x")).unwrap();
        let mount = Mount::new(&softhsm);
        let first = token_in(&softhsm, &mount);
        warm(&object_in(&first, "stays"));
        let serial = client.init_token("another", Some(PIN)).unwrap();
        soon("a token is listed", || names(mount.path()).len() == 2);
        let second = names(mount.path()).into_iter().map(|n| mount.join(n)).find(|p| *p != first).unwrap();
        soon("it is whole", || {
            fs::read_to_string(second.join("token/CKA_OS_TOKENLABEL")).is_ok_and(|label| label.trim_end() == "another")
        });
        assert_eq!(fs::read_to_string(second.join("token/CKA_OS_TOKENSERIAL")).unwrap(), serial);
        assert!(names(&mount.join(".tokenfs/by-label")).contains(&OsString::from("another")));
        // An object in the new token is reported, too.
        client.open("another", Some(PIN)).unwrap();
        let handle = client.create(&data("in it", "x")).unwrap();
        soon("an object of it is listed", || names(&second).len() == 2);
        let object = object_in(&second, "in it");
        warm(&object);
        client.set_label(handle, "changed").unwrap();
        soon("its label", || fs::read(object.join("CKA_LABEL")).unwrap() == b"changed");
        // The PINs are kept in the token's own attributes.
        let flags = second.join("token/CKA_OS_TOKENFLAGS");
        let low = "CKF_USER_PIN_COUNT_LOW";
        assert!(!fs::read_to_string(&flags).unwrap().contains(low));
        let mut other = softhsm.p11();
        other.open("another", Some("wrong")).unwrap_err();
        soon("a wrong PIN", || fs::read_to_string(&flags).unwrap().contains(low));
        other.open("another", Some(PIN)).unwrap();
        soon("the right one", || !fs::read_to_string(&flags).unwrap().contains(low));

        drop((client, other));
        warm(&object);
        run(softhsm.util().args(["--delete-token", "--serial", &serial]));
        soon("a token is gone", || is_gone(&second));
        soon("and what was in it", || is_gone(&object.join("CKA_LABEL")));
        assert_eq!(names(mount.path()).len(), 1);
        assert!(!names(&mount.join(".tokenfs/by-label")).contains(&OsString::from("another")));
        warm(&object_in(&first, "stays"));
    }

    /// cp(1) opens its target with `O_PATH` first, of which no server hears: whether it is there is what the kernel remembers.
    fn what_softhsm_destroyed_can_be_copied_back(backend) {
        let (softhsm, mut client) = Softhsm::with_token(backend);
        let mount = Mount::new(&softhsm);
        let first = token_in(&softhsm, &mount);
        let serial = client.init_token("another", Some(PIN)).unwrap();
        client.open("test", Some(PIN)).unwrap();
        let handle = client.create(&data("object", "x")).unwrap();
        soon("a token is listed", || names(mount.path()).len() == 2);
        let object = object_in(&first, "object");
        let second = names(mount.path()).into_iter().map(|n| mount.join(n)).find(|p| *p != first).unwrap();
        let backup = tempfile::tempdir().unwrap();
        for copied in [&object, &second] {
            sh(backup.path(), &format!("cp -a {} .", copied.display()));
        }
        let back = |what: &Path| {
            // Nobody looks meanwhile.
            thread::sleep(Duration::from_millis(100));
            let copy = backup.path().join(what.file_name().unwrap());
            sh(backup.path(), &format!("cp -a {0} {1} && diff -r {0} {1}", copy.display(), what.display()));
        };
        warm(&object);
        client.destroy(handle).unwrap();
        back(&object);
        drop(client);
        names(&second.join("token"));
        run(softhsm.util().args(["--delete-token", "--serial", &serial]));
        back(&second);
        let mut client = softhsm.p11();
        client.open("another", Some(PIN)).unwrap();
        client.open("test", Some(PIN)).unwrap();
        assert_eq!(client.find_label("object").unwrap().len(), 1);
    }

    /// The directory that is made in its place is another one, whatever somebody has open of the first.
    fn a_directory_made_anew_has_nothing_of_the_one_that_softhsm_destroyed(backend) {
        let (softhsm, mut client) = Softhsm::with_token(backend);
        let mount = Mount::new(&softhsm);
        let token = token_in(&softhsm, &mount);
        for published in [false, true, false, true] {
            let handle = client.create(&data("object", "first")).unwrap();
            soon("an object", || names(&token).len() == 2);
            let object = object_in(&token, "object");
            warm(&object);
            let value = object.join("CKA_VALUE");
            let held = File::open(&value).unwrap();
            client.destroy(handle).unwrap();
            let copy = token.join(".copy");
            if published {
                fs::create_dir(&copy).unwrap();
                fs::write(copy.join("CKA_CLASS"), "CKO_DATA").unwrap();
                fs::write(copy.join("CKA_PRIVATE"), "false").unwrap();
            }
            soon("it is gone", || match if published { fs::rename(&copy, &object) } else { fs::create_dir(&object) } {
                Ok(()) => true,
                Err(error) => {
                    assert!(matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty), "{error}");
                    false
                }
            });
            assert_eq!(fs::metadata(&value).unwrap_err().kind(), io::ErrorKind::NotFound, "{published}");
            assert_eq!(names(&object).len(), if published { 2 } else { 0 });
            fs::write(&value, "second").unwrap();
            assert_eq!(fs::read_to_string(&value).unwrap(), "second");
            assert_eq!(io::read_to_string(held).unwrap(), "first");
            sh(&token, &format!("rm -r {}", object.display()));
        }
    }

    fn modes_and_owners_of_the_store_show(backend) {
        let (softhsm, mut client) = Softhsm::with_token(backend);
        client.create(&data("x", "x")).unwrap();
        softhsm.configure("objectstore.umask = 0\n");
        let mount = MountOptions::new().umask(0).mount(&softhsm);
        let token = token_in(&softhsm, &mount);
        let object = object_in(&token, "x");
        let stored = softhsm.token_directory();
        let file = stored.join(match backend {
            Backend::Db => PathBuf::from("sqlite3.db"),
            Backend::File => Path::new(object.file_name().unwrap()).with_extension("object"),
        });
        for bits in [0o600, 0o644, 0o640, 0o666, 0o000, 0o600] {
            warm(&object);
            set_mode(&file, bits);
            soon(&format!("chmod {bits:o}"), || mode(&object.join("CKA_LABEL")) == bits);
            eventually(SOON, "the directory's mode", || mode(&object) == bits | (bits & 0o444) >> 2);
        }
        set_mode(&stored, 0o2750);
        soon("chmod of a token", || mode(&token) == 0o2750);
        set_mode(&softhsm.tokendir, 0o751);
        soon("chmod of the tokendir", || mode(mount.path()) == 0o751);
        if is_root() {
            give(&stored, ALICE);
            soon("chown", || {
                [&token, &object, &object.join("CKA_LABEL")]
                    .iter()
                    .all(|path| fs::metadata(path).is_ok_and(|m| (m.uid(), m.gid()) == (ALICE.uid, ALICE.gid)))
            });
        }
    }

    fn an_open_file_is_one_version(backend) {
        let (softhsm, mut client) = Softhsm::with_token(backend);
        let handle = client.create(&data(&version(0, 9000), "x")).unwrap();
        let mount = Mount::new(&softhsm);
        let path = object_in(&token_in(&softhsm, &mount), &version(0, 9000)).join("CKA_LABEL");
        let mut old = version(0, 9000);
        for number in 1..=20 {
            let new = version(number, [4097, 20_000, 6000, 100_000][number % 4]);
            let mut held = File::open(&path).unwrap();
            let mut half = vec![0; 3000];
            held.read_exact(&mut half).unwrap();
            client.set_label(handle, &new).unwrap();
            soon("a long value", || fs::read_to_string(&path).unwrap() == new);
            held.read_to_end(&mut half).unwrap();
            assert!(half == old.as_bytes(), "not what it was when it was opened");
            old = new;
        }
        // A short one, too, stays what it was.
        for number in 21..60 {
            let new = version(number, [3, 4096, 200][number % 3]);
            client.set_label(handle, &new).unwrap();
            soon("a short value", || fs::read_to_string(&path).unwrap() == new);
            let held = File::open(&path).unwrap();
            let next = version(number + 100, [3, 4096, 200][(number + 1) % 3]);
            client.set_label(handle, &next).unwrap();
            for _ in 0..20 {
                let mut page = [0; 4096];
                let length = held.read_at(&mut page, 0).unwrap();
                let text = str::from_utf8(&page[..length]).unwrap();
                let ends = [&text[..10.min(length)], &text[length.saturating_sub(10)..]];
                assert!(text == new, "{length} bytes {ends:?}, {} are due", new.len());
            }
        }
    }

    fn without_inotify_a_change_shows_within_a_second(backend) {
        let (softhsm, mut client) = Softhsm::with_token(backend);
        let handle = client.create(&data("0", "x")).unwrap();
        let mount = MountOptions::new().option("noinotify").mount(&softhsm);
        let token = token_in(&softhsm, &mount);
        let object = object_in(&token, "0");
        // A second is the contract; the rest is for a busy machine.
        let limit = Duration::from_millis(1500);
        let timed = |what: &str, condition: &mut dyn FnMut() -> bool| {
            let start = Instant::now();
            eventually(limit, what, condition);
            println!("{backend}: {what} after {:?}", start.elapsed());
        };
        for number in 1..=4 {
            warm(&object);
            let new = version(number, 10 + 100 * number);
            client.set_label(handle, &new).unwrap();
            timed("label", &mut || fs::read_to_string(object.join("CKA_LABEL")).unwrap() == new);
            timed("size", &mut || fs::metadata(object.join("CKA_LABEL")).unwrap().len() == new.len() as u64);
        }
        let second = client.create(&data("second", "y")).unwrap();
        timed("new object", &mut || names(&token).len() == 3);
        let its = object_in(&token, "second");
        warm(&its);
        client.destroy(second).unwrap();
        timed("destroyed object", &mut || is_gone(&its.join("CKA_LABEL")) && is_gone(&its));
        client.init_token("another", Some(PIN)).unwrap();
        timed("new token", &mut || names(mount.path()).len() == 2);
    }

    fn reports_that_the_kernel_drops_do_no_harm(backend) {
        let (softhsm, mut client) = Softhsm::with_token(backend);
        let handle = client.create(&data("before", "x")).unwrap();
        let mount = Mount::new(&softhsm);
        let token = token_in(&softhsm, &mount);
        let object = object_in(&token, "before");
        warm(&object);
        // Nobody takes reports, until there is no place for those that matter.
        let server = Pid::from_raw(mount.pid().cast_signed());
        kill(server, Signal::SIGSTOP).unwrap();
        let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
        let limit: usize = limit.trim().parse().unwrap();
        let noise = ["noise1", "noise2"].map(|name| softhsm.token_directory().join(name));
        for path in &noise {
            fs::write(path, "").unwrap();
        }
        // Equal reports in a row count as one.
        for count in 0..=limit {
            set_mode(&noise[count % 2], 0o600);
        }
        client.set_label(handle, "after the flood").unwrap();
        client.create(&data("new", "y")).unwrap();
        client.init_token("another", Some(PIN)).unwrap();
        kill(server, Signal::SIGCONT).unwrap();
        let limit = Duration::from_secs(5);
        let start = Instant::now();
        eventually(limit, "the label", || fs::read(object.join("CKA_LABEL")).unwrap() == b"after the flood");
        eventually(limit, "its size", || fs::metadata(object.join("CKA_LABEL")).unwrap().len() == 15);
        println!("{backend}: after an overflow: {:?}", start.elapsed());
        eventually(limit, "the object", || names(&token).len() == 3);
        eventually(limit, "the token", || names(mount.path()).len() == 2);
        // And all is watched again, the new token included.
        client.open("another", Some(PIN)).unwrap();
        let handle = client.create(&data("there", "z")).unwrap();
        let other = names(mount.path()).into_iter().map(|n| mount.join(n)).find(|p| *p != token).unwrap();
        eventually(SOON, "an object in the new token", || names(&other).len() == 2);
        let there = object_in(&other, "there");
        warm(&there);
        client.set_label(handle, "watched").unwrap();
        soon("a label there", || fs::read(there.join("CKA_LABEL")).unwrap() == b"watched");
    }
}

/// Whoever restores it right after it was destroyed would be told that it is there, and that there is nothing to do.
#[test]
fn an_object_is_gone_before_a_long_scan_has_told_which() {
    let (softhsm, client) = Softhsm::with_token(Backend::Db);
    drop(client);
    let database = softhsm.token_directory().join("sqlite3.db");
    let other = rusqlite::Connection::open(database).unwrap();
    other
        .execute_batch(
            "pragma foreign_keys = on; begin immediate;
             with recursive n(i) as (select 2 union all select i + 1 from n where i < 6001) insert into object select i from n;
             insert into attribute_integer (value, type, object_id) select 0, 0, id from object where id > 1;
             with recursive t(i) as (select 1 union all select i + 1 from t where i < 17)
                insert into attribute_boolean (value, type, object_id) select 0, 353 + t.i, object.id from object, t where id > 1;
             insert into attribute_boolean (value, type, object_id) select 0, 2, id from object where id > 1;
             insert into attribute_binary (value, type, object_id) values (cast('it' as blob), 3, 2);
             commit",
        )
        .unwrap();
    let mount = Mount::new(&softhsm);
    let object = fs::canonicalize(mount.join(".tokenfs/by-label/test/it.data")).unwrap();
    assert_eq!(names(object.parent().unwrap()).len(), 6001);
    warm(&object);
    // Not by a path from the root, on which the directory of the token has changed too.
    let directory = File::open(&object).unwrap();
    let stat = || fstatat(&directory, "CKA_LABEL", AtFlags::empty());
    assert_eq!(stat().unwrap().st_size, 2);
    other
        .execute_batch("delete from object where id = 2")
        .unwrap();
    // By now whoever asks has to wait for the scan, or has been told.
    thread::sleep(Duration::from_millis(30));
    let begun = Instant::now();
    let told = stat().unwrap_err();
    assert!(matches!(told, Errno::ESTALE | Errno::ENOENT), "{told}");
    println!("told after {:?}", begun.elapsed());
}

#[test]
fn a_mount_that_ends_leaves_the_next_one_alone() {
    // The kernel gives the next mount the device number of the one before.
    let softhsm = Softhsm::new(Backend::File);
    let (_client, point) = (
        softhsm.p11().init_token("test", Some(PIN)).unwrap(),
        temporary(),
    );
    for _ in 0..6 {
        run(tokenfs()
            .arg("mount")
            .arg("--config")
            .arg(&softhsm.conf)
            .arg(point.path()));
        std::thread::sleep(Duration::from_millis(200));
        let there = is_mount_point(point.path()) && names(point.path()).len() == 1;
        let output = tool("umount").arg(point.path()).output().unwrap();
        assert!(there && output.status.success(), "gone: {output:?}");
    }
}
