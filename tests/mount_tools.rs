//! The tools that people use on files work in a mount, and leave the store alone.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod mount_common;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use mount_common::*;
use support::independent::{self, Value};
use support::template::{boolean, bytes, ulong};
use support::*;

/// A line of shell that must succeed and say nothing on standard error; what it printed.
#[track_caller]
fn quiet(directory: &Path, line: &str) -> String {
    let mut shell = Command::new("bash");
    shell
        .args(["-euo", "pipefail", "-c", line])
        .current_dir(directory)
        .env("LC_ALL", "C.UTF-8");
    let output = shell.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {}\n{said}", output.status);
    assert_eq!(said, "", "{line} complained");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Objects of a store of that class.
fn of_class(softhsm: &Softhsm, class: u64) -> usize {
    let store = softhsm.read();
    let objects = store.values().flat_map(|token| token.objects.values());
    objects
        .filter(|o| independent::get(o, 0) == Some(&Value::Ulong(class)))
        .count()
}

/// The object of a golden store with that label: its directory in the mount.
fn labelled(softhsm: &Softhsm, label: &str) -> PathBuf {
    let store = softhsm.read();
    let found = store.iter().find_map(|(name, token)| {
        let has = |o: &independent::Object| independent::get_bytes(o, 3) == Some(label.as_bytes());
        let (id, _) = token.objects.iter().find(|(_, object)| has(object))?;
        Some(Path::new(name).join(object_name(token.backend, name, id)))
    });
    found.unwrap_or_else(|| panic!("no object {label}"))
}

both_backends! {
    fn what_only_looks_works_and_changes_nothing(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        let before = softhsm.snapshot();
        let mount = Mount::new(&softhsm);
        let at = |line: &str| quiet(mount.path(), line);
        let tree = expected(&softhsm);
        let files: Vec<_> = tree.values().flatten().collect();
        let bytes: usize = files.iter().map(|content| content.len()).sum();

        assert!(at("ls -lR").lines().count() > tree.len());
        assert_eq!(at("ls -A").lines().count(), 4);
        assert_eq!(at("find .").lines().count(), tree.len());
        let sizes = at(r"find . -type f -printf '%s %i %m %n %u %p\n'");
        assert_eq!(sizes.lines().count(), files.len());
        let sum: usize = sizes.lines().map(|l| l.split(' ').next().unwrap().parse::<usize>().unwrap()).sum();
        assert_eq!(sum, bytes);
        let modes: BTreeSet<_> = sizes.lines().map(|l| l.split(' ').nth(2).unwrap()).collect();
        assert_eq!(modes, BTreeSet::from(["600"]));
        let directories = at(r"find . -mindepth 1 -type d -printf '%m\n' | sort -u");
        assert_eq!(directories, "700\n");
        assert_eq!(at("grep -rlx CKO_PRIVATE_KEY .").lines().count(), of_class(&softhsm, 3));
        assert_eq!(at("grep -rl CKO_DATA --include=CKA_CLASS .").lines().count(), of_class(&softhsm, 0));
        assert_eq!(at("tar c . | tar t").lines().count(), tree.len());
        assert_eq!(at("du -sb --apparent-size . | cut -f1").trim(), bytes.to_string());
        at("du -a . && stat -- * */* */*/* && df . && df -i .");
        assert_eq!(at("stat -f -c '%b %S %l' ."), quiet(&softhsm.tokendir, "stat -f -c '%b %S 255' ."));
        let large = labelled(&softhsm, "data-64k").join("CKA_VALUE");
        let value: Vec<u8> = (0..65536_u32).map(|index| (index * 7).to_le_bytes()[0]).collect();
        assert_eq!(run(tool("cat").arg(mount.join(&large))).stdout, value);
        assert_eq!(run(tool("head").args(["-c", "5"]).arg(mount.join(&large))).stdout, value[..5]);
        assert_eq!(run(tool("tail").args(["-c", "5"]).arg(mount.join(&large))).stdout, value[65531..]);
        let dd = format!("dd if={} bs=1000 skip=3 count=2 status=none", large.display());
        assert_eq!(at(&format!("{dd} | md5sum")), at(&format!("head -c 5000 {} | tail -c 2000 | md5sum", large.display())));
        before.assert_same(&softhsm.snapshot());
    }

    fn maps_in_memory_read_as_files_do(backend) {
        let softhsm = Softhsm::golden(Golden::V2_7_0, backend);
        let before = softhsm.snapshot();
        let mount = Mount::new(&softhsm);
        let script = "
import mmap, os, sys
count = 0
for directory, _, names in os.walk('.'):
    for name in names:
        with open(os.path.join(directory, name), 'rb') as file:
            if os.fstat(file.fileno()).st_size == 0:
                continue
            with mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
                whole = mapped[:]
            if whole != file.read():
                sys.exit(os.path.join(directory, name) + ' differs')
            count += 1
print(count)
";
        let mapped = text_of(tool("python3").arg("-c").arg(script).current_dir(mount.path()));
        let filled = expected(&softhsm).values().flatten().filter(|content| !content.is_empty()).count();
        assert_eq!(mapped.trim(), filled.to_string());
        before.assert_same(&softhsm.snapshot());
    }

    fn copies_are_copies(backend) {
        let softhsm = Softhsm::golden(Golden::V2_7_0, backend);
        let before = softhsm.snapshot();
        let outside = temporary();
        let out = |name: &str| outside.path().join(name).display().to_string();
        let mount = Mount::new(&softhsm);
        let at = |line: &str| quiet(mount.path(), line);
        at(&format!("cp -a . {0} && diff -r . {0}", out("cp")));
        at(&format!("tar cf {0} . && tar df {0}", out("all.tar")));
        drop(tool("rsync"));
        at(&format!("rsync -a ./ {}", out("rsync")));
        for line in [
            "find . -mindepth 1 -printf '%P %y %m %u %g %T@\n' | sort",
            "find . -type f -print0 | sort -z | xargs -0 md5sum",
        ] {
            let here = at(line);
            assert!(here.lines().count() > 300, "{here}");
            for copy in ["cp", "rsync"] {
                assert_eq!(here, quiet(&outside.path().join(copy), line), "{copy}");
            }
        }
        let again = format!("rsync -a --itemize-changes ./ {}", out("rsync"));
        assert_eq!(at(&again), "");
        assert_eq!(at(&format!("rsync -ac --delete --itemize-changes ./ {}", out("rsync"))), "");
        mount.unmount();
        let mount = Mount::new(&softhsm);
        assert_eq!(quiet(mount.path(), &again), "");
        // A change is moved, and nothing else.
        let touched = outside.path().join("rsync").join(labelled(&softhsm, "data-public")).join("CKA_LABEL");
        fs::write(&touched, "data-pubLIC").unwrap();
        let moved = quiet(mount.path(), &again);
        assert_eq!(moved.lines().filter(|line| line.starts_with(">f")).count(), 1, "{moved}");
        assert_eq!(fs::read(&touched).unwrap(), b"data-public");
        before.assert_same(&softhsm.snapshot());
    }

    fn every_write_is_refused_as_read_only(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        let before = softhsm.snapshot();
        let object = labelled(&softhsm, "data-public");
        let token = object.parent().unwrap().display().to_string();
        let object = object.display().to_string();
        for options in [MountOptions::new().option("ro"), MountOptions::new().option("rw,ro,noinotify")] {
            let mount = options.mount(&softhsm);
            let tree = seen(&mount);
            for line in [
                "touch $o/CKA_LABEL", "touch $o/CKA_URL", "touch $o", "touch $t", "touch new", "touch .tokenfs/new",
                "touch .tokenfs/log", "touch $o/.CKA_LABEL.swp", "mkdir $o/CKA_WRAP_TEMPLATE", "mkdir $t/new", "mkdir new",
                "rm -f $o/CKA_LABEL", "rm -rf $o", "rmdir $t/token", "mv $o/CKA_LABEL $o/CKA_URL", "mv $o $t/.gone",
                "mv -T $t new", "chmod 644 $o/CKA_LABEL", "chmod 755 $o", "chmod 755 .", "chown 5:60 $o/CKA_LABEL",
                "chgrp 60 $t", "ln $o/CKA_LABEL $o/CKA_URL", "ln -s CKA_LABEL $o/CKA_URL", "truncate -s 0 $o/CKA_LABEL",
                "truncate -s 99 $o/CKA_LABEL", "echo >$o/CKA_LABEL", "echo >>$o/CKA_LABEL", "echo >new", "exec 3<>$o/CKA_LABEL",
                "setfattr -n user.x -v y $o/CKA_LABEL", "mknod $o/fifo p", "mkfifo new", "rm -f .tokenfs/by-label/dup*/*",
                "fallocate -l 100 $o/CKA_LABEL", "sed -i s/a/b/ $o/CKA_LABEL", "echo x | tee $o/CKA_LABEL", "cp /etc/passwd $t/",
            ] {
                let mut shell = Command::new("bash");
                shell.arg("-c").arg(line).env("o", &object).env("t", &token).env("LC_ALL", "C");
                let said = run_to_fail(shell.args(["-o", "pipefail"]).current_dir(mount.path()));
                assert!(said.contains("Read-only file system"), "{options:?} {line}: {said}");
            }
            assert_same(&tree, &seen(&mount));
            before.assert_same(&softhsm.snapshot());
        }
    }

    fn inode_numbers_stay_and_are_distinct(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        let numbers = || -> BTreeMap<PathBuf, u64> {
            let mount = Mount::new(&softhsm);
            let below = |path: &Path| path.strip_prefix(mount.path()).unwrap().to_owned();
            let paths = walk(mount.path()).into_iter().chain(walk(&mount.join(".tokenfs")));
            paths.map(|path| (below(&path), fs::symlink_metadata(&path).unwrap().ino())).collect()
        };
        let first = numbers();
        assert!(first.len() > 500);
        assert_eq!(first[Path::new("")], 1);
        assert_eq!(first.values().collect::<BTreeSet<_>>().len(), first.len());
        assert_eq!(first, numbers());
    }

    fn what_is_derived_is_not_listed_and_can_be_entered(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        let mount = Mount::new(&softhsm);
        assert!(!quiet(mount.path(), "ls -a").contains("tokenfs"));
        assert!(!quiet(mount.path(), "find .").contains(".tokenfs"));
        assert_eq!(quiet(mount.path(), "cd .tokenfs && ls -A"), "by-label\nfile\nlog\nserver\n");
        assert!(!mount.join(".tokenfs/nothing").exists());
        let log = fs::metadata(mount.join(".tokenfs/log")).unwrap();
        assert_eq!(log.mode(), 0o100_600);
        assert_eq!(log.uid(), nix::unistd::geteuid().as_raw());
    }

    fn the_log_belongs_to_who_mounts(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        give(softhsm.directory.path(), ALICE);
        let mount = MountOptions::new().user(ALICE).mount(&softhsm);
        let stat = text_of(as_user(ALICE, "stat").args(["-c", "%a %u %g"]).arg(mount.join(".tokenfs/log")));
        assert_eq!(stat.trim(), format!("600 {} {}", ALICE.uid, ALICE.gid));
        let listed = text_of(as_user(ALICE, "ls").arg(mount.path()));
        assert_eq!(listed.lines().count(), 4);
        run_to_fail(as_user(BOB, "ls").arg(mount.path()));
    }

    fn labels_lead_to_their_objects(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        let mount = Mount::new(&softhsm);
        let by_label = mount.join(".tokenfs/by-label");
        let listed = |path: &Path| -> BTreeSet<OsString> {
            fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect()
        };
        let mut tokens = BTreeSet::new();
        for (name, token) in softhsm.read() {
            let label = independent::get_bytes(&token.token, independent::CKA_OS_TOKENLABEL).unwrap();
            let mut label = String::from_utf8_lossy(label).trim_end().to_owned();
            if label == "dup" {
                label = format!("dup~{}", &name[..8]);
            }
            let mut links = BTreeSet::new();
            for (id, object) in &token.objects {
                let id = object_name(backend, &name, id);
                let link = link_of(object, &id);
                let path = by_label.join(&label).join(&link);
                let target = fs::read_link(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                assert_eq!(target, Path::new("../../..").join(&name).join(&id));
                assert_eq!(fs::symlink_metadata(&path).unwrap().len(), target.as_os_str().len() as u64);
                let directory = fs::canonicalize(&path).unwrap();
                assert_eq!(directory, fs::canonicalize(mount.path()).unwrap().join(&name).join(&id));
                assert_eq!(fs::read(path.join("CKA_LABEL")).unwrap(), independent::get_bytes(object, 3).unwrap());
                links.insert(OsString::from(link));
            }
            assert_eq!(listed(&by_label.join(&label)), links);
            tokens.insert(OsString::from(label));
        }
        assert_eq!(listed(&by_label), tokens);
        assert_eq!(tokens.len(), 4);
    }

    fn labels_of_tokens_are_names_too(backend) {
        let softhsm = Softhsm::new(backend);
        let mut client = softhsm.p11();
        for label in ["..", ".", "a/b\n%", "tab\t", "caf\u{e9}", " blank"] {
            client.init_token(label, Some(PIN)).unwrap();
        }
        let mount = Mount::new(&softhsm);
        let names = quiet(&mount.join(".tokenfs/by-label"), "LC_ALL=C ls -A --quoting-style=literal --show-control-chars");
        assert_eq!(names, " blank\n%2E\n%2E%2E\na%2Fb%0A%25\ncaf\u{e9}\ntab%09\n");
        // New twins show up, and get a name of their own each.
        client.open(" blank", Some(PIN)).unwrap();
        let listed = || quiet(&mount.join(".tokenfs/by-label/ blank"), "ls -A");
        assert_eq!(listed(), "");
        let data = [ulong(0, 0), boolean(1, true), boolean(2, false), bytes(3, "one"), bytes(0x11, "value")];
        let first = client.create(&data).unwrap();
        let limit = std::time::Duration::from_secs(2);
        eventually(limit, "the first", || listed() == "one.data\n");
        client.create(&data).unwrap();
        eventually(limit, "its twin", || listed().lines().filter(|name| name.starts_with("one.data~")).count() == 2);
        client.destroy(first).unwrap();
        eventually(limit, "one of them", || listed() == "one.data\n");
    }
}

/// The name of the link to an object of a golden store.
fn link_of(object: &independent::Object, id: &str) -> String {
    let class = match independent::get(object, 0) {
        Some(Value::Ulong(0)) => "data",
        Some(Value::Ulong(1)) => "certificate",
        Some(Value::Ulong(2)) => "public_key",
        Some(Value::Ulong(3)) => "private_key",
        Some(Value::Ulong(4)) => "secret_key",
        Some(Value::Ulong(6)) => "domain_parameters",
        other => panic!("no class: {other:?}"),
    };
    if independent::is_private(object) {
        return format!("{id}.{class}");
    }
    match independent::get_bytes(object, independent::CKA_LABEL).unwrap() {
        b"dir/with/slashes\nand newline/../x" => {
            "dir%2Fwith%2Fslashes%0Aand newline%2F..%2Fx.data".into()
        }
        b"bad\xff\xfe\0nul" => "bad%FF%FE%00nul.data".into(),
        b".." => "...data".into(),
        b"twin" => format!("twin.data~{}", &id[..8]),
        b"" => format!("{id}.data"),
        long if long.len() == 300 => format!("{}.data~{}", "L".repeat(160), &id[..8]),
        label => format!(
            "{}.{class}",
            OsString::from_vec(label.to_vec()).into_string().unwrap()
        ),
    }
}
