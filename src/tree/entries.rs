//! What is made and removed: files, directories, and with them attributes, maps, objects and tokens.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::body::{Body, Bytes};
use super::draft::New;
use super::handle::State;
use super::makers::Makers;
use super::node::{Ino, Node};
use super::place::Place;
use super::scratch::Content;
use super::slot::Slot;
use super::write::OpenForWriting;
use super::write::Scratched;
use super::{Entry, FileKind, HandleId, Tree, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::{Attributes, Value};
use crate::store::{Access, Backend, ObjectId, ObjectName, Patience, TokenName};

/// Who makes something: it belongs to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Their user.
    pub uid: u32,
    /// Their group.
    pub gid: u32,
    /// Their process, 0 if it is not known.
    pub pid: u32,
}

impl Caller {
    /// Whether it is in a group: by its own, or by one of its others, which the kernel does not say. They are those of the process (`proc(5)`,
    /// "status"), if that can be seen from here.
    pub(super) fn is_in(self, gid: u32) -> bool {
        if self.gid == gid {
            return true;
        }
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid));
        let status = status.unwrap_or_default();
        let groups = status.lines().find_map(|line| line.strip_prefix("Groups:"));
        groups
            .unwrap_or_default()
            .split_whitespace()
            .any(|group| group.parse() == Ok(gid))
    }
}

/// How a file is created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Creation {
    /// The permission bits that are asked for, without those of the caller's umask.
    pub mode: u32,
    /// `O_EXCL`: there must not be one.
    pub exclusive: bool,
    /// Otherwise it is opened like this.
    pub open: OpenForWriting,
}

/// What is in a scratch directory.
#[derive(Clone, Debug)]
pub(super) struct ScratchFile {
    pub name: OsString,
    /// Nothing if it is a directory.
    pub content: Option<Vec<u8>>,
    pub node: Node,
}

impl Tree {
    /// Mode and owner of what `caller` makes in `directory` with the mode `mode`, of which only the bits in `most` can be had.
    fn access(
        &self,
        directory: &Node,
        mode: u32,
        most: u32,
        caller: Caller,
        patience: Patience,
    ) -> Result<Access> {
        let (parent, _) = self.describe(directory, patience)?;
        Ok(self.access_in(&parent, mode & most, caller))
    }

    fn access_in(&self, parent: &super::Attributes, mode: u32, caller: Caller) -> Access {
        let gid = if parent.mode & libc::S_ISGID == 0 {
            caller.gid
        } else {
            parent.gid
        };
        Access {
            mode: mode & !self.settings.mask,
            uid: caller.uid,
            gid,
        }
    }

    /// The same of a directory, which hands on its group if the one that it is made in does (`mkdir(2)`).
    fn access_of_directory(
        &self,
        directory: &Node,
        mode: u32,
        caller: Caller,
        patience: Patience,
    ) -> Result<Access> {
        let (parent, _) = self.describe(directory, patience)?;
        let access = self.access_in(&parent, mode & 0o777, caller);
        Ok(Access {
            mode: access.mode | hands_on(&parent),
            ..access
        })
    }

    /// That what `access` says can be made by this process: only root gives files away.
    pub(super) fn check_owner(&self, access: Access) -> Result<()> {
        if self.settings.uid != 0 && access.uid != self.settings.uid {
            return Err(Error::new(
                ErrorKind::NotPermitted,
                "what is made here would not belong to whoever makes it: only a mount by root can give files away",
            ));
        }
        Ok(())
    }

