//! A token as a directory of the `file` backend, from either backend: which files it has, and what is in them.
//!
//! A token of the `file` backend gives its own files, byte for byte ([`super::file`]). From any other one they are made here, of
//! what [`Token`] says and of nothing else, so that the same content gives the same bytes whenever and by whom it is read:
//!
//! - an object is encoded in ascending order of type, as SoftHSM does;
//! - its generation is a hash of its content, and that of the token a hash of the names of its objects. SoftHSM looks only whether
//!   they are others than those that it remembers, so they do what counted ones do;
//! - the lock files are empty.

use std::cmp::Ordering;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use siphasher::sip::SipHasher24;

use super::file::{self, GENERATION, LOCK_SUFFIX, OBJECT_SUFFIX, TOKEN_LOCK, TOKEN_OBJECT};
use super::{Metadata, ObjectId, ObjectName, Patience, Token};
use crate::error::{ErrorKind, Result};
use crate::store::attribute::Attributes;

/// A file in the directory of a token of the `file` backend.
///
/// They are in the order in which they are listed: the objects, each behind its lock file, then what is the token's own, and last the
/// file that makes a token of the directory. Who copies in this order has a token when all of it is there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LayoutFile {
    /// `<object>.lock` or `token.lock`: what SoftHSM locks, or opens, when it writes that object.
    Lock(ObjectId),
    /// `<object>.object` or `token.object`.
    Object(ObjectId),
    /// `generation`: the count of objects that were made or destroyed.
    Generation,
}

