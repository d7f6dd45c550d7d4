//! What a name stands for that something is made under: the one place where names are told apart by the directory that they are in.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use super::entries::exists;
use super::name::{self, Name};
use super::node::Node;
use super::view::{CONTROL, TOKEN};
use super::{FileKind, NAME_MAX, Tree};
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::Kind;
use crate::store::{ObjectId, ObjectName, Patience, TokenName};

/// What a name stands for that something is made under.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// An attribute, or a map.
    Attribute(Node),
    /// An object of a token.
    Object(TokenName, ObjectName),
    /// The directory of a token's own attributes.
    Own(TokenName),
    /// A token.
    Token(TokenName),
    /// Nothing of the store's.
    Scratch,
}

impl Place {
    /// What of the store a directory in this place is.
    pub fn directory(&self) -> Option<Node> {
        match self {
            Self::Attribute(map) => Some(map.clone()),
            Self::Object(token, object) => {
                let id = ObjectId::Object(object.clone());
                Some(Node::Object(token.clone(), id))
            }
            Self::Own(token) => Some(Node::Object(token.clone(), ObjectId::Token)),
            Self::Token(token) => Some(Node::Token(token.clone())),
            Self::Scratch => None,
        }
    }
}

impl Tree {
    /// What a file, or a directory, called `name` in `directory` would be.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for what was meant as an attribute and cannot be one; [`ErrorKind::ReadOnly`] below `.tokenfs`.
    pub(super) fn place(&self, directory: &Node, name: &OsStr, kind: FileKind) -> Result<Place> {
        if name.len() > NAME_MAX {
            return Err(Error::new(ErrorKind::NameTooLong, "the name is too long"));
        }
        self.check_writable(directory)?;
        let is_directory = kind == FileKind::Directory;
        let is_hidden = name.as_bytes().starts_with(b".");
        let bytes = name.as_bytes();
        let parsed = name::parse(bytes);
        let outside = || {
            let shown = name.to_string_lossy().escape_debug().to_string();
            let detail = format!("{shown} belongs in the directory of an object");
            Error::new(ErrorKind::Invalid, detail)
        };
        match directory {
            Node::Scratch(_) => Ok(Place::Scratch),
            Node::Root if name == CONTROL => Err(exists()),
            Node::Root | Node::Token(_) if !is_directory => match parsed {
                Name::Scratch if is_of_a_backend(bytes) => Err(Error::new(
                    ErrorKind::Invalid,
                    "a file of a tokendir, as .tokenfs/file has them: it belongs into a tokendir and not into a mount, which takes the tree that it shows",
                )),
                Name::Scratch if is_meant_to_stay(name) => Err(Error::new(
                    ErrorKind::Invalid,
                    "a token and an object are directories, and no other file of this name would be kept",
                )),
                Name::Scratch => Ok(Place::Scratch),
                Name::Attribute(_) | Name::Impossible => Err(outside()),
            },
            Node::Root | Node::Token(_) if is_hidden => Ok(Place::Scratch),
            Node::Root => match TokenName::new(name) {
                Some(token) => Ok(Place::Token(token)),
                None => Err(Error::new(ErrorKind::Invalid, "no name of a directory")),
            },
            Node::Token(token) if name == TOKEN => Ok(Place::Own(token.clone())),
            Node::Token(token) => match (parsed, ObjectName::new(name)) {
                (Name::Scratch, Some(object)) => Ok(Place::Object(token.clone(), object)),
                _ => Err(outside()),
            },
            Node::Object(token, id) => match parsed {
                Name::Attribute(key) if (key.kind == Kind::Map) == is_directory => {
                    self.token(token)?.check_key(key, false)?;
                    let node = Node::Attribute(token.clone(), id.clone(), key);
                    Ok(Place::Attribute(node))
                }
                Name::Attribute(key) => Err(wrong_kind(key.kind)),
                Name::Impossible => Err(name::refusal(bytes)),
                Name::Scratch if is_numbered_backup(bytes) => Err(no_numbered_backup()),
                Name::Scratch if !is_directory || is_hidden => Ok(Place::Scratch),
                Name::Scratch => Err(no_such_directory()),
            },
            Node::Attribute(token, id, map) if map.kind == Kind::Map => match parsed {
                Name::Attribute(key) if key.kind == Kind::Map => Err(Error::new(
                    ErrorKind::Invalid,
                    "there are no attribute maps in attribute maps",
                )),
                Name::Attribute(key) if is_directory => Err(wrong_kind(key.kind)),
                Name::Attribute(key) => {
                    self.token(token)?.check_key(key, true)?;
                    let (token, id) = (token.clone(), id.clone());
                    let node = Node::MapEntry(token, id, map.attribute_type, key);
                    Ok(Place::Attribute(node))
                }
                Name::Impossible => Err(name::refusal(bytes)),
                Name::Scratch if is_numbered_backup(bytes) => Err(no_numbered_backup()),
                Name::Scratch if !is_directory || is_hidden => Ok(Place::Scratch),
                Name::Scratch => Err(no_such_directory()),
            },
            _ => Err(Error::new(ErrorKind::NotADirectory, "not a directory")),
        }
    }

    /// What is called `name` in `directory`, if there is anything.
    pub(super) fn existing(
        &self,
        directory: &Node,
        name: &OsStr,
        patience: Patience,
    ) -> Result<Option<(Node, FileKind)>> {
        let found = self
            .child(directory, name, patience)
            .and_then(|node| Ok((self.describe(&node, patience)?.0.kind, node)));
        match found {
            Ok((kind, node)) => Ok(Some((node, kind))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Whether a backend has a file of this name: a copy of a tokendir was to be restored.
fn is_of_a_backend(name: &[u8]) -> bool {
    let suffixes: [&[u8]; 3] = [b".object", b".lock", b".db"];
    name == b"generation"
        || (!name.starts_with(b".") && suffixes.iter().any(|suffix| name.ends_with(suffix)))
}

/// Whether it can only be meant as a token, an object, or a token's own directory.
fn is_meant_to_stay(name: &OsStr) -> bool {
    name == TOKEN
        || name
            .to_str()
            .is_some_and(|text| uuid::Uuid::try_parse(text).is_ok() && text.len() == 36)
}

/// Whether it is a name for an old version of a file, as GNU tools give it (`--backup=numbered`, `NAME.~3~`). They look for the next number in a listing,
/// in which no scratch is, and for ever.
fn is_numbered_backup(name: &[u8]) -> bool {
    let number = name.strip_suffix(b"~").and_then(|name| {
        let at = name.iter().rposition(|byte| *byte == b'~')?;
        name.get(..at)?.strip_suffix(b".")?;
        name.get(at + 1..)
    });
    number.is_some_and(|number| !number.is_empty() && number.iter().all(u8::is_ascii_digit))
}

fn no_numbered_backup() -> Error {
    Error::new(
        ErrorKind::Invalid,
        "old versions are not kept beside an attribute: copy it elsewhere first, or use --backup=simple, which keeps one until the end of the mount",
    )
}

fn wrong_kind(kind: Kind) -> Error {
    let detail = if kind == Kind::Map {
        "an attribute map is a directory"
    } else {
        "an attribute that is no map is a file"
    };
    Error::new(ErrorKind::Invalid, detail)
}

fn no_such_directory() -> Error {
    Error::new(
        ErrorKind::Invalid,
        "a directory here is an attribute map, or scratch, and then its name begins with a dot",
    )
}
