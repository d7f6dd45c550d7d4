//! The `db` backend reads what SoftHSM wrote, and says what is wrong with what it cannot read.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod db_common;

use std::collections::BTreeSet;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;

use db_common::*;
use tokenfs::error::ErrorKind;
use tokenfs::store::attribute::{AttributeKey, Kind, Value};
use tokenfs::store::db::uuid::{CKA_TOKENFS_UUID, derived};
use tokenfs::store::{Backend, Object, ObjectId, Options, Patience, Token};

const CKA_VALUE: u64 = 0x11;
const CKA_ALLOWED_MECHANISMS: u64 = 0x4000_0600;
const CKA_WRAP_TEMPLATE: u64 = 0x4000_0211;
const CKA_UNWRAP_TEMPLATE: u64 = 0x4000_0212;

#[test]
fn a_golden_store_is_read_whole() {
    let (_directory, tokens) = golden("softhsm-2.7.0-db");
    let log = Arc::default();
    let mut attributes = Vec::new();
    for (name, label, objects) in [
        ("04bc2b3e-3f65-a638-c330-b37ce0d5eae9", "dup", 2),
        ("0d562eac-7a83-96aa-90f2-cfcc728ecce7", "dup", 2),
        ("4f843141-9840-c2e7-3140-b646876ade84", "sopin-only", 0),
        (
            "55b8d218-7482-cc53-8d24-a6a17d50efd2",
            "Prod Schlüssel 1",
            32,
        ),
    ] {
        let token = open(&tokens.join(name), name, Options::default(), &log);
        assert_eq!(token.backend(), Backend::Db);
        assert_eq!(token.metadata().unwrap().mode, 0o750);
        let names = token.list(patient()).unwrap();
        assert_eq!(names.len(), objects);
        assert!(names.is_sorted());
        let own = token.object(&ObjectId::Token, patient()).unwrap();
        let stored = own.attributes.bytes(LABEL_OF_TOKEN).unwrap();
        let mut padded = label.as_bytes().to_vec();
        padded.resize(32, b' ');
        assert_eq!(stored, padded);
        assert_eq!(own.metadata.mode, 0o640);
        assert_eq!(own.generation, None);
        let count: usize = names
            .iter()
            .map(|name| {
                let object = token.object(&ObjectId::Object(name.clone()), Patience::Now);
                object.unwrap().attributes.len()
            })
            .sum();
        attributes.push(count + own.attributes.len());
    }
    // Boolean, integer, binary and array rows; none is doubled in this store.
    assert_eq!(attributes, [25, 25, 4, 348 + 79 + 224 + 23]);
    assert_eq!(log.render(), "");
}

#[test]
fn golden_values_of_every_kind() {
    let (_directory, tokens) = golden("softhsm-2.7.0-db");
    let name = "55b8d218-7482-cc53-8d24-a6a17d50efd2";
    let log = Arc::default();
    let token = open(&tokens.join(name), name, Options::default(), &log);
    let get = |row| token.object(&of_row(&token, row), patient()).unwrap();

    for (row, class, label) in [
        (2, 2, "rsa-2048"),
        (8, 1, "x509-cert"),
        (20, 0, "dir/with/slashes\0"),
        (21, 0, ".."),
        (24, 0, ""),
        (25, 0, "twin"),
        (26, 0, "twin"),
        (33, 6, "dh-params"),
    ] {
        let object = get(row);
        assert_eq!(object.attributes.ulong(CLASS), Some(class), "row {row}");
        let stored = object.attributes.bytes(LABEL).unwrap();
        assert!(
            stored.starts_with(label.trim_end_matches('\0').as_bytes()),
            "row {row}"
        );
    }
    assert_eq!(
        get(22).attributes.bytes(LABEL).unwrap(),
        b"bad\xff\xfe\0nul"
    );
    assert_eq!(get(16).attributes.bytes(CKA_VALUE), Some(&b""[..]));
    assert_eq!(get(18).attributes.bytes(CKA_VALUE).unwrap().len(), 65536);
    // CK_UNAVAILABLE_INFORMATION
    assert!(
        get(9)
            .attributes
            .iter()
            .any(|(_, value)| *value == Value::Ulong(u64::MAX))
    );

    let mechanisms = |row| get(row).attributes.of_type(CKA_ALLOWED_MECHANISMS).cloned();
    assert_eq!(
        mechanisms(31),
        Some(Value::Mechs(BTreeSet::from([0x0d, 0x40, 0x42])))
    );
    assert_eq!(mechanisms(2), Some(Value::Mechs(BTreeSet::new())));

    let wrapping = get(32);
    let map = |attribute_type| {
        let kind = Kind::Map;
        match wrapping.attributes.get(AttributeKey {
            attribute_type,
            kind,
        }) {
            Some(Value::Map(map)) => map,
            other => panic!("{other:?}"),
        }
    };
    let wrap = map(CKA_WRAP_TEMPLATE);
    assert_eq!(wrap.len(), 4);
    assert_eq!(wrap.bytes(LABEL), Some(&b"wrappable"[..]));
    assert_eq!(wrap.ulong(0x100), Some(0x1f));
    assert_eq!(wrap.bytes(0x102), Some(&b"\xde\xad\xbe\xef"[..]));
    assert_eq!(wrap.boolean(0x162), Some(true));
    let unwrap = map(CKA_UNWRAP_TEMPLATE);
    assert_eq!(unwrap.ulong(CLASS), Some(4));
    assert_eq!(unwrap.bytes(CKA_ALLOWED_MECHANISMS).unwrap().len(), 16);
}

