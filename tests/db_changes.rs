//! The `db` backend beside other users of the database: locks, crashes, changes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod db_common;
mod support;

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use db_common::*;
use rusqlite::Connection;
use tokenfs::error::ErrorKind;
use tokenfs::store::{ObjectId, Options, Patience, Token};

/// Above the granularity of a file's times.
fn settle() {
    std::thread::sleep(Duration::from_millis(70));
}

fn relabel(writer: &Connection, label: &str) {
    writer
        .execute(
            "update attribute_binary set value = cast(? as blob) where object_id = 2 and type = 3",
            [label],
        )
        .unwrap();
}

#[test]
fn nothing_changed_means_the_same_arc() {
    let made = made("");
    let token = made.token();
    let id = of_row(&token, 2);
    let young = token.object(&id, patient()).unwrap();
    assert!(Arc::ptr_eq(
        &young,
        &token.object(&id, Patience::Now).unwrap()
    ));
    settle();
    assert!(Arc::ptr_eq(
        &young,
        &token.object(&id, Patience::Now).unwrap()
    ));
    assert!(Arc::ptr_eq(
        &young,
        &token.object(&id, Patience::Now).unwrap()
    ));
}

#[test]
fn every_change_is_seen_at_once_however_fast_they_come() {
    let made = made("");
    let token = made.token();
    let writer = made.writer(false);
    for n in 0..300 {
        let text = format!("{n:03}");
        relabel(&writer, &text);
        assert_eq!(label(&token, 2), text.as_bytes());
    }
}

#[test]
fn a_change_by_another_process_is_seen() {
    let made = made("");
    let token = made.token();
    for n in 0..5 {
        assert_eq!(label(&token, 2).len(), 2);
        if n % 2 == 0 {
            settle();
        }
        let status = Command::new("sqlite3")
            .arg(&made.path)
            .arg(format!(
                "update attribute_binary set value = x'373{n}' where object_id = 2;"
            ))
            .status()
            .expect("this test needs the sqlite3 command: install the package sqlite3");
        assert!(status.success());
        assert_eq!(label(&token, 2), format!("7{n}").as_bytes());
    }
}

#[test]
fn a_change_of_mode_changes_the_metadata_and_nothing_else() {
    use std::os::unix::fs::PermissionsExt;
    let made = made("insert into attribute_integer values ('odd', 5, 3, 77)");
    let token = made.token();
    let id = of_row(&token, 2);
    settle();
    let before = token.object(&id, patient()).unwrap();
    std::fs::set_permissions(&made.path, PermissionsExt::from_mode(0o604)).unwrap();
    let after = token.object(&id, patient()).unwrap();
    assert_eq!(after.metadata.mode, 0o604);
    assert_eq!(token.object_metadata(&id, patient()).unwrap().mode, 0o604);
    assert_eq!(before.attributes, after.attributes);
    let damaged = token.object(&of_row(&token, 3), patient()).unwrap_err();
    assert_eq!(damaged.kind(), ErrorKind::Damaged);
}

#[test]
fn a_file_that_is_exchanged_or_overwritten_is_read_anew() {
    let made = made("");
    let token = made.token();
    assert_eq!(label(&token, 2), b"l2");
    let other = db_common::made("update attribute_binary set value = x'4F' where object_id = 2");
    let staged = made.path.with_extension("staged");
    std::fs::copy(&other.path, &staged).unwrap();
    std::fs::rename(&staged, &made.path).unwrap();
    assert_eq!(label(&token, 2), b"O");

    // In place, behind SQLite's back, with the same change counter and size.
    let third = db_common::made("update attribute_binary set value = x'50' where object_id = 2");
    settle();
    assert_eq!(label(&token, 2), b"O");
    let bytes = std::fs::read(&third.path).unwrap();
    let old = std::fs::read(&made.path).unwrap();
    assert_eq!((&old[24..28], old.len()), (&bytes[24..28], bytes.len()));
    std::fs::write(&made.path, bytes).unwrap();
    assert_eq!(label(&token, 2), b"P");

    std::fs::write(&made.path, b"no database").unwrap();
    assert_eq!(
        token.list(patient()).unwrap_err().kind(),
        ErrorKind::Damaged
    );
    std::fs::copy(&other.path, &staged).unwrap();
    std::fs::rename(&staged, &made.path).unwrap();
    assert_eq!(label(&token, 2), b"O", "a damage that is repaired is gone");
}

