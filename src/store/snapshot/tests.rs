//! What a snapshot holds, and what nobody can do while a token is held, in both backends.

use std::ffi::OsStr;
use std::sync::Arc;

use super::*;
use crate::diagnostics::Diagnostics;
use crate::pkcs11::{CKA_CLASS, CKA_LABEL, CKA_OS_SOPIN, CKA_TOKEN};
use crate::store::attribute::{Attributes, Value};
use crate::store::{Access, Backend, NewObject, ObjectName, Options};

const SHORT: Duration = Duration::from_millis(50);

struct Fixture {
    directory: tempfile::TempDir,
    backend: Backend,
}

impl Fixture {
    /// A store with the token `t`.
    fn new(backend: Backend) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let fixture = Self { directory, backend };
        let store = fixture.store();
        let (private, files) = (access(0o700), access(0o600));
        let token = store.create_token(&t(), private, files).unwrap();
        let mut pin = |own: &mut Attributes| {
            own.insert(CKA_OS_SOPIN, Value::Bytes(b"blob".to_vec()));
            Ok(())
        };
        token
            .update(&ObjectId::Token, &mut pin, None, patient())
            .unwrap();
        store.publish_token(&t(), patient()).unwrap();
        fixture
    }

    /// The store, as a process of its own has it.
    fn store(&self) -> Store {
        let options = Options {
            backend: self.backend,
            ..Options::default()
        };
        Store::open(self.directory.path(), options, Arc::new(Diagnostics::new())).unwrap()
    }

    fn token(&self) -> Arc<dyn Token> {
        self.store().token(&t()).unwrap()
    }

    /// Makes an object that is finished, or not.
    fn make(&self, name: &ObjectName, finished: bool) {
        self.token()
            .create(name, &new(finished), patient())
            .unwrap();
    }
}

fn t() -> TokenName {
    TokenName::new(OsStr::new("t")).unwrap()
}

fn name(digit: u8) -> ObjectName {
    let name = format!("{digit:08x}-0000-0000-0000-000000000000");
    ObjectName::new(name.as_ref()).unwrap()
}

fn access(mode: u32) -> Access {
    Access {
        mode,
        uid: nix::unistd::getuid().as_raw(),
        gid: nix::unistd::getgid().as_raw(),
    }
}

fn new(finished: bool) -> NewObject {
    let mut attributes = Attributes::new();
    attributes.insert(CKA_CLASS, Value::Ulong(0));
    attributes.insert(CKA_TOKEN, Value::Bool(finished));
    attributes.insert(CKA_LABEL, Value::Bytes(b"first".to_vec()));
    NewObject {
        attributes,
        access: access(0o600),
        mtime: None,
    }
}

fn patient() -> Patience {
    Patience::at_most(Duration::from_secs(10))
}

fn files_of(snapshot: &Snapshot) -> Vec<String> {
    let files = snapshot.token(&t()).unwrap().layout(Patience::Now).unwrap();
    let names = files.iter().map(|file| file.name().into_string().unwrap());
    names.collect()
}

fn relabel(token: &dyn Token, object: &ObjectName, patience: Patience) -> Result<()> {
    let id = ObjectId::Object(object.clone());
    let mut edit = |attributes: &mut Attributes| {
        attributes.insert(CKA_LABEL, Value::Bytes(b"second".to_vec()));
        Ok(())
    };
    token.update(&id, &mut edit, None, patience)
}

fn kind<T: std::fmt::Debug>(outcome: Result<T>) -> ErrorKind {
    outcome.unwrap_err().kind()
}

fn on_both(test: impl Fn(&Fixture)) {
    for backend in [Backend::File, Backend::Db] {
        println!("--- {backend}");
        test(&Fixture::new(backend));
    }
}

