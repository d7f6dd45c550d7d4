//! `.tokenfs/file`: the store as SoftHSM's `file` backend has it, from either backend. A copy of it is a store, and it can be one by
//! itself, for whoever only reads.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod layout_common;
mod mount_common;
mod support;
mod write_common;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use layout_common::*;
use mount_common::entries;
use support::independent;
use support::template::{boolean, bytes, ulong};
use support::*;
use write_common::*;

/// A SoftHSM of the `file` backend whose tokendir is what the mount shows.
fn direct(mount: &Mount) -> Softhsm {
    let mut softhsm = Softhsm::new(Backend::File);
    softhsm.tokendir = layout(mount);
    softhsm.configure("");
    softhsm
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

/// A file in the layout, of the only token.
fn of(bench: &Bench, name: impl AsRef<Path>) -> PathBuf {
    layout(&bench.mount).join(&bench.token).join(name)
}

both_backends! {
    fn a_copy_is_a_store_of_the_file_backend(backend) {
        let mut bench = Bench::new(backend);
        let copy = copied(&bench.mount);
        assert_eq!(content(&copy.read()), content(&bench.softhsm.read()));
        for object in [&bench.data, &bench.public, &bench.private] {
            assert!(copy.token_directory().join(format!("{object}.lock")).exists());
        }
        let mut client = assert_works(&mut bench, &copy);
        // It is a store like any other: it can be written.
        let data = client.find_label("data").unwrap()[0];
        client.set_label(data, "changed").unwrap();
        client.destroy(data).unwrap();
        client.create(&[ulong(0, 0), boolean(1, true), boolean(2, false), bytes(3, "new")]).unwrap();
        let mut fresh = copy.p11();
        fresh.open("test", Some(PIN)).unwrap();
        assert_eq!(fresh.find_label("new").unwrap().len(), 1);
        assert!(fresh.find_label("changed").unwrap().is_empty());
        run(tokenfs().arg("check").arg("--config").arg(&copy.conf));
        // What was done to the copy was not done to the store.
        assert_eq!(bench.client.find_label("data").unwrap().len(), 1);
    }

    fn every_kind_of_attribute_is_copied(backend) {
        for golden in GOLDEN {
            let softhsm = Softhsm::golden(golden, backend);
            let before = softhsm.snapshot();
            let mount = Mount::new(&softhsm);
            let copy = copied(&mount);
            assert_eq!(content(&copy.read()), content(&softhsm.read()));
            // The same bytes each time, from another mount too.
            mount.unmount();
            let again = copied(&Mount::new(&softhsm));
            copy.snapshot().assert_same(&again.snapshot());
            before.assert_same(&softhsm.snapshot());
            assert_opens(&copy);
        }
    }

    fn softhsm_works_on_it_as_it_stands(backend) {
        let mut bench = Bench::new(backend);
        let before = bench.softhsm.snapshot();
        let direct = direct(&bench.mount);
        let mut client = direct.p11();
        let refused = client.open("test", Some("wrong")).unwrap_err();
        assert_eq!(refused.0, "CKR_PIN_INCORRECT");
        let mut client = assert_works(&mut bench, &direct);
        // It cannot write: not even what a login does.
        let data = client.find_label("data").unwrap()[0];
        client.set_label(data, "changed").unwrap_err();
        client.create(&[ulong(0, 0), boolean(1, true), boolean(2, false), bytes(3, "new")]).unwrap_err();
        before.assert_same(&bench.softhsm.snapshot());
        assert!(bench.log().contains("token.object: everything in .tokenfs"), "{}", bench.log());
        // What changes in the store does not keep one that is logged in from its keys.
        let count = of(&bench, "generation");
        let counted = fs::read(&count).unwrap();
        bench.client.set_label(bench.handles.0, "relabelled").unwrap();
        bench.client.create(&[ulong(0, 0), boolean(1, true), boolean(2, false), bytes(3, "new")]).unwrap();
        eventually(SOON, "the new generation", || fs::read(&count).unwrap() != counted);
        let private = client.find(&[ulong(0, 3)]).unwrap()[0].handle;
        let signature = client.sign(private, CKM_ECDSA, &[9; 32]).unwrap();
        assert_eq!(bench.client.verify(bench.handles.1, CKM_ECDSA, &[9; 32], &signature), Ok(true));
        // The next one sees it.
        client.reinitialize().unwrap();
        client.open("test", Some(PIN)).unwrap();
        for label in ["relabelled", "new"] {
            assert_eq!(client.find_label(label).unwrap().len(), 1);
        }
    }

    fn a_session_on_it_sees_changes(backend) {
        let mut bench = Bench::new(backend);
        let direct = direct(&bench.mount);
        let mut client = direct.p11();
        client.open("test", None).unwrap();
        let data = client.find_label("data").unwrap()[0];
        bench.client.set_label(bench.handles.0, "relabelled").unwrap();
        eventually(SOON, "the new label", || client.label(data) == Ok(Some(b"relabelled".to_vec())));
        let more = [ulong(0, 0), boolean(1, true), boolean(2, false), bytes(3, "more")];
        let more = bench.client.create(&more).unwrap();
        eventually(SOON, "the new object", || client.find_label("more").unwrap().len() == 1);
        bench.client.destroy(more).unwrap();
        eventually(SOON, "the end of it", || client.find_label("more").unwrap().is_empty());
    }

    fn changes_of_the_store_show_up(backend) {
        let mut bench = Bench::new(backend);
        let file = of(&bench, format!("{}.object", bench.data));
        let parsed = || independent::parse_object(&fs::read(&file).unwrap()).unwrap();
        let (generation, before) = parsed();
        let (size, time) = (fs::metadata(&file).unwrap().len(), fs::metadata(&file).unwrap().mtime_nsec());
        assert_eq!(independent::get_bytes(&before, 3), Some(&b"data"[..]));
        bench.client.set_label(bench.handles.0, "a longer label").unwrap();
        eventually(SOON, "the size of the new label", || fs::metadata(&file).unwrap().len() == size + 10);
        assert_ne!(fs::metadata(&file).unwrap().mtime_nsec(), time);
        let (later, after) = parsed();
        assert_eq!(independent::get_bytes(&after, 3), Some(&b"a longer label"[..]));
        // By this SoftHSM knows that it has to read it again.
        assert_ne!(generation, later);

        let count = of(&bench, "generation");
        let (counted, listed) = (fs::read(&count).unwrap(), entries(&of(&bench, "")).unwrap());
        let mtime = |path: &Path| fs::metadata(path).unwrap().mtime_nsec();
        let time = mtime(&count);
        bench.client.destroy(bench.handles.0).unwrap();
        eventually(SOON, "the end of the object", || fs::metadata(&file).is_err());
        eventually(SOON, "the time of the generation", || mtime(&count) != time);
        assert_ne!(fs::read(&count).unwrap(), counted);
        let gone = [format!("{}.lock", bench.data), format!("{}.object", bench.data)];
        let left = listed.into_iter().filter(|path| !gone.iter().any(|name| path == Path::new(name)));
        assert_eq!(entries(&of(&bench, "")).unwrap(), left.collect());
    }

    fn what_is_open_stays_what_it_was(backend) {
        let mut bench = Bench::new(backend);
        let path = of(&bench, format!("{}.object", bench.data));
        let file = fs::File::open(&path).unwrap();
        let old = fs::read(&path).unwrap();
        bench.client.set_label(bench.handles.0, "another label").unwrap();
        eventually(SOON, "the new version", || fs::read(&path).unwrap() != old);
        let mut read = vec![0; old.len() + 1];
        assert_eq!(file.read_at(&mut read, 0).unwrap(), old.len());
        assert_eq!(read[..old.len()], old);
    }

    fn what_is_not_in_the_store_yet_is_not_there(backend) {
        let bench = Bench::new(backend);
        let before = entries(&of(&bench, "")).unwrap();
        let counted = fs::read(of(&bench, "generation")).unwrap();
        let pending = "33333333-3333-3333-3333-333333333333";
        bench.quiet(&format!("mkdir {pending}; echo CKO_DATA >{pending}/CKA_CLASS"));
        assert!(bench.at(pending).join("CKA_CLASS").exists());
        assert_eq!(entries(&of(&bench, "")).unwrap(), before);
        assert_eq!(errno(fs::metadata(of(&bench, format!("{pending}.object")))), nix::libc::ENOENT);
        fs::create_dir(bench.mount.join("new-token")).unwrap();
        assert_eq!(entries(&layout(&bench.mount)).unwrap(), [PathBuf::from(&bench.token)].into());
        assert_eq!(errno(fs::metadata(layout(&bench.mount).join("new-token"))), nix::libc::ENOENT);
        bench.quiet(&format!("echo false >{pending}/CKA_PRIVATE"));
        eventually(SOON, "the object", || of(&bench, format!("{pending}.object")).exists());
        assert_ne!(fs::read(of(&bench, "generation")).unwrap(), counted);
    }

    fn nothing_in_it_can_be_written(backend) {
        let bench = Bench::new(backend);
        let before = bench.softhsm.snapshot();
        let erofs = nix::libc::EROFS;
        let object = of(&bench, format!("{}.object", bench.data));
        for path in [object.clone(), of(&bench, "generation"), of(&bench, "token.lock")] {
            let open = |options: &mut fs::OpenOptions| errno(options.open(&path));
            assert_eq!(open(fs::OpenOptions::new().write(true)), erofs);
            assert_eq!(open(fs::OpenOptions::new().read(true).write(true).create(true)), erofs);
            assert_eq!(open(fs::OpenOptions::new().write(true).truncate(true)), erofs);
            assert_eq!(open(fs::OpenOptions::new().append(true)), erofs);
            assert_eq!(errno(fs::remove_file(&path)), erofs);
            assert_eq!(errno(fs::rename(&path, of(&bench, "x.object"))), erofs);
            assert_eq!(errno(fs::set_permissions(&path, fs::metadata(&path).unwrap().permissions())), erofs);
        }
        for path in [of(&bench, "new.object"), of(&bench, "scratch"), layout(&bench.mount).join("x")] {
            assert_eq!(errno(fs::File::create(&path)), erofs);
            assert_eq!(errno(fs::create_dir(&path)), erofs);
        }
        assert_eq!(errno(fs::remove_dir(of(&bench, ""))), erofs);
        assert_eq!(errno(fs::remove_dir(layout(&bench.mount))), erofs);
        assert_eq!(errno(fs::rename(bench.of_data("CKA_LABEL"), of(&bench, "CKA_LABEL"))), erofs);
        bench.fails(&format!("touch {}", object.display()));
        bench.fails(&format!("truncate -s 3 {}", object.display()));
        before.assert_same(&bench.softhsm.snapshot());
    }

    fn times_sizes_and_numbers_are_stable(backend) {
        let bench = Bench::new(backend);
        let from = layout(&bench.mount);
        let rsync = |from: &Path| {
            let mut command = tool("rsync");
            command.arg("-ai").arg(format!("{}/", from.display())).arg(bench.outside.path().join("copy"));
            text_of(&mut command)
        };
        assert!(rsync(&from).contains(&format!("{}.object", bench.private)));
        assert_eq!(rsync(&from), "");
        let stat = |from: &Path| {
            let mut found = BTreeMap::new();
            for path in walk(from) {
                let metadata = fs::symlink_metadata(&path).unwrap();
                if metadata.is_file() {
                    assert_eq!(fs::read(&path).unwrap().len() as u64, metadata.len(), "{}", path.display());
                }
                let of = (metadata.ino(), metadata.len(), metadata.mtime(), metadata.mtime_nsec());
                found.insert(path.strip_prefix(from).unwrap().to_owned(), of);
            }
            found
        };
        let seen = stat(&from);
        assert_eq!(seen.len(), 2 + 3 + 2 * 3);
        let Bench { mount, softhsm, .. } = bench;
        mount.unmount();
        let mount = Mount::new(&softhsm);
        assert_eq!(stat(&layout(&mount)), seen);
    }

    fn it_can_be_listed_and_is_not_in_the_way(backend) {
        let bench = Bench::new(backend);
        assert_eq!(bench.quiet("find .. -name '*.object'"), "");
        let listed = bench.quiet("cd ../.tokenfs/file; find . -mindepth 1 -printf '%f\\n' | wc -l; tar c . | tar t | wc -l; ls -laR >/dev/null; du -s . >/dev/null");
        assert_eq!(listed, "10\n11\n");
    }

    fn modes_and_owners_are_those_of_the_store_by_the_mask(backend) {
        let bench = Bench::with(backend, &MountOptions::new().umask(0));
        drop(bench.client);
        let token = bench.softhsm.token_directory();
        for path in walk(&token) {
            set_mode(&path, if path.is_dir() { 0o2777 } else { 0o666 });
            nix::unistd::chown(&path, Some(ALICE.uid.into()), Some(BOB.gid.into())).unwrap();
        }
        for mask in [0, 0o022, 0o027, 0o077] {
            let mount = MountOptions::new().umask(0).argument(format!("--umask={mask:04o}")).mount(&bench.softhsm);
            let shown = layout(&mount);
            assert_eq!(mode(&shown), mode(&bench.softhsm.tokendir));
            for path in walk(&shown.join(token.file_name().unwrap())) {
                let wanted = if path.is_dir() { 0o2777 & !mask } else { 0o666 & !mask };
                assert_eq!(mode(&path), wanted, "{mask:o} {}", path.display());
                let metadata = fs::metadata(&path).unwrap();
                assert_eq!((metadata.uid(), metadata.gid()), (ALICE.uid, BOB.gid));
            }
        }
    }

    fn another_user_sees_no_more_than_in_the_tree(backend) {
        let lax = MountOptions::new().umask(0o022).argument("--umask=0").option("allow_other");
        let bench = Bench::with(backend, &lax);
        set_mode(&bench.softhsm.tokendir, 0o755);
        let token = bench.softhsm.token_directory();
        let denied = |name: &str, path: &Path| {
            let said = run_to_fail(as_user(ALICE, name).env("LC_ALL", "C").arg(path));
            assert!(said.contains("Permission denied"), "{said}");
        };
        let private = of(&bench, format!("{}.object", bench.private));
        eventually(SOON, "the new mode", || mode(bench.mount.path()) == 0o755);
        denied("ls", &of(&bench, ""));
        denied("cat", &private);
        set_mode(&token, 0o755);
        eventually(SOON, "the new mode", || mode(&of(&bench, "")) == 0o755);
        run(as_user(ALICE, "ls").arg(of(&bench, "")));
        denied("cat", &private);
        denied("cat", &of(&bench, "token.object"));
        denied("cat", &bench.at(&bench.private).join("CKA_LABEL"));
        // What he may read in the one he may read in the other.
        set_mode(&bench.backing(&bench.private), 0o644);
        eventually(SOON, "the new mode", || mode(&private) == 0o644);
        run(as_user(ALICE, "ls").arg(bench.at(&bench.private)));
        assert!(!run(as_user(ALICE, "cat").arg(&private)).stdout.is_empty());
    }
}

/// All that SoftHSM's `file` backend has, and nothing of ours or of strangers.
#[test]
fn of_a_file_store_the_bytes_are_its_own() {
    let bench = Bench::new(Backend::File);
    let token = bench.softhsm.token_directory();
    let whole = fs::read(bench.backing(&bench.data)).unwrap();
    let put = |name: &str, content: &[u8]| fs::write(token.join(name), content).unwrap();
    put("torn.object", &whole[..whole.len() - 3]);
    put("torn.lock", b"");
    put("no-lock.object", &whole);
    put("empty.object", b"");
    put("trailing.object", &[&whole[..], b"xyz"].concat());
    put("stray.lock", b"not empty");
    put("not a UUID.object", &whole);
    // So long that it is read by a thread of its own.
    put("long.object", &[7; 700_000]);
    // Of a page, as what a writer may not have finished: it is waited for.
    put("page.object", &[7; 4096]);
    let shown = of(&bench, "");
    let output = run(tool("diff").arg("-r").arg(&token).arg(&shown));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    let same = |name: &str| {
        let (stored, shown) = (
            fs::metadata(token.join(name)).unwrap(),
            fs::metadata(shown.join(name)).unwrap(),
        );
        assert_eq!(
            (shown.len(), shown.mtime(), shown.mtime_nsec()),
            (stored.len(), stored.mtime(), stored.mtime_nsec())
        );
    };
    for entry in fs::read_dir(&token).unwrap() {
        same(entry.unwrap().file_name().to_str().unwrap());
    }
    assert_eq!(
        bench.log(),
        "",
        "that something is damaged is no news to who reads bytes"
    );

    let before = entries(&shown).unwrap();
    put("README", b"");
    put("sqlite3.db", b"");
    put("a.tokenfs-new", b"");
    put("a.tokenfs-journal", b"");
    fs::create_dir(token.join("directory.object")).unwrap();
    symlink("README", token.join("link.object")).unwrap();
    assert_eq!(entries(&shown).unwrap(), before);
    for name in [
        "README",
        "sqlite3.db",
        "a.tokenfs-new",
        "directory.object",
        "link.object",
    ] {
        assert_eq!(
            errno(fs::metadata(shown.join(name))),
            nix::libc::ENOENT,
            "{name}"
        );
    }
}

/// A lock file and the generation are no objects, and are as fresh as those.
#[test]
fn every_file_of_a_file_store_is_fresh() {
    let bench = Bench::new(Backend::File);
    let token = bench.softhsm.token_directory();
    let lock = format!("{}.lock", bench.data);
    for name in ["generation", "token.lock", &lock] {
        let shown = of(&bench, name);
        assert_eq!(mode(&shown), 0o600);
        set_mode(&token.join(name), 0o400);
        eventually(SOON, name, || mode(&shown) == 0o400);
        fs::write(token.join(name), b"longer than it was").unwrap();
        eventually(SOON, name, || fs::metadata(&shown).unwrap().len() == 18);
        assert_eq!(fs::read(&shown).unwrap(), b"longer than it was");
        fs::remove_file(token.join(name)).unwrap();
        eventually(SOON, name, || fs::metadata(&shown).is_err());
    }
}

/// Nobody sees the middle of a write, and who has to wait keeps nobody else from reading.
#[test]
fn an_object_that_is_being_written_is_waited_for() {
    let bench = Bench::with(Backend::File, &MountOptions::new().option("lock_wait=1"));
    let backing = bench.backing(&bench.data);
    let name = format!("{}.object", bench.data);
    let shown = of(&bench, &name);
    let whole = fs::read(&shown).unwrap();
    let file = exclusively(&backing);
    file.set_len(20).unwrap();
    assert_eq!(errno(fs::read(&shown)), nix::libc::EBUSY);
    assert!(bench.log().contains(&name), "{}", bench.log());
    assert!(fs::read(of(&bench, "token.object")).unwrap().len() > 100);
    assert_eq!(entries(&of(&bench, "")).unwrap().len(), 9);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read(&shown));
        std::thread::sleep(Duration::from_millis(200));
        file.write_all_at(&whole, 0).unwrap();
        drop(file);
        assert_eq!(reader.join().unwrap().unwrap(), whole);
    });
}

