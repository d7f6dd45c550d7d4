//! The names of objects in the `db` backend, which has none of its own.
//!
//! An object is called by the UUID, version 5, of `<token's name>/<row id>`: row ids are never reused, so it never
//! changes. An object that came with another UUID keeps that one: it is remembered in a row of `attribute_text`, a table
//! that SoftHSM creates and never uses, and whose rows go with their object. Contract: `docs/tree.md`, "The tree".

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;

use uuid::Uuid;

use crate::store::attribute::AttributeType;
use crate::store::{ObjectName, TokenName};

/// The namespace of derived UUIDs. Random (version 4), drawn once for tokenfs; changing it would rename every object of
/// every `db` token.
pub const NAMESPACE: Uuid = Uuid::from_u128(0xfcbf_94c2_e10e_458a_b5f2_13a8_cb3a_7d13);

/// The type under which a foreign UUID is remembered in `attribute_text`: `CKA_VENDOR_DEFINED` (PKCS #11, section 4.2)
/// with "TKF" and a 1. It is on no list of SoftHSM's, so SoftHSM neither looks for it nor shows it.
pub const CKA_TOKENFS_UUID: AttributeType = 0x8000_0000 | 0x544b_4601;

/// The UUID of a row of a token, as text.
#[must_use]
pub fn derived(token: &TokenName, row: i64) -> String {
    let name = [token.as_bytes(), b"/", row.to_string().as_bytes()].concat();
    Uuid::new_v5(&NAMESPACE, &name).hyphenated().to_string()
}

/// Whether `text` is a UUID as a directory is named with it: 36 characters, in either case.
#[must_use]
pub fn is_uuid(text: &str) -> bool {
    text.len() == 36 && Uuid::try_parse(text).is_ok()
}

/// Which row a derived UUID is of: a table, since that cannot be computed.
#[derive(Debug)]
pub(super) struct Derived {
    rows: HashMap<Uuid, i64>,
    /// The last row in it.
    last: i64,
}

impl Derived {
    /// More rows than any token has ever had; it bounds the table's size to some 50 MB.
    const LAST: i64 = 1 << 20;

    /// How far a name may be ahead of the rows that there have been: a backup can be of more objects than there are now.
    pub const AHEAD: i64 = 16_384;

    /// The same while a token is made from another one, in which the rows begin that much farther on with each copy that it is of
    /// ([`super::build`]).
    pub const AHEAD_OF_COPY: i64 = 16 * Self::AHEAD;

    /// The row whose UUID `name` is, if it is one of the rows up to a good many above `highest`. Row 1 is the token.
    pub fn row(
        &mut self,
        token: &TokenName,
        name: &str,
        (highest, is_copy): (i64, bool),
    ) -> Option<i64> {
        let wanted = Uuid::try_parse(name).ok()?;
        let ahead = if is_copy {
            Self::AHEAD_OF_COPY
        } else {
            Self::AHEAD
        };
        let top = highest.saturating_add(ahead);
        for row in self.last + 1..=top.min(Self::LAST) {
            let uuid = Uuid::try_parse(&derived(token, row)).ok()?;
            self.rows.insert(uuid, row);
            self.last = row;
        }
        let row = match self.rows.get(&wanted) {
            Some(row) => *row,
            // Ids of a token that somebody has numbered in another way.
            None => (top.saturating_sub(2 * Self::AHEAD).max(Self::LAST)..top)
                .find(|row| derived(token, *row) == name)?,
        };
        // Spelled in capitals it is another name.
        (derived(token, row) == name).then_some(row)
    }
}

impl Default for Derived {
    fn default() -> Self {
        Self {
            rows: HashMap::new(),
            last: 1,
        }
    }
}

/// The names of a token's objects, and what was ignored on the way.
#[derive(Debug, Default)]
pub(super) struct Names {
    /// Row id to name.
    pub of_row: BTreeMap<i64, ObjectName>,
    /// One sentence for each remembered UUID that is not used.
    pub warnings: Vec<String>,
}

