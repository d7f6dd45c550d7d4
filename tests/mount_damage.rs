//! Damage stays where it is: what is broken is `EIO` and in the log, by file and place and never by value, and all the rest
//! of the store is what it was.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod mount_common;
mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mount_common::*;
use support::*;

/// In values that no log may quote.
const SECRET: &str = "s3cr3t";

#[track_caller]
fn assert_errno<T: std::fmt::Debug>(
    result: std::io::Result<T>,
    errno: i32,
    what: &dyn std::fmt::Debug,
) {
    match result {
        Ok(found) => panic!("{what:?} is {found:?}, and should be errno {errno}"),
        Err(error) => assert_eq!(error.raw_os_error(), Some(errno), "{what:?}: {error}"),
    }
}

/// All of a tree that is not below one of these is in the mount, and they are directories that say `EIO`.
#[track_caller]
fn assert_only(mount: &Mount, tree: &Tree, damaged: &[PathBuf]) {
    for path in damaged {
        let metadata = fs::symlink_metadata(mount.join(path))
            .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert!(metadata.is_dir());
        assert!(
            entries(mount.join(path).parent().unwrap())
                .unwrap()
                .contains(Path::new(path.file_name().unwrap()))
        );
        for _ in 0..2 {
            assert_errno(entries(&mount.join(path)), nix::libc::EIO, path);
        }
        let inside = if path.components().count() == 1 {
            "token/CKA_OS_TOKENLABEL"
        } else {
            "CKA_LABEL"
        };
        assert_errno(
            fs::metadata(mount.join(path).join(inside)),
            nix::libc::EIO,
            path,
        );
        assert_errno(
            fs::read(mount.join(path).join("CKA_CLASS")),
            nix::libc::EIO,
            path,
        );
    }
    let mut compared = 0;
    for (path, content) in tree {
        if damaged.iter().any(|damaged| path.starts_with(damaged)) {
            continue;
        }
        let shown = mount.join(path);
        match content {
            Some(content) => assert_eq!(&fs::read(&shown).unwrap(), content, "{}", path.display()),
            None => {
                let children = tree
                    .keys()
                    .filter(|p| !p.as_os_str().is_empty() && p.parent() == Some(path));
                let mut children: BTreeSet<_> = children
                    .map(|p| PathBuf::from(p.file_name().unwrap()))
                    .collect();
                let broken = damaged.iter().filter(|p| p.parent() == Some(path));
                children.extend(broken.map(|p| PathBuf::from(p.file_name().unwrap())));
                assert_eq!(entries(&shown).unwrap(), children, "{}", path.display());
            }
        }
        compared += 1;
    }
    assert!(compared > 20, "only {compared} compared");
}

fn log(mount: &Mount) -> String {
    let log = fs::read_to_string(mount.join(".tokenfs/log")).unwrap();
    assert!(!log.contains(SECRET), "{log}");
    log
}

/// One line of the log has all of these.
#[track_caller]
fn assert_logged(mount: &Mount, parts: &[&str]) {
    let log = log(mount);
    assert!(
        log.lines()
            .any(|line| parts.iter().all(|part| line.contains(part))),
        "no line with {parts:?} in\n{log}"
    );
}

/// The token with the most objects.
fn big(softhsm: &Softhsm) -> String {
    let store = softhsm.read();
    store
        .into_iter()
        .max_by_key(|(_, token)| token.objects.len())
        .unwrap()
        .0
}

fn be(numbers: &[u64]) -> Vec<u8> {
    numbers
        .iter()
        .flat_map(|number| number.to_be_bytes())
        .collect()
}

fn sql(database: &Path, statements: &str) {
    run(tool("sqlite3").arg(database).arg(statements));
}

