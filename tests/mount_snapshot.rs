//! `tokenfs mount --snapshot`: the store as it was at one moment, whatever happens to it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod mount_common;
mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use mount_common::*;
use nix::fcntl::{FcntlArg, fcntl};
use support::template::{Attribute, boolean, bytes, ulong};
use support::*;

const CKM_AES_KEY_GEN: u64 = 0x1080;

fn snapshot_of(softhsm: &Softhsm) -> Mount {
    MountOptions::new().argument("--snapshot").mount(softhsm)
}

/// All that can be seen of a tree, times and inode numbers included.
fn all_of(directory: &Path) -> String {
    sh(
        directory,
        "find . -printf '%p %y %m %U %G %s %T@ %C@ %A@ %i %n\\n' | sort; find . -type f -print0 | sort -z | xargs -0 sha256sum; \
         find .tokenfs/by-label -printf '%p %l %T@\\n' | sort",
    )
}

fn labelled(label: &str) -> Vec<Attribute> {
    vec![boolean(1, true), boolean(2, false), bytes(3, label)]
}

fn data(client: &mut P11, label: &str) -> u64 {
    let more = [ulong(0, 0), bytes(0x11, "value")];
    client
        .create(&[&labelled(label)[..], &more].concat())
        .unwrap()
}

fn key(client: &mut P11, label: &str) -> u64 {
    let attributes = [&labelled(label)[..], &[ulong(0x161, 32)]].concat();
    client.generate(CKM_AES_KEY_GEN, &attributes).unwrap()
}

/// Two tokens, each with a SoftHSM of its own at work, one call after the other: in each round `A` and `B` in the first and `C` in
/// the second get the number of the round for a label, then a key `D` in the first goes and comes again with it, and then a key `E` in the
/// second.
struct Writer {
    clients: [P11; 2],
    labels: [u64; 3],
    keys: [u64; 2],
    round: usize,
    calls: Mutex<Vec<(Instant, Duration)>>,
}

const LETTERS: [&str; 5] = ["A", "B", "C", "D", "E"];

fn label(letter: usize, round: usize) -> String {
    format!("{}{round:08}", LETTERS[letter])
}

impl Writer {
    fn new(softhsm: &Softhsm, more: usize) -> Self {
        let mut clients = ["one", "two", "three"].map(|name| {
            let mut client = softhsm.p11();
            client.init_token(name, Some(PIN)).unwrap();
            client
        });
        for (client, name) in clients.iter_mut().zip(["one", "two", "three"]) {
            client.reinitialize().unwrap();
            client.open(name, Some(PIN)).unwrap();
        }
        let [mut one, mut two, mut three] = clients;
        data(&mut three, &coming(0));
        let attributes = [&labelled("")[..], &[ulong(0, 0), bytes(0x11, [7; 500])]].concat();
        one.bulk(more, "more", &attributes).unwrap();
        let labels = [
            data(&mut one, &label(0, 0)),
            data(&mut one, &label(1, 0)),
            data(&mut two, &label(2, 0)),
        ];
        let keys = [key(&mut one, &label(3, 0)), key(&mut two, &label(4, 0))];
        Self {
            clients: [one, two],
            labels,
            keys,
            round: 0,
            calls: Mutex::default(),
        }
    }

    fn round(&mut self) {
        self.round += 1;
        let round = self.round;
        let [one, two] = &mut self.clients;
        let calls = &self.calls;
        let timed = |call: &mut dyn FnMut()| {
            let begun = Instant::now();
            call();
            calls.lock().unwrap().push((begun, begun.elapsed()));
        };
        timed(&mut || one.set_label(self.labels[0], &label(0, round)).unwrap());
        timed(&mut || one.set_label(self.labels[1], &label(1, round)).unwrap());
        timed(&mut || two.set_label(self.labels[2], &label(2, round)).unwrap());
        for (client, letter) in [(one, 3), (two, 4)] {
            let handle = &mut self.keys[letter - 3];
            timed(&mut || client.destroy(*handle).unwrap());
            timed(&mut || *handle = key(client, &label(letter, round)));
        }
    }
}

