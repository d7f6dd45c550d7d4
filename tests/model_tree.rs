//! Random sequences of operations on a `Tree` without a mount, held against a model; and what they found.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod model_common;

use model_common::fixture::{Template, leftovers, read, stored};
use model_common::model::{Content, Model, OWN};
use model_common::ops::*;
use model_common::run::{Pair, lasting, run};
use model_common::state::World;
use model_common::tree::TreeWorld;
use tokenfs::store::Backend;
use tokenfs::store::attribute::{Attributes, Value};

const BACKENDS: [Backend; 2] = [Backend::File, Backend::Db];

/// What the model says is in the store is there: all but what is pending, whatever is held back.
fn check_stored(model: &Model, stored: &Content) {
    let wanted = model.stored();
    for (token, objects) in &wanted {
        // Its removal has begun, and it is a token until that ends.
        if !objects.contains_key(OWN) {
            continue;
        }
        let there = &stored[token];
        let names = |objects: &std::collections::BTreeMap<String, Attributes>| {
            objects.keys().cloned().collect::<Vec<_>>()
        };
        assert_eq!(
            names(there),
            names(objects),
            "the objects in the store of {token}"
        );
        for (object, attributes) in objects {
            check_values(object, attributes, &there[object]);
        }
    }
}

fn check_values(what: &str, wanted: &Attributes, stored: &Attributes) {
    for (key, value) in wanted.iter() {
        match (value, stored.get(key)) {
            (Value::Map(wanted), Some(Value::Map(stored))) => check_values(what, wanted, stored),
            (value, found) => assert_eq!(found, Some(value), "{what}: {key:?} in the store"),
        }
    }
}

fn sequence(template: &Template, ops: &[Op]) {
    let mut world = TreeWorld::new(template);
    let mut model = Model::new(template.backend == Backend::Db, 0o077, &template.content);
    let (mut logged, mut calls) = (0, 0);
    let mut after = |model: &Model, world: &mut TreeWorld, refused: Option<i32>| {
        let now = world.logged();
        if refused == Some(libc::EINVAL) {
            assert!(now > logged, "the log says nothing of it");
        }
        logged = now;
        calls += 1;
        // Not each time: it takes longer than most calls do.
        if calls % 8 == 0 {
            check_stored(model, &read(world.tree.store()));
        }
    };
    let mut pair = Pair {
        model: &mut model,
        world: &mut world,
        after: &mut after,
    };
    for op in ops {
        pair.step(op);
    }
    pair.compare_trees();
    check_stored(pair.model, &read(pair.world.tree.store()));
    pair.remount();
    pair.compare_trees();
    let tokendir = world.tokendir.path();
    assert_eq!(
        stored(tokendir, template.backend),
        model.content(),
        "left is what is stored, right what the model says"
    );
    assert_eq!(leftovers(tokendir), [] as [std::path::PathBuf; 0]);
}

fn random(backend: Backend) {
    let template = Template::new(backend);
    run(
        &format!("the tree, {backend} backend"),
        20,
        lasting(),
        40,
        3000,
        |ops| sequence(&template, ops),
    );
}

#[test]
fn random_sequences_on_the_file_backend() {
    random(Backend::File);
}

#[test]
fn random_sequences_on_the_db_backend() {
    random(Backend::Db);
}

/// Runs a sequence that was found to go wrong on both backends.
#[track_caller]
fn found(ops: &[Op]) {
    for backend in BACKENDS {
        println!("--- {backend} backend");
        sequence(&Template::new(backend), ops);
    }
}

/// An object of the first token.
const A: &str = "token-1/00000000-0000-4000-8000-00000000000a";

fn a(name: &str) -> String {
    format!("{A}/{name}")
}

#[test]
fn a_scratch_file_that_is_made_longer_does_not_wait_for_itself() {
    found(&[
        open(0, &a(".x"), "write create"),
        Op::SetLength(0, 7),
        Op::Close(0),
        content(&a(".x")),
    ]);
}

#[test]
fn a_file_that_was_unlinked_does_not_come_back_when_it_is_closed() {
    for (how, op) in [
        ("write", Op::Write(0, b"x")),
        ("write truncate", Op::Read(0)),
    ] {
        found(&[
            open(0, &a("CKA_ID"), how),
            op.clone(),
            unlink(&a("CKA_ID")),
            Op::Close(0),
        ]);
        found(&[
            open(0, &a("CKA_ID"), how),
            op,
            rename(&a("CKA_ID"), &a(".x")),
            Op::CloseDuplicate(0),
            Op::LeaveAlone,
            Op::Close(0),
        ]);
    }
}

