//! `tokenfs check` exits with 1 if something is left and with 2 if it could not look, and says which and why; with 0 otherwise, as the other tests
//! of it have it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod check_common;
mod support;

use std::fs;
use std::time::{Duration, Instant};

use check_common::*;
use support::*;

#[test]
fn what_could_not_be_mended_is_exit_code_1_and_says_why() {
    let (softhsm, client, object) = with_object();
    drop(client);
    give(softhsm.directory.path(), ALICE);
    let lock = object.with_extension("lock");
    let as_alice = |arguments: &[&str]| {
        let mut command = tokenfs_as(ALICE);
        command.args(["check", "--config"]).arg(&softhsm.conf);
        Checked::of(command.args(arguments))
    };
    // The one she can mend, of the other she is not the owner.
    set_mode(&object, 0o644);
    set_mode(&lock, 0o666);
    give(&lock, BOB);
    let repaired = as_alice(&["--repair"]);
    assert_eq!(repaired.code, 1, "{repaired:#?}");
    assert_eq!(
        repaired.summary(),
        "1 token, 1 object: 2 findings, 1 mended"
    );
    assert!(
        repaired.of_path(&object).ends_with(" (mended)"),
        "{repaired:#?}"
    );
    let line = repaired.of_path(&lock);
    assert!(line.ends_with(" (could not be mended)"), "{line}");
    let path = lock.to_str().unwrap();
    assert!(
        repaired.err.contains(path) && repaired.err.contains("not permitted"),
        "{repaired:#?}"
    );

    // What cannot be looked at counts for more.
    set_mode(&object, 0o600);
    give(&object, BOB);
    assert_eq!(as_alice(&["--repair"]).code, 2);
    give(&object, ALICE);
    give(&lock, ALICE);
    let repaired = as_alice(&["--repair"]);
    assert_eq!(
        (repaired.code, repaired.err.as_str()),
        (0, ""),
        "{repaired:#?}"
    );
    assert_eq!(as_alice(&[]).code, 0);
}

#[test]
fn what_cannot_be_looked_at_is_exit_code_2() {
    let (softhsm, _client, object) = with_object();
    let missing = Checked::of(tokenfs().args(["check", "--tokendir", "/nonexistent/tokens"]));
    let unknown = check(&softhsm, &["nobody"]);
    let wrong = check(&softhsm, &["--backend", "sql"]);
    softhsm.configure("objectstore.umask = 99\n");
    let umask = check(&softhsm, &[]);
    softhsm.configure("");
    for (what, checked) in [
        ("missing", missing),
        ("unknown", unknown),
        ("wrong", wrong),
        ("umask", umask),
    ] {
        assert_eq!(
            (checked.code, checked.out.as_str()),
            (2, ""),
            "{what}: {checked:#?}"
        );
        assert!(!checked.err.is_empty(), "{what}");
    }

    // One object is locked, of another the lock file is missing: both are said, and 2 is the code.
    let held = exclusively(&object);
    fs::remove_file(object.with_extension("lock")).unwrap();
    let start = Instant::now();
    let checked = check(&softhsm, &[]);
    assert!(start.elapsed() < Duration::from_secs(20));
    assert_eq!(checked.code, 2, "{checked:#?}");
    assert!(
        checked.err.contains(object.to_str().unwrap()),
        "{checked:#?}"
    );
    assert!(
        checked
            .of_path(&object.with_extension("lock"))
            .starts_with("missing: ")
    );
    assert!(
        checked.summary().ends_with("1 could not be looked at"),
        "{checked:#?}"
    );
    drop(held);
}

