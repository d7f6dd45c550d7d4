//! Writing in the `file` backend beside a live libsofthsm2 in another process: its locks as we rely on them, what it sees, and
//! what neither side loses.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod store_file_common;
mod support;

use std::collections::BTreeSet;
use std::fs::{self};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use store_file_common::*;

use support::template::{boolean, bytes, ulong};
use support::*;
use tokenfs::store::attribute::{Attributes, Value};
use tokenfs::store::{Access, NewObject, ObjectId, ObjectName, Patience, Token, TokenName};

// ------------------------------------------------------------------------------------------------------- the locks

/// "All locks are POSIX fcntl locks": one of ours on the open file keeps SoftHSM waiting, and goes with the file.
/// "Transaction: a write lock on `.lock` from start to commit"; "writer: a write lock on `.object`".
#[test]
fn a_change_by_softhsm_waits_for_either_lock_of_ours() {
    for suffix in [".lock", ".object"] {
        let mut side = side();
        let (key, object) = side.key("before");
        let held = exclusively(&side.path(&object, suffix));
        let command = serde_json::json!({
            "do": "set", "object": key,
            "attributes": support::template::to_json(&[bytes(LABEL, "after")]),
        });
        side.client.begin(&command);
        assert_eq!(
            side.client.poll(Duration::from_millis(400)),
            None,
            "{suffix} does not keep SoftHSM waiting"
        );
        drop(held);
        side.client.finish().unwrap();
        assert_eq!(get(&*side.token(), &id(&object), LABEL), b"after");
    }
}

/// "Reader of an object: a read lock on `.object`", and none on `.lock`: a SoftHSM reads while a transaction waits.
#[test]
fn a_reading_softhsm_takes_no_transaction_lock() {
    let mut side = side();
    let (key, object) = side.key("label");
    let held = exclusively(&side.path(&object, ".lock"));
    assert_eq!(side.client.label(key).unwrap().unwrap(), b"label");
    drop(held);
    let held = exclusively(&side.path(&object, ".object"));
    let command = serde_json::json!({"do": "get", "object": key, "types": [LABEL]});
    side.client.begin(&command);
    assert_eq!(side.client.poll(Duration::from_millis(300)), None);
    drop(held);
    side.client.finish().unwrap();
}

/// "Deletion: no lock at all".
#[test]
fn a_deletion_by_softhsm_waits_for_no_transaction() {
    let mut side = side();
    let (key, object) = side.key("label");
    let held = exclusively(&side.path(&object, ".lock"));
    side.client.destroy(key).unwrap();
    assert!(!side.path(&object, ".object").exists());
    assert!(!side.path(&object, ".lock").exists());
    drop(held);
}

/// "Any change of `token.object`: the write lock on `.object` alone, `.lock` is opened and not locked".
#[test]
fn a_login_waits_for_the_token_and_not_for_its_lock_file() {
    let mut side = side();
    let directory = side.softhsm.token_directory();
    let held = exclusively(&directory.join("token.lock"));
    side.client.open("test", Some(PIN)).unwrap();
    drop(held);
    let held = exclusively(&directory.join("token.object"));
    let command = serde_json::json!({"do": "open", "token": "test", "pin": PIN});
    side.client.begin(&command);
    assert_eq!(side.client.poll(Duration::from_millis(300)), None);
    drop(held);
    side.client.finish().unwrap();
}

/// "SoftHSM's write takes the generation that is on disk plus 1", "a session reads again when the generation differs", and
/// "a creation raises the token's".
#[test]
fn softhsm_counts_on_from_the_generation_that_is_on_disk() {
    let mut side = side();
    let (key, object) = side.key("one");
    std::thread::sleep(Duration::from_millis(500));
    let token = side.token();
    let generation = || {
        let object = token.object(&id(&object), patient()).unwrap();
        object.generation.unwrap()
    };
    let first = generation();
    for round in 0..5u64 {
        set(&*token, &id(&object), LABEL, b"ours").unwrap();
        assert_eq!(generation(), first + 2 * round + 1);
        assert_eq!(side.client.label(key).unwrap().unwrap(), b"ours");
        side.client.set_label(key, "theirs").unwrap();
        assert_eq!(generation(), first + 2 * round + 2);
        assert_eq!(get(&*token, &id(&object), LABEL), b"theirs");
    }
    let read = || fs::read(side.softhsm.token_directory().join("generation")).unwrap();
    let before = read();
    side.client
        .create(&[
            ulong(0, 0),
            boolean(1, true),
            boolean(2, false),
            bytes(0x11, "v"),
        ])
        .unwrap();
    assert_ne!(read(), before);
}

