//! The names, kinds and symbols of PKCS #11 3.2, and of the vendor attributes that SoftHSM adds.
//!
//! Tables and nothing else: what is stored and how it is shown is decided elsewhere. The numbers are those of
//! `pkcs11.h`, the kinds those of the specification, which agree with the ones that SoftHSM's `db` backend goes by
//! wherever that knows a type; the tests hold all three against each other.
//!
//! Where PKCS #11 has several names for a number, one is *the* name (the one that the header has first, before the older
//! ones) and the others are aliases, which are understood in values and never written.

mod attributes;
#[cfg(test)]
mod conformance;
mod mechanisms;
mod symbols;
mod table;
mod values;

pub use attributes::*;
pub use mechanisms::*;
pub use symbols::Symbols;
pub use values::*;

use crate::store::attribute::{AttributeType, Kind};

/// `CK_UNAVAILABLE_INFORMATION`: what a `CK_ULONG` is when there is nothing to say.
pub const CK_UNAVAILABLE_INFORMATION: u64 = u64::MAX;

/// The name of an attribute type, if PKCS #11 or SoftHSM has one for it.
#[must_use]
pub fn attribute_name(attribute_type: AttributeType) -> Option<&'static str> {
    attributes::NAMES.name(attribute_type)
}

/// The attribute type with this name; an alias is none ([`attribute_alias`]).
#[must_use]
pub fn attribute_type(name: &str) -> Option<AttributeType> {
    attribute_alias(name).filter(|found| attribute_name(*found) == Some(name))
}

/// The attribute type with this name or alias: `CKA_EC_PARAMS` was once `CKA_ECDSA_PARAMS`.
#[must_use]
pub fn attribute_alias(name: &str) -> Option<AttributeType> {
    attributes::NAMES.number(name)
}

/// The kind of value that an attribute type has, if it has a name.
#[must_use]
pub fn attribute_kind(attribute_type: AttributeType) -> Option<Kind> {
    let position = attributes::NAMES.position(attribute_type)?;
    attributes::KINDS.get(position).copied()
}

/// All attribute types that have a name, in ascending order, with name and kind.
pub fn attributes() -> impl Iterator<Item = (AttributeType, &'static str, Kind)> {
    let names = attributes::NAMES.names.iter();
    names
        .zip(attributes::KINDS)
        .map(|((attribute_type, name), kind)| (*attribute_type, *name, *kind))
}

/// The name of a mechanism.
#[must_use]
pub fn mechanism_name(mechanism: u64) -> Option<&'static str> {
    Symbols::Mechanisms.name(mechanism)
}

/// The mechanism with this name or alias.
#[must_use]
pub fn mechanism_type(name: &str) -> Option<u64> {
    Symbols::Mechanisms.value(name)
}

/// The word for a class of objects in file names: `private_key` for `CKO_PRIVATE_KEY`; `0x…` if it has no name.
#[must_use]
pub fn class_word(class: u64) -> String {
    match Symbols::Classes.name(class) {
        Some(name) => name
            .strip_prefix("CKO_")
            .unwrap_or(name)
            .to_ascii_lowercase(),
        None => format!("{class:#010x}"),
    }
}
