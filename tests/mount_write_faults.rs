//! What goes wrong below a mount comes through with the errno that it has, leaves the old value intact, holds up nothing else, and is
//! explained in `.tokenfs/log`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod mount_common;
mod support;
mod write_common;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use support::*;
use write_common::calls::*;
use write_common::*;

/// A small file system of its own for the tokens. It is unmounted with this value, in a panic too.
#[derive(Debug)]
struct Small(PathBuf);

impl Small {
    fn remount(&self, options: &str) {
        let mut mount = tool("mount");
        run(mount
            .arg("-o")
            .arg(format!("remount,{options}"))
            .arg(&self.0));
    }

    /// Takes all down that uses it, and then it.
    fn end(self, bench: Bench) {
        let Bench { mount, client, .. } = bench;
        drop(client);
        mount.unmount();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = tool("umount").arg("-l").arg(&self.0).output();
    }
}

/// A store on a tmpfs of that size, with a session; the tokendir is the file system's root.
fn on_tmpfs(backend: Backend, size: &str) -> (Small, Softhsm, P11, (u64, u64, u64)) {
    assert!(
        is_root(),
        "this test mounts a tmpfs: run scripts/test as root"
    );
    let softhsm = Softhsm::new(backend);
    let mut mount = tool("mount");
    mount.args([
        "-t",
        "tmpfs",
        "-o",
        &format!("size={size},mode=0755"),
        "tokenfs-test",
    ]);
    run(mount.arg(&softhsm.tokendir));
    filled(softhsm)
}

/// The same on an ext4 of 16 MB.
fn on_ext4(backend: Backend) -> (Small, Softhsm, P11, (u64, u64, u64)) {
    assert!(
        is_root(),
        "this test mounts an ext4: run scripts/test as root"
    );
    let softhsm = Softhsm::new(backend);
    let image = softhsm.directory.path().join("image");
    File::create(&image).unwrap().set_len(16 << 20).unwrap();
    run(tool("mkfs.ext4").args(["-q", "-b", "1024"]).arg(&image));
    run(tool("mount")
        .args(["-o", "loop"])
        .arg(&image)
        .arg(&softhsm.tokendir));
    fs::remove_dir(softhsm.tokendir.join("lost+found")).unwrap();
    filled(softhsm)
}

fn filled(softhsm: Softhsm) -> (Small, Softhsm, P11, (u64, u64, u64)) {
    let small = Small(softhsm.tokendir.clone());
    let mut client = softhsm.p11();
    client.init_token("test", Some(PIN)).unwrap();
    client.open("test", Some(PIN)).unwrap();
    let handles = fill(&mut client);
    (small, softhsm, client, handles)
}

/// Writes a value; the errno of whichever call says it.
fn write(path: &Path, value: &[u8]) -> i32 {
    let file = options().truncate(true).open(path);
    let mut file = match file {
        Ok(file) => file,
        Err(error) => return error.raw_os_error().unwrap(),
    };
    let written = errno(file.write_all(value));
    let closed = close(file).err().map_or(0, |e| e as i32);
    if written == 0 { closed } else { written }
}

#[track_caller]
fn assert_errno(is: i32, wanted: &[i32], what: &str, bench: &Bench) {
    let names: Vec<_> = wanted.iter().map(|e| name(*e)).collect();
    assert!(
        wanted.contains(&is),
        "{} backend: {what}: {}, and not {}\n--- log\n{}",
        bench.backend(),
        name(is),
        names.join(" or "),
        bench.log()
    );
}

/// A line of the log names the token, and is a sentence.
#[track_caller]
fn assert_explained(bench: &Bench, words: &[&str]) {
    let log = bench.log();
    let explained = log.lines().any(|line| {
        let line = line.to_lowercase();
        line.contains(&bench.token) && words.iter().any(|word| line.contains(word))
    });
    assert!(
        explained,
        "{} backend: no line with one of {words:?} and the token's name in .tokenfs/log:\n{log}",
        bench.backend()
    );
}

