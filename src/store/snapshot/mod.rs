//! A store as it was at one moment, in memory.
//!
//! **Which moment.** Everything is read once while nobody is kept from anything, which leaves little to read later. Then every
//! token is held ([`Token::hold`]), and once all of them are, what has changed since is read again. The moment is any between
//! the last lock that was taken and the first that is given back: what was read under a lock is what was there then. So of all calls to
//! SoftHSM, in whatever process and token, those that had returned before the locks were taken are in the snapshot, those that
//! began after they were given back are not, and whoever sees the effect of a call sees that of all that returned before it began.
//! A call that was on its way is in it or not. SoftHSM makes an object in many steps: what it is only making at the moment
//! is not in the snapshot (`making`).
//!
//! **How long writers wait.** No longer than it takes to lock everything and to read what has changed. A lock that is not to be had
//! within [`HELD`] is not waited for any longer while others are held: they are given back, and the next attempt begins after a
//! pause that is as long as the last one.
//!
//! What is damaged, or closed to us, is so in the snapshot. Whatever else cannot be read, there is no snapshot.

mod files;
mod making;
mod token;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::statvfs::Statvfs;

use super::layout::LayoutFile;
use super::{Backend, Hold, Metadata, ObjectId, ObjectName, Patience, Store, Token, TokenName};
use crate::error::{Error, ErrorKind, Result};
use files::{Files, Kept};
pub(in crate::store) use making::is_unfinished;
use making::{is_being_made, is_young};
use token::Entry;
pub(crate) use token::Remembered;

/// How long a lock is waited for by whoever holds others: many times what SoftHSM has one for.
const HELD: Duration = Duration::from_millis(100);

/// The shortest pause between two attempts, and between two looks at what is being made.
const PAUSE: Duration = Duration::from_millis(20);

/// How often the tokendir is listed anew while tokens come and go.
const LISTINGS: usize = 100;

/// The store at its moment.
#[derive(Debug)]
pub(super) struct Snapshot {
    /// Of the tokendir.
    pub metadata: Metadata,
    /// Of the file system that it was on.
    pub statvfs: Statvfs,
    tokens: BTreeMap<TokenName, Arc<Remembered>>,
}

/// An object, in either backend by the name of its file; the token's own stands for the token. Or another file of a token.
type Place = (TokenName, LayoutFile);

/// Tokens that nobody can change.
type AllHeld = BTreeMap<TokenName, (Arc<dyn Token>, Hold)>;

impl Snapshot {
    /// Takes one of `store`.
    ///
    /// # Errors
    /// See [`Store::snapshot`].
    pub fn take(store: &Store) -> Result<Self> {
        let begun = Instant::now();
        let wait = store.options().lock_wait;
        let known = first_look(store, wait).map_err(explained)?;
        let deadline = Instant::now() + wait;
        loop {
            let attempt = Instant::now();
            match Self::at_once(store, &known) {
                Ok(snapshot) => {
                    let (tokens, objects) = snapshot.count();
                    log::info!(
                        "a snapshot of {tokens} tokens and {objects} objects, taken in {:?}; writers waited for {:?}",
                        begun.elapsed(),
                        attempt.elapsed()
                    );
                    return Ok(snapshot);
                }
                Err(error) if error.kind() != ErrorKind::Busy => return Err(explained(error)),
                Err(error) if Instant::now() >= deadline => return Err(explained(error)),
                Err(_) => {}
            }
            thread::sleep(attempt.elapsed().max(PAUSE));
            look(store, wait).map_err(explained)?;
        }
    }

    /// One attempt, without what is being made and not `known`.
    fn at_once(store: &Store, known: &HashSet<Place>) -> Result<Self> {
        let held = hold(store)?;
        let mut tokens = BTreeMap::new();
        for (name, (token, _)) in &held {
            // It is there as long as it is held; what is no token any more has gone in spite of that.
            let remembered = read(&**token, HELD)?.ok_or_else(|| {
                let path = store.path().join(name.as_os_str());
                Error::new(ErrorKind::Busy, "the token is being removed").at(path)
            })?;
            tokens.insert(name.clone(), remembered);
        }
        let (metadata, statvfs) = (store.metadata()?, store.statvfs()?);
        drop(held);
        tokens.retain(|name, token| token.leave_out(|file| !known.contains(&(name.clone(), file))));
        let tokens = tokens.into_iter();
        Ok(Self {
            metadata,
            statvfs,
            tokens: tokens
                .map(|(name, token)| (name, Arc::new(token)))
                .collect(),
        })
    }

    /// The names of the tokens, ascending.
    pub fn tokens(&self) -> Vec<TokenName> {
        self.tokens.keys().cloned().collect()
    }

