//! What an object holds: whether it is the beginning of a longer one, and whether SoftHSM can live with it.
//!
//! A file that was cut off between two attributes is a valid object, for SoftHSM too. What gives it away is what it lacks:
//! SoftHSM stores all attributes of a class, with default values where nobody gave one (`P11Objects.cpp`, `P11Attribute::init`),
//! in ascending order of type. So a cut loses the highest types and nothing else, and an object of which only some lower one is
//! missing was made that way by somebody. When SoftHSM lists a token it fills up what is missing with defaults, in cut objects
//! as well; then only a key without its material is left to be noticed.

use super::finding::{COMPARE, RESTORE};
use super::{Category, Finding};
use crate::pkcs11::{
    self, CKA_CERTIFICATE_TYPE, CKA_CLASS, CKA_EC_POINT, CKA_KEY_TYPE, CKA_MODULUS, CKA_PRIVATE,
    CKA_PRIVATE_EXPONENT, CKA_URL, CKA_VALUE, CKC_X_509, CKK_DSA, CKK_EC, CKK_EC_EDWARDS, CKK_RSA,
    CKO_CERTIFICATE, CKO_PRIVATE_KEY, CKO_PUBLIC_KEY, CKO_SECRET_KEY,
};
use crate::store::attribute::{AttributeType, Attributes, Value};
use crate::store::classes::{OF_ALL, of_class};
use crate::store::validate::{is_possible_ciphertext, too_long};

/// Of a token's flags: the user has a PIN (PKCS #11 2.40, `CK_TOKEN_INFO`).
const CKF_USER_PIN_INITIALIZED: u64 = 0x8;

/// How many values of one object that are no ciphertext are told.
const MOST: usize = 20;

/// What to do about an object that keeps SoftHSM from all others.
const RESTORE_OR_REMOVE: &str = "bring the object back from a backup, or remove it";

/// What SoftHSM never encrypts.
const DATES: [AttributeType; 2] = [pkcs11::CKA_START_DATE, pkcs11::CKA_END_DATE];

/// Where each attribute of a file begins, in the order of the file.
pub(super) type Places = Vec<(AttributeType, u64)>;

/// Where the attributes of a file that decodes begin. It goes by what [`crate::store::file::decode()`] accepts, and stops at what
/// that would not.
pub(super) fn places(bytes: &[u8]) -> Places {
    let mut places = Vec::new();
    let mut at = 8;
    while bytes.len().saturating_sub(at) >= 8 {
        let Some((attribute_type, end)) = attribute(bytes, at, true) else {
            break;
        };
        places.push((attribute_type, at as u64));
        at = end;
    }
    places
}

/// The type of the attribute, or of the entry of a map, at an offset; and the offset behind it.
fn attribute(bytes: &[u8], at: usize, map_allowed: bool) -> Option<(AttributeType, usize)> {
    let ulong = |at: usize| -> Option<u64> {
        let field = bytes.get(at..at.checked_add(8)?)?;
        Some(u64::from_be_bytes(field.try_into().ok()?))
    };
    let attribute_type = ulong(at)?;
    let value = at.checked_add(16)?;
    let length = |what: u64| usize::try_from(what).ok();
    let end = match ulong(at.checked_add(8)?)? {
        1 => value.checked_add(1)?,
        2 => value.checked_add(8)?,
        3 => value.checked_add(8)?.checked_add(length(ulong(value)?)?)?,
        4 if map_allowed => {
            let mut left = length(ulong(value)?)?;
            let mut entry = value.checked_add(8)?;
            while left > 0 {
                let (_, behind) = attribute(bytes, entry, false)?;
                left = left.checked_sub(counted(bytes, entry, behind)?)?;
                entry = behind;
            }
            entry
        }
        5 => value
            .checked_add(8)?
            .checked_add(length(ulong(value)?)?.checked_mul(8)?)?,
        _ => return None,
    };
    (end <= bytes.len()).then_some((attribute_type, end))
}

/// What an entry counts towards the length of its map: of a mechanism set, only the members that differ.
fn counted(bytes: &[u8], at: usize, behind: usize) -> Option<usize> {
    let kind = bytes.get(at.checked_add(8)?..at.checked_add(16)?)?;
    if kind != 5u64.to_be_bytes() {
        return behind.checked_sub(at);
    }
    let members = bytes.get(at.checked_add(24)?..behind)?;
    let distinct: std::collections::BTreeSet<&[u8]> = members.chunks(8).collect();
    Some(24 + 8 * distinct.len())
}

