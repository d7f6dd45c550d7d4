//! Crash points: named places between two steps of a write where a test can make the process die.
//!
//! `TOKENFS_CRASH_POINT=NAME` kills the process when it gets to the point of that name, `NAME:3` when it gets there for the
//! third time. `?` says on the standard error which points it gets to. The kill is a `SIGKILL`: nothing is cleaned up, as in a real crash. In a release build there are no points.

/// All points, so that a test can go through them.
pub const POINTS: &[&str] = &[
    "db.begun",
    "db.deleted",
    "db.updated",
    "db.inserted",
    "db.row",
    "db.named",
    "db.renamed",
    "db.timed",
    "db.removed",
    "db.written",
    "db.committed",
    "db.synced",
    "db.replaced",
    "db.build.made",
    "db.build.schema",
    "db.publish.closed",
    "db.publish.synced",
    "db.publish.renamed",
    "db.publish.done",
    "file.access.owned",
    "file.build.dressed",
    "file.build.made",
    "file.build.token-written",
    "file.build.written",
    "file.copy.listed",
    "file.copy.owned",
    "file.create.dated",
    "file.create.done",
    "file.create.dressed",
    "file.create.linked",
    "file.create.made",
    "file.create.synced",
    "file.create.told",
    "file.create.written",
    "file.generation.begun",
    "file.generation.made",
    "file.generation.raised",
    "file.lock.ready",
    "file.metadata.dated",
    "file.metadata.moded",
    "file.metadata.owned",
    "file.publish.generation",
    "file.publish.lock",
    "file.publish.lock-made",
    "file.publish.renamed",
    "file.publish.renamed-synced",
    "file.publish.synced",
    "file.recover.cleared",
    "file.recover.journal-dropped",
    "file.recover.lock-removed",
    "file.recover.token-cleared",
    "file.recover.unlocked",
    "file.remove.done",
    "file.remove.renamed",
    "file.remove.told",
    "file.remove.unjournalled",
    "file.remove.unlinked",
    "file.rename.done",
    "file.rename.marked",
    "file.rename.renamed",
    "file.rename.renewed",
    "file.rename.told",
    "file.rename.unmarked",
    "file.rewrite.cut",
    "file.rewrite.cut-synced",
    "file.rewrite.dated",
    "file.rewrite.done",
    "file.rewrite.journal-made",
    "file.rewrite.journal-written",
    "file.rewrite.journalled",
    "file.rewrite.raised",
    "file.rewrite.recovered",
    "file.rewrite.room",
    "file.rewrite.synced",
    "file.rewrite.written",
    "file.update.dated",
    "file.update.done",
    "file.update.dressed",
    "file.update.exchanged",
    "file.update.exchanged-back",
    "file.update.made",
    "file.update.synced",
    "file.update.touched",
    "file.update.written",
    "store.create.dressed",
    "store.create.made",
    "store.create.marked",
    "store.create.named",
    "store.publish.published",
    "store.publish.unmarked",
    "store.recover.renamed",
    "store.recover.restored",
    "store.recover.unlinked",
    "store.recover.unmarked",
    "store.remove.hidden",
    "store.remove.marked",
    "store.remove.restored",
    "store.remove.unlinked",
    "store.unbuild.unlinked",
];

/// The place `name`, which is one of [`POINTS`].
#[cfg(debug_assertions)]
pub(crate) fn point(name: &str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static WANTED: OnceLock<Option<(String, u64)>> = OnceLock::new();
    static PASSED: AtomicU64 = AtomicU64::new(0);

    debug_assert!(POINTS.contains(&name), "{name} is not in POINTS");
    let wanted = WANTED.get_or_init(|| {
        let text = std::env::var("TOKENFS_CRASH_POINT").ok()?;
        Some(match text.rsplit_once(':') {
            Some((name, times)) => (name.to_owned(), times.parse().unwrap_or(1)),
            None => (text, 1),
        })
    });
    if matches!(wanted, Some((wanted, _)) if wanted == "?") {
        eprintln!("crash point {name}");
    }
    if let Some((wanted, times)) = wanted
        && wanted == name
        && PASSED.fetch_add(1, Ordering::Relaxed) + 1 == *times
    {
        let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
    }
}

/// Nothing.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub(crate) fn point(_name: &str) {}
