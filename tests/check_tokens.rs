//! `tokenfs check` tells of tokens with which SoftHSM ends every program that uses it: a label or a serial number that is too long, and
//! two tokens in one slot.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod check_common;
mod support;

use std::path::Path;
use std::sync::Arc;

use check_common::*;
use support::*;
use tokenfs::diagnostics::Diagnostics;
use tokenfs::pkcs11::{CKA_OS_TOKENLABEL, CKA_OS_TOKENSERIAL};
use tokenfs::store::attribute::{AttributeType, Value};
use tokenfs::store::{ObjectId, Options, Patience, Store, TokenName};

const LOCK_WAIT: std::time::Duration = std::time::Duration::from_secs(5);

/// Writes one of a token's own attributes, as nobody can through a mount, and gives the one that it had.
fn set(softhsm: &Softhsm, token: &Path, attribute_type: AttributeType, value: &[u8]) -> Vec<u8> {
    let log = Arc::new(Diagnostics::new());
    let store = Store::open(&softhsm.tokendir, Options::default(), log).unwrap();
    let name = TokenName::new(token.file_name().unwrap()).unwrap();
    let token = store.token(&name).unwrap();
    let mut before = Vec::new();
    let mut edit = |own: &mut tokenfs::store::attribute::Attributes| {
        before = own.bytes(attribute_type).unwrap().to_vec();
        own.insert(attribute_type, Value::Bytes(value.to_vec()));
        Ok(())
    };
    let patience = Patience::at_most(LOCK_WAIT);
    token
        .update(&ObjectId::Token, &mut edit, None, patience)
        .unwrap();
    before
}

/// Whether a program that uses SoftHSM gets to its end.
fn starts(softhsm: &Softhsm) -> bool {
    let said = softhsm.util().arg("--show-slots").output().unwrap();
    assert!(said.status.code().is_none_or(|code| code == 0), "{said:?}");
    said.status.success()
}

both_backends! {
    fn a_label_or_a_serial_number_that_crashes_softhsm_is_told(backend) {
        let (softhsm, client) = Softhsm::with_token(backend);
        drop(client);
        let token = softhsm.token_directory();
        let file = token.join(if backend == Backend::File { "token.object" } else { "sqlite3.db" });
        assert!(starts(&softhsm));
        for (attribute_type, name, most) in [
            (CKA_OS_TOKENLABEL, "CKA_OS_TOKENLABEL", 32),
            (CKA_OS_TOKENSERIAL, "CKA_OS_TOKENSERIAL", 16),
        ] {
            let before = set(&softhsm, &token, attribute_type, &vec![b'7'; most]);
            check(&softhsm, &[]).assert_clean();
            set(&softhsm, &token, attribute_type, &vec![b'7'; most + 1]);
            let checked = look(&softhsm);
            assert_eq!(checked.code, 1, "{checked:#?}");
            let line = checked.of_path(&file);
            let said = format!("suspicious: {name} has {} bytes, and SoftHSM copies it into a field of {most} ", most + 1);
            assert!(line.starts_with(&said), "{line}");
            // One byte too many is enough for Debian's build, which is fortified; this is for any.
            set(&softhsm, &token, attribute_type, &[b'7'; 10_000]);
            assert!(!starts(&softhsm), "it is as bad as it says");
            set(&softhsm, &token, attribute_type, &before);
        }
        assert!(starts(&softhsm));
    }

    fn two_tokens_in_one_slot_are_told(backend) {
        let (softhsm, mut client) = Softhsm::with_token(backend);
        client.init_token("other", Some(PIN)).unwrap();
        drop(client);
        let tokens = softhsm.token_directories();
        let name = |index: usize| tokens[index].file_name().unwrap().to_str().unwrap();
        set(&softhsm, &tokens[0], CKA_OS_TOKENSERIAL, b"0123456789abcdef");
        // One bit of the 32 does not count.
        set(&softhsm, &tokens[1], CKA_OS_TOKENSERIAL, b"ffffffff09abcdef");
        assert!(!starts(&softhsm));
        let checked = look(&softhsm);
        assert_eq!((checked.code, checked.findings().len()), (1, 2), "{checked:#?}");
        for (index, other) in [(0, 1), (1, 0)] {
            let line = checked.of_path(&tokens[index]);
            assert!(line.starts_with("suspicious: by the last eight digits of its serial number "), "{line}");
            assert!(line.contains(&format!("in the slot of the token {} too, ", name(other))), "{line}");
            // With one of them alone the other one counts all the same.
            let one = check(&softhsm, &[name(index)]);
            assert_eq!(one.of_path(&tokens[index]), line);
            assert_eq!(one.findings().len(), 1, "{one:#?}");
        }
        // What needs a decision is left alone.
        assert_eq!(check(&softhsm, &["--repair"]).findings().len(), 2);

        // Beside two tokens, 2 is the number of the slot without one.
        set(&softhsm, &tokens[1], CKA_OS_TOKENSERIAL, b"ffffffff80000002");
        assert!(!starts(&softhsm));
        let checked = look(&softhsm);
        assert_eq!((checked.code, checked.findings().len()), (1, 1), "{checked:#?}");
        let line = checked.of_path(&tokens[1]);
        assert!(line.contains("in the slot 2, which is the empty one "), "{line}");
        set(&softhsm, &tokens[1], CKA_OS_TOKENSERIAL, b"ffffffff80000003");
        assert!(starts(&softhsm));
        check(&softhsm, &[]).assert_clean();
    }
}
