//! Attributes as PKCS #11 takes and gives them, and how they travel between a test and its `p11` process: `[type, "hex"]`,
//! or `[type, [attribute, …]]` for a template in a template.

use serde_json::{Value, json};

/// One attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attribute {
    /// Its `CK_ATTRIBUTE_TYPE`.
    pub attribute_type: u64,
    /// Its value.
    pub value: AttributeValue,
}

/// The value of an attribute as a caller of PKCS #11 has it in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AttributeValue {
    /// Everything but templates: a boolean is one byte, a `CK_ULONG` and each mechanism eight, little-endian.
    Bytes(Vec<u8>),
    /// A template.
    Template(Vec<Attribute>),
}

/// A byte string.
pub fn bytes(attribute_type: u64, value: impl AsRef<[u8]>) -> Attribute {
    let value = AttributeValue::Bytes(value.as_ref().to_vec());
    Attribute {
        attribute_type,
        value,
    }
}

/// A boolean.
pub fn boolean(attribute_type: u64, value: bool) -> Attribute {
    bytes(attribute_type, [u8::from(value)])
}

/// A `CK_ULONG`.
pub fn ulong(attribute_type: u64, value: u64) -> Attribute {
    bytes(attribute_type, value.to_ne_bytes())
}

/// A set of mechanisms.
pub fn mechs(attribute_type: u64, value: &[u64]) -> Attribute {
    let value: Vec<u8> = value.iter().flat_map(|m| m.to_ne_bytes()).collect();
    bytes(attribute_type, value)
}

/// A template.
pub fn template(attribute_type: u64, value: Vec<Attribute>) -> Attribute {
    Attribute {
        attribute_type,
        value: AttributeValue::Template(value),
    }
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// The bytes of a text in hexadecimal.
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok())
        .collect()
}

impl Attribute {
    /// As it travels.
    pub fn to_json(&self) -> Value {
        match &self.value {
            AttributeValue::Bytes(value) => json!([self.attribute_type, hex(value)]),
            AttributeValue::Template(inner) => json!([self.attribute_type, to_json(inner)]),
        }
    }

    /// From how it travels.
    pub fn from_json(value: &Value) -> Option<Self> {
        let attribute_type = value.get(0)?.as_u64()?;
        let value = match value.get(1)? {
            Value::String(text) => AttributeValue::Bytes(unhex(text)?),
            inner => AttributeValue::Template(from_json(inner)?),
        };
        Some(Self {
            attribute_type,
            value,
        })
    }
}

/// Several attributes as they travel.
pub fn to_json(attributes: &[Attribute]) -> Value {
    attributes.iter().map(Attribute::to_json).collect()
}

/// Several attributes from how they travel.
pub fn from_json(value: &Value) -> Option<Vec<Attribute>> {
    value.as_array()?.iter().map(Attribute::from_json).collect()
}