impl LayoutFile {
    /// The file of this name, if SoftHSM's `file` backend makes files of such a name.
    #[must_use]
    pub fn parse(name: &OsStr) -> Option<Self> {
        if name == GENERATION {
            return Some(Self::Generation);
        }
        if name == TOKEN_OBJECT {
            return Some(Self::Object(ObjectId::Token));
        }
        if name == TOKEN_LOCK {
            return Some(Self::Lock(ObjectId::Token));
        }
        if let Some(object) = file::object_name(name) {
            return Some(Self::Object(ObjectId::Object(object)));
        }
        let stem = name.as_bytes().strip_suffix(LOCK_SUFFIX.as_bytes())?;
        let object = ObjectName::new(OsStr::from_bytes(stem))?;
        Some(Self::Lock(ObjectId::Object(object)))
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> OsString {
        let of = |object: &ObjectName, suffix| {
            let mut name = object.as_os_str().to_os_string();
            name.push(suffix);
            name
        };
        match self {
            Self::Generation => GENERATION.into(),
            Self::Object(ObjectId::Token) => TOKEN_OBJECT.into(),
            Self::Object(ObjectId::Object(object)) => of(object, OBJECT_SUFFIX),
            Self::Lock(ObjectId::Token) => TOKEN_LOCK.into(),
            Self::Lock(ObjectId::Object(object)) => of(object, LOCK_SUFFIX),
        }
    }
}

impl LayoutFile {
    /// Whether it is the token's own; of which object; whether it is more than its lock.
    fn rank(&self) -> (bool, Option<&ObjectName>, u8) {
        match self {
            Self::Lock(ObjectId::Object(object)) => (false, Some(object), 0),
            Self::Object(ObjectId::Object(object)) => (false, Some(object), 1),
            Self::Generation => (true, None, 0),
            Self::Lock(ObjectId::Token) => (true, None, 1),
            Self::Object(ObjectId::Token) => (true, None, 2),
        }
    }
}

impl Ord for LayoutFile {
    fn cmp(&self, other: &Self) -> Ordering {
        self.rank().cmp(&other.rank())
    }
}

impl PartialOrd for LayoutFile {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// What [`Token::layout`] is for a token that has no such files.
pub(super) fn files<T: Token + ?Sized>(token: &T, patience: Patience) -> Result<Vec<LayoutFile>> {
    let objects = token.list(patience)?;
    let own = [
        LayoutFile::Generation,
        LayoutFile::Lock(ObjectId::Token),
        LayoutFile::Object(ObjectId::Token),
    ];
    let files = objects
        .iter()
        .map(|object| ObjectId::Object(object.clone()))
        .flat_map(|id| [LayoutFile::Lock(id.clone()), LayoutFile::Object(id)])
        .chain(own);
    Ok(files.collect())
}

/// What [`Token::layout_metadata`] is for a token that has no such files.
pub(super) fn metadata<T: Token + ?Sized>(
    token: &T,
    file: &LayoutFile,
    patience: Patience,
) -> Result<(Metadata, u64)> {
    match file {
        LayoutFile::Lock(id) => Ok((token.object_metadata(id, patience)?, 0)),
        LayoutFile::Object(id) => match token.object(id, patience) {
            Ok(object) => {
                let length = file::encoded_length(&object.attributes);
                Ok((object.metadata, length))
            }
            // Whoever opens it hears of that.
            Err(error) if error.kind() == ErrorKind::Damaged => {
                Ok((token.object_metadata(id, patience)?, 0))
            }
            Err(error) => Err(error),
        },
        LayoutFile::Generation => Ok((metadata_of_generation(token, patience)?, 8)),
    }
}

/// It changes when objects come and go, as the directory does.
fn metadata_of_generation<T: Token + ?Sized>(token: &T, patience: Patience) -> Result<Metadata> {
    let own = token.object_metadata(&ObjectId::Token, patience)?;
    let directory = token.metadata()?;
    Ok(Metadata {
        atime: directory.atime,
        mtime: directory.mtime,
        ctime: directory.ctime,
        ..own
    })
}

/// What [`Token::layout_read`] is for a token that has no such files.
pub(super) fn read<T: Token + ?Sized>(
    token: &T,
    file: &LayoutFile,
    patience: Patience,
) -> Result<(Metadata, Vec<u8>)> {
    match file {
        LayoutFile::Lock(id) => Ok((token.object_metadata(id, patience)?, Vec::new())),
        LayoutFile::Object(id) => {
            let object = token.object(id, patience)?;
            Ok((object.metadata, encoded(&object.attributes)))
        }
        LayoutFile::Generation => {
            read_generation(token, generation(&token.list(patience)?), patience)
        }
    }
}

/// The same of [`LayoutFile::Generation`], for a token that knows its [`generation`].
pub(super) fn read_generation<T: Token + ?Sized>(
    token: &T,
    number: u64,
    patience: Patience,
) -> Result<(Metadata, Vec<u8>)> {
    let metadata = metadata_of_generation(token, patience)?;
    Ok((metadata, number.to_be_bytes().to_vec()))
}

/// Keys of the hashes, which keep nothing secret: they only tell versions apart.
const KEYS: (u64, u64) = (0x746f_6b65_6e66_7320, 0x6c61_796f_7574_2031);

/// A number that is never the 0 that a generation skips, and far from the highest, after which SoftHSM begins again.
fn number(bytes: &[u8]) -> u64 {
    (SipHasher24::new_with_keys(KEYS.0, KEYS.1).hash(bytes) >> 1).max(1)
}

fn encoded(attributes: &Attributes) -> Vec<u8> {
    let mut bytes = file::encode(0, attributes);
    let generation = number(&bytes).to_be_bytes();
    bytes.splice(..generation.len(), generation);
    bytes
}

/// The generation of a token with these objects.
pub(super) fn generation(objects: &[ObjectName]) -> u64 {
    let mut names = Vec::new();
    for object in objects {
        names.extend_from_slice(object.as_bytes());
        // No name holds one.
        names.push(0);
    }
    number(&names)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::store::attribute::Value;

    fn named(name: &str) -> LayoutFile {
        LayoutFile::parse(OsStr::new(name)).unwrap()
    }

    #[test]
    fn names_come_back_and_others_are_none() {
        for name in [
            "generation",
            "token.object",
            "token.lock",
            "a.object",
            "a.lock",
            "a.b.object",
        ] {
            assert_eq!(named(name).name(), name);
        }
        for name in [
            "",
            ".object",
            ".lock",
            "object",
            "token",
            "generation.tokenfs-new",
            "a.tokenfs-new",
            "a.tokenfs-journal",
            ".tokenfs-building",
            "sqlite3.db",
            "README",
        ] {
            assert_eq!(LayoutFile::parse(OsStr::new(name)), None, "{name}");
        }
    }

    #[test]
    fn what_makes_a_token_of_a_directory_comes_last() {
        let mut files = [
            "token.object",
            "b.object",
            "generation",
            "a.object",
            "token.lock",
            "b.lock",
            "a.lock",
        ]
        .map(named);
        files.sort();
        let names = files.map(|file| file.name().into_string().unwrap());
        assert_eq!(
            names,
            [
                "a.lock",
                "a.object",
                "b.lock",
                "b.object",
                "generation",
                "token.lock",
                "token.object"
            ]
        );
    }

    #[test]
    fn an_object_is_as_long_as_it_is_said_to_be_and_decodes_to_itself() {
        let map = BTreeMap::from([(3, Value::Bytes(b"in".into())), (0x103, Value::Bool(false))]);
        let all = BTreeMap::from([
            (0, Value::Ulong(u64::MAX)),
            (1, Value::Bool(true)),
            (3, Value::Bytes(b"label".into())),
            (0x4000_0211, Value::Map(map.into())),
            (0x4000_0212, Value::Map(Attributes::new())),
            (0x4000_0600, Value::Mechs(BTreeSet::from([9, 1, 5]))),
        ]);
        for attributes in [Attributes::new(), Attributes::from(all)] {
            let bytes = encoded(&attributes);
            assert_eq!(bytes.len() as u64, file::encoded_length(&attributes));
            assert_eq!(bytes, encoded(&attributes.clone()));
            let decoded = file::decode(&bytes).unwrap();
            assert_eq!(decoded.attributes, attributes);
            assert!(decoded.generation.unwrap() > 0);
        }
    }

    /// A SoftHSM that reads them compares numbers over months. If this test fails, they have changed for everybody.
    #[test]
    fn generations_are_these_for_ever() {
        let names = ["a", "b"].map(|name| ObjectName::new(OsStr::new(name)).unwrap());
        let numbers = [&names[..0], &names[..1], &names].map(generation);
        assert_eq!(numbers, NUMBERS);
    }

    const NUMBERS: [u64; 3] = [
        203_455_819_125_572_831,
        7_490_900_599_388_054_556,
        7_355_622_945_690_810_190,
    ];
}
