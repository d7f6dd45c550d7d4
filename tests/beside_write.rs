//! A SoftHSM and a mount that both write: a session that was open before sees what the mount does, and of what SoftHSM does nothing is
//! ever lost.
//!
//! `TOKENFS_TEST_SECONDS` says for how long both write, for each backend.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod mount_common;
mod support;
mod write_common;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use support::independent;
use support::template::{Attribute, boolean, bytes, ulong};
use support::*;
use write_common::*;

const OBJECTS: usize = 6;

fn data(label: &str) -> Vec<Attribute> {
    let application = bytes(CKA_APPLICATION, "0");
    vec![
        ulong(0, 0),
        boolean(1, true),
        boolean(2, false),
        bytes(3, label),
        application,
        bytes(CKA_VALUE, "value"),
    ]
}

/// A value that says which it is, of a length that it determines: torn ones are noticed.
fn text(side: char, number: u64) -> String {
    let times = [1, 40, 2, 500, 1, 3][usize::try_from(number % 6).unwrap()];
    format!("{side}{number}.").repeat(times)
}

#[derive(Debug, Default)]
struct Counts {
    softhsm: AtomicU64,
    ours: AtomicU64,
    overwritten: AtomicU64,
    made: AtomicU64,
    made_by_softhsm: AtomicU64,
    removed: AtomicU64,
    removed_by_softhsm: AtomicU64,
    seen_late: AtomicU64,
}

/// What both sides have agreed that there is.
#[derive(Debug, Default)]
struct Ledger {
    /// Made by SoftHSM and by the mount, to be removed by either.
    present: BTreeSet<String>,
    next: u64,
}

#[derive(Debug)]
struct Scene {
    token: PathBuf,
    by_label: PathBuf,
    objects: Vec<PathBuf>,
    ledger: Mutex<Ledger>,
    counts: Counts,
    over: AtomicBool,
    until: Instant,
}

impl Scene {
    fn goes_on(&self) -> bool {
        Instant::now() < self.until && !self.over.load(Relaxed)
    }

    /// SoftHSM's side: labels of the objects that stay, and objects that come and go.
    fn softhsm(&self, client: &mut P11, handles: &[u64]) -> Vec<String> {
        let mut last: Vec<String> = (0..handles.len())
            .map(|index| format!("o{index}"))
            .collect();
        let mut round = 0;
        while self.goes_on() {
            round += 1;
            let index = usize::try_from(round * 7 % handles.len() as u64).unwrap();
            let (handle, object) = (handles[index], &self.objects[index]);
            let seen = client.label(handle).unwrap().unwrap();
            assert_eq!(
                String::from_utf8_lossy(&seen),
                last[index],
                "round {round}: SoftHSM's own change of {} is lost, says SoftHSM",
                object.display()
            );
            let label = text('s', round);
            client
                .set_label(handle, &label)
                .unwrap_or_else(|why| panic!("round {round}: C_SetAttributeValue: {why:?}"));
            last[index] = label;
            self.counts.softhsm.fetch_add(1, Relaxed);
            match round % 16 {
                3 => {
                    let label = self.name('s');
                    client
                        .create(&data(&label))
                        .unwrap_or_else(|why| panic!("round {round}: C_CreateObject: {why:?}"));
                    self.ledger.lock().unwrap().present.insert(label);
                    self.counts.made_by_softhsm.fetch_add(1, Relaxed);
                }
                11 => {
                    // Each label has one taker, so that both do not remove the same.
                    let Some(label) = self.take() else { continue };
                    // A SoftHSM that raises the token's generation itself steps over a change of it that it has not seen yet,
                    // and lists the token again only when that is told once more (Generation::commit).
                    let mut found = Vec::new();
                    let deadline = Instant::now() + SOON;
                    while found.is_empty() && Instant::now() < deadline && self.goes_on() {
                        found = client.find_label(&label).unwrap();
                        if found.is_empty() {
                            self.counts.seen_late.fetch_add(1, Relaxed);
                            std::thread::sleep(Duration::from_millis(20));
                        }
                    }
                    if found.is_empty() && !self.goes_on() {
                        self.ledger.lock().unwrap().present.insert(label);
                        continue;
                    }
                    assert_eq!(
                        found.len(),
                        1,
                        "round {round}: {label} was made, and a live session finds {found:?}"
                    );
                    client.destroy(found[0]).unwrap_or_else(|why| {
                        panic!("round {round}: C_DestroyObject of {label}: {why:?}")
                    });
                    self.counts.removed_by_softhsm.fetch_add(1, Relaxed);
                }
                _ => {}
            }
        }
        last
    }

    fn name(&self, side: char) -> String {
        let mut ledger = self.ledger.lock().unwrap();
        ledger.next += 1;
        format!("{side}-{}", ledger.next)
    }

