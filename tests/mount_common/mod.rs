//! What a mount has to show for what an independent reader finds in the store, with tables of names that are not the
//! crate's; what it does show; and the way back from its files to attributes.
#![allow(dead_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::support::independent::{Object, Token, Value};
use crate::support::*;

/// Names and numbers from the header of PKCS #11.
macro_rules! header {
    ($($name:ident)*) => { &[$((stringify!($name), cryptoki_sys::$name as u64)),*] };
}

type Names = &'static [(&'static str, u64)];

const BOOLEANS: Names = header! {
    CKA_TOKEN CKA_PRIVATE CKA_TRUSTED CKA_SENSITIVE CKA_ENCRYPT CKA_DECRYPT CKA_WRAP CKA_UNWRAP CKA_SIGN
    CKA_SIGN_RECOVER CKA_VERIFY CKA_VERIFY_RECOVER CKA_DERIVE CKA_EXTRACTABLE CKA_LOCAL CKA_NEVER_EXTRACTABLE
    CKA_ALWAYS_SENSITIVE CKA_MODIFIABLE CKA_COPYABLE CKA_DESTROYABLE CKA_ALWAYS_AUTHENTICATE CKA_WRAP_WITH_TRUSTED
};
const ULONGS: Names = header! {
    CKA_CLASS CKA_CERTIFICATE_TYPE CKA_CERTIFICATE_CATEGORY CKA_JAVA_MIDP_SECURITY_DOMAIN CKA_NAME_HASH_ALGORITHM
    CKA_KEY_TYPE CKA_MODULUS_BITS CKA_PRIME_BITS CKA_VALUE_BITS CKA_VALUE_LEN CKA_KEY_GEN_MECHANISM
};
const BYTES: Names = header! {
    CKA_LABEL CKA_APPLICATION CKA_VALUE CKA_OBJECT_ID CKA_ISSUER CKA_SERIAL_NUMBER CKA_URL
    CKA_HASH_OF_SUBJECT_PUBLIC_KEY CKA_HASH_OF_ISSUER_PUBLIC_KEY CKA_CHECK_VALUE CKA_SUBJECT CKA_ID CKA_START_DATE
    CKA_END_DATE CKA_MODULUS CKA_PUBLIC_EXPONENT CKA_PRIVATE_EXPONENT CKA_PRIME_1 CKA_PRIME_2 CKA_EXPONENT_1
    CKA_EXPONENT_2 CKA_COEFFICIENT CKA_PUBLIC_KEY_INFO CKA_PRIME CKA_BASE CKA_EC_PARAMS CKA_EC_POINT
};
const MECHS: Names = header! { CKA_ALLOWED_MECHANISMS };
const MAPS: Names = header! { CKA_WRAP_TEMPLATE CKA_UNWRAP_TEMPLATE };
/// SoftHSM's own (`OSAttributes.h`).
const TOKEN_BYTES: Names = &[
    ("CKA_OS_TOKENLABEL", 0x8000_5349),
    ("CKA_OS_TOKENSERIAL", 0x8000_534a),
    ("CKA_OS_SOPIN", 0x8000_534c),
    ("CKA_OS_USERPIN", 0x8000_534d),
];
const CKA_OS_TOKENFLAGS: u64 = 0x8000_534b;
const TOKEN_ULONGS: Names = &[("CKA_OS_TOKENFLAGS", CKA_OS_TOKENFLAGS)];
const KINDS: [(&str, &[Names]); 5] = [
    ("bool", &[BOOLEANS]),
    ("ulong", &[ULONGS, TOKEN_ULONGS]),
    ("bytes", &[BYTES, TOKEN_BYTES]),
    ("mechs", &[MECHS]),
    ("map", &[MAPS]),
];

const MECHANISMS: Names = header! {
    CKM_RSA_PKCS_KEY_PAIR_GEN CKM_RSA_PKCS CKM_RSA_PKCS_PSS CKM_SHA256_RSA_PKCS CKM_SHA512_RSA_PKCS CKM_EC_KEY_PAIR_GEN
    CKM_EC_EDWARDS_KEY_PAIR_GEN CKM_AES_KEY_GEN CKM_DES3_KEY_GEN CKM_AES_CBC CKM_AES_GCM CKM_SHA_1
};
const CLASSES: Names = header! {
    CKO_DATA CKO_CERTIFICATE CKO_PUBLIC_KEY CKO_PRIVATE_KEY CKO_SECRET_KEY CKO_DOMAIN_PARAMETERS
};
const KEY_TYPES: Names =
    header! { CKK_RSA CKK_DH CKK_EC CKK_EC_EDWARDS CKK_GENERIC_SECRET CKK_AES CKK_DES3 };
