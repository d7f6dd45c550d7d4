//! `.tokenfs/by-label`: the tokens and objects by the names that people gave them.
//!
//! An index is made from a whole token, and kept until a change is reported, or for a moment where none is.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::label::{Labelled, identity, names, unpadded};
use super::{Tree, lock, mode};
use crate::error::{Error, ErrorKind, Result};
use crate::pkcs11;
use crate::store::{Metadata, Object, ObjectId, ObjectName, Patience, TokenName};

/// How long an index is kept where changes are not reported: long enough for one `ls -l`.
const UNWATCHED: Duration = Duration::from_millis(200);

type Tokens = Arc<Names<TokenName>>;
type Objects = Arc<Names<ObjectName>>;

/// Names made from labels, and what they stand for.
#[derive(Debug)]
pub(super) struct Names<T> {
    names: BTreeMap<OsString, T>,
    /// Where the labels come from.
    sources: Vec<Metadata>,
}

impl<T: Clone> Names<T> {
    pub(super) fn get(&self, name: &OsStr) -> Option<T> {
        self.names.get(name).cloned()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&OsString, &T)> {
        self.names.iter()
    }

    /// The mode of the directory of these names: `own`, without the right to list for whoever may not read every file that
    /// a name comes from.
    pub(super) fn mode(&self, directory: &Metadata, own: u32, mask: u32) -> u32 {
        self.sources.iter().fold(own, |mode, source| {
            mode & mode::listable(directory, source, mask)
        })
    }
}

/// What has been looked up.
#[derive(Debug, Default)]
pub(super) struct Index {
    tokens: Option<Kept<Tokens>>,
    objects: HashMap<TokenName, Kept<Objects>>,
}

#[derive(Debug)]
struct Kept<T> {
    names: T,
    changes: u64,
    /// Whether all that they were made from is watched, and could be read.
    lasts: bool,
    /// How long they are kept if not: so that the next one to ask does not do it all again at once.
    pause: Duration,
    made_at: Instant,
}

impl<T: Clone> Kept<T> {
    /// What was made since `start`.
    fn new(names: T, changes: u64, lasts: bool, start: Instant) -> Self {
        let made_at = Instant::now();
        Self {
            names,
            changes,
            lasts,
            pause: UNWATCHED.max(4 * (made_at - start)),
            made_at,
        }
    }

    fn get(&self, changes: u64, longest: Duration) -> Option<T> {
        let longest = if self.lasts { longest } else { self.pause };
        let fresh = self.changes == changes && self.made_at.elapsed() < longest;
        fresh.then(|| self.names.clone())
    }
}

/// Where the link to an object leads, from `.tokenfs/by-label/<token label>/`.
pub(super) fn target(token: &TokenName, object: &ObjectName) -> OsString {
    let mut path = b"../../../".to_vec();
    path.extend_from_slice(token.as_bytes());
    path.push(b'/');
    path.extend_from_slice(object.as_bytes());
    OsString::from_vec(path)
}

impl Tree {
    /// The tokens under the names of their directories in `by-label`.
    pub(super) fn tokens_by_label(&self, patience: Patience) -> Result<Tokens> {
        let changes = self.change_count();
        let kept = lock(&self.labels)
            .tokens
            .as_ref()
            .and_then(|kept| kept.get(changes, self.settings.kept));
        if let Some(names) = kept {
            return Ok(names);
        }
        let start = Instant::now();
        let (mut all, mut sources) = (Vec::new(), Vec::new());
        let mut lasts = self.coverage.has_tokendir();
        for token in self.store.tokens()? {
            lasts &= self.coverage.has_token(&token) && !self.store.is_building(&token);
            let own = self.token(&token).and_then(|opened| {
                sources.extend(opened.metadata());
                opened.object(&ObjectId::Token, patience)
            });
            let label = match own {
                Ok(object) => {
                    sources.push(object.metadata);
                    label_of_token(&object)
                }
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(error),
                // What is wrong with one token is no reason to hide the others.
                Err(error) => {
                    lasts &= is_lasting(&error);
                    None
                }
            };
            all.push(Labelled {
                label: label.unwrap_or_else(|| token.as_bytes().to_vec()),
                extension: String::new(),
                identity: identity(token.as_os_str()),
                target: token,
            });
        }
        let names: Tokens = Arc::new(Names {
            names: names(all),
            sources,
        });
        let kept = Kept::new(Arc::clone(&names), changes, lasts, start);
        lock(&self.labels).tokens = Some(kept);
        Ok(names)
    }

    /// The objects of a token under the names of the links to them.
    pub(super) fn objects_by_label(
        &self,
        token: &TokenName,
        patience: Patience,
    ) -> Result<Objects> {
        let changes = self.change_count();
        let kept = lock(&self.labels)
            .objects
            .get(token)
            .and_then(|kept| kept.get(changes, self.settings.kept));
        if let Some(names) = kept {
            return Ok(names);
        }
        if matches!(patience, Patience::Now) {
            // A read of every object there is.
            return Err(Error::new(
                ErrorKind::WouldBlock,
                "the labels have to be read",
            ));
        }
        let start = Instant::now();
        let opened = self.token(token).inspect_err(|_| {
            lock(&self.labels).objects.remove(token);
        })?;
        let (mut all, mut sources) = (Vec::new(), Vec::new());
        let mut lasts = self.coverage.has_token(token) && !self.store.is_building(token);
        for object in opened.list(patience)?.iter() {
            let id = ObjectId::Object(object.clone());
            let (label, class) = match opened.object(&id, patience) {
                Ok(read) => {
                    sources.push(read.metadata);
                    (label_of_object(&read), class_of(&read))
                }
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(error),
                Err(error) => {
                    lasts &= is_lasting(&error);
                    (None, trouble(&error).to_owned())
                }
            };
            all.push(Labelled {
                label: label.unwrap_or_else(|| object.as_bytes().to_vec()),
                extension: format!(".{class}"),
                identity: identity(object.as_os_str()),
                target: object.clone(),
            });
        }
        // Mostly they are all alike.
        sources.dedup_by_key(|source| (source.mode, source.uid, source.gid));
        let names: Objects = Arc::new(Names {
            names: names(all),
            sources,
        });
        let kept = Kept::new(Arc::clone(&names), changes, lasts, start);
        lock(&self.labels).objects.insert(token.clone(), kept);
        Ok(names)
    }
}

/// What stands for the class of an object that cannot be read.
fn trouble(error: &Error) -> &'static str {
    match error.kind() {
        ErrorKind::Damaged => "damaged",
        ErrorKind::Busy => "locked",
        _ => "unreadable",
    }
}

/// Whether a failure stays until the store changes. A lock goes without a trace.
fn is_lasting(error: &Error) -> bool {
    error.kind() == ErrorKind::Damaged
}

fn label_of_token(object: &Object) -> Option<Vec<u8>> {
    let label = unpadded(object.attributes.bytes(pkcs11::CKA_OS_TOKENLABEL)?);
    (!label.is_empty()).then(|| label.to_vec())
}

/// The label, where there is one that can be read without a PIN: that of a private object is ciphertext.
pub(crate) fn label_of_object(object: &Object) -> Option<Vec<u8>> {
    if object.attributes.boolean(pkcs11::CKA_PRIVATE) == Some(true) {
        return None;
    }
    let label = object.attributes.bytes(pkcs11::CKA_LABEL)?;
    (!label.is_empty()).then(|| label.to_vec())
}

fn class_of(object: &Object) -> String {
    match object.attributes.ulong(pkcs11::CKA_CLASS) {
        Some(class) => pkcs11::class_word(class),
        None => "object".to_owned(),
    }
}
