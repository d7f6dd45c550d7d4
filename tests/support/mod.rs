//! What the integration tests stand on: stores of both backends, mounts that always come down again, SoftHSM processes, and
//! looks at a store that do not go through the code under test.
//!
//! Everything that is missing on the machine is a panic that says so: `scripts/test` installs it, builds a SoftHSM with the
//! `db` backend and sets the variables that lead to it.
#![allow(dead_code, unused_imports, unused_macros)]

pub mod client;
pub mod independent;
pub mod template;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt::{self, Write as _};
use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, chown};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

pub use client::{Found, P11, Refusal};

/// The PIN of the user in all stores here.
pub const PIN: &str = "1234";
/// The PIN of the security officer in all stores here.
pub const SO_PIN: &str = "5678";

// ---------------------------------------------------------------------------------------------------- the machine

/// A variable that `scripts/test` sets.
fn variable(name: &str) -> PathBuf {
    match std::env::var_os(name) {
        Some(value) if Path::new(&value).exists() => PathBuf::from(value),
        Some(value) => {
            panic!("{name} is {value:?}, which does not exist. Run the tests with scripts/test")
        }
        None => panic!(
            "{name} is not set. Run the tests with scripts/test, or see `scripts/test --env`"
        ),
    }
}

/// Whether the tests are to take their time (`scripts/test --full`).
pub fn full() -> bool {
    std::env::var_os("TOKENFS_TEST_FULL").is_some_and(|value| value == "1")
}

/// The seed of what a plain run chooses.
pub fn seed() -> usize {
    match std::env::var("TOKENFS_TEST_SEED") {
        Ok(seed) => seed.parse().expect("TOKENFS_TEST_SEED"),
        Err(_) => 0,
    }
}

/// Has a writer of a database with at least two objects die in the middle of a transaction of which pages have reached the file: what it
/// leaves is a hot journal.
#[track_caller]
pub fn crash_a_writer(database: &Path) {
    let intact = fs::read(database).unwrap();
    let sql = "pragma cache_size = 2; pragma cache_spill = 1; begin immediate;
        update attribute_binary set value = x'626164';
        insert into attribute_binary (value, type, object_id) values (zeroblob(400000), 17, 2);
        insert into object values (50);";
    let mut writer = tool("sqlite3");
    let output = writer
        .arg(database)
        .args([sql, ".shell kill -KILL $PPID"])
        .output()
        .unwrap();
    assert!(!output.status.success(), "{output:?}");
    assert!(database.with_file_name("sqlite3.db-journal").exists());
    assert_ne!(fs::read(database).unwrap(), intact, "nothing was spilled");
}

/// A command, once it is sure that it is there. A panic names the Debian package that has it.
pub fn tool(name: &str) -> Command {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    for place in places {
        if place.join(name).is_file() {
            return Command::new(place.join(name));
        }
    }
    let package = match name {
        "borg" => "borgbackup",
        "fusermount3" | "mount.fuse3" => "fuse3",
        "mkfs.ext4" => "e2fsprogs",
        "getfacl" | "setfacl" => "acl",
        "getfattr" | "setfattr" => "attr",
        "p11tool" | "certtool" => "gnutls-bin",
        "pkcs11-tool" => "opensc",
        "setpriv" | "flock" | "losetup" | "nsenter" => "util-linux",
        "softhsm2-util" | "softhsm2-dump-file" => "softhsm2",
        "script" => "bsdutils",
        "xz" => "xz-utils",
        "ps" | "pgrep" | "free" => "procps",
        other => other,
    };
    panic!(
        "no {name} on this machine: install the package {package}, or run the tests with scripts/test, which does"
    );
}

/// Runs a command that must succeed; a panic shows what it said.
pub fn run(command: &mut Command) -> Output {
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{}", describe(command, &output));
    output
}

/// Runs a command that must succeed, and gives what it printed.
pub fn text_of(command: &mut Command) -> String {
    String::from_utf8_lossy(&run(command).stdout).into_owned()
}

