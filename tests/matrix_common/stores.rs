//! The stores of the matrix, which real SoftHSMs fill: what is backed up, and what it is restored into.

use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use super::{Pair, Scope, State, all_pairs};
use crate::support::independent::{self, Object, Value};
use crate::support::template::{Attribute, boolean, bytes, mechs, template, ulong};
use crate::support::*;
use crate::write_common::{CKA_APPLICATION, CKA_ID, CKA_VALUE, CKM_EC_KEY_PAIR_GEN, leftovers};

pub const CLASS: u64 = 0;
pub const KEY_TYPE: u64 = 0x100;
pub const PUBLIC_KEY: u64 = 2;
pub const PRIVATE_KEY: u64 = 3;
pub const EC: u64 = 3;

const CKM_RSA_KEY_PAIR_GEN: u64 = 0;
const CKM_SHA256_RSA_PKCS: u64 = 0x40;
const CKM_AES_KEY_GEN: u64 = 0x1080;
const MODULUS_BITS: u64 = 0x121;
const PUBLIC_EXPONENT: u64 = 0x122;
const EC_PARAMS: u64 = 0x180;
const ALLOWED_MECHANISMS: u64 = 0x4000_0600;
const WRAP_TEMPLATE: u64 = 0x4000_0211;
const UNWRAP_TEMPLATE: u64 = 0x4000_0212;

/// The label of the token that single tokens and objects are taken from.
pub const FIRST: &str = "Prod Schlüssel 1";
/// That of the other one.
pub const SECOND: &str = "zweites ☃";
/// The PIN of the first token in the changed stores.
pub const OTHER_PIN: &str = "4321";

/// A copy of a store, in memory.
pub fn copy(store: &Softhsm) -> Softhsm {
    let copy = Softhsm::new_in(store.backend, temporary_in_memory());
    let both = [store.tokendir.join("."), copy.tokendir.clone()];
    run(tool("cp").arg("-a").args(both));
    copy
}

/// The same in another backend, or a copy in the same one, made by `cp -a` through two mounts.
fn converted(store: &Softhsm, to: Backend) -> Softhsm {
    if store.backend == to {
        return copy(store);
    }
    let target = Softhsm::new_in(to, temporary_in_memory());
    let (out, into) = (Mount::new(store), Mount::new(&target));
    run(tool("cp").arg("-a").args([&out.join("."), into.path()]));
    into.unmount();
    assert!(leftovers(&target.tokendir).is_empty());
    target
}

fn open(store: &Softhsm, label: &str) -> P11 {
    let mut client = store.p11();
    client.open(label, Some(PIN)).unwrap();
    client
}

