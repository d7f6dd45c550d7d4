//! What is put in the place of something under a standing mount: an object, a database, a token, the tokendir. A restore does that.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use support::template::{Attribute, boolean, bytes, ulong};
use support::*;

/// What others do is there within this time, on a busy machine too.
const SOON: Duration = Duration::from_secs(1);

fn data(label: &str) -> Vec<Attribute> {
    vec![
        ulong(0, 0),
        boolean(1, true),
        boolean(2, false),
        bytes(3, label),
    ]
}

/// The labels of all objects of a token in a mount, as they are now.
fn labels(token: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(token) else {
        return Vec::new();
    };
    let mut labels: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.file_name() != "token")
        .filter_map(|entry| fs::read(entry.path().join("CKA_LABEL")).ok())
        .map(|label| String::from_utf8(label).unwrap())
        .collect();
    labels.sort();
    labels
}

/// A store with one object, a mount of it, and the token in the mount, with all that a kernel remembers of it.
fn fixture(backend: Backend) -> (Softhsm, Mount, PathBuf) {
    let (softhsm, mut client) = Softhsm::with_token(backend);
    client.create(&data("before")).unwrap();
    drop(client);
    let mount = Mount::new(&softhsm);
    let token = mount.join(softhsm.token_directory().file_name().unwrap());
    assert_eq!(labels(&token), ["before"]);
    (softhsm, mount, token)
}

/// A copy of the tokendir as it was, after which the store has one object more.
fn grown(softhsm: &Softhsm, token: &Path) -> PathBuf {
    let saved = softhsm.tokendir.with_extension("saved");
    run(tool("cp").arg("-a").arg(&softhsm.tokendir).arg(&saved));
    let mut client = softhsm.p11();
    client.open("test", Some("1234")).unwrap();
    client.create(&data("grown")).unwrap();
    drop(client);
    eventually(SOON, "the object that was made", || {
        labels(token) == ["before", "grown"]
    });
    saved
}

both_backends! {
    fn what_comes_by_rename_is_seen(backend) {
        let (softhsm, _mount, token) = fixture(backend);
        let saved = grown(&softhsm, &token);
        let stored = softhsm.token_directory();
        let saved = saved.join(stored.file_name().unwrap());
        match backend {
            Backend::Db => fs::rename(saved.join("sqlite3.db"), stored.join("sqlite3.db")).unwrap(),
            Backend::File => {
                // The object that there is gets the content of the one that was there.
                for name in walk(&stored).into_iter().filter(|path| path.extension().is_some_and(|e| e == "object")) {
                    let old = saved.join(name.file_name().unwrap());
                    if old.exists() {
                        fs::rename(&old, &name).unwrap();
                    } else {
                        fs::remove_file(&name).unwrap();
                    }
                }
            }
        }
        eventually(SOON, "what was restored", || labels(&token) == ["before"]);
    }

    fn a_token_that_comes_by_rename_is_seen(backend) {
        let (softhsm, mount, token) = fixture(backend);
        let saved = grown(&softhsm, &token);
        let stored = softhsm.token_directory();
        let away = softhsm.tokendir.with_extension("away");
        fs::rename(&stored, &away).unwrap();
        eventually(SOON, "that the token is gone", || !token.exists() && fs::read_dir(mount.path()).unwrap().count() == 0);
        fs::rename(saved.join(stored.file_name().unwrap()), &stored).unwrap();
        eventually(SOON, "the token that was restored", || labels(&token) == ["before"]);
        // And it is watched like any other.
        let mut client = softhsm.p11();
        client.open("test", Some("1234")).unwrap();
        client.create(&data("after")).unwrap();
        eventually(SOON, "what is made in it", || labels(&token) == ["after", "before"]);
    }

    /// The mount has the old directory open, and SoftHSM sees the new one: nothing may be shown that is half of each.
    fn a_tokendir_in_place_of_another_is_said(backend) {
        let (softhsm, mount, token) = fixture(backend);
        let saved = grown(&softhsm, &token);
        let mut objects = fs::read_dir(&token).unwrap().map(|entry| entry.unwrap().path());
        let object = objects.find(|path| !path.ends_with("token")).unwrap();
        fs::rename(&softhsm.tokendir, softhsm.tokendir.with_extension("away")).unwrap();
        fs::rename(&saved, &softhsm.tokendir).unwrap();
        let refused = |directory: &Path| {
            matches!(fs::read_dir(directory), Err(error) if error.raw_os_error() == Some(nix::libc::EIO))
        };
        eventually(SOON, "an error", || refused(mount.path()));
        // Not the old store by paths that were asked for before, and not the new one.
        eventually(SOON, "an error below", || refused(&token));
        let object = object.join("CKA_LABEL");
        eventually(SOON, "an error in a file", || {
            matches!(fs::read(&object), Err(error) if error.raw_os_error() == Some(nix::libc::EIO))
        });
        let log = fs::read_to_string(mount.join(".tokenfs/log")).unwrap();
        assert!(log.contains("was moved, removed or replaced; unmount, and mount it again"), "{log}");
    }
}
