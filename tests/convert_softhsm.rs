//! What `tokenfs convert` makes is a token to a real SoftHSM, which may be at work on the source meanwhile; and what it makes before it is
//! killed is none.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod check_common;
mod convert_common;
mod mount_common;
mod support;
mod write_common;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use check_common::{Checked, data_object};
use convert_common::*;
use support::independent::{self, CKA_LABEL};
use support::template::{boolean, bytes};
use support::*;
use write_common::{CKM_EC_KEY_PAIR_GEN, CKM_ECDSA, CURVE, agree, fill, lasting, leftovers};

/// A SoftHSM with an empty store.
fn empty(backend: Backend) -> Softhsm {
    Softhsm::new(backend)
}

both_backends! {
    fn softhsm_works_with_a_converted_token_and_with_it_converted_back(backend) {
        for to in BACKENDS {
            let (softhsm, mut client) = Softhsm::with_token(backend);
            let (_, public, _) = fill(&mut client);
            let token = names(&softhsm.tokendir).remove(0);
            let (new, back) = (empty(to), empty(backend));
            converted(&softhsm.tokendir, &new.tokendir, to);
            assert_same(&softhsm.tokendir, &new.tokendir);
            assert!(leftovers(&new.tokendir).is_empty());

            let mut second = new.p11();
            second.open("test", Some(PIN)).unwrap();
            agree(&new, &token, &mut second);
            let key = second.find_label("private").unwrap()[0];
            let signature = second.sign(key, CKM_ECDSA, b"0123456789abcdef").unwrap();
            assert!(client.verify(public, CKM_ECDSA, b"0123456789abcdef", &signature).unwrap());
            second.set_label(key, "changed").unwrap();
            let data = second.find_label("data").unwrap()[0];
            second.destroy(data).unwrap();
            second.create(&data_object("new")).unwrap();
            agree(&new, &token, &mut second);
            drop(second);
            assert_clean(&new.tokendir, to);

            converted(&new.tokendir, &back.tokendir, backend);
            assert_same(&new.tokendir, &back.tokendir);
            let mut third = back.p11();
            third.open("test", Some(PIN)).unwrap();
            agree(&back, &token, &mut third);
            let key = third.find_label("changed").unwrap()[0];
            let signature = third.sign(key, CKM_ECDSA, b"0123456789abcdef").unwrap();
            assert!(client.verify(public, CKM_ECDSA, b"0123456789abcdef", &signature).unwrap());
            assert_eq!(third.find_label("new").unwrap().len(), 1);
            assert!(third.find_label("data").unwrap().is_empty());
            third.open_so("test", SO_PIN).unwrap();
        }
    }

    fn a_running_softhsm_sees_a_token_that_appears_in_its_store(backend) {
        let (softhsm, mut client) = Softhsm::with_token(backend);
        let fresh = empty(Backend::Db);
        let mut other = fresh.p11();
        other.init_token("other", Some(PIN)).unwrap();
        other.open("other", Some(PIN)).unwrap();
        let kept = other.create(&data_object("kept")).unwrap();
        let into = empty(backend);
        let mut watching = into.p11();
        assert!(watching.tokens().unwrap().is_empty());
        converted(&fresh.tokendir, &into.tokendir, backend);
        converted(&fresh.tokendir, &softhsm.tokendir, backend);
        // Beside one that goes on.
        client.create(&data_object("own")).unwrap();
        assert_eq!(other.label(kept).unwrap().unwrap(), b"kept");
        for client in [&mut client, &mut watching] {
            client.reinitialize().unwrap();
            client.open("other", Some(PIN)).unwrap();
            assert_eq!(client.find_label("kept").unwrap().len(), 1);
        }
    }

    fn a_kill_leaves_no_token_and_the_next_run_makes_it(backend) {
        let (softhsm, mut client) = Softhsm::with_token(Backend::File);
        fill(&mut client);
        drop(client);
        let points: &[&str] = match backend {
            Backend::File => &[
                "store.create.made", "store.create.named", "file.build.made", "file.create.written:2", "file.create.done:3",
                "file.publish.lock", "file.publish.synced",
            ],
            Backend::Db => &[
                "store.create.made", "store.create.named", "db.build.schema", "db.inserted:40", "db.written:2", "db.committed:2",
                "db.publish.closed", "db.publish.synced",
            ],
        };
        for point in points {
            let new = empty(backend);
            let output = command(&softhsm.tokendir, &new.tokendir, backend)
                .env("TOKENFS_CRASH_POINT", point)
                .output()
                .unwrap();
            assert_eq!(output.status.code(), None, "{point} was not met: {output:?}");
            assert!(output.stdout.is_empty());
            assert!(!names(&new.tokendir).is_empty(), "{point}");
            // SoftHSM makes a file in every directory that it finds.
            assert!(new.p11().tokens().unwrap().is_empty(), "{point}");
            let checked = check_common::check(&new, &[]);
            assert!(checked.out.contains(": leftover: "), "{point}: {checked:#?}");

            let again = convert(&softhsm.tokendir, &new.tokendir, backend, &[]);
            assert_eq!(again.code, 0, "{point}: {again:#?}");
            assert!(leftovers(&new.tokendir).is_empty(), "{point}: {:?}", leftovers(&new.tokendir));
            assert_same(&softhsm.tokendir, &new.tokendir);
            new.p11().open("test", Some(PIN)).unwrap();
        }
        // From that moment on it is whole.
        let point = if backend == Backend::File { "file.publish.renamed" } else { "db.publish.renamed" };
        let new = empty(backend);
        let output = command(&softhsm.tokendir, &new.tokendir, backend).env("TOKENFS_CRASH_POINT", point).output().unwrap();
        assert_eq!(output.status.code(), None, "{output:?}");
        assert_same(&softhsm.tokendir, &new.tokendir);
        assert_eq!(convert(&softhsm.tokendir, &new.tokendir, backend, &[]).code, 1);
        new.p11().open("test", Some(PIN)).unwrap();
    }

    /// Two labels are written in turn, so that the first one is never more than a step ahead: in every copy, too.
    fn a_copy_beside_a_softhsm_that_writes_is_of_one_moment(backend) {
        let (softhsm, mut client) = Softhsm::with_token(backend);
        let (first, second, _) = fill(&mut client);
        for object in [first, second] {
            client.set_label(object, "0").unwrap();
        }
        let token = names(&softhsm.tokendir).remove(0);
        let (over, steps) = (AtomicBool::new(false), AtomicUsize::new(0));
        let (over, steps) = (&over, &steps);
        let (mut copies, mut seen) = (0, Vec::new());
        std::thread::scope(|scope| {
            scope.spawn(move || {
                while !over.load(Relaxed) {
                    let step = steps.fetch_add(1, Relaxed) + 1;
                    for object in [first, second] {
                        client.set_label(object, &step.to_string()).unwrap();
                        if step.is_multiple_of(3) {
                            let made = client.create(&data_object("passing")).unwrap();
                            let public = [boolean(1, true), boolean(2, false), bytes(0x180, CURVE)];
                            let private = [boolean(1, true), boolean(2, true)];
                            let pair = client.generate_pair(CKM_EC_KEY_PAIR_GEN, &public, &private);
                            let (public, private) = pair.unwrap();
                            for passing in [made, public, private] {
                                client.destroy(passing).unwrap();
                            }
                        }
                        // Somebody who writes without a pause leaves no moment in which nothing changes.
                        std::thread::sleep(Duration::from_millis(4));
                    }
                }
            });
            // Also if something here fails: the other thread is waited for.
            let _over = Over(over);
            let end = std::time::Instant::now() + lasting(3, 20);
            while std::time::Instant::now() < end || copies < 6 {
                let to = BACKENDS[copies % 2];
                let new = softhsm.directory.path().join(format!("copy-{copies}"));
                let begun = steps.load(Relaxed);
                let mut command = command(&softhsm.tokendir, &new, to);
                let done = Checked::of(command.args(["--lock-wait", "30"]));
                assert_eq!(done.code, 0, "{done:#?}");
                assert_whole(&new, &token);
                seen.push((begun, steps.load(Relaxed), labels(&new, &token)));
                copies += 1;
            }
        });
        println!("{copies} copies in {} steps", steps.load(Relaxed));
        for (begun, ended, labels) in seen {
            let [ahead, behind] = labels;
            assert!(ahead == behind || ahead == behind + 1, "{ahead} and {behind}");
            assert!(behind + 1 >= begun && ahead <= ended, "{behind}, {ahead} in {begun}..{ended}");
        }
    }
}