    /// Creates a file, or opens the one that is there.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] with `O_EXCL`, or if the type is there with another kind; [`ErrorKind::Invalid`] for a name that was
    /// meant as an attribute and is none; otherwise as [`Tree::open_for_writing`].
    pub fn create(
        &self,
        parent: Ino,
        name: &OsStr,
        how: Creation,
        caller: Caller,
        patience: Patience,
    ) -> Result<(Entry, HandleId)> {
        // Not in its place: who closes it may have to wait until it is not being renamed, and whoever renames it for us.
        if !lock(&self.closing).is_empty()
            && let Ok(node) = self.child(&self.node(parent)?, name, patience)
        {
            self.wait_until_closed(&node, patience)?;
        }
        self.in_place(parent, patience, |directory| {
            let created = self.create_in(directory, name, how, caller, patience);
            let (node, handle, is_new) = self.noted_entry(directory, name, created)?;
            match self.look_now(node.clone(), patience) {
                Ok(look) => Ok((self.tell(parent, &look), handle)),
                Err(error) => {
                    self.discard(handle);
                    if is_new {
                        self.take_back(directory, name, &node);
                    }
                    Err(error)
                }
            }
        })
    }

    /// What was just made and only the mount knows of is gone again, so that it can be tried anew.
    fn take_back(&self, directory: &Node, name: &OsStr, node: &Node) {
        match node {
            Node::Scratch(_) => lock(&self.scratch).remove(directory, name),
            Node::Object(token, id @ ObjectId::Object(_)) => {
                lock(&self.drafts).remove(&(token.clone(), id.clone()));
            }
            Node::Object(token, ObjectId::Token) => {
                let mut drafts = lock(&self.drafts);
                match drafts.build_mut(token) {
                    Some(build) => build.has_own = build.own_filled,
                    None => drafts.entry(&(token.clone(), ObjectId::Token)).gone = true,
                }
            }
            node => self.drop_fresh(node),
        }
    }

    fn create_in(
        &self,
        directory: &Node,
        name: &OsStr,
        how: Creation,
        caller: Caller,
        patience: Patience,
    ) -> Result<(Node, HandleId, bool)> {
        if let Some((node, _)) = self.existing(directory, name, patience)? {
            if how.exclusive {
                return Err(exists());
            }
            let handle = self.open_writer(&node, None, how.open, patience)?;
            return Ok((node, handle, false));
        }
        match self.place(directory, name, FileKind::File)? {
            Place::Attribute(node) => {
                let handle = self.create_attribute(&node, how, patience)?;
                Ok((node, handle, true))
            }
            Place::Scratch => {
                let access = self.access(directory, how.mode, 0o666, caller, patience)?;
                self.make_room_for_scratch();
                let made = lock(&self.scratch).make(
                    directory,
                    name,
                    Some(Body::open(Vec::new())),
                    access,
                )?;
                let node = Node::Scratch(made);
                let Scratched::Opened(handle) = self.open_scratch(&node, made, Some(how.open))?
                else {
                    return Err(Error::not_found("it has been renamed already"));
                };
                Ok((node, handle, true))
            }
            Place::Object(..) | Place::Own(_) | Place::Token(_) => {
                Err(Error::new(ErrorKind::Invalid, "a directory belongs there"))
            }
        }
    }

    /// A file for an attribute that is not there: it has no value before something is written into it.
    fn create_attribute(&self, node: &Node, how: Creation, patience: Patience) -> Result<HandleId> {
        let Some((token, id, slot)) = Slot::of(node) else {
            return Err(Error::new(ErrorKind::Invalid, "not an attribute"));
        };
        let object = self.object(token, id, patience)?;
        // That there is room for it: the map, and no other kind of the same type.
        slot.set(
            &mut object.attributes.clone(),
            Value::some_of(slot.key.kind),
        )?;
        self.check_entries()?;
        let bytes: Bytes = Arc::new(Mutex::new(Body::open(Vec::new())));
        {
            let mut drafts = lock(&self.drafts);
            let key = (token.clone(), id.clone());
            drafts.entry(&key).fresh.insert(slot, Arc::clone(&bytes));
            drafts.touch(&key);
        }
        let attributes = super::view::file(&object.metadata, self.settings.mask);
        Ok(self.insert_writer(node.clone(), attributes, how.open, bytes, State::default()))
    }

