//! The latest refusals and warnings, in memory: what `.tokenfs/log` shows.
//!
//! A bounded ring of lines. It answers "why did that fail?", so each entry has a time, a severity and a sentence;
//! it never holds the value of an attribute. An entry that repeats one that is still in the ring is counted there and
//! moves to the end, so that a program that retries in a loop does not push out everything else.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use crate::error::Error;

/// How many different entries are kept.
pub const CAPACITY: usize = 1000;

/// How much an entry matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// An operation failed.
    Error,
    /// Something is odd, and was dealt with.
    Warning,
}

#[derive(Debug)]
struct Entry {
    latest: SystemTime,
    times: u64,
    severity: Severity,
    text: String,
}

/// The ring. One is shared by the store, the tree and the adapter.
#[derive(Debug, Default)]
pub struct Diagnostics {
    entries: Mutex<VecDeque<Entry>>,
}

impl Diagnostics {
    /// An empty ring.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Records that something failed.
    pub fn error(&self, error: &Error) {
        self.record(Severity::Error, error.to_string());
    }

    /// Records something odd.
    pub fn warning(&self, text: impl Into<String>) {
        self.record(Severity::Warning, text.into());
    }

    fn record(&self, severity: Severity, text: String) {
        let text = text.replace('\n', "\\n");
        match severity {
            Severity::Error => log::error!("{text}"),
            Severity::Warning => log::warn!("{text}"),
        }
        let mut entries = self.lock();
        let known = entries.iter().position(|entry| entry.text == text);
        let times = known
            .and_then(|index| entries.remove(index))
            .map_or(1, |entry| entry.times + 1);
        if entries.len() >= CAPACITY {
            entries.pop_front();
        }
        entries.push_back(Entry {
            latest: SystemTime::now(),
            times,
            severity,
            text,
        });
    }

    /// The whole ring as text, oldest first, one entry per line: time (UTC), severity, text, and how often.
    #[must_use]
    pub fn render(&self) -> String {
        let mut out = String::new();
        for entry in self.lock().iter() {
            let severity = match entry.severity {
                Severity::Error => "error",
                Severity::Warning => "warning",
            };
            let _ = write!(out, "{} {severity}: {}", utc(entry.latest), entry.text);
            if entry.times > 1 {
                let _ = write!(out, " ({} times)", entry.times);
            }
            out.push('\n');
        }
        out
    }

    /// When the latest entry was recorded, if there is one.
    #[must_use]
    pub fn latest(&self) -> Option<SystemTime> {
        self.lock().back().map(|entry| entry.latest)
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        // A panic while the lock was held leaves a ring that is still a ring.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `2026-11-23T10:44:44.123Z`.
fn utc(time: SystemTime) -> String {
    match jiff::Timestamp::try_from(time) {
        Ok(timestamp) => format!("{timestamp:.3}"),
        Err(_) => "?".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn a_repeated_entry_is_counted_and_moves_to_the_end() {
        let ring = Diagnostics::new();
        ring.warning("one");
        ring.error(&Error::damaged("two"));
        ring.warning("one");
        let text = ring.render();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[0].ends_with(" error: two"), "{text}");
        assert!(lines[1].ends_with(" warning: one (2 times)"), "{text}");
    }

    #[test]
    fn the_ring_forgets_the_oldest_and_keeps_one_line_each() {
        let ring = Diagnostics::new();
        for n in 0..=CAPACITY {
            ring.warning(format!("entry\n{n}"));
        }
        let text = ring.render();
        assert_eq!(text.lines().count(), CAPACITY);
        assert!(!text.contains("entry\\n0\n"));
        assert!(text.contains(&format!("entry\\n{CAPACITY}\n")));
    }

    #[test]
    fn times_are_utc() {
        let at = |seconds| utc(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.000Z");
        assert_eq!(at(1_795_430_684), "2026-11-23T10:44:44.000Z");
    }
}
