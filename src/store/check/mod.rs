//! What is wrong with a store: torn, suspicious, missing, lax, unreadable, left over or foreign.
//!
//! Only looks ([`check`]), and mends ([`repair()`]) what can be mended without a guess. Everything is read as the mount reads it: under
//! SoftHSM's locks, with patience for a writer that has not finished, and databases without rolling anything back.
//!
//! A running SoftHSM makes and deletes objects in steps that each look like damage for a moment: an object without its lock file, a
//! lock file without its object, an object that has the first of its attributes. So what looks wrong is looked at again a
//! second later, and only what is still so is told ([`check`]).
//!
//! Lock order: that of the reader, `.lock` and then `.object`, both shared and for one read. No lock is held from one file to the next.
//!
//! - `object`: what attributes give away. `file`, `db`: a token of each backend. `place`: what is in a directory, and modes.
//! - `repair`: mending.

mod db;
mod file;
mod object;
mod place;
mod repair;

pub use repair::{Repaired, repair};

use std::ffi::OsString;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, fstat, fstatat};

use self::place::{Entry, Sort};
use super::db::uuid::is_uuid;
use super::file::TOKEN_OBJECT;
use super::file::read::SETTLED;
use super::tokendir::{DATABASE, is_staging};
use super::{Backend, Patience, Store, TokenName};
use crate::error::{Error, ErrorKind, Result};

/// What sort of thing is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Category {
    /// It does not hold what the format allows: SoftHSM has no such object, or no such token.
    Torn,
    /// SoftHSM takes it, and would not have written it.
    Suspicious,
    /// SoftHSM needs it, and it is not there.
    Missing,
    /// It lets in more users than the mask allows.
    Lax,
    /// Of the backend that SoftHSM is not configured for.
    Unreadable,
    /// From a write that a crash has cut short.
    Leftover,
    /// Nothing that belongs into a store.
    Foreign,
}

impl fmt::Display for Category {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Torn => "torn",
            Self::Suspicious => "suspicious",
            Self::Missing => "missing",
            Self::Lax => "lax",
            Self::Unreadable => "unreadable",
            Self::Leftover => "leftover",
            Self::Foreign => "foreign",
        })
    }
}

/// How something is mended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// By [`Store::recover`].
    Recover,
    /// By SQLite, when the database is opened for writing.
    RollBack,
    /// The file, which is a lock file, is made.
    MakeLock,
    /// The file, which is a lock file, is removed.
    RemoveLock,
    /// The directory, which is empty, is removed.
    RemoveDirectory,
    /// The file, which is the token's generation, is made.
    MakeGeneration,
    /// These bits are taken away from the mode.
    TakeBits(u32),
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What sort of thing.
    pub category: Category,
    /// Of the file or directory.
    pub path: PathBuf,
    /// In the file, in bytes, where there is one.
    pub offset: Option<u64>,
    /// A sentence without a full stop, and without the value of an attribute.
    pub detail: String,
    /// How [`repair()`] mends it, if it does.
    pub remedy: Option<Remedy>,
}

impl Finding {
    fn new(category: Category, detail: impl Into<String>) -> Self {
        Self {
            category,
            path: PathBuf::new(),
            offset: None,
            detail: detail.into(),
            remedy: None,
        }
    }

    /// What an error of the content is, as a finding.
    fn of_error(category: Category, error: &Error) -> Self {
        Self {
            offset: error.offset(),
            ..Self::new(category, error.detail())
        }
    }

    fn at(mut self, path: impl Into<PathBuf>) -> Self {
        self.path = path.into();
        self
    }

    fn at_offset(mut self, offset: u64) -> Self {
        self.offset = Some(offset);
        self
    }

    fn mended_by(mut self, remedy: Remedy) -> Self {
        self.remedy = Some(remedy);
        self
    }

    /// Whether both are about the same thing. What is torn may be so in another way meanwhile; of what is suspicious in a database,
    /// the sentence says which object it is.
    #[must_use]
    pub fn same(&self, other: &Self) -> bool {
        (self.category, &self.path) == (other.category, &other.path)
            && (self.detail == other.detail || self.category == Category::Torn)
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // As an error is shown: one line, whatever is in the path.
        let path = self.path.display().to_string();
        write!(f, "{}: {}: ", path.escape_debug(), self.category)?;
        f.write_str(&self.detail.replace('\n', "\\n"))?;
        if let Some(offset) = self.offset {
            write!(f, " at byte {offset}")?;
        }
        Ok(())
    }
}

