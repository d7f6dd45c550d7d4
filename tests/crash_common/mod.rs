//! Dying in the middle of a write: a store that is put back before each death, the writes, and what may be found afterwards.
//!
//! The dead are `step` processes (`tests/support/step.rs`), or mounts. What they leave is judged three times: by a real SoftHSM, before
//! anything is put right; by `tokenfs check`; and by the independent reader after the next writer has put it right.
#![allow(dead_code)]

pub mod trace;

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::support::independent::{self, Object, Token};
use crate::support::*;
use crate::write_common::{HELD, fill, leftovers, object_of_class};

/// A store as the independent reader finds it.
pub type Stored = BTreeMap<String, Token>;

/// A kind of write: operations of `step`, one after the other.
#[derive(Clone, Debug)]
pub struct Story {
    pub name: &'static str,
    pub operations: Vec<Vec<String>>,
    /// What somebody else has done before, where that is what it is about.
    pub before: Option<fn(&Stage)>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Killed,
    Finished,
}

/// The store that the deaths happen in, always at the same place, so that one SoftHSM process can look at all of them.
#[derive(Debug)]
pub struct Stage {
    pub softhsm: Softhsm,
    pub client: P11,
    /// The store as it is before.
    pub base: PathBuf,
    pub token: String,
    pub second: String,
    pub data: String,
    pub private: String,
    /// How many deaths were judged.
    judged: usize,
    /// The crash points that the next writer got to after the last of them.
    pub put_right: BTreeMap<&'static str, usize>,
    /// What is wrong, one death each.
    wrong: Vec<String>,
    /// Checks that go on meanwhile: each waits for a second, to be sure that nobody is at work.
    checks: VecDeque<(String, Checking)>,
    /// Copies that were made a while ago.
    aged: RefCell<Vec<PathBuf>>,
}

type Checking = JoinHandle<Result<(), String>>;

/// How many copies grow old together.
const COPIES: usize = 200;

/// How many checks go on at once.
const CHECKS: usize = 24;

/// Copies a directory with modes, owners being those of the caller.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap_or_else(|e| panic!("{}: {e}", to.display()));
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).unwrap();
        }
    }
    set_mode(to, fs::metadata(from).unwrap().mode() & 0o7777);
}

impl Stage {
    /// Two tokens: `test`, with a data object and a pair of keys, and `second`, with a data object.
    pub fn new(backend: Backend) -> Self {
        let softhsm = Softhsm::new_in(backend, temporary_in_memory());
        let mut client = softhsm.p11();
        client.init_token("test", Some(PIN)).unwrap();
        client.open("test", Some(PIN)).unwrap();
        fill(&mut client);
        let first = softhsm.token_directory();
        let token = first.file_name().unwrap().to_str().unwrap().to_owned();
        client.init_token("second", Some(PIN)).unwrap();
        client.open("second", Some(PIN)).unwrap();
        let data = [
            template::ulong(0, 0),
            template::boolean(1, true),
            template::boolean(2, false),
            template::bytes(3, "lonely"),
        ];
        client.create(&data).unwrap();
        client.close().unwrap();
        let names = softhsm.token_directories();
        let names = names
            .iter()
            .map(|path| path.file_name().unwrap().to_str().unwrap());
        let second = names.into_iter().find(|name| *name != token).unwrap();
        let second = second.to_owned();
        // Every writer removes its traces in the end: nothing here is anybody's but SoftHSM's.
        assert!(leftovers(&softhsm.tokendir).is_empty());
        let base = softhsm.directory.path().join("base");
        copy(&softhsm.tokendir, &base);
        Self {
            data: object_of_class(&softhsm, &token, 0),
            private: object_of_class(&softhsm, &token, 3),
            softhsm,
            client,
            base,
            token,
            second,
            judged: 0,
            put_right: BTreeMap::new(),
            wrong: Vec::new(),
            checks: VecDeque::new(),
            aged: RefCell::default(),
        }
    }

