//! What SoftHSM packs into the blobs of the `db` backend: attribute maps and mechanism sets.
//!
//! ```text
//! set := mechanism:CK_ULONG *
//! map := ( type:CK_ULONG  kind:u32  value ) *
//!        kind 1  boolean        1 byte, 0 is false
//!        kind 2  integer        CK_ULONG
//!        kind 3  byte string    length:CK_ULONG  bytes
//!        kind 5  mechanism set  length-in-bytes:CK_ULONG  set
//! ```
//!
//! Native-endian, no padding, a `CK_ULONG` is 64 bits. Source: `decodeAttributeMap` and `decodeMechanismTypeSet` in
//! SoftHSM's `DBObject.cpp`. No length is believed before it has been held against what is left of the blob.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::store::attribute::{AttributeType, Attributes, Value};

/// `enum AttributeKind` of SoftHSM's `DBObject.cpp`, as it is stored in front of a value in an attribute map.
pub(super) mod kind {
    /// `akBoolean`.
    pub const BOOLEAN: u32 = 1;
    /// `akInteger`.
    pub const INTEGER: u32 = 2;
    /// `akBinary`.
    pub const BINARY: u32 = 3;
    /// `akAttrMap`: SoftHSM neither writes nor reads a map in a map.
    pub const MAP: u32 = 4;
    /// `akMechSet`.
    pub const MECHANISMS: u32 = 5;
}

/// Why a blob does not decode, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Undecodable {
    /// The byte of the blob at which it stops making sense.
    pub offset: usize,
    /// What is wrong there; it holds nothing of the value.
    pub reason: &'static str,
}

impl fmt::Display for Undecodable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at byte {}", self.reason, self.offset)
    }
}

impl std::error::Error for Undecodable {}

/// A mechanism set.
///
/// # Errors
/// If the length is no multiple of 8 (`decodeMechanismTypeSet`: "mechanism type set overrun").
pub fn mechanisms(blob: &[u8]) -> Result<BTreeSet<u64>, Undecodable> {
    let mut reader = Reader::new(blob);
    reader.mechanisms(blob.len())
}

/// An attribute map. Of entries that repeat a type the first one counts, as for SoftHSM, which inserts them one after
/// the other into a `std::map`.
///
/// # Errors
/// If an entry does not fit into what is left, or is of a kind that cannot be in a map.
pub fn map(blob: &[u8]) -> Result<Attributes, Undecodable> {
    let mut reader = Reader::new(blob);
    let mut entries: BTreeMap<AttributeType, Value> = BTreeMap::new();
    while !reader.rest.is_empty() {
        let attribute_type = reader.ulong("the type of an entry is cut off")?;
        let value = reader.value()?;
        entries.entry(attribute_type).or_insert(value);
    }
    let mut attributes = Attributes::new();
    for (attribute_type, value) in entries {
        attributes.insert(attribute_type, value);
    }
    Ok(attributes)
}

/// The part of a blob that is still to be read.
struct Reader<'a> {
    rest: &'a [u8],
    offset: usize,
}

impl<'a> Reader<'a> {
    fn new(blob: &'a [u8]) -> Self {
        Self {
            rest: blob,
            offset: 0,
        }
    }

    fn fail(&self, reason: &'static str) -> Undecodable {
        Undecodable {
            offset: self.offset,
            reason,
        }
    }