#[test]
fn damaged_object_files_leave_the_others_alone() {
    let softhsm = Softhsm::golden(Golden::V2_6_1, Backend::File);
    let token = big(&softhsm);
    let tree = expected(&softhsm);
    let text = |numbers: &[u64]| [&be(numbers)[..], SECRET.as_bytes()].concat();
    // What is put behind the last attribute, how far behind it the damage is said to be, and what is said.
    let table: [(&str, Vec<u8>, usize, &str); 11] = [
        ("torn", text(&[0x11, 3, 100]), 24, "within a byte string"),
        (
            "length-2-63",
            text(&[0x11, 3, 1 << 63]),
            24,
            "within a byte string",
        ),
        (
            "length-all",
            text(&[0x11, 3, u64::MAX]),
            24,
            "within a byte string",
        ),
        (
            "set-2-60",
            text(&[0x4000_0600, 5, 1 << 60]),
            16,
            "mechanism set",
        ),
        (
            "map-2-63",
            text(&[0x4000_0211, 4, 1 << 63]),
            16,
            "attribute map",
        ),
        (
            "map-in-map",
            be(&[0x4000_0211, 4, 24, 0x4000_0212, 4, 0]),
            32,
            "map within an attribute map",
        ),
        (
            "beyond-map",
            text(&[0x4000_0211, 4, 20, 3, 3, 6]),
            24,
            "attribute map",
        ),
        (
            "kind-in-map",
            be(&[0x4000_0211, 4, 24, 3, 9, 0]),
            32,
            "no kind",
        ),
        ("kind-9", text(&[0x11, 9, 0]), 8, "9 is no kind"),
        ("kind-0", text(&[0x11, 0, 0]), 8, "0 is no kind"),
        ("no-kind", be(&[0x11]), 8, "kind"),
    ];
    let directory = softhsm.tokendir.join(&token);
    let id = softhsm.read()[&token]
        .objects
        .keys()
        .next()
        .unwrap()
        .clone();
    let intact = fs::read(directory.join(format!("{id}.object"))).unwrap();
    let mut damaged = Vec::new();
    for (name, more, _, _) in &table {
        fs::write(
            directory.join(name).with_extension("object"),
            [&intact[..], more].concat(),
        )
        .unwrap();
        damaged.push(Path::new(&token).join(name));
    }
    let before = softhsm.snapshot();
    let mount = Mount::new(&softhsm);
    assert_only(&mount, &tree, &damaged);
    for (name, _, behind, message) in &table {
        let file = directory.join(name).with_extension("object");
        assert_logged(
            &mount,
            &[
                " error: ",
                file.to_str().unwrap(),
                &format!("byte {}", intact.len() + behind),
                message,
            ],
        );
    }
    let links = entries(&mount.join(".tokenfs/by-label/Prod Schlüssel 1")).unwrap();
    assert!(links.contains(Path::new("torn.damaged")), "{links:?}");
    before.assert_same(&softhsm.snapshot());
    // What is mended is there again, without a remount.
    fs::write(directory.join("torn.object"), &intact).unwrap();
    let limit = Duration::from_secs(3);
    eventually(limit, "the mended object", || {
        entries(&mount.join(&damaged[0])).is_ok()
    });
    let label = Path::new(&token).join(&id).join("CKA_LABEL");
    assert_eq!(
        fs::read(mount.join(&damaged[0]).join("CKA_LABEL")).unwrap(),
        *tree[&label].as_ref().unwrap()
    );
}

#[test]
fn a_file_cut_anywhere_is_damaged_or_is_what_softhsm_reads() {
    let softhsm = Softhsm::golden(Golden::V2_6_1, Backend::File);
    let token = big(&softhsm);
    let tree = expected(&softhsm);
    let directory = softhsm.tokendir.join(&token);
    let store = softhsm.read();
    let mut sizes: Vec<_> = store[&token]
        .objects
        .keys()
        .map(|id| directory.join(format!("{id}.object")))
        .collect();
    sizes.sort_by_key(|path| fs::metadata(path).unwrap().len());
    let intact = fs::read(&sizes[0]).unwrap();
    assert!(intact.len() < 900, "more than the log holds");
    for length in 0..intact.len() {
        fs::write(
            directory.join(format!("cut-{length}.object")),
            &intact[..length],
        )
        .unwrap();
    }
    let mount = Mount::new(&softhsm);
    let mut damaged = Vec::new();
    for length in 0..intact.len() {
        let name = format!("cut-{length}");
        let shown = Path::new(&token).join(&name);
        match support::independent::parse_object(&intact[..length]) {
            Err(_) if length == 0 || length > 8 => {
                assert_errno(entries(&mount.join(&shown)), nix::libc::EIO, &name);
                damaged.push((name, shown));
            }
            // A part of a generation is an object without attributes.
            Err(_) => assert_eq!(entries(&mount.join(&shown)).unwrap().len(), 0, "{name}"),
            Ok((_, object)) => assert_eq!(attributes(&mount.join(&shown)), object, "{name}"),
        }
    }
    assert!(damaged.len() > intact.len() / 4 && damaged.len() < intact.len());
    for (name, _) in &damaged {
        assert_logged(
            &mount,
            &[" error: ", &format!("/{token}/{name}.object"), "byte "],
        );
    }
    for length in [1, 7] {
        assert_logged(
            &mount,
            &[" warning: ", &format!("/cut-{length}.object"), "byte 0"],
        );
    }
    for (path, content) in tree
        .iter()
        .filter_map(|(path, content)| Some((path, content.as_ref()?)))
    {
        assert_eq!(
            &fs::read(mount.join(path)).unwrap(),
            content,
            "{}",
            path.display()
        );
    }
}