/// Runs a command that must fail, and gives what it said on standard error.
pub fn run_to_fail(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(
        !output.status.success(),
        "should have failed: {}",
        describe(command, &output)
    );
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs a line of shell in a directory, which must succeed; what it printed.
pub fn sh(directory: &Path, line: &str) -> String {
    let mut shell = Command::new("bash");
    text_of(
        shell
            .arg("-euo")
            .arg("pipefail")
            .arg("-c")
            .arg(line)
            .current_dir(directory),
    )
}

fn describe(command: &Command, output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    format!(
        "{command:?}: {}\n--- stdout\n{out}--- stderr\n{err}",
        output.status
    )
}

/// Waits until something is so; a panic says what was waited for.
pub fn eventually(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A temporary directory that other users can enter.
pub fn temporary() -> TempDir {
    let directory = tempfile::Builder::new()
        .prefix("tokenfs-")
        .tempdir()
        .expect("a temporary directory");
    set_mode(directory.path(), 0o755);
    directory
}

/// The same in memory, where syncing costs nothing, if there is such a place.
pub fn temporary_in_memory() -> TempDir {
    let mut builder = tempfile::Builder::new();
    let directory = builder.prefix("tokenfs-").tempdir_in("/dev/shm");
    let Ok(directory) = directory else {
        return temporary();
    };
    set_mode(directory.path(), 0o755);
    directory
}

/// `chmod`.
pub fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}

/// A file with a lock on the whole of it, as SoftHSM's, for as long as it is open.
pub fn exclusively(path: &Path) -> fs::File {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let whole = nix::libc::flock {
        l_type: nix::libc::F_WRLCK as nix::libc::c_short,
        l_whence: nix::libc::SEEK_SET as nix::libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&whole)).unwrap();
    file
}

/// The permission bits of a path.
pub fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        .mode()
        & 0o7777
}

// ------------------------------------------------------------------------------------------------------ the users

/// Somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
}

/// Two ordinary users: `games` and `nobody`, which Debian has everywhere. Their uids and gids differ from each other's, and
/// `fusermount3` mounts for nobody who has no name.
pub const ALICE: User = User { uid: 5, gid: 60 };
pub const BOB: User = User {
    uid: 65534,
    gid: 65534,
};

/// Whether the tests run as root.
pub fn is_root() -> bool {
    Uid::effective().is_root()
}

/// A command that runs as another user, without any of root's powers.
pub fn as_user(user: User, program: impl AsRef<OsStr>) -> Command {
    as_user_in(user, &[], program)
}

/// The same, in further groups.
pub fn as_user_in(user: User, groups: &[u32], program: impl AsRef<OsStr>) -> Command {
    assert!(
        is_root(),
        "this test runs commands as other users: run scripts/test as root"
    );
    let mut command = tool("setpriv");
    command
        .arg(format!("--reuid={}", user.uid))
        .arg(format!("--regid={}", user.gid));
    if groups.is_empty() {
        command.arg("--clear-groups");
    } else {
        let groups: Vec<String> = groups.iter().map(u32::to_string).collect();
        command.arg(format!("--groups={}", groups.join(",")));
    }
    command.arg("--inh-caps=-all").arg("--").arg(program);
    command
        .env("HOME", "/nonexistent")
        .env_remove("XDG_CONFIG_HOME");
    command
}

/// Gives everything below a path to a user.
pub fn give(path: &Path, user: User) {
    let owner = (Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid)));
    for entry in walk(path) {
        nix::unistd::fchownat(
            nix::fcntl::AT_FDCWD,
            &entry,
            owner.0,
            owner.1,
            nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW,
        )
        .unwrap_or_else(|e| panic!("chown {}: {e}", entry.display()));
    }
}

