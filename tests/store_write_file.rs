//! Writing in the `file` backend beside a live libsofthsm2 in another process: its locks as we rely on them, what it sees, what
//! neither side loses, and what it finds after a crash at every step.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use support::template::{boolean, bytes, ulong};
use support::*;
use tokenfs::diagnostics::Diagnostics;
use tokenfs::error::{Error, ErrorKind, Result};
use tokenfs::store::attribute::{Attributes, Value};
use tokenfs::store::file::{CKA_TOKENFS_FILLER, FileToken, decode, encode};
use tokenfs::store::{
    Access, Backend, NewObject, ObjectId, ObjectName, Options, Patience, Store, Token, TokenName,
    crash,
};

const LABEL: u64 = 3;
const ID: u64 = 0x102;

fn patient() -> Patience {
    Patience::at_most(Duration::from_secs(20))
}

/// Ends the other threads of a test, also when this one panics.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Side {
    softhsm: Softhsm,
    client: P11,
    store: Store,
    log: Arc<Diagnostics>,
}

fn side() -> Side {
    let (softhsm, client) = Softhsm::with_token(support::Backend::File);
    let log = Arc::new(Diagnostics::new());
    let store = Store::open(&softhsm.tokendir, Options::default(), Arc::clone(&log)).unwrap();
    Side {
        softhsm,
        client,
        store,
        log,
    }
}

impl Side {
    fn token(&self) -> Arc<dyn Token> {
        let names = self.store.tokens().unwrap();
        self.store.token(&names[0]).unwrap()
    }

    fn file_token(&self) -> FileToken {
        let tokendir = File::open(&self.softhsm.tokendir).unwrap();
        let path = self.softhsm.token_directory();
        FileToken::open(
            std::os::fd::AsFd::as_fd(&tokendir),
            TokenName::new(path.file_name().unwrap()).unwrap(),
            &path,
            Options::default(),
            Arc::clone(&self.log),
        )
        .unwrap()
    }

    /// A public key with a label, which is no secret: its handle and its name.
    fn key(&mut self, label: &str) -> (u64, ObjectName) {
        let before: BTreeSet<_> = self
            .token()
            .list(patient())
            .unwrap()
            .iter()
            .cloned()
            .collect();
        let (public, private) = self
            .client
            .generate_pair(
                0,
                &[
                    boolean(1, true),
                    boolean(2, false),
                    bytes(LABEL, label),
                    ulong(0x121, 1024),
                    bytes(0x122, [1, 0, 1]),
                ],
                &[boolean(1, false), boolean(2, false)],
            )
            .unwrap();
        self.client.destroy(private).unwrap();
        let after = self.token().list(patient()).unwrap();
        let mut new = after.iter().filter(|name| !before.contains(name));
        (public, new.next().unwrap().clone())
    }

    fn path(&self, name: &ObjectName, suffix: &str) -> PathBuf {
        self.softhsm
            .token_directory()
            .join(format!("{name}{suffix}"))
    }
}

fn id(name: &ObjectName) -> ObjectId {
    ObjectId::Object(name.clone())
}

fn name(name: &str) -> ObjectName {
    ObjectName::new(name.as_ref()).unwrap()
}

fn set(token: &dyn Token, object: &ObjectId, attribute_type: u64, value: &[u8]) -> Result<()> {
    token.update(
        object,
        &mut |attributes| {
            attributes.insert(attribute_type, Value::Bytes(value.to_vec()));
            Ok(())
        },
        None,
        patient(),
    )
}

fn get(token: &dyn Token, object: &ObjectId, attribute_type: u64) -> Vec<u8> {
    let object = token.object(object, patient()).unwrap();
    object.attributes.bytes(attribute_type).unwrap().to_vec()
}

fn access() -> Access {
    Access {
        mode: 0o600,
        uid: nix::unistd::getuid().as_raw(),
        gid: nix::unistd::getgid().as_raw(),
    }
}

fn exclusively(path: &Path) -> File {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let whole = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&whole)).unwrap();
    file
}

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
    assert_eq!(changed.generation, Some(2));
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
    let rounds: u64 = if full() { 5000 } else { 400 };
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
    println!(
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
    println!("60 logins beside {written} changes");
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
        println!("{rounds} versions written, {} seen", seen.len());
        assert!(seen.len() > 1);
    });
}

// ---------------------------------------------------------------------------------------------- crashes and faults

/// The variable that makes [`act`] do something: an operation, in the store that is named by the other one.
const ACT: &str = "TOKENFS_TEST_ACT";
const ACT_STORE: &str = "TOKENFS_TEST_ACT_STORE";