/// In a database there are no bytes that a damaged object could be copied by.
#[test]
fn a_damaged_object_of_a_database_is_an_error_for_itself() {
    let bench = Bench::new(Backend::Db);
    let database = bench.backing("");
    let whole = content(&bench.softhsm.read());
    let sql = "update attribute_binary set value = 'text' where type = 3 and value = cast('data' as blob)";
    run(tool("sqlite3").arg(&database).arg(sql));
    let name = format!("{}.object", bench.data);
    let shown = of(&bench, &name);
    eventually(SOON, "the damage", || fs::read(&shown).is_err());
    assert_eq!(errno(fs::read(&shown)), nix::libc::EIO);
    assert_eq!(fs::metadata(&shown).unwrap().len(), 0);
    let log = bench.log();
    let line = log
        .lines()
        .find(|line| line.contains(&format!(".tokenfs/file/{}/{name}", bench.token)));
    let line = line.unwrap_or_else(|| panic!("{log}"));
    assert!(
        line.contains("sqlite3.db") && line.contains("attribute_binary"),
        "{line}"
    );
    let target = bench.outside.path().join("copy");
    let said = run_to_fail(tool("cp").arg("-a").arg(layout(&bench.mount)).arg(&target));
    assert_eq!(said.matches("cp:").count(), 1, "{said}");
    assert!(said.contains(&name), "{said}");
    let copy = content(&independent::read_store(&target));
    let (own, objects) = &copy[&bench.token];
    let (stored_own, mut stored) = whole[&bench.token].clone();
    stored.remove(&bench.data).unwrap();
    assert_eq!((own, objects), (&stored_own, &stored));
}
