//! Modes and owners that a copy gets: those of what it is a copy of, as far as this process may give them.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::BorrowedFd;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{getegid, geteuid};

use crate::store::file::set_access;
use crate::store::{Access, Metadata};

/// User and group.
type Owner = (u32, u32);

/// Which owners the files of a directory can be given. That is found out with a file that has no name: it depends on who this is, on
/// what a container lets root do, and on the file system.
#[derive(Debug)]
pub(super) struct Owners<'a> {
    directory: BorrowedFd<'a>,
    known: HashMap<Owner, Owner>,
}

impl<'a> Owners<'a> {
    /// Of what is made in `directory`.
    pub fn new(directory: BorrowedFd<'a>) -> Self {
        Self {
            directory,
            known: HashMap::new(),
        }
    }

    /// Of a copy of a directory, without the bits of `mask`.
    pub fn directory(&mut self, like: &Metadata, mask: u32) -> Access {
        self.access(like, 0o7777 & !mask)
    }

    /// Of a copy of a file, without the bits of `mask`, and those that no file of a store has a use for.
    pub fn file(&mut self, like: &Metadata, mask: u32) -> Access {
        self.access(like, 0o666 & !mask)
    }

    fn access(&mut self, like: &Metadata, bits: u32) -> Access {
        let wanted = (like.uid, like.gid);
        let (uid, gid) = self.nearest(wanted);
        let mut mode = like.mode & bits;
        if gid != like.gid {
            // Another group may do what everybody may.
            mode = (mode & !0o070) | (mode & ((mode & 0o007) << 3));
        }
        if (uid, gid) != wanted {
            mode &= 0o1777;
        }
        Access { mode, uid, gid }
    }

    /// The owner that is wanted, or else the group at least, or else what a file has that this process makes.
    fn nearest(&mut self, wanted: Owner) -> Owner {
        if let Some(known) = self.known.get(&wanted) {
            return *known;
        }
        let nearest = self.try_out(wanted).unwrap_or_else(|| {
            let (uid, gid) = (geteuid(), getegid());
            if uid.is_root() {
                wanted
            } else {
                (uid.as_raw(), gid.as_raw())
            }
        });
        self.known.insert(wanted, nearest);
        nearest
    }

    /// Nothing where the file system has no files without a name.
    fn try_out(&self, wanted: Owner) -> Option<Owner> {
        let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        let file = openat(self.directory, ".", flags, Mode::from_bits_truncate(0o600));
        let file = File::from(file.ok()?);
        let made = fstat(&file).ok()?;
        let can_be = |(uid, gid): &Owner| {
            let access = Access {
                mode: 0o600,
                uid: *uid,
                gid: *gid,
            };
            set_access(&file, access).is_ok()
        };
        let own = (made.st_uid, made.st_gid);
        [wanted, (own.0, wanted.1)]
            .into_iter()
            .find(can_be)
            .or(Some(own))
    }
}