#[test]
fn the_first_of_doubled_rows_counts() {
    let made = made(
        "insert into attribute_boolean (value, type, object_id) values (1, 370, 2), (0, 370, 2), ('odd', 370, 2);
         insert into attribute_binary (value, type, object_id, id) values (x'02', 297, 2, 900), (x'01', 297, 2, 800)",
    );
    let token = made.token();
    let object = token.object(&of_row(&token, 2), patient()).unwrap();
    assert_eq!(object.attributes.boolean(370), Some(true));
    assert_eq!(object.attributes.bytes(297), Some(&b"\x01"[..]));
    assert_eq!(object.attributes.len(), 4);
}

#[test]
fn odd_values_that_softhsm_reads_too() {
    let made = made(
        "insert into attribute_binary (value, type, object_id) values (null, 17, 2), (null, 1073743360, 2);
         insert into attribute_array (value, type, object_id) values (null, 1073742353, 2);
         insert into attribute_boolean (value, type, object_id) values (7, 1, 2), (4294967296, 2, 2);
         insert into attribute_integer (value, type, object_id) values (-1, 5, 2), (1, 1, 2)",
    );
    let token = made.token();
    let object = token.object(&of_row(&token, 2), patient()).unwrap();
    let attributes = &object.attributes;
    assert_eq!(attributes.bytes(17), Some(&b""[..]));
    assert_eq!(
        attributes.of_type(CKA_ALLOWED_MECHANISMS),
        Some(&Value::Mechs(BTreeSet::new()))
    );
    assert!(
        matches!(attributes.of_type(CKA_WRAP_TEMPLATE), Some(Value::Map(map)) if map.is_empty())
    );
    assert_eq!(attributes.boolean(1), Some(true));
    assert_eq!(
        attributes.boolean(2),
        Some(false),
        "SoftHSM asks for 32 bits"
    );
    assert_eq!(attributes.ulong(5), Some(u64::MAX));
    assert_eq!(attributes.ulong(1), Some(1), "one type in two tables");
}

