//! `tokenfs check` finds what is missing, lax, left over, foreign or unreadable; what `--repair` mends SoftHSM can use, and the rest is
//! left alone. Also databases.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod check_common;
mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::process::Command;

use check_common::*;
use support::*;

// --------------------------------------------------------------------------------------------- missing, left over

#[test]
fn a_lock_file_is_made_again_and_softhsm_can_destroy_the_object() {
    let (softhsm, mut client, object) = with_object();
    let lock = object.with_extension("lock");
    let token_lock = softhsm.token_directory().join("token.lock");
    // The lock file is made like an object whose mode is in order by then.
    set_mode(&object, 0o444);
    if is_root() {
        give(&object, ALICE);
    }
    fs::remove_file(&lock).unwrap();
    fs::remove_file(&token_lock).unwrap();
    let checked = look(&softhsm);
    assert_eq!(checked.code, 1);
    assert_eq!(checked.summary(), "1 token, 1 object: 3 findings");
    for path in [&lock, &token_lock] {
        let line = checked.of_path(path);
        assert!(
            line.starts_with("missing: ") && line.ends_with(" (--repair mends it)"),
            "{line}"
        );
    }
    let repaired = check(&softhsm, &["--repair"]);
    assert_eq!(
        (repaired.code, repaired.err.as_str()),
        (0, ""),
        "{repaired:#?}"
    );
    assert!(
        repaired.of_path(&lock).ends_with(" (mended)"),
        "{repaired:#?}"
    );
    assert_eq!(
        repaired.summary(),
        "1 token, 1 object: 3 findings, 3 mended"
    );
    let (made, like) = (fs::metadata(&lock).unwrap(), fs::metadata(&object).unwrap());
    assert_eq!((made.len(), mode(&lock)), (0, 0o400));
    assert_eq!(
        (made.mode(), made.uid(), made.gid()),
        (like.mode(), like.uid(), like.gid())
    );
    let found = client.find_label("it").unwrap();
    client.destroy(found[0]).unwrap();
    assert!(!object.exists() && !lock.exists());
    check(&softhsm, &[]).assert_clean();
}

#[test]
fn a_lock_file_without_an_object_goes_unless_it_is_in_use() {
    let (softhsm, _client, object) = with_object();
    let lock = object.with_extension("lock");
    fs::remove_file(&object).unwrap();
    let held = exclusively(&lock);
    check(&softhsm, &["--repair"]).assert_clean();
    assert!(lock.exists());
    drop(held);
    let checked = look(&softhsm);
    assert!(
        checked.of_path(&lock).starts_with("leftover: "),
        "{checked:#?}"
    );
    let repaired = check(&softhsm, &["--repair"]);
    assert_eq!(repaired.code, 0, "{repaired:#?}");
    assert!(!lock.exists());
}

#[test]
fn a_generation_is_made_that_no_session_has_seen() {
    let (softhsm, mut client, _) = with_object();
    let generation = softhsm.token_directory().join("generation");
    for content in [None, Some(&b""[..]), Some(b"123")] {
        match content {
            None => fs::remove_file(&generation).unwrap(),
            Some(content) => fs::write(&generation, content).unwrap(),
        }
        let checked = look(&softhsm);
        let word = if content.is_none() {
            "missing: "
        } else {
            "torn: "
        };
        assert!(
            checked.of_path(&generation).starts_with(word),
            "{checked:#?}"
        );
        assert_eq!(check(&softhsm, &["--repair"]).code, 0);
        let count = fs::read(&generation).unwrap();
        let count = u64::from_be_bytes(count.try_into().unwrap());
        assert!(count > 1_700_000_000, "{count}");
        assert_eq!(mode(&generation), 0o600);
    }
    // The session that was open all the while sees what others make.
    let mut other = softhsm.p11();
    other.open("test", Some(PIN)).unwrap();
    other.create(&data_object("new")).unwrap();
    assert_eq!(client.find_label("new").unwrap().len(), 1);
    drop(other);

    // What cannot be mended without a guess is left alone.
    fs::write(&generation, b"123456789").unwrap();
    let checked = check(&softhsm, &["--repair"]);
    let line = checked.of_path(&generation);
    assert!(
        line.starts_with("suspicious: ") && line.ends_with(" at byte 8"),
        "{line}"
    );
    assert_eq!(fs::read(&generation).unwrap(), b"123456789");
}

