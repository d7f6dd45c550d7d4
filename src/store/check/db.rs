//! A token of the `db` backend.

use std::path::Path;
use std::sync::Arc;

use nix::sys::stat::lstat;

use super::finding::{RESTORE, hash};
use super::object::{judge, judge_token, undecided_key};
use super::slots::Slot;
use super::{Category, Finding, Look, Remedy};
use crate::diagnostics::Diagnostics;
use crate::error::{Error, ErrorKind, Result};
use crate::store::db::check::Problem;
use crate::store::db::{DATABASE, DbToken, journal_of};
use crate::store::file::encode;
use crate::store::metadata::Stamp;
use crate::store::{Backend, ObjectId, Options, Token};

/// Looks at the database.
pub(super) fn look(look: &mut Look<'_>) {
    let path = look.path.join(DATABASE);
    match open(look).and_then(|token| database(look, &token)) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) if error.kind() == ErrorKind::Damaged => {
            look.report.found(Finding::torn(&error), &path)
        }
        Err(error) => look.report.failed(error, &path),
    }
}

fn open(look: &Look<'_>) -> Result<DbToken> {
    // SQLite opens by path, which must lead to where we look.
    look.store.check_in_place()?;
    let options = Options {
        read_only: true,
        ..look.store.options().clone()
    };
    let log = Arc::new(Diagnostics::new());
    DbToken::open(look.name.clone(), &look.path, options, log)
}

fn database(look: &mut Look<'_>, token: &DbToken) -> Result<()> {
    let path = look.path.join(DATABASE);
    let stamp = |path: &Path| lstat(path).ok().map(|stat| Stamp::from(&stat));
    let before = stamp(&path);
    let examined = token.examine(look.patience())?;
    look.rest = look
        .rest
        .filter(|_| !examined.in_use)
        .map(|rest| hash(&(rest, before)));
    for problem in examined.problems {
        let finding = match problem {
            Problem::HotJournal => Finding::new(
                Category::Leftover,
                "a writer crashed and left a journal, which the next one who opens the database for writing rolls back",
            )
            .in_state(&stamp(&journal_of(&path)))
            .mended_by(Remedy::RollBack),
            Problem::Damaged(detail) => Finding::new(Category::Torn, detail).advising(RESTORE),
            Problem::Odd(detail) => Finding::new(Category::Suspicious, detail),
        };
        let hot = finding.remedy.is_some();
        look.report.found(finding, &path);
        if hot {
            // What is in the database is not true before that.
            return Ok(());
        }
    }
    let names = token.list(look.patience())?;
    look.report.objects = names.len();
    match token.object(&ObjectId::Token, look.patience()) {
        Ok(own) => {
            look.slot = Some(Slot::of(Backend::Db, &own.attributes));
            for finding in judge_token(&own.attributes) {
                look.report.found(finding, &path);
            }
        }
        Err(error) => wrong(look, "", &error),
    }
    for name in names.iter() {
        let id = ObjectId::Object(name.clone());
        let row = token.row(&id, look.patience());
        let of = match row {
            Ok(row) => format!("object {name} (row {row}): "),
            Err(_) => format!("object {name}: "),
        };
        match token.object(&id, look.patience()) {
            Ok(object) => {
                let mut findings = judge(&object.attributes, &[], None);
                if findings.is_empty() {
                    findings.extend(undecided_key(&object.attributes));
                }
                if findings.is_empty() {
                    continue;
                }
                // Its bytes, as a file would hold them.
                let state = encode(0, &object.attributes);
                for mut finding in findings {
                    finding.detail.insert_str(0, &of);
                    look.report.found(finding.in_state(&state), &path);
                }
            }
            // It was destroyed meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => wrong(look, &of, &error),
        }
    }
    Ok(())
}

fn wrong(look: &mut Look<'_>, of: &str, error: &Error) {
    let path = look.path.join(DATABASE);
    if error.kind() == ErrorKind::Damaged {
        let mut finding = Finding::torn(error).in_state(&error.to_string());
        finding.detail.insert_str(0, of);
        look.report.found(finding, &path);
    } else {
        look.report.failed(error.clone(), &path);
    }
}
