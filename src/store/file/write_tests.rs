//! Writing: each operation, what it leaves on disk, what it refuses, and what becomes of a crash.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::tests::{CLASS, Fixture, LABEL, TEMPLATE, hold, id, sample, soon};
use super::*;
use crate::diagnostics::Diagnostics;
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::{Attributes, Value};
use crate::store::{
    Access, MetadataChange, NewObject, ObjectId, ObjectName, Options, Patience, Target, Time,
    Token, TokenName,
};

/// A token as SoftHSM leaves it, and the object `a` in it, which is no newborn.
pub(super) fn fixture() -> Fixture {
    let fixture = Fixture::new();
    fixture.write("generation", &7u64.to_be_bytes());
    fixture.write("a.object", &encode(5, &sample()));
    fixture.write("a.lock", b"");
    thread::sleep(born::GROWN);
    fixture
}

fn name(name: &str) -> ObjectName {
    ObjectName::new(name.as_ref()).unwrap()
}

pub(super) fn set_label(fixture: &Fixture, object: &ObjectId, label: &[u8]) -> Result<()> {
    let value = Value::Bytes(label.to_vec());
    fixture.token.update(
        object,
        &mut |attributes| {
            attributes.insert(LABEL, value.clone());
            Ok(())
        },
        None,
        soon(),
    )
}

fn label(fixture: &Fixture, object: &ObjectId) -> Vec<u8> {
    let object = fixture.token.object(object, soon()).unwrap();
    object.attributes.bytes(LABEL).unwrap().to_vec()
}

fn new_object(attributes: Attributes) -> NewObject {
    NewObject {
        attributes,
        access: Access {
            mode: 0o640,
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
        },
        mtime: None,
    }
}

