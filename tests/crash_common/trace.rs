//! What `strace` says of a process: which system calls its operations make, and in which order data is synced.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::support::tool;

/// One system call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    pub name: String,
    /// The how-manieth of its name it is in its thread.
    pub number: usize,
    pub arguments: String,
    pub result: String,
}

impl Call {
    /// Whether something on disk can be another after it.
    pub fn changes_something(&self) -> bool {
        match self.name.as_str() {
            "open" | "openat" | "openat2" => ["O_CREAT", "O_TRUNC", "O_TMPFILE"]
                .iter()
                .any(|flag| self.arguments.contains(flag)),
            "write" | "writev" => {
                !self.arguments.starts_with("1<") && !self.arguments.starts_with("2<")
            }
            name => [
                "creat",
                "pwrite64",
                "pwritev",
                "pwritev2",
                "rename",
                "renameat",
                "renameat2",
                "link",
                "linkat",
                "unlink",
                "unlinkat",
                "symlink",
                "symlinkat",
                "mkdir",
                "mkdirat",
                "rmdir",
                "ftruncate",
                "truncate",
                "fallocate",
                "chmod",
                "fchmod",
                "fchmodat",
                "fchmodat2",
                "chown",
                "fchown",
                "lchown",
                "fchownat",
                "utimensat",
                "setxattr",
                "fsetxattr",
                "lsetxattr",
                "removexattr",
                "fremovexattr",
                "copy_file_range",
                "sendfile",
                "mknod",
                "mknodat",
            ]
            .contains(&name),
        }
    }

    /// The paths that it names, by descriptor or by name, in order.
    pub fn paths(&self) -> Vec<PathBuf> {
        let mut paths = Vec::new();
        let mut directory: Option<PathBuf> = None;
        let mut rest = self.arguments.as_str();
        while let Some(at) = rest.find(['<', '"']) {
            let quoted = rest[at..].starts_with('"');
            let inner = &rest[at + 1..];
            let end = inner
                .find(if quoted { '"' } else { '>' })
                .unwrap_or(inner.len());
            let text = Path::new(&inner[..end]);
            if quoted {
                paths.push(
                    directory
                        .take()
                        .map_or_else(|| text.to_owned(), |d| d.join(text)),
                );
            } else {
                if let Some(unused) = directory.take() {
                    paths.push(unused);
                }
                directory = Some(text.to_owned());
            }
            rest = inner.get(end + 1..).unwrap_or_default();
        }
        paths.extend(directory);
        paths
    }
}

/// The arguments of `strace` that write all calls of a process to a file.
pub fn tracing(output: &Path) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec![tool("strace").get_program().to_owned()];
    arguments.extend(["-f", "-qq", "-y", "-s", "200", "-o"].map(OsString::from));
    arguments.push(output.into());
    arguments
}

/// The arguments of `strace` that kill a process right before its `number`th call of a name, which does not happen.
pub fn killing(name: &str, number: usize) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec![tool("strace").get_program().to_owned()];
    arguments.extend(["-f", "-qq", "-o", "/dev/null", "-e"].map(OsString::from));
    arguments.push(format!("trace={name}").into());
    arguments.push("-e".into());
    arguments.push(format!("inject={name}:signal=KILL:when={number}").into());
    arguments
}

/// The calls of a process after it had asked for `marker`.
pub fn calls_after(trace: &str, marker: &str) -> Vec<Call> {
    let mut counts: BTreeMap<(String, String), usize> = BTreeMap::new();
    let mut calls = Vec::new();
    let mut begun = marker.is_empty();
    for line in trace.lines() {
        let Some((thread, rest)) = line.split_once(' ') else {
            continue;
        };
        let rest = rest.trim_start();
        let Some((name, rest)) = rest.split_once('(') else {
            continue;
        };
        if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            continue;
        }
        let number = counts
            .entry((thread.to_owned(), name.to_owned()))
            .or_default();
        *number += 1;
        if !begun {
            begun = rest.contains(marker);
            continue;
        }
        let (arguments, result) = rest.rsplit_once(" = ").unwrap_or((rest, "?"));
        calls.push(Call {
            name: name.to_owned(),
            number: *number,
            arguments: arguments.trim_end().trim_end_matches(')').to_owned(),
            result: result.to_owned(),
        });
    }
    calls
}

