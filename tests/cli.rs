//! The command line from outside: each message, each exit code, and mounts that come and go.
//!
//! What they need and do not find is a failure that says so; `scripts/test` sees to it. Processes are ended by their id only.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getuid};
use tempfile::TempDir;

/// A directory with a tokendir and a mount point, unmounted at the end.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("tokens")).unwrap();
        fs::create_dir(dir.path().join("m")).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().canonicalize().unwrap().join(name)
    }

    /// `tokenfs`, here, with nothing of the user's own configuration.
    fn tokenfs(&self, args: &[&str]) -> Command {
        self.command(Path::new(env!("CARGO_BIN_EXE_tokenfs")), args)
    }

    fn command(&self, binary: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(binary);
        command
            .args(args)
            .current_dir(self.path("."))
            .env("HOME", self.path("."))
            .env("SOFTHSM2_CONF", self.path("softhsm2.conf"))
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
        command
    }

    fn config(&self, text: &str) {
        fs::write(self.path("softhsm2.conf"), text).unwrap();
    }

    /// Runs it, and checks the exit code and what stderr has on its last line.
    #[track_caller]
    fn says(&self, args: &[&str], code: i32, says: &str) {
        check(&self.tokenfs(args).output().unwrap(), code, says);
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) {
        let output = self.tokenfs(args).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        assert_eq!(output.status.code(), Some(0));
    }

    /// The line of the kernel about a mount point.
    fn mounted(&self, name: &str) -> Option<String> {
        let point = format!(" {} ", self.path(name).display()).replace("a b", "a\\040b");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts
            .lines()
            .find(|line| line.contains(&point))
            .map(str::to_owned)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for name in ["m", "a b", "tokens"] {
            if self.mounted(name).is_some() {
                let _ = Command::new("umount")
                    .arg("-l")
                    .arg(self.path(name))
                    .status();
            }
        }
    }
}

#[track_caller]
fn check(output: &Output, code: i32, says: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains(says), "{stderr:?} does not say {says:?}");
    assert_eq!(output.status.code(), Some(code), "{stderr}");
}

/// Every test that mounts needs this.
#[track_caller]
fn need_to_mount() {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
    assert!(
        getuid().is_root() && device.is_ok(),
        "this test mounts: run scripts/test as root, on a machine with /dev/fuse"
    );
}

#[track_caller]
fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is() {
        assert!(Instant::now() < deadline, "still not: {what}");
        sleep(Duration::from_millis(5));
    }
}

#[test]
fn help_and_version_are_no_failures() {
    let place = Place::new();
    for args in [
        &["--help"][..],
        &["--version"],
        &["mount", "--help"],
        &["umount", "-h"],
        &["tree", "--help"],
    ] {
        let output = place.tokenfs(args).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(!output.stdout.is_empty() && output.stderr.is_empty());
    }
    let help = place.tokenfs(&["--help"]).output().unwrap().stdout;
    let help = String::from_utf8(help).unwrap();
    for word in ["Examples:", "Exit codes:", "$SOFTHSM2_CONF"] {
        assert!(help.contains(word), "{word}");
    }
}

#[test]
fn a_wrong_command_line_is_2() {
    let place = Place::new();
    place.says(&[], 2, "Usage:");
    place.says(&["frobnicate"], 2, "frobnicate");
    place.says(&["mount"], 2, "MOUNTPOINT");
    place.says(
        &["mount", "--backend", "sqlite", "m"],
        2,
        "unknown backend \"sqlite\"",
    );
    place.says(&["mount", "--umask", "9", "m"], 2, "not an octal number");
    place.says(
        &["mount", "-o", "ro,wrong", "m"],
        2,
        "unknown option \"wrong\"",
    );
    place.says(
        &["mount", "-o", "umask=9", "m"],
        2,
        "-o umask: \"9\" is not an octal number",
    );
}

#[test]
fn a_bad_configuration_is_named() {
    let place = Place::new();
    let conf = place.path("softhsm2.conf").display().to_string();
    place.says(
        &["mount", "m"],
        1,
        &format!("tokenfs: {conf}: no such configuration file ($SOFTHSM2_CONF names it)"),
    );
    place.says(
        &["mount", "--config", "gone", "m"],
        1,
        "tokenfs: gone: no such configuration file;",
    );
    place.config("\nobjectstore.backend = sqlite\n");
    place.says(
        &["mount", "m"],
        1,
        &format!("{conf}: line 2: objectstore.backend: unknown backend \"sqlite\""),
    );
    // Naming the store on the command line does not make a bad file good.
    place.says(
        &["mount", "--tokendir", "tokens", "m"],
        1,
        "line 2: objectstore.backend",
    );
    place.config("objectstore.umask = 0x7\n");
    place.says(
        &["mount", "m"],
        1,
        "line 1: objectstore.umask: \"0x7\" is not an octal number",
    );
    place.config("nonsense\ndirectories.tokendir = gone\n");
    place.says(
        &["mount", "m"],
        1,
        &format!("tokenfs: warning: {conf}:1: not of the form"),
    );
}