/// What is said of the order of the attributes: at most one finding of each sort.
pub(super) fn judge_order(places: &[(AttributeType, u64)]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut seen = std::collections::HashSet::new();
    let repeated = places
        .iter()
        .find(|(attribute_type, _)| !seen.insert(*attribute_type));
    if let Some((attribute_type, at)) = repeated {
        let detail = format!(
            "{} is stored more than once, as SoftHSM never does; the last one counts; the next",
            name(*attribute_type)
        );
        findings.push(Finding::suspicious(detail).advising(COMPARE).at_offset(*at));
    }
    let descent = places
        .iter()
        .zip(places.iter().skip(1))
        .find(|((before, _), (after, _))| after < before);
    if let Some(((before, _), (after, at))) = descent {
        let detail = format!(
            "{} follows {}, and SoftHSM never writes them in that order; the file is damaged, or another program wrote it; the first one out of order begins",
            name(*after),
            name(*before)
        );
        findings.push(Finding::suspicious(detail).advising(COMPARE).at_offset(*at));
    }
    findings
}

/// What is said of the attributes of an object. `whole` is the size of the file, which ends where the attributes do; `None` in a
/// database, where nothing is cut off.
pub(super) fn judge(
    attributes: &Attributes,
    places: &[(AttributeType, u64)],
    whole: Option<u64>,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    if attributes.is_empty() {
        let detail = "the object has no attributes at all; it was never finished, or was cut off";
        let finding = match whole {
            Some(size) => Finding::suspicious(format!("{detail}; the file ends")).at_offset(size),
            None => Finding::suspicious(detail),
        };
        return vec![finding.advising(COMPARE)];
    }
    let cut = whole.and_then(|size| Some((size, cut(attributes)?)));
    if let Some((size, (last, missing))) = cut {
        findings.push(cut_off(size, last, &missing));
    } else if attributes.ulong(CKA_CLASS).is_none() {
        findings.push(
            Finding::suspicious(
                "the object has no CKA_CLASS, and SoftHSM refuses to use one without",
            )
            .advising(COMPARE),
        );
    } else if let Some(material) = lost_material(attributes) {
        findings.push(Finding::suspicious(format!(
            "{material} is empty, so the key or certificate is of no use; SoftHSM fills up an object that was cut off with such values"
        ))
        .advising(RESTORE));
    }
    findings.extend(no_ciphertext(attributes, places));
    findings
}

/// What is said of a key that does not say whether it is private, if there is nothing else to say of it.
pub(super) fn undecided_key(attributes: &Attributes) -> Option<Finding> {
    let is_key = matches!(
        attributes.ulong(CKA_CLASS),
        Some(CKO_PRIVATE_KEY | CKO_SECRET_KEY)
    );
    if !is_key || attributes.boolean(CKA_PRIVATE).is_some() {
        return None;
    }
    let detail = "a key without CKA_PRIVATE, which SoftHSM takes for private when it looks for it, and not when it uses it, so that it cannot \
                  use it";
    let advice =
        "write true into its CKA_PRIVATE if it was private, or bring it back from a backup";
    Some(Finding::suspicious(detail).advising(advice))
}

/// The last attribute that is there, and what follows it in a whole object, if the object is the beginning of a longer one.
fn cut(attributes: &Attributes) -> Option<(AttributeType, Vec<AttributeType>)> {
    let (last, _) = attributes.iter().last()?;
    let last = last.attribute_type;
    let class = attributes.ulong(CKA_CLASS);
    let mut missing: Vec<AttributeType> = OF_ALL
        .iter()
        .chain(class.map_or(&[][..], of_class))
        .copied()
        .filter(|wanted| attributes.of_type(*wanted).is_none())
        .collect();
    missing.sort_unstable();
    let first = missing.first()?;
    (last < *first).then_some((last, missing))
}

fn cut_off(size: u64, last: AttributeType, missing: &[AttributeType]) -> Finding {
    let first = missing
        .first()
        .map_or_else(String::new, |first| name(*first));
    let more = match missing.len() {
        0 | 1 => String::new(),
        count => format!(" and {} more", count - 1),
    };
    let buffer = if size > 0 && size.is_multiple_of(4096) {
        ", and the size is a multiple of 4096, as when a writer is stopped between two buffers"
    } else {
        ""
    };
    Finding::suspicious(format!(
        "it loads, and looks cut off behind {}: {first}{more}, which SoftHSM stores in every such object, \
         would follow{buffer}; the file ends",
        name(last)
    ))
    .at_offset(size)
    .advising(COMPARE)
}

