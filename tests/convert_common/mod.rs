//! What the tests of `tokenfs convert` share: running it, and what two stores hold, whatever their backends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::check_common::Checked;
use crate::mount_common::object_name;
use crate::support::independent::{self, Object, Value};
use crate::support::*;

/// The command, from one tokendir into another.
pub fn command(from: &Path, into: &Path, to: Backend) -> Command {
    with_arguments(tokenfs(), from, into, to)
}

/// The same of a program that may run as somebody else.
pub fn with_arguments(mut program: Command, from: &Path, into: &Path, to: Backend) -> Command {
    program
        .env("SOFTHSM2_CONF", "/nonexistent/softhsm2.conf")
        .args([
            "convert",
            "--umask",
            "0077",
            "--backend",
            "file",
            "--to",
            &to.to_string(),
        ])
        .args([from, into]);
    program
}

/// What it came to.
pub fn convert(from: &Path, into: &Path, to: Backend, tokens: &[&str]) -> Checked {
    Checked::of(command(from, into, to).args(tokens))
}

/// The same, which has to work; the last line.
#[track_caller]
pub fn converted(from: &Path, into: &Path, to: Backend) -> String {
    let checked = convert(from, into, to, &[]);
    assert_eq!(
        (checked.code, checked.err.as_str()),
        (0, ""),
        "{checked:#?}"
    );
    checked.last_line().to_owned()
}

fn sorted(object: &Object) -> Object {
    let mut sorted = object.clone();
    for (_, value) in &mut sorted {
        if let Value::Map(entries) = value {
            *entries = self::sorted(entries);
        }
    }
    sorted.sort();
    sorted
}

/// Everything in a store by names of tokens and objects, as an independent reader finds it. The token's own is called `token`.
pub fn content(tokendir: &Path) -> BTreeMap<String, BTreeMap<String, Object>> {
    let tokens = independent::read_store(tokendir).into_iter();
    tokens
        .map(|(name, token)| {
            assert!(token.damaged.is_empty(), "{:?}", token.damaged);
            let named = token.objects.iter();
            let mut objects: BTreeMap<_, _> = named
                .map(|(id, object)| (object_name(token.backend, &name, id), sorted(object)))
                .collect();
            objects.insert("token".to_owned(), sorted(&token.token));
            (name, objects)
        })
        .collect()
}

/// That both hold the same, also as `tokenfs tree` has it.
#[track_caller]
pub fn assert_same(one: &Path, two: &Path) {
    let (first, second) = (content(one), content(two));
    assert!(!first.is_empty(), "{}: there is nothing", one.display());
    assert!(
        first == second,
        "{} and {} differ:\n{first:#?}\n{second:#?}",
        one.display(),
        two.display()
    );
    assert_eq!(tree(one), tree(two));
}

fn tree(tokendir: &Path) -> String {
    let mut command = tokenfs();
    command.env("SOFTHSM2_CONF", "/nonexistent/softhsm2.conf");
    command
        .args(["tree", "--backend", "file", "--tokendir"])
        .arg(tokendir);
    // The first line is the path.
    let text = text_of(&mut command).replace(" configured", "");
    let lines: Vec<&str> = text.lines().skip(1).collect();
    lines
        .join("\n")
        .replace("(file, ", "(")
        .replace("(db, ", "(")
}

/// That a store is as SoftHSM would have made it.
#[track_caller]
pub fn assert_clean(tokendir: &Path, backend: Backend) {
    let mut command = tokenfs();
    command.env("SOFTHSM2_CONF", "/nonexistent/softhsm2.conf");
    command.args([
        "check",
        "--umask",
        "0077",
        "--backend",
        &backend.to_string(),
    ]);
    Checked::of(command.arg("--tokendir").arg(tokendir)).assert_clean();
}

/// What has a name in a directory.
pub fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
