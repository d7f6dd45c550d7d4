//! The file name of an attribute.
//!
//! A name tells type and kind, and each attribute has one name only: `CKA_LABEL`; `CKA_LABEL.ulong` for a type that is
//! stored with another kind than the one that PKCS #11 gives it; `0x80001234.bytes` for a type without a name. Every other
//! spelling is no name of an attribute, so that two names never lead to the same one.

use std::borrow::Cow;

use crate::error::{Error, ErrorKind};
use crate::pkcs11;
use crate::store::attribute::{AttributeKey, AttributeType, Kind};

const KINDS: [(Kind, &str); 5] = [
    (Kind::Bool, "bool"),
    (Kind::Ulong, "ulong"),
    (Kind::Bytes, "bytes"),
    (Kind::Mechs, "mechs"),
    (Kind::Map, "map"),
];

/// What a file name in the directory of an object, or of an attribute map, says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name {
    /// This attribute.
    Attribute(AttributeKey),
    /// Meant as an attribute, and the name of none: nothing can be kept under it. [`refusal`] says why.
    Impossible,
    /// Not meant as an attribute: a temporary or backup file of some program.
    Scratch,
}

/// The file name of an attribute.
#[must_use]
pub fn file_name(key: AttributeKey) -> Cow<'static, str> {
    let kind = kind_word(key.kind);
    match pkcs11::attribute_name(key.attribute_type) {
        Some(name) if pkcs11::attribute_kind(key.attribute_type) == Some(key.kind) => name.into(),
        Some(name) => format!("{name}.{kind}").into(),
        None => format!("{:#010x}.{kind}", key.attribute_type).into(),
    }
}

/// What a file name says.
#[must_use]
pub fn parse(name: &[u8]) -> Name {
    if !begins_as_attribute(name) {
        return Name::Scratch;
    }
    if let Some(key) = exact(name) {
        return Name::Attribute(key);
    }
    if name.ends_with(b"~") || (lenient(name).is_none() && extends_attribute(name)) {
        return Name::Scratch;
    }
    Name::Impossible
}

/// Why nothing can be kept under a name that [`parse`] says is [`Name::Impossible`].
#[must_use]
pub fn refusal(name: &[u8]) -> Error {
    let shown = String::from_utf8_lossy(name).escape_debug().to_string();
    let detail = match lenient(name).map(file_name) {
        Some(right) => format!("{shown} is called {right} here"),
        None if lenient_type(name).is_some() => {
            format!("{shown} lacks its kind: .bool, .ulong, .bytes, .mechs or .map")
        }
        None => format!("{shown} is neither an attribute of PKCS #11 3.2 nor 0x….<kind>"),
    };
    Error::new(ErrorKind::Invalid, detail)
}

/// The word for a kind in a name.
#[must_use]
pub fn kind_word(kind: Kind) -> &'static str {
    match kind {
        Kind::Bool => "bool",
        Kind::Ulong => "ulong",
        Kind::Bytes => "bytes",
        Kind::Mechs => "mechs",
        Kind::Map => "map",
    }
}

/// Whether a name begins as only an attribute's does, in whatever case.
fn begins_as_attribute(name: &[u8]) -> bool {
    let begins = |prefix: &[u8]| {
        name.get(..prefix.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(prefix))
    };
    begins(b"CKA_") || begins(b"0x")
}

/// The attribute that has exactly this name.
fn exact(name: &[u8]) -> Option<AttributeKey> {
    lenient(name).filter(|key| file_name(*key).as_bytes() == name)
}

/// Whether a name is that of an attribute and more, as programs name what they put beside a file:
/// `CKA_LABEL.tmp`, `0x80001234.bytes-new`.
fn extends_attribute(name: &[u8]) -> bool {
    name.iter().enumerate().any(|(index, byte)| {
        let separates = !byte.is_ascii_alphanumeric() && *byte != b'_';
        separates && name.get(..index).and_then(exact).is_some()
    })
}

/// The attribute that somebody can have meant: in any case, under an older name, with more or fewer zeros, with or
/// without its kind where that is known.
fn lenient(name: &[u8]) -> Option<AttributeKey> {
    let dot = name.iter().position(|byte| *byte == b'.');
    let (head, word) = name.split_at(dot.unwrap_or(name.len()));
    let attribute_type = lenient_type(head)?;
    let kind = match word.split_first() {
        None => pkcs11::attribute_kind(attribute_type)?,
        Some((_, word)) => KINDS
            .into_iter()
            .find(|(_, known)| known.as_bytes().eq_ignore_ascii_case(word))
            .map(|(kind, _)| kind)?,
    };
    Some(AttributeKey {
        attribute_type,
        kind,
    })
}