/// What is not synced at the end of a trace: files with data, directories with names.
#[derive(Debug, Default)]
pub struct Order {
    dirty: BTreeSet<PathBuf>,
    names: BTreeSet<PathBuf>,
    /// What came too early, one line each.
    pub wrong: Vec<String>,
    pub syncs: usize,
}

impl Order {
    /// Follows the calls.
    pub fn of(calls: &[Call]) -> Self {
        let mut order = Self::default();
        for call in calls.iter().filter(|call| !call.result.starts_with("-1")) {
            order.follow(call);
        }
        order
    }

    /// The files of ours and of SoftHSM's that a power failure could still undo.
    pub fn unsynced(&self) -> Vec<&PathBuf> {
        self.dirty.iter().chain(&self.names).collect()
    }

    fn follow(&mut self, call: &Call) {
        let paths = call.paths();
        let Some(first) = paths.first().cloned() else {
            return;
        };
        let parent = |path: &Path| path.parent().map(Path::to_owned).unwrap_or_default();
        let text = |path: &Path| path.to_string_lossy().into_owned();
        match call.name.as_str() {
            "write" | "pwrite64" | "writev" | "pwritev" | "ftruncate" => {
                let name = text(&first);
                if name.ends_with("/generation") || name.contains("/dev/") || !name.starts_with('/')
                {
                    return;
                }
                // A database is written only when its journal is safe, an object in place only when both versions are.
                let stem = name.strip_suffix(".object");
                let journal = match stem {
                    Some(stem) => format!("{stem}.tokenfs-journal"),
                    None => format!("{name}-journal"),
                };
                if self.dirty.contains(Path::new(&journal)) {
                    self.wrong.push(format!(
                        "{} of {name} before {journal} was synced",
                        call.name
                    ));
                }
                self.dirty.insert(first);
            }
            "fsync" | "fdatasync" => {
                self.syncs += 1;
                self.dirty.remove(&first);
                self.names.remove(&first);
            }
            "syncfs" | "sync" => {
                self.syncs += 1;
                self.dirty.clear();
                self.names.clear();
            }
            "rename" | "renameat" | "renameat2" | "link" | "linkat" => {
                let Some(second) = paths.get(1).cloned() else {
                    return;
                };
                for path in [&first, &second] {
                    if self.dirty.contains(path) {
                        self.wrong
                            .push(format!("{}: {} is not synced", call.name, text(path)));
                    }
                }
                // The last file of a token: everything in it comes first.
                let last =
                    |path: &Path| path.ends_with("token.object") || path.ends_with("sqlite3.db");
                if last(&second) && !call.arguments.contains("RENAME_EXCHANGE") {
                    let here = parent(&second);
                    let late: Vec<_> = self
                        .dirty
                        .iter()
                        .filter(|path| path.starts_with(&here))
                        .collect();
                    if !late.is_empty() {
                        self.wrong
                            .push(format!("a token is published before {late:?}"));
                    }
                    // A database is all that there is to a token of its kind.
                    if second.ends_with("token.object") && self.names.contains(&here) {
                        self.wrong.push(format!(
                            "a token is published before the names in {} are synced",
                            here.display()
                        ));
                    }
                }
                self.names.insert(parent(&second));
            }
            "unlink" | "unlinkat" | "rmdir" => {
                let name = text(&first);
                if let Some(database) = name.strip_suffix("-journal")
                    && self.dirty.contains(Path::new(database))
                {
                    self.wrong.push(format!(
                        "the journal is deleted before {database} is synced"
                    ));
                }
                if let Some(stem) = name.strip_suffix(".tokenfs-journal")
                    && self.dirty.contains(Path::new(&format!("{stem}.object")))
                {
                    self.wrong.push(format!(
                        "the journal is deleted before {stem}.object is synced"
                    ));
                }
                self.dirty.remove(&first);
                if !name.contains("journal") {
                    self.names.insert(parent(&first));
                }
            }
            "openat" | "open"
                if call.arguments.contains("O_CREAT") && call.arguments.contains("O_EXCL") =>
            {
                if let Some(path) = paths.first() {
                    self.names.insert(parent(path));
                }
            }
            _ => {}
        }
    }
}
