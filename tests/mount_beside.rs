//! Readers of a mount beside a SoftHSM that works: whatever they see is something that SoftHSM has written, and the whole of it.
//!
//! `TOKENFS_TEST_SECONDS` says for how long, for each backend.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use support::independent;
use support::template::{Attribute, boolean, bytes, ulong};
use support::*;

/// Each label says which it is in its first characters, and repeats them to a length that they determine.
fn label(number: usize) -> String {
    let times = [1, 66, 2, 40, 1, 1500][number % 6];
    format!("{number:05x}.").repeat(times)
}

/// The number of a label, if it is one and whole.
fn number(label: &[u8]) -> Option<usize> {
    let text = str::from_utf8(label.get(..5)?).ok()?;
    let number = usize::from_str_radix(text, 16).ok()?;
    (self::label(number).as_bytes() == label).then_some(number)
}

/// What SoftHSM has been told to do with an object.
#[derive(Debug)]
struct Story {
    kind: &'static str,
    /// When the call that made it had returned.
    made: Option<Instant>,
    /// When its label was last told to change, and when that had returned.
    changing: Option<Instant>,
    changed: Option<Instant>,
    /// When it was told to go.
    going: Option<Instant>,
}

#[derive(Debug, Default)]
struct World {
    /// Which object has, had, or is to have a label.
    labels: BTreeMap<usize, usize>,
    objects: BTreeMap<usize, Story>,
    /// The objects of the directories that a reader has recognised.
    directories: BTreeMap<PathBuf, usize>,
    /// What vanished before anybody knew what it was.
    vanished: BTreeSet<PathBuf>,
    /// All attributes of an object of a kind.
    complete: BTreeMap<&'static str, BTreeSet<OsString>>,
}

#[derive(Debug, Default)]
struct Counts {
    rounds: AtomicU64,
    objects: AtomicU64,
    reads: AtomicU64,
    growing: AtomicU64,
    vanished: AtomicU64,
    resized: AtomicU64,
}

#[derive(Debug)]
struct Scene {
    token: PathBuf,
    world: Mutex<World>,
    counts: Counts,
    over: AtomicBool,
}

/// One sequence of open, fstat, and reads to the end: the size and the content.
fn whole(path: &Path, buffer: usize) -> io::Result<(u64, Vec<u8>)> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    let (mut content, mut piece) = (Vec::new(), vec![0; buffer]);
    loop {
        match file.read(&mut piece)? {
            0 => return Ok((size, content)),
            count => content.extend_from_slice(&piece[..count]),
        }
    }
}

fn list(directory: &Path) -> io::Result<BTreeSet<OsString>> {
    fs::read_dir(directory)?
        .map(|entry| Ok(entry?.file_name()))
        .collect()
}

