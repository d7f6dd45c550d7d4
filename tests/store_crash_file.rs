//! Crashes and faults of writing in the `file` backend: what a SoftHSM and the next writer find after a kill at every step, and
//! what is left when something goes wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod store_file_common;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use store_file_common::*;

use support::*;
use tokenfs::diagnostics::Diagnostics;
use tokenfs::error::{Error, ErrorKind, Result};
use tokenfs::store::attribute::{Attributes, Value};
use tokenfs::store::file::{CKA_TOKENFS_FILLER, decode, encode};
use tokenfs::store::{Access, NewObject, ObjectId, Options, Patience, Store, TokenName, crash};

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
        "replaced" => {
            let file = store.path().join(first.as_os_str()).join("a.object");
            let mut first_time = true;
            token.update(
                &object,
                &mut |attributes| {
                    if std::mem::take(&mut first_time) {
                        fs::copy(&file, file.with_extension("restored")).unwrap();
                        fs::rename(file.with_extension("restored"), &file).unwrap();
                    }
                    attributes.insert(LABEL, Value::Bytes(b"after".to_vec()));
                    Ok(())
                },
                None,
                patient(),
            )
        }
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
            fs::write(token.join("d.lock"), b"").unwrap();
            for (name, files) in [
                (
                    ".tokenfs-new-renamed",
                    &[".tokenfs-removing", "token.tokenfs-new", "x.object"][..],
                ),
                (
                    "built",
                    &[".tokenfs-building", "token.tokenfs-new", "x.object"][..],
                ),
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
    let token_name = directory.file_name().unwrap().to_owned();
    let mut passed = BTreeSet::new();
    let mut crashes = 0;
    let scenarios = [
        "update",
        "replaced",
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
                let context = format!("{what} at {point}:{time}");
                check_after_a_crash(&side, what, &context);
                let told = |store: &Path| {
                    let token = store.join(&token_name);
                    let objects = ["a.object", "b.object"].map(|file| token.join(file).exists());
                    let bytes = fs::read(token.join("generation")).unwrap();
                    (objects, u64::from_be_bytes(bytes.try_into().unwrap()))
                };
                let (before, after) = (told(&template), told(&tokendir));
                assert!(
                    before.0 == after.0 || after.1 > before.1,
                    "{context}: SoftHSM is not told"
                );
                fs::remove_dir_all(&tokendir).unwrap();
            }
            passed.insert(point);
        }
    }
    let all = crash::POINTS.iter();
    let missed: Vec<_> = all
        .filter(|point| point.starts_with("file.") || point.starts_with("store."))
        // These are met in `tests/crash_points.rs`, which sees to it that all are.
        .filter(|point| !point.starts_with("file.rename."))
        .filter(|point| !["file.recover.lock-removed", "store.recover.renamed"].contains(*point))
        .filter(|point| !passed.contains(**point))
        .collect();
    report!("{crashes} crashes at {} points", passed.len());
    // Needs a SoftHSM that makes an object in the middle of a removal.
    assert_eq!(missed, [&"store.remove.restored"]);
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
    // The same value once more, of another time: that is no failure either.
    std::thread::sleep(Duration::from_millis(500));
    let command = as_user_in(BOB, &[ALICE.gid], &program);
    let mut command = in_a_process(command, "update", &side.softhsm.tokendir);
    assert_eq!(result_of(&mut command).as_deref(), Some("done"));
    let again = fs::metadata(&path).unwrap();
    assert!(again.modified().unwrap() > after.modified().unwrap());
}