    /// Makes an empty file without opening it (`mknod`).
    ///
    /// # Errors
    /// As [`Tree::create`], with `O_EXCL`.
    pub fn make_file(
        &self,
        parent: Ino,
        name: &OsStr,
        mode: u32,
        caller: Caller,
        patience: Patience,
    ) -> Result<Entry> {
        let how = Creation {
            mode,
            exclusive: true,
            ..Creation::default()
        };
        let (entry, handle) = self.create(parent, name, how, caller, patience)?;
        self.discard(handle);
        Ok(entry)
    }

    /// Makes a directory: an attribute map; an object or a token, which are pending until they are finished; or scratch.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`]; [`ErrorKind::Invalid`] for a name that cannot be that of what belongs there;
    /// [`ErrorKind::NotPermitted`] if it could not belong to the caller; what the store fails with.
    pub fn make_dir(
        &self,
        parent: Ino,
        name: &OsStr,
        mode: u32,
        caller: Caller,
        patience: Patience,
    ) -> Result<Entry> {
        self.in_place(parent, patience, |directory| {
            // Who is writing into an object of that name, which is gone, does not write into the new one.
            let _shut = self.shut_object(directory, name, patience)?;
            let made = self.make_dir_in(directory, name, mode, caller, patience);
            let node = self.noted_entry(directory, name, made)?;
            // What the kernel knows by that name is a directory that somebody else removed. Told of the same one, it would find in it again
            // what anybody has open of that.
            if let Some(ino) = self.known_number(&node) {
                self.bury(ino);
            }
            // An attribute map is made at once in a token that is being built.
            let patience = match node {
                Node::Attribute(..) => self.to_see_through(patience),
                _ => patience,
            };
            match self.noted(self.look_now(node.clone(), patience)) {
                Ok(look) => Ok(self.tell(parent, &look)),
                Err(error) => {
                    self.take_back(directory, name, &node);
                    Err(error)
                }
            }
        })
    }

    fn make_dir_in(
        &self,
        directory: &Node,
        name: &OsStr,
        mode: u32,
        caller: Caller,
        patience: Patience,
    ) -> Result<Node> {
        if self.existing(directory, name, patience)?.is_some() {
            return Err(exists());
        }
        match self.place(directory, name, FileKind::Directory)? {
            Place::Attribute(node) => {
                self.commit_map(&node, &Attributes::new(), false, patience)?;
                Ok(node)
            }
            Place::Object(token, object) => {
                self.check_may_make(&token, caller, patience)?;
                let access = self.access(directory, mode, 0o666, caller, patience)?;
                self.abandon(&(token.clone(), ObjectId::Object(object.clone())));
                let maker = Some(caller.pid);
                self.begin_object(&token, &object, access, maker, patience)?;
                Ok(Node::Object(token, ObjectId::Object(object)))
            }
            Place::Own(token) => {
                let mut drafts = lock(&self.drafts);
                if let Some(build) = drafts.build_mut(&token) {
                    build.has_own = true;
                    build.makers.insert(caller.pid);
                }
                let key = (token.clone(), ObjectId::Token);
                if let Some(draft) = drafts.get_mut(&key) {
                    draft.gone = false;
                }
                drafts.touch(&key);
                Ok(Node::Object(token, ObjectId::Token))
            }
            Place::Token(token) => {
                let access = self.access_of_directory(directory, mode, caller, patience)?;
                self.check_owner(access)?;
                if matches!(patience, Patience::Now) {
                    // And for what a crash has left of one of that name.
                    let detail = "it has to be waited for the disk";
                    return Err(Error::new(ErrorKind::WouldBlock, detail));
                }
                let files = Access {
                    mode: access.mode & 0o666,
                    ..access
                };
                // Another one of that name, which somebody else has removed. (Not one that somebody else has just made.)
                if self.is_gone(&token) {
                    self.drop_pending(&token);
                }
                let made = self.store.create_token(&token, access, files);
                if matches!(&made, Err(error) if error.kind() == ErrorKind::Exists)
                    && self.token(&token).is_err()
                {
                    self.diagnostics.warning(format!(
                        "{token}: the tokendir has something of that name that is no token; `tokenfs check` says what it is"
                    ));
                }
                let made = made?;
                // And one of which only a directory was left.
                self.drop_pending(&token);
                let mut drafts = lock(&self.drafts);
                drafts.insert_build(token.clone(), caller.pid);
                // What is written into it a moment after its maker has finished is no change of the directory: rsync, which takes a
                // time of the same second for equal, does not set it again.
                if let Some(build) = drafts.build_mut(&token) {
                    build.mtime = made.metadata().ok().map(|metadata| metadata.mtime);
                }
                drop(drafts);
                Ok(Node::Token(token))
            }
            Place::Scratch => {
                let access = self.access_of_directory(directory, mode, caller, patience)?;
                self.make_room_for_scratch();
                let made = lock(&self.scratch).make(directory, name, None, access)?;
                Ok(Node::Scratch(made))
            }
        }
    }

