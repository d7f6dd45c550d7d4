//! Where the system gives out under a write to a database: no space, no permission, a crash.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod db_common;
mod db_write_common;
mod support;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use db_common::*;
use db_write_common::*;
use support::*;
use tokenfs::error::ErrorKind;
use tokenfs::store::attribute::{AttributeKey, Attributes, Kind, Value};
use tokenfs::store::db::uuid::derived;
use tokenfs::store::db::{DATABASE, DbToken};
use tokenfs::store::{
    MetadataChange, NewObject, ObjectId, Options, Patience, Target, Time, Token, TokenName, crash,
};

const VALUE: u64 = 0x11;

fn holding(attributes: Attributes) -> NewObject {
    NewObject {
        attributes,
        access: ACCESS,
        mtime: None,
    }
}

const INNER: &str = "TOKENFS_TEST_DISK";

/// Runs one of the tests that are ignored with a file system of its own, which goes with it.
fn with_file_system(test: &str, options: &str) {
    if !is_root() {
        return;
    }
    let directory = temporary();
    let script = format!(
        "mount -t tmpfs -o {options} none \"${INNER}\" && exec \"$0\" --exact {test} --ignored --nocapture"
    );
    let mut command = tool("unshare");
    command.arg("-m").arg("sh").arg("-c").arg(script);
    command.arg(std::env::current_exe().unwrap());
    command.env(INNER, directory.path());
    let said = text_of(&mut command);
    assert!(said.contains("1 passed"), "{said}");
}

/// A token with one object, and the name of that.
fn small(directory: &Path) -> (DbToken, ObjectId) {
    let token = DbToken::build(
        TokenName::new(OsStr::new("small")).unwrap(),
        directory,
        ACCESS,
        Options::default(),
        Arc::default(),
    )
    .unwrap();
    let mut attributes = Attributes::new();
    attributes.insert(LABEL, Value::Bytes(b"old".to_vec()));
    token
        .create(&name(FOREIGN), &holding(attributes), Patience::Now)
        .unwrap();
    token.publish().unwrap();
    let token = open(directory, "small", Options::default(), &Arc::default());
    (token, named(FOREIGN))
}

#[test]
fn a_full_disk_leaves_the_old_value() {
    with_file_system("full_disk", "size=256k");
}

/// Not a test: see above.
#[test]
#[ignore = "run with a small file system"]
fn full_disk() {
    let Some(directory) = std::env::var_os(INNER) else {
        return;
    };
    let directory = Path::new(&directory);
    let (token, id) = small(directory);
    let big = |size: usize| set(&token, &id, VALUE, Value::Bytes(vec![7; size]));
    let label = |label: &str| set(&token, &id, LABEL, Value::Bytes(label.into()));
    let old = token.object(&id, patient()).unwrap().attributes.clone();
    for size in [4_000_000, 1_000_000, 230_000, 215_000] {
        assert_eq!(big(size).unwrap_err().kind(), ErrorKind::NoSpace, "{size}");
        assert_eq!(token.object(&id, patient()).unwrap().attributes, old);
        let fresh = open(directory, "small", Options::default(), &Arc::default());
        assert_eq!(fresh.object(&id, patient()).unwrap().attributes, old);
    }
    big(1000).unwrap();
    // No room for a journal either, for a while.
    let filler = directory.join("filler");
    std::process::Command::new("dd")
        .args(["if=/dev/zero", "bs=1k", "status=none"])
        .arg(format!("of={}", filler.display()))
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap();
    assert_eq!(label("new").unwrap_err().kind(), ErrorKind::NoSpace);
    let error = token.create(
        &name("b7e9f2a1-aaaa-bbbb-cccc-111111111112"),
        &holding(old.clone()),
        patient(),
    );
    assert_eq!(error.unwrap_err().kind(), ErrorKind::NoSpace);
    let ObjectId::Object(object) = &id else {
        return;
    };
    assert_eq!(
        token.remove(object, patient()).unwrap_err().kind(),
        ErrorKind::NoSpace
    );
    let object = token.object(&id, patient()).unwrap();
    assert_eq!(object.attributes.bytes(LABEL), Some(&b"old"[..]));
    assert!(!directory.join("sqlite3.db-journal").exists());
    std::fs::remove_file(filler).unwrap();
    label("new").unwrap();
    let object = token.object(&id, patient()).unwrap();
    assert_eq!(object.attributes.bytes(LABEL), Some(&b"new"[..]));
    assert_eq!(token.list(patient()).unwrap().len(), 1);
}

