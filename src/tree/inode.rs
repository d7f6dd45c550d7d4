//! The inodes that the kernel knows.
//!
//! An inode is here from the first answer that names it until the kernel has forgotten all of them (`FUSE_FORGET`). With it
//! stands the version of the object that the kernel's attributes were taken from: as long as the kernel believes in
//! a size, pages have to come from the value that has it, and while somebody reads them, the kernel is not told of another.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::node::{Ino, Node, ROOT};
use super::view;
use crate::store::Object;

/// One inode that the kernel knows.
#[derive(Debug)]
pub struct Inode {
    /// What it stands for.
    pub node: Node,
    /// The directory that it is in.
    pub parent: Ino,
    /// The version that the attributes which the kernel has were taken from.
    pub seen: Option<Arc<Object>>,
    /// The version that the pages which the kernel may have were taken from.
    pub pages: Option<Arc<Object>>,
    /// When the kernel was last told of it.
    pub told_at: Instant,
    /// When what the kernel was told last became another value than it was told before.
    changed_at: Option<Instant>,
    /// When the kernel was last told to drop what it knows, and whether it has surely got an answer since.
    notified_at: Option<Instant>,
    is_confirmed: bool,
    /// How many have it open whose reads come from the kernel's pages, and when the last of them opened it.
    readers: u64,
    opened_at: Instant,
    lookups: u64,
    children: HashSet<Ino>,
}

/// How long somebody who has just opened a file can count on the kernel's view of it.
///
/// A reader asks for the first bytes, and then for more to learn that there is none. If the size changed in between, it would
/// get the end of another value. Most are done in well under a millisecond; one who keeps a file open for longer
/// must not keep the rest from seeing what it has become.
const HELD: Duration = Duration::from_secs(2);

/// How long a request, or the answer to it, may be on its way, with a client that is not given the processor.
const IN_FLIGHT: Duration = Duration::from_secs(1);

impl Inode {
    /// Notes that the kernel is told of this version.
    pub fn tell(&mut self, version: Option<Arc<Object>>) {
        let now = Instant::now();
        self.told_at = now;
        if let (Some(old), Some(new)) = (&self.seen, &version)
            && !view::same_text(&self.node, old, new)
        {
            self.changed_at = Some(now);
        }
        self.seen = version;
        self.is_confirmed |= self
            .notified_at
            .is_none_or(|notified| notified.elapsed() > IN_FLIGHT);
    }

    /// Notes that the kernel is told to drop what it knows.
    ///
    /// It then drops answers to what it asked before as well (`fuse_change_attributes_i` in fs/fuse/inode.c), and nobody
    /// hears of that. Only an answer that was asked for after this can be relied on.
    pub fn notify(&mut self) {
        self.notified_at = Some(Instant::now());
        self.is_confirmed = false;
    }

    /// Whether the kernel surely has the size of the version that it was told of last.
    #[must_use]
    pub fn is_size_known(&self) -> bool {
        self.is_confirmed
            && self
                .changed_at
                .is_none_or(|changed| changed.elapsed() > IN_FLIGHT)
    }

    /// Counts one more who reads from the kernel's pages.
    pub fn open(&mut self) {
        self.readers += 1;
        self.opened_at = Instant::now();
    }

    /// Counts one less.
    pub fn close(&mut self) {
        self.readers = self.readers.saturating_sub(1);
    }

    /// Whether the kernel's view has to stay as it is for somebody who is reading.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.readers > 0 && self.opened_at.elapsed() < HELD
    }
}

/// All inodes that the kernel knows.
#[derive(Debug)]
pub struct InodeTable {
    inodes: HashMap<Ino, Inode>,
}

impl Default for InodeTable {
    fn default() -> Self {
        let root = Inode {
            node: Node::Root,
            parent: ROOT,
            seen: None,
            pages: None,
            told_at: Instant::now(),
            changed_at: None,
            notified_at: None,
            is_confirmed: false,
            readers: 0,
            opened_at: Instant::now(),
            // The kernel never looks the root up, and never forgets it.
            lookups: 1,
            children: HashSet::new(),
        };
        Self {
            inodes: HashMap::from([(ROOT, root)]),
        }
    }
}

impl InodeTable {
    /// An inode by its number.
    #[must_use]
    pub fn get(&self, ino: Ino) -> Option<&Inode> {
        self.inodes.get(&ino)
    }

    /// An inode by its number.
    pub fn get_mut(&mut self, ino: Ino) -> Option<&mut Inode> {
        self.inodes.get_mut(&ino)
    }

