//! That what the other tests stand on says what is so: the independent reader agrees with SoftHSM's own dump and with
//! PKCS #11 sessions, on stores of two versions and both backends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::collections::BTreeMap;
use std::fs;

use support::independent::{self, Object, Value};
use support::template::{boolean, bytes, ulong};
use support::*;

/// Objects of a golden store, each token's in a stable order.
fn count(softhsm: &Softhsm) -> Vec<usize> {
    let mut counts: Vec<usize> = softhsm.read().values().map(|t| t.objects.len()).collect();
    counts.sort_unstable();
    counts
}

#[test]
fn golden_stores_have_what_their_readme_says() {
    for golden in GOLDEN {
        for backend in BACKENDS {
            let softhsm = Softhsm::golden(golden, backend);
            assert_eq!(count(&softhsm), [0, 2, 2, 32], "{golden} {backend}");
            let store = softhsm.read();
            let mut labels: Vec<String> = store
                .values()
                .map(|t| {
                    let label =
                        independent::get_bytes(&t.token, independent::CKA_OS_TOKENLABEL).unwrap();
                    String::from_utf8_lossy(label).trim_end().to_owned()
                })
                .collect();
            labels.sort();
            assert_eq!(labels, ["Prod Schlüssel 1", "dup", "dup", "sopin-only"]);
            assert!(
                store
                    .values()
                    .all(|t| t.backend == backend && t.damaged.is_empty())
            );
            let maps = store.values().flat_map(|t| t.objects.values().flatten());
            let maps: Vec<_> = maps
                .filter_map(|(_, value)| match value {
                    Value::Map(map) if !map.is_empty() => Some(map.len()),
                    _ => None,
                })
                .collect();
            assert_eq!(maps, [4, 7], "{golden} {backend}");
        }
    }
}

#[test]
fn the_same_objects_are_in_both_backends() {
    // But for what is random or encrypted: the types and kinds of all objects.
    let shapes = |softhsm: &Softhsm| {
        let mut shapes: Vec<_> = softhsm
            .read()
            .values()
            .flat_map(|t| t.objects.values())
            .map(|object| {
                object
                    .iter()
                    .map(|(t, v)| (*t, v.kind()))
                    .collect::<BTreeMap<_, _>>()
            })
            .collect();
        shapes.sort_unstable();
        shapes
    };
    for golden in GOLDEN {
        let [file, db] = BACKENDS.map(|backend| shapes(&Softhsm::golden(golden, backend)));
        assert_eq!(file, db, "{golden}");
    }
}

/// The bytes of an object as `softhsm2-dump-file` lays them out, a number or eight bytes a line.
fn dump_lines(generation: u64, object: &Object) -> Vec<Vec<u8>> {
    fn value_lines(lines: &mut Vec<Vec<u8>>, attribute_type: u64, value: &Value) {
        let number =
            |lines: &mut Vec<Vec<u8>>, number: u64| lines.push(number.to_be_bytes().to_vec());
        number(lines, attribute_type);
        let kind = ["bool", "ulong", "bytes", "map", "mechs"]
            .iter()
            .position(|k| *k == value.kind());
        number(lines, kind.unwrap() as u64 + 1);
        match value {
            Value::Bool(value) => lines.push(vec![if *value { 0xff } else { 0 }]),
            Value::Ulong(value) => number(lines, *value),
            Value::Bytes(value) => {
                number(lines, value.len() as u64);
                lines.extend(value.chunks(8).map(<[u8]>::to_vec));
            }
            Value::Mechs(value) => {
                number(lines, value.len() as u64);
                value.iter().for_each(|m| number(lines, *m));
            }
            Value::Map(map) => {
                let mut inner = Vec::new();
                map.iter()
                    .for_each(|(t, value)| value_lines(&mut inner, *t, value));
                number(lines, inner.concat().len() as u64);
                lines.extend(inner);
            }
        }
    }
    let mut lines = vec![generation.to_be_bytes().to_vec()];
    object
        .iter()
        .for_each(|(t, value)| value_lines(&mut lines, *t, value));
    lines
}

#[test]
fn the_independent_reader_agrees_with_softhsms_dump() {
    let mut compared = 0;
    for golden in GOLDEN {
        let softhsm = Softhsm::golden(golden, Backend::File);
        for path in walk(&softhsm.tokendir) {
            if path.extension().is_none_or(|e| e != "object") {
                continue;
            }
            let (generation, object) =
                independent::parse_object(&fs::read(&path).unwrap()).unwrap();
            // It exits with 1 when all is well.
            let dump = tool("softhsm2-dump-file").arg(&path).output().unwrap();
            let text = String::from_utf8_lossy(&dump.stdout).into_owned();
            let dumped: Vec<Vec<u8>> = text
                .lines()
                .skip(1)
                .map(|line| {
                    let column: String = line.chars().take(24).collect();
                    template_bytes(&column)
                })
                .filter(|line| !line.is_empty())
                .collect();
            assert_eq!(
                dump_lines(generation, &object),
                dumped,
                "{}",
                path.display()
            );
            compared += 1;
        }
    }
    assert_eq!(compared, 2 * (36 + 4));
}

fn template_bytes(column: &str) -> Vec<u8> {
    support::template::unhex(&column.replace(' ', "")).unwrap()
}

