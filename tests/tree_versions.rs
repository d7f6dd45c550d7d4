//! The tree without a mount: which version of a value somebody gets who looks, opens and reads while the store changes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokenfs::diagnostics::Diagnostics;
use tokenfs::error::ErrorKind;
use tokenfs::pkcs11::{CKA_CLASS, CKA_LABEL, CKA_OS_TOKENLABEL, CKA_VALUE};
use tokenfs::store::attribute::{Attributes, Value};
use tokenfs::store::file::encode;
use tokenfs::store::watch::Change;
use tokenfs::store::{ObjectId, ObjectName, Options, Patience, Store, TokenName};
use tokenfs::tree::node::ROOT;
use tokenfs::tree::{Ino, Settings, Stale, Tree};

/// Long enough for a file that looks unfinished to be believed.
fn patient() -> Patience {
    Patience::at_most(Duration::from_secs(5))
}

struct Fixture {
    tree: Tree,
    tokendir: tempfile::TempDir,
    object: Ino,
}

impl Fixture {
    fn new() -> Self {
        let tokendir = tempfile::tempdir().unwrap();
        fs::create_dir(tokendir.path().join("token-1")).unwrap();
        let mut own = Attributes::new();
        own.insert(CKA_OS_TOKENLABEL, Value::Bytes(b"one".to_vec()));
        fs::write(
            tokendir.path().join("token-1/token.object"),
            encode(1, &own),
        )
        .unwrap();
        let log = Arc::new(Diagnostics::new());
        let store = Store::open(tokendir.path(), Options::default(), Arc::clone(&log)).unwrap();
        let tree = Tree::new(store, Settings::default(), log);
        let mut fixture = Self {
            tree,
            tokendir,
            object: 0,
        };
        fixture.write(b"first", b"");
        let token = fixture.look_up(ROOT, "token-1");
        fixture.object = fixture.look_up(token, "key");
        fixture
    }

    fn path(&self) -> PathBuf {
        self.tokendir.path().join("token-1/key.object")
    }

    fn write(&self, label: &[u8], value: &[u8]) {
        let mut attributes = Attributes::new();
        attributes.insert(CKA_CLASS, Value::Ulong(0));
        attributes.insert(CKA_LABEL, Value::Bytes(label.to_vec()));
        attributes.insert(CKA_VALUE, Value::Bytes(value.to_vec()));
        fs::write(self.path(), encode(1, &attributes)).unwrap();
    }

    fn look_up(&self, parent: Ino, name: &str) -> Ino {
        self.tree
            .lookup(parent, OsStr::new(name), patient())
            .unwrap()
            .attributes
            .ino
    }

    fn size(&self, ino: Ino) -> u64 {
        self.tree
            .attributes(ino, patient())
            .unwrap()
            .attributes
            .size
    }

    /// Opens, reads to the end in pieces of `piece` bytes, and closes.
    fn read(&self, ino: Ino, piece: u32) -> Vec<u8> {
        let handle = self.tree.open(ino, patient()).unwrap();
        let mut all = Vec::new();
        loop {
            let part = self.tree.read(handle, all.len() as u64, piece).unwrap();
            if part.is_empty() {
                break;
            }
            all.extend(part);
        }
        self.tree.release(handle, Patience::Now).unwrap();
        all
    }

    fn changed(&self) -> Vec<Stale> {
        let token = TokenName::new(OsStr::new("token-1")).unwrap();
        let id = ObjectId::Object(ObjectName::new(OsStr::new("key")).unwrap());
        self.tree.stale(&[Change::Object(token, id)], patient()).0
    }
}

#[test]
fn whoever_reads_gets_one_version_to_the_end_and_whoever_comes_later_the_new_one() {
    let fixture = Fixture::new();
    let label = fixture.look_up(fixture.object, "CKA_LABEL");
    assert_eq!(fixture.size(label), 5);
    let handle = fixture.tree.open(label, patient()).unwrap();
    assert_eq!(fixture.tree.read(handle, 0, 3).unwrap(), b"fir");

    fixture.write(b"the second one", b"");
    assert_eq!(fixture.size(label), 14);
    assert_eq!(fixture.read(label, 4), b"the second one");
    assert_eq!(fixture.tree.read(handle, 3, 100).unwrap(), b"st");
    assert_eq!(fixture.tree.read(handle, 5, 100).unwrap(), b"");

    fs::remove_file(fixture.path()).unwrap();
    assert_eq!(fixture.tree.read(handle, 0, 100).unwrap(), b"first");
    fixture.tree.release(handle, Patience::Now).unwrap();
    let error = fixture.tree.read(handle, 0, 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "it is closed");
}

