//! What is wrong with a store: torn, suspicious, missing, lax, unreadable, left over or foreign.
//!
//! Only looks ([`check`]), and mends ([`repair()`]) what can be mended without a guess. Everything is read as the mount reads it: under
//! SoftHSM's locks, with patience for a writer that has not finished, and databases without rolling anything back.
//!
//! A running SoftHSM makes and deletes objects in steps that each look like damage for a moment: an object without its lock file, a
//! lock file without its object, an object that has the first of its attributes. Between two steps it may have to wait for its turn, and in
//! a database that is others' turn for seconds, since SQLite gives it to whoever asks at the right moment. So what looks wrong is looked at
//! again a second later, and told if it is still so, in the same state, and nobody has written into the token meanwhile. As long as somebody
//! does, that is done again, for [`LONGEST`] at most; then what was there all the while is told ([`check`]).
//!
//! Lock order: that of the reader, `.lock` and then `.object`, both shared and for one read. No lock is held from one file to the next.
//!
//! - `finding`: one thing that is wrong. `object`: what attributes give away. `file`, `db`: a token of each backend. `place`: what is in a directory, and modes.
//! - `slots`: what tokens are to each other. `repair`: mending.

mod db;
mod file;
mod finding;
mod object;
mod place;
mod repair;
mod slots;

pub use finding::{Category, Finding, Remedy, Thing};
pub use repair::{Repaired, repair};

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, fstat, fstatat};

use self::finding::{MOVE, RESTORE, hash};
use self::place::{Entry, Sort};
use self::slots::Slot;
use super::db::uuid::is_uuid;
use super::file::TOKEN_OBJECT;
use super::file::read::SETTLED;
use super::metadata::Stamp;
use super::tokendir::{DATABASE, HIDDEN_DATABASE, HIDDEN_OBJECT, is_staging};
use super::{Backend, Patience, Store, TokenName};
use crate::error::{Error, ErrorKind, Result};

/// How long a token that others write all the while is looked at again. A SoftHSM has been seen to wait 3 s for its turn on a busy
/// machine, and to wait ten times as long is out of reach: each tenth of a second it has a good chance.
pub const LONGEST: Duration = Duration::from_secs(30);

/// What to do about a token of another backend.
const CONFIGURE: &str = "see objectstore.backend, or move it to a store of its own";

/// The directory that `fsck` puts what it finds into, and what is said of it.
const LOST_AND_FOUND: &[u8] = b"lost+found";
const THE_FILE_SYSTEMS: &str = "the file system's own";

/// What to look at, and what to hold it against.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The directories to look at; all of them if there are none.
    pub only: Vec<OsString>,
    /// The backend that SoftHSM is configured for, if that is known.
    pub configured: Option<Backend>,
    /// The bits that no mode may have: `objectstore.umask`. The umask of this process says nothing of the store.
    pub mask: u32,
    /// How long a token that others write all the while is looked at again: [`LONGEST`].
    pub longest: Duration,
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// How many tokens were looked at.
    pub tokens: usize,
    /// How many objects, damaged ones included.
    pub objects: usize,
    /// What is wrong, by path.
    pub findings: Vec<Finding>,
    /// What could not be looked at.
    pub failures: Vec<Error>,
    /// What was looked at, and what is odd about it without being wrong: a path and a sentence each.
    pub notes: Vec<(PathBuf, String)>,
}

impl Report {
    fn found(&mut self, finding: Finding, path: &Path) {
        self.findings.push(finding.at(path));
    }

    fn failed(&mut self, error: Error, path: &Path) {
        self.failures.push(error.at(path));
    }

    fn note(&mut self, path: &Path, sentence: impl Into<String>) {
        self.notes.push((path.to_path_buf(), sentence.into()));
    }

    /// Whether all was looked at that could say something of `path`: nothing that failed is the same file, what is beside it under the same name (a
    /// lock file, a journal), or the directory that it is in.
    #[must_use]
    pub fn has_seen(&self, path: &Path) -> bool {
        let about = |unseen: &Path| {
            path.starts_with(unseen)
                || (path.parent(), path.file_stem()) == (unseen.parent(), unseen.file_stem())
        };
        let failed = self.failures.iter().filter_map(Error::path);
        // What is in a database is not true before its journal is rolled back.
        let hot = self.findings.iter();
        let hot = hot.filter(|finding| finding.remedy == Some(Remedy::RollBack));
        !failed.chain(hot.map(|finding| &*finding.path)).any(about)
    }

