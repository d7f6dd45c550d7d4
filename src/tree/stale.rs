//! What becomes of answers that somebody remembers when the store changes.
//!
//! Only attributes and contents are taken back, never that a directory has an entry. For the latter the kernel would take the lock of the
//! directory, which it holds over every request that makes or removes something there; who waits for it cannot be killed, so that a
//! server that is killed at that moment would never be gone, and neither would its clients. It is not needed either: what is gone is
//! [`crate::error::ErrorKind::Stale`] to whoever comes by a remembered name, and the kernel then looks that up anew.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::node::{Ino, Node, ROOT};
use super::{Tree, lock, view};
use crate::store::layout::LayoutFile;
use crate::store::watch::Change;
use crate::store::{ObjectId, Patience, TokenName};

/// Of so many answers all are taken back at each commit in a database, with a system call for each; of more, those about objects.
const AT_ONCE: usize = 1000;

/// Something that was answered and is not true any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stale {
    /// The attributes and the content of an inode.
    Content(Ino),
    /// The attributes of an inode, and not its content.
    Attributes(Ino),
}

/// Who takes answers back at once, from another thread, and returns when that is done, or after a moment.
pub struct Listener(pub Box<dyn Fn(Vec<Stale>) + Send + Sync>);

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Listener")
    }
}

impl Tree {
    /// Has `listener` told of what a request makes stale beside that which it is about, before it is answered. The first one stays.
    pub fn listen(&self, listener: Listener) {
        let _ = self.listener.set(listener);
    }

    /// The attributes of `node` and of all that is below it are others now, and whoever asked for that may look at once.
    pub(super) fn tell_of(&self, node: &Node) {
        let (Some(listener), Some(ino)) = (self.listener.get(), self.known(node)) else {
            return;
        };
        let below = lock(&self.inodes).below(ino);
        let all = std::iter::once(ino).chain(below);
        (listener.0)(all.map(Stale::Attributes).collect());
    }

    /// What may be stale after `changes` in databases, of which nobody says what they have changed: to be asked about anew until
    /// [`Tree::stale`] has found out, which takes a scan. The kernel comes by the directory of an object to all that is in it, and hears there
    /// that it is gone.
    pub fn doubtful(&self, changes: &[Change]) -> Vec<Stale> {
        let inodes = lock(&self.inodes);
        let mut doubtful = Vec::new();
        for change in changes {
            let Change::Database(token) = change else {
                continue;
            };
            let Some(token) = inodes.find(&Node::Token(token.clone())) else {
                continue;
            };
            doubtful.push(token);
            let objects = inodes.children(token);
            let mut in_them = objects.clone().flat_map(|object| inodes.children(object));
            if in_them.nth(AT_ONCE).is_none() {
                doubtful.extend(inodes.below(token));
            } else {
                doubtful.extend(objects);
            }
        }
        doubtful.into_iter().map(Stale::Attributes).collect()
    }