#[test]
fn commits_to_a_write_ahead_log_are_seen() {
    let made = made("");
    let writer = made.writer(false);
    writer
        .query_row("pragma journal_mode = wal", [], |_| Ok(()))
        .unwrap();
    let token = made.token();
    assert_eq!(label(&token, 2), b"l2");
    settle();
    for n in 0..20 {
        relabel(&writer, &format!("{n:02}"));
        assert_eq!(label(&token, 2), format!("{n:02}").as_bytes());
    }
}

#[test]
fn a_lock_that_stays_taken() {
    let made = made("");
    let token = made.token();
    let writer = made.writer(false);
    writer.execute_batch("begin exclusive").unwrap();
    let error = token.list(Patience::Now).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    let start = Instant::now();
    let error = token
        .list(Patience::at_most(Duration::from_millis(80)))
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert_eq!(error.path(), Some(made.path.as_path()));
    assert!(
        (80..1000).contains(&start.elapsed().as_millis()),
        "{:?}",
        start.elapsed()
    );
    // What needs no content goes on. The token's own object is there in any case; what can still become its time is waited for.
    assert!(token.metadata().is_ok());
    let own = |patience| token.object_metadata(&ObjectId::Token, patience);
    let error = own(Patience::Now).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    assert!(own(Patience::at_most(Duration::from_millis(80))).is_ok());

    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| label(&token, 2));
        std::thread::sleep(Duration::from_millis(100));
        relabel(&writer, "new");
        writer.execute_batch("commit").unwrap();
        assert_eq!(waiting.join().unwrap(), b"new");
    });
    // A writer that has not committed anything yet does not keep a settled snapshot from being served.
    settle();
    token.list(patient()).unwrap();
    writer.execute_batch("begin exclusive").unwrap();
    assert_eq!(token.list(Patience::Now).unwrap().len(), 3);
}

#[test]
fn a_large_database_is_not_scanned_for_the_impatient() {
    let made = made(
        "insert into attribute_binary (value, type, object_id) values (zeroblob(600000), 17, 2)",
    );
    let token = made.token();
    assert_eq!(
        token.list(Patience::Now).unwrap_err().kind(),
        ErrorKind::WouldBlock
    );
    token.list(patient()).unwrap();
    // Still young: this asks SQLite, which is quick.
    token.list(Patience::Now).unwrap();
    relabel(&made.writer(false), "new");
    assert_eq!(
        token.list(Patience::Now).unwrap_err().kind(),
        ErrorKind::WouldBlock
    );
    assert_eq!(label(&token, 2), b"new");
}

#[test]
fn concurrent_callers_get_the_same_snapshot() {
    let made = made(
        "insert into attribute_binary (value, type, object_id) values (zeroblob(3000000), 17, 2)",
    );
    settle();
    let token = made.token();
    let id = of_row(&token, 2);
    let objects: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| token.object(&id, patient()).unwrap()))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert!(
        objects
            .iter()
            .all(|object| Arc::ptr_eq(object, &objects[0]))
    );
}

#[test]
fn what_a_crashed_writer_left_is_rolled_back() {
    let made = made("");
    let token = made.token();
    assert_eq!(label(&token, 2), b"l2");
    support::crash_a_writer(&made.path);
    assert_eq!(
        token.list(Patience::Now).unwrap_err().kind(),
        ErrorKind::WouldBlock
    );
    assert_eq!(label(&token, 2), b"l2");
    assert_eq!(token.list(Patience::Now).unwrap().len(), 3);
    assert!(!made.path.with_file_name("sqlite3.db-journal").exists());
}

#[test]
fn what_a_crashed_writer_left_is_not_read_without_write_access() {
    let made = made("");
    support::crash_a_writer(&made.path);
    let torn = std::fs::read(&made.path).unwrap();
    let read_only = Options {
        read_only: true,
        ..Options::default()
    };
    let token = made.token_with(read_only);
    for _ in 0..2 {
        let error = token.list(patient()).unwrap_err();
        assert_eq!(error.errno(), nix::libc::EIO);
        assert!(
            error.to_string().contains("let SoftHSM open the token"),
            "{error}"
        );
    }
    assert_eq!(std::fs::read(&made.path).unwrap(), torn);
    // Once somebody has rolled it back, it can be read.
    assert_eq!(label(&made.token(), 2), b"l2");
    assert_eq!(label(&token, 2), b"l2");
}

#[test]
fn reading_changes_nothing_in_the_directory() {
    let made = made("");
    let before = std::fs::read(&made.path).unwrap();
    let read_only = Options {
        read_only: true,
        ..Options::default()
    };
    for token in [made.token(), made.token_with(read_only)] {
        assert_eq!(label(&token, 2), b"l2");
    }
    assert_eq!(std::fs::read(&made.path).unwrap(), before);
    assert_eq!(std::fs::read_dir(made.directory.path()).unwrap().count(), 1);
}