/// A SoftHSM with a third token: makes one object after the other, and only then destroys the one before. So there is always one,
/// and at times there are two.
fn come_and_go(softhsm: &Softhsm, over: &AtomicBool) -> usize {
    let mut client = softhsm.p11();
    client.open("three", Some(PIN)).unwrap();
    let mut last = client.find_label(&coming(0)).unwrap()[0];
    let mut made = 0;
    while !over.load(Relaxed) {
        made += 1;
        let next = data(&mut client, &coming(made));
        client.destroy(last).unwrap();
        last = next;
    }
    made
}

fn coming(number: usize) -> String {
    format!("coming{number:08}")
}

/// Ends the writing, in a panic too.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// The rounds that a tree is of: each is that of the one before, or the next; a key can be missing between two rounds.
#[track_caller]
fn assert_one_moment(mount: &Mount, more: usize) -> usize {
    let mut rounds: BTreeMap<String, usize> = BTreeMap::new();
    let (mut others, mut coming) = (0, Vec::new());
    for token in entries(mount.path()).unwrap() {
        for object in entries(&mount.join(&token)).unwrap() {
            let at = mount.join(&token).join(&object);
            if object == Path::new("token") {
                assert_eq!(entries(&at).unwrap().len(), 5);
                continue;
            }
            let label = fs::read_to_string(at.join("CKA_LABEL")).unwrap();
            if label.starts_with("more") {
                others += 1;
                continue;
            }
            if let Some(number) = label.strip_prefix("coming") {
                coming.push(number.parse::<usize>().unwrap());
                continue;
            }
            let (letter, round) = label
                .split_at_checked(1)
                .unwrap_or_else(|| panic!("{}: half made", at.display()));
            if ["D", "E"].contains(&letter) {
                assert_eq!(fs::read(at.join("CKA_VALUE")).unwrap().len(), 32);
                assert_eq!(fs::read(at.join("CKA_LOCAL")).unwrap(), b"true\n");
            }
            let twice = rounds.insert(letter.to_owned(), round.parse().unwrap());
            assert_eq!(twice, None, "{letter}");
        }
    }
    assert_eq!(others, more);
    coming.sort_unstable();
    let adjacent = coming.windows(2).all(|pair| pair[0] + 1 == pair[1]);
    assert!(
        (1..=2).contains(&coming.len()) && adjacent,
        "not of one moment: {coming:?}"
    );
    let last = rounds["A"];
    let mut steps = Vec::new();
    for letter in ["A", "B", "C"] {
        steps.push((letter, rounds[letter] == last, rounds[letter] + 1 == last));
    }
    for letter in ["D", "E"] {
        // A step of its own: gone, and there again.
        let round = rounds.get(letter).copied();
        steps.push((
            letter,
            round.is_none_or(|round| round == last),
            round.is_some_and(|round| round + 1 == last),
        ));
        steps.push((
            letter,
            round == Some(last),
            round.is_none_or(|round| round + 1 == last),
        ));
    }
    let done = steps.iter().take_while(|(_, done, _)| *done).count();
    assert!(
        steps.iter().skip(done).all(|(_, _, undone)| *undone),
        "not of one moment: {rounds:?}"
    );
    last
}

