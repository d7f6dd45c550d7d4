//! The time of last modification of one object, which a database does not have: all its objects share one file.
//!
//! It is remembered in a row of `attribute_text`, as the names are ([`super::uuid`]), together with a hash of what the object
//! held then. SoftHSM changes an object and knows nothing of this: a time whose hash does not fit is of no use any more.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use siphasher::sip::SipHasher24;

use crate::store::attribute::{AttributeType, Attributes};
use crate::store::file;

/// The type of the row: `CKA_VENDOR_DEFINED` (PKCS #11, section 4.2) with "TKF" and a 2.
pub const CKA_TOKENFS_TIMES: AttributeType = 0x8000_0000 | 0x544b_4602;

/// Keys of the hash, which keeps nothing secret: it only tells versions of an object apart.
const KEYS: (u64, u64) = (0x746f_6b65_6e66_7320, 0x7469_6d65_7320_2031);

/// The row's value: the format's number, the time in seconds since the epoch, and the hash.
pub(super) fn text(modified: SystemTime, attributes: &Attributes) -> String {
    let (seconds, nanoseconds) = match modified.duration_since(UNIX_EPOCH) {
        Ok(after) => (i128::from(after.as_secs()), after.subsec_nanos()),
        Err(error) => {
            let before = error.duration();
            match before.subsec_nanos() {
                0 => (-i128::from(before.as_secs()), 0),
                part => (-i128::from(before.as_secs()) - 1, 1_000_000_000 - part),
            }
        }
    };
    format!("1 {seconds}.{nanoseconds:09} {:016x}", hash(attributes))
}

/// The time in a row, if it is that of an object which holds `attributes`.
pub(super) fn modified(text: &str, attributes: &Attributes) -> Option<SystemTime> {
    let (time, hashed) = text.strip_prefix("1 ")?.split_once(' ')?;
    let (seconds, nanoseconds) = time.split_once('.')?;
    if nanoseconds.len() != 9 || hashed.len() != 16 {
        return None;
    }
    let seconds: i64 = seconds.parse().ok()?;
    let nanoseconds: u32 = nanoseconds.parse().ok()?;
    if u64::from_str_radix(hashed, 16).ok()? != hash(attributes) {
        return None;
    }
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let base = if seconds < 0 {
        UNIX_EPOCH.checked_sub(whole)
    } else {
        UNIX_EPOCH.checked_add(whole)
    };
    base?.checked_add(Duration::from_nanos(nanoseconds.into()))
}

/// Of everything in an object: types, kinds and values.
fn hash(attributes: &Attributes) -> u64 {
    SipHasher24::new_with_keys(KEYS.0, KEYS.1).hash(&file::encode(0, attributes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::attribute::Value;

    fn labelled(label: &str) -> Attributes {
        let mut attributes = Attributes::new();
        attributes.insert(3, Value::Bytes(label.into()));
        attributes
    }

    #[test]
    fn a_time_comes_back_to_the_nanosecond() {
        let attributes = labelled("key");
        for time in [
            UNIX_EPOCH,
            UNIX_EPOCH + Duration::new(1_795_000_000, 123_456_789),
            UNIX_EPOCH - Duration::new(1, 1),
            UNIX_EPOCH - Duration::new(1, 0),
            UNIX_EPOCH + Duration::new(1 << 40, 999_999_999),
        ] {
            let text = text(time, &attributes);
            assert_eq!(modified(&text, &attributes), Some(time), "{text}");
            assert_eq!(modified(&text, &labelled("other")), None);
        }
    }

    #[test]
    fn the_text_never_changes() {
        let time = UNIX_EPOCH - Duration::new(1, 1);
        // It is in people's databases.
        assert_eq!(
            text(time, &labelled("key")),
            "1 -2.999999999 a7dc1dc05b48cc21"
        );
    }

    #[test]
    fn what_is_no_time_is_none() {
        let attributes = labelled("key");
        let good = text(UNIX_EPOCH, &attributes);
        let hash = good.rsplit_once(' ').unwrap().1;
        for text in [
            "".to_owned(),
            "1".to_owned(),
            format!("2 0.000000000 {hash}"),
            format!("1 0.00000000 {hash}"),
            format!("1 0.-00000001 {hash}"),
            format!("1 0 {hash}"),
            format!("1 .000000000 {hash}"),
            format!("1 9223372036854775807.999999999 {hash}"),
            format!("1 -9223372036854775808.999999999 {hash}"),
            format!("1 0.000000000 {hash}0"),
            format!("1 0.000000000 +{}", &hash[1..]),
        ] {
            // Some of these could be times, on another system; what counts is that none is a panic.
            let _ = modified(&text, &attributes);
        }
        assert_eq!(
            modified(&format!("2 0.000000000 {hash}"), &attributes),
            None
        );
        assert_eq!(modified(&format!("1 0 {hash}"), &attributes), None);
    }
}
