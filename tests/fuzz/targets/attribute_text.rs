//! A text that means a value is that value's text, or another spelling of it.
//!
//! The input is the name of an attribute, a newline, and the text.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tokenfs::tree::name::{self, Name};
use tokenfs::tree::text::{Context, length, parse, render};

/// No key type, and those whose keys have a `CKA_PARAMETER_SET` (`CKK_ML_KEM`, `CKK_ML_DSA`, `CKK_SLH_DSA`).
const KEY_TYPES: [Option<u64>; 4] = [None, Some(0x49), Some(0x4a), Some(0x4b)];

fuzz_target!(|input: &[u8]| {
    let mut halves = input.splitn(2, |byte| *byte == b'\n');
    let (Some(file_name), Some(text)) = (halves.next(), halves.next()) else {
        return;
    };
    let Name::Attribute(key) = name::parse(file_name) else {
        return;
    };
    for key_type in KEY_TYPES {
        let context = Context { key_type };
        let value = match parse(key, text, context) {
            Ok(value) => value,
            Err(error) => {
                assert!(!error.to_string().contains('\n'));
                continue;
            }
        };
        assert_eq!(value.kind(), key.kind);
        let shown = render(key.attribute_type, &value, context).expect("a value has a text");
        assert_eq!(
            length(key.attribute_type, &value, context),
            Ok(shown.len() as u64)
        );
        assert_eq!(parse(key, &shown, context).as_ref(), Ok(&value));
    }
});
