//! The inodes that the kernel knows.
//!
//! An inode is here from the first answer that names it until the kernel has forgotten all of them (`FUSE_FORGET`). With it
//! stands the version of the object that the kernel's attributes were taken from, which tells whether a change makes them
//! stale.
//!
//! What a name stands for can change while the kernel knows the old one: a file that lost its name while it is open is an orphan, and what has the
//! name then gets another number; a directory that is made again keeps the number, in another generation.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use super::node::{Ino, Node, ROOT};
use crate::store::{Access, Object};

/// One inode that the kernel knows.
#[derive(Debug)]
pub struct Inode {
    /// What it stands for.
    pub node: Node,
    /// The directory that it is in.
    pub parent: Ino,
    /// The version that the attributes which the kernel has were taken from.
    pub seen: Option<Arc<Object>>,
    /// When the kernel was last told of it.
    pub told_at: Instant,
    /// Mode and owner that it was told then, by which it decides who may open it.
    pub told: Option<Access>,
    /// How long it was said to be then, in bytes.
    pub told_size: Option<u64>,
    /// It was unlinked or replaced while it was open: only who has it open asks for it, and what has its name now has another number.
    pub is_orphan: bool,
    /// Something else was renamed to what it stands for. The kernel is about to forget it.
    is_replaced: bool,
    /// How often the number was taken anew while the kernel still knew a directory by it that was removed.
    generation: u64,
    /// It was a directory, and was removed. The kernel finds nothing in that any more, not even what is made in the next one of its number.
    is_dead: bool,
    lookups: u64,
    children: HashSet<Ino>,
}

/// What the kernel was told of an inode, and when.
#[derive(Clone, Debug)]
pub struct Told {
    seen: Option<Arc<Object>>,
    told_at: Instant,
    told: Option<Access>,
    told_size: Option<u64>,
    parent: Ino,
    generation: u64,
    is_dead: bool,
}

impl Inode {
    fn new(node: Node, parent: Ino) -> Self {
        Self {
            node,
            parent,
            seen: None,
            told_at: Instant::now(),
            told: None,
            told_size: None,
            is_orphan: false,
            is_replaced: false,
            generation: 0,
            is_dead: false,
            lookups: 0,
            children: HashSet::new(),
        }
    }

    /// Whether what it stands for is what has that name now.
    #[must_use]
    pub fn has_name(&self) -> bool {
        !self.is_orphan && !self.is_replaced
    }

    /// Notes that the kernel is told of this version.
    pub fn tell(&mut self, version: Option<Arc<Object>>) {
        self.seen = version;
        self.told_at = Instant::now();
    }
}

/// All inodes that the kernel knows.
#[derive(Debug)]
pub struct InodeTable {
    inodes: HashMap<Ino, Inode>,
    /// The numbers of what was renamed, or came when its own was taken, which are not those that it would have.
    renamed: HashMap<Node, Ino>,
}

impl Inode {
    /// Whether it was a directory that is gone.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.is_dead
    }
}