fn data(label: &str, private: bool, value: &[u8]) -> [Attribute; 6] {
    [
        ulong(CLASS, 0),
        boolean(1, true),
        boolean(2, private),
        bytes(3, label),
        bytes(CKA_APPLICATION, "matrix"),
        bytes(CKA_VALUE, value),
    ]
}
/// The store as it was before the two that are compared went their ways.
fn base(backend: Backend) -> Softhsm {
    let store = Softhsm::new_in(backend, temporary_in_memory());
    let mut client = store.p11();
    client.init_token(FIRST, Some(PIN)).unwrap();
    client.init_token(SECOND, Some(PIN)).unwrap();
    client.open(FIRST, Some(PIN)).unwrap();
    let named = |label: &str, private: bool| {
        vec![
            boolean(1, true),
            boolean(2, private),
            bytes(3, label),
            bytes(CKA_ID, label),
        ]
    };
    let with = |mut list: Vec<Attribute>, more: Vec<Attribute>| {
        list.extend(more);
        list
    };
    let exponent = bytes(PUBLIC_EXPONENT, [1, 0, 1]);
    let allowed = mechs(ALLOWED_MECHANISMS, &[CKM_SHA256_RSA_PKCS, 1]);
    client
        .generate_pair(
            CKM_RSA_KEY_PAIR_GEN,
            &with(
                named("rsa", false),
                vec![ulong(MODULUS_BITS, 2048), exponent],
            ),
            &with(named("rsa", true), vec![allowed]),
        )
        .unwrap();
    let curve = bytes(EC_PARAMS, [6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7]);
    client
        .generate_pair(
            CKM_EC_KEY_PAIR_GEN,
            &with(named("schlüssel", false), vec![curve]),
            &named("schlüssel", true),
        )
        .unwrap();
    let wrap = template(
        WRAP_TEMPLATE,
        vec![
            bytes(3, "wrappable"),
            ulong(KEY_TYPE, 0x1f),
            boolean(0x162, true),
        ],
    );
    let unwrap = template(
        UNWRAP_TEMPLATE,
        vec![
            bytes(CKA_APPLICATION, []),
            boolean(0x162, false),
            mechs(ALLOWED_MECHANISMS, &[0x1082]),
        ],
    );
    client
        .generate(
            CKM_AES_KEY_GEN,
            &with(named("aes", true), vec![ulong(0x161, 32), wrap, unwrap]),
        )
        .unwrap();
    let certificate = include_bytes!("../support/data/certificate.der");
    client
        .create(&with(
            named("certificate", false),
            vec![
                ulong(CLASS, 1),
                ulong(0x80, 0),
                bytes(0x101, &certificate[149..214]),
                bytes(CKA_VALUE, certificate),
            ],
        ))
        .unwrap();
    client
        .create(&data("дані ☃/\n", false, &[7; 9000]))
        .unwrap();
    client.create(&data("empty", true, b"")).unwrap();
    client
        .create(&data("to go", false, b"gone in the changed store"))
        .unwrap();
    client.open(SECOND, Some(PIN)).unwrap();
    client
        .create(&data("öffentlich", false, b"\0\xff"))
        .unwrap();
    client.create(&data("privat", true, b"secret")).unwrap();
    client.close().unwrap();
    // Long ago: rsync tells times apart by the second.
    drop(client);
    sh(&store.tokendir, "find . -exec touch -d @1600000000 {} +");
    store
}

/// What was made after that, and is in the backup. In the `db` backend it has the name of what the other store made then.
fn go_on(store: &Softhsm) {
    let mut client = open(store, FIRST);
    client
        .create(&data("later", false, b"in the backup"))
        .unwrap();
    // An application looks at the other token, which SoftHSM's `db` backend writes at that. So no object there has the time that it has in the
    // other store by chance, which would be lost there with the next look, since it is the database's.
    client.open(SECOND, Some(PIN)).unwrap();
    client.find(&[]).unwrap();
    client.close().unwrap();
    drop(client);
    // Not in the second in which the other store is changed.
    sh(
        &store.tokendir,
        "find . -newermt @1600000001 -exec touch -d @1700000000 {} +",
    );
}

/// What has happened to the store that the backup comes back into.
fn change(store: &Softhsm) {
    let mut client = open(store, FIRST);
    let key = key(&mut client);
    client.set_label(key, "another label").unwrap();
    for gone in ["to go", "empty"] {
        let found = client.find_label(gone).unwrap();
        client.destroy(found[0]).unwrap();
    }
    client
        .create(&data("elsewhere", false, b"not in the backup"))
        .unwrap();
    client
        .create(&data("besides", true, b"not in the backup either"))
        .unwrap();
    client.init_token("a third", Some(PIN)).unwrap();
    client.open("a third", Some(PIN)).unwrap();
    client.create(&data("third", true, b"")).unwrap();
    client.close().unwrap();
    let mut pin = store.pkcs11_tool();
    pin.args([
        "--login",
        "--pin",
        PIN,
        "--change-pin",
        "--new-pin",
        OTHER_PIN,
    ]);
    run(pin.args(["--token-label", FIRST]));
    let object = key_name(store);
    let mount = Mount::new(store);
    let key = mount.join(object);
    sh(
        &key,
        "echo true >CKA_DERIVE; echo true >0x80001235.bool; rm CKA_START_DATE; printf 20300101 >CKA_END_DATE",
    );
    mount.unmount();
}

