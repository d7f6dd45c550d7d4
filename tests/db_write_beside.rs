//! The `db` backend writes beside a live SoftHSM in another process.
//!
//! `TOKENFS_TEST_SECONDS` says for how long both sides write.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod db_common;
mod support;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, UNIX_EPOCH};

use db_common::{named, open, patient};
use support::independent::{self, get_bytes};
use support::template::{Attribute, boolean, bytes, ulong};
use support::*;
use tokenfs::error::{Error, ErrorKind};
use tokenfs::store::attribute::{Attributes, Value};
use tokenfs::store::db::uuid::{CKA_TOKENFS_UUID, derived};
use tokenfs::store::db::{DATABASE, DbToken};
use tokenfs::store::{
    Access, NewObject, ObjectId, ObjectName, Options, Patience, Token, TokenName,
};

const CKA_LABEL: u64 = 3;
const CKA_ID: u64 = 0x102;
const CKA_VALUE: u64 = 0x11;
const CKA_SIGN: u64 = 0x108;
const CKM_RSA_PKCS_KEY_PAIR_GEN: u64 = 0;
const CKM_SHA256_RSA_PKCS: u64 = 0x40;
const FOREIGN: &str = "b7e9f2a1-aaaa-bbbb-cccc-111111111111";
const ACCESS: Access = Access {
    mode: 0o600,
    uid: 0,
    gid: 0,
};

fn name(text: &str) -> ObjectName {
    ObjectName::new(OsStr::new(text)).unwrap()
}

/// A token of SoftHSM's.
fn ours(softhsm: &Softhsm) -> DbToken {
    let directory = softhsm.token_directory();
    let name = directory.file_name().unwrap().to_str().unwrap();
    open(&directory, name, Options::default(), &Arc::default())
}

fn set(token: &DbToken, id: &ObjectId, attribute_type: u64, value: Value) -> Result<(), Error> {
    let edit = &mut |attributes: &mut Attributes| {
        attributes.insert(attribute_type, value.clone());
        Ok(())
    };
    token.update(id, edit, None, patient())
}

fn new(attributes: Attributes) -> NewObject {
    NewObject {
        attributes,
        access: ACCESS,
        mtime: None,
    }
}

/// The object that has this as the bytes of an attribute.
fn find(token: &DbToken, attribute_type: u64, wanted: &[u8]) -> ObjectId {
    let names = token.list(patient()).unwrap();
    let mut found = names.iter().cloned().map(ObjectId::Object).filter(|id| {
        let object = token.object(id, patient()).unwrap();
        object.attributes.bytes(attribute_type) == Some(wanted)
    });
    let id = found.next().expect("an object of that value");
    assert_eq!(found.next(), None);
    id
}

fn data(label: &str) -> Vec<Attribute> {
    let value = bytes(CKA_VALUE, "value");
    vec![
        ulong(0, 0),
        boolean(1, true),
        boolean(2, false),
        bytes(CKA_LABEL, label),
        value,
    ]
}

/// A pair of keys; whether the private one is encrypted.
fn pair(client: &mut P11, private: bool, id: &str) -> (u64, u64) {
    client
        .generate_pair(
            CKM_RSA_PKCS_KEY_PAIR_GEN,
            &[
                boolean(1, true),
                boolean(2, false),
                ulong(0x121, 1024),
                bytes(0x122, [1, 0, 1]),
            ],
            &[
                boolean(1, true),
                boolean(2, private),
                bytes(CKA_LABEL, "key"),
                bytes(CKA_ID, id),
            ],
        )
        .unwrap()
}

