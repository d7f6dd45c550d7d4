//! What somebody else holds, or has left half done, is waited for, refused or rolled back, and holds up nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod mount_common;
mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use mount_common::*;
use support::*;

#[test]
fn a_hot_journal_is_rolled_back_unless_the_mount_is_read_only() {
    let softhsm = Softhsm::golden(Golden::V2_6_1, Backend::Db);
    let tree = expected(&softhsm);
    let intact = softhsm.snapshot();
    let token = softhsm.token_directories().remove(0);
    let name = token.file_name().unwrap();
    crash_a_writer(&token.join("sqlite3.db"));
    let torn = softhsm.snapshot();
    assert_ne!(torn, intact);

    let careful = MountOptions::new().option("ro").mount(&softhsm);
    let refused = fs::read_dir(careful.join(name)).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    assert_eq!(refused.unwrap_err().raw_os_error(), Some(nix::libc::EIO));
    let log = fs::read_to_string(careful.join(".tokenfs/log")).unwrap();
    assert!(
        log.contains("left a journal") && log.contains(name.to_str().unwrap()),
        "{log}"
    );
    for (path, content) in tree.iter().filter(|(path, _)| !path.starts_with(name)) {
        if let Some(content) = content {
            assert_eq!(
                &fs::read(careful.join(path)).unwrap(),
                content,
                "{}",
                path.display()
            );
        }
    }
    torn.assert_same(&softhsm.snapshot());

    let mount = Mount::new(&softhsm);
    assert_same(&tree, &seen(&mount));
    assert!(!token.join("sqlite3.db-journal").exists());
    intact.assert_same(&softhsm.snapshot());
    // Whoever could not do it sees that it is done.
    eventually(Duration::from_secs(3), "the other mount", || {
        fs::read_dir(careful.join(name)).is_ok_and(|mut d| d.all(|e| e.is_ok()))
    });
    assert_same(&tree, &seen(&careful));
}

/// Whatever they wait for, which is the same for both backends.
#[test]
fn more_than_so_many_that_wait_are_busy_at_once_and_hold_up_nobody() {
    let softhsm = Softhsm::golden(Golden::V2_6_1, Backend::File);
    let tree = expected(&softhsm);
    let labels: Vec<_> = tree
        .keys()
        .filter(|path| path.ends_with("CKA_LABEL") && path.components().count() == 3)
        .collect();
    let token = |path: &Path| softhsm.tokendir.join(path.iter().next().unwrap());
    let blocked = labels[0];
    let free = labels
        .iter()
        .rfind(|path| token(path) != token(blocked))
        .unwrap();
    let mount = MountOptions::new().option("lock_wait=20").mount(&softhsm);
    // What the kernel does not know yet it asks for once, whoever wants it.
    fs::read(mount.join(blocked)).unwrap();
    let object = softhsm.tokendir.join(blocked.parent().unwrap());
    let object = object.with_extension("object");
    let held = exclusively(&object);
    // Nor does the mount know what is in it by now, however long ago it was read.
    set_mode(&object, fs::metadata(&object).unwrap().permissions().mode());
    let refused = std::sync::atomic::AtomicUsize::new(0);
    let read: usize = std::thread::scope(|scope| {
        let reader = || match fs::read(mount.join(blocked)) {
            Ok(content) => {
                assert_eq!(content, *tree[Path::new(blocked)].as_ref().unwrap());
                1
            }
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(nix::libc::EBUSY), "{error}");
                refused.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                0
            }
        };
        let readers: Vec<_> = (0..300).map(|_| scope.spawn(reader)).collect();
        let deadline = Instant::now() + Duration::from_secs(10);
        while refused.load(std::sync::atomic::Ordering::SeqCst) < 44 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        let beside = fs::read(mount.join(free));
        drop(held);
        assert_eq!(&beside.unwrap(), tree[*free].as_ref().unwrap());
        readers
            .into_iter()
            .map(|reader| reader.join().unwrap())
            .sum()
    });
    assert_eq!((read, refused.into_inner()), (256, 44));
    let log = fs::read_to_string(mount.join(".tokenfs/log")).unwrap();
    assert!(
        log.contains("too many requests are waiting for locks already"),
        "{log}"
    );
}