/// A session's handle of the private EC key.
pub fn key(client: &mut P11) -> u64 {
    let found = client
        .find(&[ulong(CLASS, PRIVATE_KEY), ulong(KEY_TYPE, EC)])
        .unwrap();
    assert_eq!(found.len(), 1, "the key");
    found[0].handle
}

fn has(object: &Object, attribute_type: u64, value: u64) -> bool {
    independent::get(object, attribute_type) == Some(&Value::Ulong(value))
}

/// The name of the directory of a token.
pub fn token_name(store: &Softhsm, label: &str) -> String {
    let labelled = format!("{label:32}").into_bytes();
    let padded = [label.as_bytes(), &[b' '; 32][label.len()..]].concat();
    let found = store.read().into_iter().find(|(_, token)| {
        let stored = independent::get_bytes(&token.token, 0x8000_5349);
        stored == Some(&padded) || stored == Some(&labelled)
    });
    found.unwrap_or_else(|| panic!("no token {label}")).0
}

/// The path in a mount of the private EC key of the first token.
pub fn key_name(store: &Softhsm) -> String {
    let name = token_name(store, FIRST);
    let token = &store.read()[&name];
    let mut found = token.objects.iter();
    let (id, _) = found
        .find(|(_, object)| has(object, CLASS, PRIVATE_KEY) && has(object, KEY_TYPE, EC))
        .expect("the key");
    format!(
        "{name}/{}",
        crate::mount_common::object_name(store.backend, &name, id)
    )
}

/// All of them, each made when it is first asked for.
#[derive(Debug, Default)]
pub struct Stores {
    base: [OnceLock<Softhsm>; 2],
    now: [OnceLock<Softhsm>; 2],
    changed: [OnceLock<Softhsm>; 4],
    lacking_token: [OnceLock<Softhsm>; 4],
    lacking_object: [OnceLock<Softhsm>; 4],
}

impl Stores {
    /// The same ones for all tests that run at the same time; gone with the last of them.
    pub fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Stores>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let stores = Arc::default();
            *shared = Arc::downgrade(&stores);
            stores
        })
    }

    fn base(&self, backend: Backend) -> &Softhsm {
        self.base[usize::from(backend == Backend::Db)].get_or_init(|| base(backend))
    }

    /// What is backed up.
    pub fn now(&self, backend: Backend) -> &Softhsm {
        self.now[usize::from(backend == Backend::Db)].get_or_init(|| {
            let store = copy(self.base(backend));
            go_on(&store);
            store
        })
    }

    fn changed(&self, pair: Pair) -> &Softhsm {
        let (from, to) = pair;
        self.changed[index(pair)].get_or_init(|| {
            if from != to {
                return converted(self.changed((from, from)), to);
            }
            let store = copy(self.base(from));
            change(&store);
            store
        })
    }

    fn lacking_token(&self, pair: Pair) -> &Softhsm {
        self.lacking_token[index(pair)].get_or_init(|| {
            let store = converted(self.now(pair.0), pair.1);
            std::fs::remove_dir_all(store.tokendir.join(token_name(&store, FIRST))).unwrap();
            store
        })
    }

    fn lacking_object(&self, pair: Pair) -> &Softhsm {
        self.lacking_object[index(pair)].get_or_init(|| {
            let store = converted(self.now(pair.0), pair.1);
            let mut client = open(&store, FIRST);
            let key = key(&mut client);
            client.destroy(key).unwrap();
            client.close().unwrap();
            store
        })
    }

    /// What something is restored into: a copy, which may be changed.
    pub fn target(&self, pair: Pair, scope: Scope, state: State) -> Softhsm {
        match (state, scope) {
            (State::Empty, _) => Softhsm::new_in(pair.1, temporary_in_memory()),
            (State::Changed, _) => copy(self.changed(pair)),
            (State::Lacking, Scope::Object) => copy(self.lacking_object(pair)),
            (State::Lacking, _) => copy(self.lacking_token(pair)),
        }
    }
}

fn index(pair: Pair) -> usize {
    let all = all_pairs();
    all.iter().position(|other| *other == pair).expect("a pair")
}
