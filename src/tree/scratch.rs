//! Files and directories that are none of the store's: what programs put beside a file while they write it.
//!
//! All of it is in memory, up to a limit, is listed nowhere but in a scratch directory, and is gone with the mount. Renaming a
//! scratch file to an attribute, or a scratch directory to an object, is how its content gets into the store. Contract:
//! `docs/tree.md`, "Writing".

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use super::body::{Body, Bytes};
use super::draft::Key;
use super::node::Node;
use super::{Attributes, FileKind, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::store::Access;
use crate::store::attribute::AttributeType;

/// How many scratch files and directories there may be.
const MOST_ENTRIES: usize = 100_000;

/// The number of a scratch file or directory. None is used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ScratchId(pub u64);

/// What it holds.
#[derive(Clone, Debug)]
pub(super) enum Content {
    File(Bytes),
    Directory(BTreeMap<OsString, ScratchId>),
}

/// A scratch file or directory.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub content: Content,
    pub access: Access,
    pub atime: SystemTime,
    pub mtime: SystemTime,
    /// The time that it was given.
    pub given: Option<SystemTime>,
    pub ctime: SystemTime,
    /// It was an object that could not be read, so that nothing of it is here.
    pub was_damaged: bool,
    /// The object in whose directory it is: who writes into it is at work on that.
    pub object: Option<Key>,
}

impl Entry {
    pub fn kind(&self) -> FileKind {
        match self.content {
            Content::File(_) => FileKind::File,
            Content::Directory(_) => FileKind::Directory,
        }
    }

    /// What `stat` says, but for the inode's number.
    pub fn attributes(&self) -> Attributes {
        let size = match &self.content {
            Content::File(bytes) => lock(bytes).len() as u64,
            Content::Directory(_) => 0,
        };
        Attributes {
            ino: 0,
            kind: self.kind(),
            size,
            mode: self.access.mode,
            uid: self.access.uid,
            gid: self.access.gid,
            atime: self.atime,
            mtime: self.mtime,
            ctime: self.ctime,
        }
    }
}

/// All of it.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    last: u64,
    entries: HashMap<ScratchId, Entry>,
    /// What is in a directory of the store, by that directory's node.
    outside: HashMap<Node, BTreeMap<OsString, ScratchId>>,
    /// The attributes that scratch files have been renamed to, until nobody has them open: what is written into these from then on belongs there.
    became: HashMap<ScratchId, Node>,
}

impl Scratch {
    pub fn get(&self, id: ScratchId) -> Result<&Entry> {
        self.entries.get(&id).ok_or_else(gone)
    }

    pub fn get_mut(&mut self, id: ScratchId) -> Result<&mut Entry> {
        self.entries.get_mut(&id).ok_or_else(gone)
    }

    /// What is called `name` in `directory`.
    pub fn find(&self, directory: &Node, name: &OsStr) -> Option<ScratchId> {
        self.names(directory)?.get(name).copied()
    }

    /// The names in a directory.
    pub fn names(&self, directory: &Node) -> Option<&BTreeMap<OsString, ScratchId>> {
        match directory {
            Node::Scratch(id) => match &self.entries.get(id)?.content {
                Content::Directory(names) => Some(names),
                Content::File(_) => None,
            },
            other => self.outside.get(other),
        }
    }

    /// Where it is: the directory of the store, and the names from there. It is looked for, which takes its time, once for all that are above it.
    pub fn path(&self, id: ScratchId) -> Option<(&Node, PathBuf)> {
        let mut inside = HashMap::new();
        for (parent, entry) in &self.entries {
            if let Content::Directory(names) = &entry.content {
                inside.extend(names.iter().map(|(name, id)| (*id, (*parent, name))));
            }
        }
        let (mut id, mut names) = (id, Vec::new());
        while let Some((parent, name)) = inside.get(&id) {
            names.push(*name);
            id = *parent;
        }
        let called = |entries: &BTreeMap<OsString, ScratchId>| {
            let mut entries = entries.iter();
            entries.find_map(|(name, entry)| (*entry == id).then(|| name.clone()))
        };
        let mut outside = self.outside.iter();
        let (node, name) = outside.find_map(|(node, entries)| Some((node, called(entries)?)))?;
        let mut path = PathBuf::from(name);
        path.extend(names.into_iter().rev());
        Some((node, path))
    }

