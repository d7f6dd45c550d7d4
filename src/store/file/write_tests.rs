//! Changing an object: what it leaves on disk, what it refuses; modes, owners and times.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::fixture::{
    CLASS, LABEL, TEMPLATE, files, fixture, generation, id, label, name, new_object, sample,
    set_label, soon,
};
use super::*;
use crate::diagnostics::Diagnostics;
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::{Attributes, Value};
use crate::store::{MetadataChange, ObjectId, Options, Patience, Target, Time, Token, TokenName};

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
