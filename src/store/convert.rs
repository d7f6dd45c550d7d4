//! Making a token of one store anew in another, whose backend may be another.
//!
//! A source is anything that is a [`Token`]. What it holds is read as it was at one moment ([`read`]), checked as a whole, and written
//! into a token that is being built, which gets its name last (`tokendir::lifecycle`): until then there is none, and what a crash
//! leaves is removed by the next writer. Names, attributes and times are kept; modes and owners as far as this process may give
//! them ([`owners`]).

mod owners;
mod read;

use std::fs::{self, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use self::owners::Owners;
use self::read::Content;
use super::db::uuid_of;
use super::validate;
use super::{
    Access, Backend, Metadata, MetadataChange, NewObject, ObjectId, Options, Patience, Store,
    Target, Time, Token, TokenName,
};
use crate::diagnostics::Diagnostics;
use crate::error::{Error, ErrorKind, Result};
use crate::pkcs11::CKA_OS_TOKENSERIAL;

/// What has just been done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// So many objects, the token's own included, are going to be read and then made.
    Found(usize),
    /// One of them was read.
    Read,
    /// One of them was made.
    Made,
    /// The token has changed meanwhile, and is read again.
    Again,
}

/// What is told each [`Step`]. An error ends the conversion, and nothing is left of it.
pub type Watch<'a> = dyn FnMut(Step) -> Result<()> + 'a;

/// A token that was made.
#[derive(Debug)]
pub struct Converted {
    /// How many objects it has.
    pub objects: usize,
    /// Why its directory does not have the time or the mode that it should have.
    pub undated: Option<Error>,
}

/// The store that tokens are made in; its directory is made, with the mode and owner of that of `source`, if there is none. Whether it
/// was.
///
/// # Errors
/// What making and opening it fails with.
pub fn open_target(
    tokendir: &Path,
    source: &Store,
    options: Options,
    diagnostics: Arc<Diagnostics>,
) -> Result<(Store, bool)> {
    let mut directory = fs::DirBuilder::new();
    let made = match directory.mode(0o700).create(tokendir) {
        Ok(()) => true,
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => false,
        Err(error) => return Err(Error::io("make the directory", &error).at(tokendir)),
    };
    let store = Store::open(tokendir, options, diagnostics)?;
    if made {
        let like = Owners::new(store.directory()?).directory(&source.metadata()?, 0);
        store.set_metadata(&MetadataChange {
            mode: Some(like.mode),
            uid: Some(like.uid),
            gid: Some(like.gid),
            ..MetadataChange::default()
        })?;
        // What is in it is to be found after a power failure.
        store
            .path()
            .parent()
            .map_or(Ok(()), |parent| File::open(parent)?.sync_all())
            .map_err(|error| Error::io("sync", &error).at(tokendir))?;
    }
    Ok((store, made))
}

/// Makes the token `source`, whose directory is `place`, anew in `target`, under the same name and in that store's backend. No
/// mode has bits of `mask`.
///
/// # Errors
/// Everything that is in the way, as far as it can be told at once, and nothing is there then:
/// [`ErrorKind::Exists`]; [`ErrorKind::Damaged`] for each object; [`ErrorKind::Invalid`] for each that cannot be in such a token, or if
/// the slot is taken; [`ErrorKind::Busy`]; what writing fails with.
pub fn convert(
    source: &dyn Token,
    place: &Path,
    target: &Store,
    mask: u32,
    watch: &mut Watch<'_>,
) -> Result<Converted, Vec<Error>> {
    let name = source.name();
    let one = |error| vec![error];
    let there = || target.path().join(name.as_os_str());
    if target.tokens().map_err(one)?.contains(name) {
        let detail = "there is a token of that name, and it stays as it is; remove it first, or choose another directory";
        return Err(vec![Error::new(ErrorKind::Exists, detail).at(there())]);
    }
    let content = read::read(source, target.options().lock_wait, watch).map_err(|failures| {
        failures
            .into_iter()
            .map(|error| error.at(place))
            .collect::<Vec<_>>()
    })?;
    let unfit = unfit(&content, place, target.options().backend);
    if !unfit.is_empty() {
        return Err(unfit);
    }
    check_slot(&content, name, target).map_err(|error| one(error.at(there())))?;
    let objects = content.objects.len();
    build(content, name, target, mask, watch).map(|undated| Converted { objects, undated })
}

fn patience(store: &Store) -> Patience {
    Patience::at_most(store.options().lock_wait)
}

