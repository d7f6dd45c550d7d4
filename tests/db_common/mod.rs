//! What the tests of the `db` backend share: golden stores, tokens made to measure, a token opened for reading.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code)]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::Connection;
use tempfile::TempDir;
use tokenfs::diagnostics::Diagnostics;
use tokenfs::store::db::{DATABASE, DbToken, uuid};
use tokenfs::store::{Backend, ObjectId, ObjectName, Options, Patience, Token, TokenName};

/// Longer than anything here takes.
pub fn patient() -> Patience {
    Patience::at_most(Duration::from_secs(30))
}

/// The tokendir of a golden store, unpacked.
pub fn golden(name: &str) -> (TempDir, PathBuf) {
    let archive = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(format!("{name}.tar.xz"));
    let directory = tempfile::tempdir().unwrap();
    let status = Command::new("tar")
        .arg("-xJf")
        .arg(&archive)
        .arg("-C")
        .arg(directory.path())
        .status()
        .expect("this test needs tar and xz: install the packages tar and xz-utils");
    assert!(
        status.success(),
        "tar cannot unpack {}: is the package xz-utils installed?",
        archive.display()
    );
    let tokens = directory.path().join(name).join("tokens");
    (directory, tokens)
}

/// A token in a temporary directory.
pub struct Made {
    pub directory: TempDir,
    pub path: PathBuf,
    pub log: Arc<Diagnostics>,
}

/// As `createTables` of SoftHSM's `DBObject.cpp` makes them.
const SCHEMA: &str = "
    create table object (id integer primary key autoincrement);
    create table attribute_text (value text,type integer,object_id integer references object(id) on delete cascade,id integer primary key autoincrement);
    create table attribute_integer (value integer,type integer,object_id integer references object(id) on delete cascade,id integer primary key autoincrement);
    create table attribute_binary (value blob,type integer,object_id integer references object(id) on delete cascade,id integer primary key autoincrement);
    create table attribute_array (value blob,type integer,object_id integer references object(id) on delete cascade,id integer primary key autoincrement);
    create table attribute_boolean (value boolean,type integer,object_id integer references object(id) on delete cascade,id integer primary key autoincrement);
    create table attribute_datetime (value datetime,type integer,object_id integer references object(id) on delete cascade,id integer primary key autoincrement);
    create table attribute_real (value real,type integer,object_id integer references object(id) on delete cascade,id integer primary key autoincrement);
    pragma foreign_keys = off;";

/// A token with three objects, rows 2 to 4, each with a class and a label, and then `sql`.
pub fn made(sql: &str) -> Made {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(DATABASE);
    let made = Made {
        directory,
        path,
        log: Arc::default(),
    };
    let writer = made.writer(true);
    writer.execute_batch(SCHEMA).unwrap();
    writer
        .execute_batch(&format!(
            "begin;
            insert into object values (1), (2), (3), (4);
            insert into attribute_binary (value, type, object_id) values (x'41', {LABEL_OF_TOKEN}, 1);
            insert into attribute_integer (value, type, object_id) values (4, 0, 2), (4, 0, 3), (4, 0, 4);
            insert into attribute_binary (value, type, object_id)
                values (x'6C32', 3, 2), (x'6C33', 3, 3), (x'6C34', 3, 4);
            {sql};
            commit;"
        ))
        .unwrap();
    made
}

pub const CLASS: u64 = 0;
pub const LABEL: u64 = 3;
pub const LABEL_OF_TOKEN: u64 = 0x8000_5349;

impl Made {
    /// Another connection to the database.
    pub fn writer(&self, create: bool) -> Connection {
        let writer = if create {
            Connection::open(&self.path).unwrap()
        } else {
            let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_WRITE;
            Connection::open_with_flags(&self.path, flags).unwrap()
        };
        writer.execute_batch("pragma foreign_keys = off").unwrap();
        writer
    }

    pub fn token(&self) -> DbToken {
        self.token_with(Options::default())
    }

    pub fn token_with(&self, options: Options) -> DbToken {
        open(self.directory.path(), "made", options, &self.log)
    }
}

/// Opens the token in `directory` under `name`.
pub fn open(directory: &Path, name: &str, options: Options, log: &Arc<Diagnostics>) -> DbToken {
    let name = TokenName::new(OsStr::new(name)).unwrap();
    let options = Options {
        backend: Backend::Db,
        ..options
    };
    DbToken::open(name, directory, options, Arc::clone(log)).unwrap()
}

/// The name of a row that remembers none.
pub fn of_row(token: &DbToken, row: i64) -> ObjectId {
    named(&uuid::derived(token.name(), row))
}

pub fn named(name: &str) -> ObjectId {
    ObjectId::Object(ObjectName::new(OsStr::new(name)).unwrap())
}

/// The label of a row.
pub fn label(token: &DbToken, row: i64) -> Vec<u8> {
    let object = token.object(&of_row(token, row), patient()).unwrap();
    object.attributes.bytes(LABEL).unwrap().to_vec()
}