#[test]
fn a_damaged_object_leaves_the_others_alone() {
    for (sql, message, offset) in [
        (
            "insert into attribute_binary values ('secret', 17, 3, 77)",
            "row 77 of attribute_binary: the value is text",
            None,
        ),
        (
            "insert into attribute_binary values (1.5, 17, 3, 77)",
            "row 77 of attribute_binary: the value is a real number",
            None,
        ),
        (
            "insert into attribute_binary values (5, 17, 3, 77)",
            "row 77 of attribute_binary: the value is an integer",
            None,
        ),
        (
            "insert into attribute_integer values ('secret', 5, 3, 77)",
            "row 77 of attribute_integer: the value is text",
            None,
        ),
        (
            "insert into attribute_integer values (1.5, 5, 3, 77)",
            "attribute_integer: the value is a real number",
            None,
        ),
        (
            "insert into attribute_integer values (null, 5, 3, 77)",
            "attribute_integer: the value is NULL",
            None,
        ),
        (
            "insert into attribute_boolean values ('secret', 1, 3, 77)",
            "row 77 of attribute_boolean: the value is text",
            None,
        ),
        (
            "insert into attribute_boolean values (null, 1, 3, 77)",
            "attribute_boolean: the value is NULL",
            None,
        ),
        (
            "insert into attribute_boolean values (x'01', 1, 3, 77)",
            "attribute_boolean: the value is a blob",
            None,
        ),
        (
            "insert into attribute_array values (x'0102', 1073742353, 3, 77)",
            "row 77 of attribute_array: in the attribute map",
            Some(0),
        ),
        (
            "insert into attribute_array values (zeroblob(12), 1073742353, 3, 77)",
            "row 77 of attribute_array: in the attribute map",
            Some(8),
        ),
        (
            "insert into attribute_binary values (zeroblob(12), 1073743360, 3, 77)",
            "row 77 of attribute_binary: in the mechanism set",
            Some(8),
        ),
        (
            "insert into attribute_boolean values (1, null, 3, 77)",
            "row 77 of attribute_boolean: the attribute's type is NULL",
            None,
        ),
        (
            "insert into attribute_boolean values (1, 'secret', 3, 77)",
            "attribute_boolean: the attribute's type is text",
            None,
        ),
    ] {
        let made = made(sql);
        let token = made.token();
        assert_eq!(token.list(patient()).unwrap().len(), 3, "{sql}");
        let damaged = of_row(&token, 3);
        let error = token.object(&damaged, patient()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged, "{sql}");
        assert!(error.to_string().contains(message), "{sql}: {error}");
        assert!(!error.to_string().contains("secret"), "{error}");
        assert_eq!(error.offset(), offset, "{sql}");
        assert_eq!(error.path(), Some(made.path.as_path()));
        assert!(token.object_metadata(&damaged, patient()).is_ok());
        assert_eq!(token.row(&damaged, patient()).unwrap(), 3);
        assert_eq!(label(&token, 2), b"l2");
        assert_eq!(label(&token, 4), b"l4");
        assert!(token.object(&ObjectId::Token, patient()).is_ok());
    }
}

