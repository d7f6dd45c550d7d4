use std::collections::BTreeSet;

use super::*;
use crate::pkcs11::{self, *};
use proptest::prelude::*;

const NONE: Context = Context { key_type: None };

fn key(attribute_type: AttributeType, kind: Kind) -> AttributeKey {
    AttributeKey {
        attribute_type,
        kind,
    }
}

fn text(attribute_type: AttributeType, value: Value) -> String {
    text_in(attribute_type, value, NONE)
}

fn text_in(attribute_type: AttributeType, value: Value, context: Context) -> String {
    let text = render(attribute_type, &value, context).unwrap();
    assert_eq!(
        length(attribute_type, &value, context),
        Ok(text.len() as u64)
    );
    String::from_utf8(text.into_owned()).unwrap()
}

fn ulong(attribute_type: AttributeType, text: &str) -> Result<u64> {
    ulong_in(attribute_type, text, NONE)
}

fn ulong_in(attribute_type: AttributeType, text: &str, context: Context) -> Result<u64> {
    match parse(key(attribute_type, Kind::Ulong), text.as_bytes(), context)? {
        Value::Ulong(value) => Ok(value),
        other => panic!("{other:?}"),
    }
}

fn mechs(text: &str) -> Result<Vec<u64>> {
    match parse(
        key(CKA_ALLOWED_MECHANISMS, Kind::Mechs),
        text.as_bytes(),
        NONE,
    )? {
        Value::Mechs(value) => Ok(value.into_iter().collect()),
        other => panic!("{other:?}"),
    }
}

fn of_key(key_type: u64) -> Context {
    Context {
        key_type: Some(key_type),
    }
}

fn detail<T: std::fmt::Debug>(result: Result<T>) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    error.to_string()
}

#[test]
fn a_boolean_is_true_or_false_and_a_newline() {
    assert_eq!(text(CKA_SIGN, Value::Bool(true)), "true\n");
    assert_eq!(text(CKA_SIGN, Value::Bool(false)), "false\n");
}

#[test]
fn a_boolean_can_be_written_in_other_ways() {
    let parse = |text: &str| parse(key(CKA_SIGN, Kind::Bool), text.as_bytes(), NONE);
    for (word, value) in [
        ("true", true),
        ("false", false),
        ("CK_TRUE", true),
        ("CK_FALSE", false),
        ("1", true),
        ("0", false),
    ] {
        for text in [
            word.to_string(),
            format!("{word}\n"),
            format!("{word}\r\n"),
            format!(" \t{word} \n\n"),
        ] {
            assert_eq!(parse(&text), Ok(Value::Bool(value)), "{text:?}");
        }
    }
    for text in [
        "",
        "\n",
        "maybe\n",
        "TRUE",
        "2",
        "true false",
        "true\nfalse",
        "true\0",
    ] {
        assert_eq!(detail(parse(text)), "CKA_SIGN is true or false");
    }
}

#[test]
fn a_ulong_is_decimal_where_its_type_has_no_symbols() {
    assert_eq!(text(CKA_MODULUS_BITS, Value::Ulong(2048)), "2048\n");
    assert_eq!(text(CKA_VALUE_LEN, Value::Ulong(0)), "0\n");
    assert_eq!(
        text(0x8000_1234, Value::Ulong(u64::MAX - 1)),
        "18446744073709551614\n"
    );
    assert_eq!(text(CKA_LABEL, Value::Ulong(7)), "7\n");
}

#[test]
fn a_ulong_that_says_nothing_has_a_symbol_in_every_type() {
    for attribute_type in [CKA_KEY_GEN_MECHANISM, CKA_MODULUS_BITS, CKA_OS_TOKENFLAGS] {
        let unavailable = Value::Ulong(u64::MAX);
        assert_eq!(
            text(attribute_type, unavailable),
            "CK_UNAVAILABLE_INFORMATION\n"
        );
        assert_eq!(
            ulong(attribute_type, "CK_UNAVAILABLE_INFORMATION"),
            Ok(u64::MAX)
        );
    }
}