both_backends! {
    fn a_lock_that_stays_is_busy_and_holds_up_nothing_else(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        let tree = expected(&softhsm);
        let label = |path: &&std::path::PathBuf| path.ends_with("CKA_LABEL") && path.components().count() == 3;
        let blocked = tree.keys().find(label).unwrap();
        let token = softhsm.tokendir.join(blocked.iter().next().unwrap());
        let object = blocked.parent().unwrap();
        // Of the same token for `file`; of another one for `db`, whose lock is the database's.
        let same = |path: &&std::path::PathBuf| path.starts_with(token.file_name().unwrap());
        let free = tree.keys().filter(label).find(|path| !path.starts_with(object) && (backend == Backend::File) == same(path));
        let free = free.unwrap();
        let mount = MountOptions::new().option("lock_wait=1").mount(&softhsm);
        let (mut file, mut writer) = (None, None);
        match backend {
            Backend::File => {
                let path = softhsm.tokendir.join(object.with_extension("object"));
                file = Some(exclusively(&path));
            }
            Backend::Db => {
                let opened = rusqlite::Connection::open(token.join("sqlite3.db")).unwrap();
                opened.execute_batch("begin exclusive").unwrap();
                writer = Some(opened);
            }
        }
        let started = Instant::now();
        let mut cat = tool("cat");
        let cat = cat.arg(mount.join(blocked)).env("LC_ALL", "C").stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut waiting = cat.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        let beside = Instant::now();
        assert_eq!(run(tool("cat").arg(mount.join(free))).stdout, *tree[free].as_ref().unwrap());
        let took = beside.elapsed();
        assert!(took < Duration::from_millis(500), "{took:?}");
        assert!(waiting.try_wait().unwrap().is_none(), "nothing was waited for");
        let output = waiting.wait_with_output().unwrap();
        let waited = started.elapsed();
        assert!(!output.status.success());
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("Device or resource busy"), "{said}");
        assert!(waited > Duration::from_millis(900) && waited < Duration::from_secs(4), "{waited:?}");
        let log = fs::read_to_string(mount.join(".tokenfs/log")).unwrap();
        assert!(log.contains(token.file_name().unwrap().to_str().unwrap()), "{log}");
        drop((file.take(), writer.take()));
        assert_eq!(fs::read(mount.join(blocked)).unwrap(), *tree[Path::new(blocked)].as_ref().unwrap());
    }
    fn what_is_pending_waits_for_its_own_lock_and_for_no_other(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        let tree = expected(&softhsm);
        let labels: Vec<_> = tree.keys().filter(|path| path.ends_with("CKA_LABEL") && path.components().count() == 3).collect();
        let token_of = |path: &Path| Path::new(path.iter().next().unwrap()).to_owned();
        let token = token_of(labels[0]);
        let (there, elsewhere): (Vec<_>, Vec<_>) = labels.into_iter().partition(|path| path.starts_with(&token));
        let blocked = &there[..2];
        // Of the same token for `file`; of another one for `db`, whose lock is the database's.
        let free = if backend == Backend::File { token.clone() } else { token_of(elsewhere[0]) };
        let mount = Mount::new(&softhsm);
        for label in blocked {
            fs::remove_file(mount.join(label)).unwrap();
        }
        let (mut files, mut writer) = (Vec::new(), None);
        match backend {
            Backend::File => {
                let object = |label: &&std::path::PathBuf| softhsm.tokendir.join(label.parent().unwrap()).with_extension("object");
                files.extend(blocked.iter().map(|label| exclusively(&object(label))));
            }
            Backend::Db => {
                let opened = rusqlite::Connection::open(softhsm.tokendir.join(&token).join("sqlite3.db")).unwrap();
                opened.execute_batch("begin exclusive").unwrap();
                writer = Some(opened);
            }
        }
        // By now they are due, and wait.
        std::thread::sleep(Duration::from_millis(500));
        let new = free.join("00000000-0000-4000-8000-00000000000a");
        // By a process that has ended when it is left alone.
        run(tool("mkdir").arg(mount.join(&new)));
        for (name, text) in [("CKA_PRIVATE", "false\n"), ("CKA_TOKEN", "true\n"), ("CKA_CLASS", "CKO_DATA\n")] {
            fs::write(mount.join(&new).join(name), text).unwrap();
        }
        let started = Instant::now();
        let stored = |path: &Path| mount.join(".tokenfs/file").join(path).with_extension("object");
        eventually(Duration::from_secs(3), "the new object", || stored(&new).exists());
        println!("{backend}: a new object was in the store after {:?}", started.elapsed());
        drop((files, writer));
        let gone = |label: &Path| !expected(&softhsm).contains_key(label);
        eventually(Duration::from_secs(10), "what was unlinked is removed", || blocked.iter().all(|label| gone(label)));
    }
    fn a_mount_ends_soon_however_much_is_locked(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        let tree = expected(&softhsm);
        let labels: Vec<_> = tree.keys().filter(|path| path.ends_with("CKA_LABEL") && path.components().count() == 3).collect();
        let tokens = labels.iter().filter_map(|path| path.iter().next());
        let token = tokens.max_by_key(|token| labels.iter().filter(|path| path.starts_with(token)).count()).unwrap();
        let there: Vec<_> = labels.iter().filter(|path| path.starts_with(token)).collect();
        let mut mount = MountOptions::new().option("lock_wait=2").mount(&softhsm);
        for label in &there {
            fs::remove_file(mount.join(label)).unwrap();
        }
        let (mut files, mut writer) = (Vec::new(), None);
        match backend {
            Backend::File => {
                let object = |label: &Path| softhsm.tokendir.join(label.parent().unwrap()).with_extension("object");
                files.extend(there.iter().map(|label| exclusively(&object(label))));
            }
            Backend::Db => {
                let opened = rusqlite::Connection::open(softhsm.tokendir.join(token).join("sqlite3.db")).unwrap();
                opened.execute_batch("begin exclusive").unwrap();
                writer = Some(opened);
            }
        }
        let started = Instant::now();
        mount.kill(nix::sys::signal::Signal::SIGTERM);
        let took = started.elapsed();
        println!("{backend}: {} objects were locked, and the mount ended after {took:?}", there.len());
        assert!(there.len() > 4 && took < Duration::from_secs(8), "{} objects: {took:?}", there.len());
        drop((files, writer));
    }
}
