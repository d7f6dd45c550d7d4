//! What else lies about in a tokendir: it is not shown, not followed, not waited for, and takes nothing else along.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod mount_common;
mod support;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use mount_common::*;
use support::*;

/// In what is no object.
const SECRET: &str = "s3cr3t";

/// The token with the most objects.
fn big(softhsm: &Softhsm) -> String {
    let store = softhsm.read();
    store
        .into_iter()
        .max_by_key(|(_, token)| token.objects.len())
        .unwrap()
        .0
}

both_backends! {
    fn what_is_no_token_and_no_object_is_not_shown(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        let tree = expected(&softhsm);
        let outside = Softhsm::golden(Golden::V2_7_0, backend);
        let other = outside.token_directories().remove(0);
        let dir = &softhsm.tokendir;
        // Before there is anything that the independent reader would hang on.
        let token = dir.join(big(&softhsm));
        fs::write(dir.join("notes.txt"), SECRET).unwrap();
        fs::create_dir(dir.join("empty")).unwrap();
        fs::create_dir_all(dir.join("deep/token.object")).unwrap();
        symlink(&other, dir.join("linked-token")).unwrap();
        symlink("/nonexistent", dir.join("dangling")).unwrap();
        fs::create_dir(dir.join("linked-file")).unwrap();
        let file = if backend == Backend::File { "token.object" } else { "sqlite3.db" };
        symlink(other.join(file), dir.join("linked-file").join(file)).unwrap();
        let fifo = |path: &Path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        fifo(&dir.join("fifo"));
        fs::create_dir(dir.join("fifo-token")).unwrap();
        fifo(&dir.join("fifo-token").join(file));
        fs::create_dir_all(token.join("sub/directory")).unwrap();
        fs::create_dir(token.join("dir.object")).unwrap();
        fs::write(token.join("notes.txt"), SECRET).unwrap();
        fs::write(token.join(".object"), SECRET).unwrap();
        fifo(&token.join("fifo.object"));
        symlink("/etc/passwd", token.join("passwd.object")).unwrap();
        symlink(other.join(file), token.join("linked.object")).unwrap();
        let mount = Mount::new(&softhsm);
        let inside = token.file_name().unwrap();
        for name in ["fifo", "passwd", "linked", "dir", "sub", "notes.txt", ""] {
            let path = mount.join(inside).join(name).join("CKA_LABEL");
            let mut stat = tool("timeout");
            let said = run_to_fail(stat.arg("10").arg("stat").arg(&path).env("LC_ALL", "C"));
            assert!(said.contains("No such file"), "{name}: {said}");
        }
        run(tool("timeout").arg("20").arg("ls").arg("-lR").arg(mount.path()));
        assert_same(&tree, &seen(&mount));
    }

    fn both_kinds_of_tokens_are_shown_together(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        let [file, db] = BACKENDS.map(|backend| Softhsm::golden(Golden::V2_7_0, backend));
        for token in file.token_directories().iter().chain(&db.token_directories()) {
            run(tool("cp").arg("-a").arg(token).arg(&softhsm.tokendir));
        }
        let before = softhsm.snapshot();
        let tree = expected(&softhsm);
        let tokens = softhsm.token_directories().len();
        assert!(tokens > 8, "{tokens}");
        let mount = Mount::new(&softhsm);
        assert_same(&tree, &seen(&mount));
        before.assert_same(&softhsm.snapshot());
        mount.unmount();
        // A directory with both is what the configured backend says.
        let [file, db] = [&file, &db].map(big_directory);
        let both = softhsm.tokendir.join(file.file_name().unwrap());
        fs::copy(db.join("sqlite3.db"), both.join("sqlite3.db")).unwrap();
        let mount = Mount::new(&softhsm);
        let name = both.file_name().unwrap().to_str().unwrap();
        let token = match backend {
            Backend::File => support::independent::read_file_token(&both),
            Backend::Db => support::independent::read_db_token(&both),
        };
        let mut names: BTreeSet<_> = token.objects.keys().map(|id| object_name(backend, name, id).into()).collect();
        names.insert(PathBuf::from("token"));
        assert_eq!(entries(&mount.join(name)).unwrap(), names);
    }

    fn what_the_server_may_not_read_is_refused_alone(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        let tree = expected(&softhsm);
        give(softhsm.directory.path(), ALICE);
        let big = big(&softhsm);
        let closed = softhsm.token_directories().into_iter().find(|path| !path.ends_with(&big)).unwrap();
        let name = closed.file_name().unwrap().to_str().unwrap().to_owned();
        let owner = nix::unistd::Uid::from_raw(0);
        nix::unistd::chown(&closed, Some(owner), None).unwrap();
        set_mode(&closed, 0);
        let mount = MountOptions::new().user(ALICE).mount(&softhsm);
        let listed = text_of(as_user(ALICE, "ls").arg(mount.path()));
        assert_eq!(listed.lines().count(), 4);
        assert!(listed.contains(&name));
        let said = run_to_fail(as_user(ALICE, "ls").arg(mount.join(&name)).env("LC_ALL", "C"));
        assert!(said.contains("Permission denied"), "{said}");
        let said = run_to_fail(as_user(ALICE, "cat").arg(mount.join(&name).join("token/CKA_OS_TOKENLABEL")).env("LC_ALL", "C"));
        assert!(said.contains("Permission denied"), "{said}");
        let copy = temporary();
        give(copy.path(), ALICE);
        for token in listed.lines().filter(|token| *token != name) {
            run(as_user(ALICE, "cp").arg("-r").arg(mount.join(token)).arg(copy.path()));
        }
        for (path, content) in tree.iter().filter(|(path, _)| !path.starts_with(&name)) {
            let content_there = content.as_ref().map(|_| fs::read(copy.path().join(path)).unwrap());
            assert_eq!(&content_there, content, "{}", path.display());
        }
    }
}

fn big_directory(softhsm: &Softhsm) -> PathBuf {
    softhsm.tokendir.join(big(softhsm))
}