#[test]
fn damaged_rows_leave_the_other_objects_alone() {
    let softhsm = Softhsm::golden(Golden::V2_7_0, Backend::Db);
    let token = big(&softhsm);
    let tree = expected(&softhsm);
    let database = softhsm.tokendir.join(&token).join("sqlite3.db");
    let table = [
        ("binary", format!("'{SECRET}', 17"), "the value is text"),
        ("binary", "1.5, 17".into(), "a real number"),
        ("binary", "5, 17".into(), "an integer"),
        ("integer", format!("'{SECRET}', 5"), "the value is text"),
        ("integer", "null, 5".into(), "NULL"),
        ("boolean", format!("'{SECRET}', 1"), "the value is text"),
        ("boolean", "x'01', 1".into(), "a blob"),
        ("boolean", "null, 1".into(), "NULL"),
        ("boolean", "1, null".into(), "type is NULL"),
        ("array", "x'0102', 1073742353".into(), "attribute map"),
        ("array", "zeroblob(12), 1073742353".into(), "byte 8"),
        // A byte string of 2^63 bytes, and a map in the map.
        (
            "array",
            "x'0300000000000000030000000000000000000080', 1073742353".into(),
            "attribute map",
        ),
        (
            "array",
            "x'12020040000000000400000000000000000000', 1073742353".into(),
            "attribute map",
        ),
        ("binary", "zeroblob(12), 1073743360".into(), "mechanism set"),
    ];
    let ids: Vec<String> = softhsm.read()[&token].objects.keys().cloned().collect();
    let mut damaged = Vec::new();
    for (index, ((kind, values, _), id)) in table.iter().zip(&ids).enumerate() {
        // The first of several rows of a type counts.
        let row = 77000 + index;
        let old = values.rsplit(", ").next().unwrap();
        let remove =
            format!("delete from attribute_{kind} where object_id = {id} and type = {old}");
        sql(
            &database,
            &format!("{remove}; insert into attribute_{kind} values ({values}, {id}, {row})"),
        );
        damaged.push(Path::new(&token).join(object_name(Backend::Db, &token, id)));
    }
    let before = softhsm.snapshot();
    let mount = Mount::new(&softhsm);
    assert_only(&mount, &tree, &damaged);
    for (index, (kind, _, message)) in table.iter().enumerate() {
        let place = format!("row {} of attribute_{kind}", 77000 + index);
        assert_logged(
            &mount,
            &[" error: ", database.to_str().unwrap(), &place, message],
        );
    }
    before.assert_same(&softhsm.snapshot());
}

#[test]
fn damaged_databases_leave_the_other_tokens_alone() {
    let softhsm = Softhsm::golden(Golden::V2_6_1, Backend::Db);
    let tree = expected(&softhsm);
    let big = big(&softhsm);
    let tokens: Vec<String> = softhsm
        .read()
        .into_keys()
        .filter(|name| *name != big)
        .collect();
    let database = |index: usize| softhsm.tokendir.join(&tokens[index]).join("sqlite3.db");
    fs::write(database(0), format!("{SECRET} ").repeat(2000)).unwrap();
    fs::write(database(1), "").unwrap();
    sql(&database(2), "drop table attribute_array");
    // Rows that belong to nobody are no damage.
    let orphans = format!(
        "pragma foreign_keys = off; insert into attribute_binary (value, type, object_id) values ('{SECRET}', 3, 9999)"
    );
    sql(&softhsm.tokendir.join(&big).join("sqlite3.db"), &orphans);
    let before = softhsm.snapshot();
    let mount = Mount::new(&softhsm);
    assert_only(
        &mount,
        &tree,
        &tokens.iter().map(PathBuf::from).collect::<Vec<_>>(),
    );
    for (index, message) in [
        "not an SQLite database",
        "lacks the tables object",
        "lacks the tables attribute_array",
    ]
    .iter()
    .enumerate()
    {
        assert_logged(
            &mount,
            &[" error: ", database(index).to_str().unwrap(), message],
        );
    }
    assert_logged(
        &mount,
        &[
            " warning: ",
            &big,
            "attribute_binary",
            "belong to no object",
        ],
    );
    before.assert_same(&softhsm.snapshot());
}
