//! The `db` backend writes: each operation is read back by another `DbToken` and by a reader that shares no code with it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code)]

mod db_common;
mod support;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use db_common::*;
use support::independent;
use tokenfs::error::{Error, ErrorKind};
use tokenfs::store::attribute::{AttributeKey, Attributes, Kind, Value};
use tokenfs::store::db::times::CKA_TOKENFS_TIMES;
use tokenfs::store::db::uuid::{CKA_TOKENFS_UUID, derived};
use tokenfs::store::db::{DATABASE, DbToken};
use tokenfs::store::{
    Access, Metadata, MetadataChange, NewObject, ObjectId, ObjectName, Options, Patience, Target,
    Time, Token, TokenName,
};

const ALLOWED_MECHANISMS: u64 = 0x4000_0600;
const WRAP_TEMPLATE: u64 = 0x4000_0211;
const FOREIGN: &str = "b7e9f2a1-aaaa-bbbb-cccc-111111111111";
const ACCESS: Access = Access {
    mode: 0o640,
    uid: 0,
    gid: 0,
};

fn name(text: &str) -> ObjectName {
    ObjectName::new(OsStr::new(text)).unwrap()
}

fn set(token: &DbToken, id: &ObjectId, attribute_type: u64, value: Value) -> Result<(), Error> {
    token.update(
        id,
        &mut |attributes| {
            attributes.insert(attribute_type, value.clone());
            Ok(())
        },
        None,
        patient(),
    )
}

fn relabel(token: &DbToken, row: i64, label: &str) -> Result<(), Error> {
    set(
        token,
        &of_row(token, row),
        LABEL,
        Value::Bytes(label.into()),
    )
}

fn new(label: &str) -> NewObject {
    let mut attributes = Attributes::new();
    attributes.insert(CLASS, Value::Ulong(0));
    attributes.insert(1, Value::Bool(true));
    attributes.insert(LABEL, Value::Bytes(label.into()));
    NewObject {
        attributes,
        access: ACCESS,
        mtime: None,
    }
}

fn get(token: &DbToken, id: &ObjectId) -> Attributes {
    token.object(id, patient()).unwrap().attributes.clone()
}

fn names(token: &DbToken) -> Vec<String> {
    let names = token.list(patient()).unwrap();
    names.iter().map(ToString::to_string).collect()
}

/// What SQLite says, through another connection.
fn query(made: &Made, sql: &str) -> Vec<String> {
    let connection = made.writer(false);
    let mut statement = connection.prepare(sql).unwrap();
    let rows = statement.query_map([], |row| row.get(0)).unwrap();
    rows.map(Result::unwrap).collect()
}

fn settle() {
    std::thread::sleep(Duration::from_millis(70));
}

/// That the writer's own view, a fresh one and the independent reader's agree.
fn agree(made: &Made, token: &DbToken) {
    let fresh = made.token();
    let independent = independent::read_db_token(made.directory.path());
    assert_eq!(names(token), names(&fresh));
    assert_eq!(independent.objects.len(), names(&fresh).len());
    assert_eq!(independent.damaged.len(), 0);
    let listed = fresh.list(patient()).unwrap();
    let ids = listed.iter().cloned().map(ObjectId::Object);
    for id in ids.chain([ObjectId::Token]) {
        let (ours, theirs) = (
            token.object(&id, patient()).unwrap(),
            fresh.object(&id, patient()).unwrap(),
        );
        assert_eq!(ours.attributes, theirs.attributes);
        // Reading is an access.
        let times = |metadata: Metadata| Metadata {
            atime: UNIX_EPOCH,
            ..metadata
        };
        let expected = times(ours.metadata);
        assert_eq!(expected, times(theirs.metadata));
        for token in [token, &fresh] {
            let metadata = token.object_metadata(&id, patient()).unwrap();
            assert_eq!(expected, times(metadata));
        }
        let row = token.row(&id, patient()).unwrap();
        assert_eq!(row, fresh.row(&id, patient()).unwrap());
        let stored = match &id {
            ObjectId::Token => &independent.token,
            ObjectId::Object(_) => &independent.objects[&row.to_string()],
        };
        let mut expected: Vec<(u64, independent::Value)> = ours
            .attributes
            .iter()
            .map(|(key, value)| (key.attribute_type, plain(value)))
            .collect();
        let mut stored = stored.clone();
        expected.sort();
        stored.sort();
        assert_eq!(stored, expected);
    }
    let check = query(made, "select integrity_check from pragma_integrity_check");
    assert_eq!(check, ["ok"]);
    assert!(!made.path.with_file_name("sqlite3.db-journal").exists());
}

