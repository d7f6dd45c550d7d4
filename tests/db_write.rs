//! The `db` backend writes: each operation is read back by another `DbToken` and by a reader that shares no code with it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod db_common;
mod db_write_common;
mod support;

use std::collections::BTreeSet;

use db_common::*;
use db_write_common::*;
use tokenfs::error::{Error, ErrorKind};
use tokenfs::store::attribute::{AttributeKey, Attributes, Kind, Value};
use tokenfs::store::db::DbToken;
use tokenfs::store::db::uuid::{CKA_TOKENFS_UUID, derived};
use tokenfs::store::{MetadataChange, NewObject, ObjectId, Options, Patience, Target, Token};

#[test]
fn attributes_of_every_kind_are_added_changed_and_removed() {
    let made = made("");
    let token = made.token();
    let id = of_row(&token, 3);
    let mut map = Attributes::new();
    map.insert(3, Value::Bytes(b"inner".to_vec()));
    map.insert(0x162, Value::Bool(true));
    let key = |attribute_type, kind| AttributeKey {
        attribute_type,
        kind,
    };
    for (attribute_type, values) in [
        (1, [Value::Bool(true), Value::Bool(false)]),
        (0x161, [Value::Ulong(u64::MAX), Value::Ulong(0)]),
        (0x11, [Value::Bytes(vec![]), Value::Bytes(vec![7; 70_000])]),
        (
            ALLOWED_MECHANISMS,
            [
                Value::Mechs(BTreeSet::from([1, u64::MAX])),
                Value::Mechs(BTreeSet::new()),
            ],
        ),
        (
            WRAP_TEMPLATE,
            [Value::Map(map), Value::Map(Attributes::new())],
        ),
        // A type that SoftHSM knows nothing of, and one that it looks for in another table.
        (0x8000_1234, [Value::Ulong(1), Value::Ulong(2)]),
        (0x102, [Value::Ulong(1), Value::Ulong(2)]),
    ] {
        let kind = values[0].kind();
        for value in values {
            set(&token, &id, attribute_type, value.clone()).unwrap();
            assert_eq!(
                get(&token, &id).get(key(attribute_type, kind)),
                Some(&value)
            );
            agree(&made, &token);
        }
        token
            .update(
                &id,
                &mut |attributes| {
                    assert!(attributes.remove(key(attribute_type, kind)).is_some());
                    Ok(())
                },
                None,
                patient(),
            )
            .unwrap();
        agree(&made, &token);
        assert_eq!(get(&token, &id).len(), 2);
    }
    // The token itself, and several at once.
    set(
        &token,
        &ObjectId::Token,
        LABEL_OF_TOKEN,
        Value::Bytes(b"new".to_vec()),
    )
    .unwrap();
    token
        .update(
            &id,
            &mut |attributes| {
                *attributes = new("all of it").attributes;
                Ok(())
            },
            None,
            patient(),
        )
        .unwrap();
    agree(&made, &token);
    assert_eq!(label(&token, 3), b"all of it");
    assert_eq!(label(&token, 2), b"l2");
    assert_eq!(made.log.render(), "");
}

#[test]
fn doubled_rows_stay_alike_and_go_together() {
    let made = made(
        "insert into attribute_boolean (value, type, object_id) values (1, 370, 2), (1, 370, 2), (1, 370, 3)",
    );
    let token = made.token();
    let id = of_row(&token, 2);
    set(&token, &id, 370, Value::Bool(false)).unwrap();
    let values = "select value || '' from attribute_boolean order by id";
    assert_eq!(query(&made, values), ["0", "0", "1"]);
    token
        .update(
            &id,
            &mut |attributes| {
                let kind = Kind::Bool;
                attributes.remove(AttributeKey {
                    attribute_type: 370,
                    kind,
                });
                Ok(())
            },
            None,
            patient(),
        )
        .unwrap();
    assert_eq!(query(&made, values), ["1"]);
    agree(&made, &token);
}

