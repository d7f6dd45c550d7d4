//! One cell: out, back, and everything that must hold then.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::stores::{
    CLASS, EC, FIRST, KEY_TYPE, OTHER_PIN, PUBLIC_KEY, SECOND, Stores, key, key_name, token_name,
};
use super::{Cell, Scope, State, Tool};
use crate::mount_common::{Tree, assert_same, expected, seen};
use crate::support::template::ulong;
use crate::support::*;
use crate::write_common::{CKM_ECDSA, SOON, agree_under, leftovers};

/// What a cell works on.
#[derive(Debug)]
pub struct Work<'a> {
    pub cell: Cell,
    pub source: &'a Softhsm,
    pub from: Mount,
    pub target: Softhsm,
    /// None only while it is mounted anew.
    pub to: Option<Mount>,
    /// What the target had.
    pub before: Tree,
    /// What is taken out, relative to the mount.
    pub what: String,
    /// Holds the copy, and whatever the tool keeps.
    pub place: tempfile::TempDir,
}

impl Work<'_> {
    pub fn to(&self) -> &Mount {
        self.to.as_ref().expect("the mount")
    }

    /// Mounts the target anew.
    pub fn remount(&mut self) {
        if let Some(mount) = self.to.take() {
            mount.unmount();
        }
        self.to = Some(Mount::new(&self.target));
    }

    /// A line of shell with the variables that the lines of `tools` use.
    pub fn shell(&self, line: &str) -> Command {
        let inside = Path::new(&self.what).parent().unwrap_or(Path::new(""));
        let mut shell = Command::new("bash");
        shell
            .args(["-euo", "pipefail", "-c", line])
            .env("LC_ALL", "C.UTF-8")
            .env("HOME", self.place.path())
            .env("from", self.from.path())
            .env("to", self.to().path())
            .env("what", &self.what)
            .env("in", inside)
            .env("copy", self.place.path().join("copy"))
            .env("w", self.place.path());
        shell
    }

    /// Runs a line that must succeed, and complain of nothing.
    #[track_caller]
    pub fn quiet(&self, line: &str) -> String {
        let output = self.shell(line).output().unwrap();
        let said = said(&output);
        let lower = said.to_lowercase();
        let complains = ["warning", "error", "changed"]
            .iter()
            .any(|word| lower.contains(word));
        assert!(
            output.status.success() && output.stderr.is_empty() && !complains,
            "`{line}`: {}\n{said}\n--- the log\n{}",
            output.status,
            log(self.to())
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// `rsync -a` of the same once more has nothing to do.
    #[track_caller]
    fn assert_rsync_moves_nothing(&self, when: &str) {
        let moved = self.quiet("rsync -a --itemize-changes $from/$what/ $to/$what/");
        let mut moved: Vec<&str> = moved.lines().collect();
        if self.what == "." && !self.cell.tool.keeps_the_root() {
            moved.retain(|line| *line != ".d..t...... ./");
        }
        assert_eq!(moved, [""; 0], "{when}");
    }

    /// Nothing is in the log of the target but what the tool is a reason for.
    #[track_caller]
    fn assert_nothing_logged(&self, when: &str) {
        let mut said = log(self.to());
        let reason = match self.cell.tool {
            // It says what was done about what the server had left when it was killed.
            Tool::RsyncServerKilled => Some("what a crash had left"),
            // And why the token that rsync was at when it was killed is none yet.
            Tool::RsyncInterrupted => Some("it stays pending"),
            _ => None,
        };
        if let Some(reason) = reason {
            let lines = said.lines().filter(|line| !line.contains(reason));
            said = lines.collect();
        }
        assert_eq!(said, "", "the log of the target {when}");
        assert_eq!(log(&self.from), "", "the log of the source {when}");
    }
}

pub fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

/// `.tokenfs/log`.
pub fn log(mount: &Mount) -> String {
    fs::read_to_string(mount.join(".tokenfs/log")).unwrap_or_else(|e| format!("({e})"))
}

/// Whether a path of a tree is what is taken out, or below it.
fn is_part(what: &str, path: &Path) -> bool {
    what == "." || path.starts_with(what)
}

/// What the target has to hold: what it had, and the backup over it; only the backup if the tool deletes.
pub fn wanted(cell: &Cell, what: &str, source: &Tree, before: &Tree) -> Tree {
    let stays = |path: &PathBuf| !(cell.tool.deletes() && is_part(what, path));
    let mut tree = before.clone();
    tree.retain(|path, _| stays(path));
    let part = source.iter().filter(|(path, _)| is_part(what, path));
    tree.extend(part.map(|(path, content)| (path.clone(), content.clone())));
    tree
}

/// Runs a cell; a panic says what does not hold.
pub fn run(stores: &Stores, cell: &Cell) {
    let (from, _) = cell.pair;
    let source = stores.now(from);
    let target = stores.target(cell.pair, cell.scope, cell.state);
    let what = match cell.scope {
        Scope::Store => ".".to_owned(),
        Scope::Token => token_name(source, FIRST),
        Scope::Object => key_name(source),
    };
    let before = expected(&target);
    let wanted = wanted(cell, &what, &expected(source), &before);
    let place = temporary_in_memory();
    fs::create_dir(place.path().join("copy")).unwrap();
    let to = Some(Mount::new(&target));
    let mut work = Work {
        cell: *cell,
        source,
        from: Mount::new(source),
        target,
        before,
        to,
        what,
        place,
    };
    work.quiet(&cell.tool.out());
    match cell.tool {
        Tool::RsyncInterrupted => super::interrupt::clients(&mut work),
        Tool::RsyncServerKilled => super::interrupt::servers(&mut work),
        _ => {}
    }
    work.quiet(&cell.tool.again(cell.state));
    assert_holds(&mut work, &wanted);
    let Work {
        target, to, from, ..
    } = work;
    drop((from, to));
    assert_works(&target, cell.state, cell.scope);
}

/// The stores hold the same, also after a remount; a second `rsync -a` moves nothing; the logs have nothing to say.
fn assert_holds(work: &mut Work<'_>, wanted: &Tree) {
    let is_there =
        || leftovers(&work.target.tokendir).is_empty() && expected(&work.target) == *wanted;
    let deadline = std::time::Instant::now() + SOON;
    while !is_there() && std::time::Instant::now() < deadline {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_same(wanted, &expected(&work.target));
    assert_eq!(
        leftovers(&work.target.tokendir),
        [] as [PathBuf; 0],
        "left in the store"
    );
    assert_same(wanted, &seen(work.to()));
    work.assert_rsync_moves_nothing("the second time");
    work.assert_nothing_logged("the first time");
    work.remount();
    work.assert_rsync_moves_nothing("after a remount");
    assert_same(wanted, &expected(&work.target));
    work.assert_nothing_logged("after a remount");
}

/// A SoftHSM logs in with the PIN of the backup, finds what is stored, and signs with a restored key.
fn assert_works(target: &Softhsm, state: State, scope: Scope) {
    // The PIN is the token's, and an object brings none.
    let pin = if (state, scope) == (State::Changed, Scope::Object) {
        OTHER_PIN
    } else {
        PIN
    };
    let mut client = target.p11();
    let second = target.token_directories().len() > 1;
    for (label, pin) in [(SECOND, PIN)]
        .into_iter()
        .filter(|_| second)
        .chain([(FIRST, pin)])
    {
        client.open(label, Some(pin)).unwrap();
        agree_under(pin, target, &token_name(target, label), &mut client);
    }
    let key = key(&mut client);
    let signature = client.sign(key, CKM_ECDSA, &[7; 32]).unwrap();
    let public = client
        .find(&[ulong(CLASS, PUBLIC_KEY), ulong(KEY_TYPE, EC)])
        .unwrap();
    let verified = client.verify(public[0].handle, CKM_ECDSA, &[7; 32], &signature);
    assert_eq!(verified, Ok(true), "the public key knows the signature");
}
