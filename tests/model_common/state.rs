//! What both the model and what it is held against can be asked to do.

use std::collections::BTreeSet;

use super::Answer;
use super::ops::How;

/// What `stat` says, as far as it is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    pub is_directory: bool,
    /// Of a file.
    pub size: u64,
    pub mode: u32,
    /// In seconds.
    pub mtime: u64,
}

/// A mount, or what stands for one. Paths are relative to its root; descriptors are open when they are used.
pub trait World {
    fn open(&mut self, fd: usize, path: &str, how: How) -> Answer;
    fn write(&mut self, fd: usize, data: &[u8]) -> Answer;
    fn write_at(&mut self, fd: usize, at: u64, data: &[u8]) -> Answer;
    fn read(&mut self, fd: usize) -> Answer<Vec<u8>>;
    fn close_duplicate(&mut self, fd: usize) -> Answer;
    fn close(&mut self, fd: usize) -> Answer;
    fn set_length(&mut self, fd: usize, length: u64) -> Answer;
    fn sync(&mut self, fd: usize) -> Answer;
    fn truncate(&mut self, path: &str, length: u64) -> Answer;
    fn unlink(&mut self, path: &str) -> Answer;
    fn rename(&mut self, from: &str, to: &str) -> Answer;
    fn make_dir(&mut self, path: &str) -> Answer;
    fn remove_dir(&mut self, path: &str) -> Answer;
    fn set_mode(&mut self, path: &str, mode: u32) -> Answer;
    fn set_times(&mut self, path: &str, seconds: u64) -> Answer;
    fn sync_dir(&mut self, path: &str) -> Answer;
    fn list(&mut self, path: &str) -> Answer<BTreeSet<String>>;
    fn stat(&mut self, path: &str) -> Answer<Stat>;
    fn content(&mut self, path: &str) -> Answer<Vec<u8>>;
    fn leave_alone(&mut self);
    fn remount(&mut self);
}
