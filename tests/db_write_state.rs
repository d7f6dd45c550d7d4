//! What a write to a database means for times, locks, what is known already, and for a token that does not exist yet.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod db_common;
mod db_write_common;
mod support;

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use db_common::*;
use db_write_common::*;
use tokenfs::error::ErrorKind;
use tokenfs::store::attribute::{Attributes, Value};
use tokenfs::store::db::times::CKA_TOKENFS_TIMES;
use tokenfs::store::db::uuid::derived;
use tokenfs::store::db::{DATABASE, DbToken};
use tokenfs::store::{MetadataChange, ObjectId, Options, Patience, Target, Time, Token};

#[test]
fn times_hold_until_the_content_changes() {
    let made = made("");
    let token = made.token();
    let id = of_row(&token, 2);
    let mtime =
        |token: &DbToken, id: &ObjectId| token.object(id, patient()).unwrap().metadata.mtime;
    let file = || std::fs::metadata(&made.path).unwrap().modified().unwrap();
    assert_eq!(mtime(&token, &id), file());
    let old = UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    token
        .update(&id, &mut |_| Ok(()), Some(old), patient())
        .unwrap();
    assert_eq!(mtime(&token, &id), old);
    // Another one keeps the time at which it was last seen to change, and has that of the file for who has just come.
    assert!(mtime(&token, &of_row(&token, 3)) < file());
    assert_eq!(mtime(&made.token(), &of_row(&token, 3)), file());
    agree(&made, &token);

    // Changes of another object leave it; so does a change of the file's mode.
    relabel(&token, 3, "other").unwrap();
    std::fs::set_permissions(&made.path, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(mtime(&token, &id), old);
    agree(&made, &token);
    // A change through us is a new time.
    let begun = SystemTime::now();
    relabel(&token, 2, "new").unwrap();
    assert!((begun..SystemTime::now()).contains(&mtime(&token, &id)));
    agree(&made, &token);
    // Time alone, at three targets.
    for id in [of_row(&token, 4), ObjectId::Token, id.clone()] {
        for time in [old, UNIX_EPOCH - Duration::new(5, 5)] {
            let change = MetadataChange {
                mtime: Some(Time::At(time)),
                atime: Some(Time::Now),
                ..MetadataChange::default()
            };
            token
                .set_metadata(&Target::Object(id.clone()), &change, patient())
                .unwrap();
            assert_eq!(mtime(&token, &id), time);
            agree(&made, &token);
        }
    }
    let begun = SystemTime::now();
    let change = MetadataChange {
        mtime: Some(Time::Now),
        ..MetadataChange::default()
    };
    token
        .set_metadata(&Target::Object(id.clone()), &change, patient())
        .unwrap();
    assert!(mtime(&token, &id) >= begun);
    let rows =
        format!("select count(*) || '' from attribute_text where type = {CKA_TOKENFS_TIMES}");
    assert_eq!(query(&made, &rows), ["4"]);
    // Somebody else changes it, and changes it back.
    let time = mtime(&token, &id);
    let writer = made.writer(false);
    let label = |text: &str| {
        let sql =
            "update attribute_binary set value = cast(? as blob) where object_id = 2 and type = 3";
        writer.execute(sql, [text]).unwrap();
    };
    label("else");
    assert_eq!(mtime(&token, &id), file());
    label("new");
    assert_eq!(mtime(&token, &id), time);
    // A time that was given for a new object.
    let mut dated = new("dated");
    dated.mtime = Some(old);
    token.create(&name(FOREIGN), &dated, patient()).unwrap();
    assert_eq!(mtime(&token, &named(FOREIGN)), old);
    agree(&made, &token);
}

#[test]
fn the_time_of_a_tokens_own_object_is_its_own_or_waited_for() {
    let made = made("");
    let token = made.token();
    let old = UNIX_EPOCH + Duration::new(1_000_000_000, 5);
    token
        .update(&ObjectId::Token, &mut |_| Ok(()), Some(old), patient())
        .unwrap();
    let mtime = |patience| {
        let metadata = token.object_metadata(&ObjectId::Token, patience);
        metadata.map(|metadata| metadata.mtime)
    };
    assert_eq!(mtime(Patience::Now).unwrap(), old);
    // Somebody else has changed an object, and is at it again: what is known is no answer, and neither is the time of the database.
    let writer = made.writer(false);
    let change = "update attribute_binary set value = x'7a' where object_id = 3";
    writer.execute_batch(change).unwrap();
    writer.execute_batch("begin exclusive").unwrap();
    let error = mtime(Patience::Now).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    writer.execute_batch("rollback").unwrap();
    assert_eq!(mtime(Patience::Now).unwrap(), old);
}

#[test]
fn modes_owners_and_times_of_the_files() {
    let made = made("");
    let token = made.token();
    let change = MetadataChange {
        mode: Some(0o604),
        uid: support::is_root().then_some(12345),
        gid: support::is_root().then_some(23456),
        ..MetadataChange::default()
    };
    let object = Target::Object(of_row(&token, 2));
    token.set_metadata(&object, &change, patient()).unwrap();
    let stat = std::fs::metadata(&made.path).unwrap();
    assert_eq!(stat.mode() & 0o7777, 0o604);
    if support::is_root() {
        assert_eq!((stat.uid(), stat.gid()), (12345, 23456));
    }
    agree(&made, &token);
    let time = UNIX_EPOCH + Duration::new(1_000_000_000, 5);
    let change = MetadataChange {
        mode: Some(0o710),
        mtime: Some(Time::At(time)),
        ..change
    };
    token
        .set_metadata(&Target::Directory, &change, patient())
        .unwrap();
    let metadata = token.metadata().unwrap();
    assert_eq!((metadata.mode, metadata.mtime), (0o710, time));
    let gone = Target::Object(named(FOREIGN));
    let error = token.set_metadata(&gone, &change, patient()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    token.sync(patient()).unwrap();
    relabel(&token, 2, "still").unwrap();
    agree(&made, &token);
}

#[test]
fn a_write_scans_nothing_that_it_does_not_change() {
    let made = made("");
    let token = made.token();
    // The value is where it was: it has not been read again.
    let place = |row| {
        get(&token, &of_row(&token, row))
            .bytes(LABEL)
            .unwrap()
            .as_ptr() as usize
    };
    let before = place(4);
    relabel(&token, 2, "new").unwrap();
    token.create(&name(FOREIGN), &new("x"), patient()).unwrap();
    token.remove(&name(FOREIGN), patient()).unwrap();
    token
        .remove(&name(&derived(token.name(), 3)), patient())
        .unwrap();
    set(
        &token,
        &ObjectId::Token,
        LABEL_OF_TOKEN,
        Value::Bytes(b"new".to_vec()),
    )
    .unwrap();
    let refused = set(&token, &of_row(&token, 2), 3, Value::Mechs(BTreeSet::new()));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(place(4), before);
    settle();
    assert_eq!(place(4), before);
    let id = of_row(&token, 2);
    let (one, two) = (
        token.object(&id, patient()),
        token.object(&id, Patience::Now),
    );
    assert!(Arc::ptr_eq(&one.unwrap(), &two.unwrap()));
    // But what somebody else has done in between is seen.
    made.writer(false)
        .execute_batch("update attribute_binary set value = x'7a7a' where object_id = 4")
        .unwrap();
    relabel(&token, 2, "newer").unwrap();
    assert_eq!(label(&token, 4), b"zz");
    agree(&made, &token);
}

#[test]
fn busy_if_the_database_stays_locked_and_done_if_not() {
    let made = made("");
    let token = made.token();
    let writer = made.writer(false);
    for lock in [
        "begin immediate",
        "begin exclusive",
        "begin; select count(*) from object",
    ] {
        writer.execute_batch(lock).unwrap();
        let start = Instant::now();
        let error = token
            .update(
                &of_row(&token, 2),
                &mut |attributes| {
                    attributes.insert(LABEL, Value::Bytes(b"never".to_vec()));
                    Ok(())
                },
                None,
                Patience::at_most(Duration::from_millis(80)),
            )
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{lock}");
        assert!(
            error.to_string().ends_with("the database is locked"),
            "{error}"
        );
        assert!((80..1000).contains(&start.elapsed().as_millis()));
        std::thread::scope(|scope| {
            let text = format!("after {lock}");
            let waiting = scope.spawn({
                let (token, text) = (&token, text.clone());
                move || relabel(token, 2, &text)
            });
            std::thread::sleep(Duration::from_millis(100));
            if lock.ends_with("object") {
                writer.execute_batch("rollback").unwrap();
            } else {
                writer
                    .execute_batch(
                        "update attribute_binary set value = x'7a' where object_id = 3; commit",
                    )
                    .unwrap();
                assert_eq!(label(&token, 3), b"z");
            }
            waiting.join().unwrap().unwrap();
            assert_eq!(label(&token, 2), text.as_bytes());
        });
        agree(&made, &token);
    }
}

#[test]
fn while_a_write_waits_others_are_read() {
    let made = made("");
    let token = made.token();
    let writer = made.writer(false);
    relabel(&token, 3, "young").unwrap();
    writer.execute_batch("begin immediate").unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| relabel(&token, 2, "new"));
        let start = Instant::now();
        for _ in 0..100 {
            assert_eq!(label(&token, 3), b"young");
        }
        assert!(start.elapsed() < Duration::from_millis(500));
        writer.execute_batch("rollback").unwrap();
        waiting.join().unwrap().unwrap();
    });
    agree(&made, &token);
}

