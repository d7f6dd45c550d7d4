//! The model: a file system in memory whose files are attributes or scratch.

use std::collections::{BTreeMap, BTreeSet};

use tokenfs::pkcs11;
use tokenfs::store::attribute::{AttributeKey, Attributes, Kind, Value};
use tokenfs::store::validate;
use tokenfs::tree::name::{self, Name};
use tokenfs::tree::text::{Context, check_beginning, parse, render};

use super::Answer;
use super::ops::{DESCRIPTORS, How};

const ENOENT: i32 = libc::ENOENT;
const EEXIST: i32 = libc::EEXIST;
const EINVAL: i32 = libc::EINVAL;
const EXDEV: i32 = libc::EXDEV;
const EISDIR: i32 = libc::EISDIR;
const ENOTDIR: i32 = libc::ENOTDIR;
const ENOTEMPTY: i32 = libc::ENOTEMPTY;

type Id = usize;

#[derive(Clone, Debug)]
enum Node {
    /// A file that is an attribute: it has a value, or, just created, the bytes of whoever created it.
    Attribute {
        value: Option<Value>,
        bytes: usize,
    },
    /// A file that is none.
    Scratch {
        bytes: usize,
    },
    Directory(Role, BTreeMap<String, Id>),
}

/// What a directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Root,
    Token {
        /// It is not in the store.
        building: bool,
    },
    /// The token's own attributes.
    Own {
        /// Something was written into it, so that there is a token.
        filled: bool,
    },
    Object {
        /// It is not in the store.
        pending: bool,
    },
    Map,
    Scratch,
}

/// What a name in a directory would be.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Attribute,
    Object,
    Own,
    Token,
    Scratch,
}

/// What a file, or a descriptor's copy of it, holds.
#[derive(Clone, Debug, Default)]
struct Buffer {
    now: Vec<u8>,
    /// What it held when it was closed last, while it is being written.
    closed: Option<Vec<u8>>,
    has_been_closed: bool,
    writing: usize,
}

impl Buffer {
    /// Whoever goes on to write into it says so when he is done.
    fn settle(&mut self) {
        self.closed = (self.writing > 0).then(|| self.now.clone());
    }
}

#[derive(Clone, Debug)]
struct Fd {
    node: Id,
    bytes: usize,
    how: How,
    /// It was opened as scratch, whose bytes are everybody's.
    shared: bool,
    position: u64,
    written: bool,
    /// What was said of what was written last.
    error: Answer,
    resized: bool,
    /// That is all that was done, and this was its value then: another value came later.
    cut: Option<Option<Vec<u8>>>,
    /// The scratch file is being written through it.
    changing: bool,
    refused: bool,
    /// What was to be committed was refused, and is tried once more when it is synced.
    uncommitted: bool,
    appended: Option<usize>,
    /// The file has no name any more, or another one: what is done through it reaches nothing.
    detached: bool,
}

/// A model of a mounted store.
#[derive(Clone, Debug)]
pub struct Model {
    nodes: Vec<Node>,
    parents: Vec<Option<Id>>,
    buffers: Vec<Buffer>,
    fds: Vec<Option<Fd>>,
    is_db: bool,
    mask: u32,
}

/// A store's content: tokens by name, and their objects.
pub type Content = BTreeMap<String, BTreeMap<String, Attributes>>;

/// The name under which the token's own attributes are in a [`Content`].
pub const OWN: &str = "token";

const ROOT: Id = 0;

impl Model {
    pub fn new(is_db: bool, mask: u32, content: &Content) -> Self {
        let mut model = Self {
            nodes: vec![Node::Directory(Role::Root, BTreeMap::new())],
            parents: vec![None],
            buffers: Vec::new(),
            fds: vec![None; DESCRIPTORS + 1],
            is_db,
            mask,
        };
        for (token, objects) in content {
            let directory = model.add_directory(ROOT, token, Role::Token { building: false });
            for (object, attributes) in objects {
                let role = match object.as_str() {
                    OWN => Role::Own { filled: true },
                    _ => Role::Object { pending: false },
                };
                let object = model.add_directory(directory, object, role);
                model.fill(object, attributes);
            }
        }
        model
    }

    // ------------------------------------------------------------------------------------------ the tree

    fn add(&mut self, parent: Id, name: &str, node: Node) -> Id {
        self.nodes.push(node);
        self.parents.push(Some(parent));
        let id = self.nodes.len() - 1;
        self.names_mut(parent).insert(name.to_owned(), id);
        id
    }

    fn add_directory(&mut self, parent: Id, name: &str, role: Role) -> Id {
        self.add(parent, name, Node::Directory(role, BTreeMap::new()))
    }

    /// Makes the values of an object or a map files.
    fn fill(&mut self, directory: Id, attributes: &Attributes) {
        for (key, value) in attributes.iter() {
            let name = name::file_name(key);
            if let Value::Map(entries) = value {
                let map = self.add_directory(directory, &name, Role::Map);
                self.fill(map, entries);
            } else {
                let bytes = self.buffer(Vec::new());
                let value = Some(value.clone());
                self.add(directory, &name, Node::Attribute { value, bytes });
            }
        }
    }

    fn buffer(&mut self, bytes: Vec<u8>) -> usize {
        self.buffers.push(Buffer {
            now: bytes,
            has_been_closed: true,
            ..Buffer::default()
        });
        self.buffers.len() - 1
    }

    fn names(&self, id: Id) -> Option<&BTreeMap<String, Id>> {
        match &self.nodes[id] {
            Node::Directory(_, names) => Some(names),
            _ => None,
        }
    }

    fn names_mut(&mut self, id: Id) -> &mut BTreeMap<String, Id> {
        match &mut self.nodes[id] {
            Node::Directory(_, names) => names,
            _ => panic!("not a directory"),
        }
    }

