//! Objects and tokens that SoftHSM is only making.
//!
//! It stores a new object many times before it is what its caller asked for: first the defaults, one by one, then the caller's
//! template in a transaction, then, of a key that it generates, derives or unwraps, the key itself in another one
//! (`P11Objects.cpp`, `SoftHSM.cpp`). Nothing says that it has finished, but these say that it has not:
//!
//! - `CKA_TOKEN` is missing or false. False is its default, and the template sets it;
//! - it is a key and holds neither `CKA_VALUE` nor `CKA_MODULUS` nor `CKA_EC_POINT`. The default of each is empty, every key
//!   has at least one of them, and those that a key has are set together;
//! - it is a token's own and has no `CKA_OS_SOPIN`, which `C_InitToken` sets last (`Token.cpp`).
//!
//! In the `file` backend it unlinks an object's file and then its lock file (`OSToken.cpp`), and makes an empty `generation` before it
//! writes a number into it (`Generation.cpp`): a lock file alone, and an empty generation, are what a call has come to that has not returned.

use std::time::Duration;

use super::token::Entry;
use crate::error::ErrorKind;
use crate::pkcs11::{
    CKA_CLASS, CKA_EC_POINT, CKA_MODULUS, CKA_OS_SOPIN, CKA_TOKEN, CKA_VALUE, CKO_PRIVATE_KEY,
    CKO_PUBLIC_KEY, CKO_SECRET_KEY,
};
use crate::store::attribute::{AttributeType, Attributes};
use crate::store::{Metadata, Object, ObjectId};

/// How long SoftHSM can be at it. A database on a hard disk takes some tens of milliseconds for each of the forty commits.
pub(super) const LONGEST: Duration = Duration::from_secs(2);

/// Whether somebody may be making this object, or the token whose own it is, now.
pub(super) fn is_being_made(id: &ObjectId, entry: &Entry) -> bool {
    match entry {
        Entry::Whole(object) => is_young(&object.metadata) && is_unfinished(id, object),
        // An empty file, or a database without tables yet.
        Entry::Broken(Ok(metadata), error) => {
            error.kind() == ErrorKind::Damaged && is_young(metadata)
        }
        Entry::Broken(Err(_), _) => false,
    }
}

pub(super) fn is_young(metadata: &Metadata) -> bool {
    let age = metadata.ctime.elapsed();
    // A time in the future says nothing.
    age.map_or(true, |age| age <= LONGEST)
}

fn holds(attributes: &Attributes, attribute_type: AttributeType) -> bool {
    let value = attributes.bytes(attribute_type);
    value.is_some_and(|value| !value.is_empty())
}

/// Whether SoftHSM makes something of it that it is not yet, if it was not left like this.
pub(in crate::store) fn is_unfinished(id: &ObjectId, object: &Object) -> bool {
    let attributes = &object.attributes;
    if *id == ObjectId::Token {
        return !holds(attributes, CKA_OS_SOPIN);
    }
    let keys = [CKO_PUBLIC_KEY, CKO_PRIVATE_KEY, CKO_SECRET_KEY];
    let is_key = attributes
        .ulong(CKA_CLASS)
        .is_some_and(|class| keys.contains(&class));
    let has_key = [CKA_VALUE, CKA_MODULUS, CKA_EC_POINT]
        .into_iter()
        .any(|attribute_type| holds(attributes, attribute_type));
    attributes.boolean(CKA_TOKEN) != Some(true) || (is_key && !has_key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::store::ObjectName;
    use crate::store::attribute::Value;
    use std::sync::Arc;
    use std::time::SystemTime;

    fn metadata(age: Duration) -> Metadata {
        let time = SystemTime::now() - age;
        Metadata {
            mode: 0o600,
            uid: 0,
            gid: 0,
            atime: time,
            mtime: time,
            ctime: time,
        }
    }

    fn object(attributes: &[(u64, Value)], age: Duration) -> Entry {
        let mut all = Attributes::new();
        for (attribute_type, value) in attributes {
            all.insert(*attribute_type, value.clone());
        }
        Entry::Whole(Arc::new(Object {
            metadata: metadata(age),
            generation: Some(1),
            canonical: true,
            attributes: all,
        }))
    }

    #[test]
    fn an_object_is_finished_when_it_says_where_it_is_and_a_key_when_it_has_one() {
        let now = Duration::ZERO;
        let id = ObjectId::Object(ObjectName::new("a".as_ref()).unwrap());
        let made = |object: &Entry| is_being_made(&id, object);
        let token = |value| (CKA_TOKEN, Value::Bool(value));
        let class = |value| (CKA_CLASS, Value::Ulong(value));
        let bytes = |attribute_type, value: &[u8]| (attribute_type, Value::Bytes(value.to_vec()));
        assert!(made(&object(&[], now)));
        assert!(made(&object(&[class(0)], now)));
        assert!(made(&object(&[class(0), token(false)], now)));
        assert!(!made(&object(&[class(0), token(true)], now)));
        for key in [CKO_PUBLIC_KEY, CKO_PRIVATE_KEY, CKO_SECRET_KEY] {
            let begun = [class(key), token(true), bytes(CKA_VALUE, b"")];
            assert!(made(&object(&begun, now)), "{key}");
            assert!(!made(&object(&begun, 2 * LONGEST)), "{key}");
            for holder in [CKA_VALUE, CKA_MODULUS, CKA_EC_POINT] {
                let whole = [class(key), token(true), bytes(holder, b"1")];
                assert!(!made(&object(&whole, now)), "{key} {holder:#x}");
            }
        }
    }

    #[test]
    fn damage_can_be_an_object_that_is_not_there_yet() {
        let broken = |age, error| Entry::Broken(Ok(metadata(age)), error);
        let empty = Error::damaged("the file is empty");
        let made = |entry: &Entry| is_being_made(&ObjectId::Token, entry);
        assert!(made(&broken(Duration::ZERO, empty.clone())));
        assert!(!made(&broken(2 * LONGEST, empty.clone())));
        let closed = Error::new(ErrorKind::PermissionDenied, "closed");
        assert!(!made(&broken(Duration::ZERO, closed.clone())));
        assert!(!made(&Entry::Broken(Err(closed), empty)));
    }

    #[test]
    fn a_token_is_finished_when_its_security_officer_has_a_pin() {
        let pin = |value: &[u8]| {
            object(
                &[(CKA_OS_SOPIN, Value::Bytes(value.to_vec()))],
                Duration::ZERO,
            )
        };
        assert!(is_being_made(
            &ObjectId::Token,
            &object(&[], Duration::ZERO)
        ));
        assert!(!is_being_made(&ObjectId::Token, &object(&[], 2 * LONGEST)));
        assert!(is_being_made(&ObjectId::Token, &pin(b"")));
        assert!(!is_being_made(&ObjectId::Token, &pin(b"1")));
    }
}
