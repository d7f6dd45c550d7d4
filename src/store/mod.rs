//! What is on disk: tokens, objects and attributes of a SoftHSM v2 object store, in both of its backends.
//!
//! This layer owns the formats, SoftHSM's locks and the detection of changes. It knows nothing of the mounted tree: no
//! names or texts of attributes, no inodes, no masks. `docs/store-format.md` has the facts that it relies on.
//!
//! A caller says with [`Patience`] whether it can wait. What is cached is served only while the backing file looks
//! exactly as it did when it was read.
//!
//! Every write is whole: whoever opens the store, now or after a crash, finds an object as it was before or as it is
//! afterwards. What a crash leaves behind besides is named in [`leftover`], and put right by the next writer.

mod acl;
pub mod attribute;
pub mod check;
pub mod classes;
pub mod convert;
pub mod crash;
mod damaged;
pub mod db;
pub mod file;
pub mod layout;
pub mod leftover;
mod lock;
mod metadata;
mod rename;
pub mod snapshot;
mod sync;
mod tokendir;
pub mod validate;
pub mod watch;
mod whole;

pub use metadata::{Access, Metadata, MetadataChange, Stamp, Time};
pub use tokendir::Store;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::error::{Error, ErrorKind, Result};
use attribute::{AttributeKey, Attributes};
use layout::LayoutFile;

/// Which of SoftHSM's two backends a token is stored in (`objectstore.backend`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backend {
    /// One binary `.object` file per object.
    File,
    /// One SQLite database per token.
    Db,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::File => "file",
            Self::Db => "db",
        })
    }
}

/// How long a caller can wait for a lock, for a writer that has not finished, or for a long scan.
#[derive(Clone, Copy, Debug)]
pub enum Patience {
    /// Not at all: answer [`ErrorKind::WouldBlock`] instead.
    Now,
    /// Until then: answer [`ErrorKind::Busy`] afterwards.
    Until(Instant),
}

impl Patience {
    /// As long as `limit` from now.
    #[must_use]
    pub fn at_most(limit: Duration) -> Self {
        Self::Until(Instant::now() + limit)
    }

    /// Waits a little, `pause` or what is left; an error if nothing is left. `what` is what is being waited for.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] if the caller cannot wait, [`ErrorKind::Busy`] if it has waited long enough.
    pub fn wait(self, pause: Duration, what: &str) -> Result<()> {
        match self {
            Self::Now => Err(Error::new(ErrorKind::WouldBlock, what)),
            Self::Until(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(Error::new(ErrorKind::Busy, what));
                }
                std::thread::sleep(pause.min(left));
                Ok(())
            }
        }
    }
}

/// The name of a token's directory: one component of a path, any bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenName(Arc<OsStr>);

/// The name of an object in its token: the stem of its `.object` file, or the UUID of a row of the `db` backend.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName(Arc<OsStr>);

/// Whether `name` can be one component of a path.
fn is_component(name: &OsStr) -> bool {
    let bytes = name.as_bytes();
    !bytes.is_empty()
        && bytes != b"."
        && bytes != b".."
        && !bytes.iter().any(|byte| matches!(byte, b'/' | 0))
}

macro_rules! component {
    ($name:ident) => {
        impl $name {
            /// `name`, if it can be one component of a path.
            #[must_use]
            pub fn new(name: &OsStr) -> Option<Self> {
                is_component(name).then(|| Self(Arc::from(name)))
            }

            /// The name as the operating system has it.
            #[must_use]
            pub fn as_os_str(&self) -> &OsStr {
                &self.0
            }

            /// The bytes of the name.
            #[must_use]
            pub fn as_bytes(&self) -> &[u8] {
                self.0.as_bytes()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0.to_string_lossy().escape_debug())
            }
        }

        impl From<$name> for OsString {
            fn from(name: $name) -> Self {
                name.0.to_os_string()
            }
        }
    };
}

component!(TokenName);
component!(ObjectName);

/// Which object of a token.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectId {
    /// The token itself: `token.object`, or row 1.
    Token,
    /// One of its objects.
    Object(ObjectName),
}

/// One version of an object, whole.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// Of the backing file when this version was read.
    pub metadata: Metadata,
    /// The generation in the first 8 bytes (`file` backend).
    pub generation: Option<u64>,
    /// Whether the file that it was read from holds what [`file::encode`] makes of this, and nothing else (`file` backend).
    pub canonical: bool,
    /// What is stored.
    pub attributes: Attributes,
}

/// An object that is to be made.
#[derive(Clone, Debug, PartialEq)]
pub struct NewObject {
    /// What it holds.
    pub attributes: Attributes,
    /// Mode and owner of the files that are made for it. In the `db` backend they are those of the token.
    pub access: Access,
    /// Its time of last modification, if that is not now.
    pub mtime: Option<SystemTime>,
}

