//! The files that a write needs for a moment, beside those of SoftHSM. None of their names means anything to SoftHSM.
//!
//! Whoever makes one holds the lock that is named with it for as long as it is there, so that one whose lock is free was left
//! by a crash:
//!
//! | file | what | lock |
//! |---|---|---|
//! | `<object>.tokenfs-new` | the next version of an object that is not in place yet, or the one before that is not deleted yet | `<object>.lock`, exclusively |
//! | the same, empty | SoftHSM has to be told that the object has another name; it has one of the two | the same |
//! | `<object>.tokenfs-journal` | both versions of a file that is rewritten in place | `<object>.lock`, or `token.object` itself |
//! | `.tokenfs-new-<token>` | in the tokendir: a directory that has no name yet, since its mark is not made, or none any more, since its mark goes next | the mark in it; without a mark it is nobody's |
//! | `.tokenfs-building` | in a directory that is going to be a token and is none yet | the file itself |
//! | `.tokenfs-removing` | in a directory that was a token and is being deleted | the file itself |
//!
//! `sqlite3.db.tokenfs-new` and `token.tokenfs-new` are `sqlite3.db` and `token.object` under the name that they have as long as
//! there is no token: until it is published, and from the moment that it is being removed. The mark of the directory says which.
//!
//! A file that was being rewritten in place can have an attribute more, which fills it up: `file::CKA_TOKENFS_FILLER`.

/// What the name of the next or the previous version of an object's file ends in, in the place of `.object`.
pub const NEW_SUFFIX: &str = ".tokenfs-new";

/// What the name of a journal ends in, in the place of `.object`.
pub const JOURNAL_SUFFIX: &str = ".tokenfs-journal";

/// The mark of a directory that is going to be a token.
pub const BUILDING: &str = ".tokenfs-building";

/// The mark of a directory that is being deleted.
pub const REMOVING: &str = ".tokenfs-removing";

/// What the name of a directory begins with that is not marked yet, or not any more.
pub const NEW_DIRECTORY: &str = ".tokenfs-new-";