// ------------------------------------------------------------------------------------------------ what SoftHSM sees

/// What SoftHSM has open goes on under the new name, and what it stores while we wait is what gets it.
#[test]
fn a_session_finds_an_object_that_got_another_name() {
    let mut side = side();
    let (key, object) = side.key("before");
    let token = side.token();
    std::thread::sleep(Duration::from_millis(500));
    // It stores a change while we wait for its lock.
    let held = exclusively(&side.path(&object, ".object"));
    side.client.begin(&serde_json::json!({
        "do": "set", "object": key,
        "attributes": support::template::to_json(&[bytes(LABEL, "theirs")]),
    }));
    assert_eq!(side.client.poll(Duration::from_millis(300)), None);
    std::thread::scope(|scope| {
        let renaming = scope.spawn(|| token.rename(&object, &name("other"), patient()));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!renaming.is_finished());
        drop(held);
        side.client.finish().unwrap();
        renaming.join().unwrap().unwrap();
    });
    assert_eq!(*token.list(patient()).unwrap(), [name("other")]);
    assert_eq!(get(&*token, &id(&name("other")), LABEL), b"theirs");
    let found = side.client.find_label("theirs").unwrap();
    assert_eq!(found.len(), 1);
    side.client.set_label(found[0], "again").unwrap();
    assert_eq!(get(&*token, &id(&name("other")), LABEL), b"again");
    side.client.reinitialize().unwrap();
    side.client.open("test", Some(PIN)).unwrap();
    let found = side.client.find_label("again").unwrap();
    assert_eq!(found.len(), 1);
    side.client.destroy(found[0]).unwrap();
    assert!(token.list(patient()).unwrap().is_empty());
}

#[test]
fn a_session_sees_every_change_creation_and_removal_and_uses_what_we_made() {
    let mut side = side();
    let (public, private) = side
        .client
        .generate_pair(
            0,
            &[
                boolean(1, true),
                boolean(2, false),
                bytes(LABEL, "pub"),
                ulong(0x121, 2048),
                bytes(0x122, [1, 0, 1]),
            ],
            &[boolean(1, true), boolean(2, true), bytes(LABEL, "priv")],
        )
        .unwrap();
    let token = side.token();
    let class = |name: &ObjectName| {
        let object = token.object(&id(name), patient()).unwrap();
        (object.attributes.ulong(0).unwrap(), object)
    };
    let names = token.list(patient()).unwrap();
    let public_name = names.iter().find(|name| class(name).0 == 2).unwrap();
    let private_name = names.iter().find(|name| class(name).0 == 3).unwrap();
    // Changes, one after the other, seen at once.
    for round in 0..20 {
        let label = format!("round {round}");
        set(&*token, &id(public_name), LABEL, label.as_bytes()).unwrap();
        assert_eq!(
            side.client.label(public).unwrap().unwrap(),
            label.as_bytes()
        );
        assert_eq!(side.client.find_label(&label).unwrap(), [public]);
    }
    // A creation: the private key once more, under another name; the other one goes.
    let new = NewObject {
        attributes: class(private_name).1.attributes.clone(),
        access: access(),
        mtime: None,
    };
    token.create(&name("made-here"), &new, patient()).unwrap();
    let both = side.client.find_label("priv").unwrap();
    assert_eq!(both.len(), 2);
    token.remove(private_name, patient()).unwrap();
    let left = side.client.find_label("priv").unwrap();
    let made = left[0];
    assert_eq!(left.len(), 1);
    assert_ne!(made, private);
    // It signs, can be changed, and destroyed.
    let signature = side.client.sign(made, 0x40, b"text").unwrap();
    assert!(
        side.client
            .verify(public, 0x40, b"text", &signature)
            .unwrap()
    );
    side.client.set_label(made, "renamed").unwrap();
    assert_eq!(side.client.find_label("renamed").unwrap(), [made]);
    let changed = token.object(&id(&name("made-here")), patient()).unwrap();
    assert!(
        changed.generation.unwrap() > 1 << 40,
        "it counts on from ours"
    );
    side.client.destroy(made).unwrap();
    let names = token.list(patient()).unwrap();
    assert_eq!(&*names, std::slice::from_ref(public_name));
    assert_eq!(
        fs::read_dir(side.softhsm.token_directory())
            .unwrap()
            .count(),
        5
    );
    // Its own attributes.
    let mut label = b"changed".to_vec();
    label.resize(32, b' ');
    set(&*token, &ObjectId::Token, 0x8000_5349, &label).unwrap();
    side.client.reinitialize().unwrap();
    assert_eq!(side.client.tokens().unwrap()[0].0.trim(), "changed");
    side.client.open("changed", Some(PIN)).unwrap();
    assert_eq!(side.log.render(), "");
}