/// Not a test of its own: what the tests below do in a process that dies, or as another user.
#[test]
fn act() {
    let Ok(what) = std::env::var(ACT) else { return };
    let tokendir = PathBuf::from(std::env::var_os(ACT_STORE).unwrap());
    let store = Store::open(&tokendir, Options::default(), Arc::default()).unwrap();
    let result = operate(&store, &what);
    match result {
        Ok(()) => println!("result: done"),
        Err(error) => println!("result: {:?}", error.kind()),
    }
}

fn operate(store: &Store, what: &str) -> Result<()> {
    let new_token = TokenName::new("new".as_ref()).unwrap();
    let names = store.tokens()?;
    let first = names.iter().find(|name| **name != new_token).unwrap();
    let token = store.token(first)?;
    let object = ObjectId::Object(name("a"));
    let new = NewObject {
        attributes: token
            .object(&object, patient())
            .map_or_else(|_| Attributes::new(), |object| object.attributes.clone()),
        access: access(),
        mtime: Some(std::time::UNIX_EPOCH),
    };
    let dated = |object: &ObjectId, value: &[u8]| {
        token.update(
            object,
            &mut |attributes| {
                attributes.insert(LABEL, Value::Bytes(value.to_vec()));
                Ok(())
            },
            Some(std::time::UNIX_EPOCH),
            patient(),
        )
    };
    match what {
        "update" => dated(&object, b"after"),
        "touch" => token.update(&object, &mut |_| Ok(()), None, patient()),
        "longer" => dated(&ObjectId::Token, &[b'x'; 900]),
        "shorter" => dated(&ObjectId::Token, b"x"),
        "create" => token.create(&name("b"), &new, patient()),
        "remove" => token.remove(&name("a"), patient()),
        "metadata" => {
            let change = tokenfs::store::MetadataChange {
                mode: Some(0o640),
                uid: Some(access().uid),
                mtime: Some(tokenfs::store::Time::Now),
                ..Default::default()
            };
            for target in [
                tokenfs::store::Target::Object(object),
                tokenfs::store::Target::Directory,
            ] {
                token.set_metadata(&target, &change, patient())?;
            }
            Ok(())
        }
        "build" => {
            let built = store.create_token(&new_token, access_of(0o700), access())?;
            let own = token.object(&ObjectId::Token, patient())?;
            built.update(
                &ObjectId::Token,
                &mut |attributes| {
                    *attributes = another(&own.attributes);
                    Ok(())
                },
                None,
                Patience::Now,
            )?;
            built.create(&name("b"), &new, Patience::Now)?;
            store.publish_token(&new_token, patient())
        }
        "unbuild" => {
            store.create_token(&new_token, access_of(0o700), access())?;
            store.remove_token(&new_token, patient())
        }
        "remove-token" => store.remove_token(&new_token, patient()),
        "recover" => {
            store.recover();
            Ok(())
        }
        other => Err(Error::new(ErrorKind::Unsupported, other)),
    }
}

/// Of another token: two of one serial number end every SoftHSM that starts (`SlotManager::insertToken`).
fn another(own: &Attributes) -> Attributes {
    let mut own = own.clone();
    let mut label = b"another".to_vec();
    label.resize(32, b' ');
    own.insert(0x8000_5349, Value::Bytes(label));
    own.insert(0x8000_534a, Value::Bytes(b"4444555555555555".to_vec()));
    own
}

fn access_of(mode: u32) -> Access {
    Access { mode, ..access() }
}

/// The command that does `what` in a process of its own.
fn in_a_process(mut command: Command, what: &str, tokendir: &Path) -> Command {
    command
        .args(["--exact", "act", "--nocapture", "--test-threads=1"])
        .env(ACT, what)
        .env(ACT_STORE, tokendir);
    command
}

fn result_of(command: &mut Command) -> Option<String> {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines()
        .find_map(|line| line.split_once("result: "))
        .map(|(_, result)| result.to_owned())
}

fn copy(from: &Path, to: &Path) {
    run(Command::new("cp").arg("-a").arg(from).arg(to));
}

