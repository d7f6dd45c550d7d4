//! Directories that are read: what is in them, and what becomes of a listing while others rename.

use std::ffi::OsString;
use std::sync::Arc;

use super::handle::{Handle, HandleId};
use super::node::{Ino, Node};
use super::{Answer, Listed, Tree, lock, name};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{ObjectId, Patience};

impl Tree {
    /// Opens a directory: its entries as they are now.
    ///
    /// # Errors
    /// [`ErrorKind::NotADirectory`], and what the store fails with.
    pub fn open_dir(&self, ino: Ino, patience: Patience) -> Result<HandleId> {
        let opened = self.list_now(ino, patience)?;
        Ok(self.open_handle(opened))
    }

    /// An open directory is read from its beginning: what was renamed, made or removed since it was opened, or is being just then, is in the
    /// listing once. (The kernel keeps everybody from doing so while it asks for the entries.) What cannot be listed any more stays as it was.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] if that has to be waited for.
    pub fn begin_listing(&self, ino: Ino, handle: HandleId, patience: Patience) -> Result<()> {
        let turns = self.turns();
        let is_old = match lock(&self.handles).get(handle) {
            Some(Handle::Listing(_, _, then)) => *then != turns,
            _ => false,
        };
        if !is_old || self.is_orphan(ino) {
            return Ok(());
        }
        match self.list_now(ino, patience) {
            Ok(now) => lock(&self.handles).replace(handle, now),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(error),
            Err(_) => {}
        }
        Ok(())
    }

    fn list_now(&self, ino: Ino, patience: Patience) -> Result<Handle> {
        let turns = self.turns();
        let (mut attributes, children) = self.wherever(ino, patience, |node| {
            let (attributes, _) = self.noted(self.describe(node, patience))?;
            Ok((attributes, self.noted(self.children(node, patience))?))
        })?;
        attributes.ino = ino;
        let listing: Vec<Listed> = {
            let inodes = lock(&self.inodes);
            children
                .into_iter()
                .map(|(name, kind, node)| Listed {
                    ino: inodes.number(&node),
                    name,
                    kind,
                    node,
                })
                .collect()
        };
        Ok(Handle::Listing(listing.into(), attributes, turns))
    }

    /// The entries of an open directory, without `.` and `..`. They stay as they are until [`Tree::begin_listing`].
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the handle is not known.
    pub fn read_dir(&self, handle: HandleId) -> Result<Arc<[Listed]>> {
        match lock(&self.handles).get(handle) {
            Some(Handle::Listing(listing, ..)) => Ok(Arc::clone(listing)),
            _ => Err(Error::not_found("no such handle")),
        }
    }

    /// What `stat` says of one entry of a directory that is being listed, where that is by now, and under which name. It counts as an answer, as
    /// that of [`Tree::lookup`], unless it is taken back with [`Tree::take_back_answer`].
    ///
    /// # Errors
    /// As [`Tree::lookup`]; [`ErrorKind::NotFound`] if it is gone by now.
    pub fn look_at(
        &self,
        parent: Ino,
        listing: &[Listed],
        listed: &Listed,
        patience: Patience,
    ) -> Result<(OsString, Answer)> {
        let mut entry = self.listed_now(parent, listing, listed);
        loop {
            match self.look_at_entry(parent, &entry, patience) {
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    let now = self.listed_now(parent, listing, listed);
                    if now.name == entry.name {
                        return Err(error);
                    }
                    entry = now;
                }
                answer => return Ok((entry.name, answer?)),
            }
        }
    }

    /// An entry of a listing of the directory `parent` as it is called by now: what was renamed in its directory since that was listed, and is read
    /// only now, is in the listing under the name that it has, unless that is there already.
    #[must_use]
    pub fn listed_now(&self, parent: Ino, listing: &[Listed], listed: &Listed) -> Listed {
        let now = lock(&self.inodes)
            .get(listed.ino)
            .filter(|inode| inode.parent == parent && inode.has_name())
            .map(|inode| inode.node.clone());
        // Scratch is the same whatever it is called.
        let is_renamed = |node: &Node| match node {
            Node::Scratch(id) => self.node(parent).is_ok_and(|directory| {
                lock(&self.scratch).find(&directory, &listed.name) != Some(*id)
            }),
            node => *node != listed.node,
        };
        let now = now.filter(is_renamed);
        let found = now.and_then(|node| Some((self.name_in(parent, &node)?, node)));
        match found {
            Some((name, node)) if listing.iter().all(|other| other.name != name) => Listed {
                name,
                node,
                ..listed.clone()
            },
            _ => listed.clone(),
        }
    }

    /// What something is called in the listing of the directory `parent`, if it is in that: scratch is in none but that of scratch.
    fn name_in(&self, parent: Ino, node: &Node) -> Option<OsString> {
        let directory = self.node(parent).ok()?;
        match node {
            Node::Scratch(id) if matches!(directory, Node::Scratch(_)) => {
                let scratch = lock(&self.scratch);
                let mut names = scratch.names(&directory)?.iter();
                let (name, _) = names.find(|(_, found)| *found == id)?;
                Some(name.clone())
            }
            Node::Attribute(_, _, key) | Node::MapEntry(_, _, _, key)
                if node.can_be_in(&directory) =>
            {
                Some(OsString::from(&*name::file_name(*key)))
            }
            Node::Object(token, ObjectId::Object(object))
                if directory == Node::Token(token.clone()) =>
            {
                Some(object.as_os_str().to_os_string())
            }
            _ => None,
        }
    }

    fn look_at_entry(&self, parent: Ino, listed: &Listed, patience: Patience) -> Result<Answer> {
        self.wherever(parent, patience, |directory| {
            let node = if listed.node.can_be_in(directory) {
                listed.node.clone()
            } else {
                self.child(directory, &listed.name, patience)?
            };
            let look = self.noted(self.look(node, patience))?;
            self.answer((parent, directory), look)
        })
    }
}