#[test]
fn a_long_value_is_read_as_it_was_when_it_was_opened() {
    let fixture = Fixture::new();
    fixture.write(b"first", &[1; 10_000]);
    let value = fixture.look_up(fixture.object, "CKA_VALUE");
    let handle = fixture.tree.open(value, patient()).unwrap();
    assert_eq!(fixture.tree.read(handle, 0, 4096).unwrap(), vec![1; 4096]);
    fixture.write(b"first", &[2; 20_000]);
    assert_eq!(fixture.size(value), 20_000);
    assert_eq!(
        fixture.tree.read(handle, 4096, 100_000).unwrap(),
        vec![1; 5904]
    );
    assert_eq!(fixture.tree.read(handle, u64::MAX, 10).unwrap(), []);
    fixture.tree.release(handle, Patience::Now).unwrap();
}

#[test]
fn a_change_takes_back_what_was_said_of_that_object_and_of_nothing_else() {
    let fixture = Fixture::new();
    let label = fixture.look_up(fixture.object, "CKA_LABEL");
    let token = fixture.look_up(ROOT, "token-1");
    let own = fixture.look_up(token, "token");
    let own_label = fixture.look_up(own, "CKA_OS_TOKENLABEL");
    let mut attributes = Attributes::new();
    attributes.insert(CKA_CLASS, Value::Ulong(0));
    fs::write(fixture.path(), encode(2, &attributes)).unwrap();
    let stale = fixture.changed();
    assert!(stale.contains(&Stale::Content(fixture.object)));
    assert!(stale.contains(&Stale::Content(label)));
    for other in [token, own, own_label] {
        assert!(
            !stale.contains(&Stale::Content(other)) && !stale.contains(&Stale::Attributes(other))
        );
    }
    let gone = fixture.tree.attributes(label, patient()).unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::NotFound);

    fs::remove_file(fixture.path()).unwrap();
    assert!(fixture.changed().contains(&Stale::Content(fixture.object)));
    let gone = fixture.tree.attributes(fixture.object, patient());
    assert_eq!(gone.unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn what_the_kernel_has_forgotten_is_not_taken_back() {
    let fixture = Fixture::new();
    let label = fixture.look_up(fixture.object, "CKA_LABEL");
    fixture.tree.forget(label, 1);
    fixture.write(b"the second one", b"");
    assert!(!fixture.changed().contains(&Stale::Content(label)));
    let error = fixture.tree.attributes(label, patient()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn an_open_directory_lists_what_it_held() {
    let fixture = Fixture::new();
    let handle = fixture.tree.open_dir(fixture.object, patient()).unwrap();
    let names = || -> Vec<String> {
        let listing = fixture.tree.read_dir(handle).unwrap();
        listing
            .iter()
            .map(|entry| entry.name.to_string_lossy().into_owned())
            .collect()
    };
    let before = names();
    assert_eq!(before, ["CKA_CLASS", "CKA_LABEL", "CKA_VALUE"]);
    fs::write(fixture.path(), encode(2, &Attributes::new())).unwrap();
    assert_eq!(names(), before);
    let again = fixture.tree.open_dir(fixture.object, patient()).unwrap();
    assert!(fixture.tree.read_dir(again).unwrap().is_empty());
}

#[test]
fn names_that_cannot_be_are_absent_or_too_long() {
    let fixture = Fixture::new();
    let look = |parent, name: &str| {
        let found = fixture.tree.lookup(parent, OsStr::new(name), patient());
        found.unwrap_err().kind()
    };
    let token = fixture.look_up(ROOT, "token-1");
    for parent in [ROOT, token, fixture.object] {
        assert_eq!(look(parent, &"x".repeat(255)), ErrorKind::NotFound);
        assert_eq!(look(parent, &"x".repeat(256)), ErrorKind::NameTooLong);
    }
    for name in [
        "CKA_LABEL.bytes",
        "cka_label",
        "0x00000003.bytes",
        "CKA_NEWNAME",
        ".git",
    ] {
        assert_eq!(look(fixture.object, name), ErrorKind::NotFound, "{name}");
    }
    let label = fixture.look_up(fixture.object, "CKA_LABEL");
    assert_eq!(look(label, "x"), ErrorKind::NotADirectory);
}
