//! Random sequences of operations on a `Store` without a tree, held against a map; and what they found.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod model_common;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use model_common::fixture::{
    Template, access, leftovers, object_id, patient, read, store, store as store_of, stored,
    token_name,
};
use model_common::model::{Content, OWN};
use model_common::ops::{OBJECTS, TOKENS};
use model_common::run::{lasting, run_with};
use proptest::prelude::*;
use proptest::sample::select;
use tokenfs::diagnostics::Diagnostics;
use tokenfs::error::{Error, ErrorKind};
use tokenfs::store::attribute::{AttributeKey, Attributes, Kind, Value};
use tokenfs::store::{
    Backend, MetadataChange, NewObject, ObjectId, ObjectName, Store, Target, Time, Token, validate,
};

/// One call of a token, or of its store.
#[derive(Clone, Debug)]
enum Op {
    /// Sets these attributes, and removes those.
    Update(
        &'static str,
        &'static str,
        Vec<(u64, Value)>,
        Vec<(u64, Kind)>,
    ),
    /// An edit that changes something and then fails.
    Fail(&'static str, &'static str),
    Create(&'static str, &'static str, Vec<(u64, Value)>),
    Remove(&'static str, &'static str),
    /// The time of an object.
    Time(&'static str, &'static str, u64),
    Sync(&'static str),
    /// A token is made, with its own attributes, and published.
    Build(&'static str, Vec<(u64, Value)>),
    /// A token is begun, and the process ends.
    Abandon(&'static str),
    /// All objects of a token, and the token.
    RemoveToken(&'static str),
    /// The store is opened anew.
    Reopen,
}

const NAMES: &[&str] = &[
    OBJECTS[0],
    OBJECTS[1],
    "00000000-0000-4000-8000-00000000000c",
    "00000000-0000-4000-8000-00000000000d",
    "no-uuid",
];

const MADE: &str = "token-3";

fn token() -> impl Strategy<Value = &'static str> {
    prop_oneof![6 => Just(TOKENS[0]), 1 => Just(TOKENS[1]), 2 => Just(MADE)]
}

fn object() -> impl Strategy<Value = &'static str> {
    prop_oneof![8 => select(NAMES), 1 => Just(OWN)]
}

fn simple() -> impl Strategy<Value = (u64, Value)> {
    let bytes = prop_oneof![
        Just(Vec::new()),
        Just(b"text".to_vec()),
        Just(vec![7; 48]),
        Just(vec![0; 5000]),
    ];
    let mechs = prop::collection::btree_set(select(&[0_u64, 1, 0x1082, u64::MAX][..]), 0..3);
    prop_oneof![
        4 => (select(&[3_u64, 0x102, 0x11, 0x110, 0x8000_1234][..]), bytes)
            .prop_map(|(of, bytes)| (of, Value::Bytes(bytes))),
        3 => (select(&[1_u64, 2, 0x108, 0x162][..]), any::<bool>()).prop_map(|(of, is)| (of, Value::Bool(is))),
        3 => (select(&[0_u64, 0x100, 0x121, 3][..]), select(&[0_u64, 3, 2048, u64::MAX][..]))
            .prop_map(|(of, number)| (of, Value::Ulong(number))),
        1 => mechs.prop_map(|mechs| (0x4000_0600, Value::Mechs(mechs))),
    ]
}

fn value() -> impl Strategy<Value = (u64, Value)> {
    let map = (
        select(&[0x4000_0211_u64, 0x4000_0212][..]),
        prop::collection::btree_map(select(&[3_u64, 0x11][..]), Just(()), 0..3),
        any::<bool>(),
    );
    prop_oneof![
        8 => simple(),
        1 => map.prop_map(|(of, types, is)| {
            let mut entries = Attributes::new();
            for of in types.into_keys() {
                entries.insert(of, Value::Bytes(vec![1; 3]));
            }
            if is {
                entries.insert(0x162, Value::Bool(true));
            }
            (of, Value::Map(entries))
        }),
    ]
}

fn values() -> impl Strategy<Value = Vec<(u64, Value)>> {
    prop::collection::vec(value(), 0..5)
}

fn removed() -> impl Strategy<Value = Vec<(u64, Kind)>> {
    let one = select(
        &[
            (3_u64, Kind::Bytes),
            (0x102, Kind::Bytes),
            (0, Kind::Ulong),
            (2, Kind::Bool),
            (3, Kind::Ulong),
            (0x4000_0211, Kind::Map),
            (0x4000_0600, Kind::Mechs),
        ][..],
    );
    prop::collection::vec(one, 0..3)
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        20 => (token(), object(), values(), removed()).prop_map(|(t, o, v, r)| Op::Update(t, o, v, r)),
        2 => (token(), object()).prop_map(|(t, o)| Op::Fail(t, o)),
        8 => (token(), select(NAMES), values()).prop_map(|(t, o, v)| Op::Create(t, o, v)),
        6 => (token(), select(NAMES)).prop_map(|(t, o)| Op::Remove(t, o)),
        2 => (token(), object(), 1_000_000_000..1_000_000_009_u64).prop_map(|(t, o, s)| Op::Time(t, o, s)),
        2 => token().prop_map(Op::Sync),
        3 => values().prop_map(|v| Op::Build(MADE, v)),
        1 => Just(Op::Abandon(MADE)),
        2 => Just(Op::RemoveToken(MADE)),
        2 => Just(Op::Reopen),
    ]
}

struct Run<'a> {
    store: Store,
    log: Arc<Diagnostics>,
    tokendir: &'a Path,
    backend: Backend,
    model: Content,
}

