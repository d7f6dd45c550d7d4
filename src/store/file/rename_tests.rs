//! Renaming: what is on disk afterwards, what is refused, and what becomes of a crash.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime};

use super::fixture::{
    Fixture, LABEL, files, fixture, generation, hold, id, name, new_object, sample, set_label, soon,
};
use super::*;
use crate::diagnostics::Diagnostics;
use crate::error::{ErrorKind, Result};
use crate::store::ObjectId;
use crate::store::attribute::Value;
use crate::store::layout::LayoutFile;
use crate::store::{Access, NewObject, Options, Patience, Token, TokenName};

/// What is there where there is the object `a` alone.
const WHOLE: [&str; 4] = ["a.lock", "a.object", "generation", "token.object"];

/// Something has happened to what has that name.
fn look_after(fixture: &Fixture, called: &str) {
    let file = LayoutFile::Object(ObjectId::Object(name(called)));
    fixture.token.look_after(&file, soon()).unwrap();
}

fn rename(fixture: &Fixture, from: &str, to: &str) -> Result<()> {
    fixture.token.rename(&name(from), &name(to), soon())
}

#[test]
fn an_object_is_the_same_file_under_another_name_and_softhsm_is_told() {
    // In either order of the locks.
    for to in ["b", "A"] {
        let fixture = fixture();
        fs::set_permissions(fixture.path("a.object"), fs::Permissions::from_mode(0o604)).unwrap();
        let before = fs::metadata(fixture.path("a.object")).unwrap();
        let old = fixture.token.object(&id("a"), soon()).unwrap();
        rename(&fixture, "a", to).unwrap();
        let after = fs::metadata(fixture.path(&format!("{to}.object"))).unwrap();
        assert_eq!(after.ino(), before.ino());
        assert_eq!(after.mode(), before.mode());
        assert_eq!(after.modified().unwrap(), before.modified().unwrap());
        let lock = fs::metadata(fixture.path(&format!("{to}.lock"))).unwrap();
        assert_eq!(lock.mode() & 0o7777, 0o604);
        let (object, lock) = (format!("{to}.object"), format!("{to}.lock"));
        let mut expected = vec![&*lock, &*object, "generation", "token.object"];
        expected.sort_unstable();
        assert_eq!(files(&fixture), expected);
        assert_eq!(generation(&fixture), 9);
        assert_eq!(*fixture.token.list(soon()).unwrap(), [name(to)]);
        let gone = fixture.token.object(&id("a"), soon()).unwrap_err();
        assert_eq!(gone.kind(), ErrorKind::NotFound);
        let new = fixture.token.object(&id(to), soon()).unwrap();
        assert_eq!(new.attributes, old.attributes);
        // A SoftHSM that knows another object by that name has to see that it is not this one.
        assert!(new.generation.unwrap() > 1 << 40 && old.generation.unwrap() < 1 << 40);
        fixture.token.sync(soon()).unwrap();
        set_label(&fixture, &id(to), b"other").unwrap();
        rename(&fixture, to, to).unwrap();
        rename(&fixture, to, "a").unwrap();
        assert_eq!(files(&fixture), WHOLE);
        assert_eq!(fixture.diagnostics.render(), "");
    }
}

#[test]
fn what_cannot_be_renamed_stays_as_it_is() {
    let fixture = fixture();
    fixture.write("b.object", &encode(1, &sample()));
    thread::sleep(born::GROWN);
    let all = files(&fixture);
    for (from, to, kind) in [
        ("a", "b", ErrorKind::Exists),
        ("b", "a", ErrorKind::Exists),
        ("c", "d", ErrorKind::NotFound),
        ("c", "a", ErrorKind::NotFound),
        ("c", "c", ErrorKind::NotFound),
        ("token", "c", ErrorKind::NotFound),
        ("a", "token", ErrorKind::Invalid),
        ("a", &"x".repeat(250), ErrorKind::NameTooLong),
    ] {
        let error = rename(&fixture, from, to).unwrap_err();
        assert_eq!(error.kind(), kind, "{from} {to}");
        assert_eq!(files(&fixture), all, "{from} {to}");
    }
    let now = fixture
        .token
        .rename(&name("a"), &name("c"), Patience::Now)
        .unwrap_err();
    assert_eq!(now.kind(), ErrorKind::WouldBlock);
    // SoftHSM cannot be told.
    fs::remove_file(fixture.path("generation")).unwrap();
    fs::create_dir(fixture.path("generation")).unwrap();
    rename(&fixture, "a", "c").unwrap_err();
    assert_eq!(files(&fixture), all);
    // A damaged one has a name like any other.
    fs::remove_dir(fixture.path("generation")).unwrap();
    fixture.write("generation", &7u64.to_be_bytes());
    fixture.write("a.object", b"damaged");
    rename(&fixture, "a", "c").unwrap();
    assert_eq!(fs::read(fixture.path("c.object")).unwrap(), b"damaged");
}

