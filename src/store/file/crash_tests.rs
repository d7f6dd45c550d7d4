//! What a crash leaves, and what the next write or a recovery makes of it.

use std::fs;

use super::fixture::{
    Fixture, LABEL, files, fixture, generation, hold, id, sample, set_label, soon,
};
use super::*;
use crate::store::attribute::{Attributes, Value};
use crate::store::{ObjectId, Token};

/// Each place at which a crash can come, and what the next write makes of it.
#[test]
fn leftovers_of_a_crash_are_put_right_by_the_next_write_and_by_recovery() {
    type Act = fn(&Fixture);
    let acts: [(&str, Act); 2] = [
        ("recovery", |fixture| fixture.token.recover()),
        ("a write", |fixture| {
            set_label(fixture, &id("a"), b"after").unwrap();
            fixture.token.recover();
        }),
    ];
    for (what, act) in acts {
        // Before or after the exchange.
        let fixture = fixture();
        fixture.write("a.tokenfs-new", &encode(4, &sample()));
        act(&fixture);
        assert_eq!(files(&fixture).len(), 4, "{what}");
        assert_eq!(generation(&fixture), 9);
        assert_eq!(fixture.diagnostics.render().lines().count(), 1);
        // A creation before the link; one before SoftHSM was told; a removal.
        fixture.write("b.tokenfs-new", &encode(1, &sample()));
        fixture.write("b.lock", b"");
        fixture.write("c.tokenfs-new", &encode(1, &sample()));
        fs::hard_link(fixture.path("c.tokenfs-new"), fixture.path("c.object")).unwrap();
        fixture.write("c.lock", b"");
        fixture.write("d.tokenfs-new", &encode(1, &sample()));
        act(&fixture);
        assert_eq!(
            files(&fixture),
            [
                "a.lock",
                "a.object",
                "c.lock",
                "c.object",
                "generation",
                "token.object"
            ]
        );
        assert_eq!(generation(&fixture), 15);
        // Somebody is still at it.
        fixture.write("c.tokenfs-new", &encode(1, &sample()));
        let mut holder = hold(&fixture.path("c.lock"), 60.0);
        act(&fixture);
        assert_eq!(files(&fixture).len(), 7);
        holder.kill().unwrap();
        holder.wait().unwrap();
        act(&fixture);
        act(&fixture);
        assert_eq!(files(&fixture).len(), 6);
    }
}

/// SoftHSM's own destruction of an object leaves one, too.
#[test]
fn a_lock_file_without_an_object_goes_when_nobody_uses_it() {
    let fixture = fixture();
    let whole = files(&fixture);
    fixture.write("b.lock", b"");
    fixture.token.recover();
    assert_eq!(files(&fixture), whole);
    assert_eq!(fixture.diagnostics.render().lines().count(), 1);
    // The token's own is not one; what is not empty is none of SoftHSM's; what is held is in use.
    fixture.write("token.lock", b"");
    fixture.write("notes.lock", b"1234");
    fixture.write("c.lock", b"");
    let with_more = files(&fixture);
    let mut holder = hold(&fixture.path("c.lock"), 60.0);
    fixture.token.recover();
    assert_eq!(files(&fixture), with_more);
    holder.kill().unwrap();
    holder.wait().unwrap();
    // An object that has come since it was missed keeps it.
    fixture.write("c.object", &encode(1, &sample()));
    fixture.token.remove_lonely_lock(&id("c")).unwrap();
    assert!(fixture.path("c.lock").exists());
    fs::remove_file(fixture.path("c.object")).unwrap();
    fixture.token.recover();
    assert!(!fixture.path("c.lock").exists());
    assert!(fixture.path("notes.lock").exists());
    assert_eq!(fixture.diagnostics.render().lines().count(), 2);
}