#[test]
fn a_token_that_was_built_here_works() {
    let side = side();
    let old = side.token();
    let own = old.object(&ObjectId::Token, patient()).unwrap();
    let name = TokenName::new("11111111-2222-3333-4444-555555555555".as_ref()).unwrap();
    let directory = Access {
        mode: 0o700,
        ..access()
    };
    let built = side.store.create_token(&name, directory, access()).unwrap();
    // A SoftHSM that starts meanwhile sees one token, and leaves the other alone.
    assert_eq!(side.softhsm.p11().tokens().unwrap().len(), 1);
    built
        .update(
            &ObjectId::Token,
            &mut |attributes| {
                *attributes = own.attributes.clone();
                let mut label = b"built".to_vec();
                label.resize(32, b' ');
                attributes.insert(0x8000_5349, Value::Bytes(label));
                attributes.insert(0x8000_534a, Value::Bytes(b"4444555555555555".to_vec()));
                Ok(())
            },
            None,
            Patience::Now,
        )
        .unwrap();
    let mut data = Attributes::new();
    data.insert(0, Value::Ulong(0));
    data.insert(1, Value::Bool(true));
    data.insert(2, Value::Bool(false));
    data.insert(LABEL, Value::Bytes(b"data".to_vec()));
    data.insert(0x11, Value::Bytes(b"value".to_vec()));
    let new = NewObject {
        attributes: data,
        access: access(),
        mtime: None,
    };
    built.create(&self::name("d"), &new, Patience::Now).unwrap();
    side.store.publish_token(&name, patient()).unwrap();
    let mut client = side.softhsm.p11();
    assert_eq!(client.tokens().unwrap().len(), 2);
    client.open("built", Some(PIN)).unwrap();
    let handle = client.find_label("data").unwrap()[0];
    client.destroy(handle).unwrap();
    client.close().unwrap();
    side.store.remove_token(&name, patient()).unwrap();
    assert_eq!(side.softhsm.p11().tokens().unwrap().len(), 1);
    assert_eq!(side.log.render(), "");
}

// ---------------------------------------------------------------------------------------------- what nobody loses

/// Both sides change one object: SoftHSM its id, we its label. None of SoftHSM's changes is lost, and each of ours that a stale
/// SoftHSM overwrote is noticed.
#[test]
fn no_update_of_softhsm_is_lost_and_each_of_ours_that_is_is_noticed() {
    let rounds: u64 = if full() { 20_000 } else { 5000 };
    let mut side = side();
    let (key, object) = side.key("label");
    let token = Arc::new(side.file_token());
    std::thread::sleep(Duration::from_millis(500));
    let (done, ours) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut lost = 0;
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut lost = 0u64;
            let mut last = b"label".to_vec();
            while !done.load(Ordering::Relaxed) {
                let number = ours.fetch_add(1, Ordering::Relaxed);
                let next = format!("ours {number}").into_bytes();
                let mut found = Vec::new();
                token
                    .update(
                        &id(&object),
                        &mut |attributes| {
                            found = attributes.bytes(LABEL).unwrap().to_vec();
                            attributes.insert(LABEL, Value::Bytes(next.clone()));
                            Ok(())
                        },
                        None,
                        patient(),
                    )
                    .unwrap();
                lost += u64::from(found != last);
                last = next;
            }
            lost += u64::from(get(&*token, &id(&object), LABEL) != last);
            lost
        });
        let over = Over(&done);
        for round in 0..rounds {
            let value = format!("theirs {round}");
            side.client.set(key, &[bytes(ID, &value)]).unwrap();
            let seen = side.client.get_bytes(key, ID).unwrap().unwrap();
            assert_eq!(seen, value.as_bytes(), "SoftHSM's change is lost");
        }
        drop(over);
        lost = writer.join().unwrap();
    });
    let last = format!("theirs {}", rounds - 1);
    assert_eq!(get(&*token, &id(&object), ID), last.as_bytes());
    report!(
        "{rounds} changes of SoftHSM's, none lost; {} of ours, {lost} overwritten, {} noticed",
        ours.load(Ordering::Relaxed),
        token.overwritten()
    );
    assert_eq!(token.overwritten(), lost);
}

