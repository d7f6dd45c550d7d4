//! What the kernel asks, in the words of the tree. (`reply` has what it is answered.)

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{Request, TimeOrNow};

use crate::store::Time;
use crate::tree::{Caller, OpenForWriting};

/// Who asks.
pub(super) fn caller(request: &Request) -> Caller {
    Caller {
        uid: request.uid(),
        gid: request.gid(),
        pid: request.pid(),
    }
}

/// How a file is opened that is opened for writing: the flags of `open(2)`.
pub(super) fn for_writing(flags: i32) -> OpenForWriting {
    OpenForWriting {
        truncate: flags & libc::O_TRUNC != 0,
        append: flags & libc::O_APPEND != 0,
        read: flags & libc::O_ACCMODE == libc::O_RDWR,
    }
}

/// The kernel counts nanoseconds forward from the second, and `fuser` 0.18 before 1970 backward (`system_time_from_time`).
fn as_meant(time: SystemTime) -> SystemTime {
    let Ok(before) = UNIX_EPOCH.duration_since(time) else {
        return time;
    };
    let back = Duration::from_secs(before.as_secs());
    let forth = Duration::from_nanos(before.subsec_nanos().into());
    let second = UNIX_EPOCH.checked_sub(back);
    second
        .and_then(|second| second.checked_add(forth))
        .unwrap_or(time)
}

/// A time that is set (`utimensat(2)`).
pub(super) fn time(time: TimeOrNow) -> Time {
    match time {
        TimeOrNow::SpecificTime(time) => Time::At(as_meant(time)),
        TimeOrNow::Now => Time::Now,
    }
}