pub(super) fn files(fixture: &Fixture) -> Vec<String> {
    let mut files: Vec<String> = fs::read_dir(fixture.directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    files
}

pub(super) fn generation(fixture: &Fixture) -> u64 {
    let bytes = fs::read(fixture.path("generation")).unwrap();
    u64::from_be_bytes(bytes.try_into().unwrap())
}

#[test]
fn an_update_is_a_new_file_with_the_next_generation_and_the_old_looks() {
    let fixture = fixture();
    fs::set_permissions(fixture.path("a.object"), fs::Permissions::from_mode(0o604)).unwrap();
    let before = fs::metadata(fixture.path("a.object")).unwrap();
    set_label(&fixture, &id("a"), b"other").unwrap();
    let after = fs::metadata(fixture.path("a.object")).unwrap();
    assert_ne!(before.ino(), after.ino());
    assert_eq!(after.mode() & 0o7777, 0o604);
    let decoded = decode(&fs::read(fixture.path("a.object")).unwrap()).unwrap();
    assert_eq!(decoded.generation, Some(6));
    assert_eq!(decoded.attributes.bytes(LABEL), Some(&b"other"[..]));
    assert_eq!(decoded.attributes.len(), sample().len());
    assert_eq!(generation(&fixture), 7, "nothing came or went");
    assert_eq!(
        files(&fixture),
        ["a.lock", "a.object", "generation", "token.object"]
    );
    // The file that is there now was made here and needs no time to grow up.
    let start = std::time::Instant::now();
    set_label(&fixture, &id("a"), b"third").unwrap();
    assert!(start.elapsed() < born::GROWN / 2);
    assert_eq!(label(&fixture, &id("a")), b"third");
}

#[test]
fn a_generation_skips_zero() {
    for (stored, next) in [(u64::MAX, 1), (0, 1), (41, 42)] {
        let fixture = fixture();
        fixture.write("a.object", &encode(stored, &sample()));
        set_label(&fixture, &id("a"), b"x").unwrap();
        let decoded = decode(&fs::read(fixture.path("a.object")).unwrap()).unwrap();
        assert_eq!(decoded.generation, Some(next));
    }
}

#[test]
fn what_is_left_as_it_was_gets_a_time_and_no_generation() {
    let fixture = fixture();
    let bytes = fs::read(fixture.path("a.object")).unwrap();
    let inode = fs::metadata(fixture.path("a.object")).unwrap().ino();
    let time = UNIX_EPOCH + Duration::from_nanos(1_234_567_890_123_456_789);
    let update = |mtime| {
        fixture
            .token
            .update(&id("a"), &mut |_| Ok(()), mtime, soon())
    };
    update(Some(time)).unwrap();
    let metadata = fs::metadata(fixture.path("a.object")).unwrap();
    assert_eq!(metadata.modified().unwrap(), time);
    assert_eq!(metadata.ino(), inode);
    assert_eq!(fs::read(fixture.path("a.object")).unwrap(), bytes);
    update(None).unwrap();
    let now = fs::metadata(fixture.path("a.object")).unwrap().modified();
    assert!(now.unwrap() > SystemTime::now() - Duration::from_secs(5));
    // With a change the time is that of the new file.
    fixture
        .token
        .update(
            &id("a"),
            &mut |attributes| {
                attributes.insert(LABEL, Value::Bytes(vec![1]));
                Ok(())
            },
            Some(time),
            soon(),
        )
        .unwrap();
    let metadata = fs::metadata(fixture.path("a.object")).unwrap();
    assert_eq!(metadata.modified().unwrap(), time);
}

/// Each edit that is refused, and that nothing changes with it.
#[test]
fn what_cannot_be_stored_is_refused_and_the_old_stays() {
    let fixture = fixture();
    let bytes = fs::read(fixture.path("a.object")).unwrap();
    type Edit = fn(&mut Attributes) -> Result<()>;
    let edits: [(Edit, ErrorKind); 6] = [
        (
            |_| Err(Error::new(ErrorKind::NotEmpty, "its own")),
            ErrorKind::NotEmpty,
        ),
        (
            |a| {
                a.insert(LABEL, Value::Ulong(1));
                Ok(())
            },
            ErrorKind::Invalid,
        ),
        (
            |a| {
                let mut map = Attributes::new();
                map.insert(CLASS, Value::Map(Attributes::new()));
                a.insert(TEMPLATE, Value::Map(map));
                Ok(())
            },
            ErrorKind::Invalid,
        ),
        (
            |a| {
                let mut map = Attributes::new();
                map.insert(CLASS, Value::Ulong(1));
                map.insert(CLASS, Value::Bool(true));
                a.insert(TEMPLATE, Value::Map(map));
                Ok(())
            },
            ErrorKind::Invalid,
        ),
        (
            |a| {
                a.insert(2, Value::Bool(true));
                Ok(())
            },
            ErrorKind::Invalid,
        ),
        (
            |a| {
                a.insert(CKA_TOKENFS_FILLER, Value::Bytes(vec![0]));
                Ok(())
            },
            ErrorKind::Invalid,
        ),
    ];
    for (index, (edit, kind)) in edits.into_iter().enumerate() {
        let mut edit = edit;
        let error = fixture
            .token
            .update(&id("a"), &mut edit, None, soon())
            .unwrap_err();
        assert_eq!(error.kind(), kind, "edit {index}: {error}");
        assert_eq!(fs::read(fixture.path("a.object")).unwrap(), bytes);
    }
    assert_eq!(files(&fixture).len(), 4);
}

#[test]
fn nobody_who_cannot_wait_may_write() {
    let fixture = fixture();
    let token = &fixture.token;
    let now = Patience::Now;
    let change = MetadataChange::default();
    for result in [
        token.update(&id("a"), &mut |_| Ok(()), None, now),
        token.create(&name("b"), &new_object(sample()), now),
        token.remove(&name("a"), now),
        token.set_metadata(&Target::Directory, &change, now),
        token.sync(now),
    ] {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::WouldBlock);
    }
    assert_eq!(files(&fixture).len(), 4);
}

#[test]
fn a_store_that_is_read_only_is_not_written() {
    let fixture = fixture();
    fixture.write("a.tokenfs-new", b"left");
    let path = fixture.directory.path();
    let parent = fs::File::open(path.parent().unwrap()).unwrap();
    let options = Options {
        read_only: true,
        ..Options::default()
    };
    let token_name = TokenName::new(path.file_name().unwrap()).unwrap();
    let token = FileToken::open(
        parent.as_fd(),
        token_name,
        path,
        options,
        Arc::new(Diagnostics::new()),
    )
    .unwrap();
    let change = MetadataChange {
        mode: Some(0),
        ..MetadataChange::default()
    };
    for result in [
        token.update(&id("a"), &mut |_| Ok(()), None, soon()),
        token.create(&name("b"), &new_object(sample()), soon()),
        token.remove(&name("a"), soon()),
        token.set_metadata(&Target::Object(id("a")), &change, soon()),
    ] {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
    }
    token.recover();
    assert_eq!(files(&fixture).len(), 5);
}