    fn take(&self) -> Option<String> {
        let mut ledger = self.ledger.lock().unwrap();
        if ledger.present.len() < 4 {
            return None;
        }
        // Of either side in turn.
        if ledger.next.is_multiple_of(2) {
            ledger.present.pop_first()
        } else {
            ledger.present.pop_last()
        }
    }

    /// Our side: another attribute of the same objects.
    fn changes(&self, backend: Backend) {
        let mut last: Vec<String> = vec!["0".to_owned(); self.objects.len()];
        let mut round = 0;
        while self.goes_on() {
            round += 1;
            let index = usize::try_from(round * 5 % last.len() as u64).unwrap();
            let path = self.objects[index].join("CKA_APPLICATION");
            let seen = String::from_utf8(
                fs::read(&path).unwrap_or_else(|e| panic!("reading {}: {e}", path.display())),
            )
            .unwrap();
            if seen != last[index] {
                assert_eq!(
                    backend,
                    Backend::File,
                    "round {round}: a change of ours is lost on db"
                );
                self.counts.overwritten.fetch_add(1, Relaxed);
            }
            let value = text('m', round);
            fs::write(&path, &value)
                .unwrap_or_else(|e| panic!("round {round}: writing {}: {e}", path.display()));
            last[index] = value;
            self.counts.ours.fetch_add(1, Relaxed);
        }
        // The last ones count too.
        std::thread::sleep(Duration::from_millis(200));
        for (object, last) in self.objects.iter().zip(&last) {
            if fs::read(object.join("CKA_APPLICATION")).unwrap() != last.as_bytes() {
                assert_eq!(backend, Backend::File, "a change of ours is lost on db");
                self.counts.overwritten.fetch_add(1, Relaxed);
            }
        }
    }

    /// Our side: objects that come and go.
    fn comes_and_goes(&self) {
        let mut round = 0_u64;
        while self.goes_on() {
            round += 1;
            if round.is_multiple_of(2) {
                let Some(label) = self.take() else { continue };
                let link = self.by_label.join(format!("{label}.data"));
                let mut target = None;
                eventually(SOON, &format!("{label} below by-label"), || {
                    target = fs::canonicalize(&link).ok();
                    target.is_some()
                });
                let target = target.unwrap();
                if round.is_multiple_of(4) {
                    let gone = self.token.join(format!(".gone-{label}"));
                    fs::rename(&target, gone).unwrap_or_else(|e| panic!("mv {label} .gone: {e}"));
                } else {
                    // A SoftHSM that lists the object meanwhile stores what it misses in it, which is then in the way.
                    let mut outcome = Ok(());
                    eventually(SOON, &format!("rm -r {label}"), || {
                        outcome = fs::remove_dir_all(&target);
                        !matches!(&outcome, Err(error) if error.raw_os_error() == Some(libc::ENOTEMPTY))
                    });
                    outcome.unwrap_or_else(|e| panic!("rm -r {label}: {e}"));
                    File::open(&self.token).unwrap().sync_all().unwrap();
                }
                self.counts.removed.fetch_add(1, Relaxed);
            } else {
                let label = self.name('m');
                let directory = self.token.join(
                    uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, label.as_bytes()).to_string(),
                );
                fs::create_dir(&directory).unwrap_or_else(|e| panic!("mkdir {label}: {e}"));
                for (name, content) in [
                    ("CKA_CLASS", "CKO_DATA\n"),
                    ("CKA_TOKEN", "true\n"),
                    ("CKA_PRIVATE", "false\n"),
                    ("CKA_MODIFIABLE", "true\n"),
                    ("CKA_COPYABLE", "true\n"),
                    ("CKA_DESTROYABLE", "true\n"),
                    ("CKA_VALUE", "value"),
                    ("CKA_LABEL", &label),
                ] {
                    fs::write(directory.join(name), content)
                        .unwrap_or_else(|e| panic!("{label}: {name}: {e}"));
                }
                File::open(&directory)
                    .unwrap()
                    .sync_all()
                    .unwrap_or_else(|e| panic!("{label}: fsync: {e}"));
                self.ledger.lock().unwrap().present.insert(label);
                self.counts.made.fetch_add(1, Relaxed);
            }
        }
    }
}

/// How many changes of ours the log says that SoftHSM overwrote.
fn logged(log: &str) -> u64 {
    let lines = log
        .lines()
        .filter(|line| line.contains("overwrote a change"));
    lines
        .map(|line| {
            let times = line
                .rsplit_once('(')
                .and_then(|(_, end)| end.strip_suffix(" times)"));
            times.map_or(1, |times| times.parse().unwrap_or(1))
        })
        .sum()
}

