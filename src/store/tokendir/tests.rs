//! Making and removing tokens of the `file` backend, and what becomes of a crash in between.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::store::attribute::{Attributes, Value};
use crate::store::file::encode;
use crate::store::leftover::{BUILDING, NEW_DIRECTORY, REMOVING};
use crate::store::{Access, NewObject, ObjectId, ObjectName, Patience};

struct Fixture {
    directory: tempfile::TempDir,
    store: Store,
    log: Arc<Diagnostics>,
}

fn fixture() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let log = Arc::new(Diagnostics::new());
    let store = Store::open(directory.path(), Options::default(), Arc::clone(&log)).unwrap();
    Fixture {
        directory,
        store,
        log,
    }
}

impl Fixture {
    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.directory.path().join(name)
    }

    fn files(&self, name: &str) -> Vec<String> {
        let mut files: Vec<String> = fs::read_dir(self.path(name))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        files
    }

    /// A directory with these files, each of which holds an object, but for a database that is hidden: that is one without objects.
    fn make(&self, name: &str, files: &[&str]) {
        fs::create_dir(self.path(name)).unwrap();
        for file in files {
            if *file == mark::HIDDEN_DATABASE {
                let (path, options) = (self.path(name), Options::default());
                let files = access(0o600);
                DbToken::build(token(name), &path, files, options, Arc::default()).unwrap();
                continue;
            }
            fs::write(self.path(name).join(file), encode(1, &Attributes::new())).unwrap();
        }
    }

    fn create(&self, name: &str) -> Result<Arc<dyn Token>> {
        self.store
            .create_token(&token(name), access(0o750), access(0o640))
    }

    /// A second store on the same tokendir, as another process has it.
    fn other(&self) -> Store {
        Store::open(
            self.directory.path(),
            Options::default(),
            Arc::clone(&self.log),
        )
        .unwrap()
    }
}

fn token(name: &str) -> TokenName {
    TokenName::new(name.as_ref()).unwrap()
}

fn access(mode: u32) -> Access {
    Access {
        mode,
        uid: nix::unistd::getuid().as_raw(),
        gid: nix::unistd::getgid().as_raw(),
    }
}

fn soon() -> Patience {
    Patience::at_most(Duration::from_secs(3))
}

fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.unwrap_err().kind()
}

#[test]
fn a_token_is_built_and_published_as_a_whole() {
    let fixture = fixture();
    let built = fixture.create("t").unwrap();
    assert!(fixture.store.is_building(&token("t")));
    assert_eq!(fixture.store.tokens().unwrap(), [token("t")]);
    assert!(Arc::ptr_eq(
        &built,
        &fixture.store.token(&token("t")).unwrap()
    ));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&fixture.path("t")), 0o750);
    assert_eq!(fixture.files("t"), [BUILDING, "token.tokenfs-new"]);
    // Others see none, and leave it alone.
    let other = fixture.other();
    other.recover();
    assert!(other.tokens().unwrap().is_empty());
    assert_eq!(
        kind(other.create_token(&token("t"), access(0o700), access(0o600))),
        ErrorKind::Exists
    );
    assert_eq!(kind(fixture.create("t")), ErrorKind::Exists);

    let new = NewObject {
        attributes: Attributes::new(),
        access: access(0o640),
        mtime: None,
    };
    let name = ObjectName::new("a".as_ref()).unwrap();
    built.create(&name, &new, Patience::Now).unwrap();
    built
        .update(
            &ObjectId::Token,
            &mut |attributes| {
                attributes.insert(3, Value::Bytes(vec![1]));
                Ok(())
            },
            None,
            Patience::Now,
        )
        .unwrap();
    assert_eq!(
        kind(fixture.store.publish_token(&token("t"), Patience::Now)),
        ErrorKind::WouldBlock
    );
    fixture.store.publish_token(&token("t"), soon()).unwrap();
    assert!(!fixture.store.is_building(&token("t")));
    assert_eq!(
        fixture.files("t"),
        [
            "a.lock",
            "a.object",
            "generation",
            "token.lock",
            "token.object"
        ]
    );
    for file in ["generation", "token.lock", "token.object", "a.lock"] {
        assert_eq!(mode(&fixture.path("t").join(file)), 0o640, "{file}");
    }
    let published = fixture.store.token(&token("t")).unwrap();
    assert!(!Arc::ptr_eq(&built, &published));
    assert_eq!(published.list(soon()).unwrap().len(), 1);
    assert_eq!(other.tokens().unwrap(), [token("t")]);
    assert_eq!(
        kind(fixture.store.publish_token(&token("t"), soon())),
        ErrorKind::NotFound
    );
    assert_eq!(kind(fixture.create("t")), ErrorKind::Exists);
    assert_eq!(fixture.log.render(), "");
}