#[test]
fn a_token_that_is_held_stays_as_it_is_and_can_be_read() {
    on_both(|fixture| {
        fixture.make(&name(1), true);
        let (mine, other) = (fixture.token(), fixture.token());
        let hold = mine.hold(SHORT).unwrap();
        let short = || Patience::at_most(SHORT);
        assert_eq!(kind(relabel(&*other, &name(1), short())), ErrorKind::Busy);
        assert_eq!(
            kind(other.create(&name(2), &new(true), short())),
            ErrorKind::Busy
        );
        assert_eq!(kind(other.remove(&name(1), short())), ErrorKind::Busy);
        assert_eq!(
            kind(other.rename(&name(1), &name(2), short())),
            ErrorKind::Busy
        );
        let own = other.update(
            &ObjectId::Token,
            &mut |own| {
                own.insert(CKA_LABEL, Value::Bytes(Vec::new()));
                Ok(())
            },
            None,
            short(),
        );
        assert_eq!(kind(own), ErrorKind::Busy);
        // Others can read it, and hold it.
        let another = other.hold(SHORT).unwrap();
        for token in [&mine, &other] {
            assert_eq!(*token.list(short()).unwrap(), [name(1)]);
            let object = token.object(&ObjectId::Object(name(1)), short()).unwrap();
            assert_eq!(object.attributes.bytes(CKA_LABEL), Some(&b"first"[..]));
        }
        drop(hold);
        assert_eq!(kind(relabel(&*other, &name(1), short())), ErrorKind::Busy);
        drop(another);
        relabel(&*other, &name(1), patient()).unwrap();
        let object = mine.object(&ObjectId::Object(name(1)), patient()).unwrap();
        assert_eq!(object.attributes.bytes(CKA_LABEL), Some(&b"second"[..]));
    });
}

#[test]
fn whoever_is_writing_an_object_file_keeps_its_token_from_being_held() {
    let fixture = Fixture::new(Backend::File);
    fixture.make(&name(1), true);
    let (mine, other) = (fixture.token(), fixture.token());
    let mut edit = |attributes: &mut Attributes| {
        let error = mine.hold(SHORT).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains(".lock: "), "{error}");
        attributes.insert(CKA_LABEL, Value::Bytes(Vec::new()));
        Ok(())
    };
    let id = ObjectId::Object(name(1));
    other.update(&id, &mut edit, None, patient()).unwrap();
    mine.hold(SHORT).unwrap();
}

#[test]
fn what_changes_later_is_not_in_it() {
    on_both(|fixture| {
        fixture.make(&name(1), true);
        fixture.make(&name(2), true);
        let store = fixture.store();
        let snapshot = store.snapshot().unwrap();
        let metadata = store.metadata().unwrap();
        drop(store);
        relabel(&*fixture.token(), &name(1), patient()).unwrap();
        fixture.token().remove(&name(2), patient()).unwrap();
        fixture.make(&name(3), true);
        let check = || {
            assert_eq!(snapshot.tokens().unwrap(), [t()]);
            assert_eq!(snapshot.metadata().unwrap(), metadata);
            snapshot.check_in_place().unwrap();
            let token = snapshot.token(&t()).unwrap();
            assert_eq!(token.backend(), fixture.backend);
            assert_eq!(*token.list(Patience::Now).unwrap(), [name(1), name(2)]);
            let id = ObjectId::Object(name(1));
            let object = token.object(&id, Patience::Now).unwrap();
            assert_eq!(object.attributes.bytes(CKA_LABEL), Some(&b"first"[..]));
            assert_eq!(
                token.object_metadata(&id, Patience::Now).unwrap(),
                object.metadata
            );
            let gone = ObjectId::Object(name(3));
            assert_eq!(
                kind(token.object(&gone, Patience::Now)),
                ErrorKind::NotFound
            );
        };
        check();
        std::fs::remove_dir_all(fixture.directory.path()).unwrap();
        check();
        let token = snapshot.token(&t()).unwrap();
        assert_eq!(
            kind(relabel(&*token, &name(1), patient())),
            ErrorKind::ReadOnly
        );
        assert_eq!(kind(token.remove(&name(1), patient())), ErrorKind::ReadOnly);
        let made = snapshot.create_token(&t(), access(0o700), access(0o600));
        assert_eq!(kind(made.map(drop)), ErrorKind::ReadOnly);
        assert_eq!(
            kind(snapshot.set_metadata(&crate::store::MetadataChange::default())),
            ErrorKind::ReadOnly
        );
    });
}