/// Ends the writer.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// That SoftHSM had finished each object that is there.
fn assert_whole(tokendir: &Path, token: &str) {
    let tokens = content(tokendir);
    for (_, object) in tokens[token].iter().filter(|(name, _)| *name != "token") {
        let has = |what: &[u64]| {
            let mut values = what
                .iter()
                .filter_map(|what| independent::get_bytes(object, *what));
            values.any(|value| !value.is_empty())
        };
        let is_whole = match independent::get(object, 0) {
            Some(independent::Value::Ulong(0)) => has(&[CKA_LABEL]) && has(&[0x11]),
            Some(independent::Value::Ulong(2 | 3)) => has(&[0x11, 0x181]),
            _ => false,
        };
        assert!(is_whole, "{object:?}");
    }
}

/// The labels of the data object and of the public key, which are numbers.
fn labels(tokendir: &Path, token: &str) -> [usize; 2] {
    let tokens = content(&PathBuf::from(tokendir));
    [0, 2].map(|class| {
        let object = tokens[token].values().find(|object| {
            independent::get(object, 0) == Some(&independent::Value::Ulong(class))
                && independent::get_bytes(object, CKA_LABEL)
                    .is_some_and(|label| label.first().is_some_and(u8::is_ascii_digit))
        });
        let object = object.unwrap_or_else(|| panic!("no object of class {class}"));
        let label = independent::get_bytes(object, CKA_LABEL).unwrap();
        String::from_utf8(label.to_vec()).unwrap().parse().unwrap()
    })
}