    /// The number that `node` has, or would have if the kernel were told of it now.
    #[must_use]
    pub fn number(&self, node: &Node) -> Ino {
        let mut ino = node.number();
        while let Some(other) = self.inodes.get(&ino)
            && other.node != *node
        {
            ino = ino.wrapping_add(1).max(ROOT + 1);
        }
        ino
    }

    /// The number of `node` if the kernel knows it.
    #[must_use]
    pub fn find(&self, node: &Node) -> Option<Ino> {
        let ino = self.number(node);
        self.inodes.contains_key(&ino).then_some(ino)
    }

    /// Counts one more answer that names `node`, in the directory `parent`, and returns its number.
    pub fn remember(&mut self, node: &Node, parent: Ino, seen: Option<Arc<Object>>) -> Ino {
        let ino = self.number(node);
        let inode = self.inodes.entry(ino).or_insert_with(|| Inode {
            node: node.clone(),
            parent,
            seen: None,
            pages: None,
            told_at: Instant::now(),
            changed_at: None,
            notified_at: None,
            is_confirmed: false,
            readers: 0,
            opened_at: Instant::now(),
            lookups: 0,
            children: HashSet::new(),
        });
        inode.lookups += 1;
        inode.tell(seen);
        if let Some(directory) = self.inodes.get_mut(&parent) {
            directory.children.insert(ino);
        }
        ino
    }

    /// Takes back `count` answers that named `ino`. The last one removes it.
    pub fn forget(&mut self, ino: Ino, count: u64) {
        let Some(inode) = self.inodes.get_mut(&ino) else {
            return;
        };
        inode.lookups = inode.lookups.saturating_sub(count);
        if inode.lookups > 0 || ino == ROOT {
            return;
        }
        let parent = inode.parent;
        self.inodes.remove(&ino);
        if let Some(directory) = self.inodes.get_mut(&parent) {
            directory.children.remove(&ino);
        }
    }

    /// The known inodes below `ino`, parents before their children, without itself.
    #[must_use]
    pub fn below(&self, ino: Ino) -> Vec<Ino> {
        let mut found = Vec::new();
        let mut next = 0;
        let mut directory = ino;
        loop {
            if let Some(inode) = self.inodes.get(&directory) {
                found.extend(inode.children.iter().copied());
            }
            match found.get(next) {
                Some(child) => directory = *child,
                None => return found,
            }
            next += 1;
        }
    }

    /// How many are known, the root included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.inodes.len()
    }

    /// Never: the root is always known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.inodes.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::TokenName;
    use std::ffi::OsStr;

    fn token(name: &str) -> Node {
        Node::Token(TokenName::new(OsStr::new(name)).unwrap())
    }

    #[test]
    fn an_inode_lives_until_the_last_answer_is_taken_back() {
        let mut table = InodeTable::default();
        let ino = table.remember(&token("a"), ROOT, None);
        assert_eq!(table.remember(&token("a"), ROOT, None), ino);
        table.forget(ino, 1);
        assert!(table.get(ino).is_some());
        assert_eq!(table.below(ROOT), [ino]);
        table.forget(ino, 1);
        assert!(table.get(ino).is_none());
        assert!(table.below(ROOT).is_empty());
        table.forget(ROOT, 100);
        assert_eq!(table.len(), 1, "the root stays");
    }

    #[test]
    fn numbers_that_collide_are_told_apart_while_both_are_known() {
        let mut table = InodeTable::default();
        let first = table.remember(&token("a"), ROOT, None);
        // Put something else where "b" belongs.
        let wanted = token("b").number();
        let squatter = Inode {
            node: token("c"),
            parent: ROOT,
            seen: None,
            pages: None,
            told_at: Instant::now(),
            changed_at: None,
            notified_at: None,
            is_confirmed: false,
            readers: 0,
            opened_at: Instant::now(),
            lookups: 1,
            children: HashSet::new(),
        };
        table.inodes.insert(wanted, squatter);
        let second = table.remember(&token("b"), ROOT, None);
        assert_eq!(second, wanted + 1);
        assert_eq!(table.find(&token("b")), Some(second));
        assert_ne!(first, second);
    }

    #[test]
    fn below_is_the_whole_subtree() {
        let mut table = InodeTable::default();
        let control = table.remember(&Node::Control, ROOT, None);
        let labels = table.remember(&Node::ByLabel, control, None);
        let log = table.remember(&Node::Log, control, None);
        let mut below = table.below(ROOT);
        assert_eq!(below.remove(0), control);
        below.sort_unstable();
        let mut expected = [labels, log];
        expected.sort_unstable();
        assert_eq!(below, expected);
    }
}