#[test]
fn the_token_is_rewritten_in_place_whether_longer_or_shorter() {
    let fixture = fixture();
    let inode = fs::metadata(fixture.path("token.object")).unwrap().ino();
    for (round, length) in [10usize, 3000, 2990, 2976, 2000, 0, 700]
        .into_iter()
        .enumerate()
    {
        set_label(&fixture, &ObjectId::Token, &vec![b'x'; length]).unwrap();
        let metadata = fs::metadata(fixture.path("token.object")).unwrap();
        assert_eq!(metadata.ino(), inode);
        let decoded = decode(&fs::read(fixture.path("token.object")).unwrap()).unwrap();
        assert_eq!(decoded.generation, Some(2 + round as u64));
        assert_eq!(metadata.len() as usize, 8 + 24 + length);
        assert_eq!(label(&fixture, &ObjectId::Token).len(), length);
    }
    assert_eq!(files(&fixture).len(), 4);
}

#[test]
fn an_object_appears_whole_with_its_lock_file_and_softhsm_is_told() {
    let fixture = fixture();
    let time = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let mut new = new_object(sample());
    new.mtime = Some(time);
    fixture.token.create(&name("b"), &new, soon()).unwrap();
    let object = fs::metadata(fixture.path("b.object")).unwrap();
    assert_eq!(object.modified().unwrap(), time);
    assert_eq!((object.mode() & 0o7777, object.nlink()), (0o640, 1));
    let lock = fs::metadata(fixture.path("b.lock")).unwrap();
    assert_eq!((lock.mode() & 0o7777, lock.len()), (0o640, 0));
    assert_eq!(generation(&fixture), 8);
    let found = fixture.token.object(&id("b"), soon()).unwrap();
    assert_eq!((found.generation, &found.attributes), (Some(1), &sample()));
    assert_eq!(
        files(&fixture),
        [
            "a.lock",
            "a.object",
            "b.lock",
            "b.object",
            "generation",
            "token.object"
        ]
    );
}

#[test]
fn what_cannot_be_made_leaves_nothing_behind() {
    let fixture = fixture();
    symlink("nowhere", fixture.path("link.object")).unwrap();
    let before = files(&fixture);
    let mut secret = sample();
    secret.insert(2, Value::Bool(true));
    let long = "x".repeat(240);
    for (stem, attributes, kind) in [
        ("a", sample(), ErrorKind::Exists),
        ("link", sample(), ErrorKind::Exists),
        ("token", sample(), ErrorKind::Invalid),
        (long.as_str(), sample(), ErrorKind::NameTooLong),
        ("secret", secret, ErrorKind::Invalid),
    ] {
        let result = fixture
            .token
            .create(&name(stem), &new_object(attributes), soon());
        assert_eq!(result.unwrap_err().kind(), kind, "{stem}");
    }
    // SoftHSM could not be told: then there is no object either, but the lock file that was there stays.
    fs::remove_file(fixture.path("generation")).unwrap();
    fs::create_dir(fixture.path("generation")).unwrap();
    fixture.write("orphan.lock", b"");
    for stem in ["b", "orphan"] {
        let result = fixture
            .token
            .create(&name(stem), &new_object(sample()), soon());
        assert!(result.is_err());
    }
    let mut expected = before;
    expected.push("orphan.lock".to_owned());
    expected.sort();
    assert_eq!(files(&fixture), expected);
    assert_eq!(generation_error(&fixture), ErrorKind::NotFound);
}

fn generation_error(fixture: &Fixture) -> ErrorKind {
    fixture.token.remove(&name("a"), soon()).unwrap_err().kind()
}

#[test]
fn the_longest_name_that_fits_is_made_and_removed() {
    let fixture = fixture();
    let long = name(&"y".repeat(239));
    fixture
        .token
        .create(&long, &new_object(sample()), soon())
        .unwrap();
    set_label(&fixture, &ObjectId::Object(long.clone()), b"z").unwrap();
    fixture.token.remove(&long, soon()).unwrap();
    assert_eq!(files(&fixture).len(), 4);
    // One of SoftHSM's that leaves no room can be removed, and is not changed.
    let longer = "z".repeat(248);
    fixture.write(&format!("{longer}.object"), &encode(1, &sample()));
    let error = set_label(&fixture, &id(&longer), b"z").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NameTooLong);
    fixture.token.remove(&name(&longer), soon()).unwrap();
    assert_eq!(files(&fixture).len(), 4);
}