#[test]
fn a_session_that_was_open_before_sees_what_we_write() {
    let (softhsm, mut client) = Softhsm::with_token(Backend::Db);
    let one = client.create(&data("one")).unwrap();
    let two = client.create(&data("two")).unwrap();
    let (public, key) = pair(&mut client, false, "the key");
    assert_eq!(client.find_label("one").unwrap(), [one]);
    let token = ours(&softhsm);

    // A change of what may change.
    let id = find(&token, CKA_LABEL, b"one");
    set(&token, &id, CKA_LABEL, Value::Bytes(b"changed".to_vec())).unwrap();
    assert_eq!(client.label(one).unwrap().as_deref(), Some(&b"changed"[..]));
    assert_eq!(client.find_label("changed").unwrap(), [one]);
    let key_id = find(&token, CKA_ID, b"the key");
    set(&token, &key_id, CKA_ID, Value::Bytes(b"other".to_vec())).unwrap();
    assert_eq!(
        client.get_bytes(key, CKA_ID).unwrap().as_deref(),
        Some(&b"other"[..])
    );
    set(&token, &key_id, CKA_SIGN, Value::Bool(false)).unwrap();
    assert!(client.sign(key, CKM_SHA256_RSA_PKCS, b"text").is_err());
    set(&token, &key_id, CKA_SIGN, Value::Bool(true)).unwrap();

    // A removal.
    let gone = find(&token, CKA_LABEL, b"two");
    let ObjectId::Object(gone) = gone else {
        panic!()
    };
    token.remove(&gone, patient()).unwrap();
    assert!(client.find_label("two").unwrap().is_empty());
    assert!(client.set_label(two, "x").is_err());

    // A key of ours: it is found, signs, is changed and destroyed.
    let mut attributes = token.object(&key_id, patient()).unwrap().attributes.clone();
    attributes.insert(CKA_LABEL, Value::Bytes(b"copied".to_vec()));
    token
        .create(&name(FOREIGN), &new(attributes), patient())
        .unwrap();
    let found = client.find_label("copied").unwrap();
    assert_eq!(found.len(), 1);
    let signature = client.sign(found[0], CKM_SHA256_RSA_PKCS, b"text").unwrap();
    assert!(
        client
            .verify(public, CKM_SHA256_RSA_PKCS, b"text", &signature)
            .unwrap()
    );
    client.set_label(found[0], "renamed").unwrap();
    let label = |token: &DbToken| token.object(&named(FOREIGN), patient()).unwrap();
    assert_eq!(
        label(&token).attributes.bytes(CKA_LABEL),
        Some(&b"renamed"[..])
    );
    assert_eq!(
        independent::read_db_token(&softhsm.token_directory())
            .objects
            .len(),
        4
    );
    client.destroy(found[0]).unwrap();
    let error = token.object(&named(FOREIGN), patient()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);

    // And one whose label and value only its user can read, beside a session that begins afterwards.
    let (public, _) = pair(&mut client, true, "private");
    let encrypted = token.list(patient()).unwrap();
    let encrypted = encrypted
        .iter()
        .cloned()
        .map(ObjectId::Object)
        .find_map(|id| {
            let attributes = token.object(&id, patient()).unwrap().attributes.clone();
            (attributes.boolean(2) == Some(true)).then_some(attributes)
        });
    token
        .create(&name(FOREIGN), &new(encrypted.unwrap()), patient())
        .unwrap();
    let mut later = softhsm.p11();
    later.open("test", Some(PIN)).unwrap();
    for client in [&mut client, &mut later] {
        let keys = client
            .find(&[ulong(0, 3), bytes(CKA_ID, "private")])
            .unwrap();
        assert_eq!(keys.len(), 2);
        for key in keys {
            let signature = client
                .sign(key.handle, CKM_SHA256_RSA_PKCS, b"text")
                .unwrap();
            assert_eq!(signature.len(), 128);
        }
    }
    let keys = client
        .find(&[ulong(0, 3), bytes(CKA_ID, "private")])
        .unwrap();
    let signature = client
        .sign(keys[1].handle, CKM_SHA256_RSA_PKCS, b"text")
        .unwrap();
    assert!(
        client
            .verify(public, CKM_SHA256_RSA_PKCS, b"text", &signature)
            .unwrap()
    );
}