#[test]
fn who_has_the_file_open_that_another_replaces_does_not_write_over_it() {
    found(&[
        open(0, &a("CKA_ID"), "write"),
        Op::Write(0, b"old"),
        put(&a(".x"), b"new"),
        rename(&a(".x"), &a("CKA_ID")),
        Op::Close(0),
    ]);
}

/// Another object of the first token, and one that there is not.
const B: &str = "token-1/00000000-0000-4000-8000-00000000000b";
const C: &str = "token-1/00000000-0000-4000-8000-00000000000c";

#[test]
fn a_file_without_a_value_moves_with_its_object() {
    found(&[
        open(0, &a("CKA_SIGN"), "write create"),
        rename(A, C),
        stat(&format!("{C}/CKA_SIGN")),
    ]);
}

#[test]
fn an_object_can_take_the_place_of_an_empty_directory() {
    found(&[mkdir(C), rename(A, C), list(C), Op::LeaveAlone]);
}

#[test]
fn what_was_unlinked_does_not_stand_in_the_way_of_another_kind_of_its_type() {
    found(&[
        unlink(&a("CKA_LABEL")),
        put(&a("CKA_LABEL.ulong"), b"0x1f"),
        Op::LeaveAlone,
        content(&a("CKA_LABEL.ulong")),
    ]);
}

#[test]
fn what_was_unlinked_does_not_stand_in_the_way_of_making_an_object_private() {
    found(&[
        unlink(&a("CKA_LABEL")),
        unlink(&a("CKA_ID")),
        put(&a("CKA_PRIVATE"), b"true\n"),
    ]);
}

#[test]
fn appending_to_a_file_that_was_unlinked_begins_with_nothing() {
    found(&[
        unlink(&a("CKA_LABEL")),
        open(0, &a("CKA_LABEL"), "write create append"),
        Op::Write(0, b"new"),
        Op::Close(0),
        content(&a("CKA_LABEL")),
    ]);
}

#[test]
fn what_takes_the_name_of_an_unlinked_file_stays() {
    found(&[
        unlink(&a("CKA_ID")),
        rename(&a("CKA_LABEL"), &a("CKA_ID")),
        Op::LeaveAlone,
        content(&a("CKA_ID")),
    ]);
    found(&[
        open(0, &a("0x80001234.bytes"), "write create"),
        rename(&a("CKA_LABEL"), &a("0x80001234.bytes")),
        unlink(&a("0x80001234.bytes")),
        Op::LeaveAlone,
    ]);
}

#[test]
fn what_was_unlinked_in_a_map_does_not_come_back_when_the_map_is_renamed() {
    let (from, to) = (a("CKA_WRAP_TEMPLATE"), a("CKA_UNWRAP_TEMPLATE"));
    let fresh = format!("{from}/CKA_KEY_TYPE");
    found(&[
        unlink(&format!("{from}/CKA_LABEL")),
        open(0, &fresh, "write create"),
        rename(&from, &to),
        list(&to),
        mkdir(&from),
        list(&from),
    ]);
}

#[test]
fn what_is_open_goes_with_its_object_when_that_is_renamed() {
    found(&[
        open(2, &a("CKA_START_DATE"), "write create"),
        rename(A, C),
        mkdir(A),
        Op::Write(2, b"20261123"),
        Op::Close(2),
        list(A),
        content(&format!("{C}/CKA_START_DATE")),
    ]);
}

/// It is out of sight in an object and in a map, and in sight where these have become scratch themselves.
#[test]
fn scratch_goes_along_with_the_directory_that_it_is_in() {
    let in_map = |map: &str| format!("{map}/.y");
    let (gone, wrap, unwrap) = ("token-1/.gone", "CKA_WRAP_TEMPLATE", "CKA_UNWRAP_TEMPLATE");
    found(&[
        put(&a(".x"), b"beside"),
        mkdir(&a(".d")),
        put(&in_map(&a(".d")), b"deep"),
        put(&in_map(&a(wrap)), b"in a map"),
        rename(&a(wrap), &a(unwrap)),
        content(&in_map(&a(unwrap))),
        rename(&a(unwrap), &a(".m")),
        list(&a(".m")),
        content(&in_map(&a(".m"))),
        rename(&a(".m"), &a(wrap)),
        list(&a(wrap)),
        content(&in_map(&a(wrap))),
        rename(A, gone),
        list(gone),
        list(&format!("{gone}/{wrap}")),
        content(&format!("{gone}/.x")),
        content(&format!("{gone}/.d/.y")),
        rename(gone, C),
        list(C),
        content(&format!("{C}/.x")),
        content(&format!("{C}/.d/.y")),
        content(&format!("{C}/{wrap}/.y")),
        rename(C, A),
        content(&a(".x")),
        content(&in_map(&a(wrap))),
        mkdir(C),
        put(&format!("{C}/.z"), b"in one that is replaced"),
        rename(A, C),
        content(&format!("{C}/.z")),
        content(&format!("{C}/.x")),
        rename(C, A),
        rm_r(&a(".d")),
        rm_r(A),
    ]);
}