#[test]
fn only_a_token_without_objects_is_removed() {
    let fixture = fixture();
    let remove = |name: &str| fixture.store.remove_token(&token(name), soon());
    assert_eq!(kind(remove("none")), ErrorKind::NotFound);
    for (name, file) in [("a", "x.object"), ("b", "notes"), ("c", "sqlite3.db")] {
        fixture.make(name, &["token.object", file]);
        assert_eq!(kind(remove(name)), ErrorKind::NotEmpty, "{name}");
        assert_eq!(fixture.files(name).len(), 2, "{name}");
    }
    fixture.make(
        "d",
        &[
            "token.object",
            "token.lock",
            "generation",
            "gone.lock",
            "gone.tokenfs-new",
        ],
    );
    assert_eq!(
        kind(fixture.store.remove_token(&token("d"), Patience::Now)),
        ErrorKind::WouldBlock
    );
    let opened = fixture.store.token(&token("d")).unwrap();
    remove("d").unwrap();
    assert!(!fixture.path("d").exists());
    assert_eq!(
        kind(opened.list(soon()).and(opened.metadata())),
        ErrorKind::NotFound
    );
    // One that is being built.
    fixture.create("e").unwrap();
    remove("e").unwrap();
    assert!(!fixture.path("e").exists());
    assert!(!fixture.store.is_building(&token("e")));
    fixture.create("e").unwrap();
    fixture.store.publish_token(&token("e"), soon()).unwrap();
    remove("e").unwrap();
    assert_eq!(fixture.log.render(), "");
}

#[test]
fn a_removal_waits_for_the_lock_of_the_token() {
    let fixture = fixture();
    fixture.make("t", &["token.object"]);
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(fixture.path("t/token.object"))
        .unwrap();
    crate::store::lock::lock_exclusive(&file, Patience::Now).unwrap();
    let short = Patience::at_most(Duration::from_millis(50));
    assert_eq!(
        kind(fixture.store.remove_token(&token("t"), short)),
        ErrorKind::Busy
    );
    assert_eq!(fixture.files("t"), ["token.object"]);
    drop(file);
    fixture.store.remove_token(&token("t"), soon()).unwrap();
}

#[test]
fn a_store_that_is_read_only_gets_no_token_and_loses_none() {
    let fixture = fixture();
    fixture.make("t", &["token.object", BUILDING]);
    let options = Options {
        read_only: true,
        ..Options::default()
    };
    let store = Store::open(fixture.directory.path(), options, Arc::default()).unwrap();
    let created = store.create_token(&token("n"), access(0o700), access(0o600));
    assert_eq!(kind(created), ErrorKind::ReadOnly);
    assert_eq!(
        kind(store.remove_token(&token("t"), soon())),
        ErrorKind::ReadOnly
    );
    let change = MetadataChange::default();
    assert_eq!(kind(store.set_metadata(&change)), ErrorKind::ReadOnly);
    store.sync().unwrap();
    store.recover();
    assert_eq!(fixture.files("t").len(), 2);
}

