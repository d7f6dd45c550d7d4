//! The token's `generation`: the number by which a running SoftHSM notices that objects were made or removed.
//!
//! It is raised under its own write lock, after the files are in place or gone, and never goes back. 2.6.1 unlocks it before its
//! buffer has reached the file, in `C_Initialize` too: what it writes then can undo a raise of ours. So a raise is looked
//! at once more a moment later, and made again if anybody has written since.
//!
//! A SoftHSM that makes or destroys an object takes the number that it writes for one that it has read by (`Generation::commit`), whatever others have
//! raised before it: what they have made and removed since it has looked stays unseen by it until the next raise. So each change of ours is told
//! once more when somebody else is the first to raise the number after it ([`Told`]).

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::stat::{FileStat, Mode, fstat};

use super::attire::{create_flags, set_access_if_possible};
use super::guard::unlink_if_there;
use super::read::open_regular;
use super::{GENERATION, TOKEN_OBJECT};
use crate::error::{Error, ErrorKind, Result};
use crate::store::crash::point;
use crate::store::{Access, Patience, lock};

/// How long after an unlock a SoftHSM's buffer is waited for. It writes right after it has unlocked.
const FLUSHED: Duration = Duration::from_millis(1);

/// How often a raise is made again.
const AGAIN: usize = 5;

/// The number that was written with the last change of ours, as long as nobody else is known to have raised it since.
///
/// It is told once more and not more often, so that two mounts of one store do not answer each other for ever.
#[derive(Debug, Default)]
pub(super) struct Told(Mutex<Option<u64>>);

impl Told {
    fn get(&self) -> MutexGuard<'_, Option<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody else has raised the number since our last change, and may have stepped over it.
    ///
    /// # Errors
    /// What reading the number fails with.
    pub fn is_passed(&self, directory: BorrowedFd<'_>) -> Result<bool> {
        // Held while it is read, so that a number of ours is no other one's.
        let told = self.get();
        let Some(ours) = *told else {
            return Ok(false);
        };
        let flags = nix::fcntl::OFlag::O_RDONLY;
        let generation = match open_regular(directory, Path::new(GENERATION), flags) {
            Ok(generation) => generation,
            // The token is removed; or whoever makes the next change makes another number.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        // Nothing is in it while it is written; there is more to come then.
        Ok(Generation(generation)
            .read()?
            .is_some_and(|present| present != ours))
    }

    /// It is about to be told once more. Whoever changes anything from now on begins anew.
    ///
    /// # Errors
    /// As [`Generation::lock`] and [`Locked::raise`]; then it is still to be told.
    pub fn tell_again(&self, directory: BorrowedFd<'_>, patience: Patience) -> Result<()> {
        let ours = self.get().take();
        let locked = Generation::lock_present(directory, patience);
        let locked = locked.map(|generation| Locked {
            directory,
            generation,
        });
        match locked.and_then(|locked| locked.raise(None, patience)) {
            // The token has been removed meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => {
                let mut told = self.get();
                *told = told.or(ours);
                Err(error)
            }
            Ok(()) => Ok(()),
        }
    }
}

/// The file `generation` of a token, open and not locked.
#[derive(Debug)]
pub(super) struct Generation(File);