    fn names_mut(&mut self, directory: &Node) -> Result<&mut BTreeMap<OsString, ScratchId>> {
        match directory {
            Node::Scratch(id) => match &mut self.get_mut(*id)?.content {
                Content::Directory(names) => Ok(names),
                Content::File(_) => Err(Error::new(ErrorKind::NotADirectory, "not a directory")),
            },
            other => Ok(self.outside.entry(other.clone()).or_default()),
        }
    }

    /// Makes the file `content`, or a directory, under a name that is free.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] beyond the limit; [`ErrorKind::NotFound`] if the directory is gone.
    pub fn make(
        &mut self,
        directory: &Node,
        name: &OsStr,
        content: Option<Body>,
        access: Access,
    ) -> Result<ScratchId> {
        if self.is_full() {
            return Err(full());
        }
        self.put(directory, name, content, access)
    }

    /// What is called `name` in a directory, which is made there if there is nothing, empty and with the mode and owner of the directory.
    pub fn find_or_make(
        &mut self,
        directory: &Node,
        name: &OsStr,
        is_directory: bool,
    ) -> Option<ScratchId> {
        if let Some(found) = self.find(directory, name) {
            return Some(found);
        }
        let Node::Scratch(id) = directory else {
            return None;
        };
        let access = self.get(*id).ok()?.access;
        let mode = if is_directory { 0o7777 } else { 0o666 };
        let access = Access {
            mode: access.mode & mode,
            ..access
        };
        let content = (!is_directory).then(|| Body::new(Vec::new()));
        self.put(directory, name, content, access).ok()
    }

    /// The same as [`Scratch::make`] whatever the limit, for what was in the store and is in no other place by now.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the directory is gone.
    pub fn put(
        &mut self,
        directory: &Node,
        name: &OsStr,
        content: Option<Body>,
        access: Access,
    ) -> Result<ScratchId> {
        self.last += 1;
        let id = ScratchId(self.last);
        self.names_mut(directory)?.insert(name.to_os_string(), id);
        let now = SystemTime::now();
        let content = match content {
            Some(body) => Content::File(Arc::new(Mutex::new(body))),
            None => Content::Directory(BTreeMap::new()),
        };
        let entry = Entry {
            content,
            access,
            atime: now,
            mtime: now,
            given: None,
            ctime: now,
            was_damaged: false,
            object: self.object_of(directory),
        };
        self.entries.insert(id, entry);
        Ok(id)
    }

    /// The object that a directory is, or is in.
    fn object_of(&self, directory: &Node) -> Option<Key> {
        match directory {
            Node::Scratch(id) => self.entries.get(id)?.object.clone(),
            other => other
                .object()
                .map(|(token, id)| (token.clone(), id.clone())),
        }
    }

    /// Gives something another name, in the place of whatever had that.
    pub fn rename(&mut self, from: (&Node, &OsStr), to: (&Node, &OsStr)) -> Result<()> {
        let id = self.find(from.0, from.1).ok_or_else(gone)?;
        let object = self.object_of(to.0);
        for moved in self.below(id) {
            if let Some(entry) = self.entries.get_mut(&moved) {
                entry.object.clone_from(&object);
            }
        }
        let replaced = self.names_mut(to.0)?.insert(to.1.to_os_string(), id);
        if let Some(replaced) = replaced.filter(|replaced| *replaced != id) {
            self.drop_entry(replaced);
        }
        if from != to {
            self.unname(from.0, from.1);
        }
        Ok(())
    }

    /// Takes a name away, and what it named with all that is in it.
    pub fn remove(&mut self, directory: &Node, name: &OsStr) {
        if let Some(id) = self.unname(directory, name) {
            self.drop_entry(id);
        }
    }

    /// Takes a name away and keeps what it named, for those who have it open.
    pub fn unname(&mut self, directory: &Node, name: &OsStr) -> Option<ScratchId> {
        let names = self.names_mut(directory).ok()?;
        let id = names.remove(name);
        if names.is_empty() && !matches!(directory, Node::Scratch(_)) {
            self.outside.remove(directory);
        }
        id
    }

    /// Takes away all that is in a directory of the store, which is gone.
    pub fn clear(&mut self, directory: &Node) {
        for id in self
            .outside
            .remove(directory)
            .unwrap_or_default()
            .into_values()
        {
            self.drop_entry(id);
        }
    }

    /// The same of all such directories.
    pub fn clear_all(&mut self, is_gone: impl Fn(&Node) -> bool) {
        let gone = self.outside.keys().filter(|directory| is_gone(directory));
        for directory in gone.cloned().collect::<Vec<_>>() {
            self.clear(&directory);
        }
    }

    /// The directories of the store in which there is any.
    pub fn outside(&self) -> impl Iterator<Item = &Node> {
        self.outside.keys()
    }