/// Each state in which a crash leaves the directory of a token, and what is made of it.
#[test]
fn a_crash_is_put_right_and_a_second_time_nothing_is_left_to_do() {
    // Before, what is there afterwards (nothing if the directory goes), and how many lines that is worth.
    type State<'a> = (&'a [&'a str], Option<&'a [&'a str]>, usize);
    let states: [State<'_>; 13] = [
        // While it is built.
        (&[BUILDING], None, 1),
        (&[BUILDING, "token.tokenfs-new"], None, 1),
        (
            &[
                BUILDING,
                "token.tokenfs-new",
                "a.object",
                "a.lock",
                "b.tokenfs-new",
                "generation",
            ],
            None,
            1,
        ),
        (
            &[
                BUILDING,
                "sqlite3.db.tokenfs-new",
                "sqlite3.db.tokenfs-new-journal",
                "generation",
            ],
            None,
            1,
        ),
        // Published, and still marked.
        (
            &[BUILDING, "token.object", "a.object"],
            Some(&["a.object", "token.object"]),
            1,
        ),
        (&[BUILDING, "sqlite3.db"], Some(&["sqlite3.db"]), 1),
        // While it is removed: before and after the step that counts.
        (
            &[REMOVING, "token.object", "token.lock"],
            Some(&["token.lock", "token.object"]),
            1,
        ),
        (
            &[REMOVING, "token.tokenfs-new", "token.lock", "generation"],
            None,
            1,
        ),
        (&[REMOVING, "sqlite3.db.tokenfs-new", "generation"], None, 1),
        (&[REMOVING], None, 1),
        // SoftHSM made an object in the middle of that.
        (
            &[REMOVING, "token.tokenfs-new", "a.object"],
            Some(&["a.object", "token.object"]),
            1,
        ),
        // What nobody but a person can put right stays, and is said each time.
        (&[REMOVING, "a.object"], Some(&[REMOVING, "a.object"]), 1),
        (&[BUILDING, "notes"], Some(&[BUILDING, "notes"]), 1),
    ];
    for (before, after, lines) in states {
        let fixture = fixture();
        fixture.make("t", before);
        fixture.make("foreign", &["a.object", "token.tokenfs-new"]);
        // Not while another process is at work.
        let mark = fs::File::options()
            .write(true)
            .open(fixture.path("t").join(before[0]))
            .unwrap();
        crate::store::lock::lock_exclusive(&mark, Patience::Now).unwrap();
        fixture.store.recover();
        assert_eq!(fixture.files("t").len(), before.len(), "{before:?}");
        drop(mark);
        for _ in 0..2 {
            fixture.store.recover();
            match after {
                Some(after) => assert_eq!(fixture.files("t"), after, "{before:?}"),
                None => assert!(!fixture.path("t").exists(), "{before:?}"),
            }
        }
        assert_eq!(fixture.files("foreign").len(), 2);
        let log = fixture.log.render();
        assert_eq!(log.lines().count(), lines, "{before:?}: {log}");
    }
}

#[test]
fn a_name_is_free_again_after_a_crash() {
    let fixture = fixture();
    fixture.make("t", &[BUILDING, "token.tokenfs-new", "a.object"]);
    fixture.create("t").unwrap();
    assert_eq!(fixture.files("t"), [BUILDING, "token.tokenfs-new"]);
    // Before there was a mark; and a SoftHSM started afterwards.
    fixture.make(&format!("{NEW_DIRECTORY}u"), &["generation"]);
    fixture.create("u").unwrap();
    fixture.store.publish_token(&token("u"), soon()).unwrap();
    assert_eq!(
        fixture.files("u"),
        ["generation", "token.lock", "token.object"]
    );
    assert!(!fixture.path(format!("{NEW_DIRECTORY}u")).exists());
    // What is somebody's stays his.
    fixture.make("v", &["notes"]);
    fixture.make("w", &[]);
    for name in ["v", "w"] {
        assert_eq!(kind(fixture.create(name)), ErrorKind::Exists);
        assert_eq!(fs::metadata(fixture.path(name)).unwrap().nlink(), 2);
    }
    // The longest name leaves no room for more.
    let long = "x".repeat(255);
    fixture.create(&long).unwrap();
    fixture.store.publish_token(&token(&long), soon()).unwrap();
    fixture.store.remove_token(&token(&long), soon()).unwrap();
    assert!(!fixture.path(&long).exists());
}

/// Each state of a directory that has not got its name yet, or has lost it.
#[test]
fn a_directory_without_a_name_is_cleared_away_when_nobody_is_at_it() {
    type State<'a> = (&'a [&'a str], Option<(&'a str, &'a [&'a str])>, usize);
    let here = format!("{NEW_DIRECTORY}t");
    let states: [State<'_>; 9] = [
        (&[], None, 1),
        (&["generation"], None, 1),
        (&[BUILDING], None, 1),
        (&[BUILDING, "generation"], None, 1),
        (&[REMOVING, "token.tokenfs-new"], None, 1),
        (&[REMOVING, "sqlite3.db.tokenfs-new", "generation"], None, 1),
        // SoftHSM made an object right before the name was taken away.
        (
            &[REMOVING, "token.tokenfs-new", "a.object"],
            Some(("t", &["a.lock", "a.object", "token.object"])),
            1,
        ),
        // What none of our crashes leaves stays, and is said each time.
        (&["token.object"], Some((&here, &["token.object"])), 1),
        (&["notes"], Some((&here, &["notes"])), 1),
    ];
    for (before, after, lines) in states {
        let fixture = fixture();
        fixture.make(&here, before);
        if before.contains(&"a.object") {
            fs::write(fixture.path(&here).join("a.lock"), b"").unwrap();
        }
        let count = fixture.files(&here).len();
        if let Some(mark) = before
            .iter()
            .find(|name| [BUILDING, REMOVING].contains(*name))
        {
            let mark = fs::File::options()
                .write(true)
                .open(fixture.path(&here).join(mark))
                .unwrap();
            crate::store::lock::lock_exclusive(&mark, Patience::Now).unwrap();
            fixture.store.recover();
            assert_eq!(fixture.files(&here).len(), count, "{before:?}");
        }
        assert!(fixture.store.tokens().unwrap().is_empty() || before == ["token.object"]);
        for _ in 0..2 {
            fixture.store.recover();
        }
        match after {
            Some((name, files)) => assert_eq!(fixture.files(name), files, "{before:?}"),
            None => assert!(!fixture.path(&here).exists(), "{before:?}"),
        }
        assert!(after.is_some_and(|(name, _)| name == here) || !fixture.path(&here).exists());
        let log = fixture.log.render();
        assert_eq!(log.lines().count(), lines, "{before:?}: {log}");
    }
}