    pub fn backend(&self) -> Backend {
        self.softhsm.backend
    }

    /// All kinds of write that the store layer has.
    pub fn stories(&self) -> Vec<Story> {
        let lonely = object_of_class(&self.softhsm, &self.second, 0);
        let (t, d, k) = (&self.token, &self.data, &self.private);
        let hex = |text: &str| template::hex(text.as_bytes());
        let long = hex(&"long ".repeat(3000));
        let new = "00000000-0000-4000-8000-00000000000a";
        let copy = "c0000000-0000-4000-8000-00000000000c";
        let label = hex(&format!("{:32}", "test!"));
        let story = |name, lines: &[String]| Story {
            name,
            before: None,
            operations: lines
                .iter()
                .map(|line| line.split(' ').map(str::to_owned).collect())
                .collect(),
        };
        let changed = hex("changed");
        let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
        let mut stories = vec![
            story(
                "change an attribute",
                &[format!("update {t} {d} 3 {changed}")],
            ),
            story(
                "make an object longer than a page",
                &[format!("update {t} {d} 17 {long}")],
            ),
            story(
                "make it shorter again",
                &[
                    format!("update {t} {d} 17 {long}"),
                    format!("update {t} {d} 17 61"),
                ],
            ),
            story("remove an attribute", &[format!("unset {t} {d} 16")]),
            story("create an object", &[format!("create {t} {new} {k}")]),
            story("remove an object", &[format!("remove {t} {k}")]),
            story("rename an object", &[format!("rename {t} {k} {new}")]),
            story(
                "rename an object and back",
                &[
                    format!("rename {t} {d} {new}"),
                    format!("rename {t} {new} {d}"),
                ],
            ),
            story("chmod", &[format!("chmod {t} {d} 400")]),
            story("set the time", &[format!("mtime {t} {d} 1500000000")]),
            story(
                "change the token's own",
                &[format!("update {t} - 2147504969 {label}")],
            ),
            story(
                "make the token's own longer",
                &[
                    format!("update {t} - 2147488564 {long}"),
                    format!("update {t} - 2147488564 61"),
                ],
            ),
            story("create a token", &[format!("copy-token {t} {copy} copied")]),
            story(
                "remove a token",
                &[
                    format!("remove {} {lonely}", self.second),
                    format!("remove-token {}", self.second),
                ],
            ),
            story(
                "change and sync",
                &[format!("update {t} {d} 3 {changed}"), format!("sync {t}")],
            ),
            story(
                "create, change and remove",
                &[
                    format!("create {t} {new} {d}"),
                    format!("update {t} {new} 3 {changed}"),
                    format!("remove {t} {new}"),
                ],
            ),
            story(
                "change an attribute and the time",
                &[
                    format!("update {t} {d} 3 {changed} 1500000000"),
                    format!("update {t} {d} 3 {changed} 1600000000"),
                ],
            ),
            story(
                "create an object with a time",
                &[format!("create {t} {new} {k} 1500000000")],
            ),
            story("chown", &[format!("chown {t} {d} {uid} {gid}")]),
            story("give a token up", &[format!("unbuild {copy}")]),
        ];
        if self.backend() == Backend::File {
            let met = |name, before: fn(&Self)| Story {
                before: Some(before),
                ..story(name, &["recover".to_owned()])
            };
            stories.extend([
                met("an object made while its token was removed", |stage| {
                    stage.begin_removal();
                }),
                met("an object made while its token lost its name", |stage| {
                    let second = stage.begin_removal();
                    let name = format!(".tokenfs-new-{}", stage.second);
                    fs::rename(&second, second.with_file_name(name)).unwrap();
                }),
                met("a token that was given back its name", |stage| {
                    let token = stage.softhsm.tokendir.join(&stage.token);
                    fs::copy(token.join("token.object"), token.join("token.tokenfs-new")).unwrap();
                }),
                met("a journal of what SoftHSM has destroyed", |stage| {
                    let token = stage.softhsm.tokendir.join(&stage.token);
                    let journal = "00000000-0000-4000-8000-00000000000a.tokenfs-journal";
                    fs::write(token.join(journal), "TKFJRNL1").unwrap();
                }),
            ]);
        }
        stories
    }