/// A store with the object `a`, and what a scenario needs besides.
fn prepare(tokendir: &Path, what: &str, template: &Path) {
    copy(template, tokendir);
    let token = fs::read_dir(tokendir)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let read = |file: &str| fs::read(token.join(file)).unwrap();
    match what {
        "shorter" => {
            let mut own = decode(&read("token.object")).unwrap().attributes;
            own.insert(LABEL, Value::Bytes(vec![b'o'; 900]));
            fs::write(token.join("token.object"), encode(9, &own)).unwrap();
        }
        "update" => fs::remove_file(token.join("a.lock")).unwrap(),
        "remove-token" => {
            let new = tokendir.join("new");
            fs::create_dir(&new).unwrap();
            let own = decode(&read("token.object")).unwrap().attributes;
            fs::write(new.join("token.object"), encode(3, &another(&own))).unwrap();
            fs::copy(token.join("generation"), new.join("generation")).unwrap();
            File::create(new.join("token.lock")).unwrap();
            File::create(new.join("orphan.lock")).unwrap();
        }
        "recover" => {
            // One of each kind.
            let own = decode(&read("token.object")).unwrap().attributes;
            let (old, mut longer) = (encode(5, &own), own.clone());
            longer.insert(LABEL, Value::Bytes(vec![b'o'; 900]));
            let new = encode(6, &longer);
            let mut journal = b"TKFJRNL1".to_vec();
            journal.extend((new.len() as u64).to_be_bytes());
            journal.extend((old.len() as u64).to_be_bytes());
            journal.extend(&new);
            journal.extend(&old);
            let mut hasher = siphasher::sip128::SipHasher13::new();
            std::hash::Hasher::write(&mut hasher, &journal);
            let sum = siphasher::sip128::Hasher128::finish128(&hasher).as_u128();
            journal.extend(sum.to_be_bytes());
            let mut torn = new.clone();
            let sector = 512.min(old.len());
            torn[..sector].copy_from_slice(&old[..sector]);
            fs::write(token.join("token.object"), torn).unwrap();
            fs::write(token.join("token.tokenfs-journal"), journal).unwrap();
            fs::write(token.join("token.tokenfs-new"), b"left").unwrap();
            fs::write(token.join("a.tokenfs-new"), b"left").unwrap();
            fs::write(token.join("b.tokenfs-new"), b"left").unwrap();
            fs::write(token.join("c.tokenfs-new"), b"left").unwrap();
            fs::write(token.join("c.tokenfs-journal"), b"left").unwrap();
            for (name, files) in [
                ("built", &[".tokenfs-building", "x.object"][..]),
                ("published", &[".tokenfs-building", "token.object"][..]),
                (
                    "going",
                    &[".tokenfs-removing", "token.tokenfs-new", "generation"][..],
                ),
                (
                    "stays",
                    &[".tokenfs-removing", "token.tokenfs-new", "x.object"][..],
                ),
            ] {
                fs::create_dir(tokendir.join(name)).unwrap();
                for file in files {
                    fs::copy(
                        token.join("token.tokenfs-journal"),
                        tokendir.join(name).join(file),
                    )
                    .unwrap();
                    if file.starts_with("token.") {
                        let mut other = another(&own);
                        let serial = format!("55555555{:0<8}", name.len());
                        other.insert(0x8000_534a, Value::Bytes(serial.into_bytes()));
                        fs::write(tokendir.join(name).join(file), encode(1, &other)).unwrap();
                    }
                }
            }
        }
        _ => {}
    }
}

/// Every regular file of a store that is neither SoftHSM's nor should be there.
fn leftovers(tokendir: &Path) -> Vec<PathBuf> {
    let mut found = walk(tokendir);
    found.retain(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.contains(".tokenfs-") && path.is_file()
    });
    found
}