#[test]
fn a_read_only_file_system_says_so() {
    with_file_system("read_only_disk", "size=1m");
}

/// Not a test: see above.
#[test]
#[ignore = "run with a file system that becomes read-only"]
fn read_only_disk() {
    let Some(directory) = std::env::var_os(INNER) else {
        return;
    };
    let directory = Path::new(&directory);
    let (token, id) = small(directory);
    let remount = |how: &str| {
        let options = format!("remount,{how}");
        let mut command = Command::new("mount");
        assert!(
            command
                .arg("-o")
                .arg(options)
                .arg(directory)
                .status()
                .unwrap()
                .success()
        );
    };
    let label = |token: &DbToken, label: &str| set(token, &id, LABEL, Value::Bytes(label.into()));
    label(&token, "one").unwrap();
    let fresh = open(directory, "small", Options::default(), &Arc::default());
    // An open database keeps the file system from becoming read-only; a token that has not looked yet has none.
    drop(token);
    remount("ro");
    for _ in 0..2 {
        assert_eq!(
            label(&fresh, "two").unwrap_err().kind(),
            ErrorKind::ReadOnly
        );
        let object = fresh.object(&id, patient()).unwrap();
        assert_eq!(object.attributes.bytes(LABEL), Some(&b"one"[..]));
    }
    drop(fresh.publish());
    remount("rw");
    // The connection was opened for reading; that does not last.
    label(&fresh, "two").unwrap();
    assert_eq!(fresh.list(patient()).unwrap().len(), 1);
}

/// Not a test: the part of the one below that runs as somebody who is not root.
#[test]
#[ignore = "run by the test of permissions"]
fn unprivileged_writer() {
    let Some(root) = std::env::var_os(INNER) else {
        return;
    };
    let root = Path::new(&root);
    for (name, at) in [("database", "sqlite3.db"), ("directory", "directory")] {
        let directory = root.join(name);
        let token = open(&directory, "made", Options::default(), &Arc::default());
        let error = relabel(&token, 2, "new").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{name}: {error}");
        assert!(error.path().unwrap().ends_with(at), "{error}");
        assert_eq!(label(&token, 2), b"l2");
        let change = MetadataChange {
            mode: Some(0o777),
            ..MetadataChange::default()
        };
        for target in [Target::Directory, Target::Object(of_row(&token, 2))] {
            let error = token.set_metadata(&target, &change, patient()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotPermitted, "{error}");
        }
    }
}

#[test]
fn permissions_decide_what_is_written() {
    if !is_root() {
        return;
    }
    let made = made("");
    let root = temporary();
    set_mode(root.path(), 0o755);
    for (name, database, directory) in [("database", 0o644, 0o777), ("directory", 0o666, 0o755)] {
        let token = root.path().join(name);
        std::fs::create_dir(&token).unwrap();
        std::fs::copy(&made.path, token.join(DATABASE)).unwrap();
        set_mode(&token.join(DATABASE), database);
        set_mode(&token, directory);
    }
    let program = reachable(&std::env::current_exe().unwrap());
    let mut command = as_user(BOB, program);
    command
        .args(["--exact", "unprivileged_writer", "--ignored", "--nocapture"])
        .env(INNER, root.path())
        .current_dir("/");
    let said = text_of(&mut command);
    assert!(said.contains("1 passed"), "{said}");
}

const BEYOND: &str = "c7e9f2a1-aaaa-bbbb-cccc-111111111111";