both_backends! {
    fn is_of_one_moment_beside_a_softhsm_that_writes_all_the_while(backend) {
        const MORE: usize = 100;
        let softhsm = Softhsm::new(backend);
        let mut writer = Writer::new(&softhsm, MORE);
        let reading = {
            let begun = Instant::now();
            run(tokenfs().arg("tree").arg("--config").arg(&softhsm.conf));
            begun.elapsed()
        };
        let (over, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
        let mut taken = Vec::new();
        let (first, before) = std::thread::scope(|scope| {
            let writing = scope.spawn(|| {
                while !over.load(Relaxed) {
                    writer.round();
                    rounds.store(writer.round, Relaxed);
                }
                &writer
            });
            let end = End(&over);
            let coming = scope.spawn(|| come_and_go(&softhsm, &over));
            let mut seen = Vec::new();
            let take = || {
                assert!(!writing.is_finished(), "the writer failed");
                let begun = Instant::now();
                let mount = MountOptions::new().argument("--snapshot").foreground()
                    .environment("RUST_LOG", "tokenfs=info").mount(&softhsm);
                (mount, begun, Instant::now())
            };
            let first = take().0;
            let before = all_of(first.path());
            seen.push(assert_one_moment(&first, MORE));
            for _ in 0..if full() { 100 } else { 9 } {
                let (mount, begun, done) = take();
                let round = assert_one_moment(&mount, MORE);
                assert!(seen.last() <= Some(&round));
                seen.push(round);
                let line = mount.said();
                let line = line.lines().find(|line| line.contains("a snapshot of")).unwrap_or_else(|| panic!("{line}")).to_owned();
                taken.push((begun, done, line));
                mount.unmount();
            }
            let wanted = if full() { 5000 } else { 250 };
            eventually(Duration::from_secs(600), "many changes", || writing.is_finished() || rounds.load(Relaxed) > wanted);
            println!("{backend}: of rounds {seen:?}");
            drop(end);
            let writer = writing.join().unwrap();
            println!("{backend}: {} objects came", coming.join().unwrap());
            let calls = writer.calls.lock().unwrap();
            let mut all: Vec<_> = calls.iter().map(|(_, lasted)| *lasted).collect();
            all.sort();
            println!("{backend}: {} calls, half of them in {:?}, the longest {:?}; reading the store takes {reading:?}",
                all.len(), all[all.len() / 2], all[all.len() - 1]);
            let mut waits = Vec::new();
            for (begun, done, line) in &taken {
                let during = calls.iter().filter(|(start, lasted)| start < done && *start + *lasted > *begun);
                let longest = during.map(|(_, lasted)| *lasted).max().unwrap();
                println!("{backend}: the longest call {longest:?}; {}", line.split_once(' ').unwrap().1);
                waits.push(longest);
            }
            // A busy machine has pauses of its own, and a SQLite that waits looks again every 100 ms: what is found is that nobody waits for
            // as long as the mount lives, or for what is being made (two seconds).
            waits.sort();
            let most = reading + Duration::from_secs(1);
            assert!(waits[waits.len() / 2] < most, "while snapshots are taken, calls take {waits:?}");
            (first, before)
        });
        assert!(writer.round > 250);
        assert_eq!(all_of(first.path()), before);
        first.unmount();
    }

    fn shows_tokens_that_are_finished_while_others_are_being_made(backend) {
        let (softhsm, _client) = Softhsm::with_token(backend);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let end = End(&over);
            let making = scope.spawn(|| {
                let mut maker = softhsm.p11();
                let mut made = 0;
                while !over.load(Relaxed) {
                    made += 1;
                    maker.init_token(&format!("number {made}"), Some(PIN)).unwrap();
                }
                made
            });
            let mut last = 0;
            for _ in 0..8 {
                let mount = snapshot_of(&softhsm);
                let tokens = entries(mount.path()).unwrap();
                assert!(tokens.len() >= last && !tokens.is_empty());
                last = tokens.len();
                for token in tokens {
                    let own = entries(&mount.join(&token).join("token")).unwrap();
                    assert!(own.contains(Path::new("CKA_OS_SOPIN")), "{}: {own:?}", token.display());
                }
                mount.unmount();
            }
            assert!(last > 3, "{last}");
            drop(end);
            println!("{backend}: {} tokens were made, {last} seen", making.join().unwrap());
        });
    }

    fn outlives_the_store_and_takes_no_writes(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        // With times in the past, as a store has that is at rest.
        sh(&softhsm.tokendir, "find . -exec touch -d 2024-02-03T04:05:06.789 {} +");
        let live = Mount::new(&softhsm);
        let shown = |mount: &Mount| sh(mount.path(), "find . -printf '%p %y %m %U %G %s %T@ %C@ %i\\n' | sort");
        let (tree, living) = (expected(&softhsm), shown(&live));
        live.unmount();
        let stored = softhsm.snapshot();
        let mount = snapshot_of(&softhsm);
        assert_same(&tree, &seen(&mount));
        assert_eq!(shown(&mount), living);
        stored.assert_same(&softhsm.snapshot());
        let before = all_of(mount.path());
        let copies = temporary();
        let rsync = |more: &str| sh(mount.path(), &format!("rsync -a --delete {more} ./ {}/copy/", copies.path().display()));
        rsync("");
        // Nothing of the store is kept in use.
        let open = fs::read_dir(format!("/proc/{}/fd", mount.pid())).unwrap();
        let open: Vec<_> = open.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok()).collect();
        assert!(!open.iter().any(|path| path.starts_with(softhsm.directory.path())), "{open:?}");
        assert!(!open.iter().any(|path| path.ends_with("inotify")), "{open:?}");

        let moved = softhsm.directory.path().join("moved");
        fs::rename(&softhsm.tokendir, &moved).unwrap();
        assert_eq!(all_of(mount.path()), before);
        fs::remove_dir_all(&moved).unwrap();
        assert_eq!(all_of(mount.path()), before);
        assert_eq!(rsync("-i"), "", "a second copy has nothing to copy");
        assert_eq!(rsync("-in --checksum"), "");
        // With `default_permissions` and no flag, root could.
        let token = tree.keys().find(|path| path.components().count() == 1 && !path.as_os_str().is_empty()).unwrap();
        let object = tree.keys().find(|path| path.starts_with(token) && path.ends_with("CKA_CLASS")).unwrap().parent().unwrap();
        for write in ["echo x > CKA_LABEL", "rm CKA_CLASS", "mkdir CKA_WRAP_TEMPLATE", "chmod 640 .", "touch .", "rmdir .", "touch .x", "mv CKA_LABEL x",
            "mkdir ../b7e9f2a1-aaaa-bbbb-cccc-111111111111", "ln -s x y", "truncate -s 0 CKA_LABEL"] {
            let mut shell = Command::new("bash");
            shell.args(["-c", write]).env("LC_ALL", "C").current_dir(mount.join(object));
            let said = run_to_fail(&mut shell);
            assert!(said.contains("Read-only file system") || write == "rmdir ." && said.contains("Invalid argument"), "{write}: {said}");
        }
        let options = text_of(tool("findmnt").args(["-no", "OPTIONS"]).arg(mount.path()));
        assert!(options.starts_with("ro,"), "{options}");
        assert!(sh(mount.path(), "df --output=size . | tail -1").trim().parse::<u64>().unwrap() > 0);
        assert_eq!(all_of(mount.path()), before);
        mount.unmount();
    }

    fn waits_for_a_lock_and_names_the_file_that_stays_locked(backend) {
        let (softhsm, mut client) = Softhsm::with_token(backend);
        data(&mut client, "locked");
        client.close().unwrap();
        let token = softhsm.token_directory();
        let path = match backend {
            Backend::File => walk(&token).into_iter().find(|path| path.extension().is_some_and(|e| e == "lock") && !path.ends_with("token.lock")).unwrap(),
            Backend::Db => token.join("sqlite3.db"),
        };
        let lock = Lock::take(backend, &path);
        let mount = |wait: &str| MountOptions::new().argument("--config").argument(&softhsm.conf).option(&format!("snapshot,lock_wait={wait}"));
        let begun = Instant::now();
        let options = mount("0.5");
        let said = options.mount_with(&options.arguments).unwrap_err();
        assert!(begun.elapsed() >= Duration::from_millis(500), "{:?}", begun.elapsed());
        assert!(said.contains("exit status: 1") && said.contains("no snapshot: "), "{said}");
        let named = path.with_extension(if backend == Backend::File { "object" } else { "db" });
        assert!(said.contains(named.to_str().unwrap()), "{said}");
        // One that goes in time is waited for.
        let release = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            drop(lock);
        });
        let options = mount("10");
        let mount = options.mount_with(&options.arguments).unwrap();
        release.join().unwrap();
        assert_same(&expected(&softhsm), &seen(&mount));
        mount.unmount();
    }
}

