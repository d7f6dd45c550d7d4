//! What `.tokenfs/file` is looked at with: copies of it, what is in them, and a SoftHSM that works on them.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::mount_common::object_name;
use crate::support::independent::{self, Object, Token};
use crate::support::template::ulong;
use crate::support::*;
use crate::write_common::*;

pub fn layout(mount: &Mount) -> PathBuf {
    mount.join(".tokenfs/file")
}

/// `cp -a` of all of it, which must have nothing to say.
pub fn copied(mount: &Mount) -> Softhsm {
    let softhsm = Softhsm::new(Backend::File);
    let from = layout(mount).join(".");
    let output = run(tool("cp").arg("-a").arg(from).arg(&softhsm.tokendir));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    softhsm
}

/// What a store holds, by the names in the mount, in the order of the types.
pub fn content(
    store: &BTreeMap<String, Token>,
) -> BTreeMap<String, (Object, BTreeMap<String, Object>)> {
    let sorted = |object: &Object| {
        let mut object = object.clone();
        object.sort_by_key(|(attribute_type, _)| *attribute_type);
        object
    };
    store
        .iter()
        .map(|(name, token)| {
            assert!(token.damaged.is_empty(), "{:?}", token.damaged);
            let objects = token
                .objects
                .iter()
                .map(|(id, object)| (object_name(token.backend, name, id), sorted(object)));
            (name.clone(), (sorted(&token.token), objects.collect()))
        })
        .collect()
}

/// A session that logs in there finds the objects of the store, and signs with the private key what the session on the store itself
/// verifies with the public one.
pub fn assert_works(bench: &mut Bench, other: &Softhsm) -> P11 {
    let mut client = other.p11();
    client.open("test", Some(PIN)).unwrap();
    let stored = bench.softhsm.read()[&bench.token].objects.len();
    assert_eq!(client.find(&[]).unwrap().len(), stored);
    let private = client.find(&[ulong(0, 3)]).unwrap();
    assert_eq!(private.len(), 1);
    assert_eq!(private[0].label.as_deref(), Some(&b"private"[..]));
    for round in 0..3 {
        let signature = client
            .sign(private[0].handle, CKM_ECDSA, &[round; 32])
            .unwrap();
        let public = bench.handles.1;
        let verified = bench
            .client
            .verify(public, CKM_ECDSA, &[round; 32], &signature);
        assert_eq!(verified, Ok(true));
    }
    client
}

/// Each token that has a PIN shows a session all of its objects.
pub fn assert_opens(softhsm: &Softhsm) {
    let mut client = softhsm.p11();
    let mut opened = 0;
    for token in softhsm.read().into_values() {
        let pin = independent::CKA_OS_USERPIN;
        if independent::token_key(&token, pin, PIN).is_some() {
            let serial = independent::get_bytes(&token.token, 0x8000_534a).unwrap();
            let serial = std::str::from_utf8(serial).unwrap();
            client.open(serial, Some(PIN)).unwrap();
            assert_eq!(client.find(&[]).unwrap().len(), token.objects.len());
            opened += 1;
        }
    }
    assert_eq!(opened, 3);
}
