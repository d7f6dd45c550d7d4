//! What both backends say when a damaged object goes ([`super::Token::replace_damaged`]).

use super::{NewObject, ObjectName};
use crate::error::{Error, ErrorKind};

/// What a backend says of an object that is to go for its damage and has none.
pub(super) fn undamaged() -> Error {
    Error::new(
        ErrorKind::NotEmpty,
        "the object is not damaged, and there is something in it",
    )
}

/// What the diagnostics say when a damaged object is gone.
pub(super) fn replaced_damaged(
    name: &ObjectName,
    damage: &Error,
    new: Option<&NewObject>,
) -> String {
    let done = match new {
        None => "removed",
        Some(_) => "put a new one in the place of",
    };
    format!("{done} the damaged object {name}, with all that could not be read of it ({damage})")
}