/// At each crash point of each operation the process is killed; SoftHSM then finds the object as before or as after, and so does
/// it after the recovery, which leaves nothing behind.
#[test]
fn a_crash_at_any_step_leaves_the_old_or_the_new() {
    let mut side = side();
    let (_, object) = side.key("before");
    let directory = side.softhsm.token_directory();
    for suffix in [".object", ".lock"] {
        let from = side.path(&object, suffix);
        fs::rename(from, directory.join(format!("a{suffix}"))).unwrap();
    }
    side.client.close().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let scratch = temporary();
    let template = scratch.path().join("template");
    fs::rename(&side.softhsm.tokendir, &template).unwrap();
    let tokendir = side.softhsm.tokendir.clone();
    let mut passed = BTreeSet::new();
    let mut crashes = 0;
    let scenarios = [
        "update",
        "touch",
        "longer",
        "shorter",
        "create",
        "remove",
        "metadata",
        "build",
        "unbuild",
        "remove-token",
        "recover",
    ];
    for what in scenarios {
        // Which points it passes, and how often.
        prepare(&tokendir, what, &template);
        let mut command = in_a_process(
            Command::new(std::env::current_exe().unwrap()),
            what,
            &tokendir,
        );
        let output = command.env("TOKENFS_CRASH_POINT", "?").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            String::from_utf8_lossy(&output.stdout).contains("result: done"),
            "{what}: {said}"
        );
        fs::remove_dir_all(&tokendir).unwrap();
        let mut times = BTreeMap::new();
        for point in said
            .lines()
            .filter_map(|line| line.strip_prefix("crash point "))
        {
            *times.entry(point.to_owned()).or_insert(0) += 1;
        }
        for (point, times) in times {
            for time in 1..=times {
                prepare(&tokendir, what, &template);
                let mut command = in_a_process(
                    Command::new(std::env::current_exe().unwrap()),
                    what,
                    &tokendir,
                );
                command.env("TOKENFS_CRASH_POINT", format!("{point}:{time}"));
                assert_eq!(
                    result_of(&mut command),
                    None,
                    "{what} survives {point}:{time}"
                );
                crashes += 1;
                check_after_a_crash(&side, what, &format!("{what} at {point}:{time}"));
                fs::remove_dir_all(&tokendir).unwrap();
            }
            passed.insert(point);
        }
    }
    let all = crash::POINTS.iter();
    let missed: Vec<_> = all
        .filter(|point| point.starts_with("file.") || point.starts_with("store."))
        .filter(|point| !passed.contains(**point))
        .collect();
    println!(
        "{crashes} crashes at {} points; not reached: {missed:?}",
        passed.len()
    );
}

fn check_after_a_crash(side: &Side, what: &str, context: &str) {
    let tokendir = &side.softhsm.tokendir;
    let state = |must_be_clean: bool| {
        let log: Arc<Diagnostics> = Arc::default();
        let store = Store::open(tokendir, Options::default(), Arc::clone(&log)).unwrap();
        if must_be_clean {
            store.recover();
            let left = leftovers(tokendir);
            assert!(left.is_empty(), "{context}: {left:?}\n{}", log.render());
            let said = log.render();
            store.recover();
            assert_eq!(log.render(), said, "{context}: not idempotent");
        }
        let mut seen = Vec::new();
        for name in store.tokens().unwrap() {
            let token = store.token(&name).unwrap();
            let own = token.object(&ObjectId::Token, patient());
            let own = own.unwrap_or_else(|error| panic!("{context}: {error}"));
            assert!(own.attributes.of_type(CKA_TOKENFS_FILLER).is_none());
            for object in token.list(patient()).unwrap().iter() {
                let found = token.object(&id(object), patient());
                let found = match found {
                    Ok(found) => found,
                    // What the scenario of the recovery made is no object.
                    Err(_) if what == "recover" => continue,
                    Err(error) => panic!("{context}: {error}"),
                };
                let label = found.attributes.bytes(LABEL).unwrap_or_default().to_vec();
                seen.push((name.clone(), object.clone(), label, found.attributes.len()));
            }
        }
        seen
    };
    // SoftHSM first, as it might be started before the mount is back.
    if what != "recover" {
        let mut client = side.softhsm.p11();
        client
            .open("test", Some(PIN))
            .unwrap_or_else(|error| panic!("{context}: {error:?}"));
        let found = client.find(&[]).unwrap();
        for object in &found {
            let label = object.label.as_deref().unwrap_or_default();
            assert!(
                matches!(label, b"before" | b"after"),
                "{context}: {label:?}"
            );
        }
    }
    // What the recovery starts from is torn on purpose.
    let before = (what != "recover").then(|| state(false));
    let after = state(true);
    if let Some(before) = before {
        assert_eq!(before, after, "{context}");
    }
    for (_, _, label, count) in &after {
        assert!(matches!(&label[..], b"before" | b"after"), "{context}");
        assert!(*count > 10, "{context}: {count} attributes");
    }
    let mut client = side.softhsm.p11();
    client
        .open("test", Some(PIN))
        .unwrap_or_else(|error| panic!("{context}: {error:?}"));
}

