//! What backups and restores come upon besides the matrix: a second backup of what has not changed, times that are no proof, what
//! another restore left half done, owners and masks, and what becomes of restored objects of a `db` token under SoftHSM's hands.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod mount_common;
mod support;
mod write_common;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use mount_common::*;
use support::template::{boolean, bytes, ulong};
use support::*;
use write_common::*;

/// Runs a line with the mount at `$out/mnt`, where every mount of the store is: backup programs know files by their paths. What it
/// printed, on either stream.
fn at_one_place(bench: &Bench, line: &str) -> String {
    assert!(
        is_root(),
        "this test makes bind mounts: run scripts/test as root"
    );
    let line = format!(
        "mkdir -p $out/mnt; mount --bind {} $out/mnt; cd $out/mnt; export RESTIC_PASSWORD=x RESTIC_REPOSITORY=$out/restic \
         BORG_REPO=$out/borg BORG_BASE_DIR=$out BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes; {line}",
        bench.mount.path().display()
    );
    let mut unshared = tool("unshare");
    unshared.args(["-m", "bash", "-euo", "pipefail", "-c", &line]);
    unshared
        .env("LC_ALL", "C.UTF-8")
        .env("HOME", bench.outside.path())
        .env("out", bench.outside.path());
    unshared.env(
        "o",
        bench
            .directory()
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned()
            + "/"
            + &bench.data,
    );
    let output = run(unshared.current_dir("/"));
    let said =
        String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    let lower = said.to_lowercase();
    assert!(
        !lower.contains("warning") && !lower.contains("error"),
        "`{line}`: {said}"
    );
    said
}

fn remount(bench: &mut Bench) {
    let Bench { mount, softhsm, .. } = bench;
    std::mem::replace(mount, Mount::new(softhsm)).unmount();
}

/// How many files there are in the mount, and in the data object, which share their times.
fn files(bench: &Bench) -> (u64, u64) {
    let files = |path: &Path| walk(path).iter().filter(|path| path.is_file()).count() as u64;
    (files(bench.mount.path()), files(&bench.at(&bench.data)))
}

/// The last line that `restic backup --json` prints.
fn restic(bench: &Bench) -> serde_json::Value {
    let said = at_one_place(bench, "restic --no-cache backup --json .");
    serde_json::from_str(said.lines().last().unwrap()).unwrap()
}

/// The statuses with which borg lists files, without directories.
fn borg(bench: &Bench, archive: &str) -> Vec<String> {
    // borg reads the newest files of a backup again each time, lest they have changed within one tick of the clock: so there is a newer one.
    let said = at_one_place(
        bench,
        &format!("touch $out/newer; borg create --list ::{archive} . $out/newer"),
    );
    let lines = said
        .lines()
        .filter(|line| !line.starts_with("d ") && !line.ends_with("/newer"));
    lines.map(str::to_owned).collect()
}

