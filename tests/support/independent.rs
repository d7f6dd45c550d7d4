//! A second reading of a store, which shares no code with the crate: its own parser for the `file` backend and the
//! `sqlite3` command for `db`. It takes no locks, so the store has to be at rest.
//!
//! Also what a PIN opens: the token's key and the values of private objects, to compare with what a PKCS #11 session says.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use aes::cipher::{BlockModeDecrypt, KeyIvInit, block_padding::Pkcs7};
use sha2::{Digest, Sha256};

use super::template::{self, hex, unhex};
use super::{Backend, run, tool};

pub const CKA_CLASS: u64 = 0;
pub const CKA_PRIVATE: u64 = 2;
pub const CKA_LABEL: u64 = 3;
pub const CKA_START_DATE: u64 = 0x110;
pub const CKA_END_DATE: u64 = 0x111;
pub const CKA_ALLOWED_MECHANISMS: u64 = 0x4000_0600;
pub const CKA_OS_TOKENLABEL: u64 = 0x8000_5349;
pub const CKA_OS_SOPIN: u64 = 0x8000_534c;
pub const CKA_OS_USERPIN: u64 = 0x8000_534d;

/// A stored value. The order of the variants is that of the kinds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Value {
    Bool(bool),
    Ulong(u64),
    Bytes(Vec<u8>),
    /// In the order in which they are stored.
    Mechs(Vec<u64>),
    /// Types and values in the order in which they are stored.
    Map(Vec<(u64, Value)>),
}

impl Value {
    /// Of the kind, as in the names of the tree.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Bool(_) => "bool",
            Self::Ulong(_) => "ulong",
            Self::Bytes(_) => "bytes",
            Self::Mechs(_) => "mechs",
            Self::Map(_) => "map",
        }
    }
}

/// Types and values. Of the `file` backend in the order of the file, of `db` by type, then kind.
pub type Object = Vec<(u64, Value)>;

/// A token as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    pub backend: Backend,
    /// The token's own attributes.
    pub token: Object,
    /// The objects, by the stem of the file; by the UUID that a row of text gives them, or else by the row id in decimal.
    pub objects: BTreeMap<String, Object>,
    /// Those of a database by row, whatever they are called.
    pub rows: BTreeMap<i64, Object>,
    /// What does not parse, and why.
    pub damaged: BTreeMap<String, String>,
}

/// Everything below a tokendir, by the names of the directories.
pub fn read_store(tokendir: &Path) -> BTreeMap<String, Token> {
    let mut tokens = BTreeMap::new();
    for entry in fs::read_dir(tokendir).expect("reading the tokendir") {
        let path = entry.expect("reading the tokendir").path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.join("token.object").exists() {
            tokens.insert(name, read_file_token(&path));
        } else if path.join("sqlite3.db").exists() {
            tokens.insert(name, read_db_token(&path));
        }
    }
    tokens
}

/// A token of the `file` backend.
pub fn read_file_token(directory: &Path) -> Token {
    // Somebody may rename or remove an object while its token is read: that is begun anew then, so that it is found under its new name.
    for _ in 0..100 {
        if let Some(token) = read_file_token_once(directory) {
            return token;
        }
    }
    panic!(
        "{}: objects came and went all the while",
        directory.display()
    );
}

/// Nothing if an object was gone before it was read.
fn read_file_token_once(directory: &Path) -> Option<Token> {
    let mut token = Token {
        rows: BTreeMap::new(),
        backend: Backend::File,
        token: Object::new(),
        objects: BTreeMap::new(),
        damaged: BTreeMap::new(),
    };
    for entry in fs::read_dir(directory).expect("reading a token") {
        let path = entry.expect("reading a token").path();
        if path.extension().is_none_or(|e| e != "object") {
            continue;
        }
        let stem = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            bytes => bytes.expect("reading an object"),
        };
        match parse_object(&bytes) {
            Ok((_, object)) if stem == "token" => token.token = object,
            Ok((_, object)) => {
                token.objects.insert(stem, object);
            }
            Err(why) => {
                token.damaged.insert(stem, why);
            }
        }
    }
    Some(token)
}

/// An `.object` file: its generation and its attributes; of a type that comes twice, the last.
pub fn parse_object(data: &[u8]) -> Result<(u64, Object), String> {
    let mut reader = Reader { data, at: 0 };
    let generation = reader.u64()?;
    let mut object = Object::new();
    // SoftHSM ends where no whole type is left.
    while data.len() - reader.at >= 8 {
        let attribute_type = reader.u64()?;
        let kind = reader.u64()?;
        let value = reader.value(kind, false)?;
        object.retain(|(stored, _)| *stored != attribute_type);
        object.push((attribute_type, value));
    }
    Ok((generation, object))
}

