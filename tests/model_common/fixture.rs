//! The store that every sequence begins with.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokenfs::diagnostics::Diagnostics;
use tokenfs::pkcs11::{CKA_CLASS, CKA_LABEL, CKA_OS_TOKENLABEL};
use tokenfs::store::attribute::{Attributes, Value};
use tokenfs::store::{
    Access, Backend, NewObject, ObjectId, ObjectName, Options, Patience, Store, TokenName,
};

use super::model::{Content, OWN};
use super::ops::{OBJECTS, TOKENS};

/// Long enough for anything that ends at all.
pub fn patient() -> Patience {
    Patience::at_most(Duration::from_secs(5))
}

/// What the store holds: in each token a public and a private object.
pub fn initial() -> Content {
    let mut map = Attributes::new();
    map.insert(CKA_LABEL, Value::Bytes(b"inner".to_vec()));
    map.insert(0x162, Value::Bool(true));
    let public = Attributes::from(BTreeMap::from([
        (CKA_CLASS, Value::Ulong(2)),
        (2, Value::Bool(false)),
        (CKA_LABEL, Value::Bytes(b"label".to_vec())),
        (0x102, Value::Bytes(b"id".to_vec())),
        (0x121, Value::Ulong(2048)),
        (0x4000_0211, Value::Map(map)),
        (0x4000_0600, Value::Mechs(BTreeSet::from([1, 0x1082]))),
    ]));
    let private = Attributes::from(BTreeMap::from([
        (CKA_CLASS, Value::Ulong(3)),
        (2, Value::Bool(true)),
        (CKA_LABEL, Value::Bytes(vec![7; 48])),
        (0x110, Value::Bytes(b"20260101".to_vec())),
    ]));
    TOKENS
        .iter()
        .map(|token| {
            let own = Attributes::from(BTreeMap::from([
                (
                    CKA_OS_TOKENLABEL,
                    Value::Bytes(format!("{token:32}").into_bytes()),
                ),
                (0x8000_534a, Value::Bytes(b"0123456789abcdef".to_vec())),
                (0x8000_534b, Value::Ulong(0x42d)),
            ]));
            let objects = [
                (OWN.to_owned(), own),
                (OBJECTS[0].to_owned(), public.clone()),
                (OBJECTS[1].to_owned(), private.clone()),
            ];
            ((*token).to_owned(), BTreeMap::from(objects))
        })
        .collect()
}

pub fn options(backend: Backend) -> Options {
    Options {
        backend,
        ..Options::default()
    }
}

pub fn store(tokendir: &Path, backend: Backend, log: &Arc<Diagnostics>) -> Store {
    Store::open(tokendir, options(backend), Arc::clone(log)).unwrap()
}

pub fn token_name(name: &str) -> TokenName {
    TokenName::new(OsStr::new(name)).unwrap()
}

pub fn object_id(name: &str) -> ObjectId {
    match name {
        OWN => ObjectId::Token,
        name => ObjectId::Object(ObjectName::new(OsStr::new(name)).unwrap()),
    }
}

pub fn access(mode: u32) -> Access {
    Access {
        mode,
        uid: nix::unistd::geteuid().as_raw(),
        gid: nix::unistd::getegid().as_raw(),
    }
}

/// A directory where syncing costs nothing, if there is one: thousands of stores are made here.
pub fn temporary() -> TempDir {
    let memory = Path::new("/dev/shm");
    let builder = |place: &Path| {
        tempfile::Builder::new()
            .prefix("tokenfs-model-")
            .tempdir_in(place)
    };
    builder(memory)
        .or_else(|_| builder(&std::env::temp_dir()))
        .unwrap()
}

/// A store that is copied for each sequence.
pub struct Template {
    pub backend: Backend,
    /// What it holds.
    pub content: Content,
    directory: TempDir,
    /// Copies, and when they were made.
    copies: RefCell<VecDeque<(TempDir, Instant)>>,
}