/// The one that is open has no name any more, and does not take that of the other one along.
#[test]
fn what_has_replaced_an_open_file_is_there_when_its_object_is_renamed() {
    // Whichever of the two comes first.
    for _ in 0..8 {
        found(&[
            open(0, &a("CKA_ID"), "write"),
            rename(&a("CKA_LABEL"), &a("CKA_ID")),
            rename(A, C),
            content(&format!("{C}/CKA_ID")),
            list(C),
        ]);
    }
}

#[test]
fn a_file_that_one_could_not_give_a_value_stays_for_another_who_has_it_open() {
    found(&[
        open(0, &a("CKA_SIGN"), "write create"),
        Op::Write(0, b"1"),
        put(&a("CKA_SIGN"), b"2048\n"),
        list(A),
        Op::Close(0),
        content(&a("CKA_SIGN")),
    ]);
}

#[test]
fn what_is_renamed_while_it_is_appended_to_is_not_written_twice() {
    found(&[
        open(0, &a(".x"), "write create append"),
        Op::Write(0, b"once"),
        rename(&a(".x"), &a("CKA_ID")),
        Op::Close(0),
        content(&a("CKA_ID")),
    ]);
}

#[test]
fn an_object_can_take_the_place_of_one_that_was_emptied() {
    // In the store is an object without attributes.
    found(&[mkdir(C), sync_dir(C), rename(A, C), list(C)]);
    // In the store is all that was unlinked.
    let emptied = ["CKA_CLASS", "CKA_PRIVATE", "CKA_LABEL", "CKA_START_DATE"]
        .map(|name| unlink(&format!("{B}/{name}")));
    for from in [A, C, "token-1/.new"] {
        let mut ops = emptied.to_vec();
        ops.extend([
            mkdir(from),
            put(&format!("{from}/CKA_CLASS"), b"0"),
            rename(from, B),
            list(B),
            Op::LeaveAlone,
        ]);
        found(&ops);
    }
}

#[test]
fn what_was_unlinked_before_does_not_change_the_time_that_an_object_is_given() {
    for backend in BACKENDS {
        let template = Template::new(backend);
        for (unlinked_first, is_kept) in [(true, true), (false, false)] {
            let mut world = TreeWorld::new(&template);
            world.unlink(&a("CKA_ID")).unwrap();
            world.set_times(A, 1_000_000_000).unwrap();
            if !unlinked_first {
                world.unlink(&a("CKA_LABEL")).unwrap();
            }
            world.leave_alone();
            let mtime = world.stat(A).unwrap().mtime;
            assert_eq!(mtime == 1_000_000_000, is_kept, "{backend}");
        }
    }
}

#[test]
fn what_is_synced_after_it_was_renamed_to_an_attribute_is_in_the_store() {
    found(&[
        mkdir(C),
        open(0, &format!("{C}/.x"), "write create"),
        Op::Write(0, b"CKO_DATA"),
        rename(&format!("{C}/.x"), &format!("{C}/CKA_CLASS")),
        Op::Sync(0),
        // That one file is synced does not make the object whole.
        sync_dir(C),
    ]);
}

#[test]
fn what_was_unlinked_and_created_again_has_no_value_after_a_rename_of_its_object_either() {
    found(&[
        unlink(&a("CKA_CLASS")),
        put(&a("CKA_CLASS"), b""),
        rename(A, C),
        content(&format!("{C}/CKA_CLASS")),
    ]);
}

#[test]
fn a_file_without_a_value_is_no_directory() {
    found(&[
        open(0, &a("CKA_SIGN"), "write create"),
        list(&a("CKA_SIGN")),
    ]);
}