    /// A token.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub fn token(&self, name: &TokenName) -> Result<Arc<dyn Token>> {
        let found = self.tokens.get(name).cloned();
        found.map_or_else(
            || Err(Error::not_found("not a token")),
            |token| Ok(token as _),
        )
    }

    fn count(&self) -> (usize, usize) {
        let objects = self.tokens.values().map(|token| token.objects.len());
        (self.tokens.len(), objects.sum())
    }
}

/// What there is, and what of that is being made.
#[derive(Debug, Default)]
struct Look {
    all: HashSet<Place>,
    making: HashSet<Place>,
}

/// Reads everything once, so that it is known, and waits until nobody is making any of it. What is not made by then is what a crash
/// left of a making. The result is what there was; what is being made and is not among it, somebody has begun to make since.
fn first_look(store: &Store, wait: Duration) -> Result<HashSet<Place>> {
    let deadline = Instant::now() + making::LONGEST;
    let Look { all, mut making } = look(store, wait)?;
    while !making.is_empty() && Instant::now() < deadline {
        thread::sleep(PAUSE);
        let now = look(store, wait)?;
        making.retain(|place| now.making.contains(place));
    }
    Ok(all)
}

/// Reads everything, at different moments.
fn look(store: &Store, wait: Duration) -> Result<Look> {
    let mut look = Look::default();
    for name in store.tokens()? {
        let Some(token) = there(store.token(&name))? else {
            continue;
        };
        let Some(token) = read(&*token, wait)? else {
            continue;
        };
        let place = |file| (name.clone(), file);
        look.all.extend(token.all().map(place));
        look.making.extend(token.being_made().map(place));
    }
    Ok(look)
}

/// All tokens of `store`, held.
fn hold(store: &Store) -> Result<AllHeld> {
    let mut held = AllHeld::new();
    for _ in 0..LISTINGS {
        let names = store.tokens()?;
        if held.keys().eq(&names) {
            return Ok(held);
        }
        held.retain(|name, _| names.binary_search(name).is_ok());
        for name in names {
            if held.contains_key(&name) {
                continue;
            }
            let Some(token) = there(store.token(&name))? else {
                continue;
            };
            if let Some(hold) = there(lasting(token.hold(HELD)))? {
                // What cannot be read cannot be held either.
                let hold = hold.unwrap_or_else(|_| Hold::nothing());
                held.insert(name, (token, hold));
            }
        }
    }
    Err(Error::new(ErrorKind::Busy, "tokens come and go").at(store.path()))
}

/// Nothing of what is gone.
fn there<T>(outcome: Result<T>) -> Result<Option<T>> {
    match outcome {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        outcome => outcome.map(Some),
    }
}

/// All of a token; nothing if it is none any more.
fn read(token: &dyn Token, wait: Duration) -> Result<Option<Remembered>> {
    let Some(listed) = there(lasting(list(token, wait)))? else {
        return Ok(None);
    };
    let has_files = token.backend() == Backend::File && listed.is_ok();
    let mut files = has_files.then(Files::new);
    let (listed, others, refused) = match listed {
        Ok((names, others)) => (names, others, None),
        Err(error) => (Vec::new(), Vec::new(), Some(error)),
    };
    // Before the objects: whoever removes one removes its lock file last.
    for file in others {
        let kept = there(Kept::of(token, &file, None, wait))?;
        if let (Some(files), Some(kept)) = (&mut files, kept) {
            files.insert(file, kept);
        }
    }
    let (mut names, mut objects) = (Vec::new(), HashMap::new());
    for name in listed {
        let id = ObjectId::Object(name.clone());
        if let Some(entry) = there(entry(token, &id, files.as_mut(), wait))? {
            names.push(name.clone());
            objects.insert(name, entry);
        }
    }
    let Some(own) = there(entry(token, &ObjectId::Token, files.as_mut(), wait))? else {
        return Ok(None);
    };
    // Last: by when it changed is known whether something was being removed.
    let Some(metadata) = there(token.metadata())? else {
        return Ok(None);
    };
    let detail = "this is a snapshot, which takes no change";
    Ok(Some(Remembered {
        name: token.name().clone(),
        backend: token.backend(),
        metadata,
        own,
        names: refused.map_or_else(|| Ok(names.into()), Err),
        objects,
        files,
        refusal: Error::new(ErrorKind::ReadOnly, detail),
    }))
}