#[test]
fn a_ulong_is_a_symbol_where_its_type_has_symbols() {
    for (attribute_type, value, word) in [
        (CKA_CLASS, CKO_PRIVATE_KEY, "CKO_PRIVATE_KEY"),
        (CKA_KEY_TYPE, CKK_RSA, "CKK_RSA"),
        (CKA_KEY_TYPE, CKK_EC, "CKK_EC"),
        (CKA_CERTIFICATE_TYPE, CKC_X_509, "CKC_X_509"),
        (
            CKA_KEY_GEN_MECHANISM,
            CKM_RSA_PKCS_KEY_PAIR_GEN,
            "CKM_RSA_PKCS_KEY_PAIR_GEN",
        ),
        (CKA_NAME_HASH_ALGORITHM, CKM_SHA_1, "CKM_SHA_1"),
        (
            CKA_PROFILE_ID,
            CKP_BASELINE_PROVIDER,
            "CKP_BASELINE_PROVIDER",
        ),
        (CKA_HW_FEATURE_TYPE, CKH_CLOCK, "CKH_CLOCK"),
        (CKA_TRUST_IPSEC_IKE, CKT_TRUST_ANCHOR, "CKT_TRUST_ANCHOR"),
        (
            CKA_CERTIFICATE_CATEGORY,
            CK_CERTIFICATE_CATEGORY_AUTHORITY,
            "CK_CERTIFICATE_CATEGORY_AUTHORITY",
        ),
        (
            CKA_JAVA_MIDP_SECURITY_DOMAIN,
            CK_SECURITY_DOMAIN_UNSPECIFIED,
            "CK_SECURITY_DOMAIN_UNSPECIFIED",
        ),
    ] {
        assert_eq!(
            text(attribute_type, Value::Ulong(value)),
            format!("{word}\n")
        );
        assert_eq!(ulong(attribute_type, &format!(" {word} \n")), Ok(value));
    }
    assert_eq!(
        text(CKA_KEY_TYPE, Value::Ulong(0x8000_0001)),
        "0x80000001\n"
    );
    assert_eq!(text(CKA_CLASS, Value::Ulong(99)), "0x00000063\n");
}

#[test]
fn a_ulong_can_be_written_in_other_ways() {
    assert_eq!(ulong(CKA_KEY_TYPE, "3"), Ok(3));
    assert_eq!(ulong(CKA_KEY_TYPE, "0x3\n"), Ok(3));
    assert_eq!(ulong(CKA_KEY_TYPE, "0X0000001f"), Ok(0x1f));
    assert_eq!(ulong(CKA_KEY_TYPE, "CKK_ECDSA\n"), Ok(CKK_EC));
    assert_eq!(ulong(CKA_MODULUS_BITS, "0x00000000000000000800"), Ok(2048));
    assert_eq!(
        ulong(CKA_MODULUS_BITS, "18446744073709551615"),
        Ok(u64::MAX)
    );
}