#[test]
fn a_removed_object_is_gone_with_its_lock_file_and_softhsm_is_told() {
    let fixture = fixture();
    fixture.token.remove(&name("a"), soon()).unwrap();
    assert_eq!(files(&fixture), ["generation", "token.object"]);
    assert_eq!(generation(&fixture), 8);
    let error = fixture.token.remove(&name("a"), soon()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(generation(&fixture), 8);
    // A damaged object, without a lock file.
    fixture.write("b.object", b"no object");
    fixture.token.remove(&name("b"), soon()).unwrap();
    assert_eq!(files(&fixture), ["generation", "token.object"]);
}

#[test]
fn a_missing_generation_becomes_a_number_that_nobody_has() {
    let fixture = fixture();
    fs::remove_file(fixture.path("generation")).unwrap();
    fixture.token.remove(&name("a"), soon()).unwrap();
    assert!(generation(&fixture) > 1 << 40);
}

#[test]
fn a_damaged_object_is_not_written() {
    let fixture = fixture();
    let bytes = encode(5, &sample());
    fixture.write("a.object", &bytes[..bytes.len() - 1]);
    let error = set_label(&fixture, &id("a"), b"x").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert_eq!(
        fs::read(fixture.path("a.object")).unwrap().len(),
        bytes.len() - 1
    );
}

#[test]
fn mode_owner_and_times_reach_the_files() {
    let fixture = fixture();
    let time = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let change = MetadataChange {
        mode: Some(0o640),
        mtime: Some(Time::At(time)),
        ..MetadataChange::default()
    };
    for target in [
        Target::Object(id("a")),
        Target::Object(ObjectId::Token),
        Target::Directory,
    ] {
        fixture
            .token
            .set_metadata(&target, &change, soon())
            .unwrap();
    }
    for file in ["a.object", "token.object", "."] {
        let metadata = fs::metadata(fixture.path(file)).unwrap();
        assert_eq!(metadata.mode() & 0o7777, 0o640, "{file}");
        assert_eq!(metadata.modified().unwrap(), time, "{file}");
    }
    let lock = fs::metadata(fixture.path("a.lock")).unwrap();
    assert_eq!(lock.mode() & 0o7777, 0o640);
    assert_ne!(lock.modified().unwrap(), time);
    let target = Target::Object(id("none"));
    let error = fixture.token.set_metadata(&target, &change, soon());
    assert_eq!(error.unwrap_err().kind(), ErrorKind::NotFound);
    let object = fixture.token.object(&id("a"), soon()).unwrap();
    assert_eq!(object.metadata.mode, 0o640);
    fixture.token.sync(soon()).unwrap();
}

#[test]
fn extended_attributes_come_along() {
    let fixture = fixture();
    let path = fixture.path("a.object");
    let set = rustix::fs::setxattr(
        &path,
        "user.tokenfs",
        b"kept",
        rustix::fs::XattrFlags::empty(),
    );
    if set.is_err() {
        println!("no extended attributes here");
        return;
    }
    set_label(&fixture, &id("a"), b"x").unwrap();
    let mut buffer = [0u8; 16];
    let length = rustix::fs::getxattr(&path, "user.tokenfs", &mut buffer[..]).unwrap();
    assert_eq!(&buffer[..length], b"kept");
}

#[test]
fn a_lock_that_stays_taken_is_busy_and_nothing_is_written() {
    for locked in ["a.object", "a.lock", "token.object"] {
        let fixture = fixture();
        let bytes = fs::read(fixture.path("a.object")).unwrap();
        let mut holder = hold(&fixture.path(locked), 60.0);
        let object = match locked {
            "token.object" => ObjectId::Token,
            _ => id("a"),
        };
        let error = fixture
            .token
            .update(
                &object,
                &mut |attributes| {
                    attributes.insert(LABEL, Value::Bytes(vec![1]));
                    Ok(())
                },
                None,
                Patience::at_most(Duration::from_millis(200)),
            )
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{locked}");
        assert_eq!(fs::read(fixture.path("a.object")).unwrap(), bytes);
        holder.kill().unwrap();
        holder.wait().unwrap();
        set_label(&fixture, &object, b"after").unwrap();
        assert_eq!(label(&fixture, &object), b"after");
    }
}

#[test]
fn an_object_that_softhsm_may_still_be_making_is_waited_for() {
    let fixture = fixture();
    fixture.write("b.object", &encode(1, &sample()));
    let start = std::time::Instant::now();
    let short = Patience::at_most(Duration::from_millis(50));
    for result in [
        fixture.token.update(&id("b"), &mut |_| Ok(()), None, short),
        fixture.token.remove(&name("b"), short),
    ] {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Busy);
    }
    set_label(&fixture, &id("b"), b"x").unwrap();
    assert!(start.elapsed() >= born::GROWN - Duration::from_millis(50));
}