both_backends! {
    fn a_full_disk_is_no_space(backend) {
        let (small, softhsm, client, handles) = on_tmpfs(backend, "2m");
        let mut bench = Bench::beside(softhsm, client, handles, &MountOptions::new());
        // SQLite's journal has to fit besides.
        let filler = bench.softhsm.tokendir.join("filler");
        let mut file = File::create(&filler).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
        drop(file);
        let before = mount_common::expected(&bench.softhsm);
        let value = vec![7; 100_000];
        for (what, path) in [("a larger value", bench.of_data("CKA_VALUE")), ("a larger value of a private object", bench.at(&bench.private).join("CKA_LABEL"))] {
            assert_errno(write(&path, &value[..99_968]), &[libc::ENOSPC], what, &bench);
            mount_common::assert_same(&before, &mount_common::expected(&bench.softhsm));
        }
        assert_explained(&bench, &["room", "space", "full"]);
        // A shell looks at what `write` says alone.
        for line in ["printf web >$o/CKA_LABEL", "echo false >$o/CKA_MODIFIABLE", "truncate -s 200000 $o/CKA_VALUE"] {
            let said = bench.fails(line);
            assert!(said.contains("No space left"), "{line}: {said}");
        }
        mount_common::assert_same(&before, &mount_common::expected(&bench.softhsm));
        // What came to nothing is pending all the same.
        bench.quiet("mkdir 00000000-0000-4000-8000-000000000002; : >00000000-0000-4000-8000-000000000002/CKA_SUBJECT; sleep 0.1");
        let refused = tokenfs().arg("umount").arg(bench.mount.path()).output().unwrap();
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        bench.quiet("rm -r 00000000-0000-4000-8000-000000000002");
        // A new object is refused when it is synced, and does not appear in part.
        bench.fails("cp -a $k 00000000-0000-4000-8000-000000000001 && sync 00000000-0000-4000-8000-000000000001 && sync .");
        mount_common::assert_same(&before, &mount_common::expected(&bench.softhsm));
        bench.assert_signs(handles.2);
        let left = leftovers(&bench.softhsm.tokendir);
        assert!(left.iter().all(|path| path.ends_with("filler")), "{left:?}");
        // As soon as there is room, all is well.
        fs::remove_file(&filler).unwrap();
        bench.quiet("rm -rf 00000000-0000-4000-8000-000000000001");
        assert_errno(write(&bench.of_data("CKA_VALUE"), &value), &[0], "with room again", &bench);
        assert_eq!(bench.stored_data("CKA_VALUE").unwrap(), value);
        bench.settle();
        bench.assert_sessions_agree();
        bench.assert_no_leftovers();
        small.end(bench);
    }

    /// Some of what ext4 calls free not even root gets.
    fn a_full_ext4_is_no_space_for_a_shell(backend) {
        let (small, softhsm, client, handles) = on_ext4(backend);
        let bench = Bench::beside(softhsm, client, handles, &MountOptions::new());
        let filler = bench.softhsm.tokendir.join("filler");
        let mut file = File::create(&filler).unwrap();
        for size in [65536, 4096, 1024] {
            while file.write_all(&vec![1; size]).is_ok() && file.sync_data().is_ok() {}
        }
        drop(file);
        // To the last block that anybody gets.
        let another = |number| bench.softhsm.tokendir.join(format!("filler-{number}"));
        let fits = |path: PathBuf| {
            let mut file = File::create(path)?;
            file.write_all(&[1; 1024])?;
            file.sync_data()
        };
        let full = (0..1000).find(|number| fits(another(*number)).is_err());
        assert!(full.is_some(), "it is not full");
        let before = mount_common::expected(&bench.softhsm);
        let copy = "00000000-0000-4000-8000-000000000002";
        for line in ["printf web >$o/CKA_LABEL", "echo false >$o/CKA_MODIFIABLE", &format!("cp -r $o {copy}")] {
            let said = bench.fails(line);
            assert!(said.contains("No space left"), "{line}: {said}");
        }
        bench.quiet(&format!("rm -rf {copy}"));
        mount_common::assert_same(&before, &mount_common::expected(&bench.softhsm));
        // What root alone gets is room all the same.
        let taken = nix::sys::statvfs::statvfs(&bench.softhsm.tokendir).unwrap();
        let for_root = taken.blocks_free() - taken.blocks() / 50;
        assert!(taken.blocks_available() == 0 && for_root < 64, "{taken:?}");
        File::options().write(true).open(&filler).unwrap().set_len((8 << 20) + 12345).unwrap();
        let mut file = File::options().append(true).open(&filler).unwrap();
        while nix::sys::statvfs::statvfs(&bench.softhsm.tokendir).unwrap().blocks_available() > 0 {
            file.write_all(&[1; 4096]).unwrap();
            file.sync_data().unwrap();
        }
        bench.quiet("printf web >$o/CKA_LABEL");
        assert_eq!(bench.stored_data("CKA_LABEL").unwrap(), b"web");
        bench.settle();
        small.end(bench);
    }

    /// setrlimit(2): the process that would make a file longer is killed, unless it takes care.
    fn a_limit_on_the_size_of_files_is_an_error_of_the_write(backend) {
        let mut bench = Bench::new(backend);
        let limit = |bytes: &str| {
            run(tool("prlimit").args(["--pid", &bench.mount.pid().to_string(), &format!("--fsize={bytes}:unlimited")]));
        };
        let before = mount_common::expected(&bench.softhsm);
        limit("65536");
        let refused = write(&bench.of_data("CKA_VALUE"), &[7; 200_000]);
        assert_errno(refused, &[libc::EFBIG, libc::EIO], "a value that makes a file longer than the limit", &bench);
        mount_common::assert_same(&before, &mount_common::expected(&bench.softhsm));
        assert_explained(&bench, &["large", "limit", "i/o error"]);
        limit("unlimited");
        assert_errno(write(&bench.of_data("CKA_VALUE"), &[7; 200_000]), &[0], "without the limit", &bench);
        assert_eq!(bench.stored_data("CKA_VALUE").unwrap().len(), 200_000);
        bench.settle();
        bench.assert_sessions_agree();
        bench.assert_no_leftovers();
    }

    fn whoever_copies_what_has_no_room_is_told(backend) {
        let (small, softhsm, client, handles) = on_tmpfs(backend, "2m");
        let mut bench = Bench::beside(softhsm, client, handles, &MountOptions::new());
        let filler = bench.softhsm.tokendir.join("filler");
        fs::write(&filler, vec![1; 1_500_000]).unwrap();
        let name = "00000000-0000-4000-8000-000000000001";
        bench.quiet("mkdir $out/copy && cp -a $o $out/copy/00000000-0000-4000-8000-000000000001 && head -c 800000 /dev/zero >$out/copy/00000000-0000-4000-8000-000000000001/CKA_VALUE");
        let before = mount_common::expected(&bench.softhsm);
        let tools = [
            "mv $out/copy/* .",
            "cp -a $out/copy/* .",
            "cp -r $out/copy/* .",
            "rsync -a $out/copy/ .",
            "rsync -a --inplace $out/copy/ .",
            "rsync -a --remove-source-files $out/copy/ .",
            "tar -C $out/copy -cf - . | tar -xf -",
            "install -D -t 00000000-0000-4000-8000-000000000001 $out/copy/*/*",
        ];
        for line in tools {
            let said = bench.fails(line);
            assert!(said.contains("No space left"), "{line}: {said}");
            assert!(bench.outside.path().join("copy").join(name).join("CKA_VALUE").exists(), "{line}");
            std::thread::sleep(HELD);
            // Not even a part of it.
            mount_common::assert_same(&before, &mount_common::expected(&bench.softhsm));
            // Nor when it has been somewhere else.
            let said = bench.fails("mv 00000000-0000-4000-8000-000000000001 .aside");
            assert!(said.contains("No space left"), "{line}: {said}");
            bench.quiet("rm -r 00000000-0000-4000-8000-000000000001; rm -rf $out/copy; mkdir $out/copy; cp -a $o $out/copy/00000000-0000-4000-8000-000000000001; head -c 800000 /dev/zero >$out/copy/00000000-0000-4000-8000-000000000001/CKA_VALUE");
        }
        assert_explained(&bench, &["room"]);
        // What has been taken for moved is not lost with the mount.
        bench.fails("rsync -a --remove-source-files $out/copy/ .");
        let refused = tokenfs().arg("umount").arg(bench.mount.path()).output().unwrap();
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        drop(std::mem::replace(&mut bench.mount, Mount::new(&bench.softhsm)));
        let class = bench.stored(format!("{name}/CKA_CLASS"));
        assert_eq!(class.as_deref(), Some(&b"CKO_DATA\n"[..]));
        fs::remove_file(&filler).unwrap();
        bench.quiet("rsync -a $out/copy/ .");
        eventually(SOON, "the object", || bench.has(name));
        assert_eq!(bench.stored(format!("{name}/CKA_VALUE")).unwrap().len(), 800_000);
        small.end(bench);
    }

    /// A file system has no more files to give, or a quota has none: what needs one for a moment has no room.
    fn no_room_for_a_name_is_no_space(backend) {
        let (small, softhsm, client, handles) = on_tmpfs(backend, "4m,nr_inodes=64");
        let bench = Bench::beside(softhsm, client, handles, &MountOptions::new());
        let filler = |number: usize| bench.softhsm.tokendir.join(format!("filler{number}"));
        let fillers = (0..).take_while(|number| File::create(filler(*number)).is_ok()).count();
        assert!(fillers > 0);
        let before = bench.stored_data("CKA_LABEL");
        let said = write(&bench.of_data("CKA_LABEL"), b"another");
        assert_errno(said, &[libc::ENOSPC], "a value", &bench);
        if backend == Backend::Db {
            let said = bench.fails("mv $o .gone");
            assert!(said.contains("No space left on device"), "{said}\n{}", bench.log());
            let said = bench.fails(&format!("mv {} {OTHER}", bench.data));
            assert!(said.contains("No space left on device"), "{said}\n{}", bench.log());
        }
        assert_eq!(bench.stored_data("CKA_LABEL"), before);
        (0..fillers).for_each(|number| fs::remove_file(filler(number)).unwrap());
        assert_errno(write(&bench.of_data("CKA_LABEL"), b"another"), &[0], "when there is room again", &bench);
        small.end(bench);
    }

    fn a_small_value_needs_little_room(backend) {
        let (small, softhsm, client, handles) = on_tmpfs(backend, "2m");
        let bench = Bench::beside(softhsm, client, handles, &MountOptions::new());
        bench.quiet("head -c 400000 /dev/zero >$o/CKA_VALUE");
        // An object file is written anew beside the old one; of a database a few pages are.
        let room = match backend {
            Backend::File => 500_000,
            Backend::Db => 100_000,
        };
        let free = nix::sys::statvfs::statvfs(&bench.softhsm.tokendir).unwrap();
        let free = free.blocks_available() * free.fragment_size();
        fs::write(bench.softhsm.tokendir.join("filler"), vec![1; free as usize - room]).unwrap();
        bench.quiet("printf small >$o/CKA_LABEL; echo false >$o/CKA_MODIFIABLE");
        assert_eq!(bench.stored_data("CKA_LABEL").unwrap(), b"small");
        small.end(bench);
    }

    fn a_read_only_file_system_is_read_only(backend) {
        let (small, softhsm, client, handles) = on_tmpfs(backend, "4m");
        // What has the store open for writing would keep it from becoming read-only.
        drop(client);
        small.remount("ro");
        let client = P11::start(&softhsm);
        let mut bench = Bench::beside(softhsm, client, handles, &MountOptions::new());
        let before = bench.softhsm.snapshot();
        let tree = mount_common::seen(&bench.mount);
        mount_common::assert_same(&mount_common::expected(&bench.softhsm), &tree);
        assert_errno(write(&bench.of_data("CKA_LABEL"), b"x"), &[libc::EROFS], "a value", &bench);
        for line in ["truncate -s 1 $o/CKA_LABEL", "chmod 640 $o/CKA_LABEL", "touch -d @1 $o", "mv $o .gone", "rm $o/CKA_LABEL && sync $o", "mkdir ../new && sync .."] {
            let said = bench.fails(line);
            assert!(said.contains("Read-only file system"), "`{line}`: {said}");
        }
        assert_explained(&bench, &["read-only", "read only"]);
        std::thread::sleep(HELD);
        before.assert_same(&bench.softhsm.snapshot());
        small.remount("rw");
        assert_errno(write(&bench.of_data("CKA_LABEL"), b"writable"), &[0], "when it is writable again", &bench);
        assert_eq!(bench.stored_data("CKA_LABEL").unwrap(), b"writable");
        bench.client.reinitialize().unwrap();
        small.end(bench);
    }

    fn no_permission_is_no_permission(backend) {
        let (softhsm, client, handles) = configured(backend, "objectstore.umask = 0\n");
        drop(client);
        // Alice may write every file, says the kernel, and may make none beside it: so it is the daemon that is refused.
        for path in walk(&softhsm.tokendir) {
            set_mode(&path, if path.is_dir() { 0o755 } else { 0o666 });
        }
        set_mode(softhsm.directory.path(), 0o755);
        let client = softhsm.p11();
        let options = MountOptions::new().user(ALICE).umask(0);
        let before = softhsm.snapshot();
        let bench = Bench::beside(softhsm, client, handles, &options);
        let by_alice = |line: &str| {
            let mut shell = as_user(ALICE, "bash");
            shell.args(["-c", &format!("cd {} && {{ {line}; }}", bench.directory().display())]).current_dir("/");
            shell.env("LC_ALL", "C").env("o", &bench.data);
            shell
        };
        let value = "python3 -c 'import os,sys; f=os.open(sys.argv[1],os.O_WRONLY|os.O_TRUNC); os.write(f,b\"x\"); os.close(f)' $o/CKA_LABEL";
        for line in [value, "rm $o/CKA_LABEL && sync $o", "mv $o .gone", "mkdir new", "chmod 666 $o/CKA_LABEL", "touch -d @1 $o"] {
            let said = run_to_fail(&mut by_alice(line));
            assert!(said.contains("Permission denied") || said.contains("not permitted"), "`{line}`: {said}");
        }
        std::thread::sleep(HELD);
        before.assert_same(&bench.softhsm.snapshot());
        let log = text_of(&mut by_alice("cat ../.tokenfs/log"));
        assert!(log.contains(&bench.token), "{log}");
    }

    fn a_lock_that_stays_is_busy_after_the_limit(backend) {
        let mut bench = Bench::with(backend, &MountOptions::new().option("lock_wait=1"));
        let mut other = bench.softhsm.p11();
        other.init_token("other", Some(PIN)).unwrap();
        other.open("other", Some(PIN)).unwrap();
        let (second, ..) = fill(&mut other);
        let free = match backend {
            // Of the same token; in a database all share a lock.
            Backend::File => bench.at(&bench.public).join("CKA_LABEL"),
            Backend::Db => {
                let link = bench.mount.join(".tokenfs/by-label/other/data.data/CKA_LABEL");
                eventually(SOON, "the other token", || link.exists());
                fs::canonicalize(link).unwrap()
            }
        };
        let before = bench.stored_data("CKA_LABEL");
        let holders: &[&str] = match backend { Backend::File => &["lock", "object"], Backend::Db => &["exclusive", "immediate", "shared"] };
        for held in holders {
            let holder = Holder::new(&bench, held);
            let started = Instant::now();
            let path = bench.of_data("CKA_LABEL");
            let blocked = std::thread::spawn(move || write(&path, b"too early"));
            std::thread::sleep(Duration::from_millis(100));
            let mut longest = Duration::ZERO;
            for round in 0..5 {
                let beside = Instant::now();
                assert_errno(write(&free, format!("free {round}").as_bytes()), &[0], "another object meanwhile", &bench);
                assert_eq!(fs::read(&free).unwrap(), format!("free {round}").as_bytes());
                longest = longest.max(beside.elapsed());
            }
            assert!(longest < Duration::from_millis(500), "{backend}, {held}: another object was held up for {longest:?}");
            assert!(!blocked.is_finished(), "{backend}, {held}: nothing was waited for: {}", name(blocked.join().unwrap()));
            let errno = blocked.join().unwrap();
            let waited = started.elapsed();
            assert_errno(errno, &[libc::EBUSY], &format!("a write under a lock on {held}"), &bench);
            assert!(waited > Duration::from_millis(900) && waited < Duration::from_secs(4), "{backend}, {held}: waited {waited:?}");
            assert_explained(&bench, &["lock", "busy"]);
            for (what, said) in [("mv to a dot", bench.fails("mv $o .gone")), ("chmod", if backend == Backend::Db { String::from("busy") } else { bench.fails("rm $o/CKA_VALUE && sync $o") })] {
                assert!(said.to_lowercase().contains("busy"), "{what}: {said}");
            }
            drop(holder);
            std::thread::sleep(HELD);
            assert_eq!(bench.stored_data("CKA_LABEL"), before, "{backend}, {held}: after all that");
            bench.settle();
            // A lock that is let go in time is waited for.
            let holder = Holder::new(&bench, held);
            let path = bench.of_data("CKA_APPLICATION");
            let waiting = std::thread::spawn(move || write(&path, b"waited for"));
            std::thread::sleep(Duration::from_millis(300));
            drop(holder);
            assert_errno(waiting.join().unwrap(), &[0], "a write that waits for a lock", &bench);
            assert_eq!(bench.stored_data("CKA_APPLICATION").unwrap(), b"waited for");
        }
        assert!(other.label(second).unwrap().is_some());
        bench.settle();
        bench.assert_sessions_agree();
    }

    /// An error of a step that only cleans up is none of the rename's; one that comes before leaves everything as it was.
    fn an_object_is_in_one_place_whatever_fails(backend) {
        let bench = Bench::new(backend);
        let label = bench.stored_data("CKA_LABEL").unwrap();
        let other = "11111111-2222-4333-8444-555555555555";
        let (mut failed, mut done) = (0, 0);
        for call in ["unlink", "unlinkat", "renameat", "renameat2", "pwrite64", "fsync", "fdatasync", "linkat", "write"] {
            for when in ["1", "2", "3", "4", "5", "6", "1+"] {
                for (to, is_scratch) in [(".gone", true), (other, false)] {
                    let what = format!("{backend}: EIO in {call}, time {when}, of a rename to {to}");
                    let injection = Injection::new(&bench, call, &format!("error=EIO:when={when}"));
                    let renamed = errno(fs::rename(bench.at(&bench.data), bench.at(to)));
                    drop(injection);
                    eventually(SOON, "both to be seen again", || {
                        fs::metadata(bench.at(&bench.data)).is_ok() != fs::metadata(bench.at(to)).is_ok()
                    });
                    assert_eq!(renamed != 0, bench.has(&bench.data), "{what}: {renamed}\n{}", bench.log());
                    assert_eq!(renamed == 0 && !is_scratch, bench.has(other), "{what}: {renamed}\n{}", bench.log());
                    if renamed == 0 {
                        done += 1;
                        assert_eq!(fs::read(bench.at(to).join("CKA_LABEL")).unwrap(), label, "{what}");
                        fs::rename(bench.at(to), bench.at(&bench.data)).unwrap();
                    } else {
                        failed += 1;
                        assert_eq!(fs::read(bench.of_data("CKA_LABEL")).unwrap(), label, "{what}");
                    }
                }
            }
        }
        println!("{backend}: {failed} renames failed, {done} were done all the same");
        assert!(failed > 3 && done > 3);
        let Bench { mount, softhsm, .. } = bench;
        mount.unmount();
        Mount::new(&softhsm).unmount();
        let left = leftovers(&softhsm.tokendir);
        assert!(left.is_empty(), "{left:?}");
    }

    /// What is renamed over an object whose attributes have been unlinked is there afterwards, or that object is.
    fn an_object_that_was_emptied_is_there_until_another_one_is(backend) {
        let bench = Bench::new(backend);
        let (mut failed, mut done) = (0, 0);
        for call in ["linkat", "fsync", "fdatasync", "pwrite64", "renameat2", "renameat", "fchmod", "write"] {
            for when in 1..9 {
                let what = format!("{backend}: EIO in {call}, time {when}");
                let before = bench.stored_data("CKA_LABEL").unwrap();
                bench.quiet("cp -a $o .new; printf next >.new/CKA_LABEL");
                bench.quiet("rm $o/*");
                let injection = Injection::new(&bench, call, &format!("error=EIO:when={when}"));
                let renamed = errno(fs::rename(bench.at(".new"), bench.at(&bench.data)));
                drop(injection);
                if renamed == 0 {
                    done += 1;
                    assert_eq!(bench.stored_data("CKA_LABEL").unwrap(), b"next", "{what}");
                    assert_errno(write(&bench.of_data("CKA_LABEL"), what.as_bytes()), &[0], "afterwards", &bench);
                } else {
                    failed += 1;
                    eventually(SOON, &format!("{what}: what was unlinked is back"), || {
                        fs::read(bench.of_data("CKA_LABEL")).is_ok_and(|label| label == before)
                    });
                    assert_eq!(bench.stored_data("CKA_LABEL").unwrap(), before, "{what}");
                    bench.quiet("rm -r .new");
                }
            }
        }
        println!("{backend}: {failed} renames failed, {done} were done");
        assert!(failed > 3 && done > 3, "{failed}, {done}");
        bench.assert_no_leftovers();
    }

    /// The token's own object is written in place.
    fn an_error_behind_a_change_of_the_tokens_own_is_none_of_it(backend) {
        let bench = Bench::new(backend);
        let label = bench.at("token/CKA_OS_TOKENLABEL");
        let (mut failed, mut done) = (0, 0);
        for call in ["unlinkat", "unlink", "utimensat", "fsync", "pwrite64", "ftruncate", "fallocate", "write"] {
            for when in 1..6 {
                let what = format!("{backend}: EIO in {call}, time {when}");
                assert_errno(write(&label, b"old"), &[0], "before", &bench);
                let appending = OpenOptions::new().append(true).open(&label).unwrap();
                let injection = Injection::new(&bench, call, &format!("error=EIO:when={when}"));
                (&appending).write_all(b"er").unwrap();
                let synced = errno(appending.sync_all());
                drop(injection);
                let again = errno(appending.sync_all());
                assert_eq!(again, 0, "{what}");
                drop(appending);
                let stored = bench.stored("token/CKA_OS_TOKENLABEL").unwrap();
                let stored = String::from_utf8(stored).unwrap();
                assert_eq!(stored.trim_end(), "older", "{what}: {synced}");
                if synced == 0 { done += 1 } else { failed += 1 }
            }
        }
        println!("{backend}: {failed} syncs failed, {done} did not");
        assert!(failed > 1 && done > 1, "{failed}, {done}");
    }

    fn a_token_that_is_gone_is_gone_whatever_is_left_of_it(backend) {
        let mut gone = 0;
        for first in 1..8 {
            let mut bench = Bench::new(backend);
            bench.client.init_token("second", Some(PIN)).unwrap();
            let injection = Injection::new(&bench, "unlinkat", &format!("error=EIO:when={first}+"));
            let removed = std::process::Command::new("rm").arg("-r").arg(bench.directory()).output().unwrap();
            drop(injection);
            let marker = if backend == Backend::File { "token.object" } else { "sqlite3.db" };
            let is_there = bench.softhsm.tokendir.join(&bench.token).join(marker).exists();
            let what = format!("{backend}: the unlinks from number {first}: {removed:?}");
            assert_eq!(removed.status.success(), !is_there, "{what}\n{}", bench.log());
            let is_left = !leftovers(&bench.softhsm.tokendir).is_empty();
            let is_said = bench.log().contains("it is left of a token that is gone");
            assert_eq!(is_said, is_left && !is_there, "{what}\n{}", bench.log());
            gone += usize::from(is_said);
            let Bench { mount, softhsm, .. } = bench;
            mount.unmount();
            Mount::new(&softhsm).unmount();
            assert_eq!(softhsm.token_directories().len() == 2, is_there, "{what}");
            assert!(leftovers(&softhsm.tokendir).is_empty(), "{what}");
        }
        assert!(gone >= 2, "{backend}: {gone}");
    }

    fn what_fails_for_a_moment_leaves_the_old_value(backend) {
        let bench = Bench::new(backend);
        let old = bench.stored_data("CKA_VALUE").unwrap();
        for when in ["1", "2", "3"] {
            let injection = Injection::new(&bench, "fstatfs", &format!("error=EIO:when={when}"));
            let failed = write(&bench.of_data("CKA_VALUE"), b"newer");
            drop(injection);
            let stored = bench.stored_data("CKA_VALUE").unwrap();
            assert_eq!(stored, if failed == 0 { b"newer".to_vec() } else { old.clone() }, "{backend}: time {when}: {failed}");
            assert_errno(write(&bench.of_data("CKA_VALUE"), &old), &[0], "afterwards", &bench);
        }
    }

    fn an_error_of_the_disk_comes_through(backend) {
        let mut bench = Bench::new(backend);
        let old = bench.stored_data("CKA_LABEL").unwrap();
        let (mut failed, mut met) = (0, Vec::new());
        let calls = ["pwrite64", "fsync", "fdatasync", "renameat2", "renameat", "linkat", "ftruncate", "write", "fchmod"];
        for call in calls {
            for (error, number) in [("EIO", libc::EIO), ("ENOSPC", libc::ENOSPC), ("EDQUOT", libc::ENOSPC)] {
                for when in ["1", "2", "3", "4", "5", "1+"] {
                    let injection = Injection::new(&bench, call, &format!("error={error}:when={when}"));
                    let value = vec![b'n'; 6000];
                    let errno = write(&bench.of_data("CKA_LABEL"), &value);
                    drop(injection);
                    let stored = bench.stored_data("CKA_LABEL").unwrap();
                    let shown = fs::read(bench.of_data("CKA_LABEL")).unwrap();
                    let what = format!("{backend}: {error} in {call}, time {when}");
                    assert_eq!(shown, stored, "{what}: mount and store differ");
                    if errno == 0 {
                        assert!(stored == value, "{what}: close says that it is well, and the store has {} bytes", stored.len());
                        assert_errno(write(&bench.of_data("CKA_LABEL"), &old), &[0], "putting it back", &bench);
                        continue;
                    }
                    failed += 1;
                    met.push(format!("{call}/{when}"));
                    // SQLite says of most that it was an error of the disk: who asks a moment later is told what it is, if it is still so.
                    let passes = when != "1+" || error == "EIO";
                    let wanted = if passes { &[number, libc::EIO][..] } else { &[number] };
                    assert_errno(errno, wanted, &what, &bench);
                    assert!(stored == old, "{what}: refused, and the store has {} bytes", stored.len());
                    let log = bench.log();
                    assert!(log.lines().last().is_some_and(|line| line.contains(&bench.token)), "{what}: the log:\n{log}");
                    let left = leftovers(&bench.softhsm.tokendir);
                    // What could not be cleaned up is cleaned up by the next write.
                    assert!(left.len() <= 1, "{what}: left {left:?}");
                    let seen = bench.client.label(bench.handles.0).unwrap().unwrap();
                    assert_eq!(seen, old, "{what}: a live session");
                }
            }
        }
        println!("{backend}: {failed} writes failed, in {met:?}");
        assert!(failed >= 4, "{backend}: hardly any injected error was met: {met:?}");
        // And all is well afterwards.
        assert_errno(write(&bench.of_data("CKA_LABEL"), b"well"), &[0], "afterwards", &bench);
        bench.settle();
        bench.assert_sessions_agree();
        let Bench { mount, softhsm, .. } = bench;
        mount.unmount();
        Mount::new(&softhsm).unmount();
        let left = leftovers(&softhsm.tokendir);
        assert!(left.is_empty(), "{left:?}");
    }
}

