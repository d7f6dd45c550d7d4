//! `tokenfs check`: says what is wrong and where, calls nothing wrong that is not, writes nothing unless told to, and what it mends
//! SoftHSM can use.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use support::template::{boolean, bytes, ulong};
use support::*;

/// What the command came to.
#[derive(Debug)]
struct Checked {
    code: i32,
    out: String,
    err: String,
}

impl Checked {
    fn of(command: &mut Command) -> Self {
        let output = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Self {
            code: output.status.code().unwrap(),
            out: text(output.stdout),
            err: text(output.stderr),
        }
    }

    fn summary(&self) -> &str {
        self.out.lines().last().unwrap_or_default()
    }

    fn findings(&self) -> Vec<&str> {
        let mut lines: Vec<&str> = self.out.lines().collect();
        lines.pop();
        lines
    }

    /// The line about a path, which must be the only one.
    #[track_caller]
    fn of_path(&self, path: &Path) -> &str {
        let prefix = format!("{}: ", path.display());
        let lines: Vec<&str> = self
            .findings()
            .into_iter()
            .filter(|line| line.starts_with(&prefix))
            .collect();
        assert_eq!(lines.len(), 1, "{}: {self:#?}", path.display());
        &lines[0][prefix.len()..]
    }

    #[track_caller]
    fn assert_clean(&self) {
        assert_eq!((self.code, self.err.as_str()), (0, ""), "{self:#?}");
        assert!(self.summary().ends_with(": clean"), "{self:#?}");
        assert!(self.findings().is_empty(), "{self:#?}");
    }
}

fn check(softhsm: &Softhsm, arguments: &[&str]) -> Checked {
    Checked::of(
        tokenfs()
            .args(["check", "--config"])
            .arg(&softhsm.conf)
            .args(arguments),
    )
}

/// Names, contents, modes and the times that tell of a change.
fn exactly(softhsm: &Softhsm) -> (Snapshot, BTreeMap<PathBuf, (i64, i64, i64, i64)>) {
    let times = walk(&softhsm.tokendir)
        .into_iter()
        .map(|path| {
            let m = fs::symlink_metadata(&path).unwrap();
            let times = (m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec());
            (path, times)
        })
        .collect();
    (softhsm.snapshot(), times)
}

/// Looks, and is sure that nothing was written.
#[track_caller]
fn look(softhsm: &Softhsm) -> Checked {
    let before = exactly(softhsm);
    let checked = check(softhsm, &[]);
    let after = exactly(softhsm);
    before.0.assert_same(&after.0);
    assert_eq!(before.1, after.1);
    checked
}

