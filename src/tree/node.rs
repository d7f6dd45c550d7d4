//! What an inode stands for, and its number.
//!
//! A number is a hash of the names on the way to it, so that it is the same after a remount, on every machine and in either
//! backend. Two that collide (1 in 10⁹ for a store of 10,000 objects) are told apart by [`super::inode`].

use std::hash::Hasher;
use std::os::unix::ffi::OsStrExt;

use siphasher::sip::SipHasher13;

use super::scratch::ScratchId;
use crate::store::attribute::{AttributeKey, AttributeType, Kind};
use crate::store::layout::LayoutFile;
use crate::store::{ObjectId, ObjectName, TokenName};

/// The number of an inode.
pub type Ino = u64;

/// The root's, which FUSE fixes.
pub const ROOT: Ino = 1;

/// What an inode stands for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    /// The tokendir.
    Root,
    /// A token's directory.
    Token(TokenName),
    /// An object's directory, that of the token's own attributes included.
    Object(TokenName, ObjectId),
    /// An attribute: a file, or a directory if it is a map.
    Attribute(TokenName, ObjectId, AttributeKey),
    /// An attribute in a map.
    MapEntry(TokenName, ObjectId, AttributeType, AttributeKey),
    /// `.tokenfs`.
    Control,
    /// `.tokenfs/log`.
    Log,
    /// `.tokenfs/server`.
    Server,
    /// `.tokenfs/by-label`.
    ByLabel,
    /// A directory in `by-label`.
    TokenByLabel(TokenName),
    /// A link in it.
    ObjectByLabel(TokenName, ObjectName),
    /// `.tokenfs/file`.
    Layout,
    /// A token's directory in it.
    TokenLayout(TokenName),
    /// A file in that.
    FileInLayout(TokenName, LayoutFile),
    /// A scratch file or directory.
    Scratch(ScratchId),
}

impl Node {
    /// The token that this belongs to.
    #[must_use]
    pub fn token(&self) -> Option<&TokenName> {
        match self {
            Self::Token(token)
            | Self::Object(token, _)
            | Self::Attribute(token, _, _)
            | Self::MapEntry(token, _, _, _)
            | Self::TokenByLabel(token)
            | Self::ObjectByLabel(token, _)
            | Self::TokenLayout(token)
            | Self::FileInLayout(token, _) => Some(token),
            Self::Root
            | Self::Control
            | Self::Log
            | Self::Server
            | Self::ByLabel
            | Self::Layout
            | Self::Scratch(_) => None,
        }
    }

    /// Whether this, which was in a directory, is still in it if it is anywhere, now that this is `directory`: of scratch that is not to be told.
    /// (Nothing but objects, maps and scratch is renamed with what is in it.)
    pub(super) fn can_be_in(&self, directory: &Self) -> bool {
        match (self, directory) {
            (Self::Attribute(token, id, _), Self::Object(in_token, in_id)) => {
                (token, id) == (in_token, in_id)
            }
            (Self::MapEntry(token, id, map, _), Self::Attribute(in_token, in_id, in_map)) => {
                (token, id, *map) == (in_token, in_id, in_map.attribute_type)
            }
            (Self::Attribute(..) | Self::MapEntry(..) | Self::Scratch(_), _) => false,
            _ => true,
        }
    }

    /// The object that this is, or is in.
    #[must_use]
    pub fn object(&self) -> Option<(&TokenName, &ObjectId)> {
        match self {
            Self::Object(token, id)
            | Self::Attribute(token, id, _)
            | Self::MapEntry(token, id, _, _) => Some((token, id)),
            _ => None,
        }
    }

    /// The number that this has as long as nothing else has it.
    #[must_use]
    pub fn number(&self) -> Ino {
        // Fixed keys: the number must not change between mounts. They are the digits of pi.
        let mut hasher = SipHasher13::new_with_keys(0x3141_5926_5358_9793, 0x2384_6264_3383_2795);
        let tag = match self {
            Self::Root => return ROOT,
            Self::Token(_) => 1,
            Self::Object(..) => 2,
            Self::Attribute(..) => 3,
            Self::MapEntry(..) => 4,
            Self::Control => 5,
            Self::Log => 6,
            Self::ByLabel => 7,
            Self::TokenByLabel(_) => 8,
            Self::ObjectByLabel(..) => 9,
            Self::Scratch(_) => 10,
            Self::Layout => 11,
            Self::TokenLayout(_) => 12,
            Self::FileInLayout(..) => 13,
            Self::Server => 14,
        };
        hasher.write_u8(tag);
        if let Some(token) = self.token() {
            name(&mut hasher, token.as_bytes());
        }
        match self {
            Self::Object(_, id) => object(&mut hasher, id),
            Self::Attribute(_, id, key) => {
                object(&mut hasher, id);
                attribute(&mut hasher, *key);
            }
            Self::MapEntry(_, id, map, key) => {
                object(&mut hasher, id);
                hasher.write_u64(*map);
                attribute(&mut hasher, *key);
            }
            Self::ObjectByLabel(_, object) => name(&mut hasher, object.as_bytes()),
            Self::FileInLayout(_, file) => name(&mut hasher, file.name().as_bytes()),
            Self::Scratch(id) => hasher.write_u64(id.0),
            _ => {}
        }
        // 63 bits, for programs that take inode numbers for signed. 0 is no inode, 1 the root's.
        (hasher.finish() >> 1).max(ROOT + 1)
    }
}

fn object(hasher: &mut SipHasher13, id: &ObjectId) {
    match id {
        ObjectId::Token => hasher.write_u8(0),
        ObjectId::Object(object) => {
            hasher.write_u8(1);
            name(hasher, object.as_bytes());
        }
    }
}

fn attribute(hasher: &mut SipHasher13, key: AttributeKey) {
    hasher.write_u64(key.attribute_type);
    hasher.write_u8(match key.kind {
        Kind::Bool => 1,
        Kind::Ulong => 2,
        Kind::Bytes => 3,
        Kind::Map => 4,
        Kind::Mechs => 5,
    });
}

/// A name cannot hold a NUL, so that two names in a row cannot be mistaken for others.
fn name(hasher: &mut SipHasher13, bytes: &[u8]) {
    hasher.write(bytes);
    hasher.write_u8(0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    /// A backup program compares these over months. If this test fails, numbers have changed for everybody.
    #[test]
    fn numbers_are_these_for_ever() {
        let token = TokenName::new(OsStr::new("a3f2c1d0-1234-5678-abcd-000000000001")).unwrap();
        let object = ObjectName::new(OsStr::new("b7e9f2a1-aaaa-bbbb-cccc-111111111111")).unwrap();
        let id = ObjectId::Object(object);
        let key = AttributeKey {
            attribute_type: 3,
            kind: Kind::Bytes,
        };
        assert_eq!(Node::Root.number(), 1);
        assert_eq!(Node::Token(token.clone()).number(), TOKEN);
        let file = LayoutFile::Object(id.clone());
        assert_eq!(Node::FileInLayout(token.clone(), file).number(), FILE);
        assert_eq!(Node::Attribute(token, id, key).number(), ATTRIBUTE);
    }

    const TOKEN: Ino = 4_923_158_186_254_695_499;
    const FILE: Ino = 6_486_045_819_429_904_732;
    const ATTRIBUTE: Ino = 4_294_224_703_768_727_196;
}
