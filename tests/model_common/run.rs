//! The run of the model and of what it is held against, side by side.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::time::{Duration, Instant};

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use super::Answer;
use super::model::Model;
use super::ops::{DESCRIPTORS, How, Op, TOKENS, sequences};
use super::state::World;

/// The descriptor of what is opened, written and closed in one go.
const ONCE: usize = DESCRIPTORS;

/// A model, and what is held against it.
pub struct Pair<'a, W> {
    pub model: &'a mut Model,
    pub world: &'a mut W,
    /// Called after each system call with what the model says of it: whether it is refused for what was written.
    pub after: &'a mut dyn FnMut(&Model, &mut W, Option<i32>),
}

fn same<T: Debug + PartialEq>(what: &dyn Debug, model: &Answer<T>, world: &Answer<T>) {
    assert_eq!(
        world, model,
        "{what:?}: left is what it does, right is what the model says"
    );
}

impl<W: World> Pair<'_, W> {
    fn compare(&mut self, what: &dyn Debug, model: Answer, world: Answer) -> Answer {
        same(what, &model, &world);
        (self.after)(self.model, self.world, model.err());
        model
    }

    /// Runs one operation on both.
    pub fn step(&mut self, op: &Op) {
        match op {
            Op::Open { fd, path, how } => {
                self.close(*fd);
                let _ = self.open(op, *fd, path, *how);
            }
            Op::Write(fd, data) if self.model.is_writer(*fd) => self.on_fd(
                op,
                *fd,
                |model| model.write(*fd, data),
                |world| world.write(*fd, data),
            ),
            Op::WriteAt(fd, at, data) if self.model.is_writer(*fd) => self.on_fd(
                op,
                *fd,
                |model| model.write_at(*fd, *at, data),
                |world| world.write_at(*fd, *at, data),
            ),
            Op::Read(fd) if self.model.is_open(*fd) && !self.model.is_detached(*fd) => {
                same(op, &self.model.read(*fd), &self.world.read(*fd));
            }
            Op::CloseDuplicate(fd) if self.model.is_open(*fd) => self.on_fd(
                op,
                *fd,
                |model| model.close_duplicate(*fd),
                |world| world.close_duplicate(*fd),
            ),
            Op::Close(fd) => self.close(*fd),
            Op::SetLength(fd, length) if self.model.is_writer(*fd) => self.on_fd(
                op,
                *fd,
                |model| model.set_length(*fd, *length),
                |world| world.set_length(*fd, *length),
            ),
            Op::Sync(fd) if self.model.is_open(*fd) && !self.model.is_detached(*fd) => {
                self.on_fd(op, *fd, |model| model.sync(*fd), |world| world.sync(*fd));
            }
            Op::Write(..)
            | Op::WriteAt(..)
            | Op::Read(_)
            | Op::CloseDuplicate(_)
            | Op::SetLength(..)
            | Op::Sync(_) => {}
            Op::Truncate(path, length) => {
                let model = self.model.truncate(path, *length);
                let world = self.world.truncate(path, *length);
                let _ = self.compare(op, model, world);
            }
            // An object that says nothing of it is private to SoftHSM: what is unlinked may be back, which the log says.
            Op::Unlink(path) | Op::Rename(path, _) if path.ends_with("/CKA_PRIVATE") => {}
            Op::Unlink(path) => {
                let model = self.model.unlink(path);
                let world = self.world.unlink(path);
                let _ = self.compare(op, model, world);
            }
            // What the kernel refuses before it asks anybody.
            Op::Rename(from, to) if is_below(from, to) || is_below(to, from) => {}
            Op::Rename(from, to) => {
                let model = self.model.rename(from, to);
                let world = self.world.rename(from, to);
                let _ = self.compare(op, model, world);
            }
            Op::MakeDir(path) => {
                let model = self.model.make_dir(path);
                let world = self.world.make_dir(path);
                // It says whether it is private, or it could not be written with a text in the clear: see
                // `validate::check_finished`, which has tests of its own.
                let made = self.compare(op, model, world).is_ok();
                let [_, object] = path.split('/').collect::<Vec<_>>()[..] else {
                    return;
                };
                if made && object == "token" {
                    // Without these it is no token.
                    let serial = format!("{path}/CKA_OS_TOKENSERIAL");
                    self.step(&Op::Put(serial, b"00000000feedbeef"));
                    let flags = format!("{path}/CKA_OS_TOKENFLAGS");
                    self.step(&Op::Put(flags, b"CKF_RNG\n"));
                } else if made && !object.starts_with('.') {
                    self.step(&Op::Put(format!("{path}/CKA_PRIVATE"), b"false\n"));
                }
            }
            Op::RemoveDir(path) => self.remove_dir(path),
            Op::RemoveAll(path) => {
                // The first token stays.
                if path != TOKENS[0] {
                    self.remove_all(path);
                }
            }
            Op::Mode(path, mode) => self.set_mode(op, path, *mode),
            Op::Times(path, seconds) => self.set_times(op, path, *seconds),
            Op::SyncDir(path) => {
                let model = self.model.sync_dir(path);
                let world = self.world.sync_dir(path);
                let _ = self.compare(op, model, world);
            }
            Op::List(path) => same(op, &self.model.list(path), &self.world.list(path)),
            Op::Stat(path) => {
                let world = self.world.stat(path);
                let world = world.map(|stat| (stat.is_directory, stat.size));
                same(op, &self.model.stat(path), &world);
            }
            Op::Content(path) => {
                let model = self.model.text(path);
                if model != Err(libc::EISDIR) {
                    same(op, &model, &self.world.content(path));
                }
            }
            Op::Put(path, data) => {
                let how = How {
                    write: true,
                    create: true,
                    truncate: true,
                    ..How::default()
                };
                if self.open(op, ONCE, path, how).is_ok() {
                    self.on_fd(
                        op,
                        ONCE,
                        |model| model.write(ONCE, data),
                        |world| world.write(ONCE, data),
                    );
                    self.close(ONCE);
                }
            }
            Op::LeaveAlone => {
                self.model.leave_alone();
                self.world.leave_alone();
                (self.after)(self.model, self.world, None);
            }
            Op::Remount => self.remount(),
        }
    }

    /// The mount ends, and there is another one.
    pub fn remount(&mut self) {
        self.prepare_end();
        self.world.remount();
        (self.after)(self.model, self.world, None);
    }

    /// Closes everything: the mount is going to end.
    pub fn prepare_end(&mut self) {
        for fd in 0..DESCRIPTORS {
            self.close(fd);
        }
        // One that replaces what was unlinked: whether the old value comes back is left open.
        for path in self.model.without_value() {
            let world = self.world.unlink(&path);
            let model = self.model.unlink(&path);
            let _ = self.compare(&("unlink", path), model, world);
        }
        for token in self.model.unfinished() {
            self.remove_all(&token);
        }
        self.model.remount();
    }

    fn open(&mut self, op: &Op, fd: usize, path: &str, how: How) -> Answer {
        // A directory can be opened for reading, and that is no file.
        if !how.write
            && self
                .model
                .stat(path)
                .is_ok_and(|(is_directory, _)| is_directory)
        {
            return Ok(());
        }
        let model = self.model.open(fd, path, how);
        let world = self.world.open(fd, path, how);
        self.compare(op, model, world)
    }

    fn on_fd(
        &mut self,
        op: &Op,
        fd: usize,
        model: impl FnOnce(&mut Model) -> Answer,
        world: impl FnOnce(&mut W) -> Answer,
    ) {
        let is_detached = self.model.is_detached(fd);
        let (model, world) = (model(self.model), world(self.world));
        if is_detached {
            (self.after)(self.model, self.world, None);
        } else {
            let _ = self.compare(op, model, world);
        }
    }

    fn close(&mut self, fd: usize) {
        if self.model.is_open(fd) {
            self.on_fd(
                &Op::Close(fd),
                fd,
                |model| model.close(fd),
                |world| world.close(fd),
            );
        }
    }

    fn remove_dir(&mut self, path: &str) {
        let model = self.model.remove_dir(path);
        let world = self.world.remove_dir(path);
        let _ = self.compare(&("rmdir", path), model, world);
    }

    fn remove_all(&mut self, path: &str) {
        let Ok(names) = self.model.list(path) else {
            return;
        };
        same(
            &("rm -r lists", path),
            &Ok(names.clone()),
            &self.world.list(path),
        );
        for name in names {
            let path = format!("{path}/{name}");
            if self
                .model
                .stat(&path)
                .is_ok_and(|(is_directory, _)| is_directory)
            {
                self.remove_all(&path);
            } else {
                let (model, world) = (self.model.unlink(&path), self.world.unlink(&path));
                let _ = self.compare(&("rm -r unlinks", path), model, world);
            }
        }
        self.remove_dir(path);
    }

    fn set_mode(&mut self, op: &Op, path: &str, mode: u32) {
        let wanted = self.model.mode_after(path, mode);
        let world = self.world.set_mode(path, mode);
        let wanted = match self.compare(op, wanted.map(drop), world) {
            Ok(()) => wanted,
            Err(_) => return,
        };
        let seen = self.world.stat(path).map(|stat| stat.mode);
        same(&(op, "the mode then"), &wanted, &seen);
    }

    fn set_times(&mut self, op: &Op, path: &str, seconds: u64) {
        let model = self.model.set_times(path);
        let world = self.world.set_times(path, seconds);
        let is_seen = model.unwrap_or(false);
        if self.compare(op, model.map(drop), world).is_ok() && is_seen {
            let seen = self.world.stat(path).map(|stat| stat.mtime);
            same(&(op, "the time then"), &Ok(seconds), &seen);
        }
    }

    /// The whole tree is what the model says.
    pub fn compare_trees(&mut self) {
        let mut seen = BTreeMap::new();
        add_to(&mut seen, self.world, "");
        let wanted = self.model.tree();
        let paths: BTreeSet<&String> = seen.keys().chain(wanted.keys()).collect();
        let differ: Vec<String> = paths
            .into_iter()
            .filter(|path| seen.get(*path) != wanted.get(*path))
            .map(|path| {
                let is = |tree: &Files| match tree.get(path) {
                    None => "nothing".to_owned(),
                    Some(None) => "a directory".to_owned(),
                    Some(Some(content)) => format!("b\"{}\"", content.escape_ascii()),
                };
                format!("{path} is {}, and {} in the model", is(&seen), is(&wanted))
            })
            .collect();
        assert!(differ.is_empty(), "{}", differ.join("\n"));
    }
}