/// What of a token no token of that backend can hold, or SoftHSM could not live with.
fn unfit(content: &Content, place: &Path, backend: Backend) -> Vec<Error> {
    let mut unfit = Vec::new();
    let own = &content.own.attributes;
    if own.bytes(CKA_OS_TOKENSERIAL).is_none() {
        let detail = "a token without a CKA_OS_TOKENSERIAL is none";
        unfit.push(Error::new(ErrorKind::Invalid, detail).at(place));
    }
    unfit.extend(
        validate::check_token(own)
            .err()
            .map(|error| error.at(place)),
    );
    for (name, object) in &content.objects {
        let named = match backend {
            Backend::Db => uuid_of(name).map(drop),
            Backend::File => Ok(()),
        };
        let checked = named.and_then(|()| validate::check_finished(None, &object.attributes));
        unfit.extend(
            checked
                .err()
                .map(|error| read::of_object(error, name).at(place)),
        );
    }
    unfit
}

fn check_slot(content: &Content, name: &TokenName, target: &Store) -> Result<()> {
    let taken = target.slots_of_others(name, |other| {
        target
            .token(other)?
            .object(&ObjectId::Token, patience(target))
    })?;
    validate::check_slot(&content.own.attributes, &taken)
}

/// Modes and owners of what a token is made of.
#[derive(Clone, Copy, Debug)]
struct Look {
    directory: Access,
    files: Access,
}

/// Makes it; why its directory does not look as it should, if so.
fn build(
    content: Content,
    name: &TokenName,
    target: &Store,
    mask: u32,
    watch: &mut Watch<'_>,
) -> Result<Option<Error>, Vec<Error>> {
    let directory = target.directory().map_err(|error| vec![error])?;
    let mut owners = Owners::new(directory);
    let look = Look {
        directory: owners.directory(&content.directory, mask),
        files: owners.file(&content.own.metadata, mask),
    };
    let directory = content.directory;
    // Whoever makes it has to be able to write into it until it is made.
    let begun = target.create_token(
        name,
        with_bits(look.directory, 0o700),
        with_bits(look.files, 0o600),
    );
    let token = begun.map_err(|error| vec![error])?;
    let filled = fill(
        &*token,
        content,
        look.files,
        &mut owners,
        mask,
        target,
        watch,
    );
    drop(token);
    let published = filled.and_then(|()| target.publish_token(name, patience(target)));
    match published {
        Err(error) if target.is_building(name) => {
            let mut failures = vec![error];
            // What stays is none, and the next writer removes it.
            failures.extend(target.abandon_token(name, patience(target)).err());
            Err(failures)
        }
        // It is a token, and perhaps not after a power failure.
        published => {
            let dressed = dress(name, &directory, look.directory, target);
            Ok(published.err().or(dressed.err()))
        }
    }
}

fn with_bits(access: Access, bits: u32) -> Access {
    Access {
        mode: access.mode | bits,
        ..access
    }
}

fn fill(
    token: &dyn Token,
    content: Content,
    files: Access,
    owners: &mut Owners<'_>,
    mask: u32,
    target: &Store,
    watch: &mut Watch<'_>,
) -> Result<()> {
    let own = &content.own;
    let mut edit = |attributes: &mut _| {
        own.attributes.clone_into(attributes);
        Ok(())
    };
    let (id, time) = (ObjectId::Token, Some(own.metadata.mtime));
    token.update(&id, &mut edit, time, patience(target))?;
    watch(Step::Made)?;
    let new: Vec<_> = content
        .objects
        .into_iter()
        .map(|(name, object)| {
            let new = NewObject {
                attributes: object.attributes.clone(),
                access: owners.file(&object.metadata, mask),
                mtime: Some(object.metadata.mtime),
            };
            (name, new)
        })
        .collect();
    token.create_all(&new, &mut || watch(Step::Made), patience(target))?;
    if files != with_bits(files, 0o600) {
        let change = MetadataChange {
            mode: Some(files.mode),
            ..MetadataChange::default()
        };
        token.set_metadata(&Target::Object(id), &change, patience(target))?;
    }
    Ok(())
}

/// Gives the directory of a new token its mode and its time, which is not when it was made.
fn dress(name: &TokenName, like: &Metadata, access: Access, target: &Store) -> Result<()> {
    let mode = (access != with_bits(access, 0o700)).then_some(access.mode);
    let change = MetadataChange {
        mode,
        mtime: Some(Time::At(like.mtime)),
        ..MetadataChange::default()
    };
    let token = target.token(name)?;
    token.set_metadata(&Target::Directory, &change, patience(target))
}

#[cfg(test)]
mod tests;