/// How old a file has to be not to be waited for: SoftHSM might still be making it.
const GROWN: Duration = Duration::from_millis(510);

/// How many copies are made at a time.
const BATCH: usize = 60;

impl Template {
    pub fn new(backend: Backend) -> Self {
        let directory = temporary();
        {
            let log = Arc::new(Diagnostics::new());
            let store = store(directory.path(), backend, &log);
            for name in TOKENS.map(token_name) {
                let made = store.create_token(&name, access(0o700), access(0o600));
                let own = &initial()[TOKENS[0]][OWN];
                let mut edit = |attributes: &mut Attributes| {
                    *attributes = own.clone();
                    Ok(())
                };
                let id = ObjectId::Token;
                made.unwrap()
                    .update(&id, &mut edit, None, patient())
                    .unwrap();
                store.publish_token(&name, patient()).unwrap();
            }
            assert_eq!(log.render(), "");
        }
        Self::of(directory, backend)
    }

    /// Of a directory with the two tokens, which have no objects yet.
    pub fn of(directory: TempDir, backend: Backend) -> Self {
        let log = Arc::new(Diagnostics::new());
        let store = store(directory.path(), backend, &log);
        for (name, objects) in initial() {
            let token = store.token(&token_name(&name)).unwrap();
            for (object, attributes) in objects {
                if let ObjectId::Object(object) = object_id(&object) {
                    let new = NewObject {
                        attributes,
                        access: access(0o600),
                        mtime: None,
                    };
                    token.create(&object, &new, patient()).unwrap();
                }
            }
        }
        assert_eq!(log.render(), "");
        Self {
            backend,
            content: read(&store),
            directory,
            copies: RefCell::default(),
        }
    }

    /// Another one like it.
    pub fn copy(&self) -> TempDir {
        let mut copies = self.copies.borrow_mut();
        if copies.is_empty() {
            copies.extend((0..BATCH).map(|_| {
                let copy = temporary();
                copy_below(self.directory.path(), copy.path());
                (copy, Instant::now())
            }));
        }
        let (copy, made) = copies.pop_front().unwrap();
        if self.backend == Backend::File {
            std::thread::sleep(GROWN.saturating_sub(made.elapsed()));
        }
        copy
    }
}

pub fn copy_below(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir(&target).unwrap();
            copy_below(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).unwrap();
        }
    }
}

/// What a store that was just opened holds.
pub fn stored(tokendir: &Path, backend: Backend) -> Content {
    let log = Arc::new(Diagnostics::new());
    let store = store(tokendir, backend, &log);
    let content = read(&store);
    assert_eq!(log.render(), "", "what reading the store complains of");
    content
}

/// What a store holds.
pub fn read(store: &Store) -> Content {
    let tokens = store.tokens().unwrap().into_iter();
    tokens
        .filter(|name| !store.is_building(name))
        .map(|name| {
            let token = store.token(&name).unwrap();
            let of = |id: &ObjectId| token.object(id, patient()).unwrap().attributes.clone();
            let listed = token.list(patient()).unwrap();
            let mut objects: BTreeMap<String, Attributes> = listed
                .iter()
                .map(|object| (object.to_string(), of(&ObjectId::Object(object.clone()))))
                .collect();
            objects.insert(OWN.to_owned(), of(&ObjectId::Token));
            (name.to_string(), objects)
        })
        .collect()
}

/// What is below a tokendir and is none of SoftHSM's.
pub fn leftovers(tokendir: &Path) -> Vec<PathBuf> {
    let mut left = Vec::new();
    for entry in fs::read_dir(tokendir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            left.extend(leftovers(&path));
        } else if name.contains("tokenfs")
            || !(name.ends_with(".object")
                || (name.ends_with(".lock") && path.with_extension("object").exists())
                || ["generation", "sqlite3.db"].contains(&&*name))
        {
            left.push(path);
        }
    }
    left
}
