//! Any blob is an attribute map of the `db` backend or is not, and one that is survives being written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tokenfs::store::db::{decode, encode};

fuzz_target!(|blob: &[u8]| {
    match decode::map(blob) {
        Ok(map) => {
            let written = encode::map(&map).expect("what was decoded can be encoded");
            assert!(written.len() <= blob.len());
            assert_eq!(decode::map(&written).as_ref(), Ok(&map));
        }
        Err(error) => assert!(error.offset <= blob.len()),
    }
});
