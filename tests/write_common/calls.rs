//! System calls, one at a time, with their errnos.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;

/// `open` with those flags for writing.
pub fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true);
    options
}

/// The errno of a result, 0 if it is well.
pub fn errno<T>(result: io::Result<T>) -> i32 {
    result.err().map_or(0, |e| e.raw_os_error().unwrap_or(-1))
}

/// `close`, and what it says.
pub fn close(file: File) -> Result<(), Errno> {
    nix::unistd::close(file)
}

/// A path as system calls take it.
pub fn c(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

/// The name of an errno.
pub fn name(errno: i32) -> String {
    match errno {
        0 => "success".to_owned(),
        other => format!("{:?}", Errno::from_raw(other)),
    }
}
