//! What the tests of writing to a database share: short ways to write, and the comparison of three readers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code)]

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use tokenfs::error::Error;
use tokenfs::store::attribute::{Attributes, Value};
use tokenfs::store::db::DbToken;
use tokenfs::store::{
    Access, Metadata, NewObject, ObjectId, ObjectName, Options, Token, TokenName,
};

use super::db_common::*;
use super::support::independent;

pub const ALLOWED_MECHANISMS: u64 = 0x4000_0600;
pub const WRAP_TEMPLATE: u64 = 0x4000_0211;
pub const FOREIGN: &str = "b7e9f2a1-aaaa-bbbb-cccc-111111111111";
pub const ACCESS: Access = Access {
    mode: 0o640,
    uid: 0,
    gid: 0,
};

pub fn name(text: &str) -> ObjectName {
    ObjectName::new(OsStr::new(text)).unwrap()
}

pub fn set(token: &DbToken, id: &ObjectId, attribute_type: u64, value: Value) -> Result<(), Error> {
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

pub fn relabel(token: &DbToken, row: i64, label: &str) -> Result<(), Error> {
    set(
        token,
        &of_row(token, row),
        LABEL,
        Value::Bytes(label.into()),
    )
}

pub fn new(label: &str) -> NewObject {
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

pub fn get(token: &DbToken, id: &ObjectId) -> Attributes {
    token.object(id, patient()).unwrap().attributes.clone()
}

pub fn names(token: &DbToken) -> Vec<String> {
    let names = token.list(patient()).unwrap();
    names.iter().map(ToString::to_string).collect()
}

/// What SQLite says, through another connection.
pub fn query(made: &Made, sql: &str) -> Vec<String> {
    let connection = made.writer(false);
    let mut statement = connection.prepare(sql).unwrap();
    let rows = statement.query_map([], |row| row.get(0)).unwrap();
    rows.map(Result::unwrap).collect()
}

pub fn settle() {
    std::thread::sleep(Duration::from_millis(70));
}

/// That what somebody says who has known an object for long agrees with what somebody says who has just opened the database: the
/// same mode and owner, and the same time if the object has one of its own. Otherwise its time is that of the file as it was when
/// the object was last seen to change, and for who has just come that of the file now.
pub fn same_times(made: &Made, ours: &Metadata, theirs: &Metadata) {
    assert!(ours.same_access(theirs), "{ours:?} {theirs:?}");
    assert!(ours.ctime <= theirs.ctime, "{ours:?} {theirs:?}");
    let file = std::fs::metadata(made.directory.path().join("sqlite3.db")).unwrap();
    let is_of_file = theirs.mtime == file.modified().unwrap();
    assert!(
        ours.mtime == theirs.mtime || (is_of_file && ours.mtime < theirs.mtime),
        "{ours:?} {theirs:?}"
    );
}

/// That the writer's own view, a fresh one and the independent reader's agree.
pub fn agree(made: &Made, token: &DbToken) {
    let fresh = made.token();
    let independent = independent::read_db_token(made.directory.path());
    assert_eq!(names(token), names(&fresh));
    assert_eq!(independent.rows.len(), names(&fresh).len());
    assert_eq!(independent.damaged.len(), 0);
    let listed = fresh.list(patient()).unwrap();
    let ids = listed.iter().cloned().map(ObjectId::Object);
    for id in ids.chain([ObjectId::Token]) {
        let (ours, theirs) = (
            token.object(&id, patient()).unwrap(),
            fresh.object(&id, patient()).unwrap(),
        );
        assert_eq!(ours.attributes, theirs.attributes);
        same_times(made, &ours.metadata, &theirs.metadata);
        for (token, object) in [(token, &ours), (&fresh, &theirs)] {
            let metadata = token.object_metadata(&id, patient()).unwrap();
            let access = |metadata: Metadata| Metadata {
                atime: UNIX_EPOCH,
                ..metadata
            };
            assert_eq!(access(object.metadata), access(metadata));
        }
        let row = token.row(&id, patient()).unwrap();
        assert_eq!(row, fresh.row(&id, patient()).unwrap());
        let stored = match &id {
            ObjectId::Token => &independent.token,
            ObjectId::Object(_) => &independent.rows[&row],
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

pub fn plain(value: &Value) -> independent::Value {
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

pub fn built(directory: &Path, name: &str) -> DbToken {
    let name = TokenName::new(OsStr::new(name)).unwrap();
    DbToken::build(name, directory, ACCESS, Options::default(), Arc::default()).unwrap()
}
