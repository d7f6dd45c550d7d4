//! Reading: what a listing has, damage, and reading beside writers.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::fixture::{CLASS, Fixture, hold, id, sample, settle, soon};
use super::*;
use crate::error::ErrorKind;
use crate::store::attribute::{Attributes, Value};
use crate::store::{ObjectId, Patience, Token};

#[test]
fn a_listing_has_what_softhsm_lists() {
    let fixture = Fixture::new();
    for name in ["b.object", "a.object", "..object", "no uuid.object"] {
        fixture.write(name, &encode(1, &sample()));
    }
    for name in [
        "a.lock",
        ".object",
        "generation",
        "x.objects",
        "object",
        "README",
    ] {
        fixture.write(name, b"");
    }
    fs::create_dir(fixture.path("dir.object")).unwrap();
    symlink(fixture.path("a.object"), fixture.path("link.object")).unwrap();
    let names = fixture.token.list(Patience::Now).unwrap();
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    // `..object` is the object `.`, which no directory can be called.
    assert_eq!(names, ["a", "b", "no uuid"]);
    for name in ["link", "dir", "absent"] {
        let error = fixture.token.object(&id(name), Patience::Now).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{name}: {error}");
    }
}

#[test]
fn a_damaged_object_names_file_and_byte_and_leaves_the_others_alone() {
    let fixture = Fixture::new();
    fixture.write("good.object", &encode(1, &sample()));
    fixture.write("torn.object", &encode(1, &sample())[..30]);
    let error = fixture
        .token
        .object(&id("torn"), Patience::Now)
        .unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::WouldBlock,
        "it may still be written"
    );
    let error = fixture.token.object(&id("torn"), soon()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert_eq!(
        (error.path(), error.offset()),
        (Some(fixture.path("torn.object").as_path()), Some(24))
    );
    assert!(
        fixture
            .token
            .object_metadata(&id("torn"), Patience::Now)
            .is_ok()
    );
    assert_eq!(
        fixture
            .token
            .object(&id("good"), Patience::Now)
            .unwrap()
            .attributes,
        sample()
    );
    // It is known now, and mended as soon as somebody mends it.
    assert_eq!(
        fixture
            .token
            .object(&id("torn"), Patience::Now)
            .unwrap_err(),
        error
    );
    fixture.write("torn.object", &encode(2, &sample()));
    assert_eq!(
        fixture
            .token
            .object(&id("torn"), Patience::Now)
            .unwrap()
            .generation,
        Some(2)
    );
}

#[test]
fn trailing_bytes_are_a_warning() {
    let fixture = Fixture::new();
    let mut bytes = encode(1, &sample());
    let end = bytes.len();
    bytes.extend([0; 3]);
    fixture.write("odd.object", &bytes);
    assert_eq!(
        fixture
            .token
            .object(&id("odd"), Patience::Now)
            .unwrap()
            .attributes,
        sample()
    );
    assert!(
        fixture
            .diagnostics
            .render()
            .contains(&format!("at byte {end}"))
    );
}

#[test]
fn the_same_version_is_the_same_arc_and_every_change_is_seen() {
    let fixture = Fixture::new();
    let mut attributes = sample();
    fixture.write("a.object", &encode(1, &attributes));
    let get = || fixture.token.object(&id("a"), soon()).unwrap();
    let first = get();
    assert!(Arc::ptr_eq(&first, &get()), "within the clock tick");
    thread::sleep(Duration::from_millis(60));
    assert!(Arc::ptr_eq(&first, &get()), "after the clock tick");
    // In place, of the same size, as often as a tick of a coarse clock has room for.
    for n in 0..200u64 {
        attributes.insert(CLASS, Value::Ulong(n));
        fixture.write("a.object", &encode(1, &attributes));
        assert_eq!(get().attributes.ulong(CLASS), Some(n));
    }
    fs::remove_file(fixture.path("a.object")).unwrap();
    assert_eq!(
        fixture.token.object(&id("a"), soon()).unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

/// What 2.6.1 does: truncate, and the rest only after the locks are gone. The file ends at a buffer's end meanwhile.
#[test]
fn a_file_that_looks_unfinished_is_waited_for() {
    let fixture = Fixture::new();
    let mut attributes = sample();
    attributes.insert(0x11, Value::Bytes(vec![7; 9000]));
    let whole = encode(1, &attributes);
    for cut in [0, 4096, 8192] {
        fixture.write("a.object", &whole[..cut]);
        let (path, whole) = (fixture.path("a.object"), whole.clone());
        let writer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(120));
            fs::write(path, whole).unwrap();
        });
        let object = fixture.token.object(&id("a"), soon()).unwrap();
        assert_eq!(object.attributes, attributes, "cut at {cut}");
        writer.join().unwrap();
    }
}

