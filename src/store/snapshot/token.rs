//! A token out of memory.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::files::{Files, Kept};
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::Attributes;
use crate::store::layout::{self, LayoutFile};
use crate::store::{
    Backend, Hold, Metadata, MetadataChange, NewObject, Object, ObjectId, ObjectName, Patience,
    Target, Token, TokenName,
};

/// What is known of an object: all of it, or why it cannot be read.
#[derive(Clone, Debug)]
pub(super) enum Entry {
    Whole(Arc<Object>),
    Broken(Result<Metadata>, Error),
}

impl Entry {
    /// What there is of it if it makes sense.
    pub fn object(&self) -> Option<&Arc<Object>> {
        match self {
            Self::Whole(object) => Some(object),
            Self::Broken(..) => None,
        }
    }
}

/// A token of which there is nothing but what is known already, and which takes no change.
#[derive(Clone, Debug)]
pub(crate) struct Remembered {
    pub(super) name: TokenName,
    pub(super) backend: Backend,
    pub(super) metadata: Metadata,
    pub(super) own: Entry,
    /// Ascending; or why they cannot be listed.
    pub(super) names: Result<Arc<[ObjectName]>>,
    pub(super) objects: HashMap<ObjectName, Entry>,
    /// Its files, if it has some in the layout of the `file` backend.
    pub(super) files: Option<Files>,
    /// Why it takes no change.
    pub(super) refusal: Error,
}

impl Remembered {
    /// A directory, at `path`, that we may not look into.
    pub fn closed(name: TokenName, backend: Backend, metadata: Metadata, path: &Path) -> Self {
        let refusal = Error::new(
            ErrorKind::PermissionDenied,
            "tokenfs may not look into this directory",
        )
        .at(path);
        Self {
            name,
            backend,
            metadata,
            own: Entry::Broken(Err(refusal.clone()), refusal.clone()),
            names: Err(refusal.clone()),
            objects: HashMap::new(),
            files: None,
            refusal,
        }
    }

    fn entry(&self, id: &ObjectId) -> Result<&Entry> {
        let ObjectId::Object(name) = id else {
            return Ok(&self.own);
        };
        // Where nobody knows which objects there are, nobody knows that there is no such one.
        self.names.as_ref().map_err(Clone::clone)?;
        let found = self.objects.get(name);
        found.ok_or_else(|| Error::not_found("no such object"))
    }

    /// A file; nothing if its bytes are made of the objects.
    fn file(&self, file: &LayoutFile) -> Result<Option<&Kept>> {
        let Some(files) = &self.files else {
            return Ok(None);
        };
        let found = files.get(file);
        found.map_or_else(
            || Err(Error::not_found("no such file")),
            |kept| Ok(Some(kept)),
        )
    }

    fn refuse(&self) -> Result<()> {
        Err(self.refusal.clone())
    }
}

impl Token for Remembered {
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
        self.names.clone()
    }

    fn object_metadata(&self, id: &ObjectId, _patience: Patience) -> Result<Metadata> {
        match self.entry(id)? {
            Entry::Whole(object) => Ok(object.metadata),
            Entry::Broken(metadata, _) => metadata.clone(),
        }
    }

    fn object(&self, id: &ObjectId, _patience: Patience) -> Result<Arc<Object>> {
        match self.entry(id)? {
            Entry::Whole(object) => Ok(Arc::clone(object)),
            Entry::Broken(_, error) => Err(error.clone()),
        }
    }

    fn layout(&self, patience: Patience) -> Result<Vec<LayoutFile>> {
        match &self.files {
            Some(files) => Ok(files.keys().cloned().collect()),
            None => layout::files(self, patience),
        }
    }

    fn layout_metadata(&self, file: &LayoutFile, patience: Patience) -> Result<(Metadata, u64)> {
        match self.file(file)? {
            Some(kept) => kept.metadata(),
            None => layout::metadata(self, file, patience),
        }
    }

    fn layout_read(&self, file: &LayoutFile, patience: Patience) -> Result<(Metadata, Vec<u8>)> {
        match self.file(file)? {
            Some(kept) => kept.read(),
            None => layout::read(self, file, patience),
        }
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

    fn remove_if(
        &self,
        _name: &ObjectName,
        _check: &mut dyn FnMut(Result<&Attributes>) -> Result<()>,
        _patience: Patience,
    ) -> Result<()> {
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

    /// It never changes.
    fn hold(&self, _wait: Duration) -> Result<Hold> {
        Ok(Hold::nothing())
    }
}