    /// What was answered and is stale after `changes`, in the order of how much it matters.
    ///
    /// The second list is to be repeated a moment later: the answers in question may be on their way to the kernel still,
    /// which does not know yet what it is told to drop.
    pub fn stale(&self, changes: &[Change], patience: Patience) -> (Vec<Stale>, Vec<Stale>) {
        // A lock file and a generation have nothing that anything is made of.
        if changes
            .iter()
            .any(|change| !matches!(change, Change::File(..)))
        {
            self.changes.fetch_add(1, Ordering::AcqRel);
        }
        let mut stale = Vec::new();
        for change in changes {
            match change {
                Change::Tokendir => {
                    let shown = [Node::Root, Node::Control, Node::Layout];
                    self.stale_attributes(&shown, &mut stale);
                }
                Change::Directory(token) => {
                    let shown = [
                        Node::Token(token.clone()),
                        Node::TokenLayout(token.clone()),
                        Node::FileInLayout(token.clone(), LayoutFile::Generation),
                    ];
                    self.stale_attributes(&shown, &mut stale);
                }
                Change::Token(token) => self.stale_token(token, &mut stale),
                Change::Object(token, id) => {
                    self.look_after(token, &LayoutFile::Object(id.clone()));
                    self.stale_below(&Node::Object(token.clone(), id.clone()), &mut stale);
                    self.stale_file(token, LayoutFile::Object(id.clone()), &mut stale);
                }
                Change::File(token, file) => {
                    self.look_after(token, file);
                    self.stale_file(token, file.clone(), &mut stale);
                }
                Change::Database(token) => {
                    self.stale_database(token, patience, &mut stale);
                    self.stale_below(&Node::TokenLayout(token.clone()), &mut stale);
                }
                Change::Everything => {
                    for token in self.store.tokens().unwrap_or_default() {
                        self.look_after(&token, &LayoutFile::Generation);
                    }
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
        });
        let recent = self.recent(&stale);
        (stale, recent)
    }

    /// An object that was renamed or removed may be back, a change overwritten or not seen: who can wait sees to it.
    fn look_after(&self, token: &TokenName, file: &LayoutFile) {
        let Ok(opened) = self.store.token(token) else {
            return;
        };
        if opened.look_after(file, Patience::Now).is_err() {
            self.is_to_be_looked_after(token, file);
        }
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
            })
            .cloned()
            .collect()
    }

    fn known(&self, node: &Node) -> Option<Ino> {
        lock(&self.inodes).find(node)
    }

    /// All that is known of a token.
    fn stale_token(&self, token: &TokenName, stale: &mut Vec<Stale>) {
        self.stale_below(&Node::Token(token.clone()), stale);
        self.stale_below(&Node::TokenLayout(token.clone()), stale);
    }

    /// The attributes of those of `nodes` that are known.
    fn stale_attributes(&self, nodes: &[Node], stale: &mut Vec<Stale>) {
        let known = nodes.iter().filter_map(|node| self.known(node));
        stale.extend(known.map(Stale::Attributes));
    }

    /// A file in `.tokenfs/file`.
    fn stale_file(&self, token: &TokenName, file: LayoutFile, stale: &mut Vec<Stale>) {
        self.stale_below(&Node::FileInLayout(token.clone(), file), stale);
    }

    /// `node` and all that is known below it.
    fn stale_below(&self, node: &Node, stale: &mut Vec<Stale>) {
        if let Some(ino) = self.known(node) {
            stale.push(Stale::Content(ino));
            let below = lock(&self.inodes).below(ino);
            stale.extend(below.into_iter().map(Stale::Content));
        }
    }

    /// A database tells nobody which of its objects have changed: each known one is compared with what it was. One that is as it was is
    /// the same in memory too.
    fn stale_database(&self, token: &TokenName, patience: Patience, stale: &mut Vec<Stale>) {
        let Some(ino) = self.known(&Node::Token(token.clone())) else {
            return;
        };
        let opened = match self.token(token) {
            Ok(opened) => opened,
            Err(_) => return self.stale_token(token, stale),
        };
        let listing = match opened.list(patience) {
            Ok(listing) => listing,
            // Locked or damaged: whoever asks will be told.
            Err(_) => {
                let below = lock(&self.inodes).below(ino);
                stale.extend(below.into_iter().map(Stale::Content));
                return;
            }
        };
        let below: Vec<_> = {
            let inodes = lock(&self.inodes);
            let below = inodes.below(ino).into_iter();
            below
                .filter_map(|child| Some((child, inodes.get(child)?)))
                // Nothing that is said of scratch may be remembered.
                .filter(|(_, inode)| !matches!(inode.node, Node::Scratch(_)))
                .map(|(child, inode)| (child, inode.node.clone(), inode.seen.clone()))
                .collect()
        };
        let mut rest = Vec::new();
        // Attributes of one object come in a row.
        let mut latest = None;
        for (child, node, seen) in below {
            let id = match &node {
                Node::Object(_, ObjectId::Object(object)) => {
                    if listing.binary_search(object).is_err() {
                        stale.push(Stale::Content(child));
                    } else {
                        rest.push(Stale::Attributes(child));
                    }
                    continue;
                }
                Node::Attribute(_, id, _) | Node::MapEntry(_, id, _, _) => id,
                _ => {
                    rest.push(Stale::Attributes(child));
                    continue;
                }
            };
            let current = match latest.take() {
                Some((known, current)) if known == *id => current,
                _ => opened.object(id, patience),
            };
            latest = Some((id.clone(), current.clone()));
            match (&seen, &current) {
                // Nothing about the object has changed, its times included, and nor has what was said of it.
                (Some(seen), Ok(current)) if Arc::ptr_eq(seen, current) => {}
                (Some(seen), Ok(current)) if view::same_text(&node, seen, current) => {
                    rest.push(Stale::Attributes(child));
                }
                _ => stale.push(Stale::Content(child)),
            }
        }
        stale.extend(rest);
    }
}