/// A program where other users can run it: the source tree may be in somebody's home.
pub fn reachable(program: &Path) -> PathBuf {
    static COPIES: Mutex<BTreeMap<PathBuf, PathBuf>> = Mutex::new(BTreeMap::new());
    if program
        .ancestors()
        .skip(1)
        .all(|place| fs::metadata(place).is_ok_and(|m| m.mode() & 0o001 != 0))
    {
        return program.to_owned();
    }
    let mut copies = COPIES.lock().unwrap_or_else(|e| e.into_inner());
    let copy = copies.entry(program.to_owned()).or_insert_with(|| {
        let directory = temporary().keep();
        let copy = directory.join(program.file_name().expect("the name of a program"));
        fs::copy(program, &copy).expect("copying a program");
        set_mode(&copy, 0o755);
        copy
    });
    copy.clone()
}

// ----------------------------------------------------------------------------------------------------- the stores

/// Which of SoftHSM's backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    File,
    Db,
}

/// Both of them.
pub const BACKENDS: [Backend; 2] = [Backend::File, Backend::Db];

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::File => "file",
            Self::Db => "db",
        })
    }
}

/// Runs a test on one backend after the other, and says which one failed.
pub fn on_both(test: impl Fn(Backend)) {
    for backend in BACKENDS {
        println!("--- backend {backend}");
        test(backend);
    }
}

/// Says what a test has covered: on its output, and at the end of `scripts/test`.
macro_rules! report {
    ($($arguments:tt)*) => { $crate::support::say_covered(&format!($($arguments)*)) };
}
pub(crate) use report;

/// See [`report!`].
pub fn say_covered(line: &str) {
    println!("{line}");
    let Some(run) = std::env::var_os("TOKENFS_TEST_RUN") else {
        return;
    };
    let program = std::env::current_exe().unwrap();
    let program = program.file_stem().unwrap().to_string_lossy().into_owned();
    let program = program.rsplit_once('-').map_or(&*program, |(name, _)| name);
    let report = Path::new(&run).join("report");
    let report = fs::File::options().create(true).append(true).open(report);
    // In one write, since others write there too.
    report
        .unwrap()
        .write_all(format!("{program}: {line}\n").as_bytes())
        .unwrap();
}

/// Tests for both backends, `name::file` and `name::db`:
///
/// ```ignore
/// both_backends! {
///     fn labels_survive(backend) { … }
/// }
/// ```
macro_rules! both_backends {
    ($($(#[$meta:meta])* fn $name:ident($backend:ident) $body:block)*) => {
        $(
            $(#[$meta])*
            mod $name {
                use super::*;
                fn test($backend: $crate::support::Backend) $body
                #[test]
                fn file() { test($crate::support::Backend::File); }
                #[test]
                fn db() { test($crate::support::Backend::Db); }
            }
        )*
    };
}
pub(crate) use both_backends;

/// Who wrote a golden store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Golden {
    V2_6_1,
    V2_7_0,
}

/// Both of them.
pub const GOLDEN: [Golden; 2] = [Golden::V2_6_1, Golden::V2_7_0];

impl fmt::Display for Golden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V2_6_1 => "2.6.1",
            Self::V2_7_0 => "2.7.0",
        })
    }
}

/// A SoftHSM's configuration and store in a temporary directory, gone with this value.
#[derive(Debug)]
pub struct Softhsm {
    pub backend: Backend,
    /// `softhsm2.conf`.
    pub conf: PathBuf,
    /// Where the tokens are.
    pub tokendir: PathBuf,
    /// Holds both, and whatever a test puts beside them.
    pub directory: TempDir,
}

impl Softhsm {
    /// An empty store.
    pub fn new(backend: Backend) -> Self {
        Self::new_in(backend, temporary())
    }

    /// An empty store in that directory.
    pub fn new_in(backend: Backend, directory: TempDir) -> Self {
        let tokendir = directory.path().join("tokens");
        fs::create_dir(&tokendir).expect("the tokendir");
        let softhsm = Self {
            backend,
            conf: directory.path().join("softhsm2.conf"),
            tokendir,
            directory,
        };
        softhsm.configure("");
        softhsm
    }

