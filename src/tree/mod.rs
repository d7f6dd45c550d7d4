//! What a user sees of a store.

pub mod name;
pub mod text;
