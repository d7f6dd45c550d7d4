//! A token that nobody can read through us.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::Attributes;
use crate::store::{
    Backend, Metadata, MetadataChange, NewObject, Object, ObjectId, ObjectName, Patience, Target,
    Token, TokenName,
};

/// A directory that we may not look into.
#[derive(Debug)]
pub(super) struct Closed {
    pub name: TokenName,
    pub backend: Backend,
    pub path: PathBuf,
    pub metadata: Metadata,
}

impl Closed {
    fn refuse<T>(&self) -> Result<T> {
        Err(Error::new(
            ErrorKind::PermissionDenied,
            "tokenfs may not look into this directory",
        )
        .at(&self.path))
    }
}

impl Token for Closed {
    fn name(&self) -> &TokenName {
        &self.name
    }

    fn backend(&self) -> Backend {
        self.backend
    }

    fn metadata(&self) -> Result<Metadata> {
        Ok(self.metadata)
    }

    fn list(&self, _patience: Patience) -> Result<Arc<[ObjectName]>> {
        self.refuse()
    }

    fn object_metadata(&self, _id: &ObjectId, _patience: Patience) -> Result<Metadata> {
        self.refuse()
    }

    fn object(&self, _id: &ObjectId, _patience: Patience) -> Result<Arc<Object>> {
        self.refuse()
    }

    fn update(
        &self,
        _id: &ObjectId,
        _edit: &mut dyn FnMut(&mut Attributes) -> Result<()>,
        _mtime: Option<SystemTime>,
        _patience: Patience,
    ) -> Result<()> {
        self.refuse()
    }

    fn check_name(&self, _name: &ObjectName) -> Result<()> {
        self.refuse()
    }

    fn create(&self, _name: &ObjectName, _new: &NewObject, _patience: Patience) -> Result<()> {
        self.refuse()
    }

    fn remove(&self, _name: &ObjectName, _patience: Patience) -> Result<()> {
        self.refuse()
    }

    fn replace_damaged(
        &self,
        _name: &ObjectName,
        _new: Option<&NewObject>,
        _patience: Patience,
    ) -> Result<()> {
        self.refuse()
    }

    fn rename(&self, _from: &ObjectName, _to: &ObjectName, _patience: Patience) -> Result<()> {
        self.refuse()
    }

    fn set_metadata(
        &self,
        _target: &Target,
        _change: &MetadataChange,
        _patience: Patience,
    ) -> Result<()> {
        self.refuse()
    }

    fn sync(&self, _patience: Patience) -> Result<()> {
        self.refuse()
    }
}