both_backends! {
    fn the_last_line_says_which_directory_whatever_is_found(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        let place = softhsm.tokendir.display().to_string();
        let expect = |code: i32, end: &str| {
            let checked = check(&softhsm, &[]);
            let expected = format!("{place}: 4 tokens, 36 objects: {end}");
            assert_eq!((checked.code, checked.last_line()), (code, &*expected), "{checked:#?}");
        };
        expect(0, "clean");
        set_mode(&softhsm.token_directories()[0], 0o777);
        expect(1, "1 finding");
        // A directory, which can be a link to it, on the command line instead of the one of the configuration.
        set_mode(&softhsm.token_directories()[0], 0o700);
        let link = softhsm.directory.path().join("link");
        std::os::unix::fs::symlink(&softhsm.tokendir, &link).unwrap();
        let checked = check(&softhsm, &["--tokendir", link.to_str().unwrap()]);
        assert_eq!(checked.last_line(), format!("{place}: 4 tokens, 36 objects: clean"));
        let empty = softhsm.directory.path().join("empty");
        fs::create_dir(&empty).unwrap();
        let checked = check(&softhsm, &["--tokendir", empty.to_str().unwrap()]);
        assert_eq!(checked.last_line(), format!("{}: 0 tokens, 0 objects: clean", empty.display()));
    }

    fn a_token_that_may_not_be_read_is_exit_code_2_and_the_rest_is_told(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        give(softhsm.directory.path(), ALICE);
        let tokens = softhsm.token_directories();
        give(&tokens[0], BOB);
        let checked = Checked::of(
            tokenfs_as(ALICE)
                .args(["check", "--config"])
                .arg(&softhsm.conf),
        );
        assert_eq!(checked.code, 2, "{checked:#?}");
        assert!(checked.err.contains(tokens[0].to_str().unwrap()), "{checked:#?}");
        assert!(checked.summary().starts_with("3 tokens, "), "{checked:#?}");
        assert!(!checked.summary().contains("clean"), "{checked:#?}");
    }
}

/// Whatever a lock was held for while it was looked at first.
#[test]
fn what_could_not_be_looked_at_first_is_told_when_it_can() {
    // As long as the check waits for a lock, and a little more.
    let held_for = Duration::from_millis(5600);
    for backend in [Backend::File, Backend::Db] {
        let (softhsm, mut client) = Softhsm::with_token(backend);
        client.create(&data_object("it")).unwrap();
        drop(client);
        let token = softhsm.token_directory();
        let (torn, held): (_, Box<dyn std::any::Any>) = match backend {
            Backend::File => {
                let object = objects(&token).remove(0);
                let data = fs::read(&object).unwrap();
                fs::write(&object, &data[..data.len() - 3]).unwrap();
                let held = exclusively(&object);
                (object, Box::new(held))
            }
            Backend::Db => {
                let path = token.join("sqlite3.db");
                let connection = rusqlite::Connection::open(&path).unwrap();
                let damage =
                    "update attribute_binary set value = 'a text' where type = 3 and object_id = 2;
                              begin exclusive";
                connection.execute_batch(damage).unwrap();
                (path, Box::new(connection))
            }
        };
        let checked = std::thread::scope(|scope| {
            let checking = scope.spawn(|| check(&softhsm, &[]));
            std::thread::sleep(held_for);
            drop(held);
            checking.join().unwrap()
        });
        assert_eq!(checked.code, 1, "{backend}: {checked:#?}");
        assert!(
            checked.of_path(&torn).starts_with("torn: "),
            "{backend}: {checked:#?}"
        );
    }
}

/// What the second look cannot say anything of is not mended for that.
#[test]
fn nothing_is_called_mended_that_nobody_has_mended() {
    let (softhsm, mut client, torn) = with_object();
    client.create(&data_object("other")).unwrap();
    drop(client);
    let mut objects = objects(&softhsm.token_directory());
    objects.retain(|object| *object != torn);
    let lock = objects[0].with_extension("lock");
    fs::remove_file(&lock).unwrap();
    let data = fs::read(&torn).unwrap();
    fs::write(&torn, &data[..data.len() - 3]).unwrap();
    let repaired = std::thread::scope(|scope| {
        let repairing = scope.spawn(|| check(&softhsm, &["--repair"]));
        eventually(Duration::from_secs(30), "the lock file is made", || {
            lock.exists()
        });
        let held = exclusively(&torn);
        let repaired = repairing.join().unwrap();
        drop(held);
        repaired
    });
    assert_eq!(repaired.code, 2, "{repaired:#?}");
    assert_eq!(
        repaired.summary(),
        "1 token, 2 objects: 1 finding, 1 mended, 1 could not be looked at"
    );
    assert!(
        repaired.of_path(&lock).ends_with(" (mended)"),
        "{repaired:#?}"
    );
}

/// `fsck` keeps what it finds in a directory that is root's alone, where a tokendir is a file system of its own.
#[test]
fn what_is_the_file_systems_own_may_be_closed() {
    let (softhsm, client, _) = with_object();
    drop(client);
    give(softhsm.directory.path(), ALICE);
    let found = softhsm.tokendir.join("lost+found");
    fs::create_dir(&found).unwrap();
    set_mode(&found, 0o700);
    let mut command = tokenfs_as(ALICE);
    Checked::of(command.args(["check", "--config"]).arg(&softhsm.conf)).assert_clean();
}
