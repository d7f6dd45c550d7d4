//! A mount shows the store, all of it and nothing else: every file and directory is held against the independent reader,
//! with tables of names that are not the crate's, and against what PKCS #11 sessions say.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod mount_common;
mod support;

use std::fs;

use mount_common::*;
use support::independent::{self, Object};
use support::*;

/// What is in the mount, opened with the PIN, is what sessions see: no object more or less, and no other value.
fn assert_sessions_agree(softhsm: &Softhsm, mount: &Mount, sessions: usize) {
    let mut client = softhsm.p11();
    let mut opened = 0;
    for (name, token) in tokens(mount, softhsm.backend) {
        let Some(key) = independent::token_key(&token, independent::CKA_OS_USERPIN, PIN) else {
            assert!(token.objects.is_empty(), "{name}");
            continue;
        };
        let serial = independent::get_bytes(&token.token, 0x8000_534a)
            .unwrap()
            .to_vec();
        client
            .open(&String::from_utf8(serial).unwrap(), Some(PIN))
            .unwrap();
        opened += 1;
        let clear = token
            .objects
            .values()
            .map(|o| independent::in_the_clear(o, &key));
        let mut clear: Vec<Object> = clear.collect::<Result<_, _>>().unwrap();
        for found in client.find(&[]).unwrap() {
            let seen = client.get(found.handle).unwrap();
            let told = seen.iter().filter(|(_, value)| value.is_some()).count();
            assert!(told > 7, "{seen:?}");
            let mut why = Vec::new();
            let at = clear.iter().position(|object| {
                let matches = independent::matches_session(softhsm.backend, object, &seen);
                matches.map_err(|reason| why.push(reason)).is_ok()
            });
            let at = at.unwrap_or_else(|| panic!("{found:?} is not in the mount: {why:#?}"));
            clear.remove(at);
        }
        assert!(clear.is_empty(), "no session sees {clear:?}");
    }
    assert_eq!(opened, sessions);
}

/// A mount is the store, before a SoftHSM has opened it and after that too.
fn check(softhsm: &Softhsm, objects: usize) {
    let before = softhsm.snapshot();
    let mount = Mount::new(softhsm);
    let tree = expected(softhsm);
    let directories = tree.keys().filter(|p| p.components().count() == 2).count();
    assert_eq!(
        directories,
        objects + 4,
        "objects, and token/ of four tokens"
    );
    assert_same(&tree, &seen(&mount));
    before.assert_same(&softhsm.snapshot());
    assert_sessions_agree(softhsm, &mount, 3);
    // The sessions have logged in, which writes. `token.object`, and whatever `db` has added, show up by themselves.
    let mut now = seen(&mount);
    let limit = std::time::Duration::from_secs(5);
    eventually(limit, "the mount is what the sessions have left", || {
        now = seen(&mount);
        now == expected(softhsm)
    });
    assert_eq!(fs::read_to_string(mount.join(".tokenfs/log")).unwrap(), "");
    mount.unmount();
}

both_backends! {
    fn golden_stores_of_2_6_1(backend) {
        check(&Softhsm::golden(Golden::V2_6_1, backend), 36);
    }

    fn golden_stores_of_2_7_0(backend) {
        check(&Softhsm::golden(Golden::V2_7_0, backend), 36);
    }

    fn stores_just_written(backend) {
        let softhsm = Softhsm::new(backend);
        let mut client = softhsm.p11();
        client.populate().unwrap();
        // The writer goes on beside the mount.
        check(&softhsm, 36);
        drop(client);
    }

    fn an_empty_store_is_an_empty_directory(backend) {
        let softhsm = Softhsm::new(backend);
        let mount = Mount::new(&softhsm);
        assert_same(&expected(&softhsm), &seen(&mount));
        assert_eq!(seen(&mount).len(), 1);
    }

    fn what_pkcs11_has_no_name_for_is_shown_by_number(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        let store = softhsm.read();
        let (token, object) = store.iter().find_map(|(name, token)| {
            let public = |o: &&String| token.objects.len() == 2 && !independent::is_private(&token.objects[*o]);
            Some((name.clone(), token.objects.keys().find(public)?.clone()))
        }).unwrap();
        let directory = softhsm.tokendir.join(&token);
        let mut files = vec![
            ("0x80001234.bytes", b"\0\xff\n".to_vec()),
            ("0x80001235.bool", b"true\n".to_vec()),
            ("0x80001236.ulong", b"18446744073709551614\n".to_vec()),
            ("CKA_URL.bool", b"false\n".to_vec()),
            ("CKA_KEY_TYPE", b"0x80000007\n".to_vec()),
            ("CKA_VALUE_LEN", b"CK_UNAVAILABLE_INFORMATION\n".to_vec()),
            ("CKA_ALLOWED_MECHANISMS", b"CKM_RSA_PKCS\nCKM_SHA_1\n0x80000007\n".to_vec()),
        ];
        match backend {
            Backend::File => {
                files.push(("0x123456789a.mechs", Vec::new()));
                files.push(("0x80001238.map/0x80001234.bytes", b"in".to_vec()));
                let path = directory.join(format!("{object}.object"));
                let mut data = fs::read(&path).unwrap();
                let mut put = |attribute_type: u64, kind: u64, value: &[u8]| {
                    data.extend(attribute_type.to_be_bytes());
                    data.extend(kind.to_be_bytes());
                    data.extend(value);
                };
                let numbers = |all: &[u64]| all.iter().flat_map(|n| n.to_be_bytes()).collect::<Vec<u8>>();
                put(0x8000_1234, 3, &[&numbers(&[3])[..], b"\0\xff\n"].concat());
                put(0x8000_1235, 1, &[7]);
                put(0x8000_1236, 2, &numbers(&[u64::MAX - 1]));
                put(0x89, 1, &[0]);
                put(0x100, 2, &numbers(&[0x8000_0007]));
                put(0x161, 2, &numbers(&[u64::MAX]));
                put(0x4000_0600, 5, &numbers(&[3, 0x8000_0007, 0x220, 1]));
                put(0x12_3456_789a, 5, &numbers(&[0]));
                put(0x8000_1238, 4, &[&numbers(&[26, 0x8000_1234, 3, 2])[..], b"in"].concat());
                fs::write(&path, data).unwrap();
            }
            Backend::Db => {
                let sql = format!(
                    "insert into attribute_binary (value, type, object_id) values (x'00FF0A', {}, {object});
                     insert into attribute_boolean (value, type, object_id) values (1, {}, {object}), (0, 137, {object});
                     insert into attribute_integer (value, type, object_id)
                         values (-2, {}, {object}), ({}, 256, {object}), (-1, 353, {object});
                     insert into attribute_binary (value, type, object_id)
                         values (x'070000800000000020020000000000000100000000000000', {}, {object})",
                    0x8000_1234_u32, 0x8000_1235_u32, 0x8000_1236_u32, 0x8000_0007_u32, 0x4000_0600
                );
                run(tool("sqlite3").arg(directory.join("sqlite3.db")).arg(sql));
            }
        }
        let mount = Mount::new(&softhsm);
        let shown = mount.join(&token).join(object_name(backend, &token, &object));
        for (name, content) in &files {
            assert_eq!(&fs::read(shown.join(name)).unwrap(), content, "{name}");
        }
        // Each attribute has one name.
        for other in ["CKA_LABEL.bytes", "cka_label", "0x00000003.bytes", "0x80001234", "CKA_URL", "CKA_NEWNAME"] {
            let error = fs::metadata(shown.join(other)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(nix::libc::ENOENT), "{other}");
        }
        assert_same(&expected(&softhsm), &seen(&mount));
    }
}
