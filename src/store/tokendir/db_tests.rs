//! Removing tokens of the `db` backend beside somebody who writes them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, ffi};

use super::*;
use crate::store::attribute::Attributes;
use crate::store::leftover::REMOVING;
use crate::store::{Access, NewObject, ObjectName, Patience};

const UUID: &str = "b7e9f2a1-aaaa-bbbb-cccc-111111111111";
const HIDDEN: &str = "sqlite3.db.tokenfs-new";

fn soon() -> Patience {
    Patience::at_most(Duration::from_secs(10))
}

fn name(name: &str) -> TokenName {
    TokenName::new(name.as_ref()).unwrap()
}

fn access(mode: u32) -> Access {
    Access {
        mode,
        uid: nix::unistd::getuid().as_raw(),
        gid: nix::unistd::getgid().as_raw(),
    }
}

struct Fixture {
    directory: tempfile::TempDir,
    store: Store,
    log: Arc<Diagnostics>,
}

fn fixture() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let log = Arc::new(Diagnostics::new());
    let options = Options {
        backend: Backend::Db,
        ..Options::default()
    };
    let store = Store::open(directory.path(), options, Arc::clone(&log)).unwrap();
    Fixture {
        directory,
        store,
        log,
    }
}

impl Fixture {
    /// A token, and the path of its directory.
    fn make(&self, token: &str, with_object: bool) -> PathBuf {
        let made = self
            .store
            .create_token(&name(token), access(0o700), access(0o600));
        if with_object {
            let new = NewObject {
                attributes: Attributes::new(),
                access: access(0o600),
                mtime: None,
            };
            let object = ObjectName::new(UUID.as_ref()).unwrap();
            made.unwrap().create(&object, &new, soon()).unwrap();
        }
        self.store.publish_token(&name(token), soon()).unwrap();
        self.directory.path().join(token)
    }

    fn objects(&self, token: &str) -> Result<usize> {
        let token = self.store.token(&name(token))?;
        token.list(soon()).map(|names| names.len())
    }
}

/// As SoftHSM does it, in a connection of its own.
fn insert(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute_batch("begin immediate; insert into object default values; commit")
}

#[test]
fn nobody_commits_while_a_database_loses_its_name_nor_afterwards() {
    let fixture = fixture();
    let directory = fixture.make("t", false);
    let theirs = Connection::open(directory.join(DATABASE)).unwrap();
    theirs.busy_timeout(Duration::ZERO).unwrap();
    let (options, log) = (Options::default(), Arc::clone(&fixture.log));
    let token = DbToken::open(name("t"), &directory, options, log).unwrap();
    token
        .hide(soon(), &mut || {
            let error = insert(&theirs).unwrap_err();
            assert_eq!(error.sqlite_error_code(), Some(ErrorCode::DatabaseBusy));
            fs::rename(directory.join(DATABASE), directory.join(HIDDEN)).unwrap();
            let error = insert(&theirs).unwrap_err();
            assert_eq!(error.sqlite_error_code(), Some(ErrorCode::DatabaseBusy));
            Ok(())
        })
        .unwrap();
    let error = insert(&theirs).unwrap_err();
    let extended = error.sqlite_error().map(|error| error.extended_code);
    assert_eq!(extended, Some(ffi::SQLITE_READONLY_DBMOVED));
    let _ = theirs.execute_batch("rollback");
    // The name back, and it goes on.
    fs::rename(directory.join(HIDDEN), directory.join(DATABASE)).unwrap();
    insert(&theirs).unwrap();
    let refused = token.hide(soon(), &mut || panic!("there is an object"));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::NotEmpty);
}

/// Whoever was told that an object is stored finds it.
#[test]
fn a_token_goes_or_has_what_was_put_into_it() {
    let fixture = fixture();
    let (mut kept, mut gone) = (0, 0);
    for round in 0..60u64 {
        let text = format!("t{round}");
        let directory = fixture.make(&text, false);
        let theirs = Connection::open(directory.join(DATABASE)).unwrap();
        theirs.busy_timeout(Duration::from_secs(5)).unwrap();
        let barrier = Barrier::new(2);
        let (removed, inserted) = std::thread::scope(|scope| {
            let barrier = &barrier;
            let inserting = scope.spawn(move || {
                barrier.wait();
                std::thread::sleep(Duration::from_micros(round * 100));
                insert(&theirs)
            });
            barrier.wait();
            let removed = fixture.store.remove_token(&name(&text), soon());
            (removed, inserting.join().unwrap())
        });
        match (removed, inserted) {
            (Err(error), Ok(())) => {
                assert_eq!(error.kind(), ErrorKind::NotEmpty, "{error}");
                assert_eq!(fixture.objects(&text).unwrap(), 1);
                assert!(!directory.join(REMOVING).exists());
                kept += 1;
            }
            (Ok(()), Err(_)) => {
                assert!(!directory.exists());
                gone += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    println!("{kept} kept, {gone} gone");
    assert_eq!(fixture.log.render(), "");
}

/// What a crash or an error leaves of a removal.
#[test]
fn a_hidden_database_with_objects_is_put_back() {
    for staged in [false, true] {
        for (with_object, readable) in [(true, true), (false, true), (false, false)] {
            let fixture = fixture();
            let mut directory = fixture.make("t", with_object);
            fs::rename(directory.join(DATABASE), directory.join(HIDDEN)).unwrap();
            if !readable {
                fs::write(directory.join(HIDDEN), b"this is no database").unwrap();
            }
            fs::write(directory.join(REMOVING), b"").unwrap();
            if staged {
                let other = fixture.directory.path().join(".tokenfs-new-t");
                fs::rename(&directory, &other).unwrap();
                directory = other;
            }
            assert!(fixture.store.token(&name("t")).is_err());
            fixture.store.recover();
            let what = format!("{staged} {with_object} {readable}");
            if with_object {
                assert_eq!(fixture.objects("t").unwrap(), 1, "{what}");
            } else if readable {
                assert!(!directory.exists(), "{what}");
                assert!(fixture.objects("t").is_err(), "{what}");
            } else {
                let back = Path::new("t").join(DATABASE);
                assert!(fixture.directory.path().join(back).exists(), "{what}");
            }
            assert!(!fixture.directory.path().join("t").join(REMOVING).exists());
            let said = fixture.log.render();
            fixture.store.recover();
            assert_eq!(fixture.log.render(), said, "{what}");
        }
    }
}

#[test]
fn a_removal_waits_for_a_transaction_and_no_longer_than_that() {
    let fixture = fixture();
    let directory = fixture.make("t", false);
    let theirs = Connection::open(directory.join(DATABASE)).unwrap();
    theirs.execute_batch("begin immediate").unwrap();
    let short = Patience::at_most(Duration::from_millis(50));
    let removed = fixture.store.remove_token(&name("t"), short);
    assert_eq!(removed.unwrap_err().kind(), ErrorKind::Busy);
    assert!(directory.join(DATABASE).exists());
    assert!(!directory.join(REMOVING).exists());
    theirs.execute_batch("rollback").unwrap();
    fixture.store.remove_token(&name("t"), soon()).unwrap();
    assert!(!directory.exists());
}