fn is_below(path: &str, directory: &str) -> bool {
    path.strip_prefix(directory)
        .is_some_and(|rest| rest.starts_with('/'))
}

type Files = BTreeMap<String, Option<Vec<u8>>>;

fn add_to<W: World>(tree: &mut Files, world: &mut W, directory: &str) {
    for name in world
        .list(directory)
        .unwrap_or_else(|e| panic!("list {directory}: {e}"))
    {
        let path = match directory {
            "" => name,
            _ => format!("{directory}/{name}"),
        };
        let stat = world
            .stat(&path)
            .unwrap_or_else(|e| panic!("stat {path}: {e}"));
        if stat.is_directory {
            tree.insert(path.clone(), None);
            add_to(tree, world, &path);
        } else {
            let content = world
                .content(&path)
                .unwrap_or_else(|e| panic!("content {path}: {e}"));
            assert_eq!(content.len() as u64, stat.size, "{path}");
            tree.insert(path, Some(content));
        }
    }
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// What fails while it is being made smaller is not shown.
struct Quiet;

impl Quiet {
    fn new() -> Self {
        static HOOK: std::sync::Once = std::sync::Once::new();
        HOOK.call_once(|| {
            let usual = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                if !QUIET.get() {
                    usual(info);
                }
            }));
        });
        QUIET.set(true);
        Self
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        QUIET.set(false);
    }
}

