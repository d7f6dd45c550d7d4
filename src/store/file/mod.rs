//! The `file` backend: one binary `.object` file per object.
//!
//! Owns the format ([`decode()`], [`encode()`]), the way a file is read beside its writers ([`read`]), and [`FileToken`]. Assumes
//! that writers follow SoftHSM's protocol (`docs/store-format.md`), 2.6.1's habit of writing after it has unlocked included.

mod decode;
mod encode;
pub mod read;
mod token;

pub use decode::{Decoded, decode};
pub use encode::encode;
pub use token::FileToken;
pub(crate) use token::object_name;

// `ObjectFile.cpp` and `OSAttribute.h` number the kinds alike but for the names.
const KIND_BOOLEAN: u64 = 1;
const KIND_ULONG: u64 = 2;
const KIND_BYTES: u64 = 3;
const KIND_MAP: u64 = 4;
const KIND_MECHANISMS: u64 = 5;

/// The file of the token's own attributes.
pub(crate) const TOKEN_OBJECT: &str = "token.object";

/// What the name of an object's file ends in.
pub(crate) const OBJECT_SUFFIX: &str = ".object";

/// What the name of an object's lock file ends in.
pub(crate) const LOCK_SUFFIX: &str = ".lock";

#[cfg(test)]
mod tests;
