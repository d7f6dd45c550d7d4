//! One thing that is wrong, and whether it is the same one as a while ago.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use crate::error::Error;

/// What to do about what cannot be read any more.
pub(super) const RESTORE: &str = "bring it back from a backup";
/// What to do about what may lack something.
pub(super) const COMPARE: &str = "compare it with a backup";
/// What to do about what does not belong there.
pub(super) const MOVE: &str = "move it out of the store";

/// What sort of thing is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Category {
    /// It does not hold what the format allows: SoftHSM has no such object, or no such token.
    Torn,
    /// SoftHSM takes it, and would not have written it.
    Suspicious,
    /// SoftHSM needs it, and it is not there.
    Missing,
    /// It lets in more users than the mask allows.
    Lax,
    /// Of the backend that SoftHSM is not configured for.
    Unreadable,
    /// From a write that a crash has cut short.
    Leftover,
    /// Nothing that belongs into a store.
    Foreign,
}

impl fmt::Display for Category {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Torn => "torn",
            Self::Suspicious => "suspicious",
            Self::Missing => "missing",
            Self::Lax => "lax",
            Self::Unreadable => "unreadable",
            Self::Leftover => "leftover",
            Self::Foreign => "foreign",
        })
    }
}

/// How something is mended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// By [`crate::store::Store::recover`].
    Recover,
    /// By SQLite, when the database is opened for writing.
    RollBack,
    /// The file, which is a lock file, is made.
    MakeLock,
    /// The file, which is a lock file, is removed.
    RemoveLock,
    /// The directory, which is empty, is removed.
    RemoveDirectory,
    /// The file, which is the token's generation, is made.
    MakeGeneration,
    /// These bits are taken away from the mode.
    TakeBits(u32),
}

/// What a finding is about: by this it is known again in another look.
pub type Thing<'a> = (Category, &'a Path, &'a str);

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What sort of thing.
    pub category: Category,
    /// Of the file or directory.
    pub path: PathBuf,
    /// In the file, in bytes, where there is one.
    pub offset: Option<u64>,
    /// A sentence without a full stop, and without the value of an attribute.
    pub detail: String,
    /// How [`super::repair()`] mends it, if it does.
    pub remedy: Option<Remedy>,
    /// What somebody can do about it that [`super::repair()`] does not, unless the sentence says so.
    pub advice: Option<&'static str>,
    /// What the thing itself was like, so far as a writer who is at it would leave that different: a hash.
    state: u64,
}

impl Finding {
    pub(super) fn new(category: Category, detail: impl Into<String>) -> Self {
        Self {
            category,
            path: PathBuf::new(),
            offset: None,
            detail: detail.into(),
            remedy: None,
            advice: None,
            state: 0,
        }
    }

    /// What an error of the content is, as a finding.
    pub(super) fn torn(error: &Error) -> Self {
        Self {
            offset: error.offset(),
            advice: Some(RESTORE),
            ..Self::new(Category::Torn, error.detail())
        }
    }

    pub(super) fn at(mut self, path: impl Into<PathBuf>) -> Self {
        self.path = path.into();
        self
    }

    pub(super) fn at_offset(mut self, offset: u64) -> Self {
        self.offset = Some(offset);
        self
    }

    pub(super) fn mended_by(mut self, remedy: Remedy) -> Self {
        self.remedy = Some(remedy);
        self
    }

    pub(super) fn advising(mut self, advice: &'static str) -> Self {
        self.advice = Some(advice);
        self
    }

    /// Of a thing that is in this state.
    pub(super) fn in_state(mut self, state: &impl Hash) -> Self {
        self.state = hash(state);
        self
    }

    /// Whether it may be a step on the way of a writer, which passes. Modes may, too: a file is made before it has its own.
    pub(super) fn passes(&self) -> bool {
        self.category != Category::Unreadable
    }

    /// Whether it may be a step on the way of a writer that waits for others before it goes on.
    pub(super) fn waits(&self) -> bool {
        match self.category {
            Category::Torn | Category::Suspicious | Category::Missing => true,
            // Nobody is at what else is left over: who makes it has a lock on it, and that is free.
            Category::Leftover => matches!(
                self.remedy,
                Some(Remedy::RemoveDirectory | Remedy::RemoveLock)
            ),
            Category::Lax | Category::Unreadable | Category::Foreign => false,
        }
    }

    /// What it is about, and in which state that is.
    pub(super) fn version(&self) -> (Thing<'_>, u64) {
        (self.thing(), self.state)
    }

    /// What it is about. What is torn may be so in another way meanwhile; of what is suspicious in a database, the sentence says which
    /// object it is.
    #[must_use]
    pub fn thing(&self) -> Thing<'_> {
        let detail = match self.category {
            Category::Torn => "",
            _ => &*self.detail,
        };
        (self.category, &self.path, detail)
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // As an error is shown: one line, whatever is in the path.
        let path = self.path.display().to_string();
        write!(f, "{}: {}: ", path.escape_debug(), self.category)?;
        f.write_str(&self.detail.replace('\n', "\\n"))?;
        if let Some(offset) = self.offset {
            write!(f, " at byte {offset}")?;
        }
        Ok(())
    }
}

/// A number by which a state is known again.
pub(super) fn hash(state: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    state.hash(&mut hasher);
    hasher.finish()
}