/// Names mean nothing to SoftHSM, and its writes nothing to them.
#[test]
fn an_object_gets_another_name_beside_a_session() {
    let (softhsm, mut client) = Softhsm::with_token(Backend::Db);
    let handle = client.create(&data("one")).unwrap();
    let token = ours(&softhsm);
    let ObjectId::Object(own) = find(&token, CKA_LABEL, b"one") else {
        panic!()
    };
    let row = token
        .row(&ObjectId::Object(own.clone()), patient())
        .unwrap();
    let mtime = |name: &ObjectName| {
        let id = ObjectId::Object(name.clone());
        token.object_metadata(&id, patient()).unwrap().mtime
    };
    let before = mtime(&own);
    std::thread::sleep(Duration::from_millis(20));
    // That of a row that is not there yet, too: SoftHSM makes objects, and does not take it away.
    let next = name(&derived(token.name(), row + 1));
    for to in [name(FOREIGN), next.clone()] {
        let names = token.list(patient()).unwrap();
        token.rename(&names[0], &to, patient()).unwrap();
        for token in [&token, &ours(&softhsm)] {
            assert_eq!(*token.list(patient()).unwrap(), *std::slice::from_ref(&to));
            let id = ObjectId::Object(to.clone());
            assert_eq!(token.row(&id, patient()).unwrap(), row);
            let metadata = token.object_metadata(&id, patient()).unwrap();
            assert_eq!(metadata.mtime, before);
        }
        assert_eq!(client.label(handle).unwrap().unwrap(), b"one");
        assert_eq!(client.find_label("one").unwrap(), [handle]);
    }
    client.create(&data("two")).unwrap();
    assert_eq!(
        find(&token, CKA_LABEL, b"one"),
        ObjectId::Object(next.clone())
    );
    let ObjectId::Object(two) = find(&token, CKA_LABEL, b"two") else {
        panic!()
    };
    let error = token.rename(&next, &two, patient()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists);
    for (from, to, kind) in [
        (&own, &two, ErrorKind::NotFound),
        (&own, &own, ErrorKind::NotFound),
        (&next, &name("no-uuid"), ErrorKind::Invalid),
    ] {
        let error = token.rename(from, to, patient()).unwrap_err();
        assert_eq!(error.kind(), kind);
    }
    let error = token.rename(&next, &own, Patience::Now).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    // Back to its own, of which nothing has to be remembered.
    token.rename(&next, &own, patient()).unwrap();
    token.rename(&own, &own, patient()).unwrap();
    client.set_label(handle, "changed").unwrap();
    assert_eq!(
        find(&token, CKA_LABEL, b"changed"),
        ObjectId::Object(own.clone())
    );
    let database = rusqlite::Connection::open(softhsm.token_directory().join(DATABASE)).unwrap();
    let remembered: i64 = database
        .query_row(
            "select count(*) from attribute_text where type = ?",
            [CKA_TOKENFS_UUID.cast_signed()],
            |row| row.get(0),
        )
        .unwrap();
    assert_eq!(remembered, 0);
    // A writer is waited for, and what it writes is what has the name.
    let writer = rusqlite::Connection::open(softhsm.token_directory().join(DATABASE)).unwrap();
    writer.execute_batch("begin immediate").unwrap();
    let short = Patience::at_most(Duration::from_millis(50));
    let error = token.rename(&own, &name(FOREIGN), short).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    writer.execute_batch("rollback").unwrap();
    drop((writer, database));
    token.rename(&own, &name(FOREIGN), patient()).unwrap();
    client.destroy(handle).unwrap();
    assert_eq!(*token.list(patient()).unwrap(), [two]);
}

#[test]
fn names_and_times_live_through_softhsms_writes_and_go_with_their_object() {
    let (softhsm, mut client) = Softhsm::with_token(Backend::Db);
    client.create(&data("first")).unwrap();
    client.create(&data("second")).unwrap();
    let token = ours(&softhsm);
    let first = find(&token, CKA_LABEL, b"first");
    let object = token.object(&first, patient()).unwrap();
    let ObjectId::Object(first) = first else {
        panic!()
    };
    token.remove(&first, patient()).unwrap();
    let time = UNIX_EPOCH + Duration::new(1_000_000_000, 1);
    let dated = |label: &str| {
        let mut attributes = object.attributes.clone();
        attributes.insert(CKA_LABEL, Value::Bytes(label.into()));
        NewObject {
            mtime: Some(time),
            ..new(attributes)
        }
    };
    token.create(&first, &dated("back"), patient()).unwrap();
    token
        .create(&name(FOREIGN), &dated("foreign"), patient())
        .unwrap();
    assert_eq!(
        token
            .row(&ObjectId::Object(first.clone()), patient())
            .unwrap(),
        4,
        "no row is used twice"
    );
    let mtime =
        |token: &DbToken, id: &ObjectId| token.object(id, patient()).unwrap().metadata.mtime;
    let (back, foreign) = (ObjectId::Object(first), named(FOREIGN));

    // A listing doubles rows, others come and go, a login writes the token's row.
    client.create(&data("third")).unwrap();
    let mut other = softhsm.p11();
    other.open("test", Some(PIN)).unwrap();
    let found = other.find_label("back").unwrap();
    let foreigner = other.find_label("foreign").unwrap();
    let fresh = ours(&softhsm);
    for token in [&token, &fresh] {
        assert_eq!(mtime(token, &back), time);
        assert_eq!(mtime(token, &foreign), time);
    }
    // Changed by SoftHSM, it is as old as the file at least.
    other.set_label(found[0], "changed").unwrap();
    assert_eq!(
        token
            .object(&back, patient())
            .unwrap()
            .attributes
            .bytes(CKA_LABEL),
        Some(&b"changed"[..])
    );
    let file = std::fs::metadata(softhsm.token_directory().join(DATABASE)).unwrap();
    assert_eq!(mtime(&token, &back), file.modified().unwrap());
    assert_eq!(mtime(&token, &foreign), time);
    other.destroy(foreigner[0]).unwrap();
    assert_eq!(
        token.object(&foreign, patient()).unwrap_err().kind(),
        ErrorKind::NotFound
    );
    let connection = rusqlite::Connection::open(softhsm.token_directory().join(DATABASE)).unwrap();
    let sql = "select count(*) from attribute_text where type = ?";
    let left = connection.query_row(sql, [CKA_TOKENFS_UUID.cast_signed()], |row| row.get(0));
    assert_eq!(left, Ok(1), "that of the one which is there");
    drop(connection);
    let label = token.object(&ObjectId::Token, patient()).unwrap();
    assert!(
        label
            .attributes
            .bytes(0x8000_5349)
            .unwrap()
            .starts_with(b"test ")
    );
}