#[test]
fn a_write_goes_to_the_database_that_is_there_now() {
    let made = made("");
    let token = made.token();
    relabel(&token, 2, "old").unwrap();
    let (there, aside) = (made.path.clone(), made.path.with_file_name("aside"));
    std::fs::copy(&there, made.path.with_file_name("copy")).unwrap();
    std::fs::rename(&there, &aside).unwrap();
    std::fs::rename(made.path.with_file_name("copy"), &there).unwrap();
    let old = std::fs::read(&aside).unwrap();
    relabel(&token, 2, "new").unwrap();
    assert!(old == std::fs::read(&aside).unwrap());
    agree(&made, &token);
    assert_eq!(label(&made.token(), 2), b"new");
}

#[test]
fn a_token_is_built_aside_and_appears_whole() {
    let directory = tempfile::tempdir().unwrap();
    let token = built(directory.path(), "made");
    let aside = directory.path().join("sqlite3.db.tokenfs-new");
    let there = directory.path().join(DATABASE);
    assert_eq!(std::fs::metadata(&aside).unwrap().mode() & 0o7777, 0o640);
    let now = Patience::Now;
    assert_eq!(token.list(now).unwrap().len(), 0);
    assert!(
        token
            .object(&ObjectId::Token, now)
            .unwrap()
            .attributes
            .is_empty()
    );
    token
        .update(
            &ObjectId::Token,
            &mut |attributes| {
                attributes.insert(LABEL_OF_TOKEN, Value::Bytes(b"label".to_vec()));
                Ok(())
            },
            None,
            now,
        )
        .unwrap();
    let of_70 = derived(token.name(), 70);
    for text in [&*of_70, FOREIGN] {
        token.create(&name(text), &new(text), now).unwrap();
    }
    token
        .create(&name(&derived(token.name(), 9)), &new("x"), now)
        .unwrap();
    token.remove(&name(&derived(token.name(), 9)), now).unwrap();
    let refused = token.create(&name("key"), &new("x"), now).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    assert_eq!(
        std::fs::read_dir(directory.path()).unwrap().count(),
        1,
        "no journal"
    );
    assert!(!there.exists());
    token.publish().unwrap();
    assert!(!aside.exists());
    assert!(token.list(patient()).is_err());
    let made = Made {
        path: there,
        directory,
        log: Arc::default(),
    };
    let token = made.token();
    assert_eq!(token.row(&named(&of_70), patient()).unwrap(), 70);
    assert_eq!(token.row(&named(FOREIGN), patient()).unwrap(), 71);
    relabel(&token, 70, "later").unwrap();
    agree(&made, &token);

    // Neither a second one beside it nor in its place.
    let other = built(made.directory.path(), "made");
    let again = DbToken::build(
        other.name().clone(),
        made.directory.path(),
        ACCESS,
        Options::default(),
        Arc::default(),
    );
    assert_eq!(again.unwrap_err().kind(), ErrorKind::Exists);
    assert_eq!(other.publish().unwrap_err().kind(), ErrorKind::Exists);
    assert_eq!(token.publish().unwrap_err().kind(), ErrorKind::Invalid);
    agree(&made, &token);
}