#[test]
fn a_whole_file_of_a_multiple_of_the_buffer_is_believed_after_a_second() {
    let fixture = Fixture::new();
    let mut attributes = Attributes::new();
    attributes.insert(0x11, Value::Bytes(vec![7; 4096 - 32]));
    let bytes = encode(1, &attributes);
    assert_eq!(bytes.len(), 4096);
    fixture.write("a.object", &bytes);
    assert_eq!(
        fixture
            .token
            .object(&id("a"), Patience::Now)
            .unwrap_err()
            .kind(),
        ErrorKind::WouldBlock
    );
    settle();
    assert_eq!(
        fixture
            .token
            .object(&id("a"), Patience::Now)
            .unwrap()
            .attributes,
        attributes
    );
}

#[test]
fn an_empty_file_is_damaged_after_a_second() {
    let fixture = Fixture::new();
    fixture.write("a.object", b"");
    settle();
    let error = fixture.token.object(&id("a"), Patience::Now).unwrap_err();
    assert_eq!(
        (error.kind(), error.offset()),
        (ErrorKind::Damaged, Some(0))
    );
}

#[test]
fn a_sparse_giant_is_refused_without_reading_it() {
    let fixture = Fixture::new();
    let file = fs::File::create(fixture.path("a.object")).unwrap();
    file.set_len(1 << 40).unwrap();
    let error = fixture.token.object(&id("a"), soon()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
}

#[test]
fn a_lock_is_waited_for_no_longer_than_the_limit() {
    for locked in ["a.object", "a.lock"] {
        let fixture = Fixture::new();
        fixture.write("a.object", &encode(1, &sample()));
        fixture.write("a.lock", b"");
        let mut holder = hold(&fixture.path(locked), 60.0);
        assert_eq!(
            fixture
                .token
                .object(&id("a"), Patience::Now)
                .unwrap_err()
                .kind(),
            ErrorKind::WouldBlock
        );
        let start = Instant::now();
        let limit = Duration::from_millis(200);
        let error = fixture
            .token
            .object(&id("a"), Patience::at_most(limit))
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{locked}");
        assert!(start.elapsed() >= limit && start.elapsed() < 5 * limit);
        holder.kill().unwrap();
        holder.wait().unwrap();
        assert!(fixture.token.object(&id("a"), soon()).is_ok());

        let mut holder = hold(&fixture.path(locked), 0.3);
        fs::File::open(fixture.path("a.object"))
            .unwrap()
            .set_modified(std::time::SystemTime::now())
            .unwrap();
        assert!(
            fixture.token.object(&id("a"), soon()).is_ok(),
            "{locked} is let go in time"
        );
        holder.wait().unwrap();
    }
}

#[test]
fn an_object_without_a_lock_file_is_read() {
    let fixture = Fixture::new();
    fixture.write("a.object", &encode(1, &sample()));
    assert!(fixture.token.object(&id("a"), Patience::Now).is_ok());
    assert!(
        fixture
            .token
            .object(&ObjectId::Token, Patience::Now)
            .is_ok()
    );
}

#[test]
fn a_long_file_is_not_read_while_others_wait() {
    let fixture = Fixture::new();
    let mut attributes = Attributes::new();
    attributes.insert(0x11, Value::Bytes(vec![7; 600 * 1024 + 1]));
    fixture.write("a.object", &encode(1, &attributes));
    let error = fixture.token.object(&id("a"), Patience::Now).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    let object = fixture.token.object(&id("a"), soon()).unwrap();
    assert_eq!(object.attributes, attributes);
    thread::sleep(Duration::from_millis(60));
    assert!(fixture.token.object(&id("a"), soon()).is_ok());
    assert!(
        fixture.token.object(&id("a"), Patience::Now).is_ok(),
        "it is known"
    );
}

#[test]
fn what_is_gone_is_not_kept() {
    let fixture = Fixture::new();
    fixture.write("a.object", &encode(1, &sample()));
    let object = fixture.token.object(&id("a"), soon()).unwrap();
    fs::remove_file(fixture.path("a.object")).unwrap();
    fixture.token.list(Patience::Now).unwrap();
    assert_eq!(Arc::strong_count(&object), 1);
}