/// A lock on a whole file, as SoftHSM's, for as long as the file is open.
fn hold(path: &Path) -> fs::File {
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let lock = nix::libc::flock {
        l_type: nix::libc::F_WRLCK as _,
        l_whence: nix::libc::SEEK_SET as _,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    file
}

/// Where the attributes of an object file end, the generation being the first end.
fn ends(data: &[u8]) -> Vec<usize> {
    let number = |at: usize| u64::from_be_bytes(data[at..at + 8].try_into().unwrap()) as usize;
    let mut ends = vec![8];
    let mut at = 8;
    while at < data.len() {
        at += 16
            + match number(at + 8) {
                1 => 1,
                2 => 8,
                3 | 4 => 8 + number(at + 16),
                5 => 8 + 8 * number(at + 16),
                other => panic!("kind {other}"),
            };
        ends.push(at);
    }
    ends
}

/// The `.object` files of a token, without its own.
fn objects(token: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(token)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.retain(|path| {
        path.extension() == Some(OsStr::new("object")) && !path.ends_with("token.object")
    });
    paths.sort();
    paths
}

fn data_object(label: &str) -> Vec<template::Attribute> {
    vec![
        ulong(0, 0),
        boolean(1, true),
        boolean(2, false),
        bytes(3, label),
        bytes(0x11, "value"),
    ]
}

/// A store with a token of `file` and one public data object; its file.
fn with_object() -> (Softhsm, P11, PathBuf) {
    let (softhsm, mut client) = Softhsm::with_token(Backend::File);
    client.create(&data_object("it")).unwrap();
    let object = objects(&softhsm.token_directory()).remove(0);
    (softhsm, client, object)
}

// ------------------------------------------------------------------------------------------------------- no alarm

#[test]
fn golden_stores_are_clean() {
    for golden in GOLDEN {
        for backend in BACKENDS {
            let softhsm = Softhsm::golden(golden, backend);
            let checked = look(&softhsm);
            checked.assert_clean();
            assert_eq!(checked.summary(), "4 tokens, 36 objects: clean");
            let said = check(&softhsm, &["-v"]);
            assert_eq!(said.code, 0, "{said:#?}");
            let expected = format!(": note: a token of the backend {backend}, 32 objects\n");
            assert!(said.out.contains(&expected), "{said:#?}");
            let before = exactly(&softhsm);
            check(&softhsm, &["--repair"]).assert_clean();
            assert!(before == exactly(&softhsm), "a clean store is not written");
        }
    }
}

both_backends! {
    fn what_softhsm_fills_stays_clean(backend) {
        let softhsm = Softhsm::new(backend);
        softhsm.p11().populate().unwrap();
        check(&softhsm, &[]).assert_clean();
        // A listing writes.
        let mut client = softhsm.p11();
        client.open("Prod Schlüssel 1", Some(PIN)).unwrap();
        client.find(&[]).unwrap();
        check(&softhsm, &[]).assert_clean();
    }

    fn a_store_in_use_is_clean(backend) {
        let (softhsm, mut writer) = Softhsm::with_token(backend);
        let mut logins = softhsm.p11();
        let mut keys = softhsm.p11();
        keys.open("test", Some(PIN)).unwrap();
        let done = AtomicBool::new(false);
        let running = || !done.load(Ordering::Relaxed);
        let mut rounds = 0;
        let written = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut written = 0;
                while running() {
                    let made = writer.bulk(3, "made", &data_object("x")).unwrap();
                    writer.set_label(made[0], "changed").unwrap();
                    for object in made {
                        writer.destroy(object).unwrap();
                    }
                    written += 1;
                }
                written
            });
            scope.spawn(|| {
                while running() {
                    logins.open("test", Some(PIN)).unwrap();
                }
            });
            scope.spawn(|| {
                let template = [boolean(1, true), boolean(2, true), ulong(0x161, 32)];
                while running() {
                    let key = keys.generate(0x1080, &template).unwrap();
                    keys.destroy(key).unwrap();
                }
            });
            let deadline = Instant::now() + Duration::from_secs(if full() { 30 } else { 6 });
            let mut alarms = Vec::new();
            while Instant::now() < deadline {
                let checked = check(&softhsm, &[]);
                rounds += 1;
                if checked.code != 0 {
                    alarms.push(checked);
                }
            }
            done.store(true, Ordering::Relaxed);
            assert!(alarms.is_empty(), "{alarms:#?}");
            writer.join().unwrap()
        });
        println!("{rounds} checks beside {written} rounds of writing");
        assert!(rounds > 3 && written > 3, "{rounds} {written}");
        check(&softhsm, &[]).assert_clean();
    }
}

#[test]
fn an_object_with_few_attributes_is_not_called_cut_off() {
    let (softhsm, _, object) = with_object();
    let data = fs::read(&object).unwrap();
    // CKA_LABEL without what comes before it is nothing that a cut leaves.
    let ends = ends(&data);
    let sparse = [&data[..ends[1]], &data[ends[3]..ends[4]]].concat();
    fs::write(&object, sparse).unwrap();
    check(&softhsm, &[]).assert_clean();
}

// ------------------------------------------------------------------------------------------------ torn, suspicious