#[test]
fn the_directory_of_one_token_is_no_store() {
    let place = Place::new();
    fs::write(place.path("tokens/token.object"), [0; 8]).unwrap();
    let output = place
        .tokenfs(&["tree", "--tokendir", "tokens"])
        .output()
        .unwrap();
    check(&output, 0, "this is the directory of one token");
}

#[test]
fn a_bad_tokendir_is_named() {
    let place = Place::new();
    place.config("directories.tokendir = gone\n");
    place.says(
        &["mount", "m"],
        1,
        "tokenfs: gone: there is no such token directory",
    );
    place.says(
        &["mount", "--tokendir", "softhsm2.conf", "m"],
        1,
        "is not a directory",
    );
    place.config("");
    fs::set_permissions(place.path("tokens"), fs::Permissions::from_mode(0o700)).unwrap();
    check(
        &as_nobody(&place, &["mount", "--tokendir", "tokens", "m"])
            .output()
            .unwrap(),
        1,
        "tokens: no permission to read the token directory",
    );
}

/// The command as an ordinary user; the place is opened for him, and a copy of the binary is put where he can reach it.
fn as_nobody(place: &Place, args: &[&str]) -> Command {
    assert!(
        getuid().is_root(),
        "only root can become somebody else: run scripts/test as root"
    );
    let binary = place.path("tokenfs");
    if !binary.exists() {
        // By another process: a descriptor of ours that is open for writing would go on into whatever another thread starts
        // meanwhile, and the copy could not be executed for as long as that has not (ETXTBSY).
        let copied = Command::new("cp")
            .arg(env!("CARGO_BIN_EXE_tokenfs"))
            .arg(&binary)
            .status();
        assert!(copied.unwrap().success());
    }
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(place.path("."), fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = place.command(&binary, args);
    command.uid(65534).gid(65534);
    command
}

#[test]
fn a_bad_mount_point_is_named() {
    let place = Place::new();
    place.config("directories.tokendir = tokens\n");
    fs::create_dir(place.path("tokens/inside")).unwrap();
    place.says(
        &["mount", "gone"],
        1,
        "tokenfs: gone: there is no such mount point; make it with mkdir",
    );
    place.says(
        &["mount", "softhsm2.conf"],
        1,
        "the mount point is not a directory",
    );
    place.says(
        &["mount", "tokens"],
        1,
        "the mount point is the token directory",
    );
    place.says(
        &["mount", "tokens/inside"],
        1,
        "lies inside the token directory",
    );
    place.says(&["mount", "."], 1, "contains the token directory");
    place.says(
        &["mount", "/proc"],
        1,
        "something else (proc) is mounted there already",
    );
    place.says(&["mount", "-f", "gone"], 1, "there is no such mount point");
}

#[test]
fn only_mounts_of_tokenfs_are_unmounted() {
    let place = Place::new();
    place.says(&["umount", "m"], 1, "tokenfs: m: nothing is mounted there");
    place.says(
        &["umount", "gone"],
        1,
        "gone: cannot find the mount point: No such file",
    );
    place.says(
        &["umount", "/proc"],
        1,
        "not a mount of tokenfs (proc instead of fuse.tokenfs)",
    );
}

#[test]
fn the_helper_of_mount_has_exit_codes_of_its_own() {
    let place = Place::new();
    let helper = place.path("mount.tokenfs");
    symlink(env!("CARGO_BIN_EXE_tokenfs"), &helper).unwrap();
    let run = |args: &[&str]| {
        let mut command = Command::new(&helper);
        command.args(args).current_dir(place.path("."));
        command.env("SOFTHSM2_CONF", place.path("softhsm2.conf"));
        command.output().unwrap()
    };
    check(&run(&[]), 1, "Usage: mount.tokenfs");
    check(
        &run(&["tokens", "m", "-o", "wrong"]),
        1,
        "mount.tokenfs: unknown option \"wrong\"",
    );
    check(&run(&["tokens", "m", "-N", "x"]), 1, "-N is not supported");
    check(
        &run(&["gone", "m"]),
        32,
        "mount.tokenfs: gone: the source does not exist",
    );
    check(&run(&["none", "m"]), 32, "no such configuration file");
    check(
        &run(&["tokens", "gone"]),
        32,
        "there is no such mount point",
    );
    check(
        &run(&["tokens", "m", "-f", "-s", "-n", "-o", "wrong"]),
        0,
        "",
    );
    place.config("directories.tokendir = tokens\n");
    check(&run(&["softhsm2.conf", "m", "-f"]), 0, "");
    check(&run(&["none", "m", "-f"]), 0, "");
    assert_eq!(place.mounted("m"), None);
    {
        need_to_mount();
        check(&run(&["tokens", "m", "-o", "rw,allow_other"]), 0, "");
        let line = place.mounted("m").unwrap();
        assert!(line.contains(" - fuse.tokenfs tokens rw,"), "{line}");
        place.ok(&["umount", "m"]);
        check(&run(&["tokens", "m", "-o", "ro,allow_other"]), 0, "");
        let line = place.mounted("m").unwrap();
        assert!(line.contains(" - fuse.tokenfs tokens ro,"), "{line}");
        place.ok(&["umount", "m"]);
    }
}

#[test]
fn a_mount_in_the_background_lasts_until_it_is_unmounted() {
    need_to_mount();
    let place = Place::new();
    place.config("directories.tokendir = tokens\n");
    // output() returns when stdout and stderr are closed: the server must not hold them.
    place.ok(&["mount", "-o", "ro,noexec", "m"]);
    let line = place.mounted("m").unwrap();
    let source = format!(" - fuse.tokenfs {} ro,", place.path("tokens").display());
    assert!(
        line.contains(&source) && line.contains("ro,nosuid,nodev,noexec"),
        "{line}"
    );
    assert!(fs::metadata(place.path("m")).unwrap().is_dir());
    let refused = fs::write(place.path("m/x"), "").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(nix::libc::EROFS));
    place.says(&["mount", "m"], 1, "tokenfs is mounted there already");

    let user = fs::File::open(place.path("m")).unwrap();
    place.says(
        &["umount", "m"],
        1,
        "m: in use, so not unmounted; \"fuser -vm ",
    );
    drop(user);
    symlink("m", place.path("link")).unwrap();
    place.ok(&["umount", "./link/"]);
    assert_eq!(place.mounted("m"), None);
}