fn plain(value: &Value) -> independent::Value {
    match value {
        Value::Bool(value) => independent::Value::Bool(*value),
        Value::Ulong(value) => independent::Value::Ulong(*value),
        Value::Bytes(value) => independent::Value::Bytes(value.clone()),
        Value::Mechs(value) => independent::Value::Mechs(value.iter().copied().collect()),
        Value::Map(map) => independent::Value::Map(
            map.iter()
                .map(|(key, value)| (key.attribute_type, plain(value)))
                .collect(),
        ),
    }
}

#[test]
fn attributes_of_every_kind_are_added_changed_and_removed() {
    let made = made("");
    let token = made.token();
    let id = of_row(&token, 3);
    let mut map = Attributes::new();
    map.insert(3, Value::Bytes(b"inner".to_vec()));
    map.insert(0x162, Value::Bool(true));
    let key = |attribute_type, kind| AttributeKey {
        attribute_type,
        kind,
    };
    for (attribute_type, values) in [
        (1, [Value::Bool(true), Value::Bool(false)]),
        (0x161, [Value::Ulong(u64::MAX), Value::Ulong(0)]),
        (0x11, [Value::Bytes(vec![]), Value::Bytes(vec![7; 70_000])]),
        (
            ALLOWED_MECHANISMS,
            [
                Value::Mechs(BTreeSet::from([1, u64::MAX])),
                Value::Mechs(BTreeSet::new()),
            ],
        ),
        (
            WRAP_TEMPLATE,
            [Value::Map(map), Value::Map(Attributes::new())],
        ),
        // A type that SoftHSM knows nothing of, and one that it looks for in another table.
        (0x8000_1234, [Value::Ulong(1), Value::Ulong(2)]),
        (0x102, [Value::Ulong(1), Value::Ulong(2)]),
    ] {
        let kind = values[0].kind();
        for value in values {
            set(&token, &id, attribute_type, value.clone()).unwrap();
            assert_eq!(
                get(&token, &id).get(key(attribute_type, kind)),
                Some(&value)
            );
            agree(&made, &token);
        }
        token
            .update(
                &id,
                &mut |attributes| {
                    assert!(attributes.remove(key(attribute_type, kind)).is_some());
                    Ok(())
                },
                None,
                patient(),
            )
            .unwrap();
        agree(&made, &token);
        assert_eq!(get(&token, &id).len(), 2);
    }
    // The token itself, and several at once.
    set(
        &token,
        &ObjectId::Token,
        LABEL_OF_TOKEN,
        Value::Bytes(b"new".to_vec()),
    )
    .unwrap();
    token
        .update(
            &id,
            &mut |attributes| {
                *attributes = new("all of it").attributes;
                Ok(())
            },
            None,
            patient(),
        )
        .unwrap();
    agree(&made, &token);
    assert_eq!(label(&token, 3), b"all of it");
    assert_eq!(label(&token, 2), b"l2");
    assert_eq!(made.log.render(), "");
}

#[test]
fn doubled_rows_stay_alike_and_go_together() {
    let made = made(
        "insert into attribute_boolean (value, type, object_id) values (1, 370, 2), (1, 370, 2), (1, 370, 3)",
    );
    let token = made.token();
    let id = of_row(&token, 2);
    set(&token, &id, 370, Value::Bool(false)).unwrap();
    let values = "select value || '' from attribute_boolean order by id";
    assert_eq!(query(&made, values), ["0", "0", "1"]);
    token
        .update(
            &id,
            &mut |attributes| {
                let kind = Kind::Bool;
                attributes.remove(AttributeKey {
                    attribute_type: 370,
                    kind,
                });
                Ok(())
            },
            None,
            patient(),
        )
        .unwrap();
    assert_eq!(query(&made, values), ["1"]);
    agree(&made, &token);
}

