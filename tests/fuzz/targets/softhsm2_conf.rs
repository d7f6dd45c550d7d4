//! Any bytes are a `softhsm2.conf`, or are refused in one line.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use tokenfs::config::parse;
use tokenfs::error::ErrorKind;

fuzz_target!(|bytes: &[u8]| {
    match parse(Path::new("softhsm2.conf"), bytes) {
        Ok(config) => {
            assert!(config.umask <= 0o777);
            let lines = bytes.split(|byte| *byte == b'\n').count();
            for warning in &config.warnings {
                assert!((1..=lines).contains(&warning.line));
                assert!(!warning.to_string().contains('\n'));
            }
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(!error.to_string().contains('\n'));
        }
    }
});
