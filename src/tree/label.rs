//! Names from labels, for `.tokenfs/by-label`.
//!
//! A label is any bytes. What a file name cannot hold, or a line of a terminal should not, is percent-encoded: `/`, NUL and other
//! control characters, bytes that are no UTF-8, and `%` itself, so that a name can be taken back. Names that would be equal, and
//! labels that are too long for a name, get a suffix from the identity of what they name.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::hash::Hasher;
use std::os::unix::ffi::OsStrExt;

use siphasher::sip::SipHasher13;

/// The most bytes of an encoded label in a name: leaves room in the 255 of a directory entry for class and suffix.
const LONGEST: usize = 160;

/// Something to be named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labelled<T> {
    /// The label, any bytes.
    pub label: Vec<u8>,
    /// What follows the label in the name, such as `.private_key`.
    pub extension: String,
    /// The identity, a UUID as a rule, from which a suffix is taken.
    pub identity: Vec<u8>,
    /// What it stands for.
    pub target: T,
}

/// Gives each a name of its own. The outcome depends on what is named, and not on its order.
#[must_use]
pub fn names<T>(mut all: Vec<Labelled<T>>) -> BTreeMap<OsString, T> {
    all.sort_by(|a, b| a.identity.cmp(&b.identity));
    let plain: Vec<(String, bool)> = all.iter().map(plain_name).collect();
    let mut times: BTreeMap<String, usize> = BTreeMap::new();
    for (name, _) in &plain {
        *times.entry(name.clone()).or_default() += 1;
    }
    let short: Vec<String> = all
        .iter()
        .zip(&plain)
        .map(|(item, (name, cut))| {
            if *cut || times.get(name).is_some_and(|times| *times > 1) {
                format!("{name}~{}", encode(&item.identity, 8).0)
            } else {
                name.clone()
            }
        })
        .collect();
    let mut found = BTreeMap::new();
    for (item, name) in all.into_iter().zip(short) {
        let mut name = name;
        if found.contains_key(OsStr::new(&name)) {
            let mut hasher = SipHasher13::new();
            hasher.write(&item.identity);
            let _ = write!(name, "~{:016x}", hasher.finish());
        }
        while found.contains_key(OsStr::new(&name)) {
            name.push('~');
        }
        found.insert(OsString::from(name), item.target);
    }
    found
}

/// Label and extension, and whether the label had to be cut.
fn plain_name<T>(item: &Labelled<T>) -> (String, bool) {
    let (mut name, cut) = encode(&item.label, LONGEST);
    name.push_str(&item.extension);
    if name == "." || name == ".." {
        name = name.replace('.', "%2E");
    }
    (name, cut)
}

/// The encoded bytes, at most `longest` of them, and whether that cut something off. No character and no escape is cut in two.
#[must_use]
pub fn encode(bytes: &[u8], longest: usize) -> (String, bool) {
    let mut out = String::new();
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            let mut piece = String::new();
            if character == '/' || character == '%' || character.is_control() {
                let mut buffer = [0; 4];
                for byte in character.encode_utf8(&mut buffer).bytes() {
                    let _ = write!(piece, "%{byte:02X}");
                }
            } else {
                piece.push(character);
            }
            if out.len() + piece.len() > longest {
                return (out, true);
            }
            out.push_str(&piece);
        }
        for byte in chunk.invalid() {
            if out.len() + 3 > longest {
                return (out, true);
            }
            let _ = write!(out, "%{byte:02X}");
        }
    }
    (out, false)
}

/// The label of a token without the blanks that pad it to 32 bytes.
#[must_use]
pub fn unpadded(label: &[u8]) -> &[u8] {
    let end = label
        .iter()
        .rposition(|byte| *byte != b' ')
        .map_or(0, |last| last + 1);
    label.get(..end).unwrap_or(label)
}

/// How a label looks in a line of text.
#[must_use]
pub fn shown(label: &[u8]) -> String {
    encode(label, usize::MAX).0
}

/// The bytes of an identity.
#[must_use]
pub fn identity(name: &OsStr) -> Vec<u8> {
    name.as_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(label: &[u8], identity: &str) -> Labelled<String> {
        Labelled {
            label: label.to_vec(),
            extension: ".data".to_owned(),
            identity: identity.as_bytes().to_vec(),
            target: identity.to_owned(),
        }
    }

    fn named(items: Vec<Labelled<String>>) -> Vec<(String, String)> {
        names(items)
            .into_iter()
            .map(|(name, target)| (name.into_string().unwrap(), target))
            .collect()
    }

    #[test]
    fn what_a_name_cannot_hold_is_encoded() {
        let table: &[(&[u8], &str)] = &[
            (b"plain label", "plain label"),
            (b"a/b", "a%2Fb"),
            (b"a\0b\nc\x7f", "a%00b%0Ac%7F"),
            (b"100%", "100%25"),
            ("Schlüssel".as_bytes(), "Schlüssel"),
            (b"\xff\xfe", "%FF%FE"),
            (b"\xc3", "%C3"),
            ("\u{85}".as_bytes(), "%C2%85"),
            (b"..", ".."),
            (b"", ""),
        ];
        for (label, name) in table {
            assert_eq!(encode(label, LONGEST), ((*name).to_owned(), false));
        }
    }

    #[test]
    fn a_dot_or_two_are_no_name_by_themselves() {
        let token = |label: &[u8]| Labelled {
            extension: String::new(),
            ..item(label, "id")
        };
        assert_eq!(named(vec![token(b"..")])[0].0, "%2E%2E");
        assert_eq!(named(vec![token(b".")])[0].0, "%2E");
        assert_eq!(named(vec![item(b"..", "id")])[0].0, "...data");
    }

    #[test]
    fn twins_and_long_labels_get_a_suffix_and_their_order_does_not_matter() {
        let twins = vec![
            item(b"twin", "aaaaaaaa-1"),
            item(b"twin", "bbbbbbbb-1"),
            item(b"one", "cccccccc-1"),
        ];
        let expected = [
            ("one.data".to_owned(), "cccccccc-1".to_owned()),
            ("twin.data~aaaaaaaa".to_owned(), "aaaaaaaa-1".to_owned()),
            ("twin.data~bbbbbbbb".to_owned(), "bbbbbbbb-1".to_owned()),
        ];
        assert_eq!(named(twins.clone()), expected);
        assert_eq!(named(twins.into_iter().rev().collect()), expected);
        let long = named(vec![item(&[b'x'; 300], "aaaaaaaa-1")]);
        assert_eq!(long[0].0, format!("{}.data~aaaaaaaa", "x".repeat(LONGEST)));
    }

    #[test]
    fn identities_that_begin_alike_and_labels_that_look_like_suffixes_stay_apart() {
        let names = named(vec![
            item(b"t", "aaaaaaaa-1"),
            item(b"t", "aaaaaaaa-2"),
            Labelled {
                extension: ".data~aaaaaaaa".to_owned(),
                ..item(b"t", "c")
            },
        ]);
        assert_eq!(names.len(), 3);
    }

    #[test]
    fn every_name_fits_a_directory_entry() {
        let names = named(vec![
            item(&[0xff; 300], &"i".repeat(248)),
            item(&[0xff; 300], &"i".repeat(247)),
        ]);
        assert!(names.iter().all(|(name, _)| name.len() <= 255), "{names:?}");
    }

    #[test]
    fn padding_goes_and_nothing_else() {
        assert_eq!(unpadded(b"a b   "), b"a b");
        assert_eq!(unpadded(b"   "), b"");
        assert_eq!(unpadded(b""), b"");
    }
}
