//! The `db` backend says what is wrong with what it cannot read, and serves the rest.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod db_common;

use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use db_common::*;
use tokenfs::error::ErrorKind;
use tokenfs::store::{ObjectId, Options, Token};

#[test]
fn a_damaged_object_leaves_the_others_alone() {
    for (sql, message, offset) in [
        (
            "insert into attribute_binary values ('secret', 17, 3, 77)",
            "row 77 of attribute_binary: the value is text",
            None,
        ),
        (
            "insert into attribute_binary values (1.5, 17, 3, 77)",
            "row 77 of attribute_binary: the value is a real number",
            None,
        ),
        (
            "insert into attribute_binary values (5, 17, 3, 77)",
            "row 77 of attribute_binary: the value is an integer",
            None,
        ),
        (
            "insert into attribute_integer values ('secret', 5, 3, 77)",
            "row 77 of attribute_integer: the value is text",
            None,
        ),
        (
            "insert into attribute_integer values (1.5, 5, 3, 77)",
            "attribute_integer: the value is a real number",
            None,
        ),
        (
            "insert into attribute_integer values (null, 5, 3, 77)",
            "attribute_integer: the value is NULL",
            None,
        ),
        (
            "insert into attribute_boolean values ('secret', 1, 3, 77)",
            "row 77 of attribute_boolean: the value is text",
            None,
        ),
        (
            "insert into attribute_boolean values (null, 1, 3, 77)",
            "attribute_boolean: the value is NULL",
            None,
        ),
        (
            "insert into attribute_boolean values (x'01', 1, 3, 77)",
            "attribute_boolean: the value is a blob",
            None,
        ),
        (
            "insert into attribute_array values (x'0102', 1073742353, 3, 77)",
            "row 77 of attribute_array: in the attribute map",
            Some(0),
        ),
        (
            "insert into attribute_array values (zeroblob(12), 1073742353, 3, 77)",
            "row 77 of attribute_array: in the attribute map",
            Some(8),
        ),
        (
            "insert into attribute_binary values (zeroblob(12), 1073743360, 3, 77)",
            "row 77 of attribute_binary: in the mechanism set",
            Some(8),
        ),
        (
            "insert into attribute_boolean values (1, null, 3, 77)",
            "row 77 of attribute_boolean: the attribute's type is NULL",
            None,
        ),
        (
            "insert into attribute_boolean values (1, 'secret', 3, 77)",
            "attribute_boolean: the attribute's type is text",
            None,
        ),
    ] {
        let made = made(sql);
        let token = made.token();
        assert_eq!(token.list(patient()).unwrap().len(), 3, "{sql}");
        let damaged = of_row(&token, 3);
        let error = token.object(&damaged, patient()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged, "{sql}");
        assert!(error.to_string().contains(message), "{sql}: {error}");
        assert!(!error.to_string().contains("secret"), "{error}");
        assert_eq!(error.offset(), offset, "{sql}");
        assert_eq!(error.path(), Some(made.path.as_path()));
        assert!(token.object_metadata(&damaged, patient()).is_ok());
        assert_eq!(token.row(&damaged, patient()).unwrap(), 3);
        assert_eq!(label(&token, 2), b"l2");
        assert_eq!(label(&token, 4), b"l4");
        assert!(token.object(&ObjectId::Token, patient()).is_ok());
    }
}

