//! What the tests of `tokenfs check` share: running it, being sure that it wrote nothing, and stores to damage.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code)]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::template::{boolean, bytes, ulong};
use crate::support::*;

/// What the command came to.
#[derive(Debug)]
pub struct Checked {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Checked {
    pub fn of(command: &mut Command) -> Self {
        let output = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Self {
            code: output.status.code().unwrap(),
            out: text(output.stdout),
            err: text(output.stderr),
        }
    }

    pub fn last_line(&self) -> &str {
        self.out.lines().last().unwrap_or_default()
    }

    /// The last line, without the directory that `tokenfs check` begins it with.
    pub fn summary(&self) -> &str {
        let line = self.last_line();
        line.split_once(": ").map_or(line, |(_, summary)| summary)
    }

    pub fn findings(&self) -> Vec<&str> {
        let mut lines: Vec<&str> = self.out.lines().collect();
        lines.pop();
        lines
    }

    /// The line about a path, which must be the only one.
    #[track_caller]
    pub fn of_path(&self, path: &Path) -> &str {
        let prefix = format!("{}: ", path.display());
        let lines: Vec<&str> = self
            .findings()
            .into_iter()
            .filter(|line| line.starts_with(&prefix))
            .collect();
        assert_eq!(lines.len(), 1, "{}: {self:#?}", path.display());
        &lines[0][prefix.len()..]
    }

    #[track_caller]
    pub fn assert_clean(&self) {
        assert_eq!((self.code, self.err.as_str()), (0, ""), "{self:#?}");
        assert!(self.summary().ends_with(": clean"), "{self:#?}");
        assert!(self.findings().is_empty(), "{self:#?}");
    }
}

pub fn check(softhsm: &Softhsm, arguments: &[&str]) -> Checked {
    Checked::of(
        tokenfs()
            .args(["check", "--config"])
            .arg(&softhsm.conf)
            .args(arguments),
    )
}

/// Names, contents, modes and the times that tell of a change.
pub fn exactly(softhsm: &Softhsm) -> (Snapshot, BTreeMap<PathBuf, [i64; 4]>) {
    let times = walk(&softhsm.tokendir)
        .into_iter()
        .map(|path| {
            let m = fs::symlink_metadata(&path).unwrap();
            let times = [m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()];
            (path, times)
        })
        .collect();
    (softhsm.snapshot(), times)
}

/// Looks, and is sure that nothing was written.
#[track_caller]
pub fn look(softhsm: &Softhsm) -> Checked {
    let before = exactly(softhsm);
    let checked = check(softhsm, &[]);
    let after = exactly(softhsm);
    before.0.assert_same(&after.0);
    assert_eq!(before.1, after.1);
    checked
}

/// Where the attributes of an object file end, the generation being the first end.
pub fn ends(data: &[u8]) -> Vec<usize> {
    let number = |at: usize| u64::from_be_bytes(data[at..at + 8].try_into().unwrap()) as usize;
    let mut ends = vec![8];
    let mut at = 8;
    while at < data.len() {
        at += 16
            + match number(at + 8) {
                1 => 1,
                2 => 8,
                3 | 4 => 8 + number(at + 16),
                5 => 8 + 8 * number(at + 16),
                other => panic!("kind {other}"),
            };
        ends.push(at);
    }
    ends
}

/// The `.object` files of a token, without its own.
pub fn objects(token: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(token)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.retain(|path| {
        path.extension() == Some(OsStr::new("object")) && !path.ends_with("token.object")
    });
    paths.sort();
    paths
}

pub fn data_object(label: &str) -> Vec<template::Attribute> {
    vec![
        ulong(0, 0),
        boolean(1, true),
        boolean(2, false),
        bytes(3, label),
        bytes(0x11, "value"),
    ]
}

/// A store with a token of `file` and one public data object; its file.
pub fn with_object() -> (Softhsm, P11, PathBuf) {
    let (softhsm, mut client) = Softhsm::with_token(Backend::File);
    client.create(&data_object("it")).unwrap();
    let object = objects(&softhsm.token_directory()).remove(0);
    (softhsm, client, object)
}
