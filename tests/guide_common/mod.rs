//! The guide's blocks, and a machine of its own to follow them on.

mod store;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Output, Stdio};

use tempfile::TempDir;

use crate::support::*;
use store::{DAMAGE, INCOMPLETE, SIGNS, STORE, TREE};

/// The guide.
pub const GUIDE: &str = include_str!("../../docs/guide.md");

/// The guide for a store of that backend: what is the reader's to choose is the other one.
pub fn guide(backend: Backend) -> String {
    match backend {
        Backend::File => GUIDE.to_owned(),
        Backend::Db => GUIDE.replace("\nto=db\n", "\nto=file\n"),
    }
}

/// Sections that others build on.
pub const BEFORE: &str = "Before you start";
pub const SCRIPT: &str = "Back up";
pub const PASSPHRASE: &str = "A passphrase";
pub const RSYNC: &str = "With rsync";
pub const TAR: &str = "With tar";
pub const RESTIC: &str = "With restic";
pub const BORG: &str = "With borg";

/// One fenced block that a reader types.
#[derive(Debug)]
pub struct Block {
    /// The heading that it stands below, whatever its level.
    pub section: String,
    /// The line of its fence, from 1.
    pub line: usize,
    pub text: String,
}

/// All blocks of shell in the guide. Any other block has to say that it only shows something: one that is neither is a panic, so that
/// no command is in the guide that is not run.
pub fn blocks(guide: &str) -> Vec<Block> {
    let mut section = String::new();
    let mut blocks = Vec::new();
    let mut lines = guide.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let line_number = number + 1;
        if let Some(fence) = line.trim_start().strip_prefix("```") {
            let text: String = lines
                .by_ref()
                .map(|(_, line)| line)
                .take_while(|line| *line != "```")
                .flat_map(|line| [line, "\n"])
                .collect();
            match fence {
                "sh" => blocks.push(Block {
                    section: section.clone(),
                    line: line_number,
                    text,
                }),
                "text" | "console" => {}
                other => panic!(
                    "line {line_number}: a block of {other:?}: is it typed (sh) or shown (text, console)?"
                ),
            }
        } else if line.starts_with('#') {
            section = line.trim_start_matches('#').trim().to_owned();
        }
    }
    blocks
}

/// The blocks of a section.
pub fn of<'a>(all: &'a [Block], section: &str) -> Vec<&'a Block> {
    all.iter()
        .filter(|block| block.section == section)
        .collect()
}

/// A machine with a SoftHSM that nobody uses, and another one within reach of `ssh`; all that is mounted and started on them is gone
/// with this value, however the test ends.
pub struct Machine {
    child: Child,
    /// The first process in the machine's namespaces.
    first: u32,
    work: TempDir,
}

const PATH: &str =
    "PATH=/opt/stand-ins:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

impl Machine {
    /// With a store of that backend to come; `both` if SoftHSM has to know both of them.
    pub fn new(backend: Backend, both: bool) -> Self {
        assert!(is_root(), "the guide is for root: run scripts/test as root");
        let work = temporary();
        let prefix = match both || backend == Backend::Db {
            true => std::env::var("TOKENFS_TEST_SOFTHSM_DB_PREFIX").expect("scripts/test sets it"),
            false => String::new(),
        };
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guide_common/machine.sh");
        // With this thread ends unshare, with that the first process, and with that all others and the mounts.
        let mut child = tool("setpriv")
            .args([
                "--pdeathsig",
                "KILL",
                "unshare",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child=KILL",
                "bash",
            ])
            .arg(script)
            .arg(work.path())
            .arg(env!("CARGO_BIN_EXE_tokenfs"))
            .args([backend.to_string(), prefix])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        if line != "ready\n" {
            drop(child.kill());
            let said = child.wait_with_output().unwrap().stderr;
            panic!(
                "the machine was not made: {}",
                String::from_utf8_lossy(&said)
            );
        }
        let children = format!("/proc/{0}/task/{0}/children", child.id());
        let first = fs::read_to_string(children)
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        Self { child, first, work }
    }

    /// Runs a script there, as root after a login, with that on its standard input.
    pub fn shell(&self, script: &str, input: &str) -> Output {
        let root = self.work.path().join("here");
        let mut child = tool("nsenter")
            .arg(format!("--target={}", self.first))
            .args(["--mount", "--pid", "chroot"])
            .arg(root)
            .args([
                "env",
                // A shell cannot trap a signal that is ignored when it starts, as SIGHUP is under nohup(1).
                "--default-signal",
                "-i",
                "HOME=/root",
                "LANG=C.UTF-8",
                PATH,
                "bash",
                "-euo",
                "pipefail",
                "-c",
                script,
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Who does not read it closes the pipe; that is no failure.
        drop(child.stdin.take().unwrap().write_all(input.as_bytes()));
        child.wait_with_output().unwrap()
    }

    /// Runs what the test needs there, and gives what it printed.
    pub fn run(&self, script: &str) -> String {
        let output = self.shell(&format!("cd /root; {script}"), "");
        let (out, err) = texts(&output);
        assert!(
            output.status.success(),
            "{script}\n{}\n{out}{err}",
            output.status
        );
        out
    }

    /// The store of the guide, and in `/root/reference` what it holds.
    pub fn make_store(&self) {
        self.run(STORE);
        self.look("PATH=/opt:$PATH; tree >/root/reference");
    }

    /// Runs a script that can use `tree`, `not`, `signs`, `damage` and `lost_after_an_incomplete`.
    pub fn look(&self, script: &str) -> String {
        let functions =
            format!("{TREE}\nsigns() {{ {SIGNS}\n}}\ndamage() {{ {DAMAGE}\n}}\n{INCOMPLETE}\n");
        self.run(&format!("{functions}{script}"))
    }

    /// Types blocks of the guide, one after the other, into one shell in the clone. None may fail, or say anything on standard error.
    pub fn follow(&self, blocks: &[&Block]) -> String {
        let mut script = "cd /root/clone\n".to_owned();
        for block in blocks {
            script += &format!("echo '@@@ line {}'\n{}", block.line, block.text);
        }
        let output = self.shell(&script, &format!("{PIN}\n"));
        let (out, err) = texts(&output);
        let section = &blocks[0].section;
        assert!(
            output.status.success(),
            "{section:?}: {}, in the block after the last @@@\n{out}--- stderr\n{err}",
            output.status
        );
        assert_eq!(
            err, "",
            "{section:?} has something on standard error, after\n{out}"
        );
        let left = self.run("grep -F ' - fuse.tokenfs ' /proc/self/mountinfo || true");
        assert_eq!(left, "", "{section:?} leaves a mount");
        out
    }
}

fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

impl Drop for Machine {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