/// A disk that is full, a directory that is read-only, files of another user: the errno, and the old value.
#[test]
fn what_goes_wrong_leaves_the_old_value() {
    if !is_root() {
        return;
    }
    let mut side = side();
    let (_, object) = side.key("before");
    let directory = side.softhsm.token_directory();
    for suffix in [".object", ".lock"] {
        let from = side.path(&object, suffix);
        fs::rename(from, directory.join(format!("a{suffix}"))).unwrap();
    }
    // A full disk.
    let small = side.softhsm.directory.path().join("small");
    fs::create_dir(&small).unwrap();
    run(Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k,mode=755", "none"])
        .arg(&small));
    let mounted = Unmount(small.clone());
    let tokendir = small.join("tokens");
    copy(&side.softhsm.tokendir, &tokendir);
    let token = tokendir.join(directory.file_name().unwrap());
    let own = decode(&fs::read(token.join("token.object")).unwrap()).unwrap();
    // Fills it to the last byte.
    let _ = fs::write(small.join("filler"), vec![0; 1 << 20]);
    let before = Snapshot::of(&tokendir);
    let store = Store::open(&tokendir, Options::default(), Arc::default()).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    for what in ["update", "longer", "create", "build"] {
        let error = operate(&store, what).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{what}: {error}");
        before.assert_same(&Snapshot::of(&tokendir));
    }
    // What frees space still works.
    operate(&store, "remove").unwrap();
    drop(store);
    assert!(!own.attributes.is_empty());
    // A file system that takes no writes.
    fs::remove_file(small.join("filler")).unwrap();
    fs::remove_dir_all(&token).unwrap();
    copy(&directory, &token);
    run(Command::new("mount").args(["-o", "remount,ro"]).arg(&small));
    let store = Store::open(&tokendir, Options::default(), Arc::default()).unwrap();
    for what in ["update", "longer", "create", "remove", "metadata", "build"] {
        let error = operate(&store, what).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnly, "{what}: {error}");
    }
    drop(store);
    drop(mounted);
    // Another user, who may read and no more.
    for entry in walk(&side.softhsm.tokendir) {
        set_mode(&entry, if entry.is_dir() { 0o755 } else { 0o644 });
    }
    let before = side.softhsm.snapshot();
    let program = reachable(&std::env::current_exe().unwrap());
    for what in ["update", "longer", "create", "remove", "build"] {
        let mut command = in_a_process(as_user(BOB, &program), what, &side.softhsm.tokendir);
        let result = result_of(&mut command);
        assert_eq!(result.as_deref(), Some("PermissionDenied"), "{what}");
    }
    let mut command = in_a_process(as_user(BOB, &program), "metadata", &side.softhsm.tokendir);
    assert_eq!(result_of(&mut command).as_deref(), Some("NotPermitted"));
    before.assert_same(&side.softhsm.snapshot());
}

struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        run(Command::new("umount").arg(&self.0));
    }
}

/// A member of the group may write and cannot give files away: the object stays the owner's, rewritten in place.
#[test]
fn a_member_of_the_group_rewrites_in_place() {
    if !is_root() {
        return;
    }
    let mut side = side();
    let (_, object) = side.key("before");
    let directory = side.softhsm.token_directory();
    for suffix in [".object", ".lock"] {
        let from = side.path(&object, suffix);
        fs::rename(from, directory.join(format!("a{suffix}"))).unwrap();
    }
    give(&side.softhsm.tokendir, ALICE);
    for entry in walk(&side.softhsm.tokendir) {
        set_mode(&entry, if entry.is_dir() { 0o770 } else { 0o660 });
    }
    std::thread::sleep(Duration::from_millis(500));
    let path = directory.join("a.object");
    let before = fs::metadata(&path).unwrap();
    let program = reachable(&std::env::current_exe().unwrap());
    let command = as_user_in(BOB, &[ALICE.gid], &program);
    let mut command = in_a_process(command, "update", &side.softhsm.tokendir);
    let start = Instant::now();
    let result = result_of(&mut command);
    // The times of a file are its owner's to set, so that it has that of the write.
    assert_eq!(
        result.as_deref(),
        Some("done"),
        "after {:?}",
        start.elapsed()
    );
    let after = fs::metadata(&path).unwrap();
    assert_eq!(
        (
            before.ino(),
            before.uid(),
            before.gid(),
            before.permissions().mode()
        ),
        (
            after.ino(),
            after.uid(),
            after.gid(),
            after.permissions().mode()
        )
    );
    let found = decode(&fs::read(&path).unwrap()).unwrap();
    assert_eq!(found.attributes.bytes(LABEL), Some(&b"after"[..]));
    assert!(leftovers(&side.softhsm.tokendir).is_empty());
    println!("{result:?}");
}

/// The backend of the options is what a store is opened with here.
#[test]
fn the_default_is_the_file_backend() {
    assert_eq!(Options::default().backend, Backend::File);
}
