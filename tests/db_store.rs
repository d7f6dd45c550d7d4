//! The `db` backend reads what SoftHSM wrote.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod db_common;

use std::collections::BTreeSet;
use std::sync::Arc;

use db_common::*;
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