#[test]
fn what_is_no_ulong_is_refused_with_a_hint_and_without_a_quotation() {
    for text in [
        "",
        "\n",
        "secret",
        "CKO_DATA",
        "-1",
        "+1",
        "0x",
        "0x+1",
        "0xfg",
        "1 2",
        "1\n2",
        "18446744073709551616",
        "0x10000000000000000",
        "1_000",
        "2048 bits",
        "\u{663}",
    ] {
        assert_eq!(
            detail(ulong(CKA_MODULUS_BITS, text)),
            "CKA_MODULUS_BITS is one number below 2^64, decimal or 0x…",
            "{text:?}"
        );
    }
    assert_eq!(
        detail(ulong(CKA_CLASS, "CKK_RSA")),
        "CKA_CLASS is one CKO_… symbol or number, decimal or 0x…"
    );
    assert_eq!(
        detail(ulong(CKA_PARAMETER_SET, "CKP_BASELINE_PROVIDER")),
        "CKA_PARAMETER_SET is one CKP_… symbol or number, decimal or 0x…"
    );
    let bytes = parse(key(CKA_CLASS, Kind::Ulong), b"\xff\xfe", NONE);
    assert_eq!(bytes.unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn a_parameter_set_is_read_by_the_key_type_beside_it() {
    let one = Value::Ulong(1);
    for (key_type, word) in [
        (CKK_ML_DSA, "CKP_ML_DSA_44\n"),
        (CKK_ML_KEM, "CKP_ML_KEM_512\n"),
        (CKK_SLH_DSA, "CKP_SLH_DSA_SHA2_128S\n"),
    ] {
        let context = of_key(key_type);
        assert_eq!(text_in(CKA_PARAMETER_SET, one.clone(), context), word);
        assert_eq!(ulong_in(CKA_PARAMETER_SET, word, context), Ok(1));
        // Written before its key type.
        assert_eq!(ulong(CKA_PARAMETER_SET, word), Ok(1));
    }
    assert_eq!(text(CKA_PARAMETER_SET, one.clone()), "1\n");
    assert_eq!(text_in(CKA_PARAMETER_SET, one, of_key(CKK_RSA)), "1\n");
    assert_eq!(
        detail(ulong_in(
            CKA_PARAMETER_SET,
            "CKP_ML_KEM_512",
            of_key(CKK_ML_DSA)
        )),
        "CKA_PARAMETER_SET is one CKP_ML_DSA_… symbol or number, decimal or 0x…"
    );

    let mut attributes = Attributes::new();
    assert_eq!(Context::of(&attributes), NONE);
    attributes.insert(CKA_KEY_TYPE, Value::Ulong(CKK_ML_KEM));
    assert_eq!(Context::of(&attributes), of_key(CKK_ML_KEM));
}

#[test]
fn flags_are_one_per_line() {
    let flags = |set| text(CKA_OS_TOKENFLAGS, Value::Ulong(set));
    assert_eq!(
        flags(CKF_RNG | CKF_LOGIN_REQUIRED | CKF_TOKEN_INITIALIZED),
        "CKF_RNG\nCKF_LOGIN_REQUIRED\nCKF_TOKEN_INITIALIZED\n"
    );
    assert_eq!(flags(0), "0\n");
    assert_eq!(flags(CKF_RNG | 1 << 40 | 0x10), "CKF_RNG\n0x10000000010\n");
    assert_eq!(flags(0x10), "0x00000010\n");
}

#[test]
fn flags_are_accepted_in_any_order() {
    let flags = |text| ulong(CKA_OS_TOKENFLAGS, text);
    assert_eq!(flags("0\n"), Ok(0));
    assert_eq!(
        flags("CKF_LOGIN_REQUIRED\n\n  CKF_RNG\t\r\nCKF_RNG\n0x10"),
        Ok(CKF_RNG | CKF_LOGIN_REQUIRED | 0x10)
    );
    assert_eq!(flags("1029"), Ok(1029));
    assert_eq!(
        detail(flags("CKF_RNG\n\nCKF_HW\n")),
        "line 3 of CKA_OS_TOKENFLAGS is neither a CKF_… symbol nor a number below 2^64"
    );
    for empty in ["", "\n", " \n\t\n"] {
        assert_eq!(
            detail(flags(empty)),
            "CKA_OS_TOKENFLAGS is at least one line, CKF_… or 0 for none"
        );
    }
}

#[test]
fn mechanisms_are_one_per_line_in_ascending_order() {
    let set = BTreeSet::from([
        0x8000_1234,
        CKM_SHA512_RSA_PKCS,
        CKM_RSA_PKCS,
        CKM_ECDSA,
        u64::MAX,
    ]);
    assert_eq!(
        text(CKA_ALLOWED_MECHANISMS, Value::Mechs(set)),
        "CKM_RSA_PKCS\nCKM_SHA512_RSA_PKCS\nCKM_ECDSA\n0x80001234\n0xffffffffffffffff\n"
    );
    assert_eq!(
        text(CKA_ALLOWED_MECHANISMS, Value::Mechs(BTreeSet::new())),
        ""
    );
}

#[test]
fn mechanisms_are_accepted_in_any_order() {
    assert_eq!(mechs(""), Ok(vec![]));
    assert_eq!(mechs(" \n\n"), Ok(vec![]));
    assert_eq!(
        mechs("0x80001234\n\n CKM_ECDSA \r\n3\nCKM_ECDSA\nCKM_ECDSA_KEY_PAIR_GEN"),
        Ok(vec![3, CKM_EC_KEY_PAIR_GEN, CKM_ECDSA, 0x8000_1234])
    );
    for text in [
        "CKM_RSA_PKCS\nCKM_NEWNAME",
        "CKM_RSA_PKCS\nCKM_ECDSA CKM_RSA_PKCS",
        "\nCKK_RSA",
    ] {
        assert_eq!(
            detail(mechs(text)),
            "line 2 of CKA_ALLOWED_MECHANISMS is neither a CKM_… symbol nor a number below 2^64"
        );
    }
}

#[test]
fn a_byte_string_is_its_own_text() {
    for bytes in [&b""[..], b"label", b"a\n\0\xff", b"true\n"] {
        let value = Value::Bytes(bytes.to_vec());
        let text = render(CKA_LABEL, &value, NONE).unwrap();
        assert!(matches!(text, Cow::Borrowed(_)));
        assert_eq!(&text[..], bytes);
        assert_eq!(length(CKA_LABEL, &value, NONE), Ok(bytes.len() as u64));
        assert_eq!(parse(key(CKA_LABEL, Kind::Bytes), bytes, NONE), Ok(value));
    }
}

#[test]
fn a_map_has_no_text() {
    let map = Value::Map(Attributes::new());
    let kind = |error: Error| error.kind();
    let directory = ErrorKind::IsADirectory;
    let rendered = render(CKA_WRAP_TEMPLATE, &map, NONE);
    assert_eq!(rendered.map_err(kind), Err(directory));
    let length = length(CKA_WRAP_TEMPLATE, &map, NONE);
    assert_eq!(length.map_err(kind), Err(directory));
    let parsed = parse(key(CKA_WRAP_TEMPLATE, Kind::Map), b"", NONE);
    assert_eq!(parsed.map_err(kind), Err(directory));
}

/// Types: all that have a name, and some that have none.
fn types() -> impl Strategy<Value = AttributeType> {
    let named: Vec<_> = pkcs11::attributes().map(|(named, _, _)| named).collect();
    prop_oneof![
        4 => prop::sample::select(named),
        2 => Just(CKA_OS_TOKENFLAGS),
        2 => Just(CKA_PARAMETER_SET),
        1 => any::<u64>(),
    ]
}

/// Numbers of any length, small ones (which have symbols) often.
fn numbers() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..0x100_u64,
        (any::<u64>(), 0..64_u32).prop_map(|(number, shift)| number >> shift),
        Just(u64::MAX),
    ]
}