both_backends! {
    fn restic_reads_nothing_again_that_has_not_changed(backend) {
        let mut bench = Bench::new(backend);
        at_one_place(&bench, "restic -q init; restic -q --no-cache backup .");
        let (all, same) = files(&bench);
        for when in ["at once", "after a remount"] {
            let summary = restic(&bench);
            let counts = ["files_new", "files_changed", "files_unmodified", "data_blobs"].map(|name| summary[name].as_u64().unwrap());
            assert_eq!(counts, [0, 0, all, 0], "{when}: {summary}");
            remount(&mut bench);
        }
        bench.quiet("printf newer >$o/CKA_LABEL");
        let summary = restic(&bench);
        let counts = ["files_new", "files_changed", "files_unmodified", "data_blobs"].map(|name| summary[name].as_u64().unwrap());
        assert_eq!(counts, [0, same, all - same, 1], "one value has changed, and the times of what shares them: {summary}");
        let ids = "restic --no-cache snapshots --json | python3 -c 'import json,sys; print(*[s[\"short_id\"] for s in json.load(sys.stdin)][-2:])'";
        let difference = at_one_place(&bench, &format!("restic --no-cache diff $({ids})"));
        let changed: Vec<&str> = difference.lines().filter(|line| line.starts_with("M ")).collect();
        assert!(matches!(changed[..], [one] if one.ends_with("/CKA_LABEL")), "{difference}");
        assert_eq!(bench.log(), "");
    }

    fn borg_reads_nothing_again_that_has_not_changed(backend) {
        let mut bench = Bench::new(backend);
        let (all, same) = files(&bench);
        at_one_place(&bench, "borg init -e none; touch $out/newer; borg create ::first . $out/newer");
        for archive in ["at-once", "after-a-remount"] {
            let listed = borg(&bench, archive);
            let unchanged = listed.iter().filter(|line| line.starts_with("U ")).count();
            assert_eq!([unchanged, listed.len()], [all as usize; 2], "{archive}: {listed:#?}");
            remount(&mut bench);
        }
        bench.quiet("printf newer >$o/CKA_LABEL");
        let listed = borg(&bench, "changed");
        let unchanged = listed.iter().filter(|line| line.starts_with("U ")).count() as u64;
        assert_eq!(unchanged, all - same, "what shares its times is read: {listed:#?}");
        let difference = at_one_place(&bench, "borg diff --content-only ::after-a-remount changed 2>/dev/null || borg diff ::after-a-remount changed");
        let changed: BTreeSet<&str> = difference.lines().filter(|line| !line.contains("newer")).collect();
        assert!(changed.len() == 1 && difference.contains("/CKA_LABEL"), "{difference}");
        assert_eq!(bench.log(), "");
    }

    fn a_value_of_the_same_length_is_restored(backend) {
        let mut bench = Bench::new(backend);
        // Each of them is as long as before, and rsync looks at length and time alone.
        for options in ["-a", "-a --delete", "-a --inplace", "-aO", "-rt"] {
            bench.quiet("rm -rf $out/copy; printf one >$o/CKA_APPLICATION; printf two >$o/CKA_LABEL; printf abc >$o/CKA_VALUE; touch -d @1500000000 $o/* $o; cp -a . $out/copy");
            let before = expected(&bench.softhsm);
            bench.quiet("printf 111 >$o/CKA_APPLICATION; printf 222 >$o/CKA_LABEL; printf 333 >$o/CKA_VALUE");
            bench.quiet(&format!("rsync {options} $out/copy/ ./"));
            println!("{backend}: rsync {options}");
            bench.settle();
            assert_same(&before, &expected(&bench.softhsm));
            assert_eq!(bench.quiet(&format!("rsync {options} --itemize-changes $out/copy/ ./")), "", "rsync {options}, again");
            remount(&mut bench);
            if !options.contains("-aO") {
                assert_eq!(bench.quiet(&format!("rsync {options} --itemize-changes $out/copy/$o/ $o/")), "", "rsync {options}, after a remount");
            }
        }
        assert_eq!(bench.log(), "");
    }

    fn a_time_of_an_object_is_not_yet_that_of_its_attributes(backend) {
        let mut bench = Bench::new(backend);
        bench.quiet("printf x >$o/CKA_LABEL");
        let before = mtime(&bench.of_data("CKA_LABEL"));
        let object = bench.at(&bench.data);
        bench.quiet("touch -d @1500000000 $o");
        assert_eq!(mtime(&object).0, 1_500_000_000);
        assert_eq!(mtime(&bench.of_data("CKA_LABEL")), before, "of what was not written since");
        bench.quiet("touch -d @1500000000 $o/CKA_LABEL");
        assert_eq!(mtime(&bench.of_data("CKA_LABEL")).0, 1_500_000_000);
        assert_eq!(mtime(&bench.of_data("CKA_VALUE")), before);
        // What somebody else changes has the time of that.
        let (data, ..) = bench.handles;
        bench.client.set_label(data, "by SoftHSM").unwrap();
        eventually(SOON, "the time of SoftHSM's change", || mtime(&bench.of_data("CKA_VALUE")).0 > before.0 || mtime(&bench.of_data("CKA_VALUE")) > before);
        assert!(mtime(&bench.of_data("CKA_LABEL")) > before);
        bench.quiet("touch -d @1500000000 $o");
        remount(&mut bench);
        let object = bench.at(&bench.data);
        assert_eq!(mtime(&object).0, 1_500_000_000, "after a remount");
        assert_eq!(mtime(&bench.of_data("CKA_VALUE")).0, 1_500_000_000, "the store has one time for all of them");
    }

    fn what_another_restore_left_half_done_is_gone_on_with(backend) {
        let mut bench = Bench::new(backend);
        bench.quiet("cp -a $k $out/key; rm -rf $k");
        bench.settle();
        // As rsync leaves it when it is killed: it does not say yet whether it is private. The next one sets times first.
        bench.quiet("mkdir $k; cp $out/key/CKA_CLASS $out/key/CKA_LABEL $k/; touch -d @1 $k; sleep 0.3");
        assert!(!bench.has(&bench.private), "half of an object is in the store");
        bench.quiet("rsync -a $out/key/ $k/");
        eventually(SOON, "the object", || bench.has(&bench.private));
        bench.settle();
        assert_eq!(bench.quiet("rsync -a --itemize-changes $out/key/ $k/; diff -r $out/key $k"), "");
        assert_eq!(bench.log(), "");
        let key = bench.client.find_label("private").unwrap();
        bench.assert_signs(key[0]);
    }
}