/// What an update makes of attributes.
fn edited(old: &Attributes, set: &[(u64, Value)], removed: &[(u64, Kind)]) -> Attributes {
    let mut new = old.clone();
    for (attribute_type, kind) in removed {
        new.remove(AttributeKey {
            attribute_type: *attribute_type,
            kind: *kind,
        });
    }
    for (attribute_type, value) in set {
        new.insert(*attribute_type, value.clone());
    }
    new
}

/// Whether the `file` backend, which has each type once, can hold it.
fn once_each(attributes: &Attributes) -> bool {
    let types: BTreeSet<u64> = attributes
        .iter()
        .map(|(key, _)| key.attribute_type)
        .collect();
    types.len() == attributes.len()
}

impl Run<'_> {
    fn token(&self, name: &str) -> Result<Arc<dyn Token>, ErrorKind> {
        self.store
            .token(&token_name(name))
            .map_err(|error| error.kind())
    }

    fn known(&self, token: &str, object: &str) -> Result<&Attributes, ErrorKind> {
        let objects = self.model.get(token).ok_or(ErrorKind::NotFound)?;
        objects.get(object).ok_or(ErrorKind::NotFound)
    }

    fn put(&mut self, token: &str, object: &str, attributes: Attributes) {
        let objects = self.model.get_mut(token).unwrap();
        objects.insert(object.to_owned(), attributes);
    }

    fn update(
        &self,
        token: &str,
        object: &str,
        edit: &mut dyn FnMut(&mut Attributes) -> Result<(), Error>,
    ) -> Result<(), ErrorKind> {
        let outcome = self
            .token(token)?
            .update(&object_id(object), edit, None, patient());
        outcome.map_err(|error| error.kind())
    }

    fn step(&mut self, op: &Op) {
        match op {
            Op::Update(token, object, set, removed) => {
                let wanted = self.known(token, object).and_then(|old| {
                    let new = edited(old, set, removed);
                    validate::check(Some(old), &new).map_err(|error| error.kind())?;
                    Ok(new)
                });
                // SoftHSM knows one value of each type, and the tree sees to it that there is one.
                if wanted.as_ref().is_ok_and(|new| !once_each(new)) {
                    return;
                }
                let outcome = self.update(token, object, &mut |attributes| {
                    *attributes = edited(attributes, set, removed);
                    Ok(())
                });
                assert_eq!(outcome, wanted.clone().map(drop), "{op:?}");
                if let Ok(new) = wanted {
                    self.put(token, object, new);
                }
            }
            Op::Fail(token, object) => {
                let wanted = self
                    .known(token, object)
                    .map(drop)
                    .and(Err(ErrorKind::NoSpace));
                let wanted = match self.known(token, object) {
                    Ok(_) => wanted,
                    Err(kind) => Err(kind),
                };
                let outcome = self.update(token, object, &mut |attributes| {
                    attributes.insert(0, Value::Ulong(77));
                    Err(Error::new(ErrorKind::NoSpace, "the edit fails"))
                });
                assert_eq!(outcome, wanted, "{op:?}");
            }
            Op::Create(token, object, set) => {
                let attributes = edited(&Attributes::new(), set, &[]);
                if !once_each(&attributes) {
                    return;
                }
                let is_invalid = validate::check(None, &attributes).is_err()
                    || (self.backend == Backend::Db && *object == "no-uuid");
                let new = NewObject {
                    attributes: attributes.clone(),
                    access: access(0o600),
                    mtime: None,
                };
                let name = ObjectName::new(OsStr::new(object)).unwrap();
                let outcome = self.token(token).and_then(|token| {
                    let made = token.create(&name, &new, patient());
                    made.map_err(|error| error.kind())
                });
                let is_there = self.known(token, object).is_ok();
                match outcome {
                    Err(ErrorKind::NotFound) => assert!(!self.model.contains_key(*token), "{op:?}"),
                    Err(ErrorKind::Invalid) => assert!(is_invalid, "{op:?}"),
                    Err(ErrorKind::Exists) => assert!(is_there, "{op:?}"),
                    other => {
                        assert_eq!(other, Ok(()), "{op:?}");
                        assert!(!is_there && !is_invalid, "{op:?}");
                        self.put(token, object, attributes);
                    }
                }
            }
            Op::Remove(token, object) => {
                let name = ObjectName::new(OsStr::new(object)).unwrap();
                let outcome = self.token(token).and_then(|token| {
                    let removed = token.remove(&name, patient());
                    removed.map_err(|error| error.kind())
                });
                assert_eq!(outcome, self.known(token, object).map(drop), "{op:?}");
                if let Some(objects) = self.model.get_mut(*token) {
                    objects.remove(*object);
                }
            }
            Op::Time(token, object, seconds) => {
                let time = UNIX_EPOCH + Duration::from_secs(*seconds);
                let outcome = self.set_time(token, &object_id(object), time);
                assert_eq!(outcome, self.known(token, object).map(|_| time), "{op:?}");
            }
            Op::Sync(token) => {
                let outcome = self.token(token).and_then(|token| {
                    let synced = token.sync(patient());
                    synced.map_err(|error| error.kind())
                });
                assert_eq!(outcome.is_ok(), self.model.contains_key(*token), "{op:?}");
            }
            Op::Build(name, set) => self.build(op, name, set),
            Op::Abandon(name) => {
                let begun =
                    self.store
                        .create_token(&token_name(name), access(0o700), access(0o600));
                let is_there = self.model.contains_key(*name);
                assert_eq!(begun.is_ok(), !is_there, "{op:?}");
                drop(begun);
                self.reopen();
            }
            Op::RemoveToken(name) => self.remove_token(op, name),
            Op::Reopen => self.reopen(),
        }
    }

    fn set_time(
        &self,
        token: &str,
        id: &ObjectId,
        time: SystemTime,
    ) -> Result<SystemTime, ErrorKind> {
        let change = MetadataChange {
            mtime: Some(Time::At(time)),
            ..MetadataChange::default()
        };
        let token = self.token(token)?;
        token
            .set_metadata(&Target::Object(id.clone()), &change, patient())
            .and_then(|()| token.object_metadata(id, patient()))
            .map(|metadata| metadata.mtime)
            .map_err(|error| error.kind())
    }

    fn build(&mut self, op: &Op, name: &str, set: &[(u64, Value)]) {
        let own = edited(&Attributes::new(), set, &[]);
        if !once_each(&own) || validate::check(None, &own).is_err() {
            return;
        }
        let token = self
            .store
            .create_token(&token_name(name), access(0o700), access(0o600));
        if self.model.contains_key(name) {
            assert_eq!(token.unwrap_err().kind(), ErrorKind::Exists, "{op:?}");
            return;
        }
        let mut edit = |attributes: &mut Attributes| {
            *attributes = own.clone();
            Ok(())
        };
        let token = token.unwrap();
        token
            .update(&ObjectId::Token, &mut edit, None, patient())
            .unwrap();
        let object = ObjectName::new(OsStr::new(OBJECTS[0])).unwrap();
        let new = NewObject {
            attributes: own.clone(),
            access: access(0o600),
            mtime: None,
        };
        token.create(&object, &new, patient()).unwrap();
        self.store
            .publish_token(&token_name(name), patient())
            .unwrap();
        let objects = [(OWN.to_owned(), own.clone()), (OBJECTS[0].to_owned(), own)];
        self.model.insert(name.to_owned(), objects.into());
    }

    fn remove_token(&mut self, op: &Op, name: &str) {
        let removed = self.store.remove_token(&token_name(name), patient());
        let removed = removed.map_err(|error| error.kind());
        let Some(objects) = self.model.get(name) else {
            assert_eq!(removed, Err(ErrorKind::NotFound), "{op:?}");
            return;
        };
        if objects.len() > 1 {
            assert_eq!(removed, Err(ErrorKind::NotEmpty), "{op:?}");
            for object in objects.keys().filter(|object| *object != OWN) {
                let object = ObjectName::new(OsStr::new(object)).unwrap();
                let token = self.token(name).unwrap();
                token.remove(&object, patient()).unwrap();
            }
            let removed = self.store.remove_token(&token_name(name), patient());
            removed.unwrap();
        } else {
            assert_eq!(removed, Ok(()), "{op:?}");
        }
        self.model.remove(name);
    }

    fn reopen(&mut self) {
        assert_eq!(self.log.render(), "", "nothing went wrong");
        self.log = Arc::new(Diagnostics::new());
        // The one that was there lets go of what it has first, as when its process ends.
        let elsewhere = std::env::temp_dir();
        self.store = store(&elsewhere, self.backend, &self.log);
        let store = store(self.tokendir, self.backend, &self.log);
        // It may say what it has put right.
        let log = std::mem::replace(&mut self.log, Arc::new(Diagnostics::new()));
        store.recover();
        drop(log);
        assert_eq!(read(&store), self.model);
        self.store = store_of(self.tokendir, self.backend, &self.log);
    }
}