#[test]
fn a_mount_point_can_have_blanks() {
    need_to_mount();
    let place = Place::new();
    fs::create_dir(place.path("a b")).unwrap();
    place.config("directories.tokendir = tokens\n");
    place.ok(&["mount", "a b"]);
    assert!(place.mounted("a b").is_some());
    place.ok(&["umount", "a b"]);
    assert_eq!(place.mounted("a b"), None);
}

#[test]
fn when_umount_returns_the_store_is_in_use_no_more() {
    need_to_mount();
    let place = Place::new();
    place.config("directories.tokendir = tokens\n");
    let root = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        let output = command.args(args).current_dir(place.path("."));
        check(&output.output().unwrap(), 0, "");
    };
    for _ in 0..20 {
        root("mount", &["-t", "tmpfs", "tokenfs-test", "tokens"]);
        fs::create_dir(place.path("tokens/t")).unwrap();
        fs::write(place.path("tokens/t/token.object"), [0; 8]).unwrap();
        place.ok(&["mount", "m"]);
        let server = fs::read_to_string(place.path("m/.tokenfs/server")).unwrap();
        let process = format!("/proc/{}", server.split(' ').next().unwrap());
        assert_eq!(
            fs::read_to_string(format!("{process}/comm")).unwrap(),
            "tokenfs\n"
        );
        // Pending, and written by the end.
        let object = place.path("m/t/b7e9f2a1-aaaa-bbbb-cccc-111111111111");
        fs::create_dir(&object).unwrap();
        fs::write(object.join("CKA_PRIVATE"), "false").unwrap();
        place.ok(&["umount", "m"]);
        // Whoever is to wait for it may not have done so yet.
        assert!(fs::read_link(format!("{process}/exe")).is_err());
        assert_eq!(fs::read_dir(place.path("tokens/t")).unwrap().count(), 4);
        root("umount", &["tokens"]);
    }
}