both_backends! {
    fn what_was_broken_off_before_it_said_whether_it_is_private_is_completed(backend) {
        let mut bench = Bench::new(backend);
        // The class is the first thing that most tools bring, and labels come before `CKA_PRIVATE`.
        bench.quiet("mkdir $out/copy; cp -a $o $k $out/copy/");
        at_one_place(&bench, "borg init -e none; borg create ::one .; restic -q init; restic -q --no-cache backup .");
        let before = expected(&bench.softhsm);
        let tools = [
            "cp -a $out/copy/. ./",
            "tar --format=posix -C $out/copy -cf - . | tar -xpf -",
            "rsync -a $out/copy/ ./",
            "rsync -a --inplace $out/copy/ ./",
            "borg extract ::one",
            "restic -q --no-cache restore latest --target .",
        ];
        for (round, line) in tools.into_iter().enumerate() {
            bench.quiet("rm -r $o $k; mkdir $o $k; cp -a $out/copy/$o/CKA_CLASS $o/; cp -a $out/copy/$k/CKA_CLASS $k/");
            if round % 2 == 0 {
                // umount(8) does not ask the server, which has to end.
                drop(std::mem::replace(&mut bench.mount, Mount::new(&bench.softhsm)));
            } else {
                eventually(SOON * 3, "the log", || bench.log().matches("does not say whether it is private").count() == 2);
            }
            assert!(!bench.has(&bench.data) && !bench.has(&bench.private), "{line}: half of an object is in the store");
            println!("{backend}: {line}");
            if line.contains("one") || line.contains("latest") {
                at_one_place(&bench, line);
            } else {
                bench.quiet(line);
            }
            bench.settle();
            eventually(SOON, "both objects", || bench.has(&bench.data) && bench.has(&bench.private));
            assert_same(&before, &expected(&bench.softhsm));
            remount(&mut bench);
            assert_eq!(bench.quiet("diff -r $out/copy/$o $o; diff -r $out/copy/$k $k"), "");
        }
    }

    fn nothing_that_is_pending_is_lost_by_tokenfs_umount(backend) {
        let bench = Bench::new(backend);
        bench.quiet("mkdir $out/copy; cp -a $o $p $out/copy/; rm -r $o $p; mkdir $o $p; for i in $o $p; do cp -a $out/copy/$i/CKA_CLASS $i/; done");
        // Each with its reason, whichever is found first.
        let said = refused_umount(&bench);
        assert_eq!(said.matches(": pending: without CKA_PRIVATE").count(), 2, "{said}");
        let log = bench.log();
        for object in [&bench.data, &bench.public] {
            assert_eq!(log.matches(object).count(), 1, "{log}");
        }
        bench.quiet("rm -r $o $p");
        bench.mount.unmount();
    }

    /// What it names can be removed and nothing is lost: the store has none of it, whatever else was refused, before or after.
    fn tokenfs_umount_names_what_is_pending_and_nothing_else(backend) {
        let bench = Bench::new(backend);
        let (object, token) = ("aaaaaaaa-1234-5678-9abc-123456789abc", "bbbbbbbb-1234-5678-9abc-123456789abc");
        damage_key(&bench.softhsm, &bench.token, &bench.private);
        eventually(SOON, "the damage to be seen", || fs::read_dir(bench.at(&bench.private)).is_err());
        bench.quiet(&format!("mkdir {object}; echo CKO_DATA >{object}/CKA_CLASS"));
        // It is left alone for five seconds first.
        eventually(SOON * 3, "the refusal", || bench.log().contains(&format!("{object}: without CKA_PRIVATE")));
        bench.fails("echo maybe >$p/CKA_VERIFY");
        let said = refused_umount(&bench);
        let named = |path: &str| said.matches(&format!("tokenfs: {}: pending", bench.mount.join(path).display())).count();
        assert_eq!(said.matches(": pending").count(), 1, "{said}");
        assert_eq!(named(&format!("{}/{object}", bench.token)), 1, "{said}");
        assert!(said.contains(": pending: without CKA_PRIVATE"), "{said}");

        bench.quiet(&format!("rm -r {object}; mkdir -p ../{token}/token; echo x >../{token}/token/CKA_OS_TOKENLABEL"));
        let said = refused_umount(&bench);
        assert_eq!(said.matches(": pending").count(), 1, "{said}");
        let path = bench.mount.join(token);
        assert!(said.contains(&format!("tokenfs: {}: pending: ", path.display())), "{said}");
        bench.quiet(&format!("rm -r ../{token}"));
        bench.mount.unmount();
    }

    /// As a restore leaves it that is cut off before it comes to `token`, which is the last of a token in a listing.
    fn objects_without_their_token_are_pending(backend) {
        let bench = Bench::new(backend);
        bench.quiet("cp -a $t $out/token; printf 0123456789abcdef >$out/token/token/CKA_OS_TOKENSERIAL");
        let token = format!("{}-copy", bench.directory().display());
        bench.quiet(&format!("mkdir {token}; cp -a $out/token/$o {token}/; sync {token}/$o/CKA_LABEL"));
        bench.fails(&format!("sync {token}"));
        bench.fails("sync ..");
        let said = refused_umount(&bench);
        assert_eq!(said.matches(&format!("tokenfs: {token}: pending: it has objects, and no directory")).count(), 1, "{said}");
        // What completes it makes it whole.
        bench.quiet(&format!("cp -a $out/token/token {token}/; sync {token}"));
        assert_eq!(bench.softhsm.token_directories().len(), 2);
        bench.quiet(&format!("rm -r {token}; mkdir {token}"));
        // A directory with nothing in it is nothing.
        bench.mount.unmount();
        assert_eq!(bench.softhsm.token_directories().len(), 1);
    }

    fn tokenfs_umount_of_what_is_in_use_names_nothing(backend) {
        let bench = Bench::new(backend);
        bench.fails("echo maybe >$p/CKA_VERIFY");
        let open = fs::File::open(bench.directory()).unwrap();
        let said = refused_umount(&bench);
        assert!(said.contains("in use") && !said.contains("pending") && !said.contains("CKA_VERIFY"), "{said}");
        drop(open);
        bench.mount.unmount();
    }
}