#[test]
fn what_cannot_be_is_refused_and_nothing_is_changed() {
    let made = made("insert into attribute_boolean (value, type, object_id) values ('odd', 1, 4)");
    let token = made.token();
    let before = std::fs::read(&made.path).unwrap();
    let id = of_row(&token, 2);
    let kind = |result: Result<(), Error>| {
        let error = result.unwrap_err();
        assert!(error.path().is_some(), "{error}");
        error.kind()
    };
    assert_eq!(
        kind(set(&token, &id, 3, Value::Mechs(BTreeSet::new()))),
        ErrorKind::Invalid
    );
    assert_eq!(
        kind(set(
            &token,
            &id,
            ALLOWED_MECHANISMS,
            Value::Bytes(vec![0; 8])
        )),
        ErrorKind::Invalid
    );
    assert_eq!(
        kind(set(&token, &id, 2, Value::Bool(true))),
        ErrorKind::Invalid,
        "the label"
    );
    assert_eq!(kind(relabel(&token, 50, "x")), ErrorKind::NotFound);
    assert_eq!(kind(relabel(&token, 4, "x")), ErrorKind::Damaged);
    let refused = token.update(
        &id,
        &mut |attributes| {
            attributes.insert(LABEL, Value::Bytes(b"x".to_vec()));
            Err(Error::new(ErrorKind::Exists, "not this"))
        },
        None,
        patient(),
    );
    assert_eq!(kind(refused), ErrorKind::Exists);
    let create = |text: &str, new: &NewObject| kind(token.create(&name(text), new, patient()));
    assert_eq!(create("key", &new("x")), ErrorKind::Invalid);
    assert_eq!(
        create(&derived(token.name(), 2), &new("x")),
        ErrorKind::Exists
    );
    let mut private = new("x");
    private.attributes.insert(2, Value::Bool(true));
    assert_eq!(create(FOREIGN, &private), ErrorKind::Invalid);
    assert_eq!(
        kind(token.remove(&name(FOREIGN), patient())),
        ErrorKind::NotFound
    );
    // Row 1 has no name of its own.
    let own = derived(token.name(), 1);
    assert_eq!(
        kind(token.remove(&name(&own), patient())),
        ErrorKind::NotFound
    );

    let now = Patience::Now;
    assert_eq!(
        kind(token.update(&id, &mut |_| Ok(()), None, now)),
        ErrorKind::WouldBlock
    );
    assert_eq!(
        kind(token.create(&name(FOREIGN), &new("x"), now)),
        ErrorKind::WouldBlock
    );
    assert_eq!(
        kind(token.remove(&name(FOREIGN), now)),
        ErrorKind::WouldBlock
    );
    assert_eq!(kind(token.sync(now)), ErrorKind::WouldBlock);
    let change = MetadataChange::default();
    let target = Target::Directory;
    assert_eq!(
        kind(token.set_metadata(&target, &change, now)),
        ErrorKind::WouldBlock
    );
    let read_only = made.token_with(Options {
        read_only: true,
        ..Options::default()
    });
    assert_eq!(kind(relabel(&read_only, 2, "x")), ErrorKind::ReadOnly);
    assert_eq!(
        kind(read_only.create(&name(FOREIGN), &new("x"), patient())),
        ErrorKind::ReadOnly
    );
    assert_eq!(
        kind(read_only.remove(&name(FOREIGN), patient())),
        ErrorKind::ReadOnly
    );
    assert_eq!(
        kind(read_only.set_metadata(&target, &change, patient())),
        ErrorKind::ReadOnly
    );
    assert!(before == std::fs::read(&made.path).unwrap());
    // A damaged object can go.
    token
        .remove(&name(&derived(token.name(), 4)), patient())
        .unwrap();
    relabel(&token, 2, "now").unwrap();
    agree(&made, &token);
}