fn rng(seed: u64) -> TestRng {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    TestRng::from_seed(RngAlgorithm::ChaCha, &bytes)
}

/// Runs `test` with the sequences of `fixed` seeds, and then with others for as long as `lasting`. What fails is made as small as it can
/// be within `shrinks` attempts.
pub fn run(
    name: &str,
    fixed: u64,
    lasting: Duration,
    most: usize,
    shrinks: u32,
    mut test: impl FnMut(&[Op]),
) {
    let strategy = sequences(most);
    let test = |ops: &Vec<Op>| test(ops);
    run_with(name, fixed, lasting, &strategy, shrinks, test, Vec::len);
}

/// The same with sequences of another sort, whose length is what `length` says.
pub fn run_with<S: Strategy>(
    name: &str,
    fixed: u64,
    lasting: Duration,
    strategy: &S,
    shrinks: u32,
    mut test: impl FnMut(&S::Value),
    length: impl Fn(&S::Value) -> usize,
) where
    S::Value: Debug,
{
    let started = Instant::now();
    let base: u64 = match std::env::var("TOKENFS_TEST_SEED") {
        Ok(seed) => seed.parse().expect("TOKENFS_TEST_SEED"),
        Err(_) => {
            std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap()
                .as_secs()
                << 20
        }
    };
    println!("{name}: TOKENFS_TEST_SEED={base}");
    let (mut sequences_run, mut ops_run) = (0_u64, 0_u64);
    let seeds = (0..fixed).chain((0..).map(|n| base + n));
    let test = RefCell::new(&mut test);
    for (index, seed) in seeds.enumerate() {
        if index as u64 >= fixed && started.elapsed() >= lasting {
            break;
        }
        let config = Config {
            cases: 1,
            failure_persistence: None,
            max_shrink_iters: shrinks,
            max_shrink_time: 60_000,
            ..Config::default()
        };
        let mut runner = TestRunner::new_with_rng(config, rng(seed));
        let counts = RefCell::new((&mut sequences_run, &mut ops_run));
        let outcome = runner.run(strategy, |ops| {
            {
                let mut counts = counts.borrow_mut();
                *counts.0 += 1;
                *counts.1 += length(&ops) as u64;
            }
            if std::env::var_os("TOKENFS_MODEL_SHOW").is_some() {
                eprintln!("{:?} seed {seed}: {ops:?}", started.elapsed());
            }
            let _quiet = Quiet::new();
            let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                (test.borrow_mut())(&ops);
            }));
            caught.map_err(|panic| {
                let text = panic
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                TestCaseError::fail(text.unwrap_or_default())
            })
        });
        match outcome {
            Ok(()) => {}
            Err(TestError::Fail(why, ops)) => {
                panic!("{name}: seed {seed}: {why}\n{ops:#?}");
            }
            Err(error) => panic!("{name}: seed {seed}: {error}"),
        }
    }
    println!(
        "{name}: {sequences_run} sequences, {ops_run} operations in {:?}",
        started.elapsed()
    );
}

/// How long random sequences are run: 15 s, five minutes with `scripts/test --full`, or `TOKENFS_TEST_SECONDS`.
pub fn lasting() -> Duration {
    let full = std::env::var_os("TOKENFS_TEST_FULL").is_some_and(|value| value == "1");
    let seconds = match std::env::var("TOKENFS_TEST_SECONDS") {
        Ok(seconds) => seconds.parse().expect("TOKENFS_TEST_SECONDS"),
        Err(_) if full => 300,
        Err(_) => 15,
    };
    Duration::from_secs(seconds)
}