/// `tokenfs umount`, which must be refused; what it said.
#[track_caller]
fn refused_umount(bench: &Bench) -> String {
    let refused = tokenfs().arg("umount").arg(bench.mount.path()).output();
    let refused = refused.unwrap();
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    String::from_utf8(refused.stderr).unwrap()
}

both_backends! {
    fn a_token_that_another_restore_left_half_done_is_gone_on_with(backend) {
        let bench = Bench::new(backend);
        let before = expected(&bench.softhsm);
        bench.quiet("cp -a $t $out/token; cd ..; rm -r $t");
        for left in ["CKA_OS_TOKENFLAGS", "CKA_OS_TOKENLABEL $out/token/token/CKA_OS_TOKENSERIAL"] {
            // As `cp` leaves it when it is killed. Whoever comes next sets the times of what is there first.
            let begun = format!("mkdir $t $t/token; cp $out/token/token/{left} $t/token/; touch -d @1 $t/token; touch -d @1 $t");
            let mut shell = bench.shell(&format!("{begun}; rsync -a $out/token/ $t/; rsync -a $out/token/ $t/"));
            let output = run(shell.current_dir(bench.mount.path()));
            assert_eq!(String::from_utf8_lossy(&output.stderr), "");
            bench.settle();
            assert_same(&before, &expected(&bench.softhsm));
            assert_eq!(bench.log(), "");
            run(bench.shell("rm -r $t").current_dir(bench.mount.path()));
        }
    }
}

