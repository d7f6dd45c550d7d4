//! The format: damages and the answer to each; round trips.

use proptest::prelude::*;

use super::fixture::{CLASS, LABEL, MECHANISMS, TEMPLATE, sample, words};
use super::*;
use crate::error::ErrorKind;
use crate::store::attribute::{Attributes, Value};

#[test]
fn what_is_written_is_what_is_read() {
    let decoded = decode(&encode(7, &sample())).unwrap();
    assert_eq!(decoded.generation, Some(7));
    assert_eq!(decoded.attributes, sample());
    assert_eq!(decoded.trailing, None);
}

#[test]
fn of_a_repeated_type_the_last_wins_whatever_its_kind() {
    let mut bytes = words(&[1, LABEL, KIND_BYTES, 1]);
    bytes.push(b'a');
    bytes.extend(words(&[LABEL, KIND_ULONG, 5]));
    let attributes = decode(&bytes).unwrap().attributes;
    assert_eq!(attributes.len(), 1);
    assert_eq!(attributes.ulong(LABEL), Some(5));
}

#[test]
fn of_a_repeated_type_in_a_map_the_first_wins() {
    let entry = |value| words(&[CLASS, KIND_ULONG, value]);
    let mut bytes = words(&[1, TEMPLATE, KIND_MAP, 48]);
    bytes.extend(entry(1));
    bytes.extend(entry(2));
    let Some(Value::Map(map)) = decode(&bytes)
        .unwrap()
        .attributes
        .of_type(TEMPLATE)
        .cloned()
    else {
        panic!("no map");
    };
    assert_eq!(map.ulong(CLASS), Some(1));
}

/// Each damage, with the byte that the error names and a part of what it says.
#[test]
fn every_damage_has_its_answer() {
    let table: &[(&str, Vec<u8>, u64, &str)] = &[
        ("nothing", vec![], 0, "empty"),
        ("a type alone", words(&[1, LABEL]), 16, "kind"),
        (
            "no value",
            words(&[1, CLASS, KIND_ULONG]),
            24,
            "unsigned long",
        ),
        (
            "half a ulong",
            [words(&[1, CLASS, KIND_ULONG]), vec![0; 7]].concat(),
            24,
            "7 are left",
        ),
        ("no boolean", words(&[1, 1, KIND_BOOLEAN]), 24, "boolean"),
        ("kind 0", words(&[1, CLASS, 0, 0]), 16, "0 is no kind"),
        ("kind 6", words(&[1, CLASS, 6, 0]), 16, "6 is no kind"),
        ("kind 2^63", words(&[1, CLASS, 1 << 63]), 16, "no kind"),
        (
            "a length of 1 too many",
            words(&[1, LABEL, KIND_BYTES, 1]),
            32,
            "byte string",
        ),
        (
            "a length of 2^63",
            words(&[1, LABEL, KIND_BYTES, 1 << 63]),
            32,
            "byte string",
        ),
        (
            "a length of 2^64-1",
            words(&[1, LABEL, KIND_BYTES, u64::MAX]),
            32,
            "byte string",
        ),
        ("no length", words(&[1, LABEL, KIND_BYTES]), 24, "length"),
        (
            "a set of 2^60",
            words(&[1, MECHANISMS, KIND_MECHANISMS, 1 << 60]),
            24,
            "mechanism set",
        ),
        (
            "a set of 2^61",
            words(&[1, MECHANISMS, KIND_MECHANISMS, 1 << 61]),
            24,
            "mechanism set",
        ),
        (
            "a set one short",
            words(&[1, MECHANISMS, KIND_MECHANISMS, 2, 1]),
            24,
            "mechanism set",
        ),
        (
            "no map length",
            words(&[1, TEMPLATE, KIND_MAP]),
            24,
            "length of an attribute map",
        ),
        (
            "a map of 2^63",
            words(&[1, TEMPLATE, KIND_MAP, 1 << 63, CLASS]),
            24,
            "attribute map",
        ),
        (
            "a map in a map",
            words(&[1, TEMPLATE, KIND_MAP, 24, TEMPLATE, KIND_MAP, 0]),
            40,
            "within an attribute map",
        ),
        (
            "a kind in a map",
            words(&[1, TEMPLATE, KIND_MAP, 24, CLASS, 9, 0]),
            40,
            "9 is no kind",
        ),
        (
            "an entry too long",
            words(&[1, TEMPLATE, KIND_MAP, 16, CLASS, KIND_ULONG, 0]),
            32,
            "beyond",
        ),
        (
            "a set repeats in a map",
            words(&[
                1,
                TEMPLATE,
                KIND_MAP,
                40,
                MECHANISMS,
                KIND_MECHANISMS,
                2,
                7,
                7,
            ]),
            72,
            "type of an entry",
        ),
    ];
    for (what, bytes, offset, says) in table {
        let error = decode(bytes).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Damaged, "{what}");
        assert_eq!(error.offset(), Some(*offset), "{what}: {error}");
        assert!(error.to_string().contains(says), "{what}: {error}");
    }
}