    /// The second token, with an object, as if it had had none when its removal began.
    fn begin_removal(&self) -> PathBuf {
        let second = self.softhsm.tokendir.join(&self.second);
        fs::write(second.join(".tokenfs-removing"), "").unwrap();
        fs::rename(
            second.join("token.object"),
            second.join("token.tokenfs-new"),
        )
        .unwrap();
        second
    }

    /// Puts the store back to where a story begins.
    pub fn reset_for(&self, story: &Story) {
        self.reset();
        if let Some(before) = story.before {
            before(self);
        }
    }

    /// Puts the store back: as it was, and not as young as a copy made now, which a writer would leave in peace for half a second
    /// since SoftHSM may still be making it.
    pub fn reset(&self) {
        if self.backend() == Backend::Db {
            // A row has no age.
            fs::remove_dir_all(&self.softhsm.tokendir).unwrap();
            return copy(&self.base, &self.softhsm.tokendir);
        }
        let mut aged = self.aged.borrow_mut();
        if aged.is_empty() {
            for number in 0..COPIES {
                let path = self.softhsm.directory.path().join(format!("aged-{number}"));
                copy(&self.base, &path);
                aged.push(path);
            }
            std::thread::sleep(Duration::from_millis(700));
        }
        fs::remove_dir_all(&self.softhsm.tokendir).unwrap();
        let next = aged.pop().expect("a copy");
        fs::rename(next, &self.softhsm.tokendir).unwrap();
    }

    /// `step` with these operations, or below a `wrapper`.
    pub fn step(&self, wrapper: &[OsString], operations: &[Vec<String>]) -> Command {
        let program = example("step");
        let mut command = match wrapper.split_first() {
            Some((wrapper, arguments)) => {
                let mut command = Command::new(wrapper);
                command.args(arguments).arg(program);
                command
            }
            None => Command::new(program),
        };
        command
            .arg(self.backend().to_string())
            .arg(&self.softhsm.tokendir);
        for (index, words) in operations.iter().enumerate() {
            command.args((index > 0).then_some(",")).args(words);
        }
        command
    }

    /// The stores that a story leads through: before, and after each of its operations.
    pub fn states(&self, story: &Story) -> Vec<Stored> {
        let mut states = Vec::new();
        for count in 0..=story.operations.len() {
            self.reset_for(story);
            if count > 0 {
                run(&mut self.step(&[], &story.operations[..count]));
            }
            let state = self.softhsm.read();
            let damaged = state.values().all(|token| token.damaged.is_empty());
            assert!(damaged, "{}: damaged without any crash", story.name);
            let left = leftovers(&self.softhsm.tokendir);
            assert!(
                left.is_empty() || (count == 0 && story.before.is_some()),
                "{}: left without any crash: {left:?}",
                story.name
            );
            states.push(state);
        }
        states
    }

    /// Judges what a death has left; [`Stage::verdict`] says what was wrong with it. `what` says which death it was.
    pub fn judge(&mut self, what: &str, states: &[Stored]) {
        if let Err(why) = self.judge_now(what, states, Self::recover_here) {
            self.wrong.push(format!("{what}: {why}"));
        }
    }

    /// The same; the next writer after SoftHSM is a mount.
    pub fn judge_by_mount(&mut self, what: &str, states: &[Stored]) {
        let mount = |stage: &Self| {
            let config = ["--config".into(), stage.softhsm.conf.clone().into()];
            let mount = MountOptions::new().mount_with(&config)?;
            mount.unmount();
            Ok(())
        };
        if let Err(why) = self.judge_now(what, states, mount) {
            self.wrong.push(format!("{what}: {why}"));
        }
    }