/// Big-endian numbers, one after another.
struct Reader<'a> {
    data: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn take(&mut self, length: usize) -> Result<&[u8], String> {
        let end = self
            .at
            .checked_add(length)
            .filter(|end| *end <= self.data.len());
        let end = end.ok_or_else(|| format!("{length} bytes wanted at {}", self.at))?;
        let taken = &self.data[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn u64(&mut self) -> Result<u64, String> {
        let bytes = self.take(8)?.try_into().expect("8 bytes");
        Ok(u64::from_be_bytes(bytes))
    }

    fn length(&mut self) -> Result<usize, String> {
        usize::try_from(self.u64()?).map_err(|e| e.to_string())
    }

    fn value(&mut self, kind: u64, in_map: bool) -> Result<Value, String> {
        Ok(match kind {
            1 => Value::Bool(self.take(1)? != [0]),
            2 => Value::Ulong(self.u64()?),
            3 => {
                let length = self.length()?;
                Value::Bytes(self.take(length)?.to_vec())
            }
            4 if !in_map => {
                let length = self.length()?;
                let inner = self.take(length)?.to_vec();
                let mut reader = Reader {
                    data: &inner,
                    at: 0,
                };
                let mut map = Vec::new();
                while reader.at < inner.len() {
                    let attribute_type = reader.u64()?;
                    let kind = reader.u64()?;
                    map.push((attribute_type, reader.value(kind, true)?));
                }
                Value::Map(map)
            }
            5 => {
                let count = self.length()?;
                Value::Mechs((0..count).map(|_| self.u64()).collect::<Result<_, _>>()?)
            }
            other => return Err(format!("kind {other} at {}", self.at - 8)),
        })
    }
}

/// A token of the `db` backend, from a copy, so that neither a lock nor a journal of the original is touched.
pub fn read_db_token(directory: &Path) -> Token {
    static KNOWN: Mutex<BTreeMap<[u64; 2], Token>> = Mutex::new(BTreeMap::new());
    let files =
        ["sqlite3.db", "sqlite3.db-journal"].map(|name| fs::read(directory.join(name)).ok());
    // The same bytes are the same token; the command takes its time.
    let digest = [0, 1].map(|salt| {
        let mut hasher = std::hash::DefaultHasher::new();
        (salt, &files).hash(&mut hasher);
        hasher.finish()
    });
    let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(token) = known().get(&digest) {
        return token.clone();
    }
    let token = read_copy_of_db_token(&files);
    known().insert(digest, token.clone());
    token
}

fn read_copy_of_db_token(files: &[Option<Vec<u8>>; 2]) -> Token {
    let copy = tempfile::tempdir().expect("a temporary directory");
    for (name, content) in ["sqlite3.db", "sqlite3.db-journal"].iter().zip(files) {
        if let Some(content) = content {
            fs::write(copy.path().join(name), content).expect("copying the database");
        }
    }
    let query = |sql: &str| -> Vec<Vec<String>> {
        let mut sqlite = tool("sqlite3");
        sqlite.args(["-batch", "-noheader", "-list", "-separator", "|"]);
        sqlite.arg(copy.path().join("sqlite3.db")).arg(sql);
        let output = run(&mut sqlite);
        let text = String::from_utf8(output.stdout).expect("sqlite3's output");
        text.lines()
            .map(|line| line.split('|').map(str::to_owned).collect())
            .collect()
    };
    let mut rows: BTreeMap<i64, BTreeMap<(u64, u8), Value>> = query("select id from object")
        .iter()
        .map(|row| (row[0].parse().expect("an id"), BTreeMap::new()))
        .collect();
    let mut damaged = BTreeMap::new();
    // Of several rows of a type, SoftHSM takes the first.
    for (table, column) in [
        ("boolean", "value"),
        ("integer", "value"),
        ("binary", "hex(value)"),
        ("array", "hex(value)"),
    ] {
        let sql = format!("select object_id, type, {column} from attribute_{table} order by id");
        for row in query(&sql) {
            let [id, attribute_type, value] = row.as_slice() else {
                panic!("a row of {table}: {row:?}")
            };
            let Some(object) = id.parse().ok().and_then(|id: i64| rows.get_mut(&id)) else {
                continue;
            };
            let attribute_type = attribute_type
                .parse::<i64>()
                .expect("a type")
                .cast_unsigned();
            let data = || unhex(value).expect("hexadecimal");
            let (kind, value) = match table {
                "boolean" => (1, Value::Bool(value != "0")),
                "integer" => {
                    let value = value.parse::<i64>().expect("an integer");
                    (2, Value::Ulong(value.cast_unsigned()))
                }
                "binary" if attribute_type == CKA_ALLOWED_MECHANISMS => {
                    (4, Value::Mechs(native(&data())))
                }
                "binary" => (3, Value::Bytes(data())),
                _ => match parse_array(&data()) {
                    Ok(map) => (5, Value::Map(map)),
                    Err(why) => {
                        damaged.insert(id.clone(), why);
                        continue;
                    }
                },
            };
            object.entry((attribute_type, kind)).or_insert(value);
        }
    }
    // What was restored with a UUID of its own has it in a text that SoftHSM never looks at.
    let has_texts = !query("select 1 from sqlite_master where name = 'attribute_text'").is_empty();
    let texts = if has_texts {
        query("select object_id, cast(value as text) from attribute_text order by id")
    } else {
        Vec::new()
    };
    let given: BTreeMap<i64, String> = texts
        .iter()
        .filter_map(|row| Some((row.first()?.parse().ok()?, uuid_in(row.get(1)?)?)))
        .collect();
    let mut objects: BTreeMap<i64, Object> = rows
        .into_iter()
        .map(|(id, object)| {
            (
                id,
                object
                    .into_iter()
                    .map(|((t, _), value)| (t, value))
                    .collect(),
            )
        })
        .collect();
    Token {
        backend: Backend::Db,
        token: objects.remove(&1).unwrap_or_default(),
        rows: objects.clone(),
        objects: objects
            .into_iter()
            .map(|(id, object)| {
                let id = given.get(&id).cloned().unwrap_or_else(|| id.to_string());
                (id, object)
            })
            .collect(),
        damaged,
    }
}

/// The first UUID in a text.
fn uuid_in(text: &str) -> Option<String> {
    let uuids = (0..text.len()).filter_map(|at| text.get(at..at + 36));
    uuids
        .filter(|part| uuid::Uuid::try_parse(part).is_ok())
        .map(str::to_owned)
        .next()
}

/// Native-endian numbers.
fn native(data: &[u8]) -> Vec<u64> {
    let whole = data.chunks_exact(8);
    whole
        .map(|c| u64::from_ne_bytes(c.try_into().expect("8 bytes")))
        .collect()
}

/// A blob of `attribute_array`.
fn parse_array(data: &[u8]) -> Result<Vec<(u64, Value)>, String> {
    let mut reader = Reader { data, at: 0 };
    let mut map = Vec::new();
    while reader.at < data.len() {
        let attribute_type = reader.u64()?.swap_bytes();
        let kind = u32::from_ne_bytes(reader.take(4)?.try_into().expect("4 bytes"));
        let value = match kind {
            1 => Value::Bool(reader.take(1)? != [0]),
            2 => Value::Ulong(reader.u64()?.swap_bytes()),
            3 | 5 => {
                let length =
                    usize::try_from(reader.u64()?.swap_bytes()).map_err(|e| e.to_string())?;
                let bytes = reader.take(length)?.to_vec();
                if kind == 3 {
                    Value::Bytes(bytes)
                } else {
                    Value::Mechs(native(&bytes))
                }
            }
            other => return Err(format!("kind {other} in a map")),
        };
        map.push((attribute_type, value));
    }
    Ok(map)
}

/// Of an object, or of a map.
pub fn get(object: &[(u64, Value)], attribute_type: u64) -> Option<&Value> {
    object
        .iter()
        .find(|(stored, _)| *stored == attribute_type)
        .map(|(_, value)| value)
}

/// A byte string of an object.
pub fn get_bytes(object: &[(u64, Value)], attribute_type: u64) -> Option<&[u8]> {
    match get(object, attribute_type) {
        Some(Value::Bytes(bytes)) => Some(bytes),
        _ => None,
    }
}

/// Whether an object is private.
pub fn is_private(object: &[(u64, Value)]) -> bool {
    get(object, CKA_PRIVATE) == Some(&Value::Bool(true))
}

/// The key that the user PIN, or with [`CKA_OS_SOPIN`] that of the security officer, opens; none if the PIN is wrong.
pub fn token_key(token: &Token, blob: u64, pin: &str) -> Option<[u8; 32]> {
    let blob = get_bytes(&token.token, blob)?;
    let (salt, rest) = blob.split_at_checked(8)?;
    // 1500 hashes and as many more as the last byte of the salt says, the first of them of salt and PIN.
    let mut key = Sha256::new()
        .chain_update(salt)
        .chain_update(pin.as_bytes())
        .finalize();
    for _ in 1..1500 + u32::from(salt[7]) {
        key = Sha256::digest(key);
    }
    let clear = decrypt(&key.into(), rest)?;
    clear.strip_prefix(b"RJR")?.try_into().ok()
}

/// `IV || AES-256-CBC` with its padding, if it is that.
pub fn decrypt(key: &[u8; 32], data: &[u8]) -> Option<Vec<u8>> {
    let (iv, ciphertext) = data.split_at_checked(16)?;
    let cipher = cbc::Decryptor::<aes::Aes256>::new_from_slices(key, iv).ok()?;
    let mut buffer = ciphertext.to_vec();
    cipher
        .decrypt_padded::<Pkcs7>(&mut buffer)
        .ok()
        .map(<[u8]>::to_vec)
}

/// An object as its owner sees it: what is encrypted in it is in the clear. An error names the type that is no ciphertext.
pub fn in_the_clear(object: &[(u64, Value)], key: &[u8; 32]) -> Result<Object, String> {
    if !is_private(object) {
        return Ok(object.to_vec());
    }
    let mut clear = Object::new();
    for (attribute_type, value) in object {
        let value = match value {
            Value::Bytes(bytes)
                if !bytes.is_empty()
                    && ![CKA_START_DATE, CKA_END_DATE].contains(attribute_type) =>
            {
                let bytes = decrypt(key, bytes);
                Value::Bytes(bytes.ok_or_else(|| format!("{attribute_type:#x} is no ciphertext"))?)
            }
            other => other.clone(),
        };
        clear.push((*attribute_type, value));
    }
    Ok(clear)
}

/// A value as `C_GetAttributeValue` gives it.
pub fn as_pkcs11(attribute_type: u64, value: &Value) -> template::Attribute {
    match value {
        Value::Bool(value) => template::boolean(attribute_type, *value),
        Value::Ulong(value) => template::ulong(attribute_type, *value),
        Value::Bytes(value) => template::bytes(attribute_type, value),
        Value::Mechs(value) => template::mechs(attribute_type, value),
        Value::Map(map) => {
            let inner = map.iter().map(|(t, value)| as_pkcs11(*t, value)).collect();
            template::template(attribute_type, inner)
        }
    }
}

/// `CKA_PUBLIC_KEY_INFO` and `CKA_DESTROYABLE`: the `db` backend of SoftHSM stores them and never looks at what it has
/// stored, so that a session sees their defaults.
pub const NOT_READ_BY_DB: [u64; 2] = [0x129, 0x172];

/// Whether what a session says of an object (see [`super::P11::get`]) is what is stored (in the clear). What is sensitive it
/// does not say.
pub fn matches_session(
    backend: Backend,
    object: &[(u64, Value)],
    seen: &[(u64, Option<template::Attribute>)],
) -> Result<(), String> {
    for (attribute_type, seen) in seen {
        let Some(seen) = seen else { continue };
        if backend == Backend::Db && NOT_READ_BY_DB.contains(attribute_type) {
            continue;
        }
        let stored = get(object, *attribute_type).map(|value| as_pkcs11(*attribute_type, value));
        if stored.as_ref() != Some(seen) {
            return Err(format!(
                "{attribute_type:#x}: stored {stored:02x?}, seen {seen:02x?}"
            ));
        }
    }
    Ok(())
}

/// A store as lines, to print or to compare as text: `token object type kind value`.
pub fn lines(store: &BTreeMap<String, Token>) -> String {
    fn text(value: &Value) -> String {
        match value {
            Value::Bool(value) => value.to_string(),
            Value::Ulong(value) => format!("{value:#x}"),
            Value::Bytes(value) => hex(value),
            Value::Mechs(value) => format!("{value:x?}"),
            Value::Map(map) => {
                let inner = map
                    .iter()
                    .map(|(t, v)| format!("{t:#x} {} {}", v.kind(), text(v)));
                format!("{{{}}}", inner.collect::<Vec<_>>().join(", "))
            }
        }
    }
    let mut out = String::new();
    for (name, token) in store {
        let own = std::iter::once(("token", &token.token));
        for (id, object) in own.chain(token.objects.iter().map(|(id, o)| (id.as_str(), o))) {
            for (attribute_type, value) in object {
                out += &format!(
                    "{name} {id} {attribute_type:#x} {} {}\n",
                    value.kind(),
                    text(value)
                );
            }
        }
        for (id, why) in &token.damaged {
            out += &format!("{name} {id} damaged: {why}\n");
        }
    }
    out
}
