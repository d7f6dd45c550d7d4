//! `.object` files: from attributes to bytes. [`super::decode`] draws the layout.

use std::collections::BTreeSet;
use std::hash::Hasher;

use siphasher::sip128::{Hasher128, SipHasher13};

use super::{CKA_TOKENFS_FILLER, KIND_BOOLEAN, KIND_BYTES, KIND_MAP, KIND_MECHANISMS, KIND_ULONG};
use crate::store::attribute::{Attributes, Value};

/// The bytes of an object, as SoftHSM writes them: in ascending order of type, a true boolean as `0xFF`.
#[must_use]
pub fn encode(generation: u64, attributes: &Attributes) -> Vec<u8> {
    let length = usize::try_from(encoded_length(attributes)).unwrap_or(0);
    let mut out = Vec::with_capacity(length);
    ulong(&mut out, generation);
    entries(&mut out, attributes);
    out
}

/// By this a value is known again, whatever it is called: a hash of its bytes as SoftHSM would write them.
#[must_use]
pub fn digest(value: &Value) -> u128 {
    let mut alone = Attributes::new();
    alone.insert(0, value.clone());
    let mut hasher = SipHasher13::new();
    hasher.write(&encode(0, &alone));
    hasher.finish128().as_u128()
}

/// How many bytes [`encode`] makes of an object.
#[must_use]
pub fn encoded_length(attributes: &Attributes) -> u64 {
    8 + length_of_entries(attributes)
}

fn length_of_entries(attributes: &Attributes) -> u64 {
    let lengths = attributes.iter().map(|(_, value)| {
        let length = match value {
            Value::Bool(_) => 1,
            Value::Ulong(_) => 8,
            Value::Bytes(bytes) => 8 + bytes.len() as u64,
            Value::Mechs(set) => 8 + 8 * set.len() as u64,
            Value::Map(map) => 8 + length_of_entries(map),
        };
        // Type and kind.
        16 + length
    });
    lengths.sum()
}

/// `bytes` with an attribute behind them that SoftHSM ignores and [`super::decode()`] hides, so that they are at least as long
/// as `length`; without one if they are.
pub(super) fn filled(bytes: &[u8], length: usize) -> Vec<u8> {
    let mut out = bytes.to_vec();
    if out.len() < length {
        ulong(&mut out, CKA_TOKENFS_FILLER);
        ulong(&mut out, KIND_BYTES);
        let zeros = length.saturating_sub(out.len() + 8);
        ulong(&mut out, zeros as u64);
        out.resize(out.len() + zeros, 0);
    }
    out
}

fn entries(out: &mut Vec<u8>, attributes: &Attributes) {
    for (key, value) in attributes.iter() {
        ulong(out, key.attribute_type);
        match value {
            Value::Bool(value) => {
                ulong(out, KIND_BOOLEAN);
                out.push(if *value { 0xFF } else { 0 });
            }
            Value::Ulong(value) => {
                ulong(out, KIND_ULONG);
                ulong(out, *value);
            }
            Value::Bytes(bytes) => {
                ulong(out, KIND_BYTES);
                ulong(out, bytes.len() as u64);
                out.extend_from_slice(bytes);
            }
            Value::Mechs(set) => {
                ulong(out, KIND_MECHANISMS);
                mechanisms(out, set);
            }
            Value::Map(map) => {
                ulong(out, KIND_MAP);
                ulong(out, length_of_entries(map));
                entries(out, map);
            }
        }
    }
}

fn mechanisms(out: &mut Vec<u8>, set: &BTreeSet<u64>) {
    ulong(out, set.len() as u64);
    for mechanism in set {
        ulong(out, *mechanism);
    }
}

fn ulong(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_be_bytes());
}