#[test]
fn readers_never_see_a_mixture() {
    let fixture = fixture();
    let fill = |byte: u8, long: usize| {
        move |attributes: &mut Attributes| {
            attributes.insert(LABEL, Value::Bytes(vec![byte; long]));
            attributes.insert(0x102, Value::Bytes(vec![byte; 9000 - long]));
            Ok(())
        }
    };
    for object in [id("a"), ObjectId::Token] {
        fixture
            .token
            .update(&object, &mut fill(0, 0), None, soon())
            .unwrap();
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..60u8 {
                    let mut edit = fill(round, usize::from(round) * 100);
                    fixture
                        .token
                        .update(&object, &mut edit, None, soon())
                        .unwrap();
                }
                stop.store(true, Ordering::Relaxed);
            });
            let mut versions = 0;
            let mut last = 255;
            while !stop.load(Ordering::Relaxed) {
                let found = fixture.token.object(&object, soon()).unwrap();
                let all = [
                    found.attributes.bytes(LABEL).unwrap(),
                    found.attributes.bytes(0x102).unwrap(),
                ]
                .concat();
                assert_eq!(all.len(), 9000);
                assert!(all.iter().all(|byte| *byte == all[0]));
                if all[0] != last {
                    versions += 1;
                    last = all[0];
                }
            }
            println!("{versions} versions were seen");
        });
    }
}

#[test]
fn two_threads_lose_no_change() {
    let fixture = fixture();
    thread::scope(|scope| {
        for attribute_type in [0x101u64, 0x103] {
            let token = &fixture.token;
            scope.spawn(move || {
                for round in 0..50u64 {
                    token
                        .update(
                            &id("a"),
                            &mut |attributes| {
                                let before = attributes.ulong(attribute_type);
                                assert_eq!(before, round.checked_sub(1));
                                attributes.insert(attribute_type, Value::Ulong(round));
                                Ok(())
                            },
                            None,
                            Patience::at_most(Duration::from_secs(30)),
                        )
                        .unwrap();
                }
            });
        }
    });
    let found = fixture.token.object(&id("a"), soon()).unwrap();
    assert_eq!(found.generation, Some(105));
    assert_eq!(fixture.token.overwritten(), 0);
}

#[test]
fn an_exchange_does_not_bring_back_what_was_destroyed() {
    let fixture = fixture();
    let path = fixture.path("a.object");
    let lock = fixture.path("a.lock");
    let error = fixture
        .token
        .update(
            &id("a"),
            &mut |attributes| {
                // SoftHSM takes no lock for that.
                fs::remove_file(&path).unwrap();
                fs::remove_file(&lock).unwrap();
                attributes.insert(LABEL, Value::Bytes(vec![1]));
                Ok(())
            },
            None,
            soon(),
        )
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(files(&fixture), ["generation", "token.object"]);
}

#[test]
fn another_file_that_took_the_name_is_put_back_and_changed_itself() {
    let fixture = fixture();
    let path = fixture.path("a.object");
    let mut other = sample();
    other.insert(CLASS, Value::Ulong(77));
    let mut rounds = 0;
    fixture
        .token
        .update(
            &id("a"),
            &mut |attributes| {
                if rounds == 0 {
                    // A restore, say.
                    fixture.write("restored", &encode(100, &other));
                    fs::rename(fixture.path("restored"), &path).unwrap();
                }
                rounds += 1;
                attributes.insert(LABEL, Value::Bytes(vec![1]));
                Ok(())
            },
            None,
            soon(),
        )
        .unwrap();
    assert_eq!(rounds, 2);
    let found = fixture.token.object(&id("a"), soon()).unwrap();
    assert_eq!(found.generation, Some(101));
    assert_eq!(found.attributes.ulong(CLASS), Some(77));
    assert_eq!(files(&fixture).len(), 4);
}