    /// Whether there is so much of it that no more is made.
    pub fn is_full(&self) -> bool {
        self.entries.len() >= MOST_ENTRIES
    }

    /// What is in the directory of an object, and in its maps, goes along when that becomes another directory: `place` says which its own, or
    /// that of a map, is then.
    pub fn move_along(
        &mut self,
        (token, id): &Key,
        place: impl Fn(&Self, Option<AttributeType>) -> Option<Node>,
    ) {
        let of = |directory: &&Node| directory.object() == Some((token, id));
        let directories: Vec<Node> = self.outside.keys().filter(of).cloned().collect();
        for directory in directories {
            let map = match &directory {
                Node::Attribute(_, _, map) => Some(map.attribute_type),
                _ => None,
            };
            match place(self, map) {
                Some(to) => self.move_all(&directory, &to, |_| true),
                None => self.clear(&directory),
            }
        }
    }

    /// Gives what is in a directory, and `wanted` by its name, the same names in another one.
    pub fn move_all(&mut self, from: &Node, to: &Node, wanted: impl Fn(&OsStr) -> bool) {
        let names: Vec<OsString> = self
            .names(from)
            .into_iter()
            .flatten()
            .map(|(name, _)| name.clone())
            .collect();
        for name in names.iter().filter(|name| wanted(name)) {
            // It fails only if one of the two is gone, and then so is what was in it.
            let _ = self.rename((from, name), (to, name));
        }
    }

    /// A file, or all that is in a directory and in those in it, with itself.
    pub fn below(&self, id: ScratchId) -> Vec<ScratchId> {
        let mut found = vec![id];
        let mut next = 0;
        while let Some(id) = found.get(next)
            && next < self.entries.len()
        {
            if let Ok(entry) = self.get(*id)
                && let Content::Directory(names) = &entry.content
            {
                found.extend(names.values());
            }
            next += 1;
        }
        found
    }

    fn drop_entry(&mut self, id: ScratchId) {
        // Not by recursion: nobody says how deep directories are.
        let mut left = vec![id];
        while let Some(id) = left.pop() {
            if let Some(entry) = self.entries.remove(&id)
                && let Content::Directory(names) = entry.content
            {
                left.extend(names.into_values());
            }
        }
    }

    /// A file has been renamed to an attribute, and is no scratch any more.
    pub fn commit(&mut self, directory: &Node, name: &OsStr, target: &Node) {
        if let Some(id) = self.unname(directory, name) {
            self.entries.remove(&id);
            self.became.insert(id, target.clone());
        }
    }

    /// The attribute that a file has been renamed to, or what that is by now: scratch again, if its object is.
    pub fn became(&self, id: ScratchId) -> Option<Node> {
        let mut now = self.became.get(&id)?;
        while let Node::Scratch(id) = now
            && let Some(next) = self.became.get(id)
        {
            now = next;
        }
        Some(now.clone())
    }

    /// Which files have been renamed to what is `wanted`, and to what.
    pub fn all_that_became(&self, wanted: impl Fn(&Node) -> bool) -> Vec<(ScratchId, Node)> {
        let all = self.became.iter().filter(|(_, node)| wanted(node));
        all.map(|(id, node)| (*id, node.clone())).collect()
    }

    /// What a file had been renamed to is something else by now.
    pub fn becomes(&mut self, id: ScratchId, node: Node) {
        if let Some(became) = self.became.get_mut(&id) {
            *became = node;
        }
    }

    /// Nobody has a file open: forgets all that was renamed to attributes.
    pub fn forget_all(&mut self) {
        self.became.clear();
    }

    /// Forgets what was renamed to an attribute, once nobody goes by it any more.
    pub fn forget(&mut self, id: ScratchId) {
        let now = self.became(id);
        self.became.remove(&id);
        if let Some(now) = now {
            for node in self.became.values_mut() {
                if *node == Node::Scratch(id) {
                    node.clone_from(&now);
                }
            }
        }
    }

    /// What the files hold.
    pub fn contents(&self) -> Vec<Bytes> {
        let file = |entry: &Entry| match &entry.content {
            Content::File(bytes) => Some(Arc::clone(bytes)),
            Content::Directory(_) => None,
        };
        self.entries.values().filter_map(file).collect()
    }
}

fn gone() -> Error {
    Error::not_found("the scratch file is gone")
}

fn full() -> Error {
    Error::new(
        ErrorKind::NoSpace,
        "there are too many scratch files, which are in memory until the end of the mount; remove some",
    )
}