#[test]
fn what_cannot_be_is_refused_and_nothing_is_changed() {
    let made = made("insert into attribute_boolean (value, type, object_id) values ('odd', 1, 4)");
    let token = made.token();
    let before = std::fs::read(&made.path).unwrap();
    let id = of_row(&token, 2);
    let kind = |result: Result<(), Error>| {
        let error = result.unwrap_err();
        assert!(error.path().is_some(), "{error}");
        error.kind()
    };
    assert_eq!(
        kind(set(&token, &id, 3, Value::Mechs(BTreeSet::new()))),
        ErrorKind::Invalid
    );
    assert_eq!(
        kind(set(
            &token,
            &id,
            ALLOWED_MECHANISMS,
            Value::Bytes(vec![0; 8])
        )),
        ErrorKind::Invalid
    );
    assert_eq!(
        kind(set(&token, &id, 2, Value::Bool(true))),
        ErrorKind::Invalid,
        "the label"
    );
    assert_eq!(kind(relabel(&token, 50, "x")), ErrorKind::NotFound);
    assert_eq!(kind(relabel(&token, 4, "x")), ErrorKind::Damaged);
    let refused = token.update(
        &id,
        &mut |attributes| {
            attributes.insert(LABEL, Value::Bytes(b"x".to_vec()));
            Err(Error::new(ErrorKind::Exists, "not this"))
        },
        None,
        patient(),
    );
    assert_eq!(kind(refused), ErrorKind::Exists);
    let create = |text: &str, new: &NewObject| kind(token.create(&name(text), new, patient()));
    assert_eq!(create("key", &new("x")), ErrorKind::Invalid);
    assert_eq!(
        create(&derived(token.name(), 2), &new("x")),
        ErrorKind::Exists
    );
    let mut private = new("x");
    private.attributes.insert(2, Value::Bool(true));
    assert_eq!(create(FOREIGN, &private), ErrorKind::Invalid);
    assert_eq!(
        kind(token.remove(&name(FOREIGN), patient())),
        ErrorKind::NotFound
    );
    // Row 1 has no name of its own.
    let own = derived(token.name(), 1);
    assert_eq!(
        kind(token.remove(&name(&own), patient())),
        ErrorKind::NotFound
    );

    let now = Patience::Now;
    assert_eq!(
        kind(token.update(&id, &mut |_| Ok(()), None, now)),
        ErrorKind::WouldBlock
    );
    assert_eq!(
        kind(token.create(&name(FOREIGN), &new("x"), now)),
        ErrorKind::WouldBlock
    );
    assert_eq!(
        kind(token.remove(&name(FOREIGN), now)),
        ErrorKind::WouldBlock
    );
    assert_eq!(kind(token.sync(now)), ErrorKind::WouldBlock);
    let change = MetadataChange::default();
    let target = Target::Directory;
    assert_eq!(
        kind(token.set_metadata(&target, &change, now)),
        ErrorKind::WouldBlock
    );
    let read_only = made.token_with(Options {
        read_only: true,
        ..Options::default()
    });
    assert_eq!(kind(relabel(&read_only, 2, "x")), ErrorKind::ReadOnly);
    assert_eq!(
        kind(read_only.create(&name(FOREIGN), &new("x"), patient())),
        ErrorKind::ReadOnly
    );
    assert_eq!(
        kind(read_only.remove(&name(FOREIGN), patient())),
        ErrorKind::ReadOnly
    );
    assert_eq!(
        kind(read_only.set_metadata(&target, &change, patient())),
        ErrorKind::ReadOnly
    );
    assert!(before == std::fs::read(&made.path).unwrap());
    // A damaged object can go.
    token
        .remove(&name(&derived(token.name(), 4)), patient())
        .unwrap();
    relabel(&token, 2, "now").unwrap();
    agree(&made, &token);
}

#[test]
fn a_derived_name_goes_back_into_its_row_and_another_one_is_remembered() {
    let made = made("");
    let token = made.token();
    let of_3 = derived(token.name(), 3);
    token.remove(&name(&of_3), patient()).unwrap();
    agree(&made, &token);
    assert_eq!(
        query(
            &made,
            "select object_id || '' from attribute_binary where object_id = 3"
        )
        .len(),
        0
    );
    token.create(&name(&of_3), &new("back"), patient()).unwrap();
    assert_eq!(token.row(&named(&of_3), patient()).unwrap(), 3);
    token
        .create(&name(FOREIGN), &new("foreign"), patient())
        .unwrap();
    assert_eq!(token.row(&named(FOREIGN), patient()).unwrap(), 5);
    let upper = FOREIGN.to_uppercase();
    token
        .create(&name(&upper), &new("upper"), patient())
        .unwrap();
    // From a larger store.
    let of_900 = derived(token.name(), 900);
    token
        .create(&name(&of_900), &new("900"), patient())
        .unwrap();
    assert_eq!(token.row(&named(&of_900), patient()).unwrap(), 900);
    agree(&made, &token);
    let twice = token
        .create(&name(FOREIGN), &new("x"), patient())
        .unwrap_err();
    assert_eq!(twice.kind(), ErrorKind::Exists);
    assert_eq!(made.log.render(), "");
    let uuids =
        format!("select value from attribute_text where type = {CKA_TOKENFS_UUID} order by id");
    assert_eq!(query(&made, &uuids), [FOREIGN, &upper]);

    // Ids go on from there, and what is remembered goes with its object.
    made.writer(false)
        .execute_batch("insert into object default values")
        .unwrap();
    assert!(names(&token).contains(&derived(token.name(), 901)));
    token.remove(&name(FOREIGN), patient()).unwrap();
    assert_eq!(query(&made, &uuids), [&*upper]);
    agree(&made, &token);
    token
        .create(&name(FOREIGN), &new("again"), patient())
        .unwrap();
    assert_eq!(
        token.row(&named(FOREIGN), patient()).unwrap(),
        902,
        "no id is used twice"
    );
    agree(&made, &token);
}

