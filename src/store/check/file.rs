//! A token of the `file` backend.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::stat::fstat;

use super::finding::COMPARE;
use super::object::{Places, judge, judge_order, judge_token, places, undecided_key};
use super::place::{GENERATION, Sort, with};
use super::slots::Slot;
use super::{Category, Finding, Look, Remedy, open_file};
use crate::error::{Error, ErrorKind, Result};
use crate::pkcs11::CKA_OS_TOKENSERIAL;
use crate::store::attribute::Attributes;
use crate::store::file::read::{Reading, read_file};
use crate::store::file::{LOCK_SUFFIX, OBJECT_SUFFIX, TOKEN_OBJECT};
use crate::store::leftover::{JOURNAL_SUFFIX, NEW_SUFFIX};
use crate::store::metadata::Stamp;
use crate::store::{Backend, Patience, lock};

/// `token.lock`.
const TOKEN: &str = "token";

/// Looks at everything in the token but what is foreign to it.
pub(super) fn look(look: &mut Look<'_>) {
    token(look);
    generation(look);
    for entry in look.entries.clone() {
        if entry.sort != Sort::File {
            continue;
        }
        if let Some(stem) = entry.stem(OBJECT_SUFFIX).filter(|stem| *stem != TOKEN) {
            look.report.objects += 1;
            object(look, &entry.name, stem);
            missing_lock(look, stem);
        } else if let Some(stem) = entry.stem(LOCK_SUFFIX).filter(|stem| *stem != TOKEN) {
            lock_alone(look, &entry.name, stem);
        }
    }
    missing_lock(look, OsStr::new(TOKEN));
}

fn token(look: &mut Look<'_>) {
    let path = look.path.join(TOKEN_OBJECT);
    let Some(content) = content(look, OsStr::new(TOKEN_OBJECT), None) else {
        return;
    };
    let attributes = content.attributes;
    look.slot = Some(Slot::of(Backend::File, &attributes));
    for finding in judge_order(&content.places)
        .into_iter()
        .chain(judge_token(&attributes))
    {
        look.report.found(finding.in_state(&content.stamp), &path);
    }
    if let Some(serial) = attributes.bytes(CKA_OS_TOKENSERIAL) {
        let name = look.name.to_string().replace('-', "");
        let digits = name.len().checked_sub(16).and_then(|at| name.get(at..));
        if digits.is_none_or(|digits| digits.as_bytes() != serial) {
            let directory = look.path.clone();
            let sentence = "its serial number is not the end of its directory's name, as SoftHSM makes it; it works all the same";
            look.report.note(&directory, sentence);
        }
    }
}

fn object(look: &mut Look<'_>, file: &OsStr, stem: &OsStr) {
    let path = look.path.join(file);
    let lock = with(stem, LOCK_SUFFIX);
    let Some(content) = content(look, file, Some(&lock)) else {
        return;
    };
    let mut findings = judge_order(&content.places);
    findings.extend(judge(&content.attributes, &content.places, content.size));
    // What follows the last attribute is in the report already.
    if findings.is_empty() && content.size.is_some() {
        findings.extend(undecided_key(&content.attributes));
    }
    for finding in findings {
        look.report.found(finding.in_state(&content.stamp), &path);
    }
}

/// What a file holds, and where.
struct Content {
    attributes: Attributes,
    places: Places,
    /// Of the file, in bytes, if nothing follows the last attribute.
    size: Option<u64>,
    stamp: Stamp,
}