fn sequence(template: &Template, ops: &[Op]) {
    let tokendir = template.copy();
    let log = Arc::new(Diagnostics::new());
    let mut run = Run {
        store: store(tokendir.path(), template.backend, &log),
        log,
        tokendir: tokendir.path(),
        backend: template.backend,
        model: template.content.clone(),
    };
    for (index, op) in ops.iter().enumerate() {
        run.step(op);
        if index % 4 == 0 {
            assert_eq!(read(&run.store), run.model, "after {op:?}");
        }
    }
    assert_eq!(read(&run.store), run.model);
    run.reopen();
    let model = run.model.clone();
    drop(run);
    assert_eq!(stored(tokendir.path(), template.backend), model);
    assert_eq!(leftovers(tokendir.path()), [] as [std::path::PathBuf; 0]);
}

fn random(backend: Backend) {
    let template = Template::new(backend);
    run_with(
        &format!("the store, {backend} backend"),
        20,
        lasting(),
        &prop::collection::vec(op(), 1..40),
        2000,
        |ops: &Vec<Op>| sequence(&template, ops),
        Vec::len,
    );
}

#[test]
fn random_sequences_on_the_file_backend() {
    random(Backend::File);
}

#[test]
fn random_sequences_on_the_db_backend() {
    random(Backend::Db);
}