/// Every state in which a power failure can leave a file that is rewritten in place.
#[test]
fn a_torn_rewriting_is_finished() {
    let with = |byte: u8, length: usize| {
        let mut attributes = Attributes::new();
        attributes.insert(LABEL, Value::Bytes(vec![byte; length]));
        attributes
    };
    let mut states = 0;
    for (was, becomes) in [
        (1800usize, 1900usize),
        (1900, 1800),
        (1900, 1890),
        (700, 2000),
        (2000, 100),
        (1500, 1500),
    ] {
        let journal = journal::Journal {
            old: encode(5, &with(b'o', was)),
            new: encode(6, &with(b'n', becomes)),
        };
        let target = journal.target();
        assert!(target.len() >= journal.old.len());
        assert_eq!(decode(&target).unwrap(), decode(&journal.new).unwrap());
        assert_eq!(
            journal::Journal::decode(&journal.encode()).as_ref(),
            Some(&journal)
        );
        let sectors = target.len().div_ceil(512);
        for chosen in 0..1u32 << sectors {
            // The old length or the new one; of each sector the old content or the new one.
            for length in [journal.old.len(), target.len()] {
                let mut current = journal.old.clone();
                current.resize(length, 0);
                for (index, sector) in current.chunks_mut(512).enumerate() {
                    if chosen & 1 << index != 0 {
                        let start = index * 512;
                        sector.copy_from_slice(&target[start..start + sector.len()]);
                    }
                }
                let expected = if current == journal.old || current == journal.new {
                    journal::Verdict::Keep
                } else if current == target {
                    journal::Verdict::Cut
                } else {
                    journal::Verdict::Redo
                };
                assert_eq!(
                    journal.verdict(&current),
                    expected,
                    "{was} {becomes} {chosen:b}"
                );
                states += 1;
            }
        }
        // SoftHSM has written since.
        for theirs in [encode(6, &with(b's', was)), encode(7, &with(b'n', becomes))] {
            assert_eq!(journal.verdict(&theirs), journal::Verdict::Keep);
        }
    }
    println!("{states} torn states");
}

/// The same on disk, for a few of the states, and that a journal that is not whole is of no account.
#[test]
fn a_journal_is_put_right_by_the_next_write_and_by_recovery() {
    let of = |byte: u8, length: usize| {
        let mut attributes = Attributes::new();
        attributes.insert(LABEL, Value::Bytes(vec![byte; length]));
        attributes
    };
    let old = encode(5, &of(b'o', 2000));
    let new = encode(6, &of(b'n', 1000));
    let journal = journal::Journal {
        old: old.clone(),
        new: new.clone(),
    };
    let target = journal.target();
    let mixture = [&target[..512], &old[512..]].concat();
    let whole = journal.encode();
    let torn = &whole[..whole.len() - 1];
    let theirs = encode(9, &of(b's', 10));
    for (file, stem) in [("token.object", "token"), ("a.object", "a")] {
        for (current, journal, expected, generation) in [
            (&old, &whole[..], b'o', 5),
            (&old, torn, b'o', 5),
            (&old, b"", b'o', 5),
            (&new, &whole, b'n', 6),
            (&target, &whole, b'n', 6),
            (&mixture, &whole, b'n', 7),
            (&theirs, &whole, b's', 9),
        ] {
            for written in [false, true] {
                let fixture = fixture();
                fixture.write(file, current);
                fixture.write(&format!("{stem}.tokenfs-journal"), journal);
                let object = if stem == "token" {
                    ObjectId::Token
                } else {
                    id(stem)
                };
                if written {
                    fixture
                        .token
                        .update(&object, &mut |_| Ok(()), None, soon())
                        .unwrap();
                } else {
                    fixture.token.recover();
                }
                assert_eq!(files(&fixture).len(), 4);
                let bytes = fs::read(fixture.path(file)).unwrap();
                let found = decode(&bytes).unwrap();
                assert_eq!(found.attributes.bytes(LABEL).unwrap()[0], expected);
                assert_eq!(found.generation, Some(generation));
                assert_eq!(bytes, encode(generation, &found.attributes), "no filler");
                assert_eq!(fixture.diagnostics.render().lines().count(), 1);
            }
        }
    }
}