both_backends! {
    fn nothing_of_softhsms_is_lost(backend) {
        let (softhsm, mut client) = Softhsm::with_token(backend);
        let handles: Vec<u64> = (0..OBJECTS).map(|index| client.create(&data(&format!("o{index}"))).unwrap()).collect();
        let mount = Mount::new(&softhsm);
        let name = softhsm.token_directory();
        let token = mount.join(name.file_name().unwrap());
        let by_label = mount.join(".tokenfs/by-label/test");
        let objects = (0..OBJECTS).map(|index| fs::canonicalize(by_label.join(format!("o{index}.data"))).unwrap());
        let scene = Scene {
            objects: objects.collect(),
            token,
            by_label,
            ledger: Mutex::default(),
            counts: Counts::default(),
            over: AtomicBool::new(false),
            until: Instant::now() + lasting(10, 60),
        };
        let mut labels = Vec::new();
        std::thread::scope(|scope| {
            let ours = [scope.spawn(|| Guarded(&scene).run(|s| s.changes(backend))), scope.spawn(|| Guarded(&scene).run(Scene::comes_and_goes))];
            labels = Guarded(&scene).run(|s| s.softhsm(&mut client, &handles));
            let [changes, comings] = ours.map(std::thread::ScopedJoinHandle::join);
            for result in [changes, comings] {
                result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            }
        });
        std::thread::sleep(HELD);
        let counts = &scene.counts;
        let rounds = counts.softhsm.load(Relaxed) + counts.ours.load(Relaxed);
        let overwritten = counts.overwritten.load(Relaxed);
        let log = || fs::read_to_string(mount.join(".tokenfs/log")).unwrap();
        report!("{backend}: {rounds} rounds, {overwritten} changes of ours overwritten by a stale SoftHSM, {} of them in the log; {counts:?}", logged(&log()));
        // Every object that there is to be is there, and no other; each label is the last that SoftHSM has set.
        let stored = softhsm.read().into_values().next().unwrap();
        assert!(stored.damaged.is_empty(), "{:?}", stored.damaged);
        let found: BTreeSet<String> = stored.objects.values().map(|object| {
            let label = independent::get_bytes(object, 3).unwrap_or_default();
            String::from_utf8_lossy(label).into_owned()
        }).collect();
        let wanted: BTreeSet<String> = scene.ledger.lock().unwrap().present.iter().cloned().chain(labels.iter().cloned()).collect();
        let lost: Vec<_> = wanted.difference(&found).collect();
        let more: Vec<_> = found.difference(&wanted).collect();
        assert!(lost.is_empty() && more.is_empty(), "{backend}: lost {lost:?}, came back or were never agreed on {more:?}");
        assert_eq!(stored.objects.len(), wanted.len(), "objects with the same label");
        // A live session on db has what PKCS #11 calls not modifiable from its cache.
        let mut fresh = softhsm.p11();
        fresh.open("test", Some(PIN)).unwrap();
        agree(&softhsm, name.file_name().unwrap().to_str().unwrap(), &mut fresh);
        eventually(SOON, "the log has all that was overwritten", || logged(&log()) >= overwritten);
        if backend == Backend::Db {
            assert_eq!((overwritten, logged(&log())), (0, 0), "{}", log());
        }
        assert!(rounds > 500, "only {rounds} rounds");
        assert!(counts.made.load(Relaxed) > 10 && counts.removed_by_softhsm.load(Relaxed) > 2, "{counts:?}");
        let left = leftovers(&softhsm.tokendir);
        assert!(left.is_empty(), "{left:?}");
        mount.unmount();
    }

    fn a_session_that_is_open_sees_each_change_at_once(backend) {
        let mut bench = Bench::new(backend);
        let (data, public, private) = bench.handles;
        for round in 0..200 {
            let label = text('m', round);
            fs::write(bench.of_data("CKA_LABEL"), &label).unwrap();
            let seen = bench.client.label(data).unwrap().unwrap();
            assert_eq!(String::from_utf8_lossy(&seen), label, "round {round}: a live session after a change through the mount");
            let theirs = text('s', round);
            bench.client.set_label(data, &theirs).unwrap();
            assert_eq!(bench.stored_or_locked("CKA_LABEL"), theirs.as_bytes(), "round {round}: SoftHSM's change in the store");
            let deadline = Instant::now() + SOON;
            let path = bench.of_data("CKA_LABEL");
            while fs::read(&path).unwrap() != theirs.as_bytes() {
                let shown = fs::read(&path).unwrap();
                let stored = bench.stored_or_locked("CKA_LABEL");
                assert!(
                    Instant::now() < deadline,
                    "round {round}: SoftHSM set {theirs:?}, the store has {}, and after {SOON:?} the mount shows {}",
                    stored.escape_ascii(), shown.escape_ascii()
                );
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        // A usage flag takes effect in a live session.
        fs::write(bench.at(&bench.private).join("CKA_SIGN"), "false\n").unwrap();
        let refused = bench.client.sign(private, CKM_ECDSA, &[7; 32]);
        assert!(refused.is_err(), "a live session signs with a key that may not sign any more");
        fs::write(bench.at(&bench.private).join("CKA_SIGN"), "true\n").unwrap();
        bench.assert_signs(private);
        // Removal.
        bench.quiet("mv $p .gone");
        assert!(bench.client.verify(public, CKM_ECDSA, &[7; 32], &[0; 64]).is_err(), "a live session uses a key that was removed");
        assert_eq!(bench.client.find_label("public").unwrap(), [0_u64; 0]);
        bench.quiet("mv .gone $p");
        bench.settle();
        assert_eq!(bench.client.find_label("public").unwrap().len(), 1, "what was brought back");
    }

    fn what_the_mount_makes_a_session_uses(backend) {
        let mut bench = Bench::new(backend);
        for round in 0..10_u8 {
            let name = format!("00000000-0000-4000-8000-0000000000{round:02x}");
            bench.quiet(&format!("cp -a $k {name}"));
            let mut keys = Vec::new();
            eventually(SOON, "the copy of a key in a live session", || {
                keys = bench.client.find_label("private").unwrap();
                keys.len() == 2
            });
            let copy = *keys.iter().find(|key| **key != bench.handles.2).unwrap();
            bench.assert_signs(copy);
            bench.client.set_label(copy, "changed by softhsm").unwrap();
            eventually(SOON, "the change in the mount", || {
                let label = fs::read(bench.at(&name).join("CKA_LABEL"));
                label.is_ok_and(|label| Ok(label) != fs::read(bench.at(&bench.private).join("CKA_LABEL")).map_err(|_| ()))
            });
            bench.assert_signs(copy);
            // On db SoftHSM copies nothing but the class (DBObject::nextAttributeType).
            let another = (backend == Backend::File)
                .then(|| bench.client.copy(copy, &[bytes(3, "copied by softhsm")]).unwrap());
            if let Some(another) = another {
                bench.assert_signs(another);
            }
            bench.client.destroy(copy).unwrap();
            eventually(SOON, "its end in the mount", || !bench.at(&name).exists());
            if let Some(another) = another {
                bench.client.destroy(another).unwrap();
            }
            bench.assert_signs(bench.handles.2);
            let left = leftovers(&bench.softhsm.tokendir);
            assert!(left.is_empty(), "round {round}: {left:?}");
        }
        bench.settle();
        bench.assert_sessions_agree();
    }

    fn logins_and_the_tokens_own_attributes_go_together(backend) {
        // Each login writes the token's own object; so do we.
        let bench = Bench::new(backend);
        let over = Instant::now() + lasting(3, 20);
        let path = bench.at("token/CKA_OS_TOKENLABEL");
        let (mut ours, mut logins) = (0, 0);
        let mut other = bench.softhsm.p11();
        let serial = other.tokens().unwrap()[0].1.clone();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut count = 0_u32;
                while Instant::now() < over {
                    count += 1;
                    fs::write(&path, format!("{:32}", format!("label {count}"))).unwrap();
                }
                count
            });
            while Instant::now() < over {
                other.open(&serial, Some(PIN)).unwrap_or_else(|why| panic!("login {logins}: {why:?}"));
                assert_eq!(other.find(&[]).unwrap().len(), 3, "login {logins}");
                logins += 1;
            }
            ours = writer.join().unwrap();
        });
        report!("{backend}: {ours} changes of the token's label beside {logins} logins");
        let stored = bench.softhsm.read().remove(&bench.token).unwrap();
        let label = independent::get_bytes(&stored.token, independent::CKA_OS_TOKENLABEL).unwrap().to_vec();
        assert_eq!(label.len(), 32);
        if backend == Backend::Db {
            assert_eq!(String::from_utf8(label).unwrap().trim_end(), format!("label {ours}"));
        }
        assert!(independent::token_key(&stored, independent::CKA_OS_USERPIN, PIN).is_some(), "the PIN is there");
    }
}

impl Bench {
    fn stored_or_locked(&self, name: &str) -> Vec<u8> {
        self.stored_data(name).unwrap_or_default()
    }
}

/// Ends all sides when one fails.
struct Guarded<'a>(&'a Scene);

impl Guarded<'_> {
    fn run<T>(self, side: impl FnOnce(&Scene) -> T) -> T {
        side(self.0)
    }
}

impl Drop for Guarded<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.over.store(true, Relaxed);
        }
    }
}

#[test]
fn the_log_is_counted() {
    let log = "2026 warning: a: SoftHSM overwrote a change of CKA_LABEL (3 times)\n2026 warning: b: SoftHSM overwrote a change\nx\n";
    assert_eq!(logged(log), 4);
    assert!(Path::new("/").is_absolute());
}
