//! Readers of a mount beside a SoftHSM that works: whatever they see is something that SoftHSM has written, and the whole of it.
//!
//! `TOKENFS_TEST_SECONDS` says for how long, for each backend.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod beside_common;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use beside_common::{Counts, Scene, Story, label, list, number};
use support::independent;
use support::template::{Attribute, boolean, bytes, ulong};
use support::*;

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
        let (id, label_number) = (self.labels, self.labels + 1);
        let story = Story {
            kind,
            made: None,
            changing: None,
            changed: None,
            going: None,
        };
        self.scene.world(|world| world.objects.insert(id, story));
        let label_text = self.next_label(id);
        assert_eq!(label_text, label(label_number));
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
                if step.is_multiple_of(5) {
                    std::thread::sleep(Duration::from_millis(30));
                }
            }
            scene.over.store(true, Relaxed);
        });
        report!("{backend}: {made} made, {relabelled} relabelled, {destroyed} destroyed, {logins} logins; {:?}", scene.counts);
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