/// Two processes that make one token, and a third that puts things right meanwhile: one gets it, and nothing is left.
#[test]
fn one_of_two_makers_gets_the_name_whatever_is_put_right_meanwhile() {
    let fixture = fixture();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let stores = [fixture.other(), fixture.other(), fixture.other()];
    std::thread::scope(|scope| {
        let [first, second, third] = &stores;
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                third.recover();
            }
        });
        for round in 0..25 {
            let name = format!("t{round}");
            let token = token(&name);
            let make = move |store: &Store, token: &TokenName| {
                let made = store.create_token(token, access(0o700), access(0o600));
                match made {
                    Ok(_) => {
                        store.publish_token(token, soon()).unwrap();
                        1
                    }
                    Err(error) => {
                        let expected = [ErrorKind::Exists, ErrorKind::Busy];
                        assert!(expected.contains(&error.kind()), "{error}");
                        0
                    }
                }
            };
            let other = token.clone();
            let beside = scope.spawn(move || make(second, &other));
            let made = make(first, &token) + beside.join().unwrap();
            assert!(made <= 1, "{name}: made twice");
            assert_eq!(fixture.path(&name).exists(), made == 1, "{name}");
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    fixture.store.recover();
    for entry in fs::read_dir(fixture.directory.path()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(!name.starts_with(NEW_DIRECTORY), "{name}");
    }
}