#[test]
fn what_is_only_being_made_is_left_out_and_what_stays_so_is_not() {
    on_both(|fixture| {
        fixture.make(&name(1), true);
        fixture.make(&name(2), false);
        let making = TokenName::new(OsStr::new("making")).unwrap();
        let other = fixture.store();
        other
            .create_token(&making, access(0o700), access(0o600))
            .unwrap();
        other.publish_token(&making, patient()).unwrap();
        let store = fixture.store();
        let listed = |snapshot: &Snapshot| {
            let token = snapshot.token(&t()).unwrap();
            token.list(Patience::Now).unwrap().to_vec()
        };
        let now = Snapshot::at_once(&store, &HashSet::new()).unwrap();
        assert_eq!(listed(&now), [name(1)]);
        assert_eq!(now.tokens(), [t()]);
        let token = now.token(&t()).unwrap();
        let id = ObjectId::Object(name(2));
        assert_eq!(kind(token.object(&id, Patience::Now)), ErrorKind::NotFound);
        let begun = Instant::now();
        let later = Snapshot::take(&store).unwrap();
        assert_eq!(listed(&later), [name(1), name(2)]);
        assert_eq!(later.tokens(), [making, t()]);
        assert!(begun.elapsed() >= making::LONGEST - Duration::from_secs(1));
        // It is old by now, and nobody waits for it.
        std::thread::sleep(making::LONGEST - begun.elapsed().min(making::LONGEST));
        let begun = Instant::now();
        assert_eq!(listed(&Snapshot::take(&store).unwrap()), [name(1), name(2)]);
        assert!(begun.elapsed() < making::LONGEST);
    });
}

/// What SoftHSM leaves between the two steps of a removal, and before the first number of a token.
#[test]
fn a_lock_file_alone_and_an_empty_generation_are_left_out_unless_they_stay_so() {
    let fixture = Fixture::new(Backend::File);
    fixture.make(&name(1), true);
    fixture.make(&name(2), true);
    let token = fixture.directory.path().join("t");
    std::fs::remove_file(token.join(format!("{}.object", name(2)))).unwrap();
    std::fs::write(token.join("generation"), "").unwrap();
    let store = fixture.store();
    let now = Snapshot::at_once(&store, &HashSet::new()).unwrap();
    let of = |number| ["lock", "object"].map(|ending| format!("{}.{ending}", name(number)));
    let whole = |others: &[String], own: &[&str]| {
        let own = own.iter().map(|name| (*name).to_owned());
        let all = of(1).into_iter().chain(others.iter().cloned()).chain(own);
        all.collect::<Vec<_>>()
    };
    assert_eq!(files_of(&now), whole(&[], &["token.lock", "token.object"]));
    let own = ["generation", "token.lock", "token.object"];
    let later = Snapshot::take(&store).unwrap();
    assert_eq!(files_of(&later), whole(&of(2)[..1], &own));
}

#[test]
fn what_is_only_being_made_has_no_files() {
    let fixture = Fixture::new(Backend::File);
    fixture.make(&name(1), false);
    let now = Snapshot::at_once(&fixture.store(), &HashSet::new()).unwrap();
    let own = ["generation", "token.lock", "token.object"];
    assert_eq!(files_of(&now), own);
}

/// A file that is what its object is encoded to is not kept a second time, and every other one is.
#[test]
fn bytes_are_kept_of_what_does_not_encode_to_them() {
    let fixture = Fixture::new(Backend::File);
    let path = |number| {
        let file = format!("t/{}.object", name(number));
        fixture.directory.path().join(file)
    };
    for number in 1..=3 {
        fixture.make(&name(number), true);
    }
    let mut longer = std::fs::read(path(2)).unwrap();
    longer.extend([1; 3]);
    std::fs::write(path(2), &longer).unwrap();
    std::fs::write(path(3), [1; 20]).unwrap();
    let store = fixture.store();
    let token = read(&*store.token(&t()).unwrap(), Duration::from_secs(5));
    let token = token.unwrap().unwrap();
    for (number, twice) in [(1, false), (2, true), (3, true)] {
        let file = LayoutFile::Object(ObjectId::Object(name(number)));
        let kept = &token.files.as_ref().unwrap()[&file];
        assert_eq!(matches!(kept, Kept::Bytes(..)), twice, "{number}");
        let (metadata, bytes) = token.layout_read(&file, Patience::Now).unwrap();
        assert_eq!(bytes, std::fs::read(path(number)).unwrap());
        let (same, size) = token.layout_metadata(&file, Patience::Now).unwrap();
        assert_eq!((same, size), (metadata, bytes.len() as u64));
    }
}