    /// What else is wrong.
    pub fn wrong(&mut self, why: String) {
        self.wrong.push(why);
    }

    /// Waits for the checks. Panics if anything was wrong.
    #[track_caller]
    pub fn verdict(&mut self, of: &str) {
        while self.finish_check() {}
        let wrong = std::mem::take(&mut self.wrong);
        assert!(
            wrong.is_empty(),
            "{}: {of}: {} left something wrong:\n{}",
            self.backend(),
            wrong.len(),
            wrong.join("\n")
        );
    }

    /// Waits for the oldest check; whether there was one.
    fn finish_check(&mut self) -> bool {
        let Some((what, check)) = self.checks.pop_front() else {
            return false;
        };
        if let Err(why) = check.join().unwrap() {
            self.wrong.push(format!("{what}: {why}"));
        }
        true
    }

    fn judge_now(
        &mut self,
        what: &str,
        states: &[Stored],
        next: impl Fn(&Self) -> Result<(), String>,
    ) -> Result<(), String> {
        self.judged += 1;
        self.put_right.clear();
        let directory = self.softhsm.directory.path();
        let aside = directory.join(format!("aside-{}", self.judged));
        let mended = directory.join(format!("mended-{}", self.judged));
        for path in [&aside, &mended] {
            copy(&self.softhsm.tokendir, path);
        }
        let judged = self.judge_copy(&aside, states, next);
        if judged.is_err() {
            fs::remove_dir_all(&aside).unwrap();
            fs::remove_dir_all(&mended).unwrap();
            return judged;
        }
        // 3. The check, before and after the next writer.
        if self.checks.len() >= CHECKS {
            self.finish_check();
        }
        let (backend, states) = (self.backend(), states.to_vec());
        let check = std::thread::spawn(move || {
            let checked = check_both(backend, &aside, &mended, &states);
            fs::remove_dir_all(&aside).unwrap();
            fs::remove_dir_all(&mended).unwrap();
            checked
        });
        self.checks.push_back((what.to_owned(), check));
        Ok(())
    }

    fn judge_copy(
        &mut self,
        aside: &Path,
        states: &[Stored],
        next: impl Fn(&Self) -> Result<(), String>,
    ) -> Result<(), String> {
        // 1. A SoftHSM that comes first.
        self.judge_by_softhsm(states)
            .map_err(|why| format!("SoftHSM, before any repair: {why}"))?;
        // The next writer after that.
        next(self)?;
        let objects = |stored: &Stored| -> Vec<_> {
            let tokens = stored.values().map(|token| token.objects.clone());
            tokens.collect()
        };
        let now = self.softhsm.read();
        // A session gives an object that lacks something its default.
        let mut bare = now.clone();
        for (name, token) in &mut bare {
            for (id, object) in &mut token.objects {
                let all = states
                    .iter()
                    .filter_map(|state| state.get(name)?.objects.get(id));
                let known: Vec<u64> = all.flatten().map(|(t, _)| *t).collect();
                object.retain(|(t, value)| {
                    known.contains(t) && *value != independent::Value::Bytes(Vec::new())
                });
            }
        }
        let filled = |stored: &Stored| {
            let mut objects = objects(stored);
            for object in objects.iter_mut().flat_map(BTreeMap::values_mut) {
                object.retain(|(_, value)| *value != independent::Value::Bytes(Vec::new()));
            }
            objects
        };
        if !states.iter().any(|state| filled(state) == filled(&bare)) {
            return Err(format!(
                "put right after SoftHSM's visit, it is {}",
                difference(states, &now)
            ));
        }
        let left = leftovers(&self.softhsm.tokendir);
        // SoftHSM makes a `generation` in every directory that it looks into.
        if !left.is_empty() {
            return Err(format!(
                "put right after SoftHSM's visit, there is left {left:?}"
            ));
        }
        // 2. The next writer directly.
        self.put_right = points_in(&self.recover(aside)?);
        let now = independent::read_store(aside);
        if !states.contains(&now) {
            return Err(format!("put right, it is {}", difference(states, &now)));
        }
        if !leftovers(aside).is_empty() {
            return Err(format!("put right, there is left {:?}", leftovers(aside)));
        }
        Ok(())
    }
    /// `tokenfs check`, which must end with one of these codes.
    pub fn check(&self, tokendir: &Path, more: &[&str], codes: &[i32]) -> Result<String, String> {
        check(self.backend(), tokendir, more, codes)
    }