#[test]
fn what_a_write_left_is_put_right_and_a_write_that_goes_on_is_left_alone() {
    let (softhsm, _client, object) = with_object();
    let token = softhsm.token_directory();
    let building = softhsm.tokendir.join("building");
    fs::create_dir(&building).unwrap();
    let empty = softhsm
        .tokendir
        .join("a3f2c1d0-1234-5678-abcd-000000000001");
    fs::create_dir(&empty).unwrap();
    // Before the mark was made; SoftHSM has started since.
    let nameless = softhsm.tokendir.join(".tokenfs-new-building");
    fs::create_dir(&nameless).unwrap();
    fs::write(nameless.join("generation"), [0; 8]).unwrap();
    let left = [
        (
            object.with_extension("tokenfs-new"),
            object.with_extension("lock"),
        ),
        (
            object.with_extension("tokenfs-journal"),
            object.with_extension("lock"),
        ),
        (
            token.join("token.tokenfs-journal"),
            token.join("token.object"),
        ),
        (
            building.join(".tokenfs-building"),
            building.join(".tokenfs-building"),
        ),
    ];
    for (path, _) in &left {
        fs::write(path, b"").unwrap();
        set_mode(path, 0o600);
    }
    let checked = look(&softhsm);
    assert_eq!(checked.findings().len(), 2 + left.len(), "{checked:#?}");
    let directories = [&empty, &nameless];
    for path in left.iter().map(|(path, _)| path).chain(directories) {
        let line = checked.of_path(path);
        assert!(
            line.starts_with("leftover: ") && line.ends_with("(--repair mends it)"),
            "{line}"
        );
    }
    let repaired = check(&softhsm, &["--repair"]);
    assert_eq!(repaired.code, 0, "{repaired:#?}");
    assert_eq!(
        repaired.summary(),
        "1 token, 1 object: 6 findings, 6 mended"
    );
    assert!(!empty.exists() && !building.exists() && !nameless.exists());
    assert!(left.iter().all(|(path, _)| !path.exists()));
    assert!(object.exists() && object.with_extension("lock").exists());

    // Whoever writes holds the lock.
    fs::create_dir(&building).unwrap();
    fs::create_dir(&nameless).unwrap();
    fs::write(nameless.join(".tokenfs-building"), b"").unwrap();
    for (path, _) in &left[2..] {
        fs::write(path, b"").unwrap();
        set_mode(path, 0o600);
    }
    let held: Vec<_> = [
        token.join("token.object"),
        building.join(".tokenfs-building"),
        nameless.join(".tokenfs-building"),
    ]
    .iter()
    .map(|path| exclusively(path))
    .collect();
    let checked = look(&softhsm);
    assert!(checked.findings().is_empty(), "{checked:#?}");
    // It could not look into `token.object`.
    assert_eq!(checked.code, 2, "{checked:#?}");
    drop(held);
}

/// A mark says that nothing is lost by clearing a directory away, which is true of what was never a token.
#[test]
fn what_has_been_a_token_is_not_taken_for_one_that_was_being_made() {
    let (softhsm, client, object) = with_object();
    drop(client);
    let token = softhsm.token_directory();
    // A power failure kept the mark, and the token has lost its own object since.
    let mark = token.join(".tokenfs-building");
    fs::write(&mark, b"").unwrap();
    set_mode(&mark, 0o600);
    let own = fs::read(token.join("token.object")).unwrap();
    fs::remove_file(token.join("token.object")).unwrap();
    let checked = look(&softhsm);
    assert!(
        checked.of_path(&token).starts_with("torn: "),
        "{checked:#?}"
    );
    let advice = "(bring it back from a backup)";
    assert!(checked.of_path(&mark).ends_with(advice), "{checked:#?}");
    let before = softhsm.snapshot();
    let repaired = check(&softhsm, &["--repair"]);
    assert_eq!(repaired.code, 1, "{repaired:#?}");
    drop(Mount::new(&softhsm));
    before.assert_same(&softhsm.snapshot());
    // Brought back, it is whole.
    fs::write(token.join("token.object"), own).unwrap();
    set_mode(&token.join("token.object"), 0o600);
    check(&softhsm, &["--repair"]);
    assert!(object.exists() && !mark.exists());
    check(&softhsm, &[]).assert_clean();
}