/// Not a test: every kind of write, until one of them is the last.
#[test]
#[ignore = "run by the test of crashes"]
fn every_write() {
    let Some(directory) = std::env::var_os(INNER) else {
        return;
    };
    let directory = Path::new(&directory);
    let token = open(directory, "made", Options::default(), &Arc::default());
    let edit = &mut |attributes: &mut Attributes| {
        *attributes = new("changed").attributes;
        let kind = Kind::Ulong;
        let attribute_type = CLASS;
        attributes.remove(AttributeKey {
            attribute_type,
            kind,
        });
        attributes.insert(5, Value::Ulong(5));
        Ok(())
    };
    token
        .update(&of_row(&token, 2), edit, None, patient())
        .unwrap();
    token
        .create(&name(FOREIGN), &new("foreign"), patient())
        .unwrap();
    token
        .create(&name(&derived(token.name(), 9)), &new("nine"), patient())
        .unwrap();
    token
        .remove(&name(&derived(token.name(), 3)), patient())
        .unwrap();
    let change = MetadataChange {
        mtime: Some(Time::Now),
        ..MetadataChange::default()
    };
    token
        .set_metadata(&Target::Object(of_row(&token, 4)), &change, patient())
        .unwrap();
    // There and back, which leaves everything as it was.
    let aside = name("b7e9f2a1-aaaa-bbbb-cccc-333333333333");
    let foreign = name(FOREIGN);
    for (from, to) in [(&foreign, &aside), (&aside, &foreign)] {
        token.rename(from, to, patient()).unwrap();
    }
    let building = directory.join("building");
    std::fs::create_dir(&building).unwrap();
    let other = built(&building, "other");
    other
        .create(&name(FOREIGN), &new("foreign"), Patience::Now)
        .unwrap();
    other.publish().unwrap();
}

/// What is stored: row, label and the number of attributes; for an old object, a new one or none.
fn stored(directory: &Path) -> Vec<(String, usize)> {
    let token = open(directory, "made", Options::default(), &Arc::default());
    let names = token.list(patient()).unwrap();
    let mut all: Vec<_> = names
        .iter()
        .map(|name| {
            let object = token
                .object(&ObjectId::Object(name.clone()), patient())
                .unwrap();
            let label = object.attributes.bytes(LABEL).unwrap();
            (
                String::from_utf8(label.to_vec()).unwrap(),
                object.attributes.len(),
            )
        })
        .collect();
    all.sort();
    all
}

#[test]
fn a_crash_at_every_point_leaves_old_or_new() {
    let state = |objects: &[(&str, usize)]| -> Vec<(String, usize)> {
        let mut all: Vec<_> = objects.iter().map(|(l, n)| ((*l).to_owned(), *n)).collect();
        all.sort();
        all
    };
    // After each of the writes.
    let states = [
        state(&[("l2", 2), ("l3", 2), ("l4", 2)]),
        state(&[("changed", 3), ("l3", 2), ("l4", 2)]),
        state(&[("changed", 3), ("foreign", 3), ("l3", 2), ("l4", 2)]),
        state(&[
            ("changed", 3),
            ("foreign", 3),
            ("nine", 3),
            ("l3", 2),
            ("l4", 2),
        ]),
        state(&[("changed", 3), ("foreign", 3), ("nine", 3), ("l4", 2)]),
    ];
    let (mut crashes, mut reached) = (0, BTreeSet::new());
    let points = crash::POINTS
        .iter()
        .filter(|point| point.starts_with("db."));
    for point in points.clone() {
        for time in 1.. {
            let made = made("");
            let mut command = Command::new(std::env::current_exe().unwrap());
            command
                .args(["--exact", "every_write", "--ignored"])
                .env(INNER, made.directory.path())
                .env("TOKENFS_CRASH_POINT", format!("{point}:{time}"));
            let output = command.output().unwrap();
            let found = stored(made.directory.path());
            let after = states.iter().rposition(|state| *state == found);
            let after = after.unwrap_or_else(|| panic!("{point}:{time}: {found:?}"));
            // A journal that was not synced yet is nobody's business, and gone with the next write.
            // And it goes on.
            let token = made.token();
            token
                .create(&name(BEYOND), &new("beyond"), patient())
                .unwrap();
            agree(&made, &token);
            let building = made.directory.path().join("building");
            if building.join(DATABASE).exists() {
                assert_eq!(stored(&building).len(), 1, "{point}:{time}");
            }
            if output.status.success() {
                assert_eq!(after, states.len() - 1);
                assert!(building.join(DATABASE).exists());
                break;
            }
            reached.insert(*point);
            crashes += 1;
        }
    }
    report!(
        "{crashes} crashes at {} points, nothing torn",
        reached.len()
    );
    assert_eq!(reached.len(), points.count(), "{reached:?}");
}

#[test]
fn what_another_writer_left_is_rolled_back_before_a_write() {
    let made = made("");
    let token = made.token();
    for text in ["first", "second"] {
        support::crash_a_writer(&made.path);
        relabel(&token, 2, text).unwrap();
        assert_eq!(label(&token, 2), text.as_bytes());
        assert_eq!(label(&token, 3), b"l3");
        agree(&made, &token);
    }
}