    fn recover_here(&self) -> Result<(), String> {
        self.recover(&self.softhsm.tokendir).map(drop)
    }

    /// The next writer: it puts right what is left over. What it says, crash points included.
    pub fn recover(&self, tokendir: &Path) -> Result<String, String> {
        let mut step = Command::new(example("step"));
        step.arg(self.backend().to_string())
            .arg(tokendir)
            .arg("recover")
            .env("TOKENFS_CRASH_POINT", "?");
        let output = step.output().unwrap();
        if output.status.success() {
            return Ok(said(&output));
        }
        Err(format!(
            "the next writer: {}\n{}",
            output.status,
            said(&output)
        ))
    }

    /// What a SoftHSM sees is one of the states.
    pub fn judge_by_softhsm(&mut self, states: &[Stored]) -> Result<(), String> {
        let refused = |what: &'static str| move |why: Refusal| format!("{what}: {}", why.0);
        self.client
            .reinitialize()
            .map_err(refused("C_Initialize"))?;
        let mut seen = BTreeMap::new();
        for (label, serial) in self.client.tokens().map_err(refused("C_GetSlotList"))? {
            self.client
                .open(&serial, Some(PIN))
                .map_err(refused("C_Login"))?;
            let found = self.client.find(&[]).map_err(refused("C_FindObjects"))?;
            let objects = found.iter().map(|object| self.client.get(object.handle));
            let objects: Vec<_> = objects
                .collect::<Result<_, _>>()
                .map_err(refused("C_GetAttributeValue"))?;
            self.client.close().map_err(refused("C_CloseSession"))?;
            seen.insert(label.trim_end().to_owned(), objects);
        }
        let mut reasons = String::new();
        for (index, state) in states.iter().enumerate() {
            match self.is_state(state, &seen) {
                Ok(()) => return Ok(()),
                Err(why) => reasons += &format!("\n  not state {index}: {why}"),
            }
        }
        Err(reasons)
    }

    fn is_state(
        &self,
        state: &Stored,
        seen: &BTreeMap<String, Vec<client::Seen>>,
    ) -> Result<(), String> {
        let mut wanted = BTreeMap::new();
        for token in state.values() {
            let label = independent::get_bytes(&token.token, independent::CKA_OS_TOKENLABEL);
            let label = String::from_utf8_lossy(label.unwrap_or_default())
                .trim_end()
                .to_owned();
            let key =
                independent::token_key(token, independent::CKA_OS_USERPIN, PIN).ok_or("no key")?;
            let objects = token
                .objects
                .values()
                .map(|o| independent::in_the_clear(o, &key));
            wanted.insert(label, objects.collect::<Result<Vec<Object>, _>>()?);
        }
        if !wanted.keys().eq(seen.keys()) {
            return Err(format!(
                "tokens {:?}, and not {:?}",
                seen.keys(),
                wanted.keys()
            ));
        }
        for (label, objects) in &mut wanted {
            for object in &seen[label] {
                let mut why = Vec::new();
                let at = objects.iter().position(|stored| {
                    let matches = independent::matches_session(
                        self.backend(),
                        stored,
                        &without_defaults(stored, object),
                    );
                    matches.map_err(|reason| why.push(reason)).is_ok()
                });
                let Some(at) = at else {
                    return Err(format!("{label}: an object that is none of it: {why:?}"));
                };
                objects.remove(at);
            }
            if !objects.is_empty() {
                return Err(format!("{label}: {} objects are missing", objects.len()));
            }
        }
        Ok(())
    }
}