/// A journal that a crashed writer left counts, whoever looks first.
#[test]
fn a_hot_journal_is_rolled_back() {
    let fixture = fixture();
    let options = Options {
        backend: Backend::Db,
        ..Options::default()
    };
    let open = || {
        let log = Arc::clone(&fixture.log);
        Store::open(fixture.directory.path(), options.clone(), log).unwrap()
    };
    let store = open();
    store
        .create_token(&token("t"), access(0o700), access(0o600))
        .unwrap();
    store.publish_token(&token("t"), soon()).unwrap();
    drop(store);
    let (database, journal) = (
        fixture.path("t/sqlite3.db"),
        fixture.path("t/sqlite3.db-journal"),
    );
    let whole = fs::read(&database).unwrap();
    // What a process has on disk that dies in the middle of a transaction that is too large for its memory.
    let torn = {
        let writer = rusqlite::Connection::open(&database).unwrap();
        writer
            .execute_batch(
                "pragma cache_size = 1; begin immediate;
                 insert into attribute_binary (value) values (zeroblob(100000)), (zeroblob(100000));
                 update object set id = 5;",
            )
            .unwrap();
        (fs::read(&database).unwrap(), fs::read(&journal).unwrap())
    };
    assert!(torn.0 != whole && torn.1.len() > 512, "nothing was spilled");
    fs::write(&database, &torn.0).unwrap();
    // Without a header it is none, and is left to SQLite.
    fs::write(&journal, vec![0; torn.1.len()]).unwrap();
    open().recover();
    assert_eq!(fs::read(&database).unwrap(), torn.0);
    fs::write(&journal, &torn.1).unwrap();
    let read_only = Options {
        read_only: true,
        ..options.clone()
    };
    Store::open(fixture.directory.path(), read_only, Arc::default())
        .unwrap()
        .recover();
    assert_eq!(fs::read(&journal).unwrap(), torn.1);
    open().recover();
    assert!(!journal.exists());
    assert_eq!(fs::read(&database).unwrap(), whole);
    assert_eq!(fixture.log.render().lines().count(), 1);
    open().recover();
    assert_eq!(fixture.log.render().lines().count(), 1);
}

#[test]
fn leftovers_of_writes_in_tokens_are_put_right() {
    let fixture = fixture();
    fixture.make(
        "t",
        &["token.object", "a.object", "a.tokenfs-new", "b.tokenfs-new"],
    );
    fixture.store.recover();
    assert_eq!(
        fixture.files("t"),
        ["a.lock", "a.object", "generation", "token.object"]
    );
}

/// A SoftHSM that had the token open wrote its copy of the token's own object, or was about to, when a crash came.
#[test]
fn what_is_left_of_the_tokens_own_object_takes_the_place_of_what_nobody_could_use() {
    use crate::pkcs11::{CKA_OS_TOKENFLAGS, CKA_OS_TOKENSERIAL};
    use crate::store::attribute::Value;
    let mut own = Attributes::new();
    own.insert(
        CKA_OS_TOKENSERIAL,
        Value::Bytes(b"0123456789abcdef".to_vec()),
    );
    own.insert(CKA_OS_TOKENFLAGS, Value::Ulong(42));
    let whole = encode(7, &own);
    own.insert(CKA_OS_TOKENFLAGS, Value::Ulong(43));
    let other = encode(8, &own);
    let (cut, damaged) = (&whole[..whole.len() - 1], &b"nothing"[..]);
    for mark in [Some(BUILDING), Some(REMOVING), None] {
        for (present, left, wanted, stays) in [
            (&b""[..], &whole[..], &whole[..], false),
            (cut, &whole, &whole, false),
            // It is whole, and later perhaps.
            (&other, &whole, &other, false),
            (&other, damaged, &other, false),
            // Nothing is lost that somebody could need.
            (cut, cut, cut, true),
        ] {
            let fixture = fixture();
            fixture.make("t", &["generation", "token.lock", "x.object", "x.lock"]);
            fs::write(fixture.path("t/token.object"), present).unwrap();
            fs::write(fixture.path("t/token.tokenfs-new"), left).unwrap();
            if let Some(mark) = mark {
                fs::write(fixture.path("t").join(mark), b"").unwrap();
            }
            fixture.store.recover();
            assert_eq!(fs::read(fixture.path("t/token.object")).unwrap(), wanted);
            let left = fixture.path("t/token.tokenfs-new").exists();
            assert_eq!(left, stays, "{mark:?}: {}", fixture.log.render());
        }
    }
}