/// What has a mode, an owner and times of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The token's directory.
    Directory,
    /// An object's file, or the token's database.
    Object(ObjectId),
}

/// One token, in either backend.
///
/// All methods may be called from several threads. A damaged object fails by itself and leaves the others alone.
pub trait Token: Send + Sync + fmt::Debug {
    /// The name of its directory.
    fn name(&self) -> &TokenName;

    /// The backend that it is stored in.
    fn backend(&self) -> Backend;

    /// Of the token's directory.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the directory is gone.
    fn metadata(&self) -> Result<Metadata>;

    /// Mode and owner that all its objects share, if they do: those of the database.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if that is gone. It is not waited for.
    fn shared_access(&self) -> Result<Option<Access>> {
        Ok(None)
    }

    /// The names of its objects, in ascending order, damaged ones included, without the token's own object.
    ///
    /// # Errors
    /// [`ErrorKind::PermissionDenied`]; in the `db` backend all that [`Token::object`] can fail with.
    fn list(&self, patience: Patience) -> Result<Arc<[ObjectName]>>;

    /// Of the backing file of an object, which may be damaged.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no such object.
    fn object_metadata(&self, id: &ObjectId, patience: Patience) -> Result<Metadata>;

    /// The present version of an object. As long as nothing changes, the same `Arc` is returned each time.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::PermissionDenied`]; [`ErrorKind::Damaged`] with the offset where it does not
    /// parse; [`ErrorKind::Busy`] or [`ErrorKind::WouldBlock`] if a lock stays taken or a writer does not finish.
    fn object(&self, id: &ObjectId, patience: Patience) -> Result<Arc<Object>>;

    /// The files that it has in the layout of the `file` backend, its own if that is the backend, in the order in which they are best
    /// copied. [`layout`] says how they are made elsewhere.
    ///
    /// # Errors
    /// As [`Token::list`].
    fn layout(&self, patience: Patience) -> Result<Vec<LayoutFile>> {
        layout::files(self, patience)
    }

    /// What `stat` says of one of them, and its size in bytes. That of an object that cannot be encoded, being damaged, is 0.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no such file; otherwise as [`Token::object`], but not for damage.
    fn layout_metadata(&self, file: &LayoutFile, patience: Patience) -> Result<(Metadata, u64)> {
        layout::metadata(self, file, patience)
    }

    /// What is in one of them, and what `stat` said of it then. A damaged object of the `file` backend has bytes as any other.
    ///
    /// # Errors
    /// As [`Token::layout_metadata`]; [`ErrorKind::Damaged`] if the backend is another and the object is, or if the file is too long to
    /// be an object's.
    fn layout_read(&self, file: &LayoutFile, patience: Patience) -> Result<(Metadata, Vec<u8>)> {
        layout::read(self, file, patience)
    }

    /// Changes an object: under SoftHSM's locks, `edit` gets what is stored at that moment, and what it leaves is stored as a
    /// whole, with the next generation. It may be called more than once, each time with what is stored then. If it leaves
    /// everything as it was, nothing is written but the time.
    ///
    /// On return SoftHSM sees the change, and it survives the end of this process. It survives a power failure as a whole or
    /// not at all until [`Token::sync`]; the `db` backend promises more.
    ///
    /// `mtime` is the object's time of last modification from now on, if that is not now.
    ///
    /// # Errors
    /// What `edit` fails with, and then nothing is written; [`ErrorKind::Invalid`] if [`validate`] refuses what it leaves, or
    /// the backend cannot store it; [`ErrorKind::WouldBlock`] with [`Patience::Now`] in any case; all that
    /// [`Token::object`] fails with; [`ErrorKind::ReadOnly`], [`ErrorKind::NoSpace`] and what else writing fails with: the old
    /// version is still there then.
    fn update(
        &self,
        id: &ObjectId,
        edit: &mut dyn FnMut(&mut Attributes) -> Result<()>,
        mtime: Option<SystemTime>,
        patience: Patience,
    ) -> Result<()>;

    /// That an object of this token can have a name, as far as the name alone tells.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if none can (in the `db` backend it has to be a UUID); [`ErrorKind::NameTooLong`] if there is no room for
    /// what the backend adds to it; [`ErrorKind::ReadOnly`] of a token that takes no change at all.
    fn check_name(&self, name: &ObjectName) -> Result<()>;

    /// That an object of this token can have an attribute of this type and kind, as far as that alone tells, or can have it `in_map`, one of its
    /// attribute maps.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`].
    fn check_key(&self, key: AttributeKey, _in_map: bool) -> Result<()> {
        validate::check_key(key)
    }

    /// Makes an object. It appears as a whole, and SoftHSM is told.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`]; [`ErrorKind::Invalid`] if no object can hold that; otherwise as [`Token::check_name`] and
    /// [`Token::update`].
    fn create(&self, name: &ObjectName, new: &NewObject, patience: Patience) -> Result<()>;