#[test]
fn every_cut_of_an_object_is_found_with_its_place() {
    let softhsm = Softhsm::golden(Golden::V2_6_1, Backend::File);
    let mut expected = BTreeMap::new();
    for token in softhsm.token_directories() {
        for object in objects(&token) {
            let data = fs::read(&object).unwrap();
            let ends = ends(&data);
            let (whole, boundaries) = ends.split_last().unwrap();
            assert_eq!(*whole, data.len());
            for end in boundaries {
                for (length, word) in [
                    (*end, "suspicious"),
                    (end + 7, "suspicious"),
                    (end + 8, "torn"),
                ] {
                    let stem = object.file_stem().unwrap().to_str().unwrap();
                    let copy = token.join(format!("{stem}-{length}.object"));
                    fs::write(&copy, &data[..length]).unwrap();
                    set_mode(&copy, 0o600);
                    fs::File::create(copy.with_extension("lock")).unwrap();
                    set_mode(&copy.with_extension("lock"), 0o600);
                    // Within an attribute, the offset is that of the field that is not there.
                    let place = if word == "torn" { length } else { *end };
                    expected.insert(copy, (word, place));
                }
            }
        }
    }
    let checked = look(&softhsm);
    assert_eq!(checked.code, 1);
    assert_eq!(checked.findings().len(), expected.len());
    for (path, (word, place)) in &expected {
        let line = checked.of_path(path);
        assert!(line.starts_with(&format!("{word}: ")), "{line}");
        assert!(line.ends_with(&format!(" at byte {place}")), "{line}");
    }
    let said = format!(
        "4 tokens, {} objects: {} findings",
        36 + expected.len(),
        expected.len()
    );
    assert_eq!(checked.summary(), said);
    println!("{} cuts", expected.len());
    // Nothing of that can be mended.
    let before = exactly(&softhsm);
    assert_eq!(check(&softhsm, &["--repair"]).code, 1);
    assert!(before == exactly(&softhsm));
}

#[test]
fn a_cut_that_softhsm_has_filled_up_is_found_by_the_lost_key() {
    let (softhsm, mut client) = Softhsm::with_token(Backend::File);
    let template = [
        boolean(1, true),
        boolean(2, true),
        ulong(0x161, 32),
        bytes(3, "key"),
    ];
    client.generate(0x1080, &template).unwrap();
    drop(client);
    let object = objects(&softhsm.token_directory()).remove(0);
    let data = fs::read(&object).unwrap();
    // Behind CKA_LABEL: what is left has no key type.
    fs::write(&object, &data[..ends(&data)[4]]).unwrap();
    let checked = check(&softhsm, &[]);
    assert!(
        checked
            .of_path(&object)
            .contains("looks cut off behind CKA_LABEL: "),
        "{checked:#?}"
    );
    // Behind CKA_KEY_TYPE, and CKA_VALUE made empty: as SoftHSM fills it up.
    let types: Vec<u64> = ends(&data)
        .iter()
        .filter(|end| **end < data.len())
        .map(|end| u64::from_be_bytes(data[*end..end + 8].try_into().unwrap()))
        .collect();
    let value = ends(&data)[types.iter().position(|t| *t == 0x11).unwrap()];
    let length = u64::from_be_bytes(data[value + 16..value + 24].try_into().unwrap()) as usize;
    let filled = [&data[..value + 16], &[0; 8], &data[value + 24 + length..]].concat();
    fs::write(&object, filled).unwrap();
    let checked = check(&softhsm, &[]);
    let line = checked.of_path(&object);
    assert!(line.starts_with("suspicious: CKA_VALUE is empty"), "{line}");
}

#[test]
fn each_thing_in_an_object_is_named_with_its_byte() {
    let (softhsm, mut client) = Softhsm::with_token(Backend::File);
    let mut private = data_object("private");
    private[2] = boolean(2, true);
    for _ in 0..6 {
        client.create(&private).unwrap();
    }
    drop(client);
    let files = objects(&softhsm.token_directory());
    let data = fs::read(&files[0]).unwrap();
    let ends = ends(&data);
    // Empty, as SoftHSM leaves it when it dies at the wrong moment.
    fs::write(&files[0], b"").unwrap();
    // Attributes in another order.
    let swapped = [
        &data[..ends[1]],
        &data[ends[2]..ends[3]],
        &data[ends[1]..ends[2]],
        &data[ends[3]..],
    ];
    fs::write(&files[1], swapped.concat()).unwrap();
    // One twice, next to each other.
    let twice = [&data[..ends[2]], &data[ends[1]..ends[2]], &data[ends[2]..]];
    fs::write(&files[2], twice.concat()).unwrap();
    // A label in the clear.
    let mut clear = data.clone();
    let label = ends[3];
    clear.splice(
        label + 16..ends[4],
        [&5u64.to_be_bytes()[..], b"clear"].concat(),
    );
    fs::write(&files[3], clear).unwrap();
    // Too large to be read.
    fs::File::options()
        .write(true)
        .open(&files[4])
        .unwrap()
        .set_len(1 << 30)
        .unwrap();
    let checked = look(&softhsm);
    for (file, start, end) in [
        (0, "torn: ", " at byte 0".to_owned()),
        (
            1,
            "suspicious: CKA_TOKEN follows CKA_PRIVATE",
            format!(" at byte {}", ends[1] + ends[3] - ends[2]),
        ),
        (
            2,
            "suspicious: CKA_TOKEN is stored more than once",
            format!(" at byte {}", ends[2]),
        ),
        (
            3,
            "suspicious: CKA_LABEL of a private object is no ciphertext (5 bytes)",
            format!(" at byte {label}"),
        ),
        (4, "torn: ", String::new()),
    ] {
        let line = checked.of_path(&files[file]);
        assert!(line.starts_with(start) && line.ends_with(&end), "{line}");
    }
    assert_eq!(checked.findings().len(), 5, "{checked:#?}");
    // No value is ever quoted.
    assert!(!checked.out.contains("\"clear\"") && !checked.out.contains("clear\n"));
    // And it is as bad as it says.
    let mut client = softhsm.p11();
    client.open("test", Some(PIN)).unwrap();
    assert_eq!(
        client.find_label("it"),
        Err(Refusal("CKR_GENERAL_ERROR".into()))
    );
}