/// What a key or a certificate cannot be without, if it is stored and empty.
fn lost_material(attributes: &Attributes) -> Option<&'static str> {
    let empty = |wanted| attributes.bytes(wanted).is_some_and(<[u8]>::is_empty);
    let private = attributes.boolean(CKA_PRIVATE) == Some(true);
    let key_type = attributes.ulong(CKA_KEY_TYPE);
    let (material, name) = match (attributes.ulong(CKA_CLASS)?, key_type) {
        // An empty value that a caller gave to a private object is not empty: it is encrypted.
        (CKO_SECRET_KEY, _) if private => (CKA_VALUE, "CKA_VALUE"),
        (CKO_PRIVATE_KEY, Some(CKK_RSA)) => (CKA_PRIVATE_EXPONENT, "CKA_PRIVATE_EXPONENT"),
        (CKO_PRIVATE_KEY, Some(_)) => (CKA_VALUE, "CKA_VALUE"),
        (CKO_PUBLIC_KEY, Some(CKK_RSA)) => (CKA_MODULUS, "CKA_MODULUS"),
        (CKO_PUBLIC_KEY, Some(CKK_EC | CKK_EC_EDWARDS)) => (CKA_EC_POINT, "CKA_EC_POINT"),
        (CKO_PUBLIC_KEY, Some(CKK_DSA)) => (CKA_VALUE, "CKA_VALUE"),
        (CKO_CERTIFICATE, _)
            if attributes.ulong(CKA_CERTIFICATE_TYPE) == Some(CKC_X_509)
                && attributes.bytes(CKA_URL).is_none_or(<[u8]>::is_empty) =>
        {
            (CKA_VALUE, "CKA_VALUE")
        }
        _ => return None,
    };
    empty(material).then_some(name)
}

/// The byte strings of a private object that SoftHSM cannot decrypt. One that does not say whether it is private is, to SoftHSM
/// (`getBooleanValue(CKA_PRIVATE, true)`).
fn no_ciphertext(attributes: &Attributes, places: &[(AttributeType, u64)]) -> Vec<Finding> {
    let whose = match attributes.boolean(CKA_PRIVATE) {
        Some(false) => return Vec::new(),
        Some(true) => "of a private object",
        None => "of an object without CKA_PRIVATE, which SoftHSM takes for private,",
    };
    let mut findings = Vec::new();
    for (key, value) in attributes.iter() {
        if findings.len() == MOST {
            break;
        }
        let attribute_type = key.attribute_type;
        let Value::Bytes(bytes) = value else { continue };
        if DATES.contains(&attribute_type) || is_possible_ciphertext(bytes) {
            continue;
        }
        let detail = format!(
            "{} {whose} is no ciphertext ({} bytes), which makes SoftHSM's C_FindObjects fail for the whole token",
            name(attribute_type),
            bytes.len()
        );
        let finding = Finding::suspicious(detail).advising(RESTORE_OR_REMOVE);
        // Of a type that is repeated the last one counts.
        let place = places.iter().rfind(|(stored, _)| *stored == attribute_type);
        findings.push(match place {
            Some((_, at)) => finding.at_offset(*at),
            None => finding,
        });
    }
    findings
}

/// What is said of the attributes of a token.
pub(super) fn judge_token(attributes: &Attributes) -> Vec<Finding> {
    let has = |(wanted, stored): &(AttributeType, bool)| (!stored).then(|| name(*wanted));
    let flags = attributes.ulong(pkcs11::CKA_OS_TOKENFLAGS);
    let has_user_pin = flags.is_some_and(|flags| flags & CKF_USER_PIN_INITIALIZED != 0);
    let of_bytes = |wanted| (wanted, attributes.bytes(wanted).is_some());
    let missing: Vec<String> = [
        of_bytes(pkcs11::CKA_OS_TOKENLABEL),
        of_bytes(pkcs11::CKA_OS_TOKENSERIAL),
        (pkcs11::CKA_OS_TOKENFLAGS, flags.is_some()),
        of_bytes(pkcs11::CKA_OS_SOPIN),
        // What nobody has set is not there, and the flags say so (OSToken::setUserPIN).
        (
            pkcs11::CKA_OS_USERPIN,
            attributes.bytes(pkcs11::CKA_OS_USERPIN).is_some() || !has_user_pin,
        ),
    ]
    .iter()
    .filter_map(has)
    .collect();
    let mut findings: Vec<Finding> = too_long(attributes)
        .map(|sentence| Finding::suspicious(sentence + "; write a shorter one through a mount"))
        .collect();
    if !missing.is_empty() {
        let detail = format!("the token lacks {}", missing.join(", "));
        findings.push(Finding::suspicious(detail).advising(RESTORE));
    }
    findings
}

