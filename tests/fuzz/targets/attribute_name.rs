//! Any file name is that of one attribute, which has no other name, or of none.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tokenfs::error::ErrorKind;
use tokenfs::tree::name::{Name, file_name, parse, refusal};

fuzz_target!(|name: &[u8]| {
    match parse(name) {
        Name::Attribute(key) => assert_eq!(file_name(key).as_bytes(), name),
        Name::Impossible => {
            let refusal = refusal(name);
            assert_eq!(refusal.kind(), ErrorKind::Invalid);
            assert!(!refusal.to_string().contains('\n'));
        }
        Name::Scratch => {}
    }
});
