//! What SoftHSM stores of an object of each class, by which a copy that is held up is told from a finished one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod mount_common;
mod support;
mod write_common;

use std::fs;

use support::template::{boolean, bytes, ulong};
use support::*;
use tokenfs::store::attribute::Attributes;
use tokenfs::store::classes::is_complete;
use tokenfs::store::file::decode;
use write_common::fill;

/// The objects of a `file` token, as they are stored.
fn stored(softhsm: &Softhsm) -> Vec<Attributes> {
    let files = walk(&softhsm.token_directory());
    let is_object = |path: &&std::path::PathBuf| {
        path.extension().is_some_and(|end| end == "object")
            && path.file_stem().is_some_and(|stem| stem != "token")
    };
    let objects = files.iter().filter(is_object);
    let decoded = objects.map(|path| decode(&fs::read(path).unwrap()).unwrap().attributes);
    decoded.collect()
}

#[test]
fn what_softhsm_makes_is_complete_and_without_any_of_it_is_not() {
    let (softhsm, mut client) = Softhsm::with_token(Backend::File);
    fill(&mut client);
    let of_token = || vec![boolean(1, true)];
    let mut modulus = of_token();
    modulus.extend([ulong(0x121, 1024), bytes(0x122, [1, 0, 1])]);
    client.generate_pair(0, &modulus, &of_token()).unwrap();
    let mut curve = of_token();
    // The name of Ed25519 that SoftHSM has for it.
    curve.push(bytes(0x180, b"\x13\x0cedwards25519"));
    client.generate_pair(0x1055, &curve, &of_token()).unwrap();
    for mechanism in [0x350, 0x1080] {
        let mut secret = of_token();
        secret.push(ulong(0x161, 32));
        client.generate(mechanism, &secret).unwrap();
    }
    for mechanism in [0x130, 0x131] {
        client.generate(mechanism, &of_token()).unwrap();
    }
    let mut certificate = of_token();
    certificate.extend([ulong(0, 1), ulong(0x80, 0), bytes(0x101, "subject")]);
    certificate.push(bytes(0x11, "value"));
    client.create(&certificate).unwrap();
    let objects = stored(&softhsm);
    assert_eq!(objects.len(), 3 + 2 + 2 + 2 + 2 + 1);
    for object in objects {
        let class = object.ulong(0);
        assert!(is_complete(&object), "class {class:?}: {object:?}");
        for (without, _) in object.iter() {
            let mut less = Attributes::new();
            for (key, value) in object.iter().filter(|(key, _)| *key != without) {
                less.insert(key.attribute_type, value.clone());
            }
            assert!(
                !is_complete(&less),
                "class {class:?} without {:#x}",
                without.attribute_type
            );
        }
    }
}
