//! Objects that SoftHSM is only making.
//!
//! It stores a new object many times before it is what its caller asked for: first the defaults, one by one, then the caller's
//! template in a transaction, then, of a key that it generates, derives or unwraps, the key itself in another one
//! (`P11Objects.cpp`, `SoftHSM.cpp`). Nothing says that it has finished, but these say that it has not:
//!
//! - `CKA_TOKEN` is missing or false. False is its default, and the template sets it;
//! - it is a key and holds neither `CKA_VALUE` nor `CKA_MODULUS` nor `CKA_EC_POINT`. The default of each is empty, every key
//!   has at least one of them, and those that a key has are set together.

use std::time::Duration;

use crate::pkcs11::{
    CKA_CLASS, CKA_EC_POINT, CKA_MODULUS, CKA_TOKEN, CKA_VALUE, CKO_PRIVATE_KEY, CKO_PUBLIC_KEY,
    CKO_SECRET_KEY,
};
use crate::store::Object;
use crate::store::attribute::Attributes;

/// How long SoftHSM can be at it. A database on a hard disk takes some tens of milliseconds for each of the forty commits.
pub(super) const LONGEST: Duration = Duration::from_secs(2);

/// Whether SoftHSM may be making this object now.
pub(super) fn is_being_made(object: &Object) -> bool {
    let age = object.metadata.ctime.elapsed();
    // A time in the future says nothing.
    let old = age.is_ok_and(|age| age > LONGEST);
    !old && is_unfinished(&object.attributes)
}

fn is_unfinished(attributes: &Attributes) -> bool {
    let keys = [CKO_PUBLIC_KEY, CKO_PRIVATE_KEY, CKO_SECRET_KEY];
    let is_key = attributes
        .ulong(CKA_CLASS)
        .is_some_and(|class| keys.contains(&class));
    let holds = |attribute_type| {
        let value = attributes.bytes(attribute_type);
        value.is_some_and(|value| !value.is_empty())
    };
    let has_key = [CKA_VALUE, CKA_MODULUS, CKA_EC_POINT]
        .into_iter()
        .any(holds);
    attributes.boolean(CKA_TOKEN) != Some(true) || (is_key && !has_key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Metadata;
    use crate::store::attribute::Value;
    use std::time::SystemTime;

    fn object(attributes: &[(u64, Value)], age: Duration) -> Object {
        let mut all = Attributes::new();
        for (attribute_type, value) in attributes {
            all.insert(*attribute_type, value.clone());
        }
        let time = SystemTime::now() - age;
        Object {
            metadata: Metadata {
                mode: 0o600,
                uid: 0,
                gid: 0,
                atime: time,
                mtime: time,
                ctime: time,
            },
            generation: Some(1),
            attributes: all,
        }
    }

    #[test]
    fn an_object_is_finished_when_it_says_where_it_is_and_a_key_when_it_has_one() {
        let now = Duration::ZERO;
        let token = |value| (CKA_TOKEN, Value::Bool(value));
        let class = |value| (CKA_CLASS, Value::Ulong(value));
        let bytes = |attribute_type, value: &[u8]| (attribute_type, Value::Bytes(value.to_vec()));
        assert!(is_being_made(&object(&[], now)));
        assert!(is_being_made(&object(&[class(0)], now)));
        assert!(is_being_made(&object(&[class(0), token(false)], now)));
        assert!(!is_being_made(&object(&[class(0), token(true)], now)));
        for key in [CKO_PUBLIC_KEY, CKO_PRIVATE_KEY, CKO_SECRET_KEY] {
            let begun = [class(key), token(true), bytes(CKA_VALUE, b"")];
            assert!(is_being_made(&object(&begun, now)), "{key}");
            assert!(!is_being_made(&object(&begun, 2 * LONGEST)), "{key}");
            for holder in [CKA_VALUE, CKA_MODULUS, CKA_EC_POINT] {
                let made = [class(key), token(true), bytes(holder, b"1")];
                assert!(!is_being_made(&object(&made, now)), "{key} {holder:#x}");
            }
        }
    }
}