/// What a file holds. What is wrong with the file itself is in the report; `None` if there is nothing more to say.
fn content(look: &mut Look<'_>, file: &OsStr, lock: Option<&OsStr>) -> Option<Content> {
    let path = look.path.join(file);
    let lock = lock.map(Path::new);
    // As the mount reads it.
    let read = read_file(
        look.directory.as_fd(),
        Path::new(file),
        lock,
        false,
        look.patience(),
    );
    match read {
        Ok(Reading { version, bytes, .. }) => match version.content {
            Ok(decoded) => {
                let mut size = Some(bytes.len() as u64);
                if let Some(offset) = decoded.trailing {
                    size = None;
                    let left = bytes.len() as u64 - offset;
                    let noun = if left == 1 { "byte" } else { "bytes" };
                    let detail = format!(
                        "{left} {noun} that are no attribute follow; SoftHSM ignores them, and attributes may have been lost; they begin"
                    );
                    let finding = Finding::new(Category::Suspicious, detail)
                        .at_offset(offset)
                        .advising(COMPARE)
                        .in_state(&version.stamp);
                    look.report.found(finding, &path);
                }
                if size.is_none() && decoded.attributes.is_empty() {
                    return None;
                }
                Some(Content {
                    attributes: decoded.attributes,
                    places: places(&bytes),
                    size,
                    stamp: version.stamp,
                })
            }
            Err(error) => {
                let finding = Finding::torn(&error).in_state(&version.stamp);
                look.report.found(finding, &path);
                None
            }
        },
        // It was destroyed meanwhile, or is no regular file, which is told elsewhere.
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        // It has more bytes than any object.
        Err(error) if error.kind() == ErrorKind::Damaged => {
            look.report.found(Finding::torn(&error), &path);
            None
        }
        Err(error) => {
            look.report.failed(error, &path);
            None
        }
    }
}

/// The lock file of an object, which SoftHSM has to delete with it.
fn missing_lock(look: &mut Look<'_>, stem: &OsStr) {
    let lock = with(stem, LOCK_SUFFIX);
    if look.entries.iter().any(|entry| entry.name == lock) {
        return;
    }
    let detail = if stem == TOKEN {
        "every token of SoftHSM's has this lock file"
    } else {
        "the lock file is not there, without which SoftHSM fails to delete the object"
    };
    let finding = Finding::new(Category::Missing, detail).mended_by(Remedy::MakeLock);
    let path = look.path.join(lock);
    look.report.found(finding, &path);
}

/// A lock file whose object is gone.
fn lock_alone(look: &mut Look<'_>, file: &OsStr, stem: &OsStr) {
    let owners = [OBJECT_SUFFIX, NEW_SUFFIX, JOURNAL_SUFFIX].map(|ending| with(stem, ending));
    let owned = look
        .entries
        .iter()
        .any(|entry| owners.contains(&entry.name));
    if owned {
        return;
    }
    let path = look.path.join(file);
    // Whoever makes an object may have it.
    match open_file(look, file) {
        Ok(open) => match lock::lock_shared(&open, Patience::Now) {
            Ok(()) => {
                let detail =
                    "a lock file without an object, left when that was being made or deleted";
                let finding =
                    Finding::new(Category::Leftover, detail).mended_by(Remedy::RemoveLock);
                look.report.found(finding, &path);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => look.report.failed(error, &path),
        },
        Err(Errno::ENOENT) => {}
        Err(errno) => look.report.failed(Error::system("open", errno), &path),
    }
}

/// The token's counter.
fn generation(look: &mut Look<'_>) {
    let path = look.path.join(GENERATION);
    if look.entry(GENERATION).is_none() {
        let detail =
            "SoftHSM counts in it what is made and deleted, and sessions that are open go by that";
        let finding = Finding::new(Category::Missing, detail).mended_by(Remedy::MakeGeneration);
        look.report.found(finding, &path);
        return;
    }
    if !look.has(GENERATION, Sort::File) {
        return;
    }
    match generation_size(look) {
        Ok(8) => {}
        Ok(size) if size < 8 => {
            let detail = format!(
                "it has {size} of 8 bytes, and SoftHSM does not count on from there; it ends"
            );
            let finding = Finding::new(Category::Torn, detail)
                .at_offset(size)
                .mended_by(Remedy::MakeGeneration);
            look.report.found(finding, &path);
        }
        Ok(_) => {
            let detail = "it has more than 8 bytes; SoftHSM ignores the rest, which begins";
            let finding = Finding::new(Category::Suspicious, detail).at_offset(8);
            look.report.found(finding, &path);
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => look.report.failed(error, &path),
    }
}

fn generation_size(look: &Look<'_>) -> Result<u64> {
    let file =
        open_file(look, OsStr::new(GENERATION)).map_err(|errno| Error::system("open", errno))?;
    lock::lock_shared(&file, look.patience())?;
    let stat = fstat(&file).map_err(|errno| Error::system("stat", errno))?;
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}