#[test]
fn only_the_token_that_is_named_is_mended() {
    let (softhsm, client, object) = with_object();
    drop(client);
    let token = softhsm.token_directory();
    let other = softhsm.tokendir.join("other");
    fs::create_dir(&other).unwrap();
    let left = [
        object.with_extension("tokenfs-new"),
        other.join(".tokenfs-building"),
    ];
    for path in &left {
        fs::write(path, b"").unwrap();
        set_mode(path, 0o600);
    }
    let repaired = check(
        &softhsm,
        &["--repair", token.file_name().unwrap().to_str().unwrap()],
    );
    assert_eq!(repaired.code, 0, "{repaired:#?}");
    assert!(!left[0].exists() && left[1].exists());
}

// ---------------------------------------------------------------------------------------------------------- modes

both_backends! {
    fn what_the_mask_forbids_is_taken_away(backend) {
        let (softhsm, client) = Softhsm::with_token(backend);
        drop(client);
        let token = softhsm.token_directory();
        let file = token.join(if backend == Backend::File { "token.object" } else { "sqlite3.db" });
        set_mode(&token, 0o2755);
        set_mode(&file, 0o640);
        let checked = look(&softhsm);
        assert_eq!(checked.code, 1);
        assert_eq!(
            checked.of_path(&token),
            "lax: its mode is 2755, and the mask 0077 forbids 0055 of that (--repair mends it)"
        );
        assert_eq!(
            checked.of_path(&file),
            "lax: its mode is 0640, and the mask 0077 forbids 0040 of that (--repair mends it)"
        );
        let laxer = check(&softhsm, &["--umask", "0027"]);
        assert_eq!(laxer.findings().len(), 1, "{laxer:#?}");
        let repaired = check(&softhsm, &["--umask", "0027", "--repair"]);
        assert_eq!(repaired.code, 0, "{repaired:#?}");
        assert_eq!((mode(&token), mode(&file)), (0o2750, 0o640));
        let repaired = check(&softhsm, &["--repair"]);
        assert_eq!(repaired.summary(), "1 token, 0 objects: 2 findings, 2 mended");
        assert_eq!((mode(&token), mode(&file)), (0o2700, 0o600));
    }
}

both_backends! {
    fn the_umask_of_a_shell_says_nothing_of_the_store(backend) {
        let in_shell = |softhsm: &Softhsm, umask: &str| {
            let mut shell = Command::new("/bin/sh");
            shell
                .args(["-c", &format!("umask {umask}; exec \"$@\""), "sh"])
                .arg(binary())
                .args(["check", "--repair", "--config"])
                .arg(&softhsm.conf);
            Checked::of(&mut shell)
        };
        // Made with objectstore.umask 0027.
        let softhsm = Softhsm::golden(Golden::V2_7_0, backend);
        let before = exactly(&softhsm);
        for umask in ["077", "027", "0"] {
            in_shell(&softhsm, umask).assert_clean();
        }
        assert!(before == exactly(&softhsm));
        let token = softhsm.token_directories().remove(0);
        set_mode(&token, 0o755);
        let checked = in_shell(&softhsm, "077");
        assert_eq!(checked.code, 0, "{checked:#?}");
        assert!(checked.of_path(&token).ends_with(" (mended)"), "{checked:#?}");
        assert_eq!(mode(&token), 0o750);
    }
}