    /// Makes many objects, in fewer steps than one after the other where the backend has such: `made` is called after each, and again
    /// if it has to be begun anew; what it fails with ends it. After a failure those before it may be there.
    ///
    /// # Errors
    /// As [`Token::create`], and what `made` fails with.
    fn create_all(
        &self,
        new: &[(ObjectName, NewObject)],
        made: &mut dyn FnMut() -> Result<()>,
        patience: Patience,
    ) -> Result<()> {
        for (name, object) in new {
            self.create(name, object, patience)?;
            made()?;
        }
        Ok(())
    }

    /// Removes an object. It is gone as a whole, and SoftHSM is told.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; otherwise as [`Token::update`].
    fn remove(&self, name: &ObjectName, patience: Patience) -> Result<()> {
        self.remove_if(name, &mut |_| Ok(()), patience)
    }

    /// The same if `check` has nothing against it, which is told what the object holds at that moment, under its locks, or how it is damaged.
    ///
    /// # Errors
    /// What `check` says; otherwise as [`Token::remove`].
    fn remove_if(
        &self,
        name: &ObjectName,
        check: &mut dyn FnMut(Result<&Attributes>) -> Result<()>,
        patience: Patience,
    ) -> Result<()>;

    /// Takes a damaged object away as a whole, and puts `new` in its place, if there is one, in the same step. What there was is lost, and
    /// the diagnostics say so. An object that is not damaged, or not any more, stays as it is.
    ///
    /// # Errors
    /// [`ErrorKind::NotEmpty`] if it is not damaged; [`ErrorKind::NotFound`]; otherwise as [`Token::create`].
    fn replace_damaged(
        &self,
        name: &ObjectName,
        new: Option<&NewObject>,
        patience: Patience,
    ) -> Result<()>;

    /// Gives an object another name, which no object has: it is what it is at that moment under its locks, damaged or not, and
    /// keeps its times, mode and owner. It is there under exactly one of the two names at every moment, after a crash too, and
    /// SoftHSM is told. A name that it has already changes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no object `from`; [`ErrorKind::Exists`] if there is one called `to`;
    /// otherwise as [`Token::check_name`] and [`Token::update`].
    fn rename(&self, from: &ObjectName, to: &ObjectName, patience: Patience) -> Result<()>;

    /// Something has happened to a file of a token of the `file` backend. If an object was renamed or removed through this value, and a SoftHSM
    /// that had a change in hand has brought it back since, that is put right as far as it can be, and said otherwise. That a SoftHSM has
    /// overwritten a change of ours is said. If it has raised the token's generation over ours, it is told once more what was made and removed.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] with [`Patience::Now`] if there is anything to do; what writing fails with.
    fn look_after(&self, _file: &LayoutFile, _patience: Patience) -> Result<()> {
        // In a database nothing comes back.
        Ok(())
    }

    /// The same of all that was changed through this value of late, before it goes.
    fn look_after_all(&self, _patience: Patience) {}

    /// Changes mode, owner or times.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::NotPermitted`] if this process may not; otherwise as [`Token::update`].
    fn set_metadata(
        &self,
        target: &Target,
        change: &MetadataChange,
        patience: Patience,
    ) -> Result<()>;

    /// Waits until everything that was written through this token before survives a power failure.
    ///
    /// # Errors
    /// What `fsync` fails with.
    fn sync(&self, patience: Patience) -> Result<()>;

    /// Keeps everybody from changing what the token holds, until what it returns is dropped; reading goes on. A SoftHSM that has
    /// something to write waits meanwhile. What it was making or removing at this moment can get as far as its next step.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if somebody has one of the locks for longer than `wait`; what opening the files to lock fails with.
    fn hold(&self, wait: Duration) -> Result<Hold>;
}

/// The locks that keep a token as it is.
#[derive(Debug)]
pub struct Hold(
    #[expect(dead_code, reason = "held, and never looked at")] Box<dyn fmt::Debug + Send>,
);

impl Hold {
    /// None: where nothing can change.
    #[must_use]
    pub fn nothing() -> Self {
        Self(Box::new(()))
    }
}

/// How a store is used.
#[derive(Clone, Debug)]
pub struct Options {
    /// The backend that SoftHSM is configured for. A directory that holds both kinds of token is read as this one.
    pub backend: Backend,
    /// Never write, not even to put right what a crash left or to let SQLite roll back what a crashed writer left. Whatever
    /// would write is [`ErrorKind::ReadOnly`].
    pub read_only: bool,
    /// The longest wait for a lock or for an unfinished writer.
    pub lock_wait: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            backend: Backend::File,
            read_only: false,
            lock_wait: Duration::from_secs(5),
        }
    }
}
