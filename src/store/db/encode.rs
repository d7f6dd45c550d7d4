//! The way back of [`super::decode`]: attribute maps and mechanism sets as SoftHSM packs them.
//!
//! Source: `encodeAttributeMap` and `encodeMechanismTypeSet` in SoftHSM's `DBObject.cpp`. Entries and mechanisms are in
//! ascending order there too, since they come out of a `std::map` and a `std::set`.

use std::collections::BTreeSet;

use super::decode::kind;
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::{Attributes, Value};

/// A mechanism set as a blob.
#[must_use]
pub fn mechanisms(set: &BTreeSet<u64>) -> Vec<u8> {
    set.iter().copied().flat_map(u64::to_ne_bytes).collect()
}

/// An attribute map as a blob.
///
/// # Errors
/// [`ErrorKind::Invalid`] for what would not come back: a map in a map, and a type that is there with two kinds.
pub fn map(attributes: &Attributes) -> Result<Vec<u8>> {
    let mut blob = Vec::new();
    let mut previous = None;
    for (key, value) in attributes.iter() {
        if previous.replace(key.attribute_type) == Some(key.attribute_type) {
            return Err(Error::new(
                ErrorKind::Invalid,
                "an attribute map cannot hold one type with two kinds",
            ));
        }
        blob.extend(key.attribute_type.to_ne_bytes());
        match value {
            Value::Bool(value) => {
                blob.extend(kind::BOOLEAN.to_ne_bytes());
                blob.push(u8::from(*value));
            }
            Value::Ulong(value) => {
                blob.extend(kind::INTEGER.to_ne_bytes());
                blob.extend(value.to_ne_bytes());
            }
            Value::Bytes(value) => {
                blob.extend(kind::BINARY.to_ne_bytes());
                sized(&mut blob, value);
            }
            Value::Mechs(value) => {
                blob.extend(kind::MECHANISMS.to_ne_bytes());
                sized(&mut blob, &mechanisms(value));
            }
            Value::Map(_) => {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    "an attribute map cannot hold another one",
                ));
            }
        }
    }
    Ok(blob)
}

/// Appends a length in bytes, and the bytes.
fn sized(blob: &mut Vec<u8>, bytes: &[u8]) {
    // A `usize` has at most the 64 bits of a `CK_ULONG`.
    blob.extend((bytes.len() as u64).to_ne_bytes());
    blob.extend(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_not_come_back_is_refused() {
        let mut twice = Attributes::new();
        twice.insert(1, Value::Bool(true));
        twice.insert(1, Value::Ulong(1));
        assert_eq!(map(&twice).unwrap_err().kind(), ErrorKind::Invalid);
        let mut nested = Attributes::new();
        nested.insert(1, Value::Map(Attributes::new()));
        assert_eq!(map(&nested).unwrap_err().kind(), ErrorKind::Invalid);
    }

    #[test]
    fn the_bytes_are_packed() {
        let mut attributes = Attributes::new();
        attributes.insert(0x162, Value::Bool(true));
        attributes.insert(3, Value::Bytes(b"ab".to_vec()));
        let mut expected = Vec::new();
        expected.extend(3_u64.to_ne_bytes());
        expected.extend(3_u32.to_ne_bytes());
        expected.extend(2_u64.to_ne_bytes());
        expected.extend(b"ab");
        expected.extend(0x162_u64.to_ne_bytes());
        expected.extend(1_u32.to_ne_bytes());
        expected.push(1);
        assert_eq!(map(&attributes).unwrap(), expected);
    }
}
