//! What SoftHSM could not live with, in either backend.
//!
//! SoftHSM decrypts the byte strings of a private object (`CKA_PRIVATE`), and one that is no ciphertext makes `C_FindObjects` fail
//! for the whole token (`docs/store-format.md`, "What is encrypted"). So no such value is written.

use super::attribute::{AttributeType, Attributes, Value};
use crate::error::{Error, ErrorKind, Result};
use crate::pkcs11;

/// `CKA_PRIVATE` (PKCS #11, section 4.4).
const CKA_PRIVATE: AttributeType = 0x2;

/// `CKA_START_DATE` and `CKA_END_DATE` (PKCS #11, section 4.7), which SoftHSM never encrypts.
const DATES: [AttributeType; 2] = [0x110, 0x111];

/// An initialization vector and one block of AES.
const SHORTEST: usize = 32;

/// A block of AES.
const BLOCK: usize = 16;

/// Whether `bytes` can be what SoftHSM makes of a byte string of a private object: nothing, or `IV || AES-256-CBC`.
#[must_use]
pub fn is_possible_ciphertext(bytes: &[u8]) -> bool {
    bytes.is_empty() || (bytes.len() >= SHORTEST && bytes.len().is_multiple_of(BLOCK))
}

/// Checks what is about to become of an object that was `old`, or of a new one. What it held before already is not held
/// against it, as long as it was as private then.
///
/// # Errors
/// [`ErrorKind::Invalid`] with a sentence that names the attribute and not its value.
pub fn check(old: Option<&Attributes>, new: &Attributes) -> Result<()> {
    check_if(old, new, |object| object.boolean(CKA_PRIVATE) == Some(true))
}

/// As [`check`], of a finished object that is not the token's own: one that does not say whether it is private is
/// (`getBooleanValue(CKA_PRIVATE, true)` in SoftHSM). While an object is being put together it can still say that it is not.
///
/// # Errors
/// As [`check`].
pub fn check_finished(old: Option<&Attributes>, new: &Attributes) -> Result<()> {
    let is_private = |object: &Attributes| object.boolean(CKA_PRIVATE).unwrap_or(true);
    // One that stops SoftHSM already, for saying nothing, is not made worse.
    if let Some(old) = old
        && new.boolean(CKA_PRIVATE).is_none()
        && old.boolean(CKA_PRIVATE).is_none()
        && check_if(None, old, is_private).is_err()
    {
        return Ok(());
    }
    check_if(old, new, is_private)
}

fn check_if(
    old: Option<&Attributes>,
    new: &Attributes,
    is_private: impl Fn(&Attributes) -> bool,
) -> Result<()> {
    if !is_private(new) {
        return Ok(());
    }
    let was_private = old.filter(|old| is_private(old));
    for (key, value) in new.iter() {
        let Value::Bytes(bytes) = value else { continue };
        let checked = DATES.contains(&key.attribute_type)
            || is_possible_ciphertext(bytes)
            || was_private.is_some_and(|old| old.get(key) == Some(value));
        if !checked {
            let name = pkcs11::attribute_name(key.attribute_type)
                .map_or_else(|| format!("{:#010x}", key.attribute_type), str::to_owned);
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "{name} of a private object is a ciphertext, which is empty or has at least 32 bytes and a multiple of 16; \
                     {} bytes would make SoftHSM fail on the whole token (an object is private unless its CKA_PRIVATE is false)",
                    bytes.len()
                ),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(private: Option<bool>, label: &[u8]) -> Attributes {
        let mut attributes = Attributes::new();
        if let Some(private) = private {
            attributes.insert(CKA_PRIVATE, Value::Bool(private));
        }
        attributes.insert(3, Value::Bytes(label.to_vec()));
        attributes
    }

    #[test]
    fn only_a_possible_ciphertext_is_put_into_a_private_object() {
        for (length, allowed) in [
            (0, true),
            (1, false),
            (16, false),
            (31, false),
            (32, true),
            (33, false),
            (48, true),
        ] {
            let label = vec![7; length];
            assert_eq!(
                check(None, &object(Some(true), &label)).is_ok(),
                allowed,
                "{length}"
            );
            assert!(check(None, &object(Some(false), &label)).is_ok());
            // What does not say so is private, but for as long as it is being made.
            assert_eq!(check_finished(None, &object(None, &label)).is_ok(), allowed);
            assert!(check(None, &object(None, &label)).is_ok());
        }
        let mut dated = object(Some(true), b"");
        dated.insert(0x110, Value::Bytes(b"20261123".to_vec()));
        assert!(check(None, &dated).is_ok());
    }

    #[test]
    fn what_was_there_before_does_not_stand_in_the_way() {
        let old = object(Some(true), b"label");
        let mut new = old.clone();
        new.insert(0, Value::Ulong(3));
        assert!(check(Some(&old), &new).is_ok());
        let silent = object(None, b"label");
        let mut new = silent.clone();
        new.insert(0, Value::Ulong(3));
        assert!(check_finished(Some(&silent), &new).is_ok());
        let public = object(Some(false), b"label");
        assert!(check_finished(Some(&public), &silent).is_err());
        // But turning CKA_PRIVATE on is refused for what was in the clear.
        let old = object(Some(false), b"label");
        let new = object(Some(true), b"label");
        let error = check(Some(&old), &new).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(
            error
                .to_string()
                .starts_with("CKA_LABEL of a private object"),
            "{error}"
        );
    }
}