/// Gives each of `rows` a name that no other one has. `remembered` maps rows to what `attribute_text` has for them,
/// `None` if that is no text.
///
/// A derived UUID belongs to its row first. Where two rows remember the same one, the older row has it, so that a later
/// row never renames an older one.
pub(super) fn assign(
    token: &TokenName,
    rows: &[i64],
    remembered: &BTreeMap<i64, Option<String>>,
) -> Names {
    let mut warnings = Vec::new();
    let mut holders: HashMap<&str, i64> = HashMap::new();
    let mut without = Vec::new();
    for row in rows {
        match remembered.get(row) {
            None => without.push(*row),
            Some(Some(text)) if is_uuid(text) => match holders.get(text.as_str()) {
                None => {
                    holders.insert(text, *row);
                }
                Some(holder) => {
                    warnings.push(format!(
                        "object {row} remembers the UUID that object {holder} remembers; it is ignored"
                    ));
                    without.push(*row);
                }
            },
            Some(_) => {
                warnings.push(format!(
                    "what object {row} remembers as its UUID is none; it is ignored"
                ));
                without.push(*row);
            }
        }
    }

    // A row that falls back to its derived UUID takes it from one that remembers it, which then falls back itself.
    let mut texts: BTreeMap<i64, String> = BTreeMap::new();
    while let Some(row) = without.pop() {
        let text = derived(token, row);
        if let Some(holder) = holders.remove(text.as_str()) {
            warnings.push(format!(
                "object {holder} remembers the UUID that is derived for object {row}; it is ignored"
            ));
            without.push(holder);
        }
        texts.insert(row, text);
    }
    texts.extend(
        holders
            .into_iter()
            .map(|(text, row)| (row, text.to_owned())),
    );
    warnings.sort();
    Names {
        of_row: texts
            .into_iter()
            .filter_map(|(row, text)| Some((row, ObjectName::new(OsStr::new(&text))?)))
            .collect(),
        warnings,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> TokenName {
        TokenName::new(OsStr::new("55b8d218-7482-cc53-8d24-a6a17d50efd2")).unwrap()
    }

    fn names(rows: &[i64], remembered: &[(i64, Option<&str>)]) -> (Vec<String>, Vec<String>) {
        let remembered = remembered
            .iter()
            .map(|(row, text)| (*row, text.map(str::to_owned)))
            .collect();
        let names = assign(&token(), rows, &remembered);
        assert_eq!(names.of_row.len(), rows.len());
        let texts = names.of_row.values().map(ToString::to_string).collect();
        (texts, names.warnings)
    }

    const FOREIGN: &str = "b7e9f2a1-aaaa-bbbb-cccc-111111111111";

    #[test]
    fn derived_names_never_change() {
        // Computed once with Python's uuid.uuid5; they are in people's backups.
        assert_eq!(derived(&token(), 2), "c577014e-cf09-50bd-9275-35039d3007e9");
        assert_eq!(
            derived(&token(), 33),
            "874361d1-a0b7-528b-9e25-22294cade279"
        );
        let odd = TokenName::new(OsStr::new("tok en")).unwrap();
        assert_eq!(derived(&odd, 2), "d94911ad-a5c9-52bd-b025-0e3faa3ff199");
    }

    #[test]
    fn the_row_of_a_derived_name_is_found_near_the_rows_that_there_are() {
        let mut table = Derived::default();
        let mut row = |row, highest| table.row(&token(), &derived(&token(), row), (highest, false));
        assert_eq!(row(2, 1), Some(2));
        assert_eq!(row(16_385, 1), Some(16_385));
        assert_eq!(row(16_386, 1), None);
        assert_eq!(row(16_386, 2), Some(16_386));
        assert_eq!(row(1, 1), None, "the token itself");
        let upper = derived(&token(), 2).to_uppercase();
        assert_eq!(table.row(&token(), &upper, (2, false)), None);
        assert_eq!(table.row(&token(), FOREIGN, (2, false)), None);
        let copied = derived(&token(), 16_386);
        assert_eq!(table.row(&token(), &copied, (1, true)), Some(16_386));
        let far = i64::from(u32::MAX);
        let name = derived(&token(), far);
        let mut table = Derived {
            last: Derived::LAST,
            ..Derived::default()
        };
        assert_eq!(table.row(&token(), &name, (far, false)), Some(far));
        assert_eq!(table.row(&token(), FOREIGN, (i64::MAX, false)), None);
    }

    #[test]
    fn a_foreign_name_is_used_as_it_was_written() {
        let upper = "B7E9F2A1-AAAA-BBBB-CCCC-111111111112";
        let (texts, warnings) = names(&[2, 3, 4], &[(2, Some(FOREIGN)), (4, Some(upper))]);
        assert_eq!(texts, [FOREIGN, &derived(&token(), 3), upper]);
        assert_eq!(warnings, [""; 0]);
    }

    #[test]
    fn what_is_no_uuid_is_ignored() {
        for text in [
            None,
            Some(""),
            Some("../../../../etc/passwd"),
            Some("b7e9f2a1aaaabbbbcccc111111111111"),
            Some("{b7e9f2a1-aaaa-bbbb-cccc-111111111111}"),
            Some("b7e9f2a1-aaaa-bbbb-cccc-11111111111/"),
        ] {
            let (texts, warnings) = names(&[2], &[(2, text)]);
            assert_eq!(texts, [derived(&token(), 2)]);
            assert_eq!(warnings.len(), 1);
            assert!(warnings[0].starts_with("what object 2 remembers"));
        }
    }

    #[test]
    fn the_older_of_two_rows_keeps_a_remembered_name() {
        let (texts, warnings) = names(&[2, 3], &[(2, Some(FOREIGN)), (3, Some(FOREIGN))]);
        assert_eq!(texts, [FOREIGN, &derived(&token(), 3)]);
        assert_eq!(warnings.len(), 1);
    }

    #[test]
    fn a_derived_name_belongs_to_its_row_unless_that_has_another() {
        let of_3 = derived(&token(), 3);
        let of_2 = derived(&token(), 2);
        let (texts, warnings) = names(&[2, 3], &[(2, Some(&of_3))]);
        assert_eq!(texts, [of_2.as_str(), &of_3]);
        assert_eq!(warnings.len(), 1);
        let (texts, warnings) = names(&[2, 3], &[(2, Some(&of_3)), (3, Some(&of_2))]);
        assert_eq!(texts, [of_3.as_str(), &of_2]);
        assert_eq!(warnings, [""; 0]);
    }

    #[test]
    fn falling_back_goes_on_until_all_names_differ() {
        let of = |row| derived(&token(), row);
        // 5 has none, so 4 loses; so 3 loses; so 2 loses.
        let (texts, warnings) = names(
            &[2, 3, 4, 5],
            &[(2, Some(&of(3))), (3, Some(&of(4))), (4, Some(&of(5)))],
        );
        assert_eq!(texts, [of(2), of(3), of(4), of(5)]);
        assert_eq!(warnings.len(), 3);
    }
}