impl Default for InodeTable {
    fn default() -> Self {
        // The kernel never looks the root up, and never forgets it.
        let root = Inode {
            lookups: 1,
            ..Inode::new(Node::Root, ROOT)
        };
        Self {
            inodes: HashMap::from([(ROOT, root)]),
            renamed: HashMap::new(),
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
        if let Some(ino) = self.renamed.get(node) {
            return *ino;
        }
        let mut ino = node.number();
        while let Some(other) = self.inodes.get(&ino)
            && (other.node != *node || other.is_orphan)
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

    /// The generation of `ino` in an answer that names it: another one than before tells the kernel that it is something else now.
    #[must_use]
    pub fn generation(&self, ino: Ino) -> u64 {
        let generation = |inode: &Inode| inode.generation + u64::from(inode.is_dead);
        self.inodes.get(&ino).map_or(0, generation)
    }

    /// The file with this number has lost its name, and is still open.
    pub fn orphan(&mut self, ino: Ino) {
        let Some(inode) = self.inodes.get_mut(&ino) else {
            return;
        };
        inode.is_orphan = true;
        if self.renamed.get(&inode.node) == Some(&ino) {
            self.renamed.remove(&inode.node);
        }
    }

    /// Nobody has the file with this number open any more that has lost its name. Who asks for it came by the name, before that was another
    /// one's, and is answered by what has that now, as whoever comes by the number of what was replaced and not open.
    pub fn adopt(&mut self, ino: Ino) {
        if let Some(inode) = self.inodes.get_mut(&ino).filter(|inode| inode.is_orphan) {
            inode.is_orphan = false;
            inode.is_replaced = true;
        }
    }

    /// The directory with this number is gone.
    pub fn bury(&mut self, ino: Ino) {
        if let Some(inode) = self.inodes.get_mut(&ino) {
            inode.is_dead = true;
        }
    }

    /// Counts one more answer that names `node`, in the directory `parent`, and returns its number.
    pub fn remember(&mut self, node: &Node, parent: Ino, seen: Option<Arc<Object>>) -> Ino {
        let ino = self.number(node);
        let inode = self
            .inodes
            .entry(ino)
            .or_insert_with(|| Inode::new(node.clone(), parent));
        inode.lookups += 1;
        inode.is_replaced = false;
        if std::mem::take(&mut inode.is_dead) {
            inode.generation += 1;
        }
        inode.tell(seen);
        self.put_below(ino, parent);
        if ino != node.number() {
            // It keeps the number when whatever is in its way is gone.
            self.renamed.insert(node.clone(), ino);
        }
        ino
    }

    /// What there is to know of `ino` before another answer names it: for [`InodeTable::untell`].
    #[must_use]
    pub fn told(&self, ino: Ino) -> Option<Told> {
        let inode = self.inodes.get(&ino)?;
        Some(Told {
            seen: inode.seen.clone(),
            told_at: inode.told_at,
            told: inode.told,
            told_size: inode.told_size,
            parent: inode.parent,
            generation: inode.generation,
            is_dead: inode.is_dead,
        })
    }

    /// The last answer that named `ino` was not given: it was `told` that before.
    pub fn untell(&mut self, ino: Ino, told: Option<Told>) {
        if let (Some(inode), Some(told)) = (self.inodes.get_mut(&ino), told) {
            inode.seen = told.seen;
            inode.told_at = told.told_at;
            inode.told = told.told;
            inode.told_size = told.told_size;
            inode.generation = told.generation;
            inode.is_dead = told.is_dead;
            self.put_below(ino, told.parent);
        }
        self.forget(ino, 1);
    }

    /// What was renamed is something else now: the kernel goes on to use the number that it had.
    pub fn rebind(&mut self, ino: Ino, node: Node, parent: Option<Ino>) {
        // What has no name must not get that of what has taken its own.
        let is_named = |inode: &&Inode| !inode.is_orphan;
        let Some(is_replaced) = self
            .get(ino)
            .filter(is_named)
            .map(|inode| inode.is_replaced)
        else {
            return;
        };
        let replaced = self.find(&node).filter(|other| *other != ino);
        if !is_replaced
            && let Some(replaced) = replaced.and_then(|other| self.inodes.get_mut(&other))
        {
            replaced.is_replaced = true;
        }
        let Some(inode) = self.inodes.get_mut(&ino) else {
            return;
        };
        let old = std::mem::replace(&mut inode.node, node.clone());
        inode.seen = None;
        if self.renamed.get(&old) == Some(&ino) {
            self.renamed.remove(&old);
        }
        if is_replaced {
            // Another one has the name.
        } else if node.number() == ino {
            self.renamed.remove(&node);
        } else {
            self.renamed.insert(node, ino);
        }
        if let Some(parent) = parent {
            self.put_below(ino, parent);
        }
    }

    /// What is known by this number is in the directory `parent`, and in no other any more.
    fn put_below(&mut self, ino: Ino, parent: Ino) {
        let Some(inode) = self.inodes.get_mut(&ino) else {
            return;
        };
        let old = std::mem::replace(&mut inode.parent, parent);
        if old != parent
            && let Some(directory) = self.inodes.get_mut(&old)
        {
            directory.children.remove(&ino);
        }
        if let Some(directory) = self.inodes.get_mut(&parent) {
            directory.children.insert(ino);
        }
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
        let Some(forgotten) = self.inodes.remove(&ino) else {
            return;
        };
        if self.renamed.get(&forgotten.node) == Some(&ino) {
            self.renamed.remove(&forgotten.node);
        }
        if let Some(directory) = self.inodes.get_mut(&forgotten.parent) {
            directory.children.remove(&ino);
        }
    }

    /// The known inodes in the directory `ino`.
    pub fn children(&self, ino: Ino) -> impl Iterator<Item = Ino> + Clone {
        let directory = self.inodes.get(&ino).into_iter();
        directory.flat_map(|inode| inode.children.iter().copied())
    }

    /// The known inodes below `ino`, parents before their children, without itself. An answer that is overtaken by a rename can put a directory
    /// for a moment where it was before, which may be below itself by then: each is named once.
    #[must_use]
    pub fn below(&self, ino: Ino) -> Vec<Ino> {
        let mut found = Vec::new();
        let mut seen = HashSet::from([ino]);
        let mut next = 0;
        let mut directory = ino;
        loop {
            if let Some(inode) = self.inodes.get(&directory) {
                let children = inode.children.iter().copied();
                found.extend(children.filter(|child| seen.insert(*child)));
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
            lookups: 1,
            ..Inode::new(token("c"), ROOT)
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

    #[test]
    fn what_was_replaced_does_not_get_the_name_when_its_directory_is_renamed() {
        let mut table = InodeTable::default();
        let [replaced, replacing] = ["a", "b"].map(|name| table.remember(&token(name), ROOT, None));
        table.rebind(replacing, token("a"), None);
        for ino in [replacing, replaced] {
            table.rebind(ino, token("c"), None);
        }
        assert_eq!(table.find(&token("c")), Some(replacing));
    }

    #[test]
    fn what_is_in_another_directory_now_is_in_the_old_one_no_more() {
        let mut table = InodeTable::default();
        let [a, b] = ["a", "b"].map(|name| table.remember(&token(name), ROOT, None));
        let log = table.remember(&Node::Log, a, None);
        table.remember(&Node::Log, b, None);
        assert!(table.below(a).is_empty());
        assert_eq!(table.below(b), [log]);
        table.rebind(log, Node::Log, Some(ROOT));
        assert!(table.below(b).is_empty());
        // Two answers, each of which was true once.
        table.remember(&token("a"), b, None);
        table.remember(&token("b"), a, None);
        assert_eq!(table.below(a), [b]);
        assert_eq!(table.below(b), [a]);
    }
}