    fn append(&mut self, mut other: Self) {
        self.tokens += other.tokens;
        self.objects += other.objects;
        self.findings.append(&mut other.findings);
        self.failures.append(&mut other.failures);
        self.notes.append(&mut other.notes);
    }
}

/// Looks at a store, and writes nothing. `store` has to be read only.
///
/// # Errors
/// The tokendir cannot be read, or there is no directory of a name that is asked for. What cannot be read within it is in
/// [`Report::failures`].
pub fn check(store: &Store, settings: &Settings) -> Result<Report> {
    let names = directories(store, settings)?;
    let mut report = Report::default();
    let mut slots = BTreeMap::new();
    let mut done = |name: &TokenName, looked: Looked| {
        report.append(looked.report);
        slots.extend(looked.slot.map(|slot| (name.clone(), slot)));
    };
    let mut again = Vec::new();
    for name in &names {
        let looked = look(store, settings, name);
        if looked.report.findings.iter().any(Finding::passes) || !looked.report.failures.is_empty()
        {
            again.push((name, looked));
        } else {
            done(name, looked);
        }
    }
    let deadline = Instant::now() + settings.longest;
    while !again.is_empty() {
        // Since the last look at any of them.
        std::thread::sleep(SETTLED + Duration::from_millis(50));
        let last = Instant::now() >= deadline;
        for (name, before) in std::mem::take(&mut again) {
            let mut looked = look(store, settings, name);
            looked.keep(&before);
            let fails_anew =
                before.report.failures.is_empty() && !looked.report.failures.is_empty();
            if last || (looked.is_certain(&before) && !fails_anew) {
                done(name, looked);
            } else {
                again.push((name, looked));
            }
        }
    }
    slots::look(store, settings, &slots, &mut report)?;
    report.findings.sort_by(|a, b| {
        (&a.path, a.offset, a.category, &a.detail).cmp(&(&b.path, b.offset, b.category, &b.detail))
    });
    report.notes.sort();
    Ok(report)
}

/// The names in the tokendir that are to be looked at, in order.
fn directories(store: &Store, settings: &Settings) -> Result<Vec<TokenName>> {
    store.check_in_place()?;
    let entries = place::entries(store.directory()?, store.path())?;
    if settings.only.is_empty() {
        // A file in the tokendir is of no interest to SoftHSM.
        return Ok(entries
            .into_iter()
            .filter(|entry| entry.sort != Sort::File)
            .filter_map(|entry| TokenName::new(&entry.name))
            .collect());
    }
    let mut names = Vec::new();
    for wanted in &settings.only {
        let known = entries
            .iter()
            .any(|entry| entry.name == *wanted && entry.sort == Sort::Directory);
        match TokenName::new(wanted).filter(|_| known) {
            Some(name) => names.push(name),
            None => {
                return Err(Error::not_found(format!(
                    "there is no token directory {wanted:?}; \"tokenfs check\" without a name looks at all of them"
                ))
                .at(store.path()));
            }
        }
    }
    names.sort_unstable();
    names.dedup();
    Ok(names)
}

/// What one look at a directory came to.
#[derive(Default)]
struct Looked {
    report: Report,
    /// By which it is known whether somebody makes or removes objects between two looks; `None` if somebody was writing.
    rest: Option<u64>,
    /// If it is a token that SoftHSM can open.
    slot: Option<Slot>,
}

impl Looked {
    /// Leaves out what was not there the time before, where that could be looked at then.
    fn keep(&mut self, before: &Self) {
        let findings = before.report.findings.iter();
        let was: HashSet<Thing<'_>> = findings.map(Finding::thing).collect();
        self.report
            .findings
            .retain(|it| was.contains(&it.thing()) || !before.report.has_seen(&it.path));
    }