/// The type that somebody can have meant with a name without a kind.
fn lenient_type(head: &[u8]) -> Option<AttributeType> {
    let head = std::str::from_utf8(head).ok()?;
    let upper = head.to_ascii_uppercase();
    match upper.strip_prefix("0X") {
        Some(digits) => AttributeType::from_str_radix(digits, 16).ok(),
        None => pkcs11::attribute_alias(&upper),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(attribute_type: AttributeType, kind: Kind) -> AttributeKey {
        AttributeKey {
            attribute_type,
            kind,
        }
    }

    #[test]
    fn a_name_tells_type_and_kind() {
        for (name, key) in [
            ("CKA_CLASS", key(0, Kind::Ulong)),
            ("CKA_LABEL", key(pkcs11::CKA_LABEL, Kind::Bytes)),
            ("CKA_LABEL.ulong", key(pkcs11::CKA_LABEL, Kind::Ulong)),
            ("CKA_EC_PARAMS", key(0x180, Kind::Bytes)),
            ("CKA_SUBPRIME_BITS", key(0x134, Kind::Ulong)),
            ("CKA_WRAP_TEMPLATE", key(0x4000_0211, Kind::Map)),
            ("CKA_WRAP_TEMPLATE.bytes", key(0x4000_0211, Kind::Bytes)),
            ("CKA_ALLOWED_MECHANISMS", key(0x4000_0600, Kind::Mechs)),
            ("CKA_OS_TOKENFLAGS", key(0x8000_534b, Kind::Ulong)),
            ("0x80001234.bytes", key(0x8000_1234, Kind::Bytes)),
            ("0x80000000.map", key(0x8000_0000, Kind::Map)),
            ("0x000007ff.bool", key(0x7ff, Kind::Bool)),
            ("0x123456789a.mechs", key(0x12_3456_789a, Kind::Mechs)),
            ("0xffffffffffffffff.ulong", key(u64::MAX, Kind::Ulong)),
        ] {
            assert_eq!(file_name(key), name);
            assert_eq!(parse(name.as_bytes()), Name::Attribute(key), "{name}");
        }
    }

    #[test]
    fn what_is_meant_as_an_attribute_and_is_none_is_impossible() {
        for (name, reason) in [
            ("CKA_", "neither"),
            ("CKA_NEWNAME", "neither"),
            ("CKA_NEWNAME.tmp", "neither"),
            ("CKA_LABELS", "neither"),
            ("CKA_VENDOR_DEFINED", "neither"),
            ("CKA_LABEL.bytes", "is called CKA_LABEL here"),
            ("CKA_LABEL.ULONG", "is called CKA_LABEL.ulong here"),
            ("cka_label", "is called CKA_LABEL here"),
            ("CKA_ECDSA_PARAMS", "is called CKA_EC_PARAMS here"),
            ("CKA_SUB_PRIME_BITS", "is called CKA_SUBPRIME_BITS here"),
            ("0x", "neither"),
            ("0xZZ", "neither"),
            ("0x80001234", "lacks its kind"),
            ("0x80001234.byte", "neither"),
            ("0x8000ABCD.bytes", "is called 0x8000abcd.bytes here"),
            ("0X80001234.bytes", "is called 0x80001234.bytes here"),
            ("0x080001234.bytes", "is called 0x80001234.bytes here"),
            ("0x7ff.bool", "is called 0x000007ff.bool here"),
            ("0x00000003.bytes", "is called CKA_LABEL here"),
            ("0x00000003.ulong", "is called CKA_LABEL.ulong here"),
            ("0x00000003", "is called CKA_LABEL here"),
            ("0x11112222333344445.bytes", "neither"),
            ("CKA_NEW\nNAME", "CKA_NEW\\nNAME is neither"),
        ] {
            assert_eq!(parse(name.as_bytes()), Name::Impossible, "{name}");
            let error = refusal(name.as_bytes());
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(reason), "{error}");
        }
        assert_eq!(parse(b"CKA_\xff"), Name::Impossible);
    }

    #[test]
    fn what_programs_put_beside_a_file_is_scratch() {
        for name in [
            ".CKA_LABEL.x8Kd2p",
            ".CKA_LABEL.swp",
            "#CKA_LABEL#",
            "CKA_LABEL~",
            "CKA_LABEL.~1~",
            "CKA_NEWNAME~",
            "0x80001234.bytes~",
            "CKA_LABEL.tmp",
            "CKA_LABEL.bytes.tmp",
            "CKA_LABEL.ulong.tmp",
            "CKA_LABEL-new",
            "0x80001234.bytes.bak",
            "sedA1B2C3",
            "4913",
            "0",
            "CKA",
            "",
            "token",
        ] {
            assert_eq!(parse(name.as_bytes()), Name::Scratch, "{name}");
        }
        assert_eq!(parse(b"\xff\xfe"), Name::Scratch);
    }

    #[test]
    fn every_named_type_round_trips_with_every_kind() {
        for (attribute_type, name, own) in pkcs11::attributes() {
            for (kind, word) in KINDS {
                let key = key(attribute_type, kind);
                let file_name = file_name(key);
                assert_eq!(file_name == name, kind == own);
                assert!(kind == own || file_name.ends_with(word));
                assert_eq!(parse(file_name.as_bytes()), Name::Attribute(key));
                assert_eq!(kind_word(kind), word);
            }
        }
    }

    proptest! {
        #[test]
        fn every_key_has_a_name_and_every_name_one_key(
            attribute_type in any::<u64>(), shift in 0..64_u32, index in 0..KINDS.len()
        ) {
            let key = key(attribute_type >> shift, KINDS[index].0);
            prop_assert_eq!(parse(file_name(key).as_bytes()), Name::Attribute(key));
        }

        #[test]
        fn no_other_spelling_is_a_name(name in "(CKA_|0x|0X)[A-Za-z0-9_]{0,12}(\\.[a-zA-Z]{3,5})?~?") {
            if let Name::Attribute(key) = parse(name.as_bytes()) {
                prop_assert_eq!(file_name(key), name);
            } else {
                let _ = refusal(name.as_bytes());
            }
        }

        #[test]
        fn any_bytes_are_a_name_of_some_sort(name in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse(&name);
            let _ = refusal(&name);
        }
    }
}
