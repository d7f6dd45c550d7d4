//! Modes and owners of what is made through a mount, for several users, and what becomes of `chmod` and `chown`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod mount_common;
mod support;
mod write_common;

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use support::*;
use write_common::*;

const NEW: &str = "00000000-0000-4000-8000-000000000001";
const GROUP: u32 = 1234;

/// A store that everybody can write to, mounted for everybody, without any mask or with one.
fn shared(backend: Backend, mask: &str) -> Bench {
    assert!(is_root(), "run scripts/test as root");
    let (softhsm, client, handles) = configured(backend, &format!("objectstore.umask = {mask}\n"));
    set_mode(softhsm.directory.path(), 0o755);
    set_mode(&softhsm.tokendir, 0o1777);
    let token = softhsm.token_directory();
    for path in walk(&token) {
        set_mode(&path, if path.is_dir() { 0o777 } else { 0o666 });
    }
    Bench::beside(
        softhsm,
        client,
        handles,
        &MountOptions::new().option("allow_other").umask(0),
    )
}

/// A line of shell as somebody else, with a umask; what it said if it failed.
fn by(bench: &Bench, user: User, umask: u32, line: &str) -> Result<(), String> {
    let mut shell = as_user(user, "bash");
    let line = format!("umask {umask:04o}; {line}");
    shell
        .args(["-euo", "pipefail", "-c", &line])
        .current_dir(bench.directory())
        .env("LC_ALL", "C");
    shell
        .env("o", &bench.data)
        .env("k", &bench.private)
        .env("p", &bench.public)
        .env("n", NEW);
    let output = shell.output().unwrap();
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).into_owned())
}

fn is(path: &Path) -> String {
    let stat = fs::symlink_metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    format!("{:04o} {}:{}", stat.mode() & 0o7777, stat.uid(), stat.gid())
}

fn file_of(bench: &Bench, object: &str) -> PathBuf {
    bench.backing(object)
}

const MAKE: &str = "mkdir $n; echo CKO_DATA >$n/CKA_CLASS; echo true >$n/CKA_TOKEN; echo false >$n/CKA_PRIVATE; printf x >$n/CKA_LABEL; sync $n";

/// A copy of the token beside it, with a serial number of its own.
const COPY: &str = "mkdir ../copy; for o in *; do [ $o = token ] || cp -r $o ../copy/; done; mkdir ../copy/token; \
    cp token/CKA_OS_SOPIN token/CKA_OS_USERPIN token/CKA_OS_TOKENFLAGS token/CKA_OS_TOKENLABEL ../copy/token/; \
    printf 0123456789abcdef >../copy/token/CKA_OS_TOKENSERIAL; sync ..";