#[test]
fn a_token_without_row_1_still_serves_its_objects() {
    let made =
        made("delete from object where id = 1; delete from attribute_binary where object_id = 1");
    let token = made.token();
    assert_eq!(token.list(patient()).unwrap().len(), 3);
    let error = token.object(&ObjectId::Token, patient()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert!(error.to_string().contains("lacks row 1"), "{error}");
    assert!(token.object_metadata(&ObjectId::Token, patient()).is_ok());
    assert_eq!(label(&token, 3), b"l3");
    assert_eq!(made.log.render(), "");
}

#[test]
fn rows_of_no_object_are_ignored_and_said_once() {
    let made = made(
        "insert into attribute_binary (value, type, object_id) values (x'00', 3, 99), ('text', 3, 98), (x'00', 3, null);
         insert into attribute_boolean (value, type, object_id) values (1, 1, 'x')",
    );
    let token = made.token();
    assert_eq!(token.list(patient()).unwrap().len(), 3);
    made.writer(false)
        .execute_batch("update attribute_binary set value = x'6E' where object_id = 2")
        .unwrap();
    assert_eq!(label(&token, 2), b"n");
    let log = made.log.render();
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(
        log.contains("rows in attribute_boolean, attribute_binary belong to no object"),
        "{log}"
    );
    assert!(!log.contains("times"), "{log}");
}

/// Damages of the whole token: nothing can be listed, but there is something to `stat`.
#[test]
fn a_damaged_database_is_damaged_as_a_whole() {
    let page = |number: usize, path: &Path| {
        let mut bytes = std::fs::read(path).unwrap();
        bytes[number * 4096..(number + 1) * 4096].fill(0xff);
        std::fs::write(path, bytes).unwrap();
    };
    type Damage<'a> = (&'a str, &'a dyn Fn(&Path));
    let damages: [Damage; 7] = [
        ("not an SQLite database", &|path| {
            std::fs::write(path, vec![b'x'; 9000]).unwrap()
        }),
        ("lacks the tables object, attribute_boolean,", &|path| {
            std::fs::write(path, b"").unwrap()
        }),
        ("the database is damaged", &|path| page(1, path)),
        ("the database is damaged", &|path| {
            let bytes = std::fs::read(path).unwrap();
            std::fs::write(path, &bytes[..4096 * 3]).unwrap();
        }),
        ("does not have the tables and columns", &|path| {
            let writer = rusqlite::Connection::open(path).unwrap();
            writer
                .execute_batch("alter table attribute_array rename column type to kind")
                .unwrap();
        }),
        ("symbolic link", &|path| {
            std::fs::rename(path, path.with_extension("moved")).unwrap();
            symlink(path.with_extension("moved"), path).unwrap();
        }),
        ("not a regular file", &|path| {
            std::fs::remove_file(path).unwrap();
            nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        }),
    ];
    for (message, damage) in damages {
        let made = made("");
        damage(&made.path);
        let token = made.token();
        for _ in 0..2 {
            let error = token.list(patient()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Damaged, "{message}: {error}");
            assert!(error.to_string().contains(message), "{message}: {error}");
            assert_eq!(error.path(), Some(made.path.as_path()));
        }
        assert!(token.object(&ObjectId::Token, patient()).is_err());
        assert!(token.metadata().is_ok());
    }
}

#[test]
fn each_required_table_is_missed_and_the_unused_ones_are_not() {
    for table in [
        "object",
        "attribute_boolean",
        "attribute_integer",
        "attribute_binary",
        "attribute_array",
    ] {
        let made = made(&format!("drop table {table}"));
        let error = made.token().list(patient()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged);
        assert!(
            error
                .to_string()
                .ends_with(&format!("lacks the tables {table}")),
            "{error}"
        );
        assert!(
            made.token()
                .object_metadata(&ObjectId::Token, patient())
                .is_ok()
        );
    }
    let made =
        made("drop table attribute_text; drop table attribute_real; drop table attribute_datetime");
    assert_eq!(label(&made.token(), 2), b"l2");
}

#[test]
fn what_is_not_there_is_not_found() {
    let made = made("");
    let token = made.token();
    let error = token.object(&named("nobody"), patient()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let error = token
        .object_metadata(&named("nobody"), patient())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    std::fs::remove_file(&made.path).unwrap();
    assert_eq!(
        token.list(patient()).unwrap_err().kind(),
        ErrorKind::NotFound
    );
    std::fs::remove_dir(made.directory.path()).unwrap();
    assert_eq!(token.metadata().unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_symbolic_link_above_the_database_is_refused_by_sqlite() {
    let made = made("");
    let outside = tempfile::tempdir().unwrap();
    let link = outside.path().join("link");
    symlink(made.directory.path(), &link).unwrap();
    let log = Arc::default();
    let below = link.join(".");
    let token = open(&below, "made", Options::default(), &log);
    let error = token.list(patient()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert!(error.to_string().contains("symbolic link"), "{error}");
}

#[test]
fn a_path_that_sqlite_cannot_hold_is_named_so() {
    let root = tempfile::tempdir().unwrap();
    let deep = (0..3).fold(root.path().to_path_buf(), |path, _| {
        path.join("d".repeat(200))
    });
    std::fs::create_dir_all(&deep).unwrap();
    let made = made("");
    std::fs::copy(&made.path, deep.join("sqlite3.db")).unwrap();
    let error = open(&deep, "made", Options::default(), &made.log)
        .list(patient())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NameTooLong);
}

const UNPRIVILEGED: &str = "TOKENFS_TEST_UNPRIVILEGED_IN";

/// Not a test: the part of the one below that runs as somebody who is not root.
#[test]
#[ignore = "run by the test of permissions"]
fn unprivileged_reader() {
    let Some(root) = std::env::var_os(UNPRIVILEGED) else {
        return;
    };
    let root = Path::new(&root);
    let log = Arc::default();
    let list =
        |name: &str| open(&root.join(name), "made", Options::default(), &log).list(patient());
    assert_eq!(list("readable").unwrap().len(), 3);
    let error = list("unreadable").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
    for name in ["crashed", "secret_journal"] {
        let error = list(name).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged, "{name}: {error}");
        assert!(
            error.to_string().contains("crashed and left"),
            "{name}: {error}"
        );
    }
}

#[test]
fn permissions_decide_what_is_read() {
    let made = made("");
    let root = tempfile::tempdir().unwrap();
    let mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(root.path(), 0o755);
    for (name, database, journal) in [
        ("readable", 0o444, None),
        ("unreadable", 0o200, None),
        ("crashed", 0o444, Some(0o444)),
        ("secret_journal", 0o444, Some(0)),
    ] {
        let token = root.path().join(name);
        std::fs::create_dir(&token).unwrap();
        let path = token.join("sqlite3.db");
        std::fs::copy(&made.path, &path).unwrap();
        if let Some(journal) = journal {
            // Hot is a journal that does not begin with a zero byte and whose database nobody has reserved.
            let beside = token.join("sqlite3.db-journal");
            std::fs::write(&beside, b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7").unwrap();
            mode(&beside, journal);
        }
        mode(&path, database);
        mode(&token, 0o555);
    }
    // The test's own program may be where only its owner can reach it.
    let program = root.path().join("program");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    mode(&program, 0o755);
    let mut command = Command::new(program);
    command
        .args(["--exact", "unprivileged_reader", "--ignored"])
        .env(UNPRIVILEGED, root.path())
        .current_dir("/");
    if nix::unistd::geteuid().is_root() {
        // nobody
        command.uid(65534).gid(65534);
    }
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("1 passed"), "{text}");
    // So that a tester who is not root can remove it.
    for name in ["readable", "unreadable", "crashed", "secret_journal"] {
        mode(&root.path().join(name), 0o755);
    }
}