/// The same for the token: logins on the one side, which write `token.object`, on the other an attribute of ours.
#[test]
fn logins_beside_changes_of_the_token_leave_it_whole() {
    let mut side = side();
    let token = side.token();
    let done = AtomicBool::new(false);
    let mut written = 0u64;
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut written = 0u64;
            while !done.load(Ordering::Relaxed) {
                let value = vec![b'x'; (written % 700) as usize];
                set(&*token, &ObjectId::Token, 0x8000_1234, &value).unwrap();
                written += 1;
            }
            written
        });
        let over = Over(&done);
        for _ in 0..60 {
            side.client.open("test", Some(PIN)).unwrap();
            side.client.close().unwrap();
        }
        drop(over);
        written = writer.join().unwrap();
    });
    let found = token.object(&ObjectId::Token, patient()).unwrap();
    assert!(found.attributes.bytes(0x8000_534d).is_some());
    report!("60 logins beside {written} changes");
    side.softhsm.p11().open("test", Some(PIN)).unwrap();
}

/// A newborn object is stored with the lock of `.object` alone: changing it at once must lose nothing of it.
#[test]
fn objects_that_are_being_made_are_left_alone_until_they_are_finished() {
    let mut side = side();
    let token = side.token();
    let done = AtomicBool::new(false);
    let count = 25;
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut changed = BTreeSet::new();
            loop {
                let last = done.load(Ordering::Relaxed);
                for name in token.list(patient()).unwrap().iter() {
                    if changed.contains(name) {
                        continue;
                    }
                    set(&*token, &id(name), ID, b"ours").unwrap();
                    changed.insert(name.clone());
                }
                if last {
                    break;
                }
            }
        });
        let over = Over(&done);
        for round in 0..count {
            let attributes = [
                ulong(0, 0),
                boolean(1, true),
                boolean(2, false),
                bytes(LABEL, format!("{round}")),
                bytes(0x11, vec![7; 3000]),
            ];
            side.client.create(&attributes).unwrap();
        }
        drop(over);
        writer.join().unwrap();
    });
    let mut labels = BTreeSet::new();
    for name in token.list(patient()).unwrap().iter() {
        let object = token.object(&id(name), patient()).unwrap();
        assert_eq!(object.attributes.bytes(ID), Some(&b"ours"[..]));
        assert_eq!(object.attributes.bytes(0x11).unwrap().len(), 3000);
        labels.insert(object.attributes.bytes(LABEL).unwrap().to_vec());
    }
    assert_eq!(labels.len(), count);
    assert_eq!(side.client.find(&[]).unwrap().len(), count);
}

#[test]
fn a_reading_softhsm_sees_no_mixture() {
    let mut side = side();
    let (key, object) = side.key("label");
    let token = side.token();
    set(&*token, &id(&object), LABEL, &[b'z'; 9000]).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut round = 0u64;
            while !done.load(Ordering::Relaxed) {
                let byte = b'a' + (round % 26) as u8;
                // Of one length, since PKCS #11 asks for that in a call of its own.
                let value = vec![byte; 9000];
                set(&*token, &id(&object), LABEL, &value).unwrap();
                round += 1;
            }
            round
        });
        let mut seen = BTreeSet::new();
        let over = Over(&done);
        for _ in 0..300 {
            let label = side.client.label(key).unwrap().unwrap();
            assert_eq!(label.len(), 9000);
            assert!(label.iter().all(|byte| *byte == label[0]));
            seen.insert(label);
        }
        drop(over);
        let rounds = writer.join().unwrap();
        report!("{rounds} versions written, {} seen", seen.len());
        assert!(seen.len() > 1);
    });
}
