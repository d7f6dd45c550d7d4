//! What is read of a token that changes meanwhile: `watch` is where it changes here.

use std::time::{Duration, SystemTime};

use nix::unistd::{getegid, geteuid};

use super::*;
use crate::store::attribute::{Attributes, Value};
use crate::store::{Object, ObjectName};

const LABEL: u64 = 3;
const UUIDS: [&str; 3] = [
    "b7e9f2a1-aaaa-bbbb-cccc-111111111111",
    "b7e9f2a1-aaaa-bbbb-cccc-111111111112",
    "b7e9f2a1-aaaa-bbbb-cccc-111111111113",
];
const LIMIT: Duration = Duration::from_millis(400);

fn name(text: &str) -> ObjectName {
    ObjectName::new(text.as_ref()).unwrap()
}

fn soon() -> Patience {
    Patience::at_most(Duration::from_secs(10))
}

fn labelled(label: &str) -> NewObject {
    let mut attributes = Attributes::new();
    attributes.insert(1, Value::Bool(true));
    attributes.insert(2, Value::Bool(false));
    attributes.insert(LABEL, Value::Bytes(label.into()));
    NewObject {
        attributes,
        access: access(),
        mtime: Some(SystemTime::now() - Duration::from_secs(100)),
    }
}

fn access() -> Access {
    Access {
        mode: 0o700,
        uid: geteuid().as_raw(),
        gid: getegid().as_raw(),
    }
}

struct Fixture {
    directory: tempfile::TempDir,
    store: Store,
    token: Arc<dyn Token>,
}

/// A token with two objects, both labelled `0`.
fn fixture(backend: Backend) -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let options = Options {
        backend,
        lock_wait: LIMIT,
        ..Options::default()
    };
    let store = Store::open(directory.path(), options, Arc::default()).unwrap();
    let token = TokenName::new("t".as_ref()).unwrap();
    let building = store.create_token(&token, access(), access()).unwrap();
    let mut edit = |own: &mut Attributes| {
        own.insert(
            CKA_OS_TOKENSERIAL,
            Value::Bytes(b"0123456789abcdef".to_vec()),
        );
        Ok(())
    };
    building
        .update(&ObjectId::Token, &mut edit, None, soon())
        .unwrap();
    for uuid in &UUIDS[..2] {
        building
            .create(&name(uuid), &labelled("0"), soon())
            .unwrap();
    }
    drop(building);
    store.publish_token(&token, soon()).unwrap();
    let token = store.token(&token).unwrap();
    Fixture {
        directory,
        store,
        token,
    }
}

impl Fixture {
    fn set(&self, uuid: &str, label: usize) {
        let mut edit = |attributes: &mut Attributes| {
            attributes.insert(LABEL, Value::Bytes(label.to_string().into_bytes()));
            attributes.insert(1, Value::Bool(true));
            attributes.insert(0x11, Value::Bytes(b"value".to_vec()));
            Ok(())
        };
        let id = ObjectId::Object(name(uuid));
        self.token.update(&id, &mut edit, None, soon()).unwrap();
    }

    fn read(&self, watch: &mut Watch<'_>) -> Result<Vec<String>, Vec<Error>> {
        let content = read::read(&*self.token, LIMIT, watch)?;
        let label = |object: &Arc<Object>| {
            let label = object.attributes.bytes(LABEL).unwrap_or_default();
            String::from_utf8(label.to_vec()).unwrap()
        };
        Ok(content
            .objects
            .iter()
            .map(|(_, object)| label(object))
            .collect())
    }
}

#[test]
fn a_change_between_two_objects_is_never_half_in_it() {
    for backend in [Backend::File, Backend::Db] {
        for changes in 0..4 {
            let fixture = fixture(backend);
            let mut looks = 0;
            let labels = fixture.read(&mut |step| {
                // The first look, and then each until it is enough: one object before it is read, the other one afterwards.
                if matches!(step, Step::Found(_) | Step::Again) {
                    looks += 1;
                    if looks <= changes {
                        fixture.set(UUIDS[0], looks);
                        fixture.set(UUIDS[1], looks);
                    }
                }
                Ok(())
            });
            let last = changes.to_string();
            assert_eq!(labels.unwrap(), [last.clone(), last], "{backend}");
            assert!(
                looks > changes,
                "{backend}: {looks} looks at {changes} changes"
            );
        }
    }
}