/// A cut behind an attribute loads, as it does in SoftHSM; a cut anywhere else is damage at a byte that is there.
#[test]
fn a_file_cut_at_any_byte_is_an_error_or_a_prefix() {
    let whole = encode(1, &sample());
    let all = decode(&whole).unwrap().attributes;
    let (mut prefixes, mut damaged, mut trailing) = (0, 0, 0);
    for cut in 0..whole.len() {
        match decode(&whole[..cut]) {
            Ok(decoded) => {
                prefixes += 1;
                trailing += usize::from(decoded.trailing.is_some());
                assert!(
                    decoded
                        .attributes
                        .iter()
                        .all(|(key, value)| all.get(key) == Some(value))
                );
                assert!(
                    decoded
                        .trailing
                        .is_none_or(|offset| offset <= cut as u64 && cut as u64 - offset < 8)
                );
            }
            Err(error) => {
                damaged += 1;
                assert_eq!(error.kind(), ErrorKind::Damaged);
                assert!(error.offset().unwrap() <= cut as u64, "{error}");
            }
        }
    }
    assert_eq!(
        (prefixes - trailing, damaged + prefixes),
        (all.len(), whole.len())
    );
}

fn scalar() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<bool>().prop_map(Value::Bool),
        any::<u64>().prop_map(Value::Ulong),
        prop::collection::vec(any::<u8>(), 0..64).prop_map(Value::Bytes),
        prop::collection::btree_set(any::<u64>(), 0..6).prop_map(Value::Mechs),
    ]
}

fn attributes(value: impl Strategy<Value = Value>) -> impl Strategy<Value = Attributes> {
    prop::collection::btree_map(any::<u64>(), value, 0..8).prop_map(|map| {
        let mut attributes = Attributes::new();
        for (attribute_type, value) in map {
            attributes.insert(attribute_type, value);
        }
        attributes
    })
}

proptest! {
    #[test]
    fn every_object_survives_its_file(
        generation: u64,
        stored in attributes(prop_oneof![scalar(), attributes(scalar()).prop_map(Value::Map)]),
    ) {
        let decoded = decode(&encode(generation, &stored)).unwrap();
        prop_assert_eq!(decoded.attributes, stored);
        prop_assert_eq!(decoded.generation, Some(generation));
    }

    #[test]
    fn no_bytes_are_a_panic(bytes in prop::collection::vec(prop_oneof![Just(0u8), 0..6u8, any::<u8>()], 0..200)) {
        let _ = decode(&bytes);
    }

    #[test]
    fn no_flipped_byte_is_a_panic(at in 0..300usize, to: u8) {
        let mut bytes = encode(1, &sample());
        let length = bytes.len();
        bytes[at % length] = to;
        let _ = decode(&bytes);
    }
}

/// Half a million attributes: a megabyte and more that somebody may have put there to keep us busy.
#[test]
fn many_attributes_take_no_longer_than_their_bytes() {
    let mut bytes = words(&[1]);
    for attribute_type in (0..500_000u64).rev() {
        bytes.extend(words(&[attribute_type, KIND_BOOLEAN]));
        bytes.push(1);
    }
    let mut map = words(&[1, TEMPLATE, KIND_MAP, 500_000 * 17]);
    map.extend_from_slice(&bytes[8..]);
    assert_eq!(decode(&bytes).unwrap().attributes.len(), 500_000);
    let decoded = decode(&map).unwrap();
    assert!(
        matches!(decoded.attributes.of_type(TEMPLATE), Some(Value::Map(map)) if map.len() == 500_000)
    );
}