#[test]
fn an_access_control_list_that_lets_in_more_is_lax() {
    let (softhsm, _client, object) = with_object();
    run(tool("setfacl").args(["-m", "u:games:r"]).arg(&object));
    let checked = look(&softhsm);
    assert_eq!(
        checked.of_path(&object),
        "lax: its mode is 0640 (by an access control list), and the mask 0077 forbids 0040 of that (--repair mends it)"
    );
    assert_eq!(check(&softhsm, &["--repair"]).code, 0);
    let list = text_of(tool("getfacl").args(["-cE"]).arg(&object));
    assert!(list.contains("mask::---"), "{list}");
    check(&softhsm, &[]).assert_clean();
}

// ------------------------------------------------------------------------------------------------ foreign, unreadable

#[test]
fn what_does_not_belong_into_a_store_is_named() {
    let (softhsm, client, object) = with_object();
    drop(client);
    let token = softhsm.token_directory();
    let name = object.file_name().unwrap().to_str().unwrap();
    let strangers = [
        token.join("directory"),
        token.join("directory.object"),
        token.join("link.object"),
        token.join(format!(".{name}.Ab12Cd")),
        token.join(format!("{name}~")),
        softhsm.tokendir.join("empty"),
        softhsm.tokendir.join("link"),
    ];
    for directory in [0, 1, 5] {
        fs::create_dir(&strangers[directory]).unwrap();
    }
    symlink(&object, &strangers[2]).unwrap();
    for copy in [3, 4] {
        fs::copy(&object, &strangers[copy]).unwrap();
    }
    symlink(&token, &strangers[6]).unwrap();
    // Nobody minds these.
    fs::write(token.join("README"), b"").unwrap();
    fs::write(softhsm.tokendir.join("README"), b"").unwrap();
    let checked = look(&softhsm);
    for path in &strangers {
        let line = checked.of_path(path);
        let told = line.starts_with("foreign: ") && line.ends_with(" (move it out of the store)");
        assert!(told, "{line}");
    }
    assert_eq!(checked.summary(), "1 token, 1 object: 7 findings");

    // The file system's own, and a token that SoftHSM finds through a link.
    fs::create_dir(softhsm.tokendir.join("lost+found")).unwrap();
    let linked = softhsm.tokendir.join("linked");
    fs::create_dir(&linked).unwrap();
    symlink(token.join("token.object"), linked.join("token.object")).unwrap();
    let checked = check(&softhsm, &["linked", "lost+found"]);
    assert_eq!(checked.summary(), "0 tokens, 0 objects: 1 finding");
    let line = checked.of_path(&linked.join("token.object"));
    assert!(line.starts_with("suspicious: "), "{line}");

    let lost = softhsm.tokendir.join("lost");
    fs::create_dir(&lost).unwrap();
    fs::copy(&object, lost.join(name)).unwrap();
    let checked = check(&softhsm, &["lost"]);
    assert!(checked.of_path(&lost).starts_with("torn: "), "{checked:#?}");
    assert_eq!(checked.summary(), "0 tokens, 0 objects: 1 finding");
    let one = check(&softhsm, &[token.file_name().unwrap().to_str().unwrap()]);
    assert_eq!(one.findings().len(), 5, "{one:#?}");
}

both_backends! {
    fn a_token_of_the_other_backend_is_unreadable(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        let other = if backend == Backend::File { "db" } else { "file" };
        let checked = check(&softhsm, &["--backend", other]);
        assert_eq!(checked.code, 1);
        assert_eq!(checked.summary(), "4 tokens, 36 objects: 4 findings");
        for token in softhsm.token_directories() {
            let line = checked.of_path(&token);
            assert!(
                line.starts_with(&format!("unreadable: a token of the backend {backend}, and")),
                "{line}"
            );
        }
        // And if nobody says what SoftHSM is configured for, either will do.
        let mut command = tokenfs();
        command
            .args(["check", "--tokendir"])
            .arg(&softhsm.tokendir)
            .env("SOFTHSM2_CONF", "/nonexistent/softhsm2.conf");
        let checked = Checked::of(&mut command);
        assert_eq!(checked.code, 0, "{checked:#?}");
    }
}

// ----------------------------------------------------------------------------------------------------- databases

