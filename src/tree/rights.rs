//! Who may do what, where the kernel cannot tell by the modes of the two directories that something is renamed between, or made in.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use super::entries::Caller;
use super::name::{self, Name};
use super::node::Node;
use super::publish::access_of;
use super::scratch::{Content, Scratch, ScratchId};
use super::{FileKind, Tree, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Access, Backend, ObjectId, Patience, TokenName};

impl Tree {
    /// That `caller` may write into the database of a `db` token. Of groups the kernel tells one; who has it as another one of theirs
    /// can copy instead, and is then looked at by the kernel.
    pub(super) fn check_may_write(
        &self,
        token: &TokenName,
        caller: Option<Caller>,
        patience: Patience,
    ) -> Result<()> {
        let Some(caller) = restrained(caller) else {
            return Ok(());
        };
        if self.token(token)?.backend() == Backend::File {
            return Ok(());
        }
        let own = ObjectId::Token;
        let database = self.ask(token, patience, |token| {
            token.object_metadata(&own, patience)
        })?;
        let database = Access {
            mode: database.mode & !self.settings.mask,
            uid: database.uid,
            gid: database.gid,
        };
        if may(caller, database, 0o2) {
            return Ok(());
        }
        Err(may_not_write())
    }

    /// The same of who makes an object step by step: in whatever groups they are, they have to be able to put something into it.
    pub(super) fn check_may_make(
        &self,
        token: &TokenName,
        caller: Caller,
        patience: Patience,
    ) -> Result<()> {
        let opened = self.token(token)?;
        if caller.uid == 0 || opened.backend() == Backend::File || self.store.is_building(token) {
            return Ok(());
        }
        let database = self.ask(token, patience, |token| {
            token.object_metadata(&ObjectId::Token, patience)
        })?;
        let mode = database.mode & !self.settings.mask;
        let needed = if caller.uid == database.uid {
            0o200
        } else {
            0o022
        };
        if mode & needed != 0 {
            return Ok(());
        }
        Err(may_not_write())
    }

    /// That `caller` may read what scratch holds that is to become a part of an object: whoever may read that can read it from then on.
    ///
    /// # Errors
    /// [`ErrorKind::PermissionDenied`].
    pub(super) fn check_may_read(&self, id: ScratchId, caller: Option<Caller>) -> Result<()> {
        let Some(caller) = restrained(caller) else {
            return Ok(());
        };
        let parts = parts(&lock(&self.scratch), id);
        if parts
            .iter()
            .all(|(kind, part)| may_read(caller, *kind, *part))
        {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::PermissionDenied,
            "who cannot read a scratch file does not make it a part of an object, which others can read",
        ))
    }

    /// That `caller` may read what he makes scratch of: otherwise he could not put it back, and the only copy would be in memory.
    ///
    /// # Errors
    /// [`ErrorKind::PermissionDenied`].
    pub(super) fn check_may_take(
        &self,
        node: &Node,
        caller: Option<Caller>,
        patience: Patience,
    ) -> Result<()> {
        let Some(caller) = restrained(caller) else {
            return Ok(());
        };
        let (attributes, _) = self.describe(node, patience)?;
        if may_read(caller, attributes.kind, access_of(&attributes)) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::PermissionDenied,
            "who cannot read this could not put it back, and does not make scratch of it",
        ))
    }
}

/// Mode and owner of what becomes a part of an object if this scratch does: of a file, or of a directory with all in it that has the name of an
/// attribute.
pub(super) fn parts(scratch: &Scratch, id: ScratchId) -> Vec<(FileKind, Access)> {
    let is_part = |name: &OsStr| matches!(name::parse(name.as_bytes()), Name::Attribute(_));
    let mut found = Vec::new();
    // Not by recursion: nobody says how deep directories are.
    let mut left = vec![id];
    while let Some(id) = left.pop() {
        let Ok(entry) = scratch.get(id) else {
            continue;
        };
        found.push((entry.kind(), entry.access));
        if let Content::Directory(names) = &entry.content {
            let inside = names.iter().filter(|(name, _)| is_part(name));
            left.extend(inside.map(|(_, id)| *id));
        }
    }
    found
}

/// What who reads has to have: of a directory, with what is in it.
fn to_read(kind: FileKind) -> u32 {
    match kind {
        FileKind::Directory => 0o5,
        _ => 0o4,
    }
}

/// Whether `caller` may read a file, or a directory with what is in it, or could give himself the right.
fn may_read(caller: Caller, kind: FileKind, part: Access) -> bool {
    part.uid == caller.uid || may(caller, part, to_read(kind))
}

/// What the kernel says of `caller` and these bits of one class (`path_resolution(7)`, "Permissions").
fn may(caller: Caller, access: Access, bits: u32) -> bool {
    let has = |class: u32| access.mode >> class & bits == bits;
    if caller.uid == access.uid {
        return has(6);
    }
    // Which groups he is in is asked only where that matters.
    match (has(3), has(0)) {
        (group, others) if group == others => group,
        (group, _) => group == caller.is_in(access.gid),
    }
}

/// Who is not root, whom no mode keeps out.
fn restrained(caller: Option<Caller>) -> Option<Caller> {
    caller.filter(|caller| caller.uid != 0)
}

/// The bits of those who cannot read `part`, and would if it were in an object of this mode: the store has one for all of it.
pub(super) fn closed_to(object: Access, kind: FileKind, part: Access) -> u32 {
    let needed = to_read(kind);
    let others = part.mode & needed == needed;
    let group = if part.gid == object.gid {
        part.mode >> 3 & needed == needed
    } else {
        others
    };
    (if group { 0 } else { 0o060 }) | (if others { 0 } else { 0o006 })
}

fn may_not_write() -> Error {
    Error::new(
        ErrorKind::PermissionDenied,
        "only who may write the token's database can put an object into it, or take one out",
    )
}