/// The names of its objects, ascending, and in the `file` backend its files that hold none.
fn list(token: &dyn Token, wait: Duration) -> Result<(Vec<ObjectName>, Vec<LayoutFile>)> {
    let patience = Patience::at_most(wait);
    if token.backend() == Backend::Db {
        return Ok((token.list(patience)?.to_vec(), Vec::new()));
    }
    let (mut names, mut others) = (Vec::new(), Vec::new());
    // One listing for both, so that they agree.
    for file in token.layout(patience)? {
        match file {
            LayoutFile::Object(ObjectId::Object(name)) => names.push(name),
            LayoutFile::Object(ObjectId::Token) => {}
            LayoutFile::Lock(_) | LayoutFile::Generation => others.push(file),
        }
    }
    Ok((names, others))
}

/// An object, and its file in `files`.
fn entry(
    token: &dyn Token,
    id: &ObjectId,
    files: Option<&mut Files>,
    wait: Duration,
) -> Result<Entry> {
    let entry = match lasting(token.object(id, Patience::at_most(wait)))? {
        Ok(object) => Entry::Whole(object),
        Err(error) => {
            let metadata = lasting(token.object_metadata(id, Patience::at_most(wait)))?;
            Entry::Broken(metadata, error)
        }
    };
    if let Some(files) = files {
        let file = LayoutFile::Object(id.clone());
        let kept = Kept::of(token, &file, entry.object(), wait)?;
        files.insert(file, kept);
    }
    Ok(entry)
}

/// Tells what is so for good, which a snapshot shows as it is, from what keeps it from being taken.
fn lasting<T>(outcome: Result<T>) -> Result<Result<T>> {
    match outcome {
        Err(error)
            if !matches!(
                error.kind(),
                ErrorKind::Damaged | ErrorKind::PermissionDenied | ErrorKind::NameTooLong
            ) =>
        {
            Err(error)
        }
        outcome => Ok(outcome),
    }
}

impl Remembered {
    /// What is in it that can be made or removed.
    fn all(&self) -> impl Iterator<Item = LayoutFile> {
        let objects = self.entries().map(|(id, _)| LayoutFile::Object(id));
        objects.chain(self.strays())
    }

    /// What somebody may be making, or removing.
    fn being_made(&self) -> impl Iterator<Item = LayoutFile> {
        let objects = self.entries();
        let unfinished = objects.filter(|(id, entry)| is_being_made(id, entry));
        let strays = self.strays().filter(|_| is_young(&self.metadata));
        unfinished
            .map(|(id, _)| LayoutFile::Object(id))
            .chain(strays)
    }

    fn entries(&self) -> impl Iterator<Item = (ObjectId, &Entry)> {
        let objects = self.objects.iter();
        let objects = objects.map(|(name, entry)| (ObjectId::Object(name.clone()), entry));
        objects.chain([(ObjectId::Token, &self.own)])
    }

    /// Lock files without an object, and a generation without a number.
    fn strays(&self) -> impl Iterator<Item = LayoutFile> {
        let files = self.files.iter().flatten();
        let strays = files.filter(|(file, kept)| match file {
            LayoutFile::Lock(ObjectId::Object(name)) => !self.objects.contains_key(name),
            LayoutFile::Generation => kept.is_empty(),
            LayoutFile::Lock(ObjectId::Token) | LayoutFile::Object(_) => false,
        });
        strays.map(|(file, _)| file.clone())
    }

    /// Forgets those of them that are `unwanted`; whether the token is not one of them itself.
    fn leave_out(&mut self, unwanted: impl Fn(LayoutFile) -> bool) -> bool {
        let being_made = self.being_made();
        let left_out: Vec<_> = being_made.filter(|file| unwanted(file.clone())).collect();
        if left_out.is_empty() {
            return true;
        }
        for file in left_out {
            if file == LayoutFile::Object(ObjectId::Token) {
                return false;
            }
            if let LayoutFile::Object(ObjectId::Object(name)) = &file {
                self.objects.remove(name);
                self.forget(&LayoutFile::Lock(ObjectId::Object(name.clone())));
            }
            self.forget(&file);
        }
        if let Ok(names) = &mut self.names {
            let left = names.iter().filter(|name| self.objects.contains_key(name));
            *names = left.cloned().collect();
        }
        true
    }

    fn forget(&mut self, file: &LayoutFile) {
        if let Some(files) = &mut self.files {
            files.remove(file);
        }
    }
}

/// What a user is told.
fn explained(error: Error) -> Error {
    let detail = match error.kind() {
        ErrorKind::System(libc::EMFILE) => {
            "no snapshot: one of a store in use needs an open file for each object while it is taken, and this process may not \
             have as many; raise the limit (ulimit -Hn, or LimitNOFILE= of a service)"
                .to_owned()
        }
        _ => format!("no snapshot: {}", error.detail()),
    };
    let mut explained = Error::new(error.kind(), detail);
    if let Some(path) = error.path() {
        explained = explained.at(path);
    }
    error.offset().into_iter().fold(explained, Error::at_offset)
}

#[cfg(test)]
mod tests;
