//! What SoftHSM could not live with, in either backend.
//!
//! SoftHSM decrypts the byte strings of a private object (`CKA_PRIVATE`), and one that is no ciphertext makes `C_FindObjects` fail
//! for the whole token (`docs/store-format.md`, "What is encrypted"). A token's own label and serial number have to fit into their fields,
//! and two tokens may not fall into one slot ("Attributes of a token"). So no such value is written.

use super::attribute::{AttributeKey, AttributeType, Attributes, Value};
use super::db::times::CKA_TOKENFS_TIMES;
use super::db::uuid::CKA_TOKENFS_UUID;
use super::file::CKA_TOKENFS_FILLER;
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

/// How long a serial number is, in bytes (`CK_TOKEN_INFO`, PKCS #11, section 3.2).
pub const SERIAL: usize = 16;

/// The types of the rows and attributes that tokenfs itself puts into a store (`docs/store-format.md`).
const OWN: [AttributeType; 3] = [CKA_TOKENFS_UUID, CKA_TOKENFS_TIMES, CKA_TOKENFS_FILLER];

/// Checks that an attribute can be of this type: none of tokenfs's own is, in either backend, or it could not be moved to the other one.
///
/// # Errors
/// [`ErrorKind::Invalid`].
pub fn check_key(key: AttributeKey) -> Result<()> {
    if OWN.contains(&key.attribute_type) {
        let detail = format!(
            "{:#010x} is a type of tokenfs's own, in which it keeps what SoftHSM has no place for",
            key.attribute_type
        );
        return Err(Error::new(ErrorKind::Invalid, detail));
    }
    Ok(())
}

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
/// (`getBooleanValue(CKA_PRIVATE, true)` in SoftHSM). While an object is being put together it can still say that it is not. One that
/// has said so goes on to: a SoftHSM that has read that puts texts in the clear into it, whether it is there by then or not. One that
/// has said that it is private goes on to, too: SoftHSM finds it all the same, and then does not decrypt what it needs of it.
///
/// # Errors
/// As [`check`].
pub fn check_finished(old: Option<&Attributes>, new: &Attributes) -> Result<()> {
    if old.is_some_and(|old| old.boolean(CKA_PRIVATE).is_some())
        && new.boolean(CKA_PRIVATE).is_none()
    {
        return Err(Error::new(
            ErrorKind::Invalid,
            "the CKA_PRIVATE of an object goes with the whole object only: a SoftHSM that has read that it is not private would put a text in the \
             clear beside it, and fail on the whole token from then on, and it cannot use a private key that does not say so; what was removed with \
             it is back; to remove the object: rmdir, or rm -r",
        ));
    }
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

/// The number of the slot in which SoftHSM shows a token with this serial number: the last eight characters as a hexadecimal number of
/// 31 bits, as `strtoul` reads them (`SlotManager`'s constructor).
#[must_use]
pub fn slot_id(serial: &[u8]) -> u64 {
    let start = serial.len().saturating_sub(8);
    let text = String::from_utf8_lossy(serial.get(start..).unwrap_or_default());
    let text = text.trim_start();
    let negative = text.starts_with('-');
    let text = text.strip_prefix(['+', '-']).unwrap_or(text);
    let text = text
        .strip_prefix("0x")
        .or(text.strip_prefix("0X"))
        .unwrap_or(text);
    let end = text
        .find(|digit: char| !digit.is_ascii_hexdigit())
        .unwrap_or(text.len());
    let number = u64::from_str_radix(text.get(..end).unwrap_or_default(), 16).unwrap_or(0);
    let number = if negative {
        number.wrapping_neg()
    } else {
        number
    };
    number & 0x7fff_ffff
}

/// What of a token's own attributes would crash every program that uses SoftHSM: it copies them into fields of `CK_TOKEN_INFO`
/// without a look at how long they are (`Token::getTokenInfo`). A sentence each, without the value.
pub fn too_long(own: &Attributes) -> impl Iterator<Item = String> {
    let longest = [
        (pkcs11::CKA_OS_TOKENLABEL, "CKA_OS_TOKENLABEL", 32),
        (pkcs11::CKA_OS_TOKENSERIAL, "CKA_OS_TOKENSERIAL", SERIAL),
    ];
    longest
        .into_iter()
        .filter_map(|(attribute_type, name, most)| {
            let length = own.bytes(attribute_type)?.len();
            (length > most).then(|| {
                format!(
                    "{name} has {length} bytes, and SoftHSM copies it into a field of {most} without a look, which crashes every program that uses it"
                )
            })
        })
}

/// Checks what is about to become of a token's own attributes.
///
/// # Errors
/// [`ErrorKind::Invalid`] with a sentence of [`too_long`].
pub fn check_token(own: &Attributes) -> Result<()> {
    match too_long(own).next() {
        Some(sentence) => Err(Error::new(ErrorKind::Invalid, sentence)),
        None => Ok(()),
    }
}

/// What a token has to have, or other programs than those that use it are disturbed: SoftHSM aborts where two have no serial number
/// (`SlotManager::insertToken`), and `C_GetTokenInfo` fails without the flags (`Token::getTokenInfo`), which ends what looks for another
/// token.
#[must_use]
pub fn lacking(own: &Attributes) -> Option<&'static str> {
    if own.bytes(pkcs11::CKA_OS_TOKENSERIAL).is_none() {
        Some("CKA_OS_TOKENSERIAL")
    } else if own.ulong(pkcs11::CKA_OS_TOKENFLAGS).is_none() {
        Some("CKA_OS_TOKENFLAGS")
    } else {
        None
    }
}