#[test]
fn a_derived_name_goes_into_its_row_if_there_was_none_and_another_one_is_remembered() {
    let made = made("");
    let token = made.token();
    let of_3 = derived(token.name(), 3);
    token.remove(&name(&of_3), patient()).unwrap();
    agree(&made, &token);
    assert_eq!(
        query(
            &made,
            "select object_id || '' from attribute_binary where object_id = 3"
        )
        .len(),
        0
    );
    // A SoftHSM that has seen what was there before would take it for that.
    token.create(&name(&of_3), &new("back"), patient()).unwrap();
    assert_eq!(token.row(&named(&of_3), patient()).unwrap(), 5);
    token
        .create(&name(FOREIGN), &new("foreign"), patient())
        .unwrap();
    assert_eq!(token.row(&named(FOREIGN), patient()).unwrap(), 6);
    let upper = FOREIGN.to_uppercase();
    token
        .create(&name(&upper), &new("upper"), patient())
        .unwrap();
    // From a larger store.
    let of_900 = derived(token.name(), 900);
    token
        .create(&name(&of_900), &new("900"), patient())
        .unwrap();
    assert_eq!(token.row(&named(&of_900), patient()).unwrap(), 900);
    agree(&made, &token);
    let twice = token
        .create(&name(FOREIGN), &new("x"), patient())
        .unwrap_err();
    assert_eq!(twice.kind(), ErrorKind::Exists);
    assert_eq!(made.log.render(), "");
    let uuids =
        format!("select value from attribute_text where type = {CKA_TOKENFS_UUID} order by id");
    assert_eq!(query(&made, &uuids), [&*of_3, FOREIGN, &upper]);

    // Ids go on from there, and what is remembered goes with its object.
    made.writer(false)
        .execute_batch("insert into object default values")
        .unwrap();
    assert!(names(&token).contains(&derived(token.name(), 901)));
    token.remove(&name(FOREIGN), patient()).unwrap();
    assert_eq!(query(&made, &uuids), [&*of_3, &*upper]);
    agree(&made, &token);
    token
        .create(&name(FOREIGN), &new("again"), patient())
        .unwrap();
    assert_eq!(
        token.row(&named(FOREIGN), patient()).unwrap(),
        902,
        "no id is used twice"
    );
    agree(&made, &token);
}

#[test]
fn names_that_are_fought_for_are_found_out_by_a_scan() {
    let of = |token: &DbToken, row| derived(token.name(), row);
    let made = made(&format!(
        "insert into attribute_text (value, type, object_id)
            values ('{FOREIGN}', {CKA_TOKENFS_UUID}, 2), ('{FOREIGN}', {CKA_TOKENFS_UUID}, 3)"
    ));
    let token = made.token();
    assert!(names(&token).contains(&of(&token, 3)));
    token.remove(&name(FOREIGN), patient()).unwrap();
    assert_eq!(
        token.row(&named(FOREIGN), patient()).unwrap(),
        3,
        "the next one that remembers it"
    );
    token
        .create(&name(&of(&token, 2)), &new("x"), patient())
        .unwrap();
    agree(&made, &token);
    assert_eq!(token.row(&of_row(&token, 2), patient()).unwrap(), 5);
}

#[test]
fn a_new_object_does_not_inherit_from_one_that_was_deleted_badly() {
    // Deleted without foreign keys; SoftHSM never does that.
    let made = made(
        "insert into attribute_binary (value, type, object_id) values (x'736563726574', 17, 7), (x'736563726574', 17, 5);
         insert into attribute_text (value, type, object_id) values ('odd', 3561703937, 7)",
    );
    let token = made.token();
    let of_7 = derived(token.name(), 7);
    token
        .create(&name(FOREIGN), &new("five"), patient())
        .unwrap();
    token
        .create(&name(&of_7), &new("seven"), patient())
        .unwrap();
    assert_eq!(token.row(&named(FOREIGN), patient()).unwrap(), 5);
    for id in [named(FOREIGN), named(&of_7)] {
        assert_eq!(get(&token, &id).len(), 3);
    }
    agree(&made, &token);
}