    /// Whether nothing that was found can be a step on somebody's way.
    fn is_certain(&self, before: &Self) -> bool {
        let at_rest = self.rest.is_some() && self.rest == before.rest;
        let findings = before.report.findings.iter();
        let was: HashSet<_> = findings.map(Finding::version).collect();
        self.report.findings.iter().all(|finding| {
            !finding.passes() || ((at_rest || !finding.waits()) && was.contains(&finding.version()))
        })
    }
}

/// What a look at a directory needs.
struct Look<'a> {
    store: &'a Store,
    settings: &'a Settings,
    name: &'a TokenName,
    path: PathBuf,
    directory: OwnedFd,
    entries: Vec<Entry>,
    report: Report,
    /// As [`Looked::rest`].
    rest: Option<u64>,
    /// As [`Looked::slot`].
    slot: Option<Slot>,
}

impl Look<'_> {
    fn patience(&self) -> Patience {
        Patience::at_most(self.store.options().lock_wait)
    }

    fn done(self) -> Looked {
        Looked {
            report: self.report,
            rest: self.rest,
            slot: self.slot,
        }
    }

    /// Whether there are objects and nothing that makes a token of them, nor is going to: that is there before they are, and as long as they are.
    fn lacks_its_own(&self) -> bool {
        let own = [TOKEN_OBJECT, DATABASE, HIDDEN_OBJECT, HIDDEN_DATABASE];
        self.objects() > 0 && own.iter().all(|own| self.entry(own).is_none())
    }

    /// How many files of the `file` backend are objects by their name.
    fn objects(&self) -> usize {
        let files = self.entries.iter().filter(|entry| entry.sort == Sort::File);
        files
            .filter(|entry| super::file::object_name(&entry.name).is_some())
            .count()
    }

    fn has(&self, name: &str, sort: Sort) -> bool {
        self.entry(name).is_some_and(|entry| entry.sort == sort)
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == *name)
    }
}

/// One look at one directory of the tokendir.
fn look(store: &Store, settings: &Settings, name: &TokenName) -> Looked {
    let path = store.path().join(name.as_os_str());
    match look_inside(store, settings, name, &path) {
        Ok(inside) => inside,
        // It was deleted meanwhile.
        Err(error) if error.kind() == ErrorKind::NotFound => Looked::default(),
        Err(error) => {
            let mut looked = Looked::default();
            looked.report.failed(error, &path);
            looked
        }
    }
}

fn look_inside(
    store: &Store,
    settings: &Settings,
    name: &TokenName,
    path: &Path,
) -> Result<Looked> {
    let mut report = Report::default();
    let stat = fstatat(
        store.directory()?,
        name.as_os_str(),
        AtFlags::AT_SYMLINK_NOFOLLOW,
    )
    .map_err(|errno| Error::system("stat", errno))?;
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    if !super::metadata::is_directory(&stat) {
        let target = fstatat(store.directory()?, name.as_os_str(), AtFlags::empty());
        if target.is_ok_and(|target| super::metadata::is_directory(&target)) {
            let detail = "this is a symbolic link to a directory, and SoftHSM follows none";
            report.found(Finding::new(Category::Foreign, detail).advising(MOVE), path);
        }
        return Ok(Looked {
            report,
            ..Looked::default()
        });
    }
    let directory = match openat(store.directory()?, name.as_os_str(), flags, Mode::empty()) {
        // Which is root's alone.
        Err(Errno::EACCES) if name.as_bytes() == LOST_AND_FOUND => {
            report.note(path, THE_FILE_SYSTEMS);
            return Ok(Looked {
                report,
                ..Looked::default()
            });
        }
        directory => directory.map_err(|errno| Error::system("open", errno))?,
    };
    let stat = fstat(&directory).map_err(|errno| Error::system("stat", errno))?;
    let entries = place::entries(&directory, path)?;
    let mut look = Look {
        store,
        settings,
        name,
        path: path.to_path_buf(),
        directory,
        entries,
        report,
        rest: Some(hash(&Stamp::from(&stat))),
        slot: None,
    };
    let building = place::marks(&mut look);
    let backend = match [
        look.has(TOKEN_OBJECT, Sort::File),
        look.has(DATABASE, Sort::File),
    ] {
        [true, true] => Some(settings.configured.unwrap_or(store.options().backend)),
        [true, false] => Some(Backend::File),
        [false, true] => Some(Backend::Db),
        [false, false] => None,
    };
    if !building && is_staging(name.as_os_str()) {
        // Its maker marks it at once, and it has another name by the next look.
        let detail = "left by a crash or a failure while a token was being made or removed";
        let path = look.path.clone();
        let finding = Finding::new(Category::Leftover, detail).mended_by(Remedy::Recover);
        look.report.found(finding, &path);
        return Ok(look.done());
    }
    let Some(backend) = backend else {
        if !building || look.lacks_its_own() {
            no_token(&mut look);
        }
        return Ok(look.done());
    };
    look.report.tokens = 1;
    place::judge_mode(&mut look, path, &stat);
    if let Some(configured) = settings.configured.filter(|wanted| *wanted != backend) {
        let detail = format!(
            "a token of the backend {backend}, and SoftHSM is configured for {configured}, with which it does not see this one"
        );
        let path = look.path.clone();
        look.report.found(
            Finding::new(Category::Unreadable, detail).advising(CONFIGURE),
            &path,
        );
    }
    second_token(&mut look, backend);
    place::strangers(&mut look);
    place::modes(&mut look);
    match backend {
        Backend::File => file::look(&mut look),
        Backend::Db => db::look(&mut look),
    }
    let count = look.report.objects;
    let objects = if count == 1 { "object" } else { "objects" };
    let sentence = format!("a token of the backend {backend}, {count} {objects}");
    let path = look.path.clone();
    look.report.note(&path, sentence);
    Ok(look.done())
}