#[test]
fn a_token_that_never_rests_is_busy() {
    for backend in [Backend::File, Backend::Db] {
        let fixture = fixture(backend);
        let mut looks = 0;
        let failures = fixture.read(&mut |step| {
            if step == Step::Again {
                looks += 1;
                fixture.set(UUIDS[looks % 2], looks);
            }
            Ok(())
        });
        let failures = failures.unwrap_err();
        assert_eq!(failures.len(), 1);
        assert_eq!(failures[0].kind(), ErrorKind::Busy);
        assert!(
            failures[0].to_string().contains("keeps changing"),
            "{failures:?}"
        );
    }
}

#[test]
fn objects_that_come_and_go_meanwhile_are_there_or_not() {
    for backend in [Backend::File, Backend::Db] {
        let fixture = fixture(backend);
        let mut steps = 0;
        let labels = fixture.read(&mut |step| {
            steps += 1;
            match (steps, step) {
                (1, Step::Found(3)) => fixture.token.remove(&name(UUIDS[1]), soon()).unwrap(),
                (2, Step::Read) => {
                    fixture
                        .token
                        .create(&name(UUIDS[2]), &labelled("new"), soon())
                        .unwrap();
                }
                _ => {}
            }
            Ok(())
        });
        assert_eq!(labels.unwrap(), ["0", "new"], "{backend}");
    }
}

#[test]
fn what_softhsm_is_making_is_waited_for_and_what_stays_like_that_is_copied() {
    let token = (1, Value::Bool(true));
    let unfinished = [
        vec![],
        vec![(1, Value::Bool(false)), (0, Value::Ulong(0))],
        vec![
            token.clone(),
            (0, Value::Ulong(3)),
            (0x11, Value::Bytes(Vec::new())),
        ],
    ];
    for backend in [Backend::File, Backend::Db] {
        for attributes in &unfinished {
            let fixture = fixture(backend);
            let mut new = labelled("");
            new.attributes = Attributes::new();
            for (attribute_type, value) in attributes {
                new.attributes.insert(*attribute_type, value.clone());
            }
            let make = |mtime| {
                let _ = fixture.token.remove(&name(UUIDS[2]), soon());
                let new = NewObject {
                    mtime,
                    ..new.clone()
                };
                fixture.token.create(&name(UUIDS[2]), &new, soon()).unwrap();
            };
            make(None);
            let mut looks = 0;
            let labels = fixture.read(&mut |step| {
                looks += usize::from(step == Step::Again);
                if step == Step::Again && looks == 3 {
                    fixture.set(UUIDS[2], looks);
                }
                Ok(())
            });
            assert_eq!(
                labels.unwrap(),
                ["0", "0", "3"],
                "{backend}: {attributes:?}"
            );
            for (mtime, waits) in [(None, true), (new.mtime, false)] {
                make(mtime);
                let start = std::time::Instant::now();
                assert_eq!(fixture.read(&mut |_| Ok(())).unwrap().len(), 3);
                assert_eq!(start.elapsed() >= LIMIT, waits, "{backend}: {attributes:?}");
            }
        }
    }
}

#[test]
fn what_is_stopped_leaves_nothing_at_whatever_step() {
    for (backend, to) in [(Backend::File, Backend::Db), (Backend::Db, Backend::File)] {
        let fixture = fixture(backend);
        let there = fixture.directory.path().join("new");
        let options = Options {
            backend: to,
            ..fixture.store.options().clone()
        };
        let (target, made) = open_target(&there, &fixture.store, options, Arc::default()).unwrap();
        assert!(made);
        let place = fixture.store.path().join("t");
        let mut most = 0;
        let stopped = || Error::new(ErrorKind::System(nix::libc::EINTR), "stopped");
        loop {
            let mut steps = 0;
            let done = convert(&*fixture.token, &place, &target, 0o077, &mut |_| {
                steps += 1;
                if steps > most { Err(stopped()) } else { Ok(()) }
            });
            match done {
                Ok(converted) => {
                    assert_eq!((converted.objects, converted.undated), (2, None));
                    break;
                }
                Err(failures) => {
                    assert_eq!(failures.len(), 1, "{to}: step {most}: {failures:?}");
                    assert_eq!(failures[0].detail(), "stopped", "{to}: step {most}");
                }
            }
            assert_eq!(
                fs::read_dir(&there).unwrap().count(),
                0,
                "{to}: step {most}"
            );
            most += 1;
        }
        // Found, 3 read, looked at again, 3 made.
        assert!(most >= 8, "{most} steps");
        assert_eq!(target.tokens().unwrap().len(), 1);
    }
}