/// What SQLite says of the schema of a database.
fn schema(database: &Path) -> String {
    text_of(tool("sqlite3").arg(database).arg(".schema"))
}

/// The names of the objects of a token in a mount.
fn names(mount: &Mount, token: &str) -> BTreeSet<String> {
    let entries = entries(&mount.join(token)).unwrap();
    entries
        .iter()
        .map(|path| path.to_str().unwrap().to_owned())
        .collect()
}

both_backends! {
    /// Into a `db` token, from either backend.
    fn restored_objects_keep_their_uuids_under_softhsm(from) {
        let source = Bench::new(from);
        let target = Softhsm::new(Backend::Db);
        let into = Mount::new(&target);
        source.quiet(&format!("rsync -a $t {}/", into.path().display()));
        let token = &source.token;
        let restored = names(&source.mount, token);
        eventually(SOON, "the token", || leftovers(&target.tokendir).is_empty() && names(&into, token) == restored);
        into.unmount();

        // SoftHSM works on it: a new label, one object less, two new ones, from two processes.
        for label in ["first", "second"] {
            let mut client = target.p11();
            client.open("test", Some(PIN)).unwrap();
            let new = [ulong(0, 0), boolean(1, true), boolean(2, false), bytes(3, label), bytes(CKA_VALUE, "new")];
            client.create(&new).unwrap();
            for (was, is) in [("private", "renamed"), ("renamed", "private")] {
                let key = client.find_label(was).unwrap()[0];
                client.set_label(key, is).unwrap();
            }
            if label == "first" {
                let data = client.find_label("data").unwrap()[0];
                client.destroy(data).unwrap();
            }
            let key = client.find_label("private").unwrap()[0];
            let signature = client.sign(key, CKM_ECDSA, &[7; 32]).unwrap();
            let public = client.find_label("public").unwrap()[0];
            assert_eq!(client.verify(public, CKM_ECDSA, &[7; 32], &signature), Ok(true));
        }
        let mount = Mount::new(&target);
        let now = names(&mount, token);
        let kept: BTreeSet<String> = restored.iter().filter(|name| **name != source.data).cloned().collect();
        assert!(now.is_superset(&kept) && !now.contains(&source.data), "{kept:?} in {now:?}");
        assert_eq!(now.len(), kept.len() + 2, "{now:?}");
        // What was destroyed comes back under its name, and takes none from another.
        source.quiet(&format!("cp -a $t/$o {}/", mount.join(token).display()));
        let all: BTreeSet<String> = now.union(&restored).cloned().collect();
        eventually(SOON, "the object", || leftovers(&target.tokendir).is_empty() && names(&mount, token) == all);
        mount.unmount();
        let mount = Mount::new(&target);
        assert_eq!(names(&mount, token), all, "after a remount");
        source.quiet(&format!("diff -r $t/$o {}", mount.join(token).join(&source.data).display()));
        assert_eq!(fs::read_to_string(mount.join(".tokenfs/log")).unwrap(), "");
        let mut client = target.p11();
        client.open("test", Some(PIN)).unwrap();
        agree(&target, token, &mut client);

        let made = Softhsm::with_token(Backend::Db).0;
        let database = |softhsm: &Softhsm| softhsm.token_directory().join("sqlite3.db");
        assert_eq!(schema(&database(&target)), schema(&database(&made)));
    }

    /// root restores what belongs to another user, under the masks that stores are run with.
    fn owners_and_masks_are_kept(backend) {
        for mask in [0o077, 0o027] {
            let configured = |softhsm: Softhsm| {
                softhsm.configure(&format!("objectstore.umask = {mask:04o}\n"));
                softhsm
            };
            let source = Bench::new(backend);
            give(&source.softhsm.token_directory(), ALICE);
            // What root gets under a mask that keeps nothing from the group.
            source.quiet("rsync -a . $out/copy");
            let (own, file) = (0o777 & !mask, 0o666 & !mask);
            sh(&source.outside.path().join("copy"), &format!("find . -type d -exec chmod {own:o} {{}} +; find . -type f -exec chmod {file:o} {{}} +"));
            for to in BACKENDS {
                let target = configured(Softhsm::new(to));
                let into = Mount::new(&target);
                let restored = into.join(&source.token);
                source.quiet(&format!("cp -a $out/copy {}", restored.display()));
                eventually(SOON, "the token", || leftovers(&target.tokendir).is_empty());
                assert_eq!(source.quiet(&format!("rsync -a --itemize-changes $out/copy/ {}/", restored.display())), "", "{mask:o}, to {to}");
                into.unmount();
                let into = Mount::new(&target);
                for path in walk(&into.join(&source.token)) {
                    let metadata = fs::symlink_metadata(&path).unwrap();
                    let shown = if metadata.is_dir() { own } else { file };
                    // A directory of an object can be entered where its file can be read.
                    let shown = if metadata.is_dir() && path != into.join(&source.token) { file | (file & 0o444) >> 2 } else { shown };
                    let is = (metadata.uid(), metadata.gid(), metadata.mode() & 0o777);
                    assert_eq!(is, (ALICE.uid, ALICE.gid, shown), "{mask:o}, to {to}: {}", path.display());
                }
                assert_eq!(fs::read_to_string(into.join(".tokenfs/log")).unwrap(), "");
                into.unmount();
                // The user whose they are works with them, as before: lock files and all belong to her.
                sh(&target.tokendir, &format!("chown {}:{} .", ALICE.uid, ALICE.gid));
                let mut client = P11::start_as(&target, ALICE);
                client.open("test", Some(PIN)).unwrap();
                let key = client.find_label("private").unwrap()[0];
                client.sign(key, CKM_ECDSA, &[7; 32]).unwrap();
            }
        }
    }
}