    fn role(&self, id: Id) -> Option<Role> {
        match self.nodes[id] {
            Node::Directory(role, _) => Some(role),
            _ => None,
        }
    }

    fn is_directory(&self, id: Id) -> bool {
        self.role(id).is_some()
    }

    fn find(&self, path: &str) -> Answer<Id> {
        let mut at = ROOT;
        for name in path.split('/') {
            at = *self.names(at).ok_or(ENOTDIR)?.get(name).ok_or(ENOENT)?;
        }
        Ok(at)
    }

    fn find_parent<'a>(&self, path: &'a str) -> Answer<(Id, &'a str)> {
        let (directory, name) = match path.rsplit_once('/') {
            Some((directory, name)) => (self.find(directory)?, name),
            None => (ROOT, path),
        };
        if !self.is_directory(directory) {
            return Err(ENOTDIR);
        }
        Ok((directory, name))
    }

    fn named(&self, directory: Id, name: &str) -> Option<Id> {
        self.names(directory)?.get(name).copied()
    }

    fn is_scratch(&self, id: Id) -> bool {
        matches!(
            self.nodes[id],
            Node::Scratch { .. } | Node::Directory(Role::Scratch, _)
        )
    }

    /// What is listed: scratch is in scratch directories only.
    fn listed(&self, directory: Id) -> BTreeMap<String, Id> {
        let names = self.names(directory).cloned().unwrap_or_default();
        let in_scratch = self.is_scratch(directory);
        let shown = |id: &Id| in_scratch || !self.is_scratch(*id);
        names.into_iter().filter(|(_, id)| shown(id)).collect()
    }

    /// The directory and those above it.
    fn above(&self, id: Id) -> impl Iterator<Item = Id> {
        std::iter::successors(Some(id), |id| self.parents[*id])
    }

    fn object_of(&self, id: Id) -> Option<Id> {
        self.above(id)
            .find(|id| matches!(self.role(*id), Some(Role::Object { .. } | Role::Own { .. })))
    }

    fn token_of(&self, id: Id) -> Option<Id> {
        self.above(id)
            .find(|id| matches!(self.role(*id), Some(Role::Token { .. })))
    }

    /// Takes a name away; what is open below it reaches nothing any more.
    fn take_away(&mut self, directory: Id, name: &str) -> Option<Id> {
        let id = self.names_mut(directory).remove(name)?;
        self.parents[id] = None;
        self.detach(id);
        Some(id)
    }

    fn detach(&mut self, id: Id) {
        let below: Vec<Id> = (0..self.nodes.len())
            .filter(|node| self.above(*node).any(|above| above == id))
            .collect();
        for fd in self.fds.iter_mut().flatten() {
            if below.contains(&fd.node) {
                fd.detached = true;
            }
        }
    }

    fn put_at(&mut self, directory: Id, name: &str, id: Id) {
        self.take_away(directory, name);
        self.names_mut(directory).insert(name.to_owned(), id);
        self.parents[id] = Some(directory);
    }

    fn text_of(&self, id: Id) -> Vec<u8> {
        match &self.nodes[id] {
            Node::Attribute {
                value: Some(value), ..
            } => {
                let key = self.key_of(id);
                let text = render(key.attribute_type, value, Context::default());
                text.unwrap().into_owned()
            }
            Node::Attribute { value: None, bytes } | Node::Scratch { bytes } => {
                self.buffers[*bytes].now.clone()
            }
            Node::Directory(..) => panic!("a directory"),
        }
    }

    /// What becomes an attribute of a scratch file: what it held when it was closed last.
    fn complete(&self, bytes: usize) -> Vec<u8> {
        let buffer = &self.buffers[bytes];
        buffer.closed.as_ref().unwrap_or(&buffer.now).clone()
    }

    fn name_of(&self, id: Id) -> String {
        let parent = self.parents[id].expect("a name");
        let names = self.names(parent).unwrap();
        names
            .iter()
            .find(|(_, named)| **named == id)
            .map(|(name, _)| name.clone())
            .unwrap()
    }

    fn key_of(&self, id: Id) -> AttributeKey {
        key(&self.name_of(id)).expect("an attribute")
    }

    /// The values in an object or a map.
    fn values(&self, directory: Id) -> Attributes {
        let mut attributes = Attributes::new();
        for (name, id) in self.names(directory).unwrap() {
            let value = match &self.nodes[*id] {
                Node::Attribute { value, .. } => value.clone(),
                Node::Directory(Role::Map, _) => Some(Value::Map(self.values(*id))),
                _ => None,
            };
            if let (Some(value), Some(key)) = (value, key(name)) {
                attributes.insert(key.attribute_type, value);
            }
        }
        attributes
    }

    /// What would be called `name` in `directory`.
    fn place(&self, directory: Id, name: &str, is_directory: bool) -> Answer<Place> {
        let hidden = name.starts_with('.');
        let parsed = name::parse(name.as_bytes());
        match self.role(directory).ok_or(ENOTDIR)? {
            Role::Scratch => Ok(Place::Scratch),
            Role::Root | Role::Token { .. } if !is_directory => match parsed {
                // It can only be meant to stay, and what stays is a directory.
                Name::Scratch if name == OWN || uuid::Uuid::try_parse(name).is_ok() => Err(EINVAL),
                Name::Scratch => Ok(Place::Scratch),
                _ => Err(EINVAL),
            },
            Role::Root | Role::Token { .. } if hidden => Ok(Place::Scratch),
            Role::Root => Ok(Place::Token),
            Role::Token { .. } if name == OWN => Ok(Place::Own),
            Role::Token { .. } => match parsed {
                Name::Scratch => Ok(Place::Object),
                _ => Err(EINVAL),
            },
            role @ (Role::Object { .. } | Role::Own { .. } | Role::Map) => match parsed {
                Name::Attribute(key) if (key.kind == Kind::Map) != is_directory => Err(EINVAL),
                Name::Attribute(key) if key.kind == Kind::Map && role == Role::Map => Err(EINVAL),
                Name::Attribute(_) => Ok(Place::Attribute),
                Name::Scratch if !is_directory || hidden => Ok(Place::Scratch),
                _ => Err(EINVAL),
            },
        }
    }

    /// That an attribute can be called `name`: its type is not there with another kind and a value.
    fn check_kind(&self, directory: Id, name: &str) -> Answer {
        let wanted = key(name).unwrap();
        let other = |(key, _): (AttributeKey, &Value)| {
            key.attribute_type == wanted.attribute_type && key != wanted
        };
        match self.values(directory).iter().any(other) {
            true => Err(EEXIST),
            false => Ok(()),
        }
    }

    /// That the object that `directory` is in could hold what `change` makes of the values in `directory`.
    fn check_object(&self, directory: Id, change: impl FnOnce(&mut Attributes)) -> Answer {
        let object = self.object_of(directory).unwrap();
        let old = self.values(object);
        let mut new = old.clone();
        if object == directory {
            change(&mut new);
        } else if let Some(map) = key(&self.name_of(directory))
            && let Some(entries) = new.map_mut(map.attribute_type)
        {
            change(entries);
        }
        self.check(object, Some(&old), &new)
    }

    /// What may become of an object that was `old`: one that is finished is private if it does not say that it is not.
    fn check(&self, object: Id, old: Option<&Attributes>, new: &Attributes) -> Answer {
        let checked = match &self.nodes[object] {
            Node::Directory(Role::Object { pending: false }, _) => {
                validate::check_finished(old, new)
            }
            _ => validate::check(old, new),
        };
        checked.map_err(|_| EINVAL)
    }

    /// Gives the attribute `name` a value; the node that has it then.
    fn set_value(&mut self, directory: Id, name: &str, value: Value) -> Answer {
        self.check_kind(directory, name)?;
        let key = key(name).unwrap();
        self.check_object(directory, |new| {
            new.insert(key.attribute_type, value.clone());
        })?;
        let object = self.object_of(directory).unwrap();
        if let Node::Directory(Role::Own { filled }, _) = &mut self.nodes[object] {
            *filled = true;
        }
        if let Value::Map(entries) = value {
            self.take_away(directory, name);
            let map = self.add_directory(directory, name, Role::Map);
            self.fill(map, &entries);
            return Ok(());
        }
        match self.named(directory, name) {
            Some(id) => match &mut self.nodes[id] {
                Node::Attribute { value: old, .. } => *old = Some(value),
                _ => panic!("no attribute"),
            },
            None => {
                let bytes = self.buffer(Vec::new());
                let value = Some(value);
                self.add(directory, name, Node::Attribute { value, bytes });
            }
        }
        Ok(())
    }

    /// Makes a text the value of an attribute that is there.
    fn commit(&mut self, id: Id, text: &[u8]) -> Answer {
        let value = parse(self.key_of(id), text, Context::default()).map_err(|_| EINVAL)?;
        let (directory, name) = (self.parents[id].unwrap(), self.name_of(id));
        self.set_value(directory, &name, value)
    }

    // -------------------------------------------------------------------------------------- descriptors

    pub fn is_open(&self, fd: usize) -> bool {
        self.fds[fd].is_some()
    }

    pub fn is_writer(&self, fd: usize) -> bool {
        self.fds[fd].as_ref().is_some_and(|fd| fd.how.write)
    }

    /// Whether what is done through a descriptor reaches nothing.
    pub fn is_detached(&self, fd: usize) -> bool {
        self.fds[fd].as_ref().is_some_and(|fd| fd.detached)
    }

    fn fd(&mut self, fd: usize) -> &mut Fd {
        self.fds[fd].as_mut().unwrap()
    }

    pub fn open(&mut self, fd: usize, path: &str, how: How) -> Answer {
        let (directory, name) = self.find_parent(path)?;
        let node = match self.named(directory, name) {
            Some(_) if how.exclusive => return Err(EEXIST),
            Some(id) if self.is_directory(id) => return Err(EISDIR),
            Some(id) => id,
            None if !how.create => return Err(ENOENT),
            None => {
                let place = self.place(directory, name, false)?;
                if place == Place::Attribute {
                    self.check_kind(directory, name)?;
                }
                let bytes = self.buffer(Vec::new());
                self.buffers[bytes].has_been_closed = false;
                let node = match place {
                    Place::Scratch => Node::Scratch { bytes },
                    _ => Node::Attribute { value: None, bytes },
                };
                let node = self.add(directory, name, node);
                self.insert_fd(fd, node, bytes, how, place == Place::Scratch, false);
                return Ok(());
            }
        };
        if let Node::Scratch { bytes } = self.nodes[node] {
            self.insert_fd(fd, node, bytes, how, true, false);
            if how.truncate {
                self.set_length(fd, 0)?;
            }
            return Ok(());
        }
        let text = self.text_of(node);
        let resized = how.truncate && !text.is_empty();
        let copy = if how.truncate { Vec::new() } else { text };
        let bytes = self.buffer(copy);
        let was = self.value_text(node);
        self.insert_fd(fd, node, bytes, how, false, resized);
        self.fd(fd).cut = resized.then_some(was);
        Ok(())
    }

    fn value_text(&self, id: Id) -> Option<Vec<u8>> {
        let has_value = matches!(self.nodes[id], Node::Attribute { value: Some(_), .. });
        has_value.then(|| self.text_of(id))
    }

    fn insert_fd(
        &mut self,
        fd: usize,
        node: Id,
        bytes: usize,
        how: How,
        shared: bool,
        resized: bool,
    ) {
        self.fds[fd] = Some(Fd {
            node,
            bytes,
            how,
            shared,
            position: 0,
            written: false,
            error: Ok(()),
            resized,
            cut: None,
            changing: false,
            refused: false,
            appended: None,
            uncommitted: false,
            detached: false,
        });
    }

    pub fn write(&mut self, fd: usize, data: &[u8]) -> Answer {
        let position = self.fd(fd).position;
        self.write_at(fd, position, data)?;
        let length = self.buffers[self.fds[fd].as_ref().unwrap().bytes].now.len() as u64;
        let fd = self.fd(fd);
        if data.is_empty() {
            return Ok(());
        }
        fd.position = if fd.how.append {
            length
        } else {
            position + data.len() as u64
        };
        Ok(())
    }

    pub fn write_at(&mut self, fd: usize, at: u64, data: &[u8]) -> Answer {
        let open = self.fds[fd].clone().unwrap();
        if data.is_empty() {
            return Ok(());
        }
        let old = self.buffers[open.bytes].now.clone();
        let start = if open.how.append {
            old.len()
        } else {
            at as usize
        };
        let end = start + data.len();
        let mut new = old;
        new.resize(new.len().max(end), 0);
        new[start..end].copy_from_slice(data);
        let is_attribute = matches!(self.nodes[open.node], Node::Attribute { .. });
        if is_attribute && !open.shared && !open.detached {
            let is_whole = start == 0 && new.len() == data.len();
            let refused = self.is_refused(open.node, &new, is_whole);
            if refused {
                let fd = self.fd(fd);
                (fd.refused, fd.uncommitted) = (true, false);
                if fd.written {
                    // What was written before it is no value, either.
                    fd.error = Err(EINVAL);
                }
                return Err(EINVAL);
            }
        }
        self.begin(fd);
        self.buffers[open.bytes].now = new;
        let fd = self.fd(fd);
        (fd.refused, fd.uncommitted) = (false, false);
        fd.appended = match open.appended {
            _ if !open.how.append || open.resized || open.shared => None,
            Some(appended) => Some(appended + data.len()),
            None if open.written => None,
            None => Some(data.len()),
        };
        fd.written = true;
        fd.cut = None;
        fd.error = Ok(());
        Ok(())
    }

    /// Whether it can be told of a text already that it is no value, and not the first part of one either.
    fn is_refused(&self, id: Id, text: &[u8], is_whole: bool) -> bool {
        let key = self.key_of(id);
        let directory = self.parents[id].unwrap();
        let is_own = self.object_of(directory) == Some(directory);
        let with = |value: Value| {
            self.check_object(directory, |new| {
                new.insert(key.attribute_type, value);
            })
        };
        if key.kind == Kind::Bytes {
            let is_finished = matches!(
                self.nodes[directory],
                Node::Directory(Role::Object { pending: false }, _)
            );
            let is_text = text.len() >= 4 && text.is_ascii() && !text.contains(&0);
            let may_tell = is_whole && is_own && is_finished && is_text;
            return may_tell && with(Value::Bytes(text.to_vec())).is_err();
        }
        match parse(key, text, Context::default()) {
            Ok(value @ Value::Bool(true)) => {
                key.attribute_type == pkcs11::CKA_PRIVATE && is_own && with(value).is_err()
            }
            parsed if text.ends_with(b"\n") => parsed.is_err(),
            _ if is_whole => check_beginning(key, text, Context::default()).is_err(),
            _ => false,
        }
    }

    pub fn read(&mut self, fd: usize) -> Answer<Vec<u8>> {
        let bytes = self.fd(fd).bytes;
        Ok(self.buffers[bytes].now.clone())
    }

    pub fn close_duplicate(&mut self, fd: usize) -> Answer {
        if self.fd(fd).written && !self.fd(fd).refused {
            return self.commit_fd(fd);
        }
        // What was refused is, until something else is written.
        self.fd(fd).error
    }

    fn commit_fd(&mut self, fd: usize) -> Answer {
        let open = self.fds[fd].clone().unwrap();
        let outcome = match self.nodes[open.node] {
            _ if open.detached => Ok(()),
            Node::Attribute { .. }
                if !open.shared
                    && open
                        .cut
                        .as_ref()
                        .is_some_and(|was| *was != self.value_text(open.node)) =>
            {
                Ok(())
            }
            Node::Attribute { .. } => {
                let own = self.buffers[open.bytes].now.clone();
                let text = match open.appended {
                    // What others made of it meanwhile stays.
                    Some(appended) => {
                        let has_value = matches!(
                            &self.nodes[open.node],
                            Node::Attribute { value: Some(_), .. }
                        );
                        let mut text = if has_value {
                            self.text_of(open.node)
                        } else {
                            Vec::new()
                        };
                        text.extend(&own[own.len() - appended..]);
                        text
                    }
                    None => own,
                };
                self.commit(open.node, &text)
            }
            Node::Scratch { bytes }
                if !open.shared
                    && open.cut.as_ref().is_some_and(|was| {
                        was.clone().unwrap_or_default() != self.complete(bytes)
                    }) =>
            {
                Ok(())
            }
            // It was an attribute when it was opened.
            Node::Scratch { bytes } if !open.shared => {
                let own = self.buffers[open.bytes].now.clone();
                match open.appended {
                    Some(appended) => {
                        let appended = &own[own.len() - appended..];
                        self.buffers[bytes].now.extend(appended);
                    }
                    None => self.buffers[bytes].now = own,
                }
                self.buffers[bytes].settle();
                Ok(())
            }
            _ => {
                self.end(fd);
                Ok(())
            }
        };
        let fd = self.fd(fd);
        if outcome.is_ok() {
            (fd.resized, fd.appended, fd.cut) = (false, None, None);
        } else {
            // It is committed with what is written next.
            fd.resized |= open.written && open.appended.is_none();
        }
        fd.written = false;
        fd.uncommitted = outcome.is_err();
        fd.refused = outcome.is_err();
        fd.error = outcome;
        outcome
    }

    pub fn close(&mut self, fd: usize) -> Answer {
        let outcome = self.close_duplicate(fd);
        // The last one: what nobody hears of any more.
        let open = self.fds[fd].clone().unwrap();
        if open.how.write && !open.detached {
            let fresh = matches!(self.nodes[open.node], Node::Attribute { value: None, .. });
            let others = self.fds.iter().enumerate().any(|(other, opened)| {
                let same =
                    |opened: &Fd| opened.node == open.node && !opened.detached && opened.how.write;
                other != fd && opened.as_ref().is_some_and(same)
            });
            if open.refused {
                if fresh && !open.shared && !others {
                    let (directory, name) = (self.parents[open.node], self.name_of(open.node));
                    self.take_away(directory.unwrap(), &name);
                }
            } else if open.written || open.resized {
                let _ = self.commit_fd(fd);
            } else if fresh && !open.shared {
                if !self.buffers[open.bytes].now.is_empty() {
                    // What has been written by who was at it is nothing that anybody else means.
                    if !others {
                        let (directory, name) = (self.parents[open.node], self.name_of(open.node));
                        self.take_away(directory.unwrap(), &name);
                    }
                } else if parse(self.key_of(open.node), b"", Context::default()).is_ok() {
                    let _ = self.commit_fd(fd);
                }
            }
        }
        self.end(fd);
        self.fds[fd] = None;
        outcome
    }

    /// A scratch file is going to be changed through this descriptor.
    fn begin(&mut self, fd: usize) {
        let fd = self.fds[fd].as_mut().unwrap();
        if !fd.shared || std::mem::replace(&mut fd.changing, true) {
            return;
        }
        let buffer = &mut self.buffers[fd.bytes];
        if buffer.writing == 0 && buffer.has_been_closed {
            buffer.closed = Some(buffer.now.clone());
        }
        buffer.writing += 1;
    }

    /// It is complete as it is.
    fn end(&mut self, fd: usize) {
        let fd = self.fds[fd].as_mut().unwrap();
        let buffer = &mut self.buffers[fd.bytes];
        if std::mem::take(&mut fd.changing) {
            buffer.writing -= 1;
            buffer.has_been_closed = true;
            buffer.settle();
        } else {
            buffer.has_been_closed |= buffer.writing == 0;
        }
    }

    pub fn set_length(&mut self, fd: usize, length: u64) -> Answer {
        let bytes = self.fd(fd).bytes;
        let same = self.buffers[bytes].now.len() as u64 == length;
        if !same {
            self.begin(fd);
        }
        self.buffers[bytes].now.resize(length as usize, 0);
        let node = self.fd(fd).node;
        let was = match self.nodes[node] {
            Node::Attribute { .. } if self.parents[node].is_some() => Some(self.value_text(node)),
            _ => None,
        };
        let fd = self.fd(fd);
        if !same || fd.refused {
            let is_all = !fd.written && (!fd.resized || fd.cut.is_some());
            fd.cut = was.filter(|_| is_all);
            fd.resized = true;
            fd.appended = None;
            (fd.refused, fd.uncommitted, fd.error) = (false, false, Ok(()));
        }
        Ok(())
    }

    pub fn sync(&mut self, fd: usize) -> Answer {
        // One file of an object that is being made does not make it whole.
        let open = self.fd(fd);
        if open.resized && !open.refused || open.uncommitted {
            return self.commit_fd(fd);
        }
        self.close_duplicate(fd)
    }

    // ------------------------------------------------------------------------------------------- by path

    pub fn truncate(&mut self, path: &str, length: u64) -> Answer {
        let id = self.find(path)?;
        if self.is_directory(id) {
            return Err(EISDIR);
        }
        let writers = self.writers_without_value(id);
        if !writers.is_empty() {
            // It gets what is left of it from who is writing it.
            for fd in writers {
                self.set_length(fd, length)?;
            }
            return Ok(());
        }
        let mut text = self.text_of(id);
        if text.len() as u64 == length {
            return Ok(());
        }
        text.resize(length as usize, 0);
        if let Node::Scratch { bytes } = self.nodes[id] {
            self.buffers[bytes].now = text;
            self.buffers[bytes].settle();
            return Ok(());
        }
        self.commit(id, &text)
    }

    /// Through which descriptors a file is being written that has no value yet.
    fn writers_without_value(&self, id: Id) -> Vec<usize> {
        if !matches!(self.nodes[id], Node::Attribute { value: None, .. }) {
            return Vec::new();
        }
        let fds = self.fds.iter().enumerate();
        fds.filter_map(|(number, fd)| {
            let fd = fd.as_ref()?;
            let is_its = fd.node == id && fd.how.write && !fd.detached && fd.written;
            is_its.then_some(number)
        })
        .collect()
    }

    pub fn unlink(&mut self, path: &str) -> Answer {
        let (directory, name) = self.find_parent(path)?;
        let id = self.named(directory, name).ok_or(ENOENT)?;
        if self.is_directory(id) {
            return Err(EISDIR);
        }
        self.take_away(directory, name);
        Ok(())
    }

    pub fn make_dir(&mut self, path: &str) -> Answer {
        let (directory, name) = self.find_parent(path)?;
        if self.named(directory, name).is_some() {
            return Err(EEXIST);
        }
        let role = match self.place(directory, name, true)? {
            Place::Attribute => {
                return self.set_value(directory, name, Value::Map(Attributes::new()));
            }
            Place::Object => {
                self.check_object_name(name)?;
                Role::Object { pending: true }
            }
            Place::Own => Role::Own { filled: false },
            Place::Token => Role::Token { building: true },
            Place::Scratch => Role::Scratch,
        };
        self.add_directory(directory, name, role);
        Ok(())
    }

    fn check_object_name(&self, name: &str) -> Answer {
        match self.is_db && uuid::Uuid::parse_str(name).is_err() {
            true => Err(EINVAL),
            false => Ok(()),
        }
    }

    pub fn remove_dir(&mut self, path: &str) -> Answer {
        let (directory, name) = self.find_parent(path)?;
        let id = self.named(directory, name).ok_or(ENOENT)?;
        if !self.is_directory(id) {
            return Err(ENOTDIR);
        }
        if !self.listed(id).is_empty() {
            return Err(ENOTEMPTY);
        }
        self.take_away(directory, name);
        Ok(())
    }

    pub fn rename(&mut self, from: &str, to: &str) -> Answer {
        let (from_directory, from_name) = self.find_parent(from)?;
        let (to_directory, to_name) = self.find_parent(to)?;
        let id = self.named(from_directory, from_name).ok_or(ENOENT)?;
        let is_directory = self.is_directory(id);
        if let Some(replaced) = self.named(to_directory, to_name) {
            if replaced == id {
                return Ok(());
            }
            match (is_directory, self.is_directory(replaced)) {
                (true, true) if !self.listed(replaced).is_empty() => return Err(ENOTEMPTY),
                (true, false) => return Err(ENOTDIR),
                (false, true) => return Err(EISDIR),
                _ => {}
            }
        }
        if matches!(self.role(id), Some(Role::Token { .. })) {
            self.place(to_directory, to_name, true)?;
            return Err(EXDEV);
        }
        let place = self.place(to_directory, to_name, is_directory)?;
        match (self.nodes[id].clone(), place) {
            (Node::Scratch { bytes }, Place::Attribute) => {
                let text = self.complete(bytes);
                let key = key(to_name).unwrap();
                let value = parse(key, &text, Context::default()).map_err(|_| EINVAL)?;
                self.set_value(to_directory, to_name, value.clone())?;
                // Who has it open goes on to write into the attribute.
                self.names_mut(from_directory).remove(from_name);
                self.put_at(to_directory, to_name, id);
                let value = Some(value);
                self.nodes[id] = Node::Attribute { value, bytes };
            }
            (Node::Directory(Role::Scratch, _), Place::Attribute) => {
                let entries = self.parse_scratch(id, true)?;
                self.set_value(to_directory, to_name, Value::Map(entries))?;
                let map = self.named(to_directory, to_name).unwrap();
                self.keep_scratch(id, map);
                self.take_away(from_directory, from_name);
            }
            (Node::Scratch { .. } | Node::Directory(Role::Scratch, _), Place::Scratch) => {
                self.names_mut(from_directory).remove(from_name);
                self.put_at(to_directory, to_name, id);
            }
            (Node::Directory(Role::Scratch, _), Place::Object) => {
                let attributes = self.parse_scratch(id, false)?;
                self.check_object_name(to_name)?;
                validate::check_finished(None, &attributes).map_err(|_| EINVAL)?;
                self.take_away(to_directory, to_name);
                let pending = attributes.is_empty();
                // Who has a file in it open goes on to write into the attribute.
                self.become_attributes(id, &attributes, Role::Object { pending });
                self.names_mut(from_directory).remove(from_name);
                self.put_at(to_directory, to_name, id);
            }
            (Node::Attribute { .. } | Node::Directory(Role::Map, _), Place::Attribute) => {
                if self.object_of(from_directory) != self.object_of(to_directory) {
                    return Err(EXDEV);
                }
                self.move_value(id, to_directory, to_name)?;
            }
            (Node::Directory(Role::Object { .. }, _), Place::Object) => {
                if from_directory != to_directory {
                    return Err(EXDEV);
                }
                self.check_object_name(to_name)?;
                self.names_mut(from_directory).remove(from_name);
                self.put_at(to_directory, to_name, id);
            }
            (Node::Directory(Role::Object { .. }, _), Place::Scratch)
                if from_directory != to_directory =>
            {
                return Err(EXDEV);
            }
            (
                Node::Attribute { .. } | Node::Directory(Role::Map | Role::Object { .. }, _),
                Place::Scratch,
            ) => {
                if let Node::Directory(Role::Object { pending: false }, _) = self.nodes[id] {
                    self.check_can_come_back(id)?;
                }
                // Who has a file of it open goes on to write into that.
                self.become_scratch(id);
                self.names_mut(from_directory).remove(from_name);
                self.put_at(to_directory, to_name, id);
            }
            _ => return Err(EXDEV),
        }
        Ok(())
    }

    /// What is taken out of the store can be put back as it is.
    fn check_can_come_back(&self, object: Id) -> Answer {
        let values = self.values(object);
        let checked = validate::check_finished(None, &values);
        checked
            .and_then(|()| validate::check(None, &values))
            .map_err(|_| EINVAL)?;
        self.check_without_value(object)
    }

    /// No file in it lacks a value that has none which is empty.
    fn check_without_value(&self, directory: Id) -> Answer {
        for id in self.names(directory).unwrap().values() {
            match &self.nodes[*id] {
                Node::Attribute { value: None, .. } => {
                    parse(self.key_of(*id), b"", Context::default()).map_err(|_| EINVAL)?;
                }
                Node::Directory(Role::Map, _) => self.check_without_value(*id)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// The attributes that the files of a scratch directory are.
    fn parse_scratch(&self, directory: Id, is_map: bool) -> Answer<Attributes> {
        let mut attributes = Attributes::new();
        for (name, id) in self.names(directory).unwrap() {
            let key = match name::parse(name.as_bytes()) {
                Name::Attribute(key) => key,
                Name::Scratch => continue,
                Name::Impossible => return Err(EINVAL),
            };
            let value = match (&self.nodes[*id], key.kind) {
                (Node::Directory(..), Kind::Map) if !is_map => {
                    Value::Map(self.parse_scratch(*id, true)?)
                }
                (Node::Directory(..), _) | (_, Kind::Map) => return Err(EINVAL),
                (Node::Scratch { bytes }, _) => {
                    parse(key, &self.complete(*bytes), Context::default()).map_err(|_| EINVAL)?
                }
                _ => parse(key, &self.text_of(*id), Context::default()).map_err(|_| EINVAL)?,
            };
            if attributes.of_type(key.attribute_type).is_some() {
                return Err(EEXIST);
            }
            attributes.insert(key.attribute_type, value);
        }
        Ok(attributes)
    }

    fn move_value(&mut self, id: Id, to_directory: Id, to_name: &str) -> Answer {
        let (from_directory, from_name) = (self.parents[id].unwrap(), self.name_of(id));
        let target = key(to_name).unwrap();
        let value = match &self.nodes[id] {
            // A name is all that it would be.
            Node::Attribute { value: None, .. } => return Err(EINVAL),
            Node::Attribute { .. } => {
                parse(target, &self.text_of(id), Context::default()).map_err(|_| EINVAL)?
            }
            _ => Value::Map(self.values(id)),
        };
        // All or nothing.
        let before = self.clone();
        self.names_mut(from_directory).remove(&from_name);
        let object = self.object_of(from_directory).unwrap();
        let outcome = self.check_kind(to_directory, to_name).and_then(|()| {
            let mut new = self.values(object);
            if to_directory == object {
                new.insert(target.attribute_type, value.clone());
            } else {
                let map = key(&self.name_of(to_directory)).unwrap();
                let entries = new.map_mut(map.attribute_type).unwrap();
                entries.insert(target.attribute_type, value.clone());
            }
            self.check(object, Some(&before.values(object)), &new)
        });
        if outcome.is_err() {
            *self = before;
            return outcome;
        }
        self.put_at(to_directory, to_name, id);
        if let Node::Attribute { value: old, .. } = &mut self.nodes[id] {
            *old = Some(value);
        }
        Ok(())
    }

    /// What is in a scratch directory and no attribute goes along into the object or map that this becomes.
    fn keep_scratch(&mut self, from: Id, to: Id) {
        for (name, id) in self.names(from).cloned().unwrap_or_default() {
            if let Name::Scratch = name::parse(name.as_bytes()) {
                self.names_mut(from).remove(&name);
                self.put_at(to, &name, id);
            } else if self.is_directory(id)
                && let Some(map) = self.named(to, &name)
            {
                self.keep_scratch(id, map);
            }
        }
    }

    /// A scratch directory becomes an object, or a map in it, of these attributes. What is scratch in it stays scratch.
    fn become_attributes(&mut self, directory: Id, attributes: &Attributes, becomes: Role) {
        for (name, id) in self.names(directory).cloned().unwrap() {
            let Name::Attribute(key) = name::parse(name.as_bytes()) else {
                continue;
            };
            match (attributes.get(key), &self.nodes[id]) {
                (Some(Value::Map(entries)), _) => self.become_attributes(id, entries, Role::Map),
                (Some(value), Node::Scratch { bytes }) => {
                    let (value, bytes) = (Some(value.clone()), *bytes);
                    self.nodes[id] = Node::Attribute { value, bytes };
                }
                _ => {}
            }
        }
        if let Node::Directory(role, _) = &mut self.nodes[directory] {
            *role = becomes;
        }
    }

    fn become_scratch(&mut self, id: Id) {
        if let Node::Attribute { .. } = self.nodes[id] {
            let text = match self.writers_without_value(id).is_empty() {
                true => self.text_of(id),
                // They go on to write all of it there.
                false => Vec::new(),
            };
            let bytes = self.buffer(text);
            self.nodes[id] = Node::Scratch { bytes };
        } else {
            let names = self.names(id).cloned().unwrap();
            for below in names
                .into_values()
                .filter(|id| !self.is_scratch(*id))
                .collect::<Vec<_>>()
            {
                self.become_scratch(below);
            }
            if let Node::Directory(role, _) = &mut self.nodes[id] {
                *role = Role::Scratch;
            }
        }
    }

    // ------------------------------------------------------------------------------- modes, times, stores

    /// The mode that a path has after `chmod`.
    pub fn mode_after(&self, path: &str, mode: u32) -> Answer<u32> {
        let id = self.find(path)?;
        let kept = mode & !self.mask;
        Ok(match self.nodes[id] {
            Node::Directory(Role::Scratch | Role::Token { .. }, _) => kept,
            Node::Directory(..) => {
                let file = kept & 0o666;
                file | (file & 0o444) >> 2
            }
            _ => kept & 0o666,
        })
    }

    /// Sets the times of a path; whether they are seen then.
    pub fn set_times(&mut self, path: &str) -> Answer<bool> {
        let id = self.find(path)?;
        if self.role(id) == Some(Role::Object { pending: true }) {
            if self.is_nothing(id) {
                return Ok(false);
            }
            self.store(id);
        }
        Ok(true)
    }

    /// Whether nothing was put into an object, but directories.
    fn is_nothing(&self, object: Id) -> bool {
        let is_empty = |value: &Value| matches!(value, Value::Map(entries) if entries.is_empty());
        self.values(object).iter().all(|(_, value)| is_empty(value))
    }

    fn store(&mut self, object: Id) {
        if let Node::Directory(Role::Object { pending }, _) = &mut self.nodes[object] {
            *pending = false;
        }
    }

    pub fn sync_dir(&mut self, path: &str) -> Answer {
        let id = self.find(path)?;
        match self.role(id).ok_or(ENOTDIR)? {
            Role::Object { .. } if self.is_nothing(id) => {}
            Role::Object { .. } => self.store(id),
            Role::Token { .. } => {
                for object in self.listed(id).into_values() {
                    // What nothing was put into is no object.
                    if !self.is_nothing(object) {
                        self.store(object);
                    }
                }
                self.publish(id);
                if self.has_objects_alone(id) {
                    return Err(EINVAL);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether a directory in the root has objects, and is no token.
    fn has_objects_alone(&self, id: Id) -> bool {
        let is_stored = |object: &Id| self.role(*object) == Some(Role::Object { pending: false });
        self.role(id) == Some(Role::Token { building: true })
            && !self.is_token(id)
            && self.listed(id).values().any(is_stored)
    }

    /// The directories in the root that are no tokens and have something in them: the mount does not end with one.
    pub fn unfinished(&self) -> Vec<String> {
        let tokens = self.listed(ROOT).into_iter();
        let is_one = |(_, id): &(String, Id)| !self.is_token(*id) && !self.listed(*id).is_empty();
        tokens.filter(is_one).map(|(token, _)| token).collect()
    }

    /// Whether a directory in the root has what makes it a token.
    fn is_token(&self, id: Id) -> bool {
        self.named(id, OWN)
            .is_some_and(|own| self.role(own) == Some(Role::Own { filled: true }))
    }

    fn publish(&mut self, id: Id) {
        if self.is_token(id)
            && let Node::Directory(Role::Token { building }, _) = &mut self.nodes[id]
        {
            *building = false;
        }
    }

    pub fn leave_alone(&mut self) {
        for token in self.listed(ROOT).into_values() {
            self.publish(token);
        }
        for object in 0..self.nodes.len() {
            let is_pending = self.role(object) == Some(Role::Object { pending: true });
            if !is_pending || self.parents[object].is_none() {
                continue;
            }
            let is_open = self.fds.iter().flatten().any(|fd| {
                fd.how.write && !fd.detached && self.above(fd.node).any(|above| above == object)
            });
            let values = self.values(object);
            let is_whole = [pkcs11::CKA_CLASS, pkcs11::CKA_PRIVATE]
                .iter()
                .all(|needed| values.of_type(*needed).is_some());
            if !is_open && is_whole {
                self.store(object);
            }
        }
    }

    /// The mount ends: nothing is open.
    pub fn remount(&mut self) {
        *self = Self::new(self.is_db, self.mask, &self.content());
    }

    pub fn list(&self, path: &str) -> Answer<BTreeSet<String>> {
        let id = self.find(path)?;
        if !self.is_directory(id) {
            return Err(ENOTDIR);
        }
        Ok(self.listed(id).into_keys().collect())
    }

    /// Whether it is a directory, and the size of a file.
    pub fn stat(&self, path: &str) -> Answer<(bool, u64)> {
        let id = self.find(path)?;
        Ok(match self.is_directory(id) {
            true => (true, 0),
            false => (false, self.text_of(id).len() as u64),
        })
    }

    pub fn text(&self, path: &str) -> Answer<Vec<u8>> {
        let id = self.find(path)?;
        match self.is_directory(id) {
            true => Err(EISDIR),
            false => Ok(self.text_of(id)),
        }
    }

    /// What the store holds once everything is settled.
    pub fn content(&self) -> Content {
        // The end of the mount does not write what is no object.
        let is_lacking = |id| {
            let private = self.values(id).of_type(pkcs11::CKA_PRIVATE).is_some();
            self.role(id) == Some(Role::Object { pending: true }) && !private
        };
        self.objects(|id| !is_lacking(id), |id| self.is_token(id))
    }

    /// The objects that are in the store now, with the values that they show.
    pub fn stored(&self) -> Content {
        let is_there = |id| self.role(id) == Some(Role::Token { building: false });
        let is_stored = |id| self.role(id) != Some(Role::Object { pending: true });
        self.objects(is_stored, is_there)
    }

    fn objects(&self, is_wanted: impl Fn(Id) -> bool, is_token: impl Fn(Id) -> bool) -> Content {
        let tokens = self.listed(ROOT).into_iter();
        tokens
            .filter(|(_, id)| is_token(*id))
            .map(|(token, id)| {
                let objects = self.listed(id).into_iter();
                let wanted = objects.filter(|(_, id)| self.role(*id).is_some() && is_wanted(*id));
                let objects = wanted.map(|(object, id)| (object, self.values(id)));
                (token, objects.collect())
            })
            .collect()
    }

    /// The files that have no value yet.
    pub fn without_value(&self) -> Vec<String> {
        let mut paths = Vec::new();
        for (id, node) in self.nodes.iter().enumerate() {
            let mut names = Vec::new();
            let mut at = id;
            while let Some(parent) = self.parents[at] {
                names.push(self.name_of(at));
                at = parent;
            }
            names.reverse();
            if at == ROOT && matches!(node, Node::Attribute { value: None, .. }) {
                paths.push(names.join("/"));
            }
        }
        paths
    }

    /// All paths that are listed, and the content of those that are files.
    pub fn tree(&self) -> BTreeMap<String, Option<Vec<u8>>> {
        let mut tree = BTreeMap::new();
        self.add_to(&mut tree, ROOT, "");
        tree
    }

    fn add_to(&self, tree: &mut BTreeMap<String, Option<Vec<u8>>>, directory: Id, path: &str) {
        for (name, id) in self.listed(directory) {
            let path = match path {
                "" => name,
                _ => format!("{path}/{name}"),
            };
            if self.is_directory(id) {
                tree.insert(path.clone(), None);
                self.add_to(tree, id, &path);
            } else {
                tree.insert(path, Some(self.text_of(id)));
            }
        }
    }
}

fn key(name: &str) -> Option<AttributeKey> {
    match name::parse(name.as_bytes()) {
        Name::Attribute(key) => Some(key),
        _ => None,
    }
}
