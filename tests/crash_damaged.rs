//! Dying at each named crash point while a damaged object is removed or replaced, on both backends: it is what it was, or gone, or the
//! new one, and nothing else has changed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod crash_common;
mod mount_common;
mod support;
mod write_common;

use crash_common::*;
use mount_common::object_name;
use support::*;
use write_common::damage_key;

/// What the damaged object is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Now {
    Damaged,
    Gone,
    Replaced,
}

/// What has become of the private key. The others have to be what they were.
fn look(stage: &Stage) -> Now {
    let mut stored = stage.softhsm.read().remove(&stage.token).unwrap();
    // Of a damaged row the reader has the rest.
    let damaged = std::mem::take(&mut stored.damaged);
    stored.objects.retain(|id, _| !damaged.contains_key(id));
    let of = |name: &str| {
        let mut found = stored.objects.iter();
        found.find(|(id, _)| object_name(stage.backend(), &stage.token, id) == name)
    };
    assert!(of(&stage.data).is_some(), "the data object is gone");
    let (objects, damaged) = (stored.objects.len(), damaged.len());
    match (of(&stage.private), objects, damaged) {
        (None, 2, 1) => Now::Damaged,
        (None, 2, 0) => Now::Gone,
        (Some((_, new)), 3, 0) => {
            assert_eq!(Some(new), of(&stage.data).map(|(_, data)| data));
            Now::Replaced
        }
        other => panic!("{other:?}"),
    }
}

both_backends! {
    fn a_crash_leaves_a_damaged_object_or_what_was_put_in_its_place(backend) {
        let stage = Stage::new(backend);
        let (token, key, data) = (&stage.token, &stage.private, &stage.data);
        let mut deaths = 0;
        for (line, after) in [(format!("replace {token} {key} {data}"), Now::Replaced), (format!("replace {token} {key}"), Now::Gone)] {
            let operations = [line.split(' ').map(str::to_owned).collect()];
            let begin = || {
                stage.reset();
                damage_key(&stage.softhsm, token, key);
                assert_eq!(look(&stage), Now::Damaged);
                stage.step(&[], &operations)
            };
            let passed = begin().env("TOKENFS_CRASH_POINT", "?").output().unwrap();
            assert!(passed.status.success(), "{}", said(&passed));
            assert_eq!(look(&stage), after);
            let (mut as_before, mut as_after) = (0, 0);
            for (point, times) in points_in(&said(&passed)) {
                for time in 1..=times.min(2) {
                    let what = format!("{backend}: {line}: killed at {point}:{time}");
                    let output = begin().env("TOKENFS_CRASH_POINT", format!("{point}:{time}")).output();
                    assert!(matches!(ended(&output.unwrap()), Ok(End::Killed)), "{what}");
                    deaths += 1;
                    // The next mount; what SoftHSM finds before it is one of the two already.
                    let found = look(&stage);
                    stage.recover(&stage.softhsm.tokendir).unwrap_or_else(|why| panic!("{what}: {why}"));
                    assert_eq!(look(&stage), found, "{what}: after a recovery");
                    let left = write_common::leftovers(&stage.softhsm.tokendir);
                    assert!(left.is_empty(), "{what}: {left:?}");
                    if found == after { as_after += 1 } else { as_before += 1 }
                    assert!([Now::Damaged, after].contains(&found), "{what}: {found:?}");
                }
            }
// A removal of a file has no point before its first step.
            let begins = after == Now::Gone && backend == Backend::File;
            assert!((as_before > 0 || begins) && as_after > 0, "{line}: {as_before} {as_after}");
        }
        report!("{backend}: {deaths} deaths");
    }
}