/// What to look at, and what to hold it against.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The directories to look at; all of them if there are none.
    pub only: Vec<OsString>,
    /// The backend that SoftHSM is configured for, if that is known.
    pub configured: Option<Backend>,
    /// The bits that no mode may have: the effective mask.
    pub mask: u32,
    /// Those of them that the configuration forbids, and not the umask of this process alone. Only these are taken away.
    pub configured_mask: u32,
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
    let mut again = Vec::new();
    for name in &names {
        let looked = look(store, settings, name);
        if looked.findings.iter().any(passes) || !looked.failures.is_empty() {
            again.push((name, looked));
        } else {
            report.append(looked);
        }
    }
    if !again.is_empty() {
        // Since the last look at any of them.
        std::thread::sleep(SETTLED + Duration::from_millis(50));
    }
    for (name, before) in again {
        let mut looked = look(store, settings, name);
        looked
            .findings
            .retain(|finding| before.findings.iter().any(|earlier| earlier.same(finding)));
        report.append(looked);
    }
    report.findings.sort_by(|a, b| {
        (&a.path, a.offset, a.category, &a.detail).cmp(&(&b.path, b.offset, b.category, &b.detail))
    });
    report.notes.sort();
    Ok(report)
}

/// Whether a finding may be a step on the way of a writer, which passes. Modes may, too: a file is made before it has its own.
fn passes(finding: &Finding) -> bool {
    finding.category != Category::Unreadable
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

/// What a look at a directory needs.
struct Look<'a> {
    store: &'a Store,
    settings: &'a Settings,
    name: &'a TokenName,
    path: PathBuf,
    directory: OwnedFd,
    entries: Vec<Entry>,
    report: Report,
}

impl Look<'_> {
    fn patience(&self) -> Patience {
        Patience::at_most(self.store.options().lock_wait)
    }

    fn has(&self, name: &str, sort: Sort) -> bool {
        self.entry(name).is_some_and(|entry| entry.sort == sort)
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == *name)
    }
}

/// One look at one directory of the tokendir.
fn look(store: &Store, settings: &Settings, name: &TokenName) -> Report {
    let path = store.path().join(name.as_os_str());
    let mut report = Report::default();
    match look_inside(store, settings, name, &path) {
        Ok(inside) => report = inside,
        // It was deleted meanwhile.
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => report.failed(error, &path),
    }
    report
}

fn look_inside(
    store: &Store,
    settings: &Settings,
    name: &TokenName,
    path: &Path,
) -> Result<Report> {
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
            report.found(Finding::new(Category::Foreign, detail), path);
        }
        return Ok(report);
    }
    let directory = openat(store.directory()?, name.as_os_str(), flags, Mode::empty())
        .map_err(|errno| Error::system("open", errno))?;
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
        let detail = "left by a crash while a token was being made or removed";
        let path = look.path.clone();
        let finding = Finding::new(Category::Leftover, detail).mended_by(Remedy::Recover);
        look.report.found(finding, &path);
        return Ok(look.report);
    }
    let Some(backend) = backend else {
        if !building {
            no_token(&mut look);
        }
        return Ok(look.report);
    };
    look.report.tokens = 1;
    place::judge_mode(&mut look, path, &stat);
    if let Some(configured) = settings.configured.filter(|wanted| *wanted != backend) {
        let detail = format!(
            "a token of the backend {backend}, and SoftHSM is configured for {configured}, with which it does not see this one"
        );
        let path = look.path.clone();
        look.report
            .found(Finding::new(Category::Unreadable, detail), &path);
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
    Ok(look.report)
}

/// A directory that holds tokens of both backends: SoftHSM sees one of them.
fn second_token(look: &mut Look<'_>, backend: Backend) {
    let (other, file) = match backend {
        Backend::File => (Backend::Db, DATABASE),
        Backend::Db => (Backend::File, TOKEN_OBJECT),
    };
    if look.entry(file).is_some() {
        let detail = format!(
            "the directory holds a token of the backend {backend} too, and SoftHSM sees only that with its configuration for {backend}, not this one of {other}"
        );
        let path = look.path.join(file);
        look.report
            .found(Finding::new(Category::Unreadable, detail), &path);
    }
}

/// A directory that is no token.
fn no_token(look: &mut Look<'_>) {
    let path = look.path.clone();
    if look.name.as_bytes() == b"lost+found" {
        look.report.note(&path, "the file system's own");
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
    let objects = look
        .entries
        .iter()
        .filter(|entry| entry.sort == Sort::File && super::file::object_name(&entry.name).is_some())
        .count();
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
    } else if look.entries.is_empty() && look.name.as_os_str().to_str().is_some_and(is_uuid) {
        // Both SoftHSM and tokenfs begin with it.
        let detail = "an empty directory, left when a token was being made or removed";
        Finding::new(Category::Leftover, detail).mended_by(Remedy::RemoveDirectory)
    } else {
        Finding::new(
            Category::Foreign,
            "this directory is no token, and SoftHSM tries to open it as one each time that it starts",
        )
    };
    look.report.found(finding, &path);
}

/// Opens a file of the directory for reading, without following a link.
fn open_file(look: &Look<'_>, name: &std::ffi::OsStr) -> Result<std::fs::File, Errno> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    openat(look.directory.as_fd(), name, flags, Mode::empty()).map(std::fs::File::from)
}
