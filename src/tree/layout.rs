//! `.tokenfs/file`: the store in the layout of SoftHSM's `file` backend, from either backend.
//!
//! It is the store's, and knows nothing of drafts: what is pending in the mount is not there, and what is held is.

use std::ffi::OsString;
use std::sync::Arc;

use super::handle::{Handle, HandleId};
use super::node::{Ino, Node};
use super::{Attributes, FileKind, Tree, view};
use crate::error::{Error, Result};
use crate::store::layout::LayoutFile;
use crate::store::{Patience, Token, TokenName};

type Children = Vec<(OsString, FileKind, Node)>;

impl Tree {
    /// A token as the store has it, and not one that only the mount has yet.
    pub(super) fn stored_token(&self, token: &TokenName) -> Result<Arc<dyn Token>> {
        if self.store.is_building(token) {
            return Err(Error::not_found("the token is not in the store yet"));
        }
        self.token(token)
    }

    /// What `stat` says of a file.
    pub(super) fn describe_in_layout(
        &self,
        token: &TokenName,
        file: &LayoutFile,
        patience: Patience,
    ) -> Result<Attributes> {
        let (metadata, size) = self.stored_token(token)?.layout_metadata(file, patience)?;
        Ok(Attributes {
            size,
            ..view::file(&metadata, self.settings.mask)
        })
    }

    /// The tokens.
    pub(super) fn tokens_in_layout(&self) -> Result<Children> {
        let mut tokens = self.store.tokens()?;
        tokens.retain(|token| !self.store.is_building(token));
        let listed = tokens.into_iter().map(|token| {
            let name = token.as_os_str().into();
            (name, FileKind::Directory, Node::TokenLayout(token))
        });
        Ok(listed.collect())
    }

    /// The files of a token.
    pub(super) fn files_in_layout(
        &self,
        token: &TokenName,
        patience: Patience,
    ) -> Result<Children> {
        let files = self.stored_token(token)?.layout(patience)?;
        let listed = files.into_iter().map(|file| {
            let name = file.name();
            (
                name,
                FileKind::File,
                Node::FileInLayout(token.clone(), file),
            )
        });
        Ok(listed.collect())
    }

    /// Opens a file for reading: one version of it, to the end.
    pub(super) fn open_in_layout(
        &self,
        ino: Ino,
        token: &TokenName,
        file: &LayoutFile,
        patience: Patience,
    ) -> Result<HandleId> {
        let (metadata, content) = self.stored_token(token)?.layout_read(file, patience)?;
        let attributes = Attributes {
            ino,
            size: content.len() as u64,
            ..view::file(&metadata, self.settings.mask)
        };
        self.check_told(ino, &attributes)?;
        let handle = self.open_handle(Handle::Content(self.shared(ino, content)?, attributes));
        self.tell_of_opened(ino, attributes.size);
        Ok(handle)
    }
}