fn values() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<bool>().prop_map(Value::Bool),
        numbers().prop_map(Value::Ulong),
        prop::collection::vec(any::<u8>(), 0..40).prop_map(Value::Bytes),
        prop::collection::btree_set(numbers(), 0..20).prop_map(Value::Mechs),
    ]
}

fn contexts() -> impl Strategy<Value = Context> {
    let key_types = prop::option::of(prop_oneof![CKK_ML_KEM..=CKK_SLH_DSA, any::<u64>()]);
    key_types.prop_map(|key_type| Context { key_type })
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop::sample::select(vec![
        Kind::Bool,
        Kind::Ulong,
        Kind::Bytes,
        Kind::Mechs,
        Kind::Map,
    ])
}

proptest! {
    #[test]
    fn every_value_survives_its_text(
        attribute_type in types(), value in values(), context in contexts()
    ) {
        let key = key(attribute_type, value.kind());
        let text = render(attribute_type, &value, context).unwrap();
        prop_assert_eq!(length(attribute_type, &value, context), Ok(text.len() as u64));
        let parsed = parse(key, &text, context).unwrap();
        prop_assert_eq!(render(attribute_type, &parsed, context).unwrap(), text.clone());
        prop_assert_eq!(&parsed, &value);
        // A text that was taken from one object can be given to another one that has no key type yet.
        prop_assert_eq!(parse(key, &text, NONE), Ok(value));
    }

    #[test]
    fn any_bytes_are_a_value_or_refused(
        attribute_type in types(), kind in kinds(), context in contexts(),
        text in prop::collection::vec(any::<u8>(), 0..60)
    ) {
        check_parse(key(attribute_type, kind), &text, context)?;
    }

    #[test]
    fn any_words_are_a_value_or_refused(
        attribute_type in types(), kind in kinds(), context in contexts(),
        text in "((CK[OKMPF]_)?[A-Z0-9_x]{0,8}|CKM_RSA_PKCS|CKF_RNG|0x[0-9a-f]{0,20}|[0-9]{0,22})([ \n]|\r\n){0,2}true?"
    ) {
        check_parse(key(attribute_type, kind), text.as_bytes(), context)?;
    }
}