#[test]
fn a_transaction_under_either_name_is_waited_for() {
    for lock in ["a.lock", "b.lock"] {
        for to in ["b", "0"] {
            let fixture = fixture();
            let lock = lock.replace('b', to);
            let had_lock = fixture.path(&lock).exists();
            if !had_lock {
                fixture.write(&lock, b"");
            }
            let mut holder = hold(&fixture.path(&lock), 60.0);
            let short = Patience::at_most(Duration::from_millis(60));
            let error = fixture.token.rename(&name("a"), &name(to), short);
            assert_eq!(error.unwrap_err().kind(), ErrorKind::Busy, "{lock}");
            assert!(fixture.path("a.object").exists());
            // What is stored meanwhile is what is renamed.
            let mut changed = sample();
            changed.insert(LABEL, Value::Bytes(b"changed".to_vec()));
            fixture.write("a.object", &encode(6, &changed));
            let killer = thread::spawn(move || {
                thread::sleep(Duration::from_millis(100));
                holder.kill().unwrap();
                holder.wait().unwrap();
            });
            rename(&fixture, "a", to).unwrap();
            killer.join().unwrap();
            let object = fixture.token.object(&id(to), soon()).unwrap();
            assert_eq!(object.attributes, changed);
            assert_eq!(files(&fixture).len(), 4);
        }
    }
}

#[test]
fn an_object_that_softhsm_may_still_be_making_keeps_its_name_until_then() {
    let fixture = fixture();
    fixture.write("b.object", &encode(1, &sample()));
    let short = Patience::at_most(Duration::from_millis(50));
    let error = fixture.token.rename(&name("b"), &name("c"), short);
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Busy);
    assert!(!fixture.path("c.lock").exists());
    rename(&fixture, "b", "c").unwrap();
}

#[test]
fn what_a_crash_left_of_the_object_is_put_right_before() {
    let fixture = fixture();
    let journal = journal::Journal {
        old: encode(5, &sample()),
        new: encode(6, &sample()),
    };
    fixture.write("a.tokenfs-journal", &journal.encode());
    fixture.write("a.tokenfs-new", &encode(4, &sample()));
    fixture.write("b.tokenfs-journal", &journal.encode());
    fixture.write("b.tokenfs-new", &encode(4, &sample()));
    rename(&fixture, "a", "b").unwrap();
    assert_eq!(files(&fixture).len(), 4);
    assert_eq!(fixture.token.list(soon()).unwrap().len(), 1);
}

/// Between each two steps.
#[test]
fn a_crash_leaves_the_object_under_one_name() {
    for (there, files_left) in [("a", ["a.object", "a.lock"]), ("b", ["b.object", "b.lock"])] {
        for marked in [true, false] {
            let fixture = fixture();
            fixture.write("b.lock", b"");
            if marked {
                fixture.write("a.tokenfs-new", b"");
            }
            if there == "b" {
                fs::rename(fixture.path("a.object"), fixture.path("b.object")).unwrap();
            }
            fixture.token.recover();
            let mut expected = vec!["generation", "token.object"];
            expected.extend(files_left);
            expected.sort_unstable();
            assert_eq!(files(&fixture), expected, "{there} {marked}");
            assert_eq!(generation(&fixture), if marked { 9 } else { 7 });
            assert_eq!(*fixture.token.list(soon()).unwrap(), [name(there)]);
        }
    }
}

