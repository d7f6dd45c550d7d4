//! Random sequences of system calls on a mount, held against a model; and what they found.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod model_common;
mod support;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use model_common::Answer;
use model_common::fixture::{Template, leftovers, stored, temporary};
use model_common::model::{Model, OWN};
use model_common::ops::*;
use model_common::run::{Pair, lasting, run};
use model_common::state::{Stat, World};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag};
use nix::sys::stat::{FchmodatFlags, Mode, UtimensatFlags};
use nix::sys::time::TimeSpec;
use support::{Backend, Mount, Softhsm, tool};
use tempfile::TempDir;

struct MountWorld {
    mount: Option<Mount>,
    softhsm: Softhsm,
    /// The store.
    tokendir: TempDir,
    open: Vec<Option<OwnedFd>>,
    /// How many lines its log had.
    logged: usize,
}

fn errno<T>(outcome: nix::Result<T>) -> Answer<T> {
    outcome.map_err(|errno| errno as i32)
}

fn io<T>(outcome: std::io::Result<T>) -> Answer<T> {
    outcome.map_err(|error| error.raw_os_error().unwrap())
}

/// Another process, which looks at files.
struct Other {
    process: Child,
    answers: BufReader<ChildStdout>,
}

impl Other {
    fn new() -> Self {
        let script = "import os,stat,sys\n\
            for path in sys.stdin:\n    \
                try: s = os.lstat(path[:-1]); print(0, int(stat.S_ISDIR(s.st_mode)), s.st_size, s.st_mode & 0o7777, int(s.st_mtime), flush=True)\n    \
                except OSError as e: print(e.errno, flush=True)";
        let mut process = tool("python3")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let answers = BufReader::new(process.stdout.take().unwrap());
        Self { process, answers }
    }

