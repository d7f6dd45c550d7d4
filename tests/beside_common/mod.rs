//! What is known of the objects that a SoftHSM works on, and readers who hold a mount to it.
#![allow(dead_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Each label says which it is in its first characters, and repeats them to a length that they determine.
pub fn label(number: usize) -> String {
    let times = [1, 66, 2, 40, 1, 1500][number % 6];
    format!("{number:05x}.").repeat(times)
}

/// The number of a label, if it is one and whole.
pub fn number(label: &[u8]) -> Option<usize> {
    let text = str::from_utf8(label.get(..5)?).ok()?;
    let number = usize::from_str_radix(text, 16).ok()?;
    (self::label(number).as_bytes() == label).then_some(number)
}

/// What SoftHSM has been told to do with an object.
#[derive(Debug)]
pub struct Story {
    pub kind: &'static str,
    /// When the call that made it had returned.
    pub made: Option<Instant>,
    /// When its label was last told to change, and when that had returned.
    pub changing: Option<Instant>,
    pub changed: Option<Instant>,
    /// When it was told to go.
    pub going: Option<Instant>,
}

#[derive(Debug, Default)]
pub struct World {
    /// Which object has, had, or is to have a label.
    pub labels: BTreeMap<usize, usize>,
    pub objects: BTreeMap<usize, Story>,
    /// The objects of the directories that a reader has recognised.
    pub directories: BTreeMap<PathBuf, usize>,
    /// What vanished before anybody knew what it was.
    pub vanished: BTreeSet<PathBuf>,
    /// All attributes of an object of a kind.
    pub complete: BTreeMap<&'static str, BTreeSet<OsString>>,
}

#[derive(Debug, Default)]
pub struct Counts {
    pub rounds: AtomicU64,
    pub objects: AtomicU64,
    pub reads: AtomicU64,
    pub growing: AtomicU64,
    pub vanished: AtomicU64,
    pub resized: AtomicU64,
}

#[derive(Debug)]
pub struct Scene {
    pub token: PathBuf,
    pub world: Mutex<World>,
    pub counts: Counts,
    pub over: AtomicBool,
}

/// One sequence of open, fstat, and reads to the end: the size and the content.
pub fn whole(path: &Path, buffer: usize) -> io::Result<(u64, Vec<u8>)> {
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

pub fn list(directory: &Path) -> io::Result<BTreeSet<OsString>> {
    fs::read_dir(directory)?
        .map(|entry| Ok(entry?.file_name()))
        .collect()
}

impl Scene {
    pub fn world<T>(&self, look: impl FnOnce(&mut World) -> T) -> T {
        look(&mut self.world.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// Only what is on its way out may be missing; nothing else may go wrong at all.
    pub fn excuse(&self, directory: &Path, path: &Path, error: &io::Error) {
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
    pub fn visit(&self, directory: &Path, buffer: usize) {
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
            if listed.is_empty() && story.going.is_some() {
                // It was destroyed between opening its directory and reading it: that is empty then, as any that was removed.
                self.counts.vanished.fetch_add(1, Relaxed);
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
    pub fn read(&self, buffer: usize) {
        while !self.over.load(Relaxed) {
            let objects = list(&self.token).unwrap_or_else(|e| panic!("listing the token: {e}"));
            for name in objects.iter().filter(|name| *name != "token") {
                self.visit(&self.token.join(name), buffer);
            }
            self.counts.rounds.fetch_add(1, Relaxed);
        }
    }

    /// The token's own attributes, which each login writes.
    pub fn read_token(&self, calm: &BTreeMap<OsString, Vec<u8>>) {
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
