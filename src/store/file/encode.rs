//! `.object` files: from attributes to bytes. [`super::decode`] draws the layout.

use std::collections::BTreeSet;

use super::{KIND_BOOLEAN, KIND_BYTES, KIND_MAP, KIND_MECHANISMS, KIND_ULONG};
use crate::store::attribute::{Attributes, Value};

/// The bytes of an object, as SoftHSM writes them: in ascending order of type, a true boolean as `0xFF`.
#[must_use]
pub fn encode(generation: u64, attributes: &Attributes) -> Vec<u8> {
    let mut out = generation.to_be_bytes().to_vec();
    entries(&mut out, attributes);
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
                let mut inner = Vec::new();
                entries(&mut inner, map);
                ulong(out, inner.len() as u64);
                out.append(&mut inner);
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