#[test]
fn a_pin_opens_what_a_session_shows() {
    for golden in GOLDEN {
        for backend in BACKENDS {
            let softhsm = Softhsm::golden(golden, backend);
            let store = softhsm.read();
            let mut client = softhsm.p11();
            let mut sessions = 0;
            for token in store.values() {
                let so = independent::token_key(token, independent::CKA_OS_SOPIN, SO_PIN)
                    .expect("the SO PIN");
                let Some(key) = independent::token_key(token, independent::CKA_OS_USERPIN, PIN)
                else {
                    assert!(token.objects.is_empty());
                    continue;
                };
                assert_eq!(key, so, "both PINs lead to the token's key");
                assert_eq!(
                    independent::token_key(token, independent::CKA_OS_USERPIN, "4321"),
                    None
                );
                let serial = String::from_utf8(
                    independent::get_bytes(&token.token, 0x8000_534a)
                        .unwrap()
                        .to_vec(),
                );
                client.open(&serial.unwrap(), Some(PIN)).unwrap();
                sessions += 1;
                let clear = token
                    .objects
                    .values()
                    .map(|o| independent::in_the_clear(o, &key));
                let mut clear: Vec<Object> = clear.collect::<Result<_, _>>().unwrap();
                for found in client.find(&[]).unwrap() {
                    let seen = client.get(found.handle).unwrap();
                    assert!(seen.len() > 8, "{seen:?}");
                    let mut why = Vec::new();
                    let at = clear.iter().position(|o| {
                        match independent::matches_session(backend, o, &seen) {
                            Ok(()) => true,
                            Err(reason) => {
                                why.push(reason);
                                false
                            }
                        }
                    });
                    let at = at.unwrap_or_else(|| {
                        panic!("{golden} {backend}: {found:?} is not stored: {why:#?}")
                    });
                    clear.remove(at);
                }
                assert!(
                    clear.is_empty(),
                    "{golden} {backend}: not seen by the session: {clear:?}"
                );
            }
            assert_eq!(sessions, 3);
        }
    }
}

both_backends! {
    fn sessions_stay_open_beside_each_other(backend) {
        let (softhsm, mut first) = Softhsm::with_token(backend);
        let mut second = softhsm.p11();
        second.open("test", Some(PIN)).unwrap();
        let data = [ulong(0, 0), boolean(1, true), boolean(2, true), bytes(3, "one"), bytes(0x11, "value")];
        let handle = first.create(&data).unwrap();
        let theirs = second.find_label("one").unwrap();
        assert_eq!(theirs.len(), 1);
        first.set_label(handle, "two").unwrap();
        assert_eq!(second.label(theirs[0]).unwrap().as_deref(), Some(b"two".as_slice()));
        assert_eq!(second.get_bytes(theirs[0], 0x11).unwrap().as_deref(), Some(b"value".as_slice()));
        second.destroy(theirs[0]).unwrap();
        assert!(first.find_label("two").unwrap().is_empty());
        let refused = first.open("test", Some("wrong")).unwrap_err();
        assert_eq!(refused, Refusal("CKR_PIN_INCORRECT".into()));
    }

    fn keys_sign(backend) {
        let (_softhsm, mut client) = Softhsm::with_token(backend);
        let (public, private) = client
            .generate_pair(
                0,
                &[boolean(1, true), ulong(0x121, 2048), bytes(0x122, [1, 0, 1])],
                &[boolean(1, true), boolean(2, true), bytes(3, "key")],
            )
            .unwrap();
        let signature = client.sign(private, 0x40, b"text").unwrap();
        assert!(client.verify(public, 0x40, b"text", &signature).unwrap());
        assert!(!client.verify(public, 0x40, b"other", &signature).unwrap());
        assert_eq!(client.find_label("key").unwrap(), [private]);
    }

    fn other_users_have_their_own_softhsm(backend) {
        if !is_root() {
            return;
        }
        let softhsm = Softhsm::new(backend);
        give(softhsm.directory.path(), ALICE);
        let mut client = P11::start_as(&softhsm, ALICE);
        client.init_token("hers", Some(PIN)).unwrap();
        client.open("hers", Some(PIN)).unwrap();
        let objects = client.bulk(3, "object ", &[ulong(0, 0), boolean(1, true), boolean(2, false)]).unwrap();
        assert_eq!(objects.len(), 3);
        let store = softhsm.read();
        assert_eq!(store.values().next().unwrap().objects.len(), 3);
        let mut theirs = P11::start_as(&softhsm, BOB);
        assert_eq!(theirs.tokens().unwrap(), []);
        assert_eq!(fs::metadata(softhsm.token_directory()).map(|m| std::os::unix::fs::MetadataExt::uid(&m)).unwrap(), ALICE.uid);
    }
}

#[test]
fn a_snapshot_sees_every_change() {
    let softhsm = Softhsm::golden(Golden::V2_6_1, Backend::File);
    let before = softhsm.snapshot();
    let _ = softhsm.read();
    before.assert_same(&softhsm.snapshot());
    let object = walk(&softhsm.tokendir)
        .into_iter()
        .rfind(|p| p.extension().is_some_and(|e| e == "lock"))
        .unwrap();
    set_mode(&object, 0o640);
    assert!(before.difference(&softhsm.snapshot()).contains("640"));
    set_mode(&object, 0o600);
    fs::write(&object, "x").unwrap();
    assert_eq!(before.difference(&softhsm.snapshot()).lines().count(), 1);
}