#[test]
fn rows_go_with_their_object_even_where_the_schema_does_not_say_so() {
    let made = made("");
    let writer = made.writer(false);
    writer
        .execute_batch(
            "alter table attribute_binary rename to old;
             create table attribute_binary (value blob, type integer, object_id integer, id integer primary key autoincrement);
             insert into attribute_binary select * from old;
             drop table old",
        )
        .unwrap();
    let token = made.token();
    token
        .remove(&name(&derived(token.name(), 2)), patient())
        .unwrap();
    let left = query(
        &made,
        "select object_id || '' from attribute_binary order by 1",
    );
    assert_eq!(left, ["1", "3", "4"]);
    agree(&made, &token);
}

#[test]
fn a_database_without_the_unused_tables_is_written_as_far_as_that_goes() {
    let made = made("drop table attribute_text; drop table attribute_real");
    let token = made.token();
    relabel(&token, 2, "new").unwrap();
    token
        .create(&name(&derived(token.name(), 9)), &new("nine"), patient())
        .unwrap();
    let error = token
        .create(&name(FOREIGN), &new("x"), patient())
        .unwrap_err();
    assert!(error.to_string().contains("attribute_text"), "{error}");
    token
        .remove(&name(&derived(token.name(), 3)), patient())
        .unwrap();
    agree(&made, &token);
    assert_eq!(names(&token).len(), 3);
}

#[test]
fn nothing_but_what_was_asked_for_is_changed() {
    let made = made(
        "create trigger odd after insert on object begin delete from object where id = 3; end",
    );
    let token = made.token();
    token
        .create(&name(FOREIGN), &new("new"), patient())
        .unwrap();
    assert_eq!(label(&token, 3), b"l3");
    agree(&made, &token);
}

#[test]
fn many_objects_are_made_together_or_not_at_all() {
    let made = made("");
    let token = made.token();
    let before = names(&token);
    // In no order, each in the row that its name is of; and names that are of no row, of one that is taken by then, and of one far off.
    let uuids = [
        derived(token.name(), 9),
        FOREIGN.to_owned(),
        derived(token.name(), 7),
        derived(token.name(), 10),
        derived(token.name(), 2000),
    ];
    let all: Vec<_> = uuids.iter().map(|uuid| (name(uuid), new(uuid))).collect();
    let nothing = &mut || Ok(());
    let create = |all: &[_], made: &mut dyn FnMut() -> Result<(), Error>| {
        token.create_all(all, made, patient())
    };

    let mut left = 3;
    let stopped = create(&all, &mut || {
        left -= 1;
        if left > 0 {
            Ok(())
        } else {
            Err(Error::new(ErrorKind::NoSpace, "enough"))
        }
    });
    assert_eq!(stopped.unwrap_err().kind(), ErrorKind::NoSpace);
    let twice = [all.clone(), all.clone()].concat();
    let known = (name(&before[0]), new("known"));
    for wrong in [&twice[..], &[all[0].clone(), known]] {
        let error = create(wrong, nothing).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exists);
    }
    let odd = [all[0].clone(), (name("odd"), new("odd"))];
    assert_eq!(
        create(&odd, nothing).unwrap_err().kind(),
        ErrorKind::Invalid
    );
    assert_eq!(names(&token), before);
    create(&[], nothing).unwrap();
    agree(&made, &token);

    let mut count = 0;
    create(&all, &mut || {
        count += 1;
        Ok(())
    })
    .unwrap();
    assert_eq!(count, all.len());
    let mut wanted = [before, uuids.to_vec()].concat();
    wanted.sort();
    assert_eq!(names(&token), wanted);
    for (row, uuid) in [(9, &uuids[0]), (11, &uuids[2]), (2000, &uuids[4])] {
        let id = ObjectId::Object(name(uuid));
        assert_eq!(token.row(&id, patient()).unwrap(), row);
    }
    agree(&made, &token);
}