    /// Writes the configuration anew, with further lines.
    pub fn configure(&self, more: &str) {
        let text = format!(
            "directories.tokendir = {}\nobjectstore.backend = {}\nlog.level = ERROR\nslots.removable = false\n{more}",
            self.tokendir.display(),
            self.backend
        );
        fs::write(&self.conf, text).expect("softhsm2.conf");
    }

    /// A copy of a golden store, with its modes. The umask of its writer is in the configuration.
    pub fn golden(golden: Golden, backend: Backend) -> Self {
        let softhsm = Self::new(backend);
        let name = format!("softhsm-{golden}-{backend}");
        let archive =
            Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.tar.xz"));
        drop(tool("xz"));
        let mut tar = tool("tar");
        tar.arg("--no-same-owner")
            .arg("-p")
            .arg("-C")
            .arg(softhsm.directory.path());
        tar.arg("-xJf").arg(archive).arg("--strip-components=1");
        run(&mut tar);
        if golden == Golden::V2_7_0 {
            softhsm.configure("objectstore.umask = 0027\n");
        } else {
            softhsm.configure("");
        }
        softhsm
    }

    /// A store with one token, `test`, whose PINs are [`PIN`] and [`SO_PIN`]; and a client with its user's session open.
    pub fn with_token(backend: Backend) -> (Self, P11) {
        let softhsm = Self::new(backend);
        let mut client = softhsm.p11();
        client.init_token("test", Some(PIN)).expect("init-token");
        client.open("test", Some(PIN)).expect("open");
        (softhsm, client)
    }

    /// `libsofthsm2.so` of the backend.
    pub fn library(&self) -> PathBuf {
        variable(match self.backend {
            Backend::File => "TOKENFS_TEST_SOFTHSM_FILE",
            Backend::Db => "TOKENFS_TEST_SOFTHSM_DB",
        })
    }

    /// A SoftHSM process.
    pub fn p11(&self) -> P11 {
        P11::start(self)
    }

    /// A command that finds this store's configuration.
    pub fn command(&self, name: &str) -> Command {
        let mut command = tool(name);
        command.env("SOFTHSM2_CONF", &self.conf);
        command
    }

    /// `softhsm2-util` with the library of the backend.
    pub fn util(&self) -> Command {
        let mut command = match self.backend {
            Backend::File => tool("softhsm2-util"),
            Backend::Db => {
                Command::new(variable("TOKENFS_TEST_SOFTHSM_DB_PREFIX").join("bin/softhsm2-util"))
            }
        };
        command
            .env("SOFTHSM2_CONF", &self.conf)
            .arg("--module")
            .arg(self.library());
        command
    }

    /// `pkcs11-tool` with the library of the backend.
    pub fn pkcs11_tool(&self) -> Command {
        let mut command = self.command("pkcs11-tool");
        command.arg("--module").arg(self.library());
        command
    }

    /// The directories of the tokens, by name.
    pub fn token_directories(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.tokendir).expect("the tokendir");
        let mut directories: Vec<_> = entries.map(|e| e.expect("the tokendir").path()).collect();
        directories.retain(|path| path.is_dir());
        directories.sort();
        directories
    }

    /// The directory of the only token.
    pub fn token_directory(&self) -> PathBuf {
        let mut directories = self.token_directories();
        assert_eq!(directories.len(), 1, "not one token: {directories:?}");
        directories.remove(0)
    }

    /// What an independent reader finds in the store.
    pub fn read(&self) -> BTreeMap<String, independent::Token> {
        independent::read_store(&self.tokendir)
    }

    /// The store as it is, byte for byte.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot::of(&self.tokendir)
    }
}

/// A program that cargo built beside the tests.
pub fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the path of the test");
    // target/<profile>/deps/<test>
    let profile = test
        .ancestors()
        .nth(2)
        .expect("the directory of the profile");
    let path = profile.join("examples").join(name);
    assert!(
        path.exists(),
        "no {}: run `cargo build --examples` first, as `cargo test` does",
        path.display()
    );
    path
}

// -------------------------------------------------------------------------------------------------- nothing changed

