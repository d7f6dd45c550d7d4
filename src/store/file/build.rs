//! A token that is being built: its directory has everything but `token.object`, which has another name until it is
//! published. Nobody but this process looks at it, so that nothing is synced and no SoftHSM told.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::attire::{access_of, create_flags, set_access};
use super::encode::encode;
use super::generation::{Generation, microseconds};
use super::guard::{Temporary, stat_regular, sync};
use super::own;
use super::read::open_regular;
use super::{FileToken, TOKEN_LOCK, TOKEN_OBJECT};
use crate::diagnostics::Diagnostics;
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::Attributes;
use crate::store::crash::point;
use crate::store::rename::rename_to_free;
use crate::store::sync::sync_directory;
use crate::store::{Access, ObjectId, Options, Patience, TokenName};

/// How often a `token.object` that is in the way is looked at that has gone by then.
const ATTEMPTS: usize = 10;

/// Up to how many files are synced one by one. Beyond that, the whole file system is, which costs less.
const FEW: usize = 64;

impl FileToken {
    /// Begins a token in the empty directory `name` of `tokendir`: its own object, which holds nothing yet, is
    /// `token.tokenfs-new`, with the mode and owner `files`. Nothing is synced.
    ///
    /// # Errors
    /// What making it fails with.
    pub fn build(
        tokendir: BorrowedFd<'_>,
        name: TokenName,
        path: &Path,
        files: Access,
        options: Options,
        diagnostics: Arc<Diagnostics>,
    ) -> Result<Self> {
        let token = Self::open(tokendir, name, path, options, diagnostics)?;
        token.building.store(true, Ordering::Release);
        let names = token.names(&ObjectId::Token);
        let begun = || -> Result<()> {
            let mut own = Temporary::new(token.directory(), names.object())?;
            point("file.build.made");
            set_access(&own.file, files)?;
            point("file.build.dressed");
            // One of that name can have been there before.
            own.write(&encode(microseconds(), &Attributes::new()))?;
            point("file.build.written");
            own.keep();
            Ok(())
        };
        begun().map_err(|error| error.at(path))?;
        Ok(token)
    }

    /// Syncs a token that was begun with [`FileToken::build`], and gives its own object its name. From then on this value is one of
    /// an ordinary token. Says what keeps it from being certain to survive a power failure, if anything does.
    ///
    /// # Errors
    /// What syncing and renaming fail with; it is still being built then.
    pub fn publish(&self) -> Result<Option<Error>> {
        self.publish_all().map_err(|error| error.at(&self.path))
    }

    fn publish_all(&self) -> Result<Option<Error>> {
        if !self.is_building() {
            return Err(Error::not_found("not being built"));
        }
        let directory = self.directory();
        let names = self.names(&ObjectId::Token);
        let access = access_of(&stat_regular(directory, names.object())?);
        Generation::begin(directory, access)?;
        point("file.publish.generation");
        let lock = openat(
            directory,
            TOKEN_LOCK,
            create_flags(),
            Mode::from_bits_truncate(0o600),
        );
        match lock {
            Ok(fd) => {
                point("file.publish.lock-made");
                set_access(File::from(fd), access)?;
            }
            // From an attempt that failed later on.
            Err(Errno::EEXIST) => {}
            Err(errno) => return Err(Error::system("make token.lock", errno)),
        }
        point("file.publish.lock");
        self.sync_files()?;
        sync_directory(directory)?;
        point("file.publish.synced");
        let name = Path::new(TOKEN_OBJECT);
        let patience = Patience::at_most(self.options.lock_wait);
        let mut renamed = rename_to_free(directory, names.object(), name);
        for _ in 0..ATTEMPTS {
            if renamed != Err(Errno::EEXIST) {
                break;
            }
            match own::replace(directory, names.object(), patience) {
                Ok(()) => {
                    renamed = Ok(());
                    self.diagnostics.warning(format!(
                        "{}: a SoftHSM that had the token open before that was removed had written its copy of this; what was made takes its place",
                        self.path.join(TOKEN_OBJECT).display()
                    ));
                }
                // It has gone again, or is no file.
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    renamed = rename_to_free(directory, names.object(), name);
                }
                Err(error) => return Err(error),
            }
        }
        renamed.map_err(|errno| Error::system("rename", errno))?;
        self.building.store(false, Ordering::Release);
        self.cache().clear();
        point("file.publish.renamed");
        // It is a token, whatever becomes of this.
        let synced = sync_directory(directory);
        point("file.publish.renamed-synced");
        Ok(synced.err().map(|error| error.at(&self.path)))
    }

    /// Waits until all files of the token are on disk.
    fn sync_files(&self) -> Result<()> {
        let failed = |errno| Error::system("read the directory", errno);
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut entries =
            Dir::openat(self.directory(), ".", flags, Mode::empty()).map_err(failed)?;
        let mut names = Vec::new();
        for entry in entries.iter() {
            names.push(entry.map_err(failed)?.file_name().to_owned());
        }
        let sync_all = || {
            rustix::fs::syncfs(self.directory())
                .map_err(|errno| Error::system("sync", Errno::from_raw(errno.raw_os_error())))
        };
        if names.len() > FEW {
            return sync_all();
        }
        let mut is_all = true;
        for name in names {
            use std::os::unix::ffi::OsStrExt;
            let name = std::ffi::OsStr::from_bytes(name.to_bytes());
            match open_regular(self.directory(), Path::new(name), OFlag::O_RDONLY) {
                Ok(file) => sync(&file)?,
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                // Its mode is not for us to read it.
                Err(error) if error.kind() == ErrorKind::PermissionDenied => is_all = false,
                Err(error) => return Err(error),
            }
        }
        if is_all { Ok(()) } else { sync_all() }
    }
}