/// In a database names are derived from row ids, which begin anew in a copy of it. What was there before the copy was made keeps its name all the same.
#[test]
fn what_is_made_after_a_restore_has_no_name_of_what_was_there_before() {
    let mut bench = Bench::new(Backend::Db);
    let make = |client: &mut P11, label: &str| {
        let label = template::bytes(3, label);
        let of_all = [
            template::ulong(0, 0),
            template::boolean(1, true),
            template::boolean(2, false),
        ];
        client.create(&[&of_all[..], &[label]].concat()).unwrap()
    };
    let old: Vec<u64> = (0..5)
        .map(|number| make(&mut bench.client, &format!("old {number}")))
        .collect();
    bench.settle();
    bench.quiet("cp -a $t $out/monday");
    for object in old {
        bench.client.destroy(object).unwrap();
    }
    bench.settle();
    bench.quiet("cp -a $t $out/tuesday");
    bench.client.close().unwrap();
    let mut shell = bench.shell("rm -r $t; rsync -a $out/tuesday/ $t/; rsync -a $out/tuesday/ $t/");
    run(shell.current_dir(bench.mount.path()));
    bench.settle();
    let mut client = bench.softhsm.p11();
    client.open("test", Some(PIN)).unwrap();
    for number in 0..5 {
        make(&mut client, &format!("new {number}"));
    }
    // What was destroyed before is brought back.
    run(bench
        .shell("rsync -a --exclude=/token $out/monday/ $t/")
        .current_dir(bench.mount.path()));
    bench.settle();
    client.close().unwrap();
    let mut client = bench.softhsm.p11();
    client.open("test", Some(PIN)).unwrap();
    for number in 0..5 {
        for kind in ["old", "new"] {
            let found = client.find_label(&format!("{kind} {number}")).unwrap();
            assert_eq!(found.len(), 1, "{kind} {number}");
        }
    }
}