both_backends! {
    /// The kernel counts nanoseconds forward, also before 1970.
    fn a_time_before_1970_is_the_time_that_was_meant(backend) {
        let bench = Bench::new(backend);
        for date in ["1969-12-31 23:59:58.5 UTC", "1965-01-01 00:00:00.25 UTC", "1960-01-01 UTC", "2001-01-01 00:00:00.75 UTC"] {
            let line = format!("touch -d '{date}' $o $out/local; for x in $o $out/local; do stat -c %.9Y $x; done");
            let said = bench.quiet(&line);
            let times: Vec<&str> = said.lines().collect();
            assert_eq!(times[0], times[1], "{backend}: {date}");
        }
    }

    fn what_is_made_belongs_to_its_maker(backend) {
        for (mask, umask, wanted) in [("0", 0o022, 0o644), ("0", 0, 0o666), ("0027", 0, 0o640), ("0", 0o077, 0o600), ("0077", 0o002, 0o600)] {
            let bench = shared(backend, mask);
            // Under a mask of 077 others cannot get in at all, so root is the maker.
            let reach = mask == "0";
            let who = if reach { ALICE } else { User { uid: 0, gid: 0 } };
            by(&bench, who, umask, MAKE).unwrap_or_else(|why| panic!("{backend}, mask {mask}, umask {umask:o}: {why}\n{}", bench.log()));
            assert!(bench.has(NEW));
            let shown = bench.at(NEW);
            match backend {
                Backend::File => {
                    let file = file_of(&bench, NEW);
                    let text = format!("{wanted:04o} {}:{}", who.uid, who.gid);
                    assert_eq!(is(&file), text, "mask {mask}, umask {umask:o}: the backing file");
                    assert_eq!(is(&file.with_extension("lock")), text, "mask {mask}, umask {umask:o}: its lock file");
                    assert_eq!(is(&shown.join("CKA_LABEL")), text);
                    let directory = wanted | wanted >> 2 & 0o111;
                    assert_eq!(is(&shown), format!("{directory:04o} {}:{}", who.uid, who.gid));
                }
                // Mode and owner are the token's.
                Backend::Db => {
                    assert_eq!(is(&shown.join("CKA_LABEL")), is(&bench.at(&bench.data).join("CKA_LABEL")));
                    assert_eq!(is(&bench.backing(NEW)), "0666 0:0");
                }
            }
        }
    }

    fn a_setgid_directory_gives_its_group(backend) {
        let bench = shared(backend, "0");
        let token = bench.softhsm.token_directory();
        nix::unistd::chown(&token, None, Some(GROUP.into())).unwrap();
        set_mode(&token, 0o2777);
        eventually(SOON, "the mode in the mount", || mode(&bench.directory()) == 0o2777);
        by(&bench, ALICE, 0o022, MAKE).unwrap();
        if backend == Backend::File {
            assert_eq!(is(&file_of(&bench, NEW)), format!("0644 {}:{GROUP}", ALICE.uid));
            assert_eq!(is(&bench.at(NEW).join("CKA_LABEL")), format!("0644 {}:{GROUP}", ALICE.uid));
        }
        // And to scratch, which hands it on.
        let other = "00000000-0000-4000-8000-000000000002";
        by(&bench, ALICE, 0o007, &format!("mkdir -p .w/CKA_WRAP_TEMPLATE; cp $o/* .w/; mv -T .w {other}")).unwrap();
        if backend == Backend::File {
            assert_eq!(is(&file_of(&bench, other)), format!("0660 {}:{GROUP}", ALICE.uid));
        }
        bench.quiet(&format!("mv {other} .gone; printf new >.gone/CKA_URL"));
        let group = |path: &str| fs::metadata(bench.at(path)).unwrap().gid();
        assert_eq!(group(".gone/CKA_URL"), group(".gone"));
        bench.quiet("rm -r .gone");
        // And to a new token below a setgid tokendir, with the bit.
        let tokendir = &bench.softhsm.tokendir;
        nix::unistd::chown(tokendir, None, Some(GROUP.into())).unwrap();
        set_mode(tokendir, 0o2777);
        eventually(SOON, "the mode in the mount", || mode(bench.mount.path()) == 0o2777);
        by(&bench, ALICE, 0o022, COPY).unwrap_or_else(|why| panic!("{why}\n{}", bench.log()));
        let copy = tokendir.join("copy");
        eventually(SOON, "the new token", || bench.softhsm.read().contains_key("copy"));
        std::thread::sleep(HELD);
        assert_eq!(is(&copy), format!("2755 {}:{GROUP}", ALICE.uid), "the new token's directory");
        for path in walk(&copy).into_iter().filter(|path| path.is_file()) {
            let stat = fs::metadata(&path).unwrap();
            assert_eq!((stat.uid(), stat.gid()), (ALICE.uid, GROUP), "{}", path.display());
        }
    }

    fn what_others_cannot_read_in_scratch_they_do_not_make_a_part_of_an_object(backend) {
        let bench = shared(backend, "0000");
        let secret = "printf secret >$o/.x; mkdir -m 0777 .w; (umask 0; for a in CLASS PRIVATE TOKEN; do cp $o/CKA_$a .w/; done); printf secret >.w/CKA_VALUE";
        by(&bench, ALICE, 0o077, secret).unwrap();
        for line in ["mv -f $o/.x $o/CKA_URL", "mv .w $n", "mv $o/.x $o/.y; mv -f $o/.y $o/CKA_URL"] {
            let said = by(&bench, BOB, 0, line).unwrap_err();
            assert!(said.contains("Permission denied"), "{line}: {said}");
        }
        assert!(bench.log().contains("cannot read a scratch file"), "{}", bench.log());
        // Who has written it decides who is to read it.
        by(&bench, ALICE, 0, "mv $o/.y $o/CKA_URL; mv .w $n").unwrap();
        by(&bench, BOB, 0, "cat $o/CKA_URL").unwrap();
        let of_file = backend == Backend::File;
        assert_eq!(by(&bench, BOB, 0, "cat $n/CKA_VALUE").is_err(), of_file, "the mode of a database is that of all in it");
        if of_file {
            assert_eq!(is(&bench.at(NEW).join("CKA_CLASS")), format!("0600 {}:{}", ALICE.uid, ALICE.gid));
        }
        // Nor do they take away what they could not put back.
        if of_file {
            bench.quiet("chmod 0600 $k/CKA_LABEL");
            for line in ["cat $k/CKA_LABEL", "mv $k .gone"] {
                let said = by(&bench, BOB, 0, line).unwrap_err();
                assert!(said.contains("Permission denied"), "{line}: {said}");
            }
            assert!(bench.has(&bench.private));
        }
        // A directory that is closed to them holds nothing of theirs, either, whatever the modes in it are.
        let closed = "mkdir -m 0700 $o/.m .w; (umask 022; printf secret >$o/.m/CKA_LABEL; for a in CLASS PRIVATE TOKEN; do cp $o/CKA_$a .w/; done; printf secret >.w/CKA_VALUE)";
        by(&bench, ALICE, 0, closed).unwrap();
        let other = "00000000-0000-4000-8000-000000000002";
        for line in ["mv -T $o/.m $o/CKA_WRAP_TEMPLATE", &format!("mv -T .w {other}")] {
            let said = by(&bench, BOB, 0, line).unwrap_err();
            assert!(said.contains("Permission denied"), "{line}: {said}");
        }
        by(&bench, ALICE, 0, "rm -r .w").unwrap();
        // What all may read all can make one.
        by(&bench, ALICE, 0, "rm -r $n; printf public >$o/.x; cp -r $o .w").unwrap();
        by(&bench, BOB, 0, "mv -f $o/.x $o/CKA_URL; mv .w $n").unwrap();
    }

    fn a_lax_directory_lets_nobody_into_a_database(backend) {
        let bench = shared(backend, "0");
        let token = bench.softhsm.token_directory();
        set_mode(&token, 0o777);
        if backend == Backend::Db {
            set_mode(&token.join("sqlite3.db"), 0o644);
        }
        eventually(SOON, "the mode in the mount", || mode(&bench.directory()) == 0o777);
        if backend == Backend::Db {
            let begun = by(&bench, ALICE, 0o022, "mkdir $n");
            assert!(begun.unwrap_err().contains("Permission denied"));
        }
        let made = by(&bench, ALICE, 0o022, "mkdir .x; echo CKO_DATA >.x/CKA_CLASS; echo false >.x/CKA_PRIVATE; mv .x $n; sync $n");
        let taken = by(&bench, ALICE, 0o022, "mv $o .gone");
        match backend {
            // Its own files are hers to make and to remove, as the directory says.
            Backend::File => {
                made.unwrap();
                taken.unwrap();
            }
            Backend::Db => {
                assert!(made.unwrap_err().contains("Permission denied"));
                assert!(taken.unwrap_err().contains("Permission denied"));
                assert!(!bench.has(NEW) && bench.has(&bench.data));
            }
        }
    }

    /// The kernel says only the first of a caller's groups.
    fn who_may_write_a_database_by_one_of_their_groups_may(backend) {
        let bench = shared(backend, "0");
        let token = bench.softhsm.token_directory();
        if backend == Backend::Db {
            let database = token.join("sqlite3.db");
            nix::unistd::chown(&database, None, Some(GROUP.into())).unwrap();
            set_mode(&database, 0o660);
        }
        eventually(SOON, "the mode in the mount", || mode(&bench.directory()) == 0o777);
        let make = "mkdir .x; echo CKO_DATA >.x/CKA_CLASS; echo false >.x/CKA_PRIVATE; mv .x $n; rm -rf .x";
        let by_groups = |groups: &[u32]| {
            let mut shell = as_user_in(ALICE, groups, "bash");
            shell.args(["-euc", make]).current_dir(bench.directory()).env("n", NEW);
            shell.output().unwrap()
        };
        let refused = by_groups(&[4321, 4322]);
        match backend {
            Backend::File => assert!(refused.status.success(), "{refused:?}"),
            Backend::Db => assert!(!refused.status.success() && !bench.has(NEW), "{refused:?}"),
        }
        bench.quiet(&format!("rm -rf .x {NEW}"));
        let made = by_groups(&[4321, GROUP, 4322]);
        assert!(made.status.success(), "{made:?}");
        assert!(bench.has(NEW));
    }

    fn a_new_token_belongs_to_its_maker(backend) {
        for (mask, umask, directory, file) in [("0", 0o022, 0o755, 0o644), ("0", 0o077, 0o700, 0o600)] {
            let bench = shared(backend, mask);
            by(&bench, ALICE, umask, COPY).unwrap_or_else(|why| panic!("{why}\n{}", bench.log()));
            eventually(SOON, "the new token", || bench.softhsm.read().contains_key("copy"));
            std::thread::sleep(HELD);
            let copy = bench.softhsm.tokendir.join("copy");
            assert_eq!(is(&copy), format!("{directory:04o} {}:{}", ALICE.uid, ALICE.gid));
            for path in walk(&copy).into_iter().filter(|path| path.is_file()) {
                let stat = fs::metadata(&path).unwrap();
                assert_eq!((stat.uid(), stat.gid()), (ALICE.uid, ALICE.gid), "{}", path.display());
                assert_eq!(stat.mode() & 0o7777, file, "{}", path.display());
            }
            by(&bench, BOB, 0o022, "rm -rf ../copy").unwrap_err();
            assert!(copy.exists(), "another user has removed a token");
            by(&bench, ALICE, 0o022, "rm -r ../copy").unwrap_or_else(|why| panic!("{why}\n{}", bench.log()));
            eventually(SOON, "the token goes", || !copy.exists());
        }
    }

    fn the_kernel_keeps_others_out(backend) {
        let bench = shared(backend, "0");
        let before = mount_common::expected(&bench.softhsm);
        // Of the token as a whole on db.
        let file = file_of(&bench, &bench.data);
        nix::unistd::chown(&file, Some(ALICE.uid.into()), Some(ALICE.gid.into())).unwrap();
        set_mode(&file, 0o640);
        eventually(SOON, "the mode in the mount", || mode(&bench.of_data("CKA_LABEL")) == 0o640);
        for line in ["echo x >$o/CKA_LABEL", "echo x >>$o/CKA_LABEL", "rm $o/CKA_LABEL", "truncate -s 0 $o/CKA_LABEL", "chmod 666 $o/CKA_LABEL", "touch -d @1 $o/CKA_LABEL", "cat $o/CKA_LABEL", "chown 65534 $o/CKA_LABEL", "echo x >$o/.scratch", "touch $o/CKA_URL"] {
            let why = by(&bench, BOB, 0o022, line).unwrap_err();
            assert!(why.contains("Permission denied") || why.contains("not permitted"), "`{line}`: {why}");
        }
        mount_common::assert_same(&before, &mount_common::expected(&bench.softhsm));
        by(&bench, ALICE, 0o022, "printf hers >$o/CKA_LABEL; chmod 600 $o/CKA_LABEL").unwrap();
        assert_eq!(bench.stored_data("CKA_LABEL").unwrap(), b"hers");
        assert_eq!(is(&file), format!("0600 {}:{}", ALICE.uid, ALICE.gid), "a change of a value keeps the owner");
        by(&bench, ALICE, 0o022, "chown 65534 $o/CKA_LABEL").unwrap_err();
        // When root says so, the other one can.
        bench.quiet("chown 65534:65534 $o/CKA_LABEL");
        assert_eq!(is(&file), "0600 65534:65534");
        by(&bench, BOB, 0o022, "printf his >$o/CKA_LABEL").unwrap();
        by(&bench, ALICE, 0o022, "cat $o/CKA_LABEL").unwrap_err();
        assert_eq!(bench.stored_data("CKA_LABEL").unwrap(), b"his");
        assert_eq!(is(&file), "0600 65534:65534");
    }

    fn chmod_drops_what_the_mask_forbids_and_says_so(backend) {
        let (softhsm, client, handles) = configured(backend, "objectstore.umask = 0027\n");
        let bench = Bench::beside(softhsm, client, handles, &MountOptions::new().umask(0o022));
        let file = file_of(&bench, &bench.data);
        bench.quiet("chmod 777 $o/CKA_LABEL");
        assert_eq!(mode(&file), 0o640, "777 under a mask of 027");
        assert_eq!(mode(&bench.of_data("CKA_LABEL")), 0o640);
        assert_eq!(mode(&bench.of_data("CKA_VALUE")), 0o640, "all attributes of the object share it");
        assert_eq!(mode(&bench.at(&bench.data)), 0o750);
        let log = bench.log();
        assert!(log.contains(&bench.data) || backend == Backend::Db && log.contains(&bench.token), "{log}");
        assert!(log.lines().any(|line| line.contains("mask")), "{log}");
        bench.quiet("chmod 400 $o/CKA_LABEL");
        assert_eq!(mode(&file), 0o400);
        bench.quiet("chmod u=rwx,g=rx $o");
        assert_eq!(mode(&file), 0o640, "chmod of the directory");
        bench.quiet("chmod 711 $o");
        assert_eq!(mode(&file), 0o600, "x follows r");
        // A token's directory has a mode of its own.
        bench.quiet("chmod 777 .");
        assert_eq!(mode(&bench.softhsm.token_directory()), 0o750);
        bench.quiet("chmod 700 .");
        assert_eq!(mode(&bench.softhsm.token_directory()), 0o700);
        bench.quiet("install -m 755 $o/CKA_LABEL $out/x && cp -a $out/x $o/CKA_LABEL && install -m 755 $out/x $o/CKA_LABEL");
        bench.settle();
        assert_eq!(mode(&file), 0o640);
        // A change keeps the mode; so does SoftHSM's.
        bench.quiet("chmod 400 $o/CKA_LABEL && printf new >$o/CKA_LABEL");
        assert_eq!(mode(&file), 0o400, "after a change");
    }

    fn an_ordinary_user_has_a_mount_of_their_own(backend) {
        let (softhsm, mut client, handles) = configured(backend, "");
        client.close().unwrap();
        drop(client);
        give(softhsm.directory.path(), ALICE);
        let mut client = P11::start_as(&softhsm, ALICE);
        client.open("test", Some(PIN)).unwrap();
        let data = client.find_label("data").unwrap()[0];
        let bench = Bench::beside(softhsm, client, handles, &MountOptions::new().user(ALICE));
        let mut bench = bench;
        let token = bench.softhsm.token_directory();
        // Root is kept out of it by the kernel; all is seen from the store.
        let run_by = |bench: &Bench, line: &str| {
            let mut shell = as_user(ALICE, "bash");
            let line = format!("cd {}; {line}", bench.directory().display());
            shell.args(["-euo", "pipefail", "-c", &line]).env("LC_ALL", "C").env("o", &bench.data).env("k", &bench.private).env("n", NEW);
            let output = shell.current_dir("/").output().unwrap();
            (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout))
        };
        for line in ["printf hers >$o/CKA_LABEL", "cp -a $k $n", COPY, "rm -r ../copy", "chmod 600 $o/CKA_LABEL", "touch $o/CKA_LABEL"] {
            let (well, why) = run_by(&bench, line);
            assert!(well && why.is_empty(), "`{line}`: {why}");
        }
        std::thread::sleep(HELD);
        assert_eq!(bench.client.label(data).unwrap().unwrap(), b"hers");
        assert!(bench.has(NEW));
        for path in walk(&token) {
            let stat = fs::metadata(&path).unwrap();
            assert_eq!((stat.uid(), stat.gid()), (ALICE.uid, ALICE.gid), "{}", path.display());
        }
        // What is root's she can neither change nor give away.
        let file = file_of(&bench, &bench.data);
        nix::unistd::chown(&file, Some(0.into()), Some(0.into())).unwrap();
        set_mode(&file, 0o644);
        std::thread::sleep(HELD);
        let before = fs::read(&file).unwrap();
        let (well, why) = run_by(&bench, "printf x >$o/CKA_LABEL");
        assert!(!well && (why.contains("Permission denied") || why.contains("not permitted")), "{why}");
        if backend == Backend::File {
            let (well, why) = run_by(&bench, "chown 0 $k/CKA_LABEL");
            assert!(!well && why.contains("not permitted"), "{why}");
            // Nor could she put it back as it was, so that she does not take it away.
            let (well, why) = run_by(&bench, "mv $o .gone");
            assert!(!well && why.contains("not permitted"), "{why}");
            assert_eq!(fs::metadata(&file).unwrap().uid(), 0);
        }
        assert_eq!(fs::read(&file).unwrap(), before);
    }

    fn a_token_that_is_given_away_is_all_theirs(backend) {
        let bench = shared(backend, "0000");
        // A `generation` and a lock file that stay root's would keep them from telling others what they have made.
        bench.quiet(&format!("chown -R {}:{} .; chmod -R go= .", ALICE.uid, ALICE.gid));
        let token = bench.softhsm.token_directory();
        for path in walk(&token) {
            let stat = fs::metadata(&path).unwrap();
            assert_eq!((stat.uid(), stat.gid(), stat.mode() & 0o077), (ALICE.uid, ALICE.gid, 0), "{}", path.display());
        }
    }

    fn what_is_written_into_a_store_whose_parent_was_moved_is_in_the_one_that_is_there(backend) {
        let bench = Bench::new(backend);
        let parent = bench.softhsm.directory.path();
        let moved = parent.with_extension("moved");
        fs::rename(parent, &moved).unwrap();
        run(tool("cp").arg("-a").args([&moved, &PathBuf::from(parent)]));
        let write = || -> std::io::Result<()> {
            let mut label = fs::File::options().write(true).open(bench.at(&bench.data).join("CKA_LABEL"))?;
            label.write_all(b"late")?;
            label.sync_all()
        };
        let written = write();
        let stored = bench.stored_data("CKA_LABEL").unwrap();
        let log = bench.log();
        fs::remove_dir_all(parent).unwrap();
        fs::rename(&moved, parent).unwrap();
        if written.is_ok() {
            assert_eq!(stored, b"late");
        } else {
            assert!(log.contains("was moved, removed or replaced"), "{written:?}: {log}");
        }
    }

    fn all_that_shares_a_mode_shows_the_new_one_at_once(backend) {
        let bench = Bench::with(backend, &MountOptions::new().umask(0));
        // Mode and owner are those of one file: an object's, or the token's.
        let shares = match backend { Backend::File => bench.at(&bench.data), Backend::Db => bench.directory() };
        let others: Vec<PathBuf> = walk(&shares).into_iter().filter(|path| path.is_file()).collect();
        assert!(others.len() > 5);
        let [first, ..] = &others[..] else { unreachable!() };
        for round in 0..60 {
            let mode = if round % 2 == 0 { 0o400 } else { 0o600 };
            set_mode(first, mode);
            let shown = others.iter().map(|path| (path, fs::metadata(path).unwrap().mode() & 0o7777));
            let late: Vec<_> = shown.filter(|(_, shown)| *shown != mode).collect();
            assert!(late.is_empty(), "round {round}: {} of {} show another mode than {mode:o}: {late:?}", late.len(), others.len());
        }
        for round in 0..10 {
            let uid = if round % 2 == 0 { ALICE.uid } else { 0 };
            nix::unistd::chown(first, Some(uid.into()), None).unwrap();
            for path in &others {
                assert_eq!(fs::metadata(path).unwrap().uid(), uid, "round {round}: {}", path.display());
            }
        }
    }
}
