//! All of a token as it was at one moment, of anything that is a [`Token`].
//!
//! Every object is read under its locks, and then looked at again: if none has changed between the end of the first look and the
//! beginning of the second one, all of them were there together in that moment. If one has, the second look counts as the first of
//! the next two. An object that SoftHSM is making is waited for.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::{Step, Watch};
use crate::error::{Error, ErrorKind, Result};
use crate::store::snapshot::is_unfinished;
use crate::store::{Metadata, Object, ObjectId, ObjectName, Patience, Token};

/// How often a token is looked at, however long that takes.
const LOOKS: u32 = 4;

/// The pause before it is looked at again.
const PAUSE: Duration = Duration::from_millis(2);

/// For how long an object can be unfinished: 3 s were measured in the `db` backend, in which an object of SoftHSM's has the time of the
/// latest change of any.
const UNFINISHED: Duration = Duration::from_secs(5);

/// What a token holds.
#[derive(Debug)]
pub(super) struct Content {
    /// Of its directory.
    pub directory: Metadata,
    /// The token's own object.
    pub own: Arc<Object>,
    /// Its objects, by name.
    pub objects: Vec<(ObjectName, Arc<Object>)>,
}

impl Content {
    /// Whether nobody has changed anything between the two looks.
    fn same(&self, other: &Self) -> bool {
        let mut pairs = self.objects.iter().zip(&other.objects);
        Arc::ptr_eq(&self.own, &other.own)
            && self.objects.len() == other.objects.len()
            && pairs.all(|(one, two)| one.0 == two.0 && Arc::ptr_eq(&one.1, &two.1))
    }

    fn is_finished(&self) -> bool {
        !self
            .objects
            .iter()
            .any(|(name, object)| is_being_made(&ObjectId::Object(name.clone()), object))
    }
}

/// Whether SoftHSM may be about to make this object.
fn is_being_made(id: &ObjectId, object: &Object) -> bool {
    let age = SystemTime::now().duration_since(object.metadata.mtime);
    is_unfinished(id, object) && age.is_ok_and(|age| age < UNFINISHED)
}

/// Reads a token as it was at one moment. Each lock is waited for as long as `limit`, and so is a moment in which nobody writes.
///
/// # Errors
/// Each object that cannot be read; [`ErrorKind::Busy`] if the token keeps changing; what `watch` fails with.
pub(super) fn read(
    token: &dyn Token,
    limit: Duration,
    watch: &mut Watch<'_>,
) -> Result<Content, Vec<Error>> {
    let mut last = look(token, limit, true, watch)?;
    let start = Instant::now();
    for looks in 2.. {
        // What looks unfinished for that long is to be like this.
        let late = start.elapsed() > limit;
        last = match (look(token, limit, false, watch)?, last) {
            (Some(now), Some(last)) if now.same(&last) && (late || now.is_finished()) => {
                return Ok(now);
            }
            (now, _) => now,
        };
        if looks >= LOOKS && late {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    let detail = "the token keeps changing; stop the application that writes it, or try again when it writes less";
    Err(vec![Error::new(ErrorKind::Busy, detail)])
}

/// One look at everything; nothing if an object has come or gone meanwhile.
fn look(
    token: &dyn Token,
    limit: Duration,
    is_first: bool,
    watch: &mut Watch<'_>,
) -> Result<Option<Content>, Vec<Error>> {
    let one = |error| vec![error];
    let patience = || Patience::at_most(limit);
    let directory = token.metadata().map_err(one)?;
    let names = token.list(patience()).map_err(one)?;
    watch(if is_first {
        Step::Found(names.len() + 1)
    } else {
        Step::Again
    })
    .map_err(one)?;
    let (mut objects, mut failures) = (Vec::with_capacity(names.len()), Vec::new());
    let mut is_whole = true;
    let own = token.object(&ObjectId::Token, patience());
    for name in names.iter() {
        if is_first {
            watch(Step::Read).map_err(one)?;
        }
        match token.object(&ObjectId::Object(name.clone()), patience()) {
            Ok(object) => objects.push((name.clone(), object)),
            Err(error) if error.kind() == ErrorKind::NotFound => is_whole = false,
            Err(error) => {
                // It was waited for, and the next one may be locked too.
                let enough = error.kind() == ErrorKind::Busy;
                failures.push(of_object(error, name));
                if enough {
                    break;
                }
            }
        }
    }
    let own = match own {
        Ok(own) if failures.is_empty() => own,
        Ok(_) => return Err(failures),
        Err(error) => {
            failures.insert(0, error);
            return Err(failures);
        }
    };
    if is_first {
        watch(Step::Read).map_err(one)?;
    }
    let is_whole = is_whole && *token.list(patience()).map_err(one)? == *names;
    Ok(is_whole.then_some(Content {
        directory,
        own,
        objects,
    }))
}

/// An error of one object, which it names even where all objects are in one file.
pub(super) fn of_object(error: Error, name: &ObjectName) -> Error {
    let of_file = |path: &Path| path.file_stem() == Some(name.as_os_str());
    if error.path().is_some_and(of_file) || error.detail().contains(&name.to_string()) {
        return error;
    }
    let mut named = Error::new(error.kind(), format!("object {name}: {}", error.detail()));
    if let Some(path) = error.path() {
        named = named.at(path);
    }
    match error.offset() {
        Some(offset) => named.at_offset(offset),
        None => named,
    }
}
