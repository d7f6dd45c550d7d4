//! Random changes from both sides: what a token believes after each of its own commits is what a scan finds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod db_common;
mod db_write_common;
mod support;

use std::collections::BTreeMap;
use std::time::{Duration, UNIX_EPOCH};

use db_common::*;
use db_write_common::*;
use proptest::prelude::*;
use tokenfs::error::ErrorKind;
use tokenfs::store::attribute::{AttributeKey, Attributes, Kind, Value};
use tokenfs::store::db::uuid::{CKA_TOKENFS_UUID, derived};
use tokenfs::store::{Metadata, MetadataChange, Object, ObjectId, Target, Time, Token};

/// Names that objects can have: of rows, and of other stores.
const NAMES: usize = 9;

fn named_of(index: usize) -> String {
    match index {
        0..=5 => {
            let token = tokenfs::store::TokenName::new(std::ffi::OsStr::new("made")).unwrap();
            derived(&token, i64::try_from(index).unwrap() + 2)
        }
        other => format!("b7e9f2a1-aaaa-bbbb-cccc-{other:012x}"),
    }
}

#[derive(Clone, Debug)]
enum Operation {
    Set(usize, u64, Option<Value>),
    Create(usize, u8),
    Remove(usize),
    Date(usize, u32),
    /// By somebody else.
    Relabel(i64, u8),
    Insert,
    Delete(i64),
    /// What nobody should do: a second object that remembers a name.
    Remember(i64, usize),
}

fn operation() -> impl Strategy<Value = Operation> {
    let value = prop_oneof![
        any::<bool>().prop_map(Value::Bool),
        any::<u64>().prop_map(Value::Ulong),
        proptest::collection::vec(any::<u8>(), 0..20).prop_map(Value::Bytes),
        Just(Value::Map(Attributes::new())),
    ];
    let name = 0..NAMES;
    prop_oneof![
        6 => (name.clone(), 0_u64..6, proptest::option::weighted(0.8, value))
            .prop_map(|(name, ty, value)| Operation::Set(name, if ty == 2 { 1 } else { ty }, value)),
        4 => (name.clone(), any::<u8>()).prop_map(|(name, label)| Operation::Create(name, label)),
        3 => name.clone().prop_map(Operation::Remove),
        2 => (name.clone(), any::<u32>()).prop_map(|(name, time)| Operation::Date(name, time)),
        1 => (2_i64..8, any::<u8>()).prop_map(|(row, label)| Operation::Relabel(row, label)),
        1 => Just(Operation::Insert),
        1 => (2_i64..8).prop_map(Operation::Delete),
        1 => (2_i64..8, name).prop_map(|(row, name)| Operation::Remember(row, name)),
    ]
}

/// `PROPTEST_CASES` says how many sequences.
fn config() -> ProptestConfig {
    let mut config = ProptestConfig::default();
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 40;
    }
    config
}

type Everything = BTreeMap<Option<String>, (i64, Object, Times)>;

/// Which need not be equal.
#[derive(Debug)]
struct Times(Metadata);