both_backends! {
    fn a_token_whose_publishing_cannot_be_synced_is_there_whole_or_not_at_all(backend) {
        let bench = Bench::new(backend);
        let (mut before, mut after) = (0, 0);
        for time in 1..20 {
            // A token needs a slot of its own.
            let (name, serial) = (format!("new-{time}"), format!("{time:016}"));
            bench.quiet(&format!("cp -r token $out/{name} && mkdir ../{name} ../{name}/token && echo -n {serial} >$out/{name}/CKA_OS_TOKENSERIAL"));
            // What is pending is left alone for a moment: this is quicker.
            bench.quiet(&format!("cp $out/{name}/* ../{name}/token/ && test ! -e $s/{name}/token.object").replace("$s", &bench.softhsm.tokendir.display().to_string()));
            let directory = File::open(bench.mount.join(&name)).unwrap();
            let injection = Injection::new(&bench, "fsync,fdatasync", &format!("error=EIO:when={time}"));
            let own = match backend { Backend::File => "token.object", Backend::Db => "sqlite3.db" };
            let own = bench.softhsm.tokendir.join(&name).join(own);
            let was_published = own.exists();
            let synced = errno(directory.sync_all());
            let is_published = own.exists();
            drop(injection);
            if synced == 0 {
                break;
            }
            assert_errno(synced, &[libc::EIO], &format!("fsync {time}"), &bench);
            let log = bench.log();
            assert!(log.lines().any(|line| line.contains(&name) && line.contains("sync")), "{log}");
            if is_published && !was_published { after += 1 } else { before += 1 }
            // It is well with the next one, and the token is there once.
            directory.sync_all().unwrap();
            assert!(own.exists());
            mount_common::assert_same(&mount_common::expected(&bench.softhsm), &mount_common::seen(&bench.mount));
            bench.assert_no_leftovers();
        }
        println!("{backend}: {before} failures before a token had its name, {after} afterwards");
        assert!(before > 0 && after > 0, "{before} {after}");
        let Bench { mount, softhsm, .. } = bench;
        mount.unmount();
        let whole = softhsm.snapshot();
        let mount = Mount::new(&softhsm);
        mount_common::assert_same(&mount_common::expected(&softhsm), &mount_common::seen(&mount));
        assert_eq!(fs::read_to_string(mount.join(".tokenfs/log")).unwrap(), "");
        mount.unmount();
        whole.assert_same(&softhsm.snapshot());
        let mut client = softhsm.p11();
        assert_eq!(client.tokens().unwrap().len(), usize::try_from(2 + before + after).unwrap());
    }
}