#[test]
fn a_change_that_softhsm_overwrote_is_said_once() {
    let fixture = fixture();
    set_label(&fixture, &id("a"), b"ours, secret").unwrap();
    // Somebody who saw the old version writes on top of ours.
    let mut stale = sample();
    stale.insert(0x102, Value::Bytes(b"theirs".to_vec()));
    let stale = encode(7, &stale);
    fixture.write("a.object", &stale);
    for _ in 0..2 {
        fixture.token.object(&id("a"), soon()).unwrap();
    }
    set_label(&fixture, &id("a"), b"ours again").unwrap();
    assert_eq!(fixture.token.overwritten(), 1);
    let log = fixture.diagnostics.render();
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines.len(), 1, "{log}");
    assert!(
        lines[0].ends_with("a.object: SoftHSM overwrote a change of CKA_LABEL made through tokenfs with its older copy; make it again"),
        "{log}"
    );
    assert!(!log.contains("secret"));
    // It is noticed by a write that comes next, too; and what somebody set to something else is no loss.
    fixture.write("a.object", &encode(9, &sample()));
    set_label(&fixture, &id("a"), b"third").unwrap();
    assert_eq!(fixture.token.overwritten(), 2);
    let mut other = sample();
    other.insert(LABEL, Value::Bytes(b"set by somebody".to_vec()));
    fixture.write("a.object", &encode(11, &other));
    set_label(&fixture, &id("a"), b"fourth").unwrap();
    assert_eq!(fixture.token.overwritten(), 2);
}

#[test]
fn a_token_that_is_being_built_is_none_before_it_is_published() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("new")).unwrap();
    let tokendir = fs::File::open(directory.path()).unwrap();
    let path = directory.path().join("new");
    let token = FileToken::build(
        tokendir.as_fd(),
        TokenName::new("new".as_ref()).unwrap(),
        &path,
        new_object(sample()).access,
        Options::default(),
        Arc::new(Diagnostics::new()),
    )
    .unwrap();
    let now = Patience::Now;
    token
        .update(
            &ObjectId::Token,
            &mut |attributes| {
                attributes.insert(LABEL, Value::Bytes(b"label".to_vec()));
                Ok(())
            },
            None,
            now,
        )
        .unwrap();
    token
        .create(&name("a"), &new_object(sample()), now)
        .unwrap();
    token
        .create(&name("b"), &new_object(sample()), now)
        .unwrap();
    token
        .update(
            &id("a"),
            &mut |attributes| {
                attributes.insert(LABEL, Value::Bytes(b"changed".to_vec()));
                Ok(())
            },
            None,
            now,
        )
        .unwrap();
    token.remove(&name("b"), now).unwrap();
    assert_eq!(token.list(now).unwrap().len(), 1);
    assert!(token.object(&ObjectId::Token, now).is_ok());
    assert!(!Path::new(&path.join("token.object")).exists());
    token.publish().unwrap();
    let mut names: Vec<_> = fs::read_dir(&path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "a.lock",
            "a.object",
            "generation",
            "token.lock",
            "token.object"
        ]
    );
    assert_eq!(
        fs::read(path.join("generation")).unwrap(),
        1u64.to_be_bytes()
    );
    let own = token.object(&ObjectId::Token, soon()).unwrap();
    assert_eq!(own.attributes.bytes(LABEL), Some(&b"label"[..]));
    assert_eq!(own.metadata.mode, 0o640);
    assert!(token.publish().is_err());
}

#[test]
fn what_could_not_be_synced_is_synced_the_next_time() {
    let fixture = fixture();
    fixture.token.unsynced(Path::new("a.object"));
    let impossible = "x".repeat(300);
    fixture.token.unsynced(Path::new(&impossible));
    assert!(fixture.token.sync(soon()).is_err());
    assert_eq!(fixture.token.pending().len(), 2);
    fixture
        .token
        .pending()
        .remove(std::ffi::OsStr::new(&impossible));
    fixture.token.sync(soon()).unwrap();
    assert!(fixture.token.pending().is_empty());
}
