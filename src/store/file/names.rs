//! The names of the files of one object.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use super::{LOCK_SUFFIX, OBJECT_SUFFIX, TOKEN_OBJECT};
use crate::error::{Error, ErrorKind, Result};
use crate::store::leftover::{JOURNAL_SUFFIX, NEW_SUFFIX};
use crate::store::{ObjectId, ObjectName};

/// The longest name of a file, in bytes (`NAME_MAX`).
const LONGEST: usize = 255;

/// The stem of the token's own object. No other object can have it.
pub(super) const TOKEN_STEM: &str = "token";

/// The names of the files that an object has, or has for the time of a write.
#[derive(Clone, Debug)]
pub(super) struct Names {
    object: OsString,
    lock: Option<OsString>,
    new: OsString,
    journal: OsString,
}

impl Names {
    /// Of an object of a token. That of a token that is being built has another name until then.
    pub fn of(id: &ObjectId, building: bool) -> Self {
        let stem = match id {
            ObjectId::Token => OsStr::new(TOKEN_STEM),
            ObjectId::Object(name) => name.as_os_str(),
        };
        let new = with(stem, NEW_SUFFIX);
        Self {
            object: match id {
                ObjectId::Token if building => new.clone(),
                ObjectId::Token => OsString::from(TOKEN_OBJECT),
                ObjectId::Object(_) => with(stem, OBJECT_SUFFIX),
            },
            // SoftHSM opens `token.lock` and does not lock it.
            lock: match id {
                ObjectId::Token => None,
                ObjectId::Object(_) => Some(with(stem, LOCK_SUFFIX)),
            },
            new,
            journal: with(stem, JOURNAL_SUFFIX),
        }
    }

    /// Of an object that is to be made.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] and [`ErrorKind::NameTooLong`] if none can have that name.
    pub fn of_new(name: &ObjectName) -> Result<Self> {
        if name.as_os_str() == TOKEN_STEM {
            return Err(Error::new(
                ErrorKind::Invalid,
                "no object can be called that: it is the name of the token's own",
            ));
        }
        let names = Self::of(&ObjectId::Object(name.clone()), false);
        if !names.fit() {
            return Err(too_long());
        }
        Ok(names)
    }

    /// The object.
    pub fn object(&self) -> &Path {
        Path::new(&self.object)
    }

    /// Its lock file, where SoftHSM takes one.
    pub fn lock(&self) -> Option<&Path> {
        self.lock.as_deref().map(Path::new)
    }

    /// Its next or its previous version.
    pub fn next(&self) -> &Path {
        Path::new(&self.new)
    }

    /// Its journal.
    pub fn journal(&self) -> &Path {
        Path::new(&self.journal)
    }

    /// Whether there is room for all of them. SoftHSM can have made objects for which there is none.
    pub fn fit(&self) -> bool {
        self.journal.len() <= LONGEST
    }
}

/// What is said of a name that leaves no room for ours.
pub(super) fn too_long() -> Error {
    Error::new(
        ErrorKind::NameTooLong,
        "the name of this object leaves no room for those of the files that a write needs",
    )
}

fn with(stem: &OsStr, suffix: &str) -> OsString {
    let mut name = stem.to_os_string();
    name.push(suffix);
    name
}
