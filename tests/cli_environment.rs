//! The command line where something of the machine is missing, or stands in the way: each in a mount namespace of its own
//! (unshare(1)), so that the machine itself stays as it is.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::process::{Command, Output};

/// An ordinary user who is in every passwd file: `nobody`.
const NOBODY: &str = "setpriv --reuid 65534 --regid 65534 --clear-groups";

struct Place(tempfile::TempDir);

impl Place {
    /// A directory with a copy of the binary that everybody can reach, an empty store and a mount point, both of `nobody`.
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::set_permissions(place.path(""), fs::Permissions::from_mode(0o755)).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_tokenfs"), place.path("tokenfs")).unwrap();
        for name in ["tokens", "m"] {
            fs::create_dir(place.path(name)).unwrap();
            chown(place.path(name), Some(65534), Some(65534)).unwrap();
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs lines of shell in the directory, and in a mount namespace of their own.
    fn apart(&self, script: &str) -> Output {
        assert!(
            nix::unistd::getuid().is_root(),
            "a mount namespace takes root: run scripts/test as root"
        );
        Command::new("unshare")
            .args(["--mount", "sh", "-eu", "-c", script])
            .current_dir(self.path(""))
            .env("SOFTHSM2_CONF", "/nonexistent/softhsm2.conf")
            .output()
            .expect("unshare is needed: install the package util-linux")
    }
}

#[track_caller]
fn fails(output: &Output, says: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains(says), "{stderr:?} does not say {says:?}");
    assert_eq!(output.status.code(), Some(1), "{stderr}");
}

#[test]
fn no_fuse_device_is_said() {
    let place = Place::new();
    let output = place.apart(
        "mount -t tmpfs none /dev; mknod /dev/null c 1 3; ./tokenfs mount --tokendir tokens m",
    );
    fails(
        &output,
        "/dev/fuse: there is no FUSE here; load it (as root: modprobe fuse)",
    );
}

#[test]
fn no_fusermount_is_said_to_an_ordinary_user() {
    let place = Place::new();
    let output = place.apart(&format!(
        "mount --bind /dev/null \"$(readlink -f \"$(command -v fusermount3)\")\"
         {NOBODY} ./tokenfs mount --tokendir tokens m"
    ));
    fails(
        &output,
        "needs fusermount3 to mount; install the package fuse3",
    );
}

#[test]
fn allow_other_is_for_fuse_conf_to_permit() {
    let place = Place::new();
    fs::write(place.path("permits"), "user_allow_other\n").unwrap();
    fs::write(place.path("forbids"), "# nothing\n").unwrap();
    let mount = |conf: &str, rest: &str| {
        place.apart(&format!(
            "touch fuse.conf; mount --bind {conf} /etc/fuse.conf
             {NOBODY} ./tokenfs mount --tokendir tokens -o allow_other m{rest}"
        ))
    };
    fails(
        &mount("forbids", ""),
        "let root put the line \"user_allow_other\" into /etc/fuse.conf",
    );
    let output = mount(
        "permits",
        "; grep -F \"$PWD/m \" /proc/self/mountinfo | grep -c allow_other; ./tokenfs umount m",
    );
    assert!(output.status.success(), "{output:?}");
    assert_eq!(output.stdout, b"1\n");
}

#[test]
fn allow_root_makes_no_promise_that_it_cannot_keep() {
    let place = Place::new();
    let output = place.apart(&format!(
        "{NOBODY} ./tokenfs mount --tokendir tokens -o allow_root m"
    ));
    fails(&output, "allow_root would not keep other users out");
}

/// With `mount.tokenfs` where mount(8) looks for it, which here is a directory laid over `/usr/sbin`.
#[test]
fn mount_and_fstab_know_the_type() {
    let place = Place::new();
    fs::create_dir(place.path("sbin")).unwrap();
    std::os::unix::fs::symlink(place.path("tokenfs"), place.path("sbin/mount.tokenfs")).unwrap();
    let fstab = format!(
        "{} {} tokenfs rw,allow_other,noatime 0 0\n",
        place.path("tokens").display(),
        place.path("m").display()
    );
    fs::write(place.path("fstab"), fstab).unwrap();
    let output = place.apart(
        "mount -t overlay none -o \"lowerdir=$PWD/sbin:/usr/sbin\" /usr/sbin
         mount -t tokenfs -o ro \"$PWD/tokens\" \"$PWD/m\"
         grep -F \"$PWD/m \" /proc/self/mountinfo | grep -o ' - fuse.tokenfs'
         ls m; umount m
         mount -a -T fstab
         grep -F \"$PWD/m \" /proc/self/mountinfo | grep -c allow_other
         umount m; ! grep -F \"$PWD/m \" /proc/self/mountinfo",
    );
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        " - fuse.tokenfs\n1\n"
    );
}

/// As in most containers.
#[test]
fn a_second_signal_where_no_connection_can_be_ended_writes_what_is_pending() {
    let place = Place::new();
    let output = place.apart(
        "mount -t tmpfs none /sys/fs/fuse/connections
         ./tokenfs mount -f --tokendir tokens m 2>said & server=$!
         until mountpoint -q m; do sleep .01; done
         python3 - $server <<'END'
import os, signal, sys, time
server = int(sys.argv[1])
os.makedirs('m/x/token')
for name, text in [('FLAGS', '0'), ('LABEL', 'x' * 32), ('SERIAL', '0' * 13 + 'abc')]:
    with open('m/x/token/CKA_OS_TOKEN' + name, 'w') as file:
        file.write(text)
user = os.open('m', os.O_RDONLY)
os.kill(server, signal.SIGTERM)
while os.path.ismount('m'):
    time.sleep(.01)
time.sleep(.2)
os.kill(server, signal.SIGTERM)
def is_alive():
    try:
        return open(f'/proc/{server}/stat').read().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError:
        return False
while is_alive():
    time.sleep(.01)
END
         wait $server || cat said >&2
         ls tokens/x",
    );
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("ending at once"), "{said}");
    let listed = String::from_utf8_lossy(&output.stdout);
    assert!(
        listed.lines().any(|name| name == "token.object"),
        "{listed}"
    );
}