#[test]
fn umount_does_not_wait_for_a_server_that_is_stopped() {
    need_to_mount();
    let place = Place::new();
    place.config("directories.tokendir = tokens\n");
    place.ok(&["mount", "m"]);
    let server = fs::read_to_string(place.path("m/.tokenfs/server")).unwrap();
    let server = Pid::from_raw(server.split(' ').next().unwrap().parse().unwrap());
    kill(server, Signal::SIGSTOP).unwrap();
    place.says(
        &["umount", "m"],
        1,
        "its server does not answer: it is stopped",
    );
    kill(server, Signal::SIGCONT).unwrap();
    assert!(place.mounted("m").is_some());
    place.ok(&["umount", "m"]);
}

#[test]
fn a_signal_unmounts() {
    need_to_mount();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let place = Place::new();
        place.config("directories.tokendir = tokens\n");
        let mut server = place.tokenfs(&["mount", "-f", "m"]).spawn().unwrap();
        eventually("mounted", || place.mounted("m").is_some());
        kill(Pid::from_raw(server.id() as i32), signal).unwrap();
        assert_eq!(server.wait().unwrap().code(), Some(0), "{signal}");
        assert_eq!(place.mounted("m"), None, "{signal}");
    }
}

#[test]
fn a_signal_takes_a_mount_in_use_out_of_sight_and_a_second_one_ends_it() {
    need_to_mount();
    let place = Place::new();
    place.config("directories.tokendir = tokens\n");
    let mut server = place
        .tokenfs(&["mount", "-f", "m"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = Pid::from_raw(server.id() as i32);
    eventually("mounted", || place.mounted("m").is_some());
    let user = fs::File::open(place.path("m")).unwrap();
    kill(pid, Signal::SIGTERM).unwrap();
    eventually("unmounted", || place.mounted("m").is_none());
    // Whoever uses it is still served.
    assert!(server.try_wait().unwrap().is_none());
    assert!(user.metadata().unwrap().is_dir());
    kill(pid, Signal::SIGTERM).unwrap();
    eventually("ended", || server.try_wait().unwrap().is_some());
    drop(user);
    let output = server.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("the mount is in use"), "{stderr}");
}

#[test]
fn a_mount_whose_server_was_killed_can_be_unmounted() {
    need_to_mount();
    let place = Place::new();
    place.config("directories.tokendir = tokens\n");
    let mut server = place.tokenfs(&["mount", "-f", "m"]).spawn().unwrap();
    eventually("mounted", || place.mounted("m").is_some());
    server.kill().unwrap();
    server.wait().unwrap();
    let dead = fs::metadata(place.path("m")).unwrap_err();
    assert_eq!(dead.raw_os_error(), Some(nix::libc::ENOTCONN));
    place.says(&["mount", "m"], 1, "\"tokenfs umount\"");
    place.ok(&["umount", "m/"]);
    assert_eq!(place.mounted("m"), None);
}

#[test]
fn auto_unmount_cleans_up_behind_a_server_that_was_killed() {
    need_to_mount();
    let place = Place::new();
    place.config("directories.tokendir = tokens\n");
    let mut server = place
        .tokenfs(&["mount", "-f", "-o", "auto_unmount", "m"])
        .spawn()
        .unwrap();
    // The watcher comes right after the mount.
    let children = format!("/proc/{0}/task/{0}/children", server.id());
    eventually("watched", || {
        fs::read_to_string(&children).is_ok_and(|pids| !pids.is_empty())
    });
    server.kill().unwrap();
    server.wait().unwrap();
    eventually("unmounted", || place.mounted("m").is_none());
}

#[test]
fn an_ordinary_user_mounts_through_fusermount() {
    let place = Place::new();
    need_to_mount();
    let shared = fs::metadata("/dev/fuse").is_ok_and(|m| m.permissions().mode() & 0o006 == 0o006);
    assert!(
        shared,
        "an ordinary user needs /dev/fuse with mode 0666, which scripts/test gives it"
    );
    assert!(
        Command::new("fusermount3").arg("-V").output().is_ok(),
        "fusermount3 is needed: install the package fuse3"
    );
    place.config("directories.tokendir = tokens\n");
    let mut mount = as_nobody(&place, &["mount", "m"]);
    check(
        &mount.output().unwrap(),
        1,
        "m: an ordinary user can mount only on a directory that they own",
    );
    std::os::unix::fs::chown(place.path("m"), Some(65534), Some(65534)).unwrap();
    check(&mount.output().unwrap(), 0, "");
    let line = place.mounted("m").unwrap();
    assert!(
        line.contains(" - fuse.tokenfs ") && line.contains("user_id=65534"),
        "{line}"
    );
    let mut umount = as_nobody(&place, &["umount", "m"]);
    check(&umount.output().unwrap(), 0, "");
    assert_eq!(place.mounted("m"), None);
}
