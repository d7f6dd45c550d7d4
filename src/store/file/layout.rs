//! The files of a token as they are, byte for byte: what [`crate::store::layout`] is for this backend.

use std::fs::File;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::stat::fstat;

use super::guard::stat_regular;
use super::read::{open_regular, read_all};
use super::token::{FileToken, QUICK};
use crate::error::{Error, ErrorKind, Result};
use crate::store::layout::LayoutFile;
use crate::store::lock::lock_shared;
use crate::store::{Metadata, ObjectId, Patience};

impl FileToken {
    /// The names of its files. What is ours, and what is nobody's, is not among them.
    pub(super) fn files(&self) -> Result<Vec<LayoutFile>> {
        let mut files = self.regular_files(LayoutFile::parse)?;
        files.sort_unstable();
        Ok(files)
    }

    /// What `stat` says of one of them, and its size.
    pub(super) fn file_metadata(&self, file: &LayoutFile) -> Result<(Metadata, u64)> {
        let name = file.name();
        let path = self.path.join(&name);
        let stat =
            stat_regular(self.directory(), Path::new(&name)).map_err(|error| error.at(&path))?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        Ok((Metadata::of_path(&path, &stat), size))
    }

    /// What is in one of them, and what `stat` said of it then. An object is read under its locks and at rest, whether it makes sense
    /// or not.
    pub(super) fn read_as_it_is(
        &self,
        file: &LayoutFile,
        patience: Patience,
    ) -> Result<(Metadata, Vec<u8>)> {
        let name = file.name();
        let path = self.path.join(&name);
        let name = Path::new(&name);
        let read = match file {
            LayoutFile::Object(id) => self.read_object_as_it_is(id, patience),
            // Whoever changes the number locks this file.
            LayoutFile::Generation => self.read_plain(name, |file| lock_shared(file, patience)),
            // Whoever locks this one writes nothing into it.
            LayoutFile::Lock(_) => self.read_plain(name, |_| Ok(())),
        };
        read.map_err(|error| error.at(&path))
    }

    fn read_object_as_it_is(
        &self,
        id: &ObjectId,
        patience: Patience,
    ) -> Result<(Metadata, Vec<u8>)> {
        let names = self.names(id);
        let size = stat_regular(self.directory(), names.object())?.st_size;
        if matches!(patience, Patience::Now) && size > QUICK {
            let detail = "a long file has to be read";
            return Err(Error::new(ErrorKind::WouldBlock, detail));
        }
        let reading = self.read(id, patience)?;
        match reading.version.content {
            // Too long to be read.
            Err(error) if reading.bytes.len() as i64 != reading.stat.st_size => Err(error),
            _ => Ok((reading.version.metadata, reading.bytes)),
        }
    }

    /// A file that holds no object, once `lock` has locked it.
    fn read_plain(
        &self,
        name: &Path,
        lock: impl FnOnce(&File) -> Result<()>,
    ) -> Result<(Metadata, Vec<u8>)> {
        let mut file = open_regular(self.directory(), name, OFlag::O_RDONLY)?;
        lock(&file)?;
        let stat = fstat(&file).map_err(|errno| Error::system("stat", errno))?;
        let bytes = read_all(&mut file, &stat)?;
        Ok((Metadata::of_open(&file, &stat), bytes))
    }
}