impl Scene {
    fn world<T>(&self, look: impl FnOnce(&mut World) -> T) -> T {
        look(&mut self.world.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// Only what is on its way out may be missing; nothing else may go wrong at all.
    fn excuse(&self, directory: &Path, path: &Path, error: &io::Error) {
        assert_eq!(
            error.raw_os_error(),
            Some(libc::ENOENT),
            "{}: {error}",
            path.display()
        );
        self.counts.vanished.fetch_add(1, Relaxed);
        self.world(|world| match world.directories.get(directory) {
            Some(id) => assert!(
                world.objects[id].going.is_some(),
                "{} is missing in an object that stays",
                path.display()
            ),
            None => {
                world.vanished.insert(directory.to_owned());
            }
        });
    }

    /// Reads all of an object.
    fn visit(&self, directory: &Path, buffer: usize) {
        let start = Instant::now();
        let listed = match list(directory) {
            Ok(listed) => listed,
            Err(error) => return self.excuse(directory, directory, &error),
        };
        let mut seen = None;
        let mut sizes = Vec::new();
        for name in &listed {
            let path = directory.join(name);
            if name.as_encoded_bytes().ends_with(b"_TEMPLATE") {
                match list(&path) {
                    Ok(map) => assert!(map.is_empty(), "{} has {map:?}", path.display()),
                    Err(error) => return self.excuse(directory, &path, &error),
                }
                continue;
            }
            let begun = Instant::now();
            let (size, content) = match whole(&path, buffer) {
                Ok(read) => read,
                Err(error) => return self.excuse(directory, &path, &error),
            };
            self.counts.reads.fetch_add(1, Relaxed);
            if name == "CKA_LABEL" {
                seen = Some((begun, size, content));
            } else if size != content.len() as u64 {
                sizes.push(format!(
                    "{}: {size} bytes in stat, {} read",
                    path.display(),
                    content.len()
                ));
            }
        }
        self.counts.objects.fetch_add(1, Relaxed);
        self.world(|world| {
            let known = world.directories.get(directory).copied();
            let id = match &seen {
                // SoftHSM stores a new object with an empty label first.
                Some((_, _, content)) if content.is_empty() => known,
                Some((_, _, content)) => {
                    let number = number(content).unwrap_or_else(|| {
                        let text = content.escape_ascii();
                        panic!(
                            "{}: not a whole label, {} bytes: {text}",
                            directory.display(),
                            content.len()
                        )
                    });
                    let id = *world
                        .labels
                        .get(&number)
                        .expect("a label that nobody has set");
                    assert!(
                        known.is_none_or(|known| known == id),
                        "the label of another object"
                    );
                    world.directories.insert(directory.to_owned(), id);
                    Some(id)
                }
                None => known,
            };
            let Some((id, story)) = id.map(|id| (id, &world.objects[&id])) else {
                self.counts.growing.fetch_add(1, Relaxed);
                return;
            };
            if story.made.is_none_or(|made| made >= start) {
                self.counts.growing.fetch_add(1, Relaxed);
                return;
            }
            assert_eq!(
                listed, world.complete[story.kind],
                "object {id}, a {}, is not complete",
                story.kind
            );
            assert!(sizes.is_empty(), "{sizes:?}");
            let (begun, size, content) = seen.expect("a label");
            assert!(!content.is_empty(), "the label of object {id} is empty");
            if size != content.len() as u64 {
                // Only if it has become another between the two questions.
                self.counts.resized.fetch_add(1, Relaxed);
                let limit = Duration::from_secs(1);
                let around = story.changing.is_some()
                    && story.changed.is_none_or(|changed| {
                        changed + limit > begun || story.changing > Some(changed)
                    });
                assert!(
                    around,
                    "object {id}: {size} bytes in stat, {} read, and nothing has changed",
                    content.len()
                );
            }
        });
    }

    /// Goes round until it is over.
    fn read(&self, buffer: usize) {
        while !self.over.load(Relaxed) {
            let objects = list(&self.token).unwrap_or_else(|e| panic!("listing the token: {e}"));
            for name in objects.iter().filter(|name| *name != "token") {
                self.visit(&self.token.join(name), buffer);
            }
            self.counts.rounds.fetch_add(1, Relaxed);
        }
    }

    /// The token's own attributes, which each login writes.
    fn read_token(&self, calm: &BTreeMap<OsString, Vec<u8>>) {
        while !self.over.load(Relaxed) {
            let directory = self.token.join("token");
            assert!(
                list(&directory)
                    .expect("listing token/")
                    .iter()
                    .eq(calm.keys()),
                "token/ is not complete"
            );
            for (name, value) in calm {
                let path = directory.join(name);
                let (_, content) =
                    whole(&path, 4096).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                self.counts.reads.fetch_add(1, Relaxed);
                if name == "CKA_OS_TOKENFLAGS" {
                    let text = String::from_utf8(content).unwrap();
                    let low = text.replace("CKF_USER_PIN_COUNT_LOW\n", "");
                    assert_eq!(low.as_bytes(), value, "flags: {text}");
                } else {
                    assert!(
                        content == *value,
                        "{} is {}",
                        path.display(),
                        content.escape_ascii()
                    );
                }
            }
        }
    }
}

/// The working SoftHSM.
#[derive(Debug)]
struct Driver<'a> {
    client: P11,
    scene: &'a Scene,
    labels: usize,
    objects: Vec<(usize, u64)>,
}

impl Driver<'_> {
    fn next_label(&mut self, id: usize) -> String {
        self.labels += 1;
        let number = self.labels;
        self.scene.world(|world| world.labels.insert(number, id));
        label(number)
    }

    fn make(&mut self, kind: &'static str) {
        let (id, label) = (self.labels, self.labels + 1);
        let story = Story {
            kind,
            made: None,
            changing: None,
            changed: None,
            going: None,
        };
        self.scene.world(|world| world.objects.insert(id, story));
        let label_text = self.next_label(id);
        assert_eq!(label_text, self::label(label));
        let public = |label: &str| vec![boolean(1, true), boolean(2, false), bytes(3, label)];
        let with = |more: &[Attribute]| [&public(&label_text)[..], more].concat();
        let handle = match kind {
            "data" => self
                .client
                .create(&with(&[ulong(0, 0), bytes(0x11, "value")]))
                .unwrap(),
            "aes" => self
                .client
                .generate(0x1080, &with(&[ulong(0x161, 32)]))
                .unwrap(),
            _ => {
                // Without a label nobody takes it for one of ours.
                let secret = [boolean(1, true), boolean(2, false), bytes(3, "")];
                let size = [ulong(0x121, 1024), bytes(0x122, [1, 0, 1])];
                let (public, private) =
                    self.client.generate_pair(0, &with(&size), &secret).unwrap();
                self.client.destroy(private).unwrap();
                public
            }
        };
        self.scene
            .world(|world| world.objects.get_mut(&id).unwrap().made = Some(Instant::now()));
        self.objects.push((id, handle));
    }

    fn relabel(&mut self, which: usize) {
        let (id, handle) = self.objects[which % self.objects.len()];
        let label = self.next_label(id);
        let now = |set: fn(&mut Story, Instant)| {
            self.scene
                .world(|world| set(world.objects.get_mut(&id).unwrap(), Instant::now()))
        };
        now(|story, at| story.changing = Some(at));
        self.client.set_label(handle, &label).unwrap();
        now(|story, at| story.changed = Some(at));
    }

