//! Any blob is a mechanism set of the `db` backend or is not, and one that is survives being written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tokenfs::store::db::{decode, encode};

fuzz_target!(|blob: &[u8]| {
    match decode::mechanisms(blob) {
        Ok(set) => {
            let written = encode::mechanisms(&set);
            assert!(written.len() <= blob.len());
            assert_eq!(decode::mechanisms(&written), Ok(set));
        }
        Err(error) => {
            assert!(!blob.len().is_multiple_of(8));
            assert!(error.offset <= blob.len());
        }
    }
});