    fn take(&mut self, length: usize, reason: &'static str) -> Result<&'a [u8], Undecodable> {
        let (taken, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or_else(|| self.fail(reason))?;
        self.rest = rest;
        self.offset += length;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, reason: &'static str) -> Result<[u8; N], Undecodable> {
        let (taken, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or_else(|| self.fail(reason))?;
        self.rest = rest;
        self.offset += N;
        Ok(*taken)
    }

    fn ulong(&mut self, reason: &'static str) -> Result<u64, Undecodable> {
        self.array(reason).map(u64::from_ne_bytes)
    }

    /// A length in bytes that what is left can hold.
    fn length(&mut self) -> Result<usize, Undecodable> {
        let start = self.offset;
        let length = self.ulong("the length of a value is cut off")?;
        match usize::try_from(length) {
            Ok(length) if length <= self.rest.len() => Ok(length),
            _ => Err(Undecodable {
                offset: start,
                reason: "the length of a value is more than what follows",
            }),
        }
    }

    fn value(&mut self) -> Result<Value, Undecodable> {
        let start = self.offset;
        let kind = u32::from_ne_bytes(self.array("the kind of an entry is cut off")?);
        Ok(match kind {
            kind::BOOLEAN => {
                let [byte] = self.array("a boolean is cut off")?;
                Value::Bool(byte != 0)
            }
            kind::INTEGER => Value::Ulong(self.ulong("an integer is cut off")?),
            kind::BINARY => {
                let length = self.length()?;
                Value::Bytes(self.take(length, "a byte string is cut off")?.to_vec())
            }
            kind::MECHANISMS => {
                let length = self.length()?;
                Value::Mechs(self.mechanisms(length)?)
            }
            other => {
                return Err(Undecodable {
                    offset: start,
                    reason: if other == kind::MAP {
                        "an attribute map in an attribute map"
                    } else {
                        "the kind of an entry is unknown"
                    },
                });
            }
        })
    }

    fn mechanisms(&mut self, length: usize) -> Result<BTreeSet<u64>, Undecodable> {
        let mut left = self.take(length, "a mechanism set is cut off")?;
        let mut set = BTreeSet::new();
        while let Some((mechanism, rest)) = left.split_first_chunk() {
            set.insert(u64::from_ne_bytes(*mechanism));
            left = rest;
        }
        if left.is_empty() {
            return Ok(set);
        }
        Err(Undecodable {
            offset: self.offset - left.len(),
            reason: "a mechanism is cut off",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::encode;
    use super::*;
    use proptest::collection::{btree_map, btree_set, vec};
    use proptest::prelude::*;

    /// One entry of a map, of any kind number.
    fn entry(attribute_type: u64, kind: u32, value: &[u8]) -> Vec<u8> {
        let mut bytes = attribute_type.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes
    }

    fn sized(length: u64, bytes: &[u8]) -> Vec<u8> {
        [&length.to_ne_bytes()[..], bytes].concat()
    }

    #[test]
    fn every_kind_of_entry() {
        let blob = [
            entry(1, 1, &[7]),
            entry(2, 2, &u64::MAX.to_ne_bytes()),
            entry(3, 3, &sized(2, b"ab")),
            entry(4, 3, &sized(0, b"")),
            entry(5, 5, &sized(8, &0x40_u64.to_ne_bytes())),
        ]
        .concat();
        let decoded = map(&blob).unwrap();
        assert_eq!(decoded.len(), 5);
        assert_eq!(decoded.boolean(1), Some(true));
        assert_eq!(decoded.ulong(2), Some(u64::MAX));
        assert_eq!(decoded.bytes(3), Some(&b"ab"[..]));
        assert_eq!(decoded.bytes(4), Some(&b""[..]));
        assert_eq!(
            decoded.of_type(5),
            Some(&Value::Mechs(BTreeSet::from([0x40])))
        );
        assert!(map(b"").unwrap().is_empty());
        assert!(mechanisms(b"").unwrap().is_empty());
    }

    #[test]
    fn the_first_of_a_repeated_type_counts_whatever_its_kind() {
        let blob = [
            entry(9, 2, &5_u64.to_ne_bytes()),
            entry(9, 1, &[1]),
            entry(9, 2, &6_u64.to_ne_bytes()),
        ]
        .concat();
        let decoded = map(&blob).unwrap();
        assert_eq!(decoded.len(), 1);
        assert_eq!(decoded.ulong(9), Some(5));
    }

    #[test]
    fn each_damage_is_named_with_its_byte() {
        let good = entry(1, 1, &[1]);
        let table: [(Vec<u8>, usize, &str); 11] = [
            (vec![0; 7], 0, "type"),
            (
                entry(1, 1, &[])[..11].to_vec(),
                8,
                "kind of an entry is cut",
            ),
            (entry(1, 1, &[]), 12, "boolean"),
            (entry(1, 2, &[0; 7]), 12, "integer"),
            (entry(1, 3, &[0; 7]), 12, "length of a value is cut"),
            (entry(1, 3, &sized(3, b"ab")), 12, "more than what follows"),
            (entry(1, 3, &sized(u64::MAX, b"")), 12, "more than"),
            (entry(1, 5, &sized(u64::MAX - 7, b"")), 12, "more than"),
            (entry(1, 5, &sized(12, &[0; 12])), 28, "mechanism is cut"),
            (entry(1, 4, &sized(0, b"")), 8, "map in an attribute map"),
            (entry(1, 6, &[0]), 8, "kind of an entry is unknown"),
        ];
        for (blob, offset, fragment) in table {
            for before in [vec![], good.clone()] {
                let error = map(&[&before[..], &blob].concat()).unwrap_err();
                assert_eq!(error.offset, before.len() + offset, "{error}");
                assert!(error.reason.contains(fragment), "{error}");
            }
        }
        let error = mechanisms(&[0; 17]).unwrap_err();
        assert_eq!((error.offset, error.reason), (16, "a mechanism is cut off"));
    }

    fn value() -> impl Strategy<Value = Value> {
        prop_oneof![
            any::<bool>().prop_map(Value::Bool),
            any::<u64>().prop_map(Value::Ulong),
            vec(any::<u8>(), 0..40).prop_map(Value::Bytes),
            btree_set(any::<u64>(), 0..6).prop_map(Value::Mechs),
        ]
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes_to_the_same(entries in btree_map(any::<u64>(), value(), 0..8)) {
            let mut attributes = Attributes::new();
            for (attribute_type, value) in entries {
                attributes.insert(attribute_type, value);
            }
            let blob = encode::map(&attributes).unwrap();
            prop_assert_eq!(map(&blob).unwrap(), attributes);
        }

        #[test]
        fn a_set_decodes_to_itself(set in btree_set(any::<u64>(), 0..20)) {
            let blob = encode::mechanisms(&set);
            prop_assert_eq!(blob.len(), 8 * set.len());
            prop_assert_eq!(mechanisms(&blob).unwrap(), set);
        }

        #[test]
        fn any_bytes_decode_or_fail_within_themselves(blob in vec(prop_oneof![3 => 0_u8..6, 1 => any::<u8>()], 0..80)) {
            match map(&blob) {
                // Repeated entries are dropped, so the length can only shrink; then nothing more is lost.
                Ok(attributes) => {
                    let again = encode::map(&attributes).unwrap();
                    prop_assert!(again.len() <= blob.len());
                    prop_assert_eq!(map(&again).unwrap(), attributes);
                }
                Err(error) => prop_assert!(error.offset <= blob.len()),
            }
        }

        #[test]
        fn a_map_that_is_cut_off_fails_or_is_shorter(
            entries in btree_map(any::<u64>(), value(), 1..5),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut attributes = Attributes::new();
            for (attribute_type, value) in entries {
                attributes.insert(attribute_type, value);
            }
            let blob = encode::map(&attributes).unwrap();
            let cut = cut.index(blob.len());
            if let Ok(shorter) = map(&blob[..cut]) {
                prop_assert!(shorter.len() < attributes.len());
            }
        }
    }
}
