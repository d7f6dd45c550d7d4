//! The `file` backend: one binary `.object` file per object.
//!
//! Owns the format ([`decode()`], [`encode()`]), the way a file is read beside its writers ([`read`]), the way it is written beside
//! them, and [`FileToken`]. Assumes that writers follow SoftHSM's protocol (`docs/store-format.md`), 2.6.1's habit of writing after
//! it has unlocked included.
//!
//! | module | owns |
//! |---|---|
//! | `change`, `make` | changing an object; making and removing one |
//! | `guard` | the locks of a write, and the file that a next version is written into |
//! | `journal`, `rewrite` | what a journal says, and rewriting in place under one |
//! | `generation` | the token's counter |
//! | `born`, `noticed` | objects that SoftHSM is still making; changes of ours that it overwrote |
//! | `attire` | mode, owner, access control lists and times |
//! | `recover` | what a crash left |
//! | `build` | a token that is none yet |
//! | `hold` | keeping a token as it is |
//! | `layout` | the files of a token as they are |
//!
//! Lock order: `.lock`, then `.object`, then `generation`, as in SoftHSM. `token.object` has no other lock than its own.

mod attire;
mod born;
mod build;
mod change;
mod decode;
mod departed;
mod encode;
mod generation;
mod guard;
mod hold;
mod journal;
mod layout;
mod make;
mod names;
mod noticed;
pub(crate) mod own;
pub mod read;
mod recover;
mod rename;
mod replace;
mod rewrite;
mod token;

pub(crate) use attire::{apply_to_open, set_access};
pub use decode::{Decoded, decode};
pub use encode::{digest, encode, encoded_length};
pub(crate) use recover::is_known;
pub use token::FileToken;
pub(crate) use token::object_name;

use crate::store::attribute::AttributeType;

/// The type of what fills a file up while it is rewritten in place and becomes shorter: `CKA_VENDOR_DEFINED` (PKCS #11, section
/// 4.2) with "TKF" and a 2. Its value is a byte string of zeros. SoftHSM does not look at it.
pub const CKA_TOKENFS_FILLER: AttributeType = 0x8000_0000 | 0x544b_4602;

// `ObjectFile.cpp` and `OSAttribute.h` number the kinds alike but for the names.
const KIND_BOOLEAN: u64 = 1;
const KIND_ULONG: u64 = 2;
const KIND_BYTES: u64 = 3;
const KIND_MAP: u64 = 4;
const KIND_MECHANISMS: u64 = 5;

/// The file of the token's own attributes.
pub(crate) const TOKEN_OBJECT: &str = "token.object";

/// The token's counter of objects that were made or removed.
pub(crate) const GENERATION: &str = "generation";

/// The file that SoftHSM opens beside [`TOKEN_OBJECT`] and never locks.
pub(crate) const TOKEN_LOCK: &str = "token.lock";

/// What the name of an object's file ends in.
pub(crate) const OBJECT_SUFFIX: &str = ".object";

/// What the name of an object's lock file ends in.
pub(crate) const LOCK_SUFFIX: &str = ".lock";

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod fixture;
#[cfg(test)]
mod format_tests;
#[cfg(test)]
mod make_tests;
#[cfg(test)]
mod race_tests;
#[cfg(test)]
mod read_tests;
#[cfg(test)]
mod rename_tests;
#[cfg(test)]
mod write_tests;