#[test]
fn a_left_journal_is_rolled_back_by_repair_alone() {
    let softhsm = Softhsm::golden(Golden::V2_6_1, Backend::Db);
    let intact = softhsm.snapshot();
    let database = softhsm.token_directories().remove(0).join("sqlite3.db");
    crash_a_writer(&database);
    set_mode(&database.with_file_name("sqlite3.db-journal"), 0o600);
    let checked = look(&softhsm);
    assert_eq!(checked.code, 1);
    let line = checked.of_path(&database);
    assert!(
        line.starts_with("leftover: ") && line.ends_with("(--repair mends it)"),
        "{line}"
    );
    let repaired = check(&softhsm, &["--repair"]);
    assert_eq!(repaired.code, 0, "{repaired:#?}");
    assert_eq!(
        repaired.summary(),
        "4 tokens, 36 objects: 1 finding, 1 mended"
    );
    intact.assert_same(&softhsm.snapshot());
}

#[test]
fn damage_in_a_database_is_named_by_table_and_row() {
    let softhsm = Softhsm::golden(Golden::V2_6_1, Backend::Db);
    let tokens = softhsm.token_directories();
    let large = tokens
        .iter()
        .max_by_key(|token| fs::metadata(token.join("sqlite3.db")).unwrap().len())
        .unwrap()
        .join("sqlite3.db");
    let change = |sql: &str| {
        let writer = rusqlite::Connection::open(&large).unwrap();
        writer.execute_batch("pragma foreign_keys = off").unwrap();
        writer.execute_batch(sql).unwrap();
    };
    // Doubled rows are SoftHSM's own doing.
    change(
        "insert into attribute_boolean (value, type, object_id) select value, type, object_id from attribute_boolean",
    );
    look(&softhsm).assert_clean();

    let private = "(select object_id from attribute_boolean where type = 2 and value = 1 and object_id > 1 limit 1)";
    for (sql, word, sentence) in [
        (
            format!("update attribute_binary set value = x'00' where type = 3 and object_id = {private}"),
            "suspicious",
            "CKA_LABEL of a private object is no ciphertext (1 bytes)",
        ),
        (
            "insert into attribute_integer (id, value, type, object_id) values (7777, 1, 0, 999), (7778, 1, 0, 999)".to_owned(),
            "suspicious",
            "2 rows in attribute_integer belong to no object, the first of them row 7777",
        ),
        ("insert into object values (555)".to_owned(), "suspicious", "(row 555): the object has no attributes at all"),
        (
            "insert into attribute_text (value, type, object_id) values ('none', 3561702913, 2)".to_owned(),
            "suspicious",
            "what object 2 remembers as its UUID is none",
        ),
        (
            "update attribute_integer set value = 'text' where type = 0 and object_id = 3".to_owned(),
            "torn",
            "(row 3): row ",
        ),
    ] {
        let intact = fs::read(&large).unwrap();
        change(&sql);
        let checked = look(&softhsm);
        assert_eq!(checked.code, 1, "{sql}: {checked:#?}");
        let line = checked.of_path(&large);
        assert!(line.starts_with(&format!("{word}: ")), "{sql}: {line}");
        assert!(line.contains(sentence), "{sql}: {line}");
        fs::write(&large, intact).unwrap();
    }

    // Pages that do not hold what they should.
    let mut pages = fs::read(&large).unwrap();
    let size = pages.len();
    pages[4096 * 2..4096 * 2 + 200].fill(0xff);
    fs::write(&large, &pages).unwrap();
    let checked = look(&softhsm);
    assert_eq!(checked.code, 1, "{checked:#?}");
    assert!(
        checked
            .findings()
            .iter()
            .all(|line| line.contains("/sqlite3.db: torn: ")),
        "{checked:#?}"
    );
    fs::write(&large, &pages[..size / 2]).unwrap();
    assert_eq!(look(&softhsm).code, 1);
    fs::write(
        &large,
        b"no database at all, but long enough to be looked at",
    )
    .unwrap();
    let checked = look(&softhsm);
    assert!(
        checked.of_path(&large).starts_with("torn: "),
        "{checked:#?}"
    );
}
