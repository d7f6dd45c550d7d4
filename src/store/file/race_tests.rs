//! Writing beside others: locks, readers, and SoftHSM at the same object.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::fixture::{
    CLASS, LABEL, files, fixture, hold, id, label, name, sample, set_label, soon,
};
use super::*;
use crate::error::ErrorKind;
use crate::store::attribute::{AttributeKey, Attributes, Kind, Value};
use crate::store::{ObjectId, Patience, Token};

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
        lines[0].ends_with("a.object: SoftHSM overwrote a change of CKA_LABEL made through tokenfs with what looks like its older copy; make it again, unless somebody has set the earlier value on purpose"),
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
    // What was removed and is back may be what SoftHSM adds to every object: nobody is told to remove it again.
    let label = AttributeKey {
        attribute_type: LABEL,
        kind: Kind::Bytes,
    };
    let mut remove = |attributes: &mut Attributes| {
        attributes.remove(label);
        Ok(())
    };
    fixture
        .token
        .update(&id("a"), &mut remove, None, soon())
        .unwrap();
    fixture.write("a.object", &encode(99, &other));
    fixture.token.object(&id("a"), soon()).unwrap();
    assert_eq!(fixture.token.overwritten(), 3);
    let log = fixture.diagnostics.render();
    let last = log.lines().last().unwrap();
    assert!(last.contains("a change of CKA_LABEL made through tokenfs with what looks like its older copy, or since objects of this class have it"), "{log}");
    assert!(!last.contains("again"), "{log}");
}

/// A SoftHSM that has the object open and waits for the lock of its file, to store what the object lacks, writes the number after the one that it finds
/// there, and takes a version with that number for its own.
#[test]
fn who_waits_for_the_old_version_cannot_take_the_new_one_for_his() {
    let fixture = fixture();
    let old = fs::File::open(fixture.path("a.object")).unwrap();
    let number = |bytes: &[u8]| u64::from_be_bytes(*bytes.first_chunk().unwrap());
    let before = fs::read(fixture.path("a.object")).unwrap();
    set_label(&fixture, &id("a"), b"new").unwrap();
    let now = fs::read(fixture.path("a.object")).unwrap();
    let mut found = [0; 8];
    std::os::unix::fs::FileExt::read_exact_at(&old, &mut found, 0).unwrap();
    assert_eq!(number(&now), number(&before) + 1);
    assert!(
        number(&found) > number(&now) + 1_000_000,
        "{}",
        number(&found)
    );
    // What is a backup, too, stays what it is.
    fs::hard_link(fixture.path("a.object"), fixture.path("backup")).unwrap();
    set_label(&fixture, &id("a"), b"newer").unwrap();
    assert_eq!(fs::read(fixture.path("backup")).unwrap(), now);
}