#[test]
fn nothing_is_lost_where_both_sides_write() {
    let (softhsm, mut client) = Softhsm::with_token(Backend::Db);
    client.create(&data("shared")).unwrap();
    let shared = client.find_label("shared").unwrap()[0];
    let seconds = std::env::var("TOKENFS_TEST_SECONDS").ok();
    let seconds = seconds.map(|text| text.parse().expect("TOKENFS_TEST_SECONDS"));
    let lasting = Duration::from_secs(seconds.unwrap_or(if full() { 120 } else { 30 }));
    let token = ours(&softhsm);
    let id = find(&token, CKA_LABEL, b"shared");
    // Two counters of ours in one attribute, a label of SoftHSM's: one object that three write to.
    set(&token, &id, CKA_ID, Value::Bytes(vec![0; 8])).unwrap();
    let over = AtomicBool::new(false);
    let our_side = |side: u32| {
        let token = ours(&softhsm);
        let (mut rounds, mut live) = (0_u64, BTreeSet::new());
        while !over.load(Ordering::Relaxed) {
            // SQLite waits in steps of up to 100 ms; SoftHSM is to have its turns.
            std::thread::sleep(Duration::from_millis(8));
            let count = &mut |attributes: &mut Attributes| {
                let old = attributes.bytes(CKA_ID).unwrap();
                let count = u64::from_ne_bytes(old.try_into().unwrap()) + 1;
                attributes.insert(CKA_ID, Value::Bytes(count.to_ne_bytes().to_vec()));
                Ok(())
            };
            token.update(&id, count, None, patient()).unwrap();
            let text = format!("{side:08x}-0000-4000-8000-{rounds:012x}");
            let mut attributes = token.object(&id, patient()).unwrap().attributes.clone();
            attributes.insert(CKA_LABEL, Value::Bytes(text.clone().into()));
            token
                .create(&name(&text), &new(attributes), patient())
                .unwrap();
            live.insert(text);
            if rounds % 3 != 0 {
                let text = live.pop_first().unwrap();
                token.remove(&name(&text), patient()).unwrap();
            }
            rounds += 1;
        }
        (rounds, live)
    };
    let (one, two, theirs) = std::thread::scope(|scope| {
        let one = scope.spawn(|| our_side(1));
        let two = scope.spawn(|| our_side(2));
        let start = Instant::now();
        let (mut rounds, mut live) = (0_u64, Vec::new());
        // On a busy machine it takes longer until SoftHSM, which waits in steps, has had its turns.
        let is_over = |rounds| {
            let lasted = start.elapsed();
            lasted > lasting && (rounds > 20 || lasted > lasting * 10)
        };
        while !is_over(rounds) {
            client
                .set_label(shared, &format!("label {rounds}"))
                .unwrap();
            let text = format!("theirs {rounds}");
            live.push((client.create(&data(&text)).unwrap(), text));
            if rounds % 3 != 0 {
                client.destroy(live.remove(0).0).unwrap();
            }
            rounds += 1;
        }
        over.store(true, Ordering::Relaxed);
        let live: BTreeSet<_> = live.into_iter().map(|(_, text)| text).collect();
        (one.join().unwrap(), two.join().unwrap(), (rounds, live))
    });

    let stored = independent::read_db_token(&softhsm.token_directory());
    assert!(stored.damaged.is_empty());
    let mut labels = BTreeSet::new();
    for object in stored.objects.values() {
        let label = String::from_utf8(get_bytes(object, CKA_LABEL).unwrap().to_vec()).unwrap();
        if let Some(last) = label.strip_prefix("label ") {
            assert_eq!(last.parse(), Ok(theirs.0 - 1), "their last change");
            let count = get_bytes(object, CKA_ID).unwrap().try_into().unwrap();
            assert_eq!(u64::from_ne_bytes(count), one.0 + two.0, "our changes");
            continue;
        }
        assert_eq!(
            get_bytes(object, CKA_VALUE),
            Some(&b"value"[..]),
            "{label} is whole"
        );
        assert!(labels.insert(label));
    }
    let mut expected = theirs.1.clone();
    expected.extend(one.1.iter().chain(&two.1).cloned());
    assert_eq!(labels, expected);
    assert_eq!(token.list(patient()).unwrap().len(), expected.len() + 1);
    let mut connected = softhsm.p11();
    connected.open("test", Some(PIN)).unwrap();
    assert_eq!(connected.find(&[]).unwrap().len(), expected.len() + 1);
    report!(
        "rounds: {} of SoftHSM's, {} and {} of ours; 3 writes each, {} objects left, nothing lost",
        theirs.0,
        one.0,
        two.0,
        expected.len()
    );
    assert!(theirs.0 > 20 && one.0 > 20 && two.0 > 20);
}