/// What is parsed is of the kind that was asked for and has a text of its own; what is not is refused for that reason.
fn check_parse(key: AttributeKey, text: &[u8], context: Context) -> Result<(), TestCaseError> {
    match parse(key, text, context) {
        Ok(value) => {
            prop_assert_eq!(value.kind(), key.kind);
            let text = render(key.attribute_type, &value, context).unwrap();
            prop_assert_eq!(parse(key, &text, context), Ok(value));
        }
        Err(error) if key.kind == Kind::Map => {
            prop_assert_eq!(error.kind(), ErrorKind::IsADirectory);
        }
        Err(error) => prop_assert_eq!(error.kind(), ErrorKind::Invalid),
    }
    Ok(())
}

#[test]
fn the_beginning_of_a_value_is_told_from_what_can_be_none() {
    let (bool_key, class) = (key(CKA_TOKEN, Kind::Bool), key(CKA_CLASS, Kind::Ulong));
    let mechanisms = key(CKA_ALLOWED_MECHANISMS, Kind::Mechs);
    let number = key(CKA_MODULUS_BITS, Kind::Ulong);
    for (key, text, expected) in [
        (bool_key, "", true),
        (bool_key, "t", true),
        (bool_key, "CK_", true),
        (bool_key, "false", true),
        (bool_key, "\0\0\0\0", true),
        (bool_key, "yes", false),
        (bool_key, "truer", false),
        (bool_key, "0x", false),
        (class, "C", true),
        (class, "CKO_CERT", true),
        (class, "CK_UNAV", true),
        (class, "0X", true),
        (class, "0x3", true),
        (class, "12", true),
        (class, "CKM_", false),
        (class, "CKO_CERTT", false),
        (class, "1x", false),
        (class, "-", false),
        (number, "204", true),
        (number, "CKO", false),
        (number, "20 48", false),
        (mechanisms, "CKM_RSA_PKCS\nCKM_", true),
        (mechanisms, "CKM_RSA_PKCS\n0x", true),
        (mechanisms, "CKM_RSA_PKCS\nCKO_", false),
        (mechanisms, "\u{fffd}", false),
        (key(CKA_PARAMETER_SET, Kind::Ulong), "CKP_SLH", true),
        (
            key(pkcs11::CKA_OS_TOKENFLAGS, Kind::Ulong),
            "CKF_LOGIN",
            true,
        ),
        (key(pkcs11::CKA_OS_TOKENFLAGS, Kind::Ulong), "CKO_", false),
    ] {
        let told = check_beginning(key, text.as_bytes(), NONE);
        assert_eq!(told.is_ok(), expected, "{text:?}: {told:?}");
    }
}
