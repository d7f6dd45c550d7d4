//! The operations that read: what `stat`, `open`, `read` and `readdir` ask.

use std::ffi::{OsStr, OsString};
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::body::Body;
use super::handle::{Handle, HandleId, OpenedFor, Place, Writer};
use super::inode::{Inode, InodeTable};
use super::node::{Ino, Node, ROOT};
use super::publish::access_of;
use super::remove::Attending;
use super::write::Scratched;
use super::{
    Answer, Attributes, Entry, FileKind, Look, NAME_MAX, OpenForWriting, Tree, by_label, lock, view,
};
use crate::error::{Error, ErrorKind, Result};
use crate::store::Patience;

/// How long an answer can take to be made, and still be remembered: well below what [`Tree::stale`] says things again after.
const LONG_AGO: Duration = Duration::from_millis(20);

/// From how many bytes on what is open for reading is counted.
const LARGE: usize = 1024 * 1024;

/// How much memory that may take, in bytes.
const MOST_READ: u64 = 1024 * 1024 * 1024;

impl Tree {
    /// Looks `name` up in the directory `parent`. The answer counts as one that has to be taken back with
    /// [`Tree::forget`].
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::NotADirectory`], [`ErrorKind::NameTooLong`], and what the store fails with.
    pub fn lookup(&self, parent: Ino, name: &OsStr, patience: Patience) -> Result<Entry> {
        if name.len() > NAME_MAX {
            return Err(Error::new(ErrorKind::NameTooLong, "the name is too long"));
        }
        self.wherever(parent, patience, |directory| {
            let _at_it = Attending::while_looking(self, directory, name);
            let look = self.noted(
                self.child(directory, name, patience)
                    .and_then(|node| self.look(node, patience)),
            )?;
            self.answer((parent, directory), look)
                .map(|answer| answer.entry)
        })
    }

    /// Counts what was found in a directory, if that is there still: whoever renames it takes along what has been answered.
    pub(super) fn answer(&self, (parent, directory): (Ino, &Node), look: Look) -> Result<Answer> {
        let mut inodes = lock(&self.inodes);
        if inodes
            .get(parent)
            .is_some_and(|inode| inode.node != *directory)
        {
            return Err(Error::not_found("it was renamed meanwhile"));
        }
        if let Node::Scratch(id) = look.node
            && lock(&self.scratch).get(id).is_err()
        {
            // It is something else now, which has its number.
            return Err(Error::not_found("it was renamed meanwhile"));
        }
        let before = inodes.told(inodes.number(&look.node));
        let mut entry = look.entry;
        entry.attributes.ino = tell(&mut inodes, parent, &look);
        Ok(Answer { entry, before })
    }

    /// The kernel was not told after all, since there was no room for it in the reply.
    pub fn take_back_answer(&self, answer: Answer) {
        let ino = answer.entry.attributes.ino;
        lock(&self.inodes).untell(ino, answer.before);
    }

    /// Counts an answer about something in the directory `parent`, which stays where it is; the answer, with the number that it was counted under.
    pub(super) fn tell(&self, parent: Ino, look: &Look) -> Entry {
        let mut entry = look.entry;
        entry.attributes.ino = tell(&mut lock(&self.inodes), parent, look);
        entry
    }

    /// Takes back `count` answers that named `ino`.
    pub fn forget(&self, ino: Ino, count: u64) {
        lock(&self.inodes).forget(ino, count);
    }

    /// What `stat` says to the process `pid`: who is writing a file sees the size that it has for them, and who has something open that is
    /// gone by now sees what it was. (The kernel does not say through which descriptor `fstat` asks.)
    ///
    /// # Errors
    /// As [`Tree::attributes`].
    pub fn attributes_for(&self, ino: Ino, pid: u32, patience: Patience) -> Result<Entry> {
        let mut entry = match self.attributes(ino, patience) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let is_orphan = self.is_orphan(ino);
                let mut attributes = self.at_open(ino, pid, is_orphan).ok_or(error)?;
                let told = lock(&self.inodes).get(ino).and_then(|inode| inode.told);
                if let Some(told) = told.filter(|_| is_orphan) {
                    // Who may open it is decided as it was when it lost its name.
                    attributes = Attributes {
                        mode: told.mode,
                        uid: told.uid,
                        gid: told.gid,
                        ..attributes
                    };
                }
                return Ok(Entry {
                    attributes,
                    valid: Duration::ZERO,
                    generation: 0,
                });
            }
            answer => answer?,
        };
        if entry.attributes.kind == FileKind::File {
            let node = self.node(ino)?;
            let (is_written, size) = self.written_size(&node, pid);
            if is_written {
                entry.valid = Duration::ZERO;
            }
            match size {
                Some(size) => entry.attributes.size = size,
                None => self.as_opened(ino, &node, pid, &mut entry),
            }
        }
        Ok(entry)
    }

    /// Whether it has lost its name, and is still open; what is not open any more is adopted ([`InodeTable::adopt`]). (Who opens files by a name that others rename files to all the while comes by one after the
    /// other that is not there any more, and the kernel looks the name up anew only once.)
    pub(super) fn is_orphan(&self, ino: Ino) -> bool {
        let mut inodes = lock(&self.inodes);
        let is_orphan = |inode: &Inode| inode.is_orphan;
        if !inodes.get(ino).is_some_and(is_orphan) {
            return false;
        }
        let is_open = lock(&self.handles).is_open(ino);
        if !is_open {
            inodes.adopt(ino);
        }
        is_open
    }

    /// What `stat` says of an open file: its size is that of the copy that is read and written through `handle`, and it says it of
    /// one that is unlinked too.
    ///
    /// # Errors
    /// As [`Tree::attributes`].
    pub fn open_attributes(&self, ino: Ino, handle: HandleId, patience: Patience) -> Result<Entry> {
        let opened = match lock(&self.handles).get(handle) {
            Some(Handle::Content(content, attributes)) => Some((*attributes, content.len() as u64)),
            Some(Handle::Writer(writer) | Handle::Shared(writer)) => {
                Some((writer.attributes, writer.size()))
            }
            _ => None,
        };
        let Some((at_open, size)) = opened else {
            return self.attributes(ino, patience);
        };
        let mut entry = match self.attributes(ino, patience) {
            Err(error) if error.kind() == ErrorKind::NotFound => Entry {
                attributes: Attributes { ino, ..at_open },
                valid: Duration::ZERO,
                generation: 0,
            },
            answer => answer?,
        };
        if entry.attributes.kind == FileKind::File && entry.attributes.size != size {
            entry.attributes.size = size;
            entry.valid = Duration::ZERO;
        }
        Ok(entry)
    }

    /// What `stat` says.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it is gone by now, and what the store fails with.
    pub fn attributes(&self, ino: Ino, patience: Patience) -> Result<Entry> {
        if self.is_orphan(ino) {
            return Err(Error::not_found("it has lost its name"));
        }
        self.wherever(ino, patience, |node| {
            let mut look = self.noted(self.look(node.clone(), patience))?;
            look.entry.attributes.ino = ino;
            let mut inodes = lock(&self.inodes);
            if inodes.get(ino).is_some_and(|inode| inode.node != *node) {
                return Err(Error::not_found("it was renamed meanwhile"));
            }
            // Under a number that is not its own, which comes of a rename onto it, nobody would find it to say that it has changed.
            if inodes.number(&look.node) != ino {
                look.entry.valid = Duration::ZERO;
            }
            if let Some(inode) = inodes.get_mut(ino) {
                inode.tell(look.seen);
                inode.told = Some(access_of(&look.entry.attributes));
                inode.told_size = Some(look.entry.attributes.size);
            }
            Ok(look.entry)
        })
    }

    pub(super) fn look(&self, node: Node, patience: Patience) -> Result<Look> {
        let begun = Instant::now();
        self.wait_until_closed(&node, patience)?;
        self.look_since(begun, node, patience)
    }

    /// The same without waiting for what is just being closed, which may have to wait for who asks.
    pub(super) fn look_now(&self, node: Node, patience: Patience) -> Result<Look> {
        self.look_since(Instant::now(), node, patience)
    }

    fn look_since(&self, begun: Instant, node: Node, patience: Patience) -> Result<Look> {
        let (mut attributes, seen) = self.describe(&node, patience)?;
        let generation = {
            let inodes = lock(&self.inodes);
            attributes.ino = inodes.number(&node);
            inodes.generation(attributes.ino)
        };
        // A change that was reported meanwhile is reported once more a moment later, for answers that are on their way. One that took
        // longer than that, in a thread that had to wait or on a machine that is busy, may be old news that nobody takes back.
        let valid = if begun.elapsed() > LONG_AGO || self.is_open_otherwise(&node, &attributes) {
            Duration::ZERO
        } else {
            self.validity(&node)
        };
        Ok(Look {
            entry: Entry {
                attributes,
                valid,
                generation,
            },
            node,
            seen,
        })
    }

    /// Where a symbolic link leads.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it is none (`readlink(2)`).
    pub fn read_link(&self, ino: Ino) -> Result<OsString> {
        match self.node(ino)? {
            Node::ObjectByLabel(token, object) => Ok(by_label::target(&token, &object)),
            _ => Err(Error::new(ErrorKind::Invalid, "not a symbolic link")),
        }
    }

    /// Opens a file for reading. What is read from it is the version that it was opened with, to the end.
    ///
    /// # Errors
    /// [`ErrorKind::IsADirectory`]; [`ErrorKind::NotFound`] if it is gone by now, and what the store fails with.
    pub fn open(&self, ino: Ino, patience: Patience) -> Result<HandleId> {
        // Until nobody has it open any more.
        while self.is_orphan(ino) {
            if let Some(reopened) = self.reopen(ino, None)? {
                return Ok(reopened);
            }
        }
        self.wherever(ino, patience, |node| {
            let handle = self.open_node(ino, node, patience)?;
            if self.node(ino)? == *node {
                return Ok(handle);
            }
            // What was opened may be another file that has its name by now.
            self.discard(handle);
            Err(Error::not_found("it was renamed meanwhile"))
        })
    }

    /// Opens a file once more that lost its name while it is open: by `/proc/self/fd`, or by a name that somebody was about to open. It is what
    /// somebody who has it open sees of it now, or, if all of them are in the middle of writing it, the value that it had under its name. What is written into it is seen
    /// through this descriptor alone. Nothing if nobody has it open.
    pub(super) fn reopen(
        &self,
        ino: Ino,
        for_writing: Option<OpenForWriting>,
    ) -> Result<Option<HandleId>> {
        let Some(open) = lock(&self.handles).open_content(ino) else {
            // It has just been closed.
            return Ok(None);
        };
        let attributes = open.told;
        // Of a file that never had a value that is all that there is.
        let named = (!open.is_whole).then(|| self.seen_content(ino)).flatten();
        let content = named.map_or(open.content, Arc::new);
        let Some(how) = for_writing else {
            let handle = self.open_handle(Handle::Content(content, attributes));
            return Ok(Some(handle));
        };
        let content = if how.truncate {
            Vec::new()
        } else {
            content.to_vec()
        };
        self.check_memory(content.len() as u64)?;
        let handle = self.open_handle(Handle::Writer(Arc::new(Writer {
            node: self.node(ino)?,
            attributes,
            append: AtomicBool::new(how.append),
            opened_for: OpenedFor::writing(how),
            content: Arc::new(Mutex::new(Body::open(content))),
            state: Mutex::default(),
            place: Mutex::new(Place::Gone),
            user: AtomicU32::new(0),
        })));
        lock(&self.handles).opened_by(handle, ino);
        Ok(Some(handle))
    }

    /// The value that a file had when the kernel was told of it last.
    fn seen_content(&self, ino: Ino) -> Option<Vec<u8>> {
        let (node, seen) = {
            let inodes = lock(&self.inodes);
            let inode = inodes.get(ino)?;
            (inode.node.clone(), inode.seen.clone()?)
        };
        view::content(&node, &seen).ok().flatten()
    }

    fn open_node(&self, ino: Ino, node: &Node, patience: Patience) -> Result<HandleId> {
        if let Node::Scratch(id) = node {
            return match self.open_scratch(node, *id, None)? {
                Scratched::Opened(handle) => {
                    lock(&self.handles).opened_by(handle, ino);
                    Ok(handle)
                }
                Scratched::Became(now) => self.open_node(ino, &now, patience),
            };
        }
        if let Node::FileInLayout(token, file) = node {
            let opened = self.open_in_layout(ino, token, file, patience);
            return self.noted(opened.map_err(|error| error.of(&self.path_of(node))));
        }
        self.wait_until_closed(node, patience)?;
        let (mut attributes, object) = self.noted(self.describe(node, patience))?;
        attributes.ino = ino;
        if attributes.kind == FileKind::Directory {
            return Err(Error::new(ErrorKind::IsADirectory, "a directory"));
        }
        self.check_told(ino, &attributes)?;
        let content = match object {
            None => self.control_file(node).into_bytes(),
            Some(object) => match self.fresh_content(node) {
                Some(content) if view::value(node, &object).is_none() => content,
                _ => self
                    .noted(view::content(node, &object))?
                    .ok_or_else(|| Error::new(ErrorKind::IsADirectory, "a directory"))?,
            },
        };
        let size = content.len() as u64;
        let content = self.shared(ino, content);
        let content = self.noted(content.map_err(|error| error.of(&self.path_of(node))))?;
        let handle = self.open_handle(Handle::Content(content, attributes));
        self.tell_of_opened(ino, size);
        Ok(handle)
    }

    /// The same content for all who read one version of a file, however often it is opened.
    ///
    /// # Errors
    /// `ENOMEM` if what is open for reading would take more memory than that may.
    pub(super) fn shared(&self, ino: Ino, content: Vec<u8>) -> Result<Arc<Vec<u8>>> {
        let latest = lock(&self.handles).latest_content(ino);
        if let Some(latest) = latest.filter(|latest| **latest == content) {
            return Ok(latest);
        }
        if content.len() >= LARGE
            && lock(&self.handles).read_size(LARGE) + content.len() as u64 > MOST_READ
        {
            let detail = format!(
                "what is open for reading has {} MiB at most; close some",
                MOST_READ / 1024 / 1024
            );
            return Err(Error::new(ErrorKind::System(libc::ENOMEM), detail));
        }
        Ok(Arc::new(content))
    }

    /// That who may open a file was decided by the mode and the owner that it has now. The kernel goes by those that it remembers; who may
    /// rename files in the store can give another one that name before it hears of it.
    ///
    /// # Errors
    /// [`ErrorKind::Stale`] if it has another owner, or fewer may have it now: the kernel asks for them anew, and decides again.
    pub(super) fn check_told(&self, ino: Ino, now: &Attributes) -> Result<()> {
        let Some(told) = lock(&self.inodes).get(ino).and_then(|inode| inode.told) else {
            return Ok(());
        };
        if (told.uid, told.gid) == (now.uid, now.gid) && told.mode & !now.mode & 0o777 == 0 {
            return Ok(());
        }
        let detail = "it has another mode or owner than a moment ago";
        Err(Error::new(ErrorKind::Stale, detail))
    }

    /// Reads at most `size` bytes at `offset`; fewer only at the end.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the handle is not known.
    pub fn read(&self, handle: HandleId, offset: u64, size: u32) -> Result<Vec<u8>> {
        let content = match lock(&self.handles).get(handle) {
            Some(Handle::Content(content, _)) => Arc::clone(content),
            Some(Handle::Writer(writer) | Handle::Shared(writer)) => {
                return Ok(slice(&lock(&writer.content), offset, size));
            }
            _ => return Err(Error::not_found("no such handle")),
        };
        Ok(slice(&content, offset, size))
    }

    /// The directory that `ino` is in.
    #[must_use]
    pub fn parent(&self, ino: Ino) -> Ino {
        lock(&self.inodes)
            .get(ino)
            .map_or(ROOT, |inode| inode.parent)
    }
}

/// Counts an answer.
fn tell(inodes: &mut InodeTable, parent: Ino, look: &Look) -> Ino {
    let ino = inodes.remember(&look.node, parent, look.seen.clone());
    if let Some(inode) = inodes.get_mut(ino) {
        inode.told = Some(access_of(&look.entry.attributes));
        inode.told_size = Some(look.entry.attributes.size);
    }
    ino
}

fn slice(content: &[u8], offset: u64, size: u32) -> Vec<u8> {
    let start = usize::try_from(offset)
        .unwrap_or(usize::MAX)
        .min(content.len());
    let end = start.saturating_add(size as usize).min(content.len());
    content.get(start..end).unwrap_or_default().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnostics::Diagnostics;
    use crate::store::attribute::{Attributes, Value};
    use crate::store::file::encode;
    use crate::store::{Options, Store};
    use crate::tree::{Caller, Creation, RenameHow, Settings};

    #[test]
    fn scratch_that_is_an_attribute_by_now_is_not_answered_as_scratch() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("t")).unwrap();
        let object: Attributes = [(0, Value::Ulong(0)), (2, Value::Bool(false))]
            .into_iter()
            .fold(Attributes::new(), |mut all, (attribute_type, value)| {
                all.insert(attribute_type, value);
                all
            });
        for name in ["token", "key"] {
            let path = dir.path().join("t").join(format!("{name}.object"));
            std::fs::write(path, encode(1, &object)).unwrap();
        }
        std::fs::write(dir.path().join("t/key.lock"), b"").unwrap();
        std::thread::sleep(Duration::from_millis(700));
        let log = Arc::new(Diagnostics::new());
        let store = Store::open(dir.path(), Options::default(), Arc::clone(&log)).unwrap();
        let tree = Tree::new(store, Settings::default(), log);
        let patient = || Patience::at_most(Duration::from_secs(5));
        let find = |at, name: &str| {
            let found = tree.lookup(at, OsStr::new(name), patient());
            found.unwrap().attributes.ino
        };
        let key = find(find(ROOT, "t"), "key");
        let (from, to) = (OsStr::new(".x"), OsStr::new("CKA_LABEL"));
        let caller = Caller {
            uid: 0,
            gid: 0,
            pid: std::process::id(),
        };
        let how = Creation {
            mode: 0o600,
            ..Creation::default()
        };
        let (_, handle) = tree.create(key, from, how, caller, patient()).unwrap();
        // Somebody is looking it up.
        let directory = tree.node(key).unwrap();
        let child = tree.child(&directory, from, patient()).unwrap();
        let look = tree.look(child, patient()).unwrap();
        tree.rename((key, from), (key, to), RenameHow::default(), patient())
            .unwrap();
        let answer = tree.answer((key, &directory), look);
        assert_eq!(answer.unwrap_err().kind(), ErrorKind::NotFound);
        // Who has it open goes on to write into the attribute.
        tree.write(handle, 0, b"value", patient()).unwrap();
        tree.flush(handle, patient()).unwrap();
        tree.release(handle, patient()).unwrap();
        let reader = tree.open(find(key, "CKA_LABEL"), patient()).unwrap();
        assert_eq!(tree.read(reader, 0, 100).unwrap(), b"value");
    }
}