impl Generation {
    /// Opens it, and makes it where there is none.
    ///
    /// # Errors
    /// What opening or making it fails with.
    pub fn open(directory: BorrowedFd<'_>) -> Result<Self> {
        let name = Path::new(GENERATION);
        loop {
            match open_regular(directory, name, nix::fcntl::OFlag::O_RDWR) {
                Ok(file) => return Ok(Self(file)),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            let made = nix::fcntl::openat(
                directory,
                name,
                create_flags(),
                Mode::from_bits_truncate(0o600),
            );
            match made {
                Ok(fd) => {
                    let file = File::from(fd);
                    point("file.generation.made");
                    // As everything that belongs to the token as a whole.
                    if let Ok(stat) = nix::sys::stat::fstatat(
                        directory,
                        TOKEN_OBJECT,
                        nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW,
                    ) {
                        set_access_if_possible(&file, super::attire::access_of(&stat));
                    }
                    return Ok(Self(file));
                }
                Err(nix::errno::Errno::EEXIST) => {
                    // Made by somebody else meanwhile, unless it is a link or a directory: then opening says so.
                    open_regular(directory, name, nix::fcntl::OFlag::O_RDWR)?;
                }
                Err(errno) => return Err(Error::system("make generation", errno)),
            }
        }
    }

    /// Makes one in the place of whatever has its name: SoftHSM makes one in each directory when it starts, and who the directory of a token that is being built
    /// belongs to can have put anything there, which is not to be given to him.
    fn make_anew(directory: BorrowedFd<'_>) -> Result<Self> {
        let flags = create_flags();
        for _ in 0..AGAIN {
            unlink_if_there(directory, Path::new(GENERATION))?;
            match nix::fcntl::openat(
                directory,
                GENERATION,
                flags,
                Mode::from_bits_truncate(0o600),
            ) {
                Ok(fd) => {
                    point("file.generation.made");
                    return Ok(Self(File::from(fd)));
                }
                Err(nix::errno::Errno::EEXIST) => {}
                Err(errno) => return Err(Error::system("make generation", errno)),
            }
        }
        Err(Error::new(
            ErrorKind::Busy,
            "somebody makes the file generation all the while",
        ))
    }

    /// Makes the one of a token that is about to be published.
    ///
    /// # Errors
    /// What making it fails with.
    pub fn begin(directory: BorrowedFd<'_>, access: Access) -> Result<()> {
        let generation = Self::make_anew(directory)?;
        super::attire::set_access(&generation.0, access)?;
        point("file.generation.begun");
        lock::lock_exclusive(&generation.0, Patience::at_most(Duration::from_secs(1)))?;
        if generation.read()?.is_none() {
            // One of that name can have been there before.
            generation.write(microseconds())?;
        }
        Ok(())
    }

    /// Takes its write lock, which nobody waits with for anything: what is to be told is done while it is held, and can then be told without another wait.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if somebody holds it; what opening it fails with.
    pub fn lock(directory: BorrowedFd<'_>, patience: Patience) -> Result<Locked<'_>> {
        let generation = Self::open(directory)?;
        lock::lock_exclusive(&generation.0, patience)?;
        Ok(Locked {
            directory,
            generation,
        })
    }

    /// One that is there, open and locked.
    fn lock_present(directory: BorrowedFd<'_>, patience: Patience) -> Result<Self> {
        let present = Self::open_present(directory)?;
        lock::lock_exclusive(&present.0, patience)?;
        Ok(present)
    }

    /// Opens it where there is one.
    fn open_present(directory: BorrowedFd<'_>) -> Result<Self> {
        open_regular(directory, Path::new(GENERATION), nix::fcntl::OFlag::O_RDWR).map(Self)
    }

    /// Writes a number that it has not had, at least `at_least`; and which that is. It is not the next one: a SoftHSM whose buffer is still to be written has
    /// that in it, and nobody could tell the two apart.
    fn write_next(&self, at_least: u64, told: Option<&Told>) -> Result<u64> {
        // Where there is no number, one that nobody can have had: time goes on, too.
        let present = self.read()?.unwrap_or_else(microseconds);
        let next = present.max(at_least).checked_add(2).unwrap_or(1);
        {
            let mut told = told.map(Told::get);
            self.write(next)?;
            if let Some(told) = &mut told {
                **told = Some(next);
            }
        }
        point("file.generation.raised");
        Ok(next)
    }

    fn stat(&self) -> Result<FileStat> {
        fstat(&self.0).map_err(|errno| Error::system("stat generation", errno))
    }

    /// The number, if there is one.
    fn read(&self) -> Result<Option<u64>> {
        let mut buffer = [0; 8];
        match self.0.read_exact_at(&mut buffer, 0) {
            Ok(()) => Ok(Some(u64::from_be_bytes(buffer))),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(Error::io("read generation", &error)),
        }
    }

    fn write(&self, number: u64) -> Result<()> {
        self.0
            .write_all_at(&number.to_be_bytes(), 0)
            .map_err(|error| Error::io("write generation", &error))
    }
}

/// The file `generation` of a token, locked exclusively.
#[derive(Debug)]
pub(super) struct Locked<'a> {
    directory: BorrowedFd<'a>,
    generation: Generation,
}

impl Locked<'_> {
    /// Raises the number, remembers it in `told`, and lets go of the lock.
    ///
    /// # Errors
    /// What writing fails with, and then nobody has been told.
    pub fn raise(self, told: Option<&Told>, patience: Patience) -> Result<()> {
        let Self {
            directory,
            generation,
        } = self;
        let mut next = generation.write_next(0, told)?;
        let mut written = generation.stat();
        // Lets go of the lock.
        drop(generation);
        // It has been raised, and others have heard: whatever fails from here on is no reason to believe otherwise.
        for _ in 0..AGAIN {
            thread::sleep(FLUSHED);
            let seen = Generation::open_present(directory)
                .and_then(|later| Ok((later.stat()?, later.read()?)));
            let (Ok(before), Ok((stat, number))) = (&written, seen) else {
                return Ok(());
            };
            let untouched = (before.st_ino, before.st_mtime, before.st_mtime_nsec)
                == (stat.st_ino, stat.st_mtime, stat.st_mtime_nsec);
            if untouched && number == Some(next) {
                return Ok(());
            }
            let Ok(again) = Generation::lock_present(directory, patience) else {
                return Ok(());
            };
            let Ok(raised) = again.write_next(next, told) else {
                return Ok(());
            };
            next = raised;
            written = again.stat();
        }
        // Others go on raising it: what they write is another number each time.
        Ok(())
    }
}

/// A number that no generation can have had before.
pub(super) fn microseconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_micros()).unwrap_or(0))
}