    /// A new object, which is pending from now on.
    pub(super) fn begin_object(
        &self,
        token: &TokenName,
        object: &ObjectName,
        access: Access,
        maker: Option<u32>,
        patience: Patience,
    ) -> Result<()> {
        let opened = self.token(token)?;
        opened.check_name(object)?;
        // All objects of a database belong to the same user.
        if opened.backend() == Backend::File {
            self.check_owner(access)?;
        }
        let new = New {
            attributes: Attributes::new(),
            access,
            mtime: None,
            unwritten: BTreeSet::new(),
            makers: Makers::new(maker),
        };
        self.check_entries()?;
        let key = (token.clone(), ObjectId::Object(object.clone()));
        self.with_drafts(&key, patience, |drafts| {
            drafts.insert_new(key.clone(), new.clone());
            Ok(())
        })?;
        self.wake_when_left_alone();
        Ok(())
    }

    /// The files in a scratch directory with their content, and the directories in it.
    pub(super) fn scratch_files(&self, node: &Node) -> Result<Vec<ScratchFile>> {
        let scratch = lock(&self.scratch);
        let names = scratch
            .names(node)
            .ok_or_else(|| Error::new(ErrorKind::NotADirectory, "not a directory"))?;
        names
            .iter()
            .map(|(name, id)| {
                let content = match &scratch.get(*id)?.content {
                    Content::File(bytes) => Some(lock(bytes).complete().to_vec()),
                    Content::Directory(_) => None,
                };
                Ok(ScratchFile {
                    name: name.clone(),
                    content,
                    node: Node::Scratch(*id),
                })
            })
            .collect()
    }

    /// Records why something was not made or removed, with its name.
    pub(super) fn noted_entry<T>(
        &self,
        directory: &Node,
        name: &OsStr,
        outcome: Result<T>,
    ) -> Result<T> {
        outcome.map_err(|error| {
            let ordinary = matches!(
                error.kind(),
                ErrorKind::NotFound
                    | ErrorKind::Exists
                    | ErrorKind::NotEmpty
                    | ErrorKind::IsADirectory
                    | ErrorKind::NotADirectory
                    | ErrorKind::CrossDevice
                    | ErrorKind::WouldBlock
            );
            // What is named in the words of the tree is in the log already.
            if ordinary || error.path().is_some_and(Path::is_relative) {
                return error;
            }
            let error = match error.path() {
                Some(_) => Error::new(error.kind(), error.to_string()),
                None => error,
            };
            let error = error.at(self.path_of(directory).join(name));
            self.diagnostics.error(&error);
            error
        })
    }
}

pub(super) fn exists() -> Error {
    Error::new(ErrorKind::Exists, "there is something of that name")
}

/// The bit that a directory has, and those in it, if what is made in it belongs to its group.
pub(super) fn hands_on(directory: &super::Attributes) -> u32 {
    directory.mode & libc::S_ISGID
}