const CERTIFICATE_TYPES: Names = header! { CKC_X_509 };
const FLAGS: Names = header! {
    CKF_RNG CKF_WRITE_PROTECTED CKF_LOGIN_REQUIRED CKF_USER_PIN_INITIALIZED CKF_RESTORE_KEY_NOT_NEEDED
    CKF_CLOCK_ON_TOKEN CKF_PROTECTED_AUTHENTICATION_PATH CKF_DUAL_CRYPTO_OPERATIONS CKF_TOKEN_INITIALIZED
    CKF_SECONDARY_AUTHENTICATION CKF_USER_PIN_COUNT_LOW CKF_USER_PIN_FINAL_TRY CKF_USER_PIN_LOCKED
    CKF_USER_PIN_TO_BE_CHANGED CKF_SO_PIN_COUNT_LOW CKF_SO_PIN_FINAL_TRY CKF_SO_PIN_LOCKED CKF_SO_PIN_TO_BE_CHANGED
};

/// The symbols of a ulong, if it has any.
fn symbols(attribute_type: u64) -> Option<Names> {
    Some(match attribute_type {
        0 => CLASSES,
        0x100 => KEY_TYPES,
        0x80 => CERTIFICATE_TYPES,
        0x166 | 0x8c => MECHANISMS,
        // Only ever "unspecified" here.
        0x87 => &[("CK_CERTIFICATE_CATEGORY_UNSPECIFIED", 0)],
        0x88 => &[("CK_SECURITY_DOMAIN_UNSPECIFIED", 0)],
        _ => return None,
    })
}

fn name_of(names: Names, number: u64) -> Option<&'static str> {
    names
        .iter()
        .find(|(_, n)| *n == number)
        .map(|(name, _)| *name)
}

fn symbol(names: Names, number: u64) -> String {
    name_of(names, number).map_or_else(|| format!("0x{number:08x}"), str::to_owned)
}

/// The file name of an attribute, as docs/tree.md has it.
pub fn file_name(attribute_type: u64, value: &Value) -> String {
    let kind = value.kind();
    let named = KINDS.iter().find_map(|(own, lists)| {
        let name = lists
            .iter()
            .find_map(|list| name_of(list, attribute_type))?;
        Some((name, *own))
    });
    match named {
        Some((name, own)) if own == kind => return name.to_owned(),
        Some((name, _)) => return format!("{name}.{kind}"),
        None => {}
    }
    assert!(
        attribute_type >= 0x8000_0000,
        "the tables of this test lack {attribute_type:#x}"
    );
    format!("0x{attribute_type:08x}.{kind}")
}

/// The text of a value, as docs/tree.md has it.
pub fn text(attribute_type: u64, value: &Value) -> Vec<u8> {
    match value {
        Value::Bool(value) => format!("{value}\n").into_bytes(),
        Value::Ulong(u64::MAX) => b"CK_UNAVAILABLE_INFORMATION\n".to_vec(),
        Value::Ulong(0) if attribute_type == CKA_OS_TOKENFLAGS => b"0\n".to_vec(),
        Value::Ulong(value) if attribute_type == CKA_OS_TOKENFLAGS => {
            let known = FLAGS.iter().fold(0, |all, (_, bit)| all | bit);
            assert_eq!(
                value & !known,
                0,
                "the tables of this test lack flags of {value:#x}"
            );
            let mut set: Vec<_> = FLAGS.iter().filter(|(_, bit)| value & bit != 0).collect();
            set.sort_by_key(|(_, bit)| *bit);
            set.iter()
                .map(|(name, _)| format!("{name}\n"))
                .collect::<String>()
                .into_bytes()
        }
        Value::Ulong(value) => match symbols(attribute_type) {
            Some(names) => format!("{}\n", symbol(names, *value)).into_bytes(),
            None => format!("{value}\n").into_bytes(),
        },
        Value::Bytes(bytes) => bytes.clone(),
        Value::Mechs(mechs) => {
            let mut mechs = mechs.clone();
            mechs.sort_unstable();
            mechs
                .iter()
                .map(|m| symbol(MECHANISMS, *m) + "\n")
                .collect::<String>()
                .into_bytes()
        }
        Value::Map(_) => panic!("a map is a directory"),
    }
}

/// Paths below the mount point, with content if they are files.
pub type Tree = BTreeMap<PathBuf, Option<Vec<u8>>>;

fn add(tree: &mut Tree, directory: &Path, attributes: &[(u64, Value)]) {
    tree.insert(directory.to_owned(), None);
    for (attribute_type, value) in attributes {
        let path = directory.join(file_name(*attribute_type, value));
        match value {
            Value::Map(map) => add(tree, &path, map),
            _ => drop(tree.insert(path, Some(text(*attribute_type, value)))),
        }
    }
}

/// The name that an object has in the mount.
pub fn object_name(backend: Backend, token: &str, id: &str) -> String {
    const NAMESPACE: uuid::Uuid = uuid::uuid!("fcbf94c2-e10e-458a-b5f2-13a8cb3a7d13");
    match backend {
        Backend::File => id.to_owned(),
        // A foreign one that the database remembers.
        Backend::Db if id.parse::<u64>().is_err() => id.to_owned(),
        Backend::Db => {
            uuid::Uuid::new_v5(&NAMESPACE, format!("{token}/{id}").as_bytes()).to_string()
        }
    }
}