/// Somebody who holds a lock.
#[derive(Debug)]
enum Holder {
    File(#[allow(dead_code)] File),
    Db(#[allow(dead_code)] rusqlite::Connection),
}

impl Holder {
    fn new(bench: &Bench, what: &str) -> Self {
        let path = bench.backing(&bench.data);
        if bench.backend() == Backend::Db {
            let connection = rusqlite::Connection::open(path).unwrap();
            connection.busy_timeout(Duration::from_secs(5)).unwrap();
            match what {
                "shared" => connection
                    .execute_batch("begin; select count(*) from object")
                    .unwrap(),
                what => connection.execute_batch(&format!("begin {what}")).unwrap(),
            }
            return Self::Db(connection);
        }
        let path = path.with_extension(what);
        let file = File::options().read(true).write(true).open(path).unwrap();
        let lock = libc::flock {
            l_type: libc::F_WRLCK as i16,
            l_whence: 0,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        fcntl(&file, FcntlArg::F_OFD_SETLKW(&lock)).unwrap();
        Self::File(file)
    }
}

/// `strace` on the process of a mount that makes a system call fail, until this value goes.
#[derive(Debug)]
struct Injection(std::process::Child);

impl Injection {
    fn new(bench: &Bench, call: &str, how: &str) -> Self {
        let pid = bench.mount.pid();
        let mut strace = tool("strace");
        strace.args([
            "-f",
            "-o",
            "/dev/null",
            "-p",
            &pid.to_string(),
            "-e",
            &format!("trace={call}"),
        ]);
        strace.args(["-e", &format!("inject={call}:{how}")]);
        let child = strace.stderr(Stdio::null()).spawn().unwrap();
        eventually(SOON, "strace on the mount", || {
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
            let mut traced = tasks.map(|task| {
                let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
                status
                    .lines()
                    .any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
            });
            traced.all(|traced| traced)
        });
        Self(child)
    }
}

impl Drop for Injection {
    fn drop(&mut self) {
        // It lets go of the process when it is asked to end.
        let pid = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}