    fn stat(&mut self, path: &Path) -> Answer<Stat> {
        let mut to = self.process.stdin.as_ref().unwrap();
        writeln!(to, "{}", path.display()).unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        let said: Vec<u64> = answer
            .split_whitespace()
            .map(|said| said.parse().unwrap())
            .collect();
        match said[..] {
            [0, is_directory, size, mode, mtime] => Ok(Stat {
                is_directory: is_directory == 1,
                size,
                mode: u32::try_from(mode).unwrap(),
                mtime,
            }),
            _ => Err(i32::try_from(said[0]).unwrap()),
        }
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

thread_local! {
    static OTHER: RefCell<Option<Other>> = const { RefCell::new(None) };
}

impl MountWorld {
    fn new(template: &Template, backend: Backend) -> Self {
        let tokendir = template.copy();
        let mut softhsm = Softhsm::new(backend);
        softhsm.tokendir = tokendir.path().to_owned();
        softhsm.configure("");
        // Before anything is open that it would close.
        OTHER.with_borrow_mut(|other| other.get_or_insert_with(Other::new).process.id());
        Self {
            mount: Some(Mount::new(&softhsm)),
            softhsm,
            tokendir,
            open: (0..=DESCRIPTORS).map(|_| None).collect(),
            logged: 0,
        }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.mount.as_ref().unwrap().join(path)
    }

    fn fd(&self, fd: usize) -> &OwnedFd {
        self.open[fd].as_ref().unwrap()
    }

    /// How many lines the log has had.
    fn count_logged(&self) -> usize {
        let text = fs::read_to_string(self.at(".tokenfs/log")).unwrap();
        let times = |line: &str| {
            let counted = line.rsplit_once('(')?.1.strip_suffix(" times)")?;
            counted.parse().ok()
        };
        text.lines().map(|line| times(line).unwrap_or(1)).sum()
    }
}

impl World for MountWorld {
    fn open(&mut self, fd: usize, path: &str, how: How) -> Answer {
        let mut flags = OFlag::O_CLOEXEC;
        for (set, flag) in [
            (how.write, OFlag::O_RDWR),
            (how.create, OFlag::O_CREAT),
            (how.exclusive, OFlag::O_EXCL),
            (how.truncate, OFlag::O_TRUNC),
            (how.append, OFlag::O_APPEND),
        ] {
            if set {
                flags |= flag;
            }
        }
        let opened = nix::fcntl::open(&self.at(path), flags, Mode::from_bits_truncate(0o666));
        self.open[fd] = Some(errno(opened)?);
        Ok(())
    }

    fn write(&mut self, fd: usize, data: &[u8]) -> Answer {
        let written = errno(nix::unistd::write(self.fd(fd), data))?;
        assert_eq!(written, data.len());
        Ok(())
    }

    fn write_at(&mut self, fd: usize, at: u64, data: &[u8]) -> Answer {
        let at = i64::try_from(at).unwrap();
        let written = errno(nix::sys::uio::pwrite(self.fd(fd), data, at))?;
        assert_eq!(written, data.len());
        Ok(())
    }

    fn read(&mut self, fd: usize) -> Answer<Vec<u8>> {
        let mut all = Vec::new();
        let mut part = [0; 13];
        loop {
            let at = i64::try_from(all.len()).unwrap();
            let read = errno(nix::sys::uio::pread(self.fd(fd), &mut part, at))?;
            if read == 0 {
                return Ok(all);
            }
            all.extend(&part[..read]);
        }
    }

    fn close_duplicate(&mut self, fd: usize) -> Answer {
        let duplicate = self.fd(fd).as_fd().try_clone_to_owned().unwrap();
        errno(nix::unistd::close(duplicate))
    }

    fn close(&mut self, fd: usize) -> Answer {
        errno(nix::unistd::close(self.open[fd].take().unwrap()))
    }

    fn set_length(&mut self, fd: usize, length: u64) -> Answer {
        let length = i64::try_from(length).unwrap();
        errno(nix::unistd::ftruncate(self.fd(fd), length))
    }

    fn sync(&mut self, fd: usize) -> Answer {
        errno(nix::unistd::fsync(self.fd(fd)))
    }

    fn truncate(&mut self, path: &str, length: u64) -> Answer {
        let length = i64::try_from(length).unwrap();
        errno(nix::unistd::truncate(&self.at(path), length))
    }

    fn unlink(&mut self, path: &str) -> Answer {
        errno(nix::unistd::unlink(&self.at(path)))
    }

    fn rename(&mut self, from: &str, to: &str) -> Answer {
        io(fs::rename(self.at(from), self.at(to)))
    }

    fn make_dir(&mut self, path: &str) -> Answer {
        errno(nix::unistd::mkdir(
            &self.at(path),
            Mode::from_bits_truncate(0o777),
        ))
    }

    fn remove_dir(&mut self, path: &str) -> Answer {
        io(fs::remove_dir(self.at(path)))
    }

    fn set_mode(&mut self, path: &str, mode: u32) -> Answer {
        errno(nix::sys::stat::fchmodat(
            AT_FDCWD,
            &self.at(path),
            Mode::from_bits_truncate(mode),
            FchmodatFlags::FollowSymlink,
        ))
    }

    fn set_times(&mut self, path: &str, seconds: u64) -> Answer {
        let time = TimeSpec::new(i64::try_from(seconds).unwrap(), 0);
        errno(nix::sys::stat::utimensat(
            AT_FDCWD,
            &self.at(path),
            &time,
            &time,
            UtimensatFlags::FollowSymlink,
        ))
    }

    fn sync_dir(&mut self, path: &str) -> Answer {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = errno(nix::fcntl::open(&self.at(path), flags, Mode::empty()))?;
        errno(nix::unistd::fsync(&directory))
    }

    fn list(&mut self, path: &str) -> Answer<BTreeSet<String>> {
        let names: Vec<String> = io(fs::read_dir(self.at(path)))?
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let set: BTreeSet<String> = names.iter().cloned().collect();
        assert_eq!(set.len(), names.len(), "twice in {path}: {names:?}");
        Ok(set)
    }

    fn stat(&mut self, path: &str) -> Answer<Stat> {
        // Who is writing a file sees the size that it has for them, by its path too. What others see is what they can read.
        let path = self.at(path);
        OTHER.with_borrow_mut(|other| other.as_mut().unwrap().stat(&path))
    }

    fn content(&mut self, path: &str) -> Answer<Vec<u8>> {
        io(fs::read(self.at(path)))
    }

    fn leave_alone(&mut self) {
        std::thread::sleep(Duration::from_millis(250));
    }

    fn remount(&mut self) {
        self.mount.take().unwrap().unmount();
        self.mount = Some(Mount::new(&self.softhsm));
        self.logged = 0;
    }
}

const fn of(backend: Backend) -> tokenfs::store::Backend {
    match backend {
        Backend::File => tokenfs::store::Backend::File,
        Backend::Db => tokenfs::store::Backend::Db,
    }
}

/// Two tokens that a SoftHSM has made.
fn template(backend: Backend) -> Template {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = temporary();
    let mut softhsm = Softhsm::new(backend);
    softhsm.tokendir = directory.path().to_owned();
    softhsm.configure("");
    let mut client = softhsm.p11();
    for name in TOKENS {
        client.init_token(name, Some(support::PIN)).unwrap();
    }
    drop(client);
    for (from, to) in softhsm.token_directories().iter().zip(TOKENS) {
        fs::rename(from, directory.path().join(to)).unwrap();
    }
    Template::of(directory, of(backend))
}

/// A SoftHSM sees all public objects that there are.
fn ask_softhsm(world: &MountWorld, template: &Template, model: &Model) {
    let mut client = world.softhsm.p11();
    for (token, objects) in &model.content() {
        // One that was made here is none that a SoftHSM could open.
        if objects[OWN] != template.content[token][OWN] {
            continue;
        }
        let label = objects[OWN].bytes(0x8000_5349).unwrap();
        let label = std::str::from_utf8(label).unwrap().trim_end();
        client.open(label, None).unwrap();
        let is_public = |name: &String, of: &tokenfs::store::attribute::Attributes| {
            name != OWN && of.boolean(2) == Some(false)
        };
        let public = objects.iter().filter(|(name, of)| is_public(name, of));
        assert_eq!(
            client.find(&[]).unwrap().len(),
            public.count(),
            "public objects in {label}"
        );
    }
}

/// One at a time: a process that another thread starts has all descriptors for a moment, and the kernel flushes them when it closes them.
static ALONE: Mutex<()> = Mutex::new(());

fn sequence(template: &Template, backend: Backend, ops: &[Op], ask: bool) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut world = MountWorld::new(template, backend);
    let mut model = Model::new(backend == Backend::Db, 0o077, &template.content);
    let mut after = |_: &Model, world: &mut MountWorld, refused: Option<i32>| {
        if refused == Some(Errno::EINVAL as i32) {
            let now = world.count_logged();
            assert!(now > world.logged, "the log says nothing of it");
            world.logged = now;
        }
    };
    let mut pair = Pair {
        model: &mut model,
        world: &mut world,
        after: &mut after,
    };
    for op in ops {
        pair.step(op);
    }
    pair.compare_trees();
    pair.prepare_end();
    world.mount.take().unwrap().unmount();
    let tokendir = world.tokendir.path();
    assert_eq!(
        stored(tokendir, of(backend)),
        model.content(),
        "left is what is stored, right what the model says"
    );
    if ask {
        ask_softhsm(&world, template, &model);
    }
    assert_eq!(leftovers(tokendir), [] as [PathBuf; 0]);
}

fn random(backend: Backend) {
    let template = template(backend);
    let count = Cell::new(0_u32);
    let name = format!("a mount, {backend} backend");
    run(&name, 10, lasting(), 60, 2000, |ops| {
        count.set(count.get() + 1);
        sequence(&template, backend, ops, count.get() % 8 == 1);
    });
}

#[test]
fn random_sequences_on_the_file_backend() {
    random(Backend::File);
}

#[test]
fn random_sequences_on_the_db_backend() {
    random(Backend::Db);
}

/// Runs a sequence that was found to go wrong on both backends.
#[track_caller]
fn found(ops: &[Op]) {
    for backend in support::BACKENDS {
        println!("--- {backend} backend");
        sequence(&template(backend), backend, ops, true);
    }
}

const A: &str = "token-1/00000000-0000-4000-8000-00000000000a";
const C: &str = "token-1/00000000-0000-4000-8000-00000000000c";

fn a(name: &str) -> String {
    format!("{A}/{name}")
}

/// What was found on the layers below, once more with the kernel's part in it.
#[test]
fn what_is_open_goes_where_its_file_goes() {
    found(&[
        open(0, &a("CKA_START_DATE"), "write create"),
        rename(A, C),
        mkdir(A),
        Op::Write(0, b"20261123"),
        Op::Close(0),
        list(A),
        content(&format!("{C}/CKA_START_DATE")),
        open(0, &format!("{C}/CKA_ID"), "write"),
        Op::Write(0, b"unlinked"),
        unlink(&format!("{C}/CKA_ID")),
        Op::Close(0),
        list(C),
        open(0, &format!("{C}/.x"), "write create append"),
        Op::SetLength(0, 3),
        Op::Write(0, b"once"),
        rename(&format!("{C}/.x"), &format!("{C}/CKA_ID")),
        Op::Close(0),
        content(&format!("{C}/CKA_ID")),
    ]);
}

/// What has objects and is no token keeps the mount from ending, and is removed before.
#[test]
fn objects_without_their_token_are_no_token() {
    let token = "token-2";
    let object = "token-2/00000000-0000-4000-8000-00000000000a";
    let begun = [rm_r(token), mkdir(token), mkdir(object)];
    found(&begun);
    found(&[&begun[..], &[sync_dir(token), list(token)]].concat());
}
