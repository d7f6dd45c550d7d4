//! What becomes of answers that somebody remembers when the store changes.

use std::ffi::OsString;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::node::{Ino, Node, ROOT};
use super::{Tree, lock, name, view};
use crate::error::ErrorKind;
use crate::store::watch::Change;
use crate::store::{Object, ObjectId, Patience, TokenName};

/// Something that was answered and is not true any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stale {
    /// The attributes and the content of an inode.
    Content(Ino),
    /// The attributes of an inode, and not its content.
    Attributes(Ino),
    /// That a directory has this entry.
    Entry(Ino, OsString),
}

impl Tree {
    /// What was answered and is stale after `changes`, in the order of how much it matters.
    ///
    /// The second list is to be repeated a moment later: the answers in question may be on their way to the kernel still,
    /// which does not know yet what it is told to drop.
    pub fn stale(&self, changes: &[Change], patience: Patience) -> (Vec<Stale>, Vec<Stale>) {
        self.changes.fetch_add(1, Ordering::AcqRel);
        let mut stale = Vec::new();
        for change in changes {
            match change {
                Change::Tokendir => stale.push(Stale::Attributes(ROOT)),
                Change::Directory(token) => {
                    stale.extend(
                        self.known(&Node::Token(token.clone()))
                            .map(Stale::Attributes),
                    );
                }
                Change::Token(token) => self.stale_token(token, &mut stale),
                Change::Object(token, id) => self.stale_object(token, id, patience, &mut stale),
                Change::Database(token) => self.stale_database(token, patience, &mut stale),
                Change::Everything => {
                    stale.push(Stale::Attributes(ROOT));
                    stale.extend(
                        lock(&self.inodes)
                            .below(ROOT)
                            .into_iter()
                            .map(Stale::Content),
                    );
                }
            }
        }
        // The largest change first is the cheapest way to say it once.
        let mut said = std::collections::HashSet::new();
        stale.retain(|stale| match stale {
            Stale::Content(ino) => said.insert(*ino),
            Stale::Attributes(ino) => !said.contains(ino),
            Stale::Entry(..) => true,
        });
        let recent = self.recent(&stale);
        (stale, recent)
    }

    /// Those of `stale` that are about answers given so lately that they may still be on their way.
    fn recent(&self, stale: &[Stale]) -> Vec<Stale> {
        const ON_THE_WAY: Duration = Duration::from_millis(50);
        let inodes = lock(&self.inodes);
        let now = Instant::now();
        stale
            .iter()
            .filter(|stale| match stale {
                Stale::Content(ino) | Stale::Attributes(ino) => inodes
                    .get(*ino)
                    .is_some_and(|inode| now.duration_since(inode.told_at) < ON_THE_WAY),
                Stale::Entry(..) => true,
            })
            .cloned()
            .collect()
    }

    fn known(&self, node: &Node) -> Option<Ino> {
        lock(&self.inodes).find(node)
    }

    /// All that is known of a token, and the token itself if there is none any more.
    fn stale_token(&self, token: &TokenName, stale: &mut Vec<Stale>) {
        let node = Node::Token(token.clone());
        if let Some(ino) = self.known(&node) {
            stale.push(Stale::Content(ino));
            stale.extend(
                lock(&self.inodes)
                    .below(ino)
                    .into_iter()
                    .map(Stale::Content),
            );
            if self.token(token).is_err() {
                stale.push(Stale::Entry(ROOT, token.as_os_str().into()));
            }
        }
    }

    fn stale_object(
        &self,
        token: &TokenName,
        id: &ObjectId,
        patience: Patience,
        stale: &mut Vec<Stale>,
    ) {
        let Some(ino) = self.known(&Node::Object(token.clone(), id.clone())) else {
            return;
        };
        stale.push(Stale::Content(ino));
        let below = lock(&self.inodes).below(ino);
        stale.extend(below.iter().copied().map(Stale::Content));
        let current = self
            .token(token)
            .and_then(|token| token.object(id, patience));
        match (current, id) {
            (Ok(object), _) => self.vanished(&below, &object, stale),
            (Err(error), ObjectId::Object(object)) if error.kind() == ErrorKind::NotFound => {
                if let Some(parent) = self.known(&Node::Token(token.clone())) {
                    stale.push(Stale::Entry(parent, object.as_os_str().into()));
                }
            }
            // Whoever asks for it will be told.
            (Err(_), _) => {}
        }
    }

    /// The entries of an object's directory, and of its maps', that the present version does not have.
    fn vanished(&self, below: &[Ino], object: &Object, stale: &mut Vec<Stale>) {
        let inodes = lock(&self.inodes);
        for inode in below.iter().filter_map(|ino| inodes.get(*ino)) {
            if let Node::Attribute(_, _, key) | Node::MapEntry(_, _, _, key) = &inode.node
                && view::value(&inode.node, object).is_none()
            {
                let name = OsString::from(&*name::file_name(*key));
                stale.push(Stale::Entry(inode.parent, name));
            }
        }
    }

    /// A database tells nobody which of its objects have changed: each known one is compared with what it was. The times of
    /// all of them are new.
    fn stale_database(&self, token: &TokenName, patience: Patience, stale: &mut Vec<Stale>) {
        let Some(ino) = self.known(&Node::Token(token.clone())) else {
            return;
        };
        let below = lock(&self.inodes).below(ino);
        let opened = match self.token(token) {
            Ok(opened) => opened,
            Err(_) => return self.stale_token(token, stale),
        };
        let listing = match opened.list(patience) {
            Ok(listing) => listing,
            // Locked or damaged: whoever asks will be told.
            Err(_) => {
                stale.extend(below.into_iter().map(Stale::Content));
                return;
            }
        };
        let mut rest = Vec::new();
        // Attributes of one object come in a row.
        let mut latest = None;
        for child in below {
            let (node, parent, seen) = {
                let inodes = lock(&self.inodes);
                match inodes.get(child) {
                    Some(inode) => (inode.node.clone(), inode.parent, inode.seen.clone()),
                    None => continue,
                }
            };
            let id = match &node {
                Node::Object(_, ObjectId::Object(object)) => {
                    if listing.binary_search(object).is_err() {
                        stale.push(Stale::Content(child));
                        stale.push(Stale::Entry(ino, object.as_os_str().into()));
                    } else {
                        rest.push(Stale::Attributes(child));
                    }
                    continue;
                }
                Node::Attribute(_, id, key) | Node::MapEntry(_, id, _, key) => (id, key),
                _ => {
                    rest.push(Stale::Attributes(child));
                    continue;
                }
            };
            let (id, key) = id;
            let current = match latest.take() {
                Some((known, current)) if known == *id => current,
                _ => opened.object(id, patience),
            };
            latest = Some((id.clone(), current.clone()));
            match current {
                Ok(current)
                    if seen
                        .as_ref()
                        .is_some_and(|seen| view::same_text(&node, seen, &current)) =>
                {
                    rest.push(Stale::Attributes(child));
                }
                Ok(current) => {
                    stale.push(Stale::Content(child));
                    if view::value(&node, &current).is_none() {
                        stale.push(Stale::Entry(
                            parent,
                            OsString::from(&*name::file_name(*key)),
                        ));
                    }
                }
                Err(_) => stale.push(Stale::Content(child)),
            }
        }
        stale.extend(rest);
    }
}