impl PartialEq for Times {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

fn everything(token: &dyn Token, row: impl Fn(&ObjectId) -> i64) -> Everything {
    let names = token.list(patient()).unwrap();
    let ids = names.iter().cloned().map(ObjectId::Object);
    ids.chain([ObjectId::Token])
        .map(|id| {
            let mut object = Object::clone(&token.object(&id, patient()).unwrap());
            assert_eq!(
                object.metadata,
                token.object_metadata(&id, patient()).unwrap()
            );
            // Compared by themselves, see `same_times`.
            let metadata = object.metadata;
            object.metadata = Metadata {
                atime: UNIX_EPOCH,
                mtime: UNIX_EPOCH,
                ctime: UNIX_EPOCH,
                ..metadata
            };
            let name = match &id {
                ObjectId::Token => None,
                ObjectId::Object(name) => Some(name.to_string()),
            };
            (name, (row(&id), object, Times(metadata)))
        })
        .collect()
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn what_is_believed_is_what_is_there(operations in proptest::collection::vec(operation(), 1..30)) {
        let made = made("");
        let token = made.token();
        let writer = made.writer(false);
        writer.execute_batch("pragma foreign_keys = on; pragma synchronous = off").unwrap();
        for operation in operations {
            let before = everything(&token, |id| token.row(id, patient()).unwrap());
            let known = |index: usize| before.get(&Some(named_of(index)));
            match operation.clone() {
                Operation::Set(index, attribute_type, value) => {
                    let edit = &mut |attributes: &mut Attributes| {
                        for kind in [Kind::Bool, Kind::Ulong, Kind::Bytes, Kind::Map] {
                            attributes.remove(AttributeKey { attribute_type, kind });
                        }
                        if let Some(value) = &value {
                            attributes.insert(attribute_type, value.clone());
                        }
                        Ok(())
                    };
                    let done = token.update(&named(&named_of(index)), edit, None, patient());
                    match known(index) {
                        Some((_, old, _)) => {
                            done.unwrap();
                            let mut expected = old.attributes.clone();
                            edit(&mut expected).unwrap();
                            prop_assert_eq!(get(&token, &named(&named_of(index))), expected);
                        }
                        None => prop_assert_eq!(done.unwrap_err().kind(), ErrorKind::NotFound),
                    }
                }
                Operation::Create(index, label) => {
                    let new = new(&format!("new {label}"));
                    let done = token.create(&name(&named_of(index)), &new, patient());
                    match known(index) {
                        Some(_) => prop_assert_eq!(done.unwrap_err().kind(), ErrorKind::Exists),
                        None => {
                            done.unwrap();
                            prop_assert_eq!(get(&token, &named(&named_of(index))), new.attributes);
                            // Nobody else is called otherwise for it.
                            let rows = |all: &Everything| -> BTreeMap<i64, Option<String>> {
                                all.iter().map(|(name, (row, _, _))| (*row, name.clone())).collect()
                            };
                            let after = rows(&everything(&token, |id| token.row(id, patient()).unwrap()));
                            for (row, name) in rows(&before) {
                                prop_assert_eq!(&after[&row], &name);
                            }
                        }
                    }
                }
                Operation::Remove(index) => {
                    let done = token.remove(&name(&named_of(index)), patient());
                    match known(index) {
                        Some(_) => done.unwrap(),
                        None => prop_assert_eq!(done.unwrap_err().kind(), ErrorKind::NotFound),
                    }
                }
                Operation::Date(index, time) => {
                    let time = UNIX_EPOCH + Duration::from_secs(time.into());
                    let change = MetadataChange { mtime: Some(Time::At(time)), ..MetadataChange::default() };
                    let id = named(&named_of(index));
                    let done = token.set_metadata(&Target::Object(id.clone()), &change, patient());
                    match known(index) {
                        Some(_) => {
                            done.unwrap();
                            prop_assert_eq!(token.object(&id, patient()).unwrap().metadata.mtime, time);
                        }
                        None => prop_assert_eq!(done.unwrap_err().kind(), ErrorKind::NotFound),
                    }
                }
                Operation::Relabel(row, label) => {
                    let sql = "update attribute_binary set value = ? where type = 3 and object_id = ?";
                    writer.execute(sql, (vec![label; 3], row)).unwrap();
                }
                Operation::Insert => {
                    writer.execute("insert into object default values", []).unwrap();
                }
                Operation::Delete(row) => {
                    writer.execute("delete from object where id = ?", [row]).unwrap();
                }
                Operation::Remember(row, index) => {
                    let sql = "insert into attribute_text (value, type, object_id) select ?, ?, id from object where id = ?";
                    writer.execute(sql, (named_of(index), CKA_TOKENFS_UUID.cast_signed(), row)).unwrap();
                }
            }
            let ours = everything(&token, |id| token.row(id, patient()).unwrap());
            let fresh = made.token();
            let theirs = everything(&fresh, |id| fresh.row(id, patient()).unwrap());
            prop_assert_eq!(&ours, &theirs, "after {:?}", operation);
            for (ours, theirs) in ours.values().zip(theirs.values()) {
                same_times(&made, &ours.2.0, &theirs.2.0);
            }
        }
        drop(writer);
        agree(&made, &token);
    }
}