/// A directory that holds tokens of both backends: SoftHSM sees one of them.
fn second_token(look: &mut Look<'_>, backend: Backend) {
    let (other, file) = match backend {
        Backend::File => (Backend::Db, DATABASE),
        Backend::Db => (Backend::File, TOKEN_OBJECT),
    };
    if look.entry(file).is_some() {
        let detail = format!(
            "a token of the backend {other}, beside one of {backend} in the same directory, which is the only one that SoftHSM sees as it is configured"
        );
        let path = look.path.join(file);
        look.report.found(
            Finding::new(Category::Unreadable, detail).advising(CONFIGURE),
            &path,
        );
    }
}

/// A directory that is no token.
fn no_token(look: &mut Look<'_>) {
    let path = look.path.clone();
    if look.name.as_bytes() == LOST_AND_FOUND {
        look.report.note(&path, THE_FILE_SYSTEMS);
        return;
    }
    for name in [TOKEN_OBJECT, DATABASE] {
        if look.entry(name).is_some() {
            let detail =
                "this is no regular file; SoftHSM would follow a link here, and tokenfs does not";
            look.report
                .found(Finding::new(Category::Suspicious, detail), &path.join(name));
            return;
        }
    }
    let objects = look.objects();
    let finding = if objects > 0 {
        let objects = if objects == 1 {
            "1 object".to_owned()
        } else {
            format!("{objects} objects")
        };
        Finding::new(
            Category::Torn,
            format!(
                "the directory holds {objects} and no token.object, so that SoftHSM sees none of them"
            ),
        )
        .advising(RESTORE)
    } else if look.entries.is_empty() && look.name.as_os_str().to_str().is_some_and(is_uuid) {
        // Both SoftHSM and tokenfs begin with it.
        let detail = "an empty directory, left when a token was being made or removed";
        Finding::new(Category::Leftover, detail).mended_by(Remedy::RemoveDirectory)
    } else {
        Finding::new(
            Category::Foreign,
            "this directory is no token, and SoftHSM tries to open it as one each time that it starts",
        )
        .advising(MOVE)
    };
    look.report.found(finding, &path);
}

/// Opens a file of the directory for reading, without following a link.
fn open_file(look: &Look<'_>, name: &std::ffi::OsStr) -> Result<std::fs::File, Errno> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    openat(look.directory.as_fd(), name, flags, Mode::empty()).map(std::fs::File::from)
}