/// The tree that a store has to be.
pub fn expected(softhsm: &Softhsm) -> Tree {
    let mut tree = Tree::from([(PathBuf::new(), None)]);
    for (name, token) in softhsm.read() {
        assert!(token.damaged.is_empty());
        tree.insert(PathBuf::from(&name), None);
        add(&mut tree, &Path::new(&name).join("token"), &token.token);
        for (id, object) in &token.objects {
            add(
                &mut tree,
                &Path::new(&name).join(object_name(token.backend, &name, id)),
                object,
            );
        }
    }
    tree
}

/// The tree that a mount is. Every file has the size that `stat` says, before and after it is read.
pub fn seen(mount: &Mount) -> Tree {
    let mut tree = Tree::new();
    for path in walk(mount.path()) {
        let before = fs::symlink_metadata(&path).unwrap();
        assert!(before.is_dir() || before.is_file(), "{}", path.display());
        let content = before.is_file().then(|| {
            let mut file = fs::File::open(&path).unwrap();
            let opened = file.metadata().unwrap().len();
            let mut content = Vec::new();
            file.read_to_end(&mut content).unwrap();
            let after = fs::symlink_metadata(&path).unwrap().len();
            let length = content.len() as u64;
            assert_eq!(
                [before.len(), opened, after],
                [length; 3],
                "size of {}",
                path.display()
            );
            assert_eq!(
                before.blocks(),
                length.div_ceil(512),
                "blocks of {}",
                path.display()
            );
            content
        });
        tree.insert(path.strip_prefix(mount.path()).unwrap().to_owned(), content);
    }
    tree
}

#[track_caller]
pub fn assert_same(expected: &Tree, seen: &Tree) {
    for (path, content) in expected {
        assert_eq!(seen.get(path), Some(content), "{}", path.display());
    }
    let more: Vec<_> = seen
        .keys()
        .filter(|path| !expected.contains_key(*path))
        .collect();
    assert!(more.is_empty(), "not in the store: {more:?}");
}

// ------------------------------------------------------------------------------ from the files back to attributes

fn number(word: &str) -> u64 {
    match word.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).unwrap(),
        None => word.parse().unwrap(),
    }
}

fn number_of(names: Names, word: &str) -> u64 {
    let found = names.iter().find(|(name, _)| *name == word);
    found.map_or_else(|| number(word), |(_, number)| *number)
}

/// The attributes that a directory of the mount says.
pub fn attributes(directory: &Path) -> Object {
    let mut object = Object::new();
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let (stem, kind) = name
            .split_once('.')
            .map_or((&*name, None), |(stem, kind)| (stem, Some(kind)));
        let named = KINDS.iter().find_map(|(kind, lists)| {
            let list = lists
                .iter()
                .find(|list| list.iter().any(|(n, _)| *n == stem))?;
            Some((number_of(list, stem), *kind))
        });
        let (attribute_type, own) =
            named.map_or_else(|| (number(stem), None), |(t, k)| (t, Some(k)));
        let content = || fs::read(entry.path()).unwrap();
        let lines = || {
            String::from_utf8(content())
                .unwrap()
                .lines()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let value = match kind.or(own).unwrap() {
            "bool" => Value::Bool(lines() == ["true"]),
            "ulong" if lines() == ["CK_UNAVAILABLE_INFORMATION"] => Value::Ulong(u64::MAX),
            "ulong" => {
                let names = symbols(attribute_type).unwrap_or(FLAGS);
                Value::Ulong(
                    lines()
                        .iter()
                        .fold(0, |all, line| all | number_of(names, line)),
                )
            }
            "bytes" => Value::Bytes(content()),
            "mechs" => Value::Mechs(
                lines()
                    .iter()
                    .map(|line| number_of(MECHANISMS, line))
                    .collect(),
            ),
            _ => Value::Map(attributes(&entry.path())),
        };
        object.push((attribute_type, value));
    }
    assert!(
        object.is_sorted_by_key(|(t, _)| *t),
        "not in ascending order: {}",
        directory.display()
    );
    object
}

/// The tokens as the mount has them, by name.
pub fn tokens(mount: &Mount, backend: Backend) -> BTreeMap<String, Token> {
    let names = |path: &Path| -> Vec<String> {
        let entries = fs::read_dir(path).unwrap();
        entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect()
    };
    let all = names(mount.path());
    assert!(
        all.is_sorted_by(|a, b| a.as_bytes() < b.as_bytes()),
        "{all:?}"
    );
    all.into_iter()
        .map(|name| {
            let directory = mount.join(&name);
            let mut inside = names(&directory);
            assert_eq!(inside.pop().as_deref(), Some("token"));
            assert!(inside.is_sorted(), "{inside:?}");
            let objects = inside
                .iter()
                .map(|o| (o.clone(), attributes(&directory.join(o))));
            let token = Token {
                backend,
                token: attributes(&directory.join("token")),
                objects: objects.collect(),
                rows: BTreeMap::new(),
                damaged: BTreeMap::new(),
            };
            (name, token)
        })
        .collect()
}

/// The names in a directory.
pub fn entries(directory: &Path) -> std::io::Result<BTreeSet<PathBuf>> {
    fs::read_dir(directory)?
        .map(|entry| Ok(entry?.file_name().into()))
        .collect()
}