/// The crash points that a process says it got to, and how often.
pub fn points_in(said: &str) -> BTreeMap<&'static str, usize> {
    let mut points = BTreeMap::new();
    for name in said
        .lines()
        .filter_map(|line| line.strip_prefix("crash point "))
    {
        let mut all = tokenfs::store::crash::POINTS.iter();
        let point = all.find(|point| **point == name).expect("a crash point");
        *points.entry(*point).or_default() += 1;
    }
    points
}

/// Whether a mount is dead, or dies of what it still holds when the shell is done.
pub fn dies(mount: &Mount) -> bool {
    let deadline = Instant::now() + HELD;
    while fs::read_dir(mount.path()).is_ok() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// What `tokenfs check` says of a store that the next writer has put right, and of one that it has to mend itself.
fn check_both(
    backend: Backend,
    aside: &Path,
    mended: &Path,
    states: &[Stored],
) -> Result<(), String> {
    check(backend, aside, &[], &[0])?;
    // It waits for a second if there is anything, and then looks again, so that this says what would be found now.
    check(backend, mended, &["--repair"], &[0, 1])?;
    check(backend, mended, &[], &[0])?;
    let now = independent::read_store(mended);
    if !states.contains(&now) {
        return Err(format!(
            "mended by check --repair, it is {}",
            difference(states, &now)
        ));
    }
    if !leftovers(mended).is_empty() {
        return Err(format!("check --repair has left {:?}", leftovers(mended)));
    }
    Ok(())
}

fn check(
    backend: Backend,
    tokendir: &Path,
    more: &[&str],
    codes: &[i32],
) -> Result<String, String> {
    let mut check = tokenfs();
    check.arg("check").arg("--tokendir").arg(tokendir);
    check.args(["--backend", &backend.to_string()]);
    let output = check.args(more).output().unwrap();
    let said = said(&output);
    if output
        .status
        .code()
        .is_some_and(|code| codes.contains(&code))
    {
        return Ok(said);
    }
    Err(format!("tokenfs check {more:?}: {}\n{said}", output.status))
}

/// What a session sees of an object without the empty values that it gives to what is not stored.
fn without_defaults(stored: &Object, seen: &client::Seen) -> client::Seen {
    let mut seen = seen.clone();
    seen.retain(|(attribute_type, value)| {
        let empty = template::bytes(*attribute_type, "");
        independent::get(stored, *attribute_type).is_some() || value.as_ref() != Some(&empty)
    });
    seen
}

/// How a store differs from each of the states.
fn difference(states: &[Stored], now: &Stored) -> String {
    let mut out = String::new();
    let now = independent::lines(now);
    for (index, state) in states.iter().enumerate() {
        let state = independent::lines(state);
        let short = |line: &str| line.chars().take(160).collect::<String>();
        let missing = state
            .lines()
            .filter(|line| !now.lines().any(|l| l == *line));
        let added = now
            .lines()
            .filter(|line| !state.lines().any(|l| l == *line));
        let missing: Vec<_> = missing.take(6).map(short).collect();
        let added: Vec<_> = added.take(6).map(short).collect();
        out += &format!("\n  not state {index}: it lacks {missing:#?}, it has {added:#?}");
    }
    out
}

pub fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

/// Whether a process was killed, or finished its work; anything else is a failure of the write.
pub fn ended(output: &Output) -> Result<End, String> {
    // strace ends as its child did: by the same signal.
    match (output.status.code(), output.status.signal()) {
        (Some(0), _) => Ok(End::Finished),
        (_, Some(libc::SIGKILL)) | (Some(137), _) => Ok(End::Killed),
        _ => Err(format!("{}\n{}", output.status, said(output))),
    }
}
