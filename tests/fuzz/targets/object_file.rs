//! Any bytes are an object or are not, and an object survives being written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tokenfs::error::ErrorKind;
use tokenfs::store::file::{decode, encode};

fuzz_target!(|bytes: &[u8]| {
    match decode(bytes) {
        Ok(decoded) => {
            let generation = decoded.generation.unwrap_or(1);
            let written = encode(generation, &decoded.attributes);
            // What a repeated type had before is gone, and a cut behind the last attribute; nothing is added.
            assert!(written.len() <= bytes.len().max(8));
            let again = decode(&written).expect("what was encoded decodes");
            assert_eq!(again.generation, Some(generation));
            assert_eq!(again.attributes, decoded.attributes);
            assert_eq!(again.trailing, None);
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Damaged);
            assert!(error.offset().expect("damage has a place") <= bytes.len() as u64);
        }
    }
});