#[test]
fn the_schema_is_softhsms() {
    let directory = tempfile::tempdir().unwrap();
    built(directory.path(), "made").publish().unwrap();
    let look = |path: &Path| {
        let sql = ".schema\nselect * from pragma_page_size, pragma_user_version, pragma_encoding, pragma_auto_vacuum, \
                   pragma_journal_mode, pragma_application_id;\nselect seq from sqlite_sequence where name = 'object';";
        let mut command = support::tool("sqlite3");
        command.arg(path).args(sql.split('\n'));
        support::text_of(&mut command)
    };
    let ours = look(&directory.path().join(DATABASE));
    assert!(
        ours.contains("attribute_datetime") && ours.contains("4096|0|UTF-8|0|delete|0"),
        "{ours}"
    );
    for golden_name in ["softhsm-2.7.0-db", "softhsm-2.6.1-db"] {
        let (_directory, tokens) = golden(golden_name);
        let mut seen = 0;
        for entry in std::fs::read_dir(&tokens).unwrap() {
            let path = entry.unwrap().path().join(DATABASE);
            let theirs = look(&path);
            // All but the last line, which says how many objects there were.
            let text = |all: &str| all.trim_end().rsplit_once('\n').unwrap().0.to_owned();
            assert_eq!(text(&theirs), text(&ours));
            // Format versions and the reserved space in the file's header.
            let header = |path: &Path| std::fs::read(path).unwrap()[..24].to_vec();
            assert_eq!(header(&path), header(&directory.path().join(DATABASE)));
            seen += 1;
        }
        assert_eq!(seen, 4);
    }
}