/// How a sentence calls an attribute.
fn name(attribute_type: AttributeType) -> String {
    pkcs11::attribute_name(attribute_type)
        .map_or_else(|| format!("{attribute_type:#010x}"), str::to_owned)
}

impl Finding {
    fn suspicious(detail: impl Into<String>) -> Self {
        Self::new(Category::Suspicious, detail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pkcs11::CKO_DATA;
    use crate::store::file::{Decoded, decode, encode};
    use std::collections::BTreeSet;

    fn encoded(attributes: &Attributes) -> Vec<u8> {
        encode(7, attributes)
    }

    /// One attribute of each kind, with a map of one of each kind.
    fn each_kind() -> Attributes {
        let mut map = Attributes::new();
        map.insert(1, Value::Bool(true));
        map.insert(2, Value::Ulong(2));
        map.insert(3, Value::Bytes(b"three".to_vec()));
        map.insert(4, Value::Mechs(BTreeSet::from([1, 2, 3])));
        let mut all = map.clone();
        all.insert(5, Value::Map(map));
        all.insert(6, Value::Bool(false));
        all
    }

    #[test]
    fn places_are_where_the_decoder_sees_attributes() {
        let attributes = each_kind();
        let bytes = encoded(&attributes);
        let places = places(&bytes);
        assert_eq!(places.len(), attributes.len());
        for (count, (attribute_type, at)) in places.iter().enumerate() {
            let Decoded { attributes, .. } = decode(&bytes[..*at as usize]).unwrap();
            assert_eq!(attributes.len(), count);
            assert!(attributes.of_type(*attribute_type).is_none());
        }
        assert!(judge_order(&places).is_empty());
        // Whatever is cut off, there is no panic, and no place that is not there.
        for end in 0..bytes.len() {
            let cut = super::places(&bytes[..end]);
            assert_eq!(cut, places[..cut.len()]);
        }
    }

    #[test]
    fn a_mechanism_set_that_repeats_itself_counts_its_members_once_in_a_map() {
        let mut map = Attributes::new();
        map.insert(4, Value::Mechs(BTreeSet::from([1, 2])));
        let mut attributes = Attributes::new();
        attributes.insert(5, Value::Map(map));
        attributes.insert(6, Value::Bool(false));
        let mut bytes = encoded(&attributes);
        let whole = places(&bytes);
        // generation, type, kind, length; type, kind, count, 1, 2
        let count = 8 + 24 + 16;
        bytes[count + 7] = 3;
        bytes.splice(count + 24..count + 24, 2u64.to_be_bytes());
        assert!(decode(&bytes).is_ok());
        assert_eq!(places(&bytes), [(5, 8), (6, whole[1].1 + 8)]);
    }

    #[test]
    fn lengths_beyond_all_bounds_are_no_panic() {
        for kind in 0..7u64 {
            for length in [1, 8, 1 << 40, u64::MAX / 8, u64::MAX - 7, u64::MAX] {
                let mut bytes = vec![0; 16];
                bytes.extend(kind.to_be_bytes());
                bytes.extend(u64::to_be_bytes(length));
                bytes.extend([0; 40]);
                let _ = places(&bytes);
            }
        }
    }

    #[test]
    fn only_the_beginning_of_an_object_is_called_cut_off() {
        let mut object = Attributes::new();
        object.insert(CKA_CLASS, Value::Ulong(CKO_DATA));
        assert!(cut(&object).is_some());
        // Of what SoftHSM stores, a lower type is missing as well.
        object.insert(pkcs11::CKA_LABEL, Value::Bytes(Vec::new()));
        assert!(cut(&object).is_none());
        object.insert(pkcs11::CKA_TOKEN, Value::Bool(true));
        object.insert(CKA_PRIVATE, Value::Bool(false));
        assert_eq!(cut(&object).unwrap().0, pkcs11::CKA_LABEL);
        // An attribute of a vendor's comes last, and would be lost too.
        object.insert(0x8000_0001, Value::Bool(true));
        assert!(cut(&object).is_none());
    }

    #[test]
    fn findings_hold_no_value() {
        let mut object = Attributes::new();
        object.insert(CKA_CLASS, Value::Ulong(CKO_DATA));
        object.insert(CKA_PRIVATE, Value::Bool(true));
        object.insert(pkcs11::CKA_LABEL, Value::Bytes(b"s3cr3t".to_vec()));
        let findings = judge(&object, &[], None);
        assert_eq!(findings.len(), 1);
        assert!(!findings[0].detail.contains("s3cr3t"));
    }
}