#[test]
fn a_token_object_that_is_cut_is_found() {
    let (softhsm, client) = Softhsm::with_token(Backend::File);
    drop(client);
    let own = softhsm.token_directory().join("token.object");
    let data = fs::read(&own).unwrap();
    let ends = ends(&data);
    fs::write(&own, &data[..ends[3]]).unwrap();
    let checked = look(&softhsm);
    assert_eq!(
        checked.of_path(&own),
        "suspicious: the token lacks CKA_OS_SOPIN"
    );
    fs::write(&own, &data[..ends[3] + 9]).unwrap();
    let checked = look(&softhsm);
    let line = checked.of_path(&own);
    assert!(line.starts_with("torn: ") && line.ends_with(&format!(" at byte {}", ends[3] + 8)));
    assert_eq!(checked.code, 1);
}

// --------------------------------------------------------------------------------------------- missing, left over

#[test]
fn a_lock_file_is_made_again_and_softhsm_can_destroy_the_object() {
    let (softhsm, mut client, object) = with_object();
    let lock = object.with_extension("lock");
    let token_lock = softhsm.token_directory().join("token.lock");
    set_mode(&object, 0o400);
    if is_root() {
        give(&object, ALICE);
    }
    fs::remove_file(&lock).unwrap();
    fs::remove_file(&token_lock).unwrap();
    let checked = look(&softhsm);
    assert_eq!(checked.code, 1);
    assert_eq!(checked.summary(), "1 token, 1 object: 2 findings");
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
        "1 token, 1 object: 2 findings, 2 mended"
    );
    let (made, like) = (fs::metadata(&lock).unwrap(), fs::metadata(&object).unwrap());
    assert_eq!(made.len(), 0);
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
    let held = hold(&lock);
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
fn what_a_write_left_is_told_from_a_write_that_goes_on() {
    let (softhsm, _client, object) = with_object();
    let token = softhsm.token_directory();
    let building = softhsm.tokendir.join("building");
    fs::create_dir(&building).unwrap();
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
    assert_eq!(checked.findings().len(), left.len(), "{checked:#?}");
    for (path, _) in &left {
        let line = checked.of_path(path);
        assert!(
            line.starts_with("leftover: ") && line.ends_with("(--repair mends it)"),
            "{line}"
        );
    }
    // Whoever writes holds the lock. (That of the object is shared out, so that the object itself can be read.)
    let held: Vec<_> = [
        token.join("token.object"),
        building.join(".tokenfs-building"),
    ]
    .iter()
    .map(|path| hold(path))
    .collect();
    for path in [&left[0].0, &left[1].0] {
        fs::remove_file(path).unwrap();
    }
    let checked = look(&softhsm);
    assert!(checked.findings().is_empty(), "{checked:#?}");
    // It could not look into `token.object`.
    assert_eq!(checked.code, 2, "{checked:#?}");
    drop(held);
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

#[test]
fn the_umask_of_a_shell_takes_nothing_away_for_others() {
    let softhsm = Softhsm::golden(Golden::V2_7_0, Backend::File);
    let before = exactly(&softhsm);
    let mut shell = Command::new("/bin/sh");
    shell
        .args(["-c", "umask 077; exec \"$@\"", "sh"])
        .arg(binary())
        .args(["check", "--repair", "--config"])
        .arg(&softhsm.conf);
    let checked = Checked::of(&mut shell);
    assert_eq!(checked.code, 1);
    assert!(
        checked.out.contains("the umask of this process"),
        "{checked:#?}"
    );
    assert!(before == exactly(&softhsm));
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
        assert!(
            checked.of_path(path).starts_with("foreign: "),
            "{checked:#?}"
        );
    }
    assert_eq!(checked.summary(), "1 token, 1 object: 7 findings");

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

const CRASH: &str = "TOKENFS_TEST_CRASH_CHECKED";

/// Not a test: the process that dies in the middle of a transaction whose pages have reached the file.
#[test]
#[ignore = "run by the test of a crashed writer"]
fn crashing_writer() {
    let Some(path) = std::env::var_os(CRASH) else {
        return;
    };
    let writer = rusqlite::Connection::open(path).unwrap();
    writer
        .execute_batch(
            "pragma cache_size = 2; pragma cache_spill = 1; begin immediate;
             update attribute_binary set value = x'626164';
             insert into attribute_binary (value, type, object_id) values (zeroblob(400000), 17, 2)",
        )
        .unwrap();
    std::process::abort();
}

#[test]
fn a_left_journal_is_rolled_back_by_repair_alone() {
    let softhsm = Softhsm::golden(Golden::V2_6_1, Backend::Db);
    let intact = softhsm.snapshot();
    let database = softhsm.token_directories().remove(0).join("sqlite3.db");
    let mut writer = Command::new(std::env::current_exe().unwrap());
    writer
        .args(["--exact", "crashing_writer", "--ignored"])
        .env(CRASH, &database);
    assert!(!writer.output().unwrap().status.success());
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

// --------------------------------------------------------------------------------------------------- could not look

#[test]
fn what_cannot_be_looked_at_is_exit_code_2() {
    let (softhsm, _client, object) = with_object();
    let missing = Checked::of(tokenfs().args(["check", "--tokendir", "/nonexistent/tokens"]));
    let unknown = check(&softhsm, &["nobody"]);
    let wrong = check(&softhsm, &["--backend", "sql"]);
    softhsm.configure("objectstore.umask = 99\n");
    let umask = check(&softhsm, &[]);
    softhsm.configure("");
    for (what, checked) in [
        ("missing", missing),
        ("unknown", unknown),
        ("wrong", wrong),
        ("umask", umask),
    ] {
        assert_eq!(
            (checked.code, checked.out.as_str()),
            (2, ""),
            "{what}: {checked:#?}"
        );
        assert!(!checked.err.is_empty(), "{what}");
    }

    // One object is locked, of another the lock file is missing: both are said, and 2 is the code.
    let held = hold(&object);
    fs::remove_file(object.with_extension("lock")).unwrap();
    let start = Instant::now();
    let checked = check(&softhsm, &[]);
    assert!(start.elapsed() < Duration::from_secs(20));
    assert_eq!(checked.code, 2, "{checked:#?}");
    assert!(
        checked.err.contains(object.to_str().unwrap()),
        "{checked:#?}"
    );
    assert!(
        checked
            .of_path(&object.with_extension("lock"))
            .starts_with("missing: ")
    );
    assert!(
        checked
            .summary()
            .ends_with("1 could not be looked at or mended"),
        "{checked:#?}"
    );
    drop(held);
}

both_backends! {
    fn a_token_that_may_not_be_read_is_exit_code_2_and_the_rest_is_told(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        give(softhsm.directory.path(), ALICE);
        let tokens = softhsm.token_directories();
        give(&tokens[0], BOB);
        let checked = Checked::of(
            tokenfs_as(ALICE)
                .args(["check", "--config"])
                .arg(&softhsm.conf),
        );
        assert_eq!(checked.code, 2, "{checked:#?}");
        assert!(checked.err.contains(tokens[0].to_str().unwrap()), "{checked:#?}");
        assert!(checked.summary().starts_with("3 tokens, "), "{checked:#?}");
        assert!(!checked.summary().contains("clean"), "{checked:#?}");
    }
}