#[test]
fn threads_that_write_at_once_take_turns() {
    let made = made("");
    let token = made.token();
    let id = of_row(&token, 2);
    set(&token, &id, 5, Value::Ulong(0)).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (token, id) = (&token, &id);
            scope.spawn(move || {
                for n in 0..25 {
                    let count = &mut |attributes: &mut Attributes| {
                        let old = attributes.ulong(5).unwrap();
                        attributes.insert(5, Value::Ulong(old + 1));
                        Ok(())
                    };
                    token.update(id, count, None, patient()).unwrap();
                    let text = format!("{thread:08x}-0000-4000-8000-{n:012x}");
                    token.create(&name(&text), &new(&text), patient()).unwrap();
                    assert!(token.object(&named(&text), patient()).is_ok());
                }
            });
        }
    });
    assert_eq!(get(&token, &id).ulong(5), Some(100));
    assert_eq!(names(&token).len(), 103);
    agree(&made, &token);
}

#[test]
fn a_lock_of_another_process_is_waited_for_and_no_longer_than_that() {
    let made = made("");
    let token = made.token();
    relabel(&token, 2, "old").unwrap();
    let locked = made.path.with_file_name("locked");
    let mut other = support::tool("sqlite3")
        .arg("-batch")
        .arg(&made.path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = other.stdin.take().unwrap();
    let locking = format!(
        "begin immediate;\nupdate attribute_binary set value = 'theirs' where object_id = 3;\n.shell touch {}\n",
        locked.display()
    );
    input.write_all(locking.as_bytes()).unwrap();
    support::eventually(Duration::from_secs(10), "the lock", || locked.exists());
    let edit = &mut |attributes: &mut Attributes| {
        attributes.insert(LABEL, Value::Bytes(b"new".to_vec()));
        Ok(())
    };
    let short = Patience::at_most(Duration::from_millis(100));
    let error = token
        .update(&of_row(&token, 2), edit, None, short)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    let error = token.create(&name(FOREIGN), &new("x"), short).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert_eq!(label(&token, 2), b"old");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| relabel(&token, 2, "new"));
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(label(&token, 2), b"old");
        input.write_all(b"update attribute_binary set value = x'7468656972' where object_id = 3;\ncommit;\n").unwrap();
        waiting.join().unwrap().unwrap();
    });
    drop(input);
    assert!(other.wait().unwrap().success());
    assert_eq!(label(&token, 2), b"new");
    assert_eq!(label(&token, 3), b"their");
    std::fs::remove_file(locked).unwrap();
    agree(&made, &token);
}
