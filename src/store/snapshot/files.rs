//! The files of a token of the `file` backend, as they were.
//!
//! Nearly all object files hold what their object is encoded to, so that to keep the object is to keep the file. Of all others the
//! bytes are kept: of what is damaged, of lock files and of the generation.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::lasting;
use crate::error::{Error, Result};
use crate::store::file;
use crate::store::layout::LayoutFile;
use crate::store::{Metadata, Object, Patience, Token};

/// The files of a token.
pub(super) type Files = BTreeMap<LayoutFile, Kept>;

/// A file.
#[derive(Clone, Debug)]
pub(super) enum Kept {
    /// It holds what the object is encoded to.
    Encoded(Arc<Object>),
    /// What `stat` said of it, and what was in it.
    Bytes(Metadata, Box<[u8]>),
    /// What `stat` said of it, and why it cannot be read.
    Closed(Box<(Result<(Metadata, u64)>, Error)>),
}

impl Kept {
    /// A file of `token`, whose object, if it is one and makes sense, is `object`.
    ///
    /// # Errors
    /// What keeps a snapshot from being taken.
    pub fn of(
        token: &dyn Token,
        file: &LayoutFile,
        object: Option<&Arc<Object>>,
        wait: Duration,
    ) -> Result<Self> {
        if let Some(object) = object.filter(|object| object.canonical) {
            return Ok(Self::Encoded(Arc::clone(object)));
        }
        let patience = Patience::at_most(wait);
        let stat = lasting(token.layout_metadata(file, patience))?;
        if let (LayoutFile::Lock(_), Ok((metadata, 0))) = (file, &stat) {
            return Ok(Self::Bytes(*metadata, Box::default()));
        }
        Ok(match lasting(token.layout_read(file, patience))? {
            Ok((metadata, bytes)) => Self::Bytes(metadata, bytes.into()),
            Err(error) => Self::Closed(Box::new((stat, error))),
        })
    }

    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Bytes(_, bytes) if bytes.is_empty())
    }

    /// What `stat` said of it, and its size.
    pub fn metadata(&self) -> Result<(Metadata, u64)> {
        match self {
            Self::Encoded(object) => {
                Ok((object.metadata, file::encoded_length(&object.attributes)))
            }
            Self::Bytes(metadata, bytes) => Ok((*metadata, bytes.len() as u64)),
            Self::Closed(why) => why.0.clone(),
        }
    }

    /// What `stat` said of it, and what was in it.
    pub fn read(&self) -> Result<(Metadata, Vec<u8>)> {
        match self {
            Self::Encoded(object) => {
                // There is one in each file that is what it is encoded to.
                let generation = object.generation.unwrap_or_default();
                let bytes = file::encode(generation, &object.attributes);
                Ok((object.metadata, bytes))
            }
            Self::Bytes(metadata, bytes) => Ok((*metadata, bytes.to_vec())),
            Self::Closed(why) => Err(why.1.clone()),
        }
    }
}