#[test]
fn a_token_without_row_1_still_serves_its_objects() {
    let made =
        made("delete from object where id = 1; delete from attribute_binary where object_id = 1");
    let token = made.token();
    assert_eq!(token.list(patient()).unwrap().len(), 3);
    let error = token.object(&ObjectId::Token, patient()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert!(error.to_string().contains("lacks row 1"), "{error}");
    assert!(token.object_metadata(&ObjectId::Token, patient()).is_ok());
    assert_eq!(label(&token, 3), b"l3");
    assert_eq!(made.log.render(), "");
}

#[test]
fn rows_of_no_object_are_ignored_and_said_once() {
    let made = made(
        "insert into attribute_binary (value, type, object_id) values (x'00', 3, 99), ('text', 3, 98), (x'00', 3, null);
         insert into attribute_boolean (value, type, object_id) values (1, 1, 'x')",
    );
    let token = made.token();
    assert_eq!(token.list(patient()).unwrap().len(), 3);
    made.writer(false)
        .execute_batch("update attribute_binary set value = x'6E' where object_id = 2")
        .unwrap();
    assert_eq!(label(&token, 2), b"n");
    let log = made.log.render();
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(
        log.contains("rows in attribute_boolean, attribute_binary belong to no object"),
        "{log}"
    );
    assert!(!log.contains("times"), "{log}");
}

/// Damages of the whole token: nothing can be listed, but there is something to `stat`.
#[test]
fn a_damaged_database_is_damaged_as_a_whole() {
    let page = |number: usize, path: &Path| {
        let mut bytes = std::fs::read(path).unwrap();
        bytes[number * 4096..(number + 1) * 4096].fill(0xff);
        std::fs::write(path, bytes).unwrap();
    };
    type Damage<'a> = (&'a str, &'a dyn Fn(&Path));
    let damages: [Damage; 7] = [
        ("not an SQLite database", &|path| {
            std::fs::write(path, vec![b'x'; 9000]).unwrap()
        }),
        ("lacks the tables object, attribute_boolean,", &|path| {
            std::fs::write(path, b"").unwrap()
        }),
        ("the database is damaged", &|path| page(1, path)),
        ("the database is damaged", &|path| {
            let bytes = std::fs::read(path).unwrap();
            std::fs::write(path, &bytes[..4096 * 3]).unwrap();
        }),
        ("does not have the tables and columns", &|path| {
            let writer = rusqlite::Connection::open(path).unwrap();
            writer
                .execute_batch("alter table attribute_array rename column type to kind")
                .unwrap();
        }),
        ("symbolic link", &|path| {
            std::fs::rename(path, path.with_extension("moved")).unwrap();
            symlink(path.with_extension("moved"), path).unwrap();
        }),
        ("not a regular file", &|path| {
            std::fs::remove_file(path).unwrap();
            nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        }),
    ];
    for (message, damage) in damages {
        let made = made("");
        damage(&made.path);
        let token = made.token();
        for _ in 0..2 {
            let error = token.list(patient()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Damaged, "{message}: {error}");
            assert!(error.to_string().contains(message), "{message}: {error}");
            assert_eq!(error.path(), Some(made.path.as_path()));
        }
        assert!(token.object(&ObjectId::Token, patient()).is_err());
        assert!(token.metadata().is_ok());
    }
}

#[test]
fn each_required_table_is_missed_and_the_unused_ones_are_not() {
    for table in [
        "object",
        "attribute_boolean",
        "attribute_integer",
        "attribute_binary",
        "attribute_array",
    ] {
        let made = made(&format!("drop table {table}"));
        let error = made.token().list(patient()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged);
        assert!(
            error
                .to_string()
                .ends_with(&format!("lacks the tables {table}")),
            "{error}"
        );
        assert!(
            made.token()
                .object_metadata(&ObjectId::Token, patient())
                .is_ok()
        );
    }
    let made =
        made("drop table attribute_text; drop table attribute_real; drop table attribute_datetime");
    assert_eq!(label(&made.token(), 2), b"l2");
}

#[test]
fn what_is_not_there_is_not_found() {
    let made = made("");
    let token = made.token();
    let error = token.object(&named("nobody"), patient()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let error = token
        .object_metadata(&named("nobody"), patient())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    std::fs::remove_file(&made.path).unwrap();
    assert_eq!(
        token.list(patient()).unwrap_err().kind(),
        ErrorKind::NotFound
    );
    std::fs::remove_dir(made.directory.path()).unwrap();
    assert_eq!(token.metadata().unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_symbolic_link_above_the_database_is_refused_by_sqlite() {
    let made = made("");
    let outside = tempfile::tempdir().unwrap();
    let link = outside.path().join("link");
    symlink(made.directory.path(), &link).unwrap();
    let log = Arc::default();
    let below = link.join(".");
    let token = open(&below, "made", Options::default(), &log);
    let error = token.list(patient()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert!(error.to_string().contains("symbolic link"), "{error}");
}

#[test]
fn a_path_that_sqlite_cannot_hold_is_named_so() {
    let root = tempfile::tempdir().unwrap();
    let deep = (0..3).fold(root.path().to_path_buf(), |path, _| {
        path.join("d".repeat(200))
    });
    std::fs::create_dir_all(&deep).unwrap();
    let made = made("");
    std::fs::copy(&made.path, deep.join("sqlite3.db")).unwrap();
    let error = open(&deep, "made", Options::default(), &made.log)
        .list(patient())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NameTooLong);
}

#[test]
fn a_remembered_uuid_is_the_name() {
    let foreign = "b7e9f2a1-aaaa-bbbb-cccc-111111111111";
    let made = made(&format!(
        "insert into attribute_text (value, type, object_id)
         values ('{foreign}', {CKA_TOKENFS_UUID}, 3), ('later', {CKA_TOKENFS_UUID}, 3),
                ('secret', {CKA_TOKENFS_UUID}, 4), ('other', 3, 2)"
    ));
    let token = made.token();
    let names = token.list(patient()).unwrap();
    let mut expected = [
        derived(token.name(), 2),
        foreign.to_owned(),
        derived(token.name(), 4),
    ];
    expected.sort();
    assert_eq!(
        names.iter().map(ToString::to_string).collect::<Vec<_>>(),
        expected
    );
    let object: Arc<Object> = token.object(&named(foreign), patient()).unwrap();
    assert_eq!(object.attributes.bytes(LABEL), Some(&b"l3"[..]));
    assert_eq!(object.attributes.len(), 2, "the memory is no attribute");
    let log = made.log.render();
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(
        log.contains("object 4 remembers") && !log.contains("secret"),
        "{log}"
    );
}
