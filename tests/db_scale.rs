//! A token of 10,000 objects: what a scan costs is printed (`cargo test --release --test db_scale -- --nocapture`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod db_common;

use std::ffi::OsStr;
use std::time::Instant;

use db_common::*;
use tokenfs::store::attribute::{Attributes, Value};
use tokenfs::store::{Access, NewObject, ObjectName, Patience, Token};

fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn ten_thousand_objects() {
    // As many attributes as an RSA private key has.
    let made = made(
        "with recursive n(i) as (select 5 union all select i + 1 from n where i < 10001) insert into object select i from n;
         with recursive t(i) as (select 1 union all select i + 1 from t where i < 17)
            insert into attribute_boolean (value, type, object_id) select 1, 256 + t.i, object.id from object, t;
         with recursive t(i) as (select 1 union all select i + 1 from t where i < 4)
            insert into attribute_integer (value, type, object_id) select i, 600 + i, object.id from object, t;
         with recursive t(i) as (select 1 union all select i + 1 from t where i < 12)
            insert into attribute_binary (value, type, object_id) select randomblob(i * 16), 700 + i, object.id from object, t",
    );
    let token = made.token();
    let memory = resident();
    let start = Instant::now();
    assert_eq!(token.list(patient()).unwrap().len(), 10_000);
    let first = start.elapsed();
    let taken = resident().saturating_sub(memory);
    made.writer(false)
        .execute_batch("update attribute_boolean set value = 0 where id = 1")
        .unwrap();
    let start = Instant::now();
    token.list(patient()).unwrap();
    let second = start.elapsed();
    std::thread::sleep(std::time::Duration::from_millis(70));
    token.list(patient()).unwrap();
    let id = of_row(&token, 5000);
    let start = Instant::now();
    for _ in 0..1000 {
        assert_eq!(
            token.object(&id, Patience::Now).unwrap().attributes.len(),
            33
        );
    }
    eprintln!(
        "{} MiB: scan {first:?}, after a change {second:?}, cached {:?}, memory {} MiB",
        std::fs::metadata(&made.path).unwrap().len() >> 20,
        start.elapsed() / 1000,
        taken >> 10,
    );

    // A write reads none of the values again: they stay where they are.
    let place = || {
        token
            .object(&id, patient())
            .unwrap()
            .attributes
            .bytes(700 + 3)
            .unwrap()
            .as_ptr() as usize
    };
    let before = place();
    let other = of_row(&token, 7000);
    let mut took = Vec::new();
    for n in 0..20 {
        let start = Instant::now();
        let edit = &mut |attributes: &mut Attributes| {
            attributes.insert(LABEL, Value::Bytes(vec![n; 16]));
            Ok(())
        };
        token.update(&other, edit, None, patient()).unwrap();
        took.push(start.elapsed());
    }
    let new = NewObject {
        attributes: token.object(&other, patient()).unwrap().attributes.clone(),
        access: Access {
            mode: 0,
            uid: 0,
            gid: 0,
        },
        mtime: None,
    };
    let name = ObjectName::new(OsStr::new("b7e9f2a1-aaaa-bbbb-cccc-111111111111")).unwrap();
    let start = Instant::now();
    token.create(&name, &new, patient()).unwrap();
    let first_create = start.elapsed();
    token.remove(&name, patient()).unwrap();
    let start = Instant::now();
    token.create(&name, &new, patient()).unwrap();
    let create = start.elapsed();
    let start = Instant::now();
    token.remove(&name, patient()).unwrap();
    let remove = start.elapsed();
    assert_eq!(place(), before, "scanned again");
    took.sort();
    eprintln!(
        "update {:?}, create {create:?} (the first {first_create:?}), remove {remove:?}",
        took[took.len() / 2]
    );
}