#[test]
fn in_a_token_that_is_being_built_nobody_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("new");
    fs::create_dir(&path).unwrap();
    let tokendir = fs::File::open(directory.path()).unwrap();
    let access = Access {
        mode: 0o640,
        uid: nix::unistd::getuid().as_raw(),
        gid: nix::unistd::getgid().as_raw(),
    };
    let token = FileToken::build(
        tokendir.as_fd(),
        TokenName::new("new".as_ref()).unwrap(),
        &path,
        access,
        Options::default(),
        Arc::new(Diagnostics::new()),
    )
    .unwrap();
    let new = NewObject {
        attributes: sample(),
        access,
        mtime: None,
    };
    let now = Patience::Now;
    token.create(&name("a"), &new, now).unwrap();
    token.rename(&name("a"), &name("b"), now).unwrap();
    assert!(!path.join("generation").exists());
    assert!(token.pending().is_empty());
    assert_eq!(*token.list(now).unwrap(), [name("b")]);
    token.publish().unwrap();
    let object = token.object(&id("b"), soon()).unwrap();
    assert!(object.attributes.bytes(LABEL).is_some());
    assert!(!path.join("a.lock").exists());
}

/// What has the old name of an object that was renamed or removed, for another reason than that a SoftHSM was late.
#[test]
fn what_another_mount_or_a_backup_puts_there_stays_and_no_lock_is_left() {
    let copy = |fixture: &Fixture| fixture.write("a.object", &encode(5, &sample()));
    let of_another_mount = |fixture: &Fixture| {
        let parent = fs::File::open(fixture.directory.path().parent().unwrap()).unwrap();
        let token = FileToken::open(
            parent.as_fd(),
            fixture.token.name().clone(),
            fixture.directory.path(),
            Options::default(),
            Arc::new(Diagnostics::new()),
        );
        let new = new_object(sample());
        token.unwrap().create(&name("a"), &new, soon()).unwrap();
    };
    let old = |fixture: &Fixture| {
        let mut attributes = sample();
        attributes.insert(LABEL, Value::Bytes(b"old".to_vec()));
        fixture.write("a.object", &encode(1, &attributes));
        let path = fixture.path("a.object");
        let file = fs::File::options().write(true).open(path).unwrap();
        let yesterday = SystemTime::now() - Duration::from_secs(86400);
        file.set_modified(yesterday).unwrap();
    };
    let puts: [&dyn Fn(&Fixture); 3] = [&copy, &of_another_mount, &old];
    for put in puts {
        for to in [Some("b"), Some("A"), None] {
            let fixture = fixture();
            match to {
                Some(to) => rename(&fixture, "a", to).unwrap(),
                None => fixture.token.remove(&name("a"), soon()).unwrap(),
            }
            put(&fixture);
            let bytes = fs::read(fixture.path("a.object")).unwrap();
            look_after(&fixture, "a");
            look_after(&fixture, "a");
            assert_eq!(fs::read(fixture.path("a.object")).unwrap(), bytes);
            let said = fixture.diagnostics.render();
            let expected = match to {
                Some(_) => "there are both",
                None => "was not made through this mount",
            };
            assert_eq!(said.lines().count(), 1, "{said}");
            assert!(said.contains(expected), "{said}");
            let Some(to) = to else { continue };
            let renamed = fs::read(fixture.path(&format!("{to}.object"))).unwrap();
            assert_eq!(decode(&renamed).unwrap().attributes, sample());
        }
    }
}

#[test]
fn what_has_its_old_name_again_is_looked_at_by_nobody() {
    let fixture = fixture();
    for back in ["b", "A"] {
        rename(&fixture, "a", back).unwrap();
        rename(&fixture, back, "a").unwrap();
        look_after(&fixture, "a");
        look_after(&fixture, back);
        assert_eq!(files(&fixture), WHOLE);
    }
    fixture.token.remove(&name("a"), soon()).unwrap();
    let new = new_object(sample());
    fixture.token.create(&name("a"), &new, soon()).unwrap();
    look_after(&fixture, "a");
    assert_eq!(fixture.diagnostics.render(), "");
    assert_eq!(files(&fixture), WHOLE);
}