#[test]
fn names_that_are_fought_for_are_found_out_by_a_scan() {
    let of = |token: &DbToken, row| derived(token.name(), row);
    let made = made(&format!(
        "insert into attribute_text (value, type, object_id)
            values ('{FOREIGN}', {CKA_TOKENFS_UUID}, 2), ('{FOREIGN}', {CKA_TOKENFS_UUID}, 3)"
    ));
    let token = made.token();
    assert!(names(&token).contains(&of(&token, 3)));
    token.remove(&name(FOREIGN), patient()).unwrap();
    assert_eq!(
        token.row(&named(FOREIGN), patient()).unwrap(),
        3,
        "the next one that remembers it"
    );
    token
        .create(&name(&of(&token, 2)), &new("x"), patient())
        .unwrap();
    agree(&made, &token);
    assert_eq!(token.row(&of_row(&token, 2), patient()).unwrap(), 2);
}

#[test]
fn a_new_object_does_not_inherit_from_one_that_was_deleted_badly() {
    // Deleted without foreign keys; SoftHSM never does that.
    let made = made(
        "insert into attribute_binary (value, type, object_id) values (x'736563726574', 17, 7), (x'736563726574', 17, 5);
         insert into attribute_text (value, type, object_id) values ('odd', 3561703937, 7)",
    );
    let token = made.token();
    let of_7 = derived(token.name(), 7);
    token
        .create(&name(FOREIGN), &new("five"), patient())
        .unwrap();
    token
        .create(&name(&of_7), &new("seven"), patient())
        .unwrap();
    assert_eq!(token.row(&named(FOREIGN), patient()).unwrap(), 5);
    for id in [named(FOREIGN), named(&of_7)] {
        assert_eq!(get(&token, &id).len(), 3);
    }
    agree(&made, &token);
}

#[test]
fn rows_go_with_their_object_even_where_the_schema_does_not_say_so() {
    let made = made("");
    let writer = made.writer(false);
    writer
        .execute_batch(
            "alter table attribute_binary rename to old;
             create table attribute_binary (value blob, type integer, object_id integer, id integer primary key autoincrement);
             insert into attribute_binary select * from old;
             drop table old",
        )
        .unwrap();
    let token = made.token();
    token
        .remove(&name(&derived(token.name(), 2)), patient())
        .unwrap();
    let left = query(
        &made,
        "select object_id || '' from attribute_binary order by 1",
    );
    assert_eq!(left, ["1", "3", "4"]);
    agree(&made, &token);
}

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
    assert_eq!(mtime(&token, &of_row(&token, 3)), file());
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
fn a_database_without_the_unused_tables_is_written_as_far_as_that_goes() {
    let made = made("drop table attribute_text; drop table attribute_real");
    let token = made.token();
    relabel(&token, 2, "new").unwrap();
    token
        .create(&name(&derived(token.name(), 9)), &new("nine"), patient())
        .unwrap();
    let error = token
        .create(&name(FOREIGN), &new("x"), patient())
        .unwrap_err();
    assert!(error.to_string().contains("attribute_text"), "{error}");
    token
        .remove(&name(&derived(token.name(), 3)), patient())
        .unwrap();
    agree(&made, &token);
    assert_eq!(names(&token).len(), 3);
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

fn built(directory: &Path, name: &str) -> DbToken {
    let name = TokenName::new(OsStr::new(name)).unwrap();
    DbToken::build(name, directory, ACCESS, Options::default(), Arc::default()).unwrap()
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