#[test]
fn a_token_that_we_built_is_one() {
    let (softhsm, mut client) = Softhsm::with_token(Backend::Db);
    let (public, _) = pair(&mut client, true, "the key");
    let source = ours(&softhsm);
    let other = Softhsm::new(Backend::Db);
    let directory = other.tokendir.join("00000000-1111-2222-3333-444444444444");
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(&directory)
        .unwrap();
    let built = DbToken::build(
        TokenName::new(directory.file_name().unwrap()).unwrap(),
        &directory,
        Access {
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            ..ACCESS
        },
        Options::default(),
        Arc::default(),
    )
    .unwrap();
    let now = Patience::Now;
    let whole = |id: &ObjectId| source.object(id, patient()).unwrap().attributes.clone();
    let own = &mut |attributes: &mut Attributes| {
        *attributes = whole(&ObjectId::Token);
        Ok(())
    };
    built.update(&ObjectId::Token, own, None, now).unwrap();
    for object in source.list(patient()).unwrap().iter() {
        let attributes = whole(&ObjectId::Object(object.clone()));
        built.create(object, &new(attributes), now).unwrap();
    }
    built.publish().unwrap();
    assert_eq!(mode(&directory.join(DATABASE)), 0o600);

    let mut copy = other.p11();
    copy.open("test", Some(PIN)).unwrap();
    let keys = copy.find(&[ulong(0, 3)]).unwrap();
    assert_eq!(keys.len(), 1);
    assert_eq!(keys[0].label.as_deref(), Some(&b"key"[..]));
    let signature = copy
        .sign(keys[0].handle, CKM_SHA256_RSA_PKCS, b"text")
        .unwrap();
    assert!(
        client
            .verify(public, CKM_SHA256_RSA_PKCS, b"text", &signature)
            .unwrap()
    );
    // And SoftHSM goes on with it: a key more, a PIN that is wrong.
    pair(&mut copy, true, "another");
    assert!(copy.open("test", Some("wrong")).is_err());
    copy.open("test", Some(PIN)).unwrap();
    assert_eq!(copy.find(&[ulong(0, 3)]).unwrap().len(), 2);
    let again = ours(&other);
    assert_eq!(again.list(patient()).unwrap().len(), 4);
    // The names were those of another token's rows, and stay.
    for object in source.list(patient()).unwrap().iter() {
        assert!(again.list(patient()).unwrap().contains(object));
    }
    assert!(
        !again
            .list(patient())
            .unwrap()
            .contains(&name(&derived(again.name(), 2)))
    );
}