    fn destroy(&mut self, which: usize) {
        let (id, handle) = self.objects.remove(which % self.objects.len());
        self.scene
            .world(|world| world.objects.get_mut(&id).unwrap().going = Some(Instant::now()));
        self.client.destroy(handle).unwrap();
    }

    /// Finds the objects of a session that has logged in anew.
    fn log_in(&mut self) {
        self.client.open("test", Some("wrong")).unwrap_err();
        self.client.open("test", Some(PIN)).unwrap();
        let found = self.client.find(&[boolean(2, false)]).unwrap();
        let of = |label: &[u8]| {
            self.scene
                .world(|world| world.labels[&number(label).unwrap()])
        };
        self.objects = found
            .iter()
            .map(|f| (of(f.label.as_ref().unwrap()), f.handle))
            .collect();
        self.objects.sort_unstable();
    }
}

both_backends! {
    fn readers_see_nothing_but_whole_versions(backend) {
        let seconds = std::env::var("TOKENFS_TEST_SECONDS").map(|text| text.parse().expect("TOKENFS_TEST_SECONDS"));
        let lasting = Duration::from_secs(seconds.unwrap_or(if full() { 60 } else { 10 }));
        let (softhsm, client) = Softhsm::with_token(backend);
        let mount = Mount::new(&softhsm);
        let token = mount.join(softhsm.token_directory().file_name().unwrap());
        let scene = Scene {
            token: token.clone(),
            world: Mutex::default(),
            counts: Counts::default(),
            over: AtomicBool::new(false),
        };
        let mut driver = Driver { client, scene: &scene, labels: 0, objects: Vec::new() };
        // What is complete is found out while nothing happens, and agreed on with somebody else.
        for kind in ["data", "aes", "rsa"] {
            let before = list(&token).unwrap();
            driver.make(kind);
            let mut fresh = BTreeSet::new();
            eventually(Duration::from_secs(1), "the first objects", || {
                fresh = list(&token).unwrap().difference(&before).cloned().collect();
                fresh.len() == 1
            });
            let attributes = list(&token.join(fresh.first().unwrap())).unwrap();
            let stored: Vec<usize> = softhsm.read().values().flat_map(|t| t.objects.values().map(Vec::len)).collect();
            assert!(stored.contains(&attributes.len()), "{kind}: {attributes:?}, {stored:?}");
            assert!(attributes.len() > 5 && independent::CKA_LABEL == 3);
            scene.world(|world| world.complete.insert(kind, attributes));
        }
        driver.log_in();
        let calm = list(&token.join("token")).unwrap().into_iter().map(|name| {
            let value = fs::read(token.join("token").join(&name)).unwrap();
            (name, value)
        });
        let calm: BTreeMap<_, _> = calm.collect();
        assert_eq!(calm.len(), 5);
        let (mut made, mut relabelled, mut destroyed, mut logins) = (0, 0, 0, 0);
        std::thread::scope(|scope| {
            let readers = [
                scope.spawn(|| scene.read(100)),
                scope.spawn(|| scene.read(4096)),
                scope.spawn(|| scene.read(1 << 17)),
                scope.spawn(|| scene.read_token(&calm)),
            ];
            let start = Instant::now();
            let mut step: usize = 0;
            while start.elapsed() < lasting && !readers.iter().any(std::thread::ScopedJoinHandle::is_finished) {
                step += 1;
                match step % 16 {
                    0 => { driver.log_in(); logins += 1; }
                    3 | 9 => { driver.make(["data", "aes", "rsa"][step / 3 % 3]); made += 1; }
                    5 | 11 if driver.objects.len() > 6 => { driver.destroy(step * 7); destroyed += 1; }
                    _ => { driver.relabel(step * 5); relabelled += 1; }
                }
                // Now and then there is time to answer from caches.
                if step % 5 == 0 {
                    std::thread::sleep(Duration::from_millis(30));
                }
            }
            scene.over.store(true, Relaxed);
        });
        println!("{backend}: {made} made, {relabelled} relabelled, {destroyed} destroyed, {logins} logins; {:?}", scene.counts);
        scene.world(|world| {
            for directory in &world.vanished {
                assert!(!directory.exists(), "{} was missing for a while", directory.display());
            }
        });
        // In the end the mount says what the store says.
        let stored: BTreeSet<Vec<u8>> = softhsm.read().values().flat_map(|t| t.objects.values()).map(|object| {
            independent::get_bytes(object, independent::CKA_LABEL).unwrap().to_vec()
        }).collect();
        eventually(Duration::from_secs(1), "the last state", || {
            let objects = list(&token).unwrap();
            let labels = objects.iter().filter(|n| *n != "token").map(|n| fs::read(token.join(n).join("CKA_LABEL")));
            labels.collect::<io::Result<BTreeSet<_>>>().is_ok_and(|labels| labels == stored)
        });
        assert!(scene.counts.reads.load(Relaxed) > 1000 && relabelled > 10 && destroyed > 0 && logins > 0);
        mount.unmount();
    }
}