/// All paths below one, itself included, in order. Links are not followed.
pub fn walk(path: &Path) -> Vec<PathBuf> {
    let mut paths = vec![path.to_owned()];
    if fs::symlink_metadata(path).is_ok_and(|m| m.is_dir()) {
        let entries = fs::read_dir(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let mut entries: Vec<_> = entries.map(|e| e.expect("an entry").path()).collect();
        entries.sort();
        paths.extend(entries.iter().flat_map(|entry| walk(entry)));
    }
    paths
}

/// A directory byte for byte: names, types, modes, owners and contents; no times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot(BTreeMap<PathBuf, String>);

impl Snapshot {
    /// Of everything below a directory.
    pub fn of(directory: &Path) -> Self {
        Self::without(directory, |_| false)
    }

    /// The same without what `skip` says, which is given paths relative to the directory.
    pub fn without(directory: &Path, skip: impl Fn(&Path) -> bool) -> Self {
        let mut entries = BTreeMap::new();
        for path in walk(directory) {
            let relative = path
                .strip_prefix(directory)
                .expect("a path below")
                .to_owned();
            if skip(&relative) {
                continue;
            }
            let metadata = fs::symlink_metadata(&path).expect("stat");
            let content = if metadata.is_file() {
                let content = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                let digest = template::hex(&Sha256::digest(&content));
                format!("{} bytes {digest}", content.len())
            } else if metadata.is_symlink() {
                format!("link {:?}", fs::read_link(&path).expect("readlink"))
            } else {
                String::from("directory or special")
            };
            let line = format!(
                "{:o} {}:{} {content}",
                metadata.mode(),
                metadata.uid(),
                metadata.gid()
            );
            entries.insert(relative, line);
        }
        Self(entries)
    }

    /// What differs, one line each.
    pub fn difference(&self, later: &Self) -> String {
        let mut out = String::new();
        for path in self
            .0
            .keys()
            .chain(later.0.keys().filter(|p| !self.0.contains_key(*p)))
        {
            let (before, after) = (self.0.get(path), later.0.get(path));
            if before != after {
                let _ = writeln!(out, "{}: {before:?} became {after:?}", path.display());
            }
        }
        out
    }

    /// Panics with what differs.
    #[track_caller]
    pub fn assert_same(&self, later: &Self) {
        let difference = self.difference(later);
        assert!(difference.is_empty(), "changed:\n{difference}");
    }
}

// ----------------------------------------------------------------------------------------------------- the mounts

/// The program under test: the one that cargo has just built, or another one (`TOKENFS_TEST_BINARY`).
pub fn binary() -> PathBuf {
    std::env::var_os("TOKENFS_TEST_BINARY")
        .map_or_else(|| env!("CARGO_BIN_EXE_tokenfs").into(), PathBuf::from)
}

/// The program under test.
pub fn tokenfs() -> Command {
    Command::new(binary())
}

/// The program under test, as another user.
pub fn tokenfs_as(user: User) -> Command {
    as_user(user, reachable(&binary()))
}

/// How to mount.
#[derive(Clone, Debug, Default)]
pub struct MountOptions {
    /// Further arguments of `tokenfs mount`, before the mount point.
    pub arguments: Vec<OsString>,
    /// Who mounts.
    pub user: Option<User>,
    /// Further variables.
    pub environment: Vec<(OsString, OsString)>,
    /// With `-f`, as a child of the test.
    pub foreground: bool,
    /// The umask of the process that mounts; else that of the test.
    pub umask: Option<u32>,
}

impl MountOptions {
    /// As `tokenfs mount` does by itself.
    pub fn new() -> Self {
        Self::default()
    }

    /// One more argument.
    pub fn argument(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// `-o` and an option.
    pub fn option(self, option: &str) -> Self {
        self.argument("-o").argument(option)
    }

    /// Mounted by another user, who has to be able to reach the store.
    pub fn user(mut self, user: User) -> Self {
        self.user = Some(user);
        self
    }

    /// One more variable.
    pub fn environment(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.environment
            .push((name.into(), value.as_ref().to_owned()));
        self
    }

    /// With `-f`.
    pub fn foreground(mut self) -> Self {
        self.foreground = true;
        self
    }

    /// From a shell with that umask.
    pub fn umask(mut self, umask: u32) -> Self {
        self.umask = Some(umask);
        self
    }

    /// Mounts a store, which must succeed.
    pub fn mount(&self, softhsm: &Softhsm) -> Mount {
        let mut arguments = vec![OsString::from("--config"), softhsm.conf.clone().into()];
        arguments.extend(self.arguments.iter().cloned());
        self.mount_with(&arguments)
            .unwrap_or_else(|why| panic!("{why}"))
    }

    /// Mounts with exactly these arguments besides the mount point; else what `tokenfs` said.
    pub fn mount_with(&self, arguments: &[OsString]) -> Result<Mount, String> {
        let point = temporary();
        if let Some(user) = self.user {
            give(point.path(), user);
        }
        let mark = format!("{MARK}={}", point.path().display());
        let logs = temporary();
        let log = logs.path().join("output");
        let output = fs::File::create(&log).expect("a log");
        let mut command = self.user.map_or_else(tokenfs, tokenfs_as);
        if let Some(umask) = self.umask {
            let mut shell = Command::new("/bin/sh");
            shell
                .arg("-c")
                .arg(format!("umask {umask:04o}; exec \"$@\""))
                .arg("sh")
                .arg(command.get_program())
                .args(command.get_args());
            for (name, value) in command.get_envs() {
                match value {
                    Some(value) => shell.env(name, value),
                    None => shell.env_remove(name),
                };
            }
            command = shell;
        }
        command
            .arg("mount")
            .args(arguments)
            .args(self.foreground.then_some("-f"))
            .arg(point.path())
            .env(MARK, point.path())
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a log"))
            .stderr(output);
        let child = command
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let mut mount = Mount {
            point: Some(point),
            child: Some(child),
            mark,
            log,
            logs,
        };
        let said = |mount: &Mount, what: &str| format!("{command:?} {what}:\n{}", mount.said());
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let child = mount.child.as_mut().expect("the child");
            match child.try_wait().expect("waiting for tokenfs mount") {
                Some(status) if self.foreground || !status.success() => {
                    return Err(said(&mount, &format!("ended with {status}")));
                }
                Some(_) => {
                    mount.child = None;
                    if !mount.is_mounted() {
                        return Err(said(&mount, "returned, and nothing is mounted"));
                    }
                    return Ok(mount);
                }
                None if self.foreground && mount.is_mounted() => return Ok(mount),
                None if Instant::now() > deadline => return Err(said(&mount, "did not return")),
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }
}

/// In the environment of everything that a mount of a test starts.
const MARK: &str = "TOKENFS_TEST_MOUNT";

/// A mounted store. It comes down with this value, in a panic too.
#[derive(Debug)]
pub struct Mount {
    point: Option<TempDir>,
    child: Option<Child>,
    mark: String,
    log: PathBuf,
    logs: TempDir,
}

impl Mount {
    /// Mounts a store.
    pub fn new(softhsm: &Softhsm) -> Self {
        MountOptions::new().mount(softhsm)
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        self.point.as_ref().expect("the mount point").path()
    }

    /// A path in the mount.
    pub fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.path().join(path)
    }

    /// What `tokenfs mount`, and what it left running, printed until now.
    pub fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Whether the kernel has it mounted. Asks nothing of the mount itself.
    pub fn is_mounted(&self) -> bool {
        is_mount_point(self.path())
    }

    /// The process that serves it.
    pub fn pid(&self) -> u32 {
        let pids = self.daemons();
        assert_eq!(
            pids.len(),
            1,
            "not one process serves {}: {pids:?}",
            self.path().display()
        );
        pids[0]
    }

    fn daemons(&self) -> Vec<u32> {
        processes_marked(&self.mark)
    }

    /// Kills the process that serves it, as a crash would, and waits for its end. The mount point stays until the value goes.
    pub fn kill(&mut self, signal: Signal) {
        let pid = Pid::from_raw(self.pid().cast_signed());
        kill(pid, signal).expect("killing the mount");
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
        eventually(
            Duration::from_secs(20),
            "the end of the mount's process",
            || self.daemons().is_empty(),
        );
    }

    /// `tokenfs umount`, which must succeed, and the end of the process.
    pub fn unmount(mut self) {
        run(tokenfs().arg("umount").arg(self.path()));
        assert!(
            !self.is_mounted(),
            "{} is still mounted",
            self.path().display()
        );
        self.take_down();
    }

    /// Unmounts, lazily if need be, and sees to it that the process ends.
    fn take_down(&mut self) {
        let Some(point) = self.point.take() else {
            return;
        };
        let mut trouble = String::new();
        let deadline = Instant::now() + Duration::from_secs(3);
        while is_mount_point(point.path()) {
            let lazily = Instant::now() > deadline;
            let mut command = if is_root() {
                tool("umount")
            } else {
                tool("fusermount3")
            };
            command
                .args((!is_root()).then_some("-u"))
                .args(lazily.then_some(if is_root() { "-l" } else { "-z" }));
            let output = command.arg(point.path()).output();
            let said = output.map_or_else(
                |e| e.to_string(),
                |o| String::from_utf8_lossy(&o.stderr).into_owned(),
            );
            if lazily {
                let _ = write!(trouble, "had to be unmounted lazily: {said}");
                if is_mount_point(point.path()) {
                    let _ = write!(trouble, "could not be unmounted");
                    break;
                }
            } else {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            // A child that has ended stays until it is waited for.
            if self
                .child
                .as_mut()
                .is_some_and(|child| matches!(child.try_wait(), Ok(Some(_))))
            {
                self.child = None;
            }
            let left = processes_marked(&self.mark);
            if left.is_empty() {
                break;
            }
            if Instant::now() > deadline {
                let _ = write!(
                    trouble,
                    "left processes {left:?} behind, which did not end by themselves"
                );
                for pid in left {
                    let _ = write!(trouble, "; {pid}: {}", threads_of(pid));
                    let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
                }
                if let Some(child) = &mut self.child {
                    let _ = child.wait();
                }
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        if is_mount_point(point.path()) {
            // Never walk into a mount to clean up.
            let _ = point.keep();
        }
        if std::thread::panicking() {
            eprintln!("--- the mount said:\n{}{trouble}", self.said());
        } else {
            assert!(
                trouble.is_empty(),
                "{trouble}\n--- the mount said:\n{}",
                self.said()
            );
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.take_down();
    }
}

/// What the threads of a process wait for in the kernel: `fuser` in `fuse_dev_do_read` means that somebody still has the mount, in another mount
/// namespace say.
fn threads_of(pid: u32) -> String {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    let told = tasks.map(|task| {
        let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        format!("{} in {}", read("comm").trim(), read("wchan"))
    });
    told.collect::<Vec<_>>().join(", ")
}

/// Whether something is mounted exactly there.
pub fn is_mount_point(path: &Path) -> bool {
    let mounts = fs::read("/proc/self/mountinfo").expect("mountinfo");
    mounts
        .split(|byte| *byte == b'\n')
        .any(|line| line.split(|byte| *byte == b' ').nth(4) == Some(path.as_os_str().as_bytes()))
}

/// The processes of the program under test that carry a mark in their environment, ended ones excepted.
fn processes_marked(mark: &str) -> Vec<u32> {
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let is_tokenfs = fs::read_link(entry.path().join("exe")).is_ok_and(|exe| {
            exe.file_name()
                .is_some_and(|name| name.as_bytes().starts_with(b"tokenfs"))
        });
        let marked = || {
            fs::read(entry.path().join("environ"))
                .is_ok_and(|all| all.split(|byte| *byte == 0).any(|v| v == mark.as_bytes()))
        };
        if is_tokenfs && marked() {
            pids.push(pid);
        }
    }
    pids
}