/// A lock that keeps readers out.
enum Lock {
    File(#[expect(dead_code, reason = "held")] File),
    Db(#[expect(dead_code, reason = "held")] rusqlite::Connection),
}

impl Lock {
    fn take(backend: Backend, path: &Path) -> Self {
        match backend {
            Backend::File => {
                let file = File::options().read(true).write(true).open(path).unwrap();
                let lock = nix::libc::flock {
                    l_type: nix::libc::F_WRLCK as i16,
                    l_whence: nix::libc::SEEK_SET as i16,
                    l_start: 0,
                    l_len: 0,
                    l_pid: 0,
                };
                fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
                Self::File(file)
            }
            Backend::Db => {
                let connection = rusqlite::Connection::open(path).unwrap();
                connection.execute_batch("begin exclusive").unwrap();
                Self::Db(connection)
            }
        }
    }
}

#[test]
fn needs_an_open_file_for_each_object_and_says_so() {
    let (softhsm, mut client) = Softhsm::with_token(Backend::File);
    let attributes = [&labelled("")[..], &[ulong(0, 0)]].concat();
    client.bulk(40, "many", &attributes).unwrap();
    let point = temporary();
    let mount = |limit: u32| {
        let mut shell = Command::new("bash");
        shell
            .arg("-c")
            .arg(format!("ulimit -n {limit}; exec \"$@\""))
            .arg("bash")
            .arg(binary())
            .args(["mount", "--snapshot", "--config"])
            .arg(&softhsm.conf)
            .arg(point.path());
        shell
    };
    let said = run_to_fail(&mut mount(40));
    assert!(said.contains("ulimit -Hn"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    run(&mut mount(100));
    let token = softhsm.token_directory();
    let shown = entries(&point.path().join(token.file_name().unwrap())).unwrap();
    run(tokenfs().arg("umount").arg(point.path()));
    assert_eq!(shown.len(), 41);
}

#[test]
fn shows_damage_as_it_was() {
    let softhsm = Softhsm::golden(Golden::V2_6_1, Backend::File);
    let token = softhsm.token_directories().remove(0);
    fs::write(
        token.join("torn.object"),
        b"\0\0\0\0\0\0\0\x01torn torn torn torn",
    )
    .unwrap();
    let mixed = softhsm.tokendir.join("0-mixed");
    fs::create_dir(&mixed).unwrap();
    fs::write(
        mixed.join("sqlite3.db"),
        "no database at all, and long enough not to be taken for an empty one",
    )
    .unwrap();
    let mount = snapshot_of(&softhsm);
    let name = PathBuf::from(token.file_name().unwrap());
    let check = || {
        for (path, file) in [
            (name.join("torn"), "torn.object"),
            (PathBuf::from("0-mixed"), "sqlite3.db"),
        ] {
            assert!(fs::metadata(mount.join(&path)).unwrap().is_dir());
            let error = entries(&mount.join(&path)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(nix::libc::EIO));
            let log = fs::read_to_string(mount.join(".tokenfs/log")).unwrap();
            assert!(log.contains(file), "{log}");
        }
        let log = fs::read_to_string(mount.join(".tokenfs/log")).unwrap();
        assert!(log.contains("at byte "), "{log}");
    };
    check();
    fs::remove_dir_all(&mixed).unwrap();
    fs::remove_file(token.join("torn.object")).unwrap();
    check();
    mount.unmount();
}