/// Checks what is about to become of the own attributes of a token that is one, and had `old`.
///
/// # Errors
/// [`ErrorKind::Invalid`] if it would lack what it has to have, and does not now.
pub fn check_token_finished(old: &Attributes, new: &Attributes) -> Result<()> {
    match lacking(new).filter(|_| lacking(old).is_none()) {
        Some(name) => Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "a token without a {name} disturbs every program that uses SoftHSM: it goes with the whole token only; what was removed with it is back"
            ),
        )),
        None => Ok(()),
    }
}

/// Checks that SoftHSM's empty slot, whose number is that of the tokens, is none of the `slots` of these.
///
/// # Errors
/// As [`check_slot`].
pub fn check_slots(slots: &[u64]) -> Result<()> {
    let empty = slots.len() as u64;
    if !slots.contains(&empty) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Invalid,
        format!(
            "another token is in slot {empty} by its serial number, which is the number of SoftHSM's empty slot by now: every program that uses \
             SoftHSM aborts at its start until that has another CKA_OS_TOKENSERIAL"
        ),
    ))
}

/// Checks that a token with these attributes of its own can be in a store whose other tokens are in the slots `taken`. SoftHSM shows an empty
/// slot beside them, whose number is that of the tokens. `SlotManager::insertToken` asserts that no two are the same, and ends the
/// program otherwise.
///
/// # Errors
/// [`ErrorKind::Invalid`].
pub fn check_slot(own: &Attributes, taken: &[u64]) -> Result<()> {
    let Some(serial) = own.bytes(pkcs11::CKA_OS_TOKENSERIAL) else {
        return Ok(());
    };
    let (slot, empty) = (slot_id(serial), taken.len() as u64 + 1);
    let clash = if taken.contains(&slot) {
        "another token in this store has this serial number (its last eight digits count)"
            .to_owned()
    } else if slot == empty {
        format!(
            "the last eight digits of the serial number say slot {slot}, and SoftHSM's empty slot has the number of its tokens"
        )
    } else if taken.contains(&empty) {
        format!(
            "another token is in slot {empty} by its serial number, and with one more token that is the number of SoftHSM's empty slot"
        )
    } else {
        return Ok(());
    };
    Err(Error::new(
        ErrorKind::Invalid,
        format!(
            "{clash}, and every program that uses SoftHSM would abort at its start; a copy of a token belongs into another store, or needs a \
             serial number of its own"
        ),
    ))
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
    fn a_slot_is_what_strtoul_makes_of_the_last_eight_characters() {
        for (serial, slot) in [
            ("", 0),
            ("1f", 0x1f),
            ("0123456789abcdef", 0x09ab_cdef),
            ("ffffffff7FFFFFFF", 0x7fff_ffff),
            ("00000000ffffffff", 0x7fff_ffff),
            ("abcd0x1f", 0xa_bcd0),
            ("00000x1f", 0),
            ("  0x1f", 0x1f),
            ("-1", 0x7fff_ffff),
            ("--1", 0),
            ("no digits", 0),
        ] {
            assert_eq!(slot_id(serial.as_bytes()), slot, "{serial:?}");
        }
        assert_eq!(slot_id(b"1234\xff"), 0x1234);
    }

    #[test]
    fn a_token_is_refused_what_does_not_fit_into_its_fields() {
        for (label, serial, refused) in [(32, 16, 0), (33, 16, 1), (32, 17, 1), (33, 17, 2)] {
            let mut own = Attributes::new();
            own.insert(pkcs11::CKA_OS_TOKENLABEL, Value::Bytes(vec![b' '; label]));
            own.insert(pkcs11::CKA_OS_TOKENSERIAL, Value::Bytes(vec![b'0'; serial]));
            assert_eq!(too_long(&own).count(), refused);
            assert_eq!(check_token(&own).is_ok(), refused == 0);
        }
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
        let [private, silent] = [Some(true), None].map(|private| object(private, &[7; 32]));
        assert!(check_finished(Some(&private), &silent).is_err());
        assert!(check_finished(None, &silent).is_ok());
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
