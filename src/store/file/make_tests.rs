//! Making and removing objects, and building tokens: what it leaves on disk, and what it refuses.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use super::fixture::{
    Fixture, LABEL, files, fixture, generation, hold, id, name, new_object, sample, set_label, soon,
};
use super::*;
use crate::diagnostics::Diagnostics;
use crate::error::ErrorKind;
use crate::store::attribute::Value;
use crate::store::{ObjectId, Options, Patience, Token, TokenName};

#[test]
fn an_object_appears_whole_with_its_lock_file_and_softhsm_is_told() {
    let fixture = fixture();
    let time = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let mut new = new_object(sample());
    new.mtime = Some(time);
    fixture.token.create(&name("b"), &new, soon()).unwrap();
    let object = fs::metadata(fixture.path("b.object")).unwrap();
    assert_eq!(object.modified().unwrap(), time);
    assert_eq!((object.mode() & 0o7777, object.nlink()), (0o640, 1));
    let lock = fs::metadata(fixture.path("b.lock")).unwrap();
    assert_eq!((lock.mode() & 0o7777, lock.len()), (0o640, 0));
    assert_eq!(generation(&fixture), 9);
    let found = fixture.token.object(&id("b"), soon()).unwrap();
    assert_eq!(&found.attributes, &sample());
    // A SoftHSM that knows one of that name from before has to see that it is another.
    assert!(found.generation.unwrap() > 1 << 40);
    assert_eq!(
        files(&fixture),
        [
            "a.lock",
            "a.object",
            "b.lock",
            "b.object",
            "generation",
            "token.object"
        ]
    );
}

#[test]
fn what_cannot_be_made_leaves_nothing_behind() {
    let fixture = fixture();
    symlink("nowhere", fixture.path("link.object")).unwrap();
    let before = files(&fixture);
    let mut secret = sample();
    secret.insert(2, Value::Bool(true));
    let long = "x".repeat(240);
    for (stem, attributes, kind) in [
        ("a", sample(), ErrorKind::Exists),
        ("link", sample(), ErrorKind::Exists),
        ("token", sample(), ErrorKind::Invalid),
        (long.as_str(), sample(), ErrorKind::NameTooLong),
        ("secret", secret, ErrorKind::Invalid),
    ] {
        let result = fixture
            .token
            .create(&name(stem), &new_object(attributes), soon());
        assert_eq!(result.unwrap_err().kind(), kind, "{stem}");
    }
    // SoftHSM could not be told: then there is no object either, but the lock file that was there stays.
    fs::remove_file(fixture.path("generation")).unwrap();
    fs::create_dir(fixture.path("generation")).unwrap();
    fixture.write("orphan.lock", b"");
    for stem in ["b", "orphan"] {
        let result = fixture
            .token
            .create(&name(stem), &new_object(sample()), soon());
        assert!(result.is_err());
    }
    let mut expected = before;
    expected.push("orphan.lock".to_owned());
    expected.sort();
    assert_eq!(files(&fixture), expected);
    assert_eq!(generation_error(&fixture), ErrorKind::NotFound);
}

fn generation_error(fixture: &Fixture) -> ErrorKind {
    fixture.token.remove(&name("a"), soon()).unwrap_err().kind()
}

#[test]
fn the_longest_name_that_fits_is_made_and_removed() {
    let fixture = fixture();
    let long = name(&"y".repeat(239));
    fixture
        .token
        .create(&long, &new_object(sample()), soon())
        .unwrap();
    set_label(&fixture, &ObjectId::Object(long.clone()), b"z").unwrap();
    assert_eq!(files(&fixture).len(), 6);
    // One of SoftHSM's that leaves no room can be removed, and is not changed.
    let longer = "z".repeat(248);
    fixture.write(&format!("{longer}.object"), &encode(1, &sample()));
    let error = set_label(&fixture, &id(&longer), b"z").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NameTooLong);
    // SoftHSM has to be told, or it stays.
    let mut held = hold(&fixture.path("generation"), 10.0);
    let briefly = Patience::at_most(Duration::from_millis(100));
    for present in [name(&longer), long] {
        let error = fixture.token.remove(&present, briefly).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        fixture
            .token
            .object(&ObjectId::Object(present), soon())
            .unwrap();
    }
    held.kill().unwrap();
    held.wait().unwrap();
    fixture.token.remove(&name(&longer), soon()).unwrap();
    assert_eq!(files(&fixture).len(), 6);
    // It can get another name, and a damaged one can be removed.
    let longest = "y".repeat(248);
    fixture.write(&format!("{longer}.object"), &encode(1, &sample()));
    let renamed = fixture.token.rename(&name(&longer), &name("short"), soon());
    renamed.unwrap();
    fixture.write(&format!("{longest}.object"), &[0xff; 40]);
    let removed = fixture.token.replace_damaged(&name(&longest), None, soon());
    removed.unwrap();
    assert_eq!(
        fixture.token.list(soon()).unwrap().len(),
        3,
        "a, the long one and the short one"
    );
}

/// A lock file that was left of another object becomes one of the new object, and what only has such a name does not.
#[test]
fn only_what_is_a_lock_file_is_given_to_who_makes_an_object() {
    for (content, links, mode) in [(&b""[..], 1, 0o640), (b"key", 1, 0o600), (b"", 2, 0o600)] {
        let fixture = fixture();
        fixture.write("b.lock", content);
        let lock = fixture.path("b.lock");
        fs::set_permissions(&lock, fs::Permissions::from_mode(0o600)).unwrap();
        if links == 2 {
            fs::hard_link(&lock, fixture.path("b")).unwrap();
        }
        let mut new = new_object(sample());
        new.access.mode = 0o640;
        fixture.token.create(&name("b"), &new, soon()).unwrap();
        assert_eq!(
            fs::metadata(&lock).unwrap().permissions().mode() & 0o777,
            mode
        );
    }
}

#[test]
fn a_removed_object_is_gone_with_its_lock_file_and_softhsm_is_told() {
    let fixture = fixture();
    fixture.token.remove(&name("a"), soon()).unwrap();
    assert_eq!(files(&fixture), ["generation", "token.object"]);
    assert_eq!(generation(&fixture), 9);
    let error = fixture.token.remove(&name("a"), soon()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(generation(&fixture), 9);
    // A damaged object, without a lock file.
    fixture.write("b.object", b"no object");
    fixture.token.remove(&name("b"), soon()).unwrap();
    assert_eq!(files(&fixture), ["generation", "token.object"]);
}

#[test]
fn a_missing_generation_becomes_a_number_that_nobody_has() {
    let fixture = fixture();
    fs::remove_file(fixture.path("generation")).unwrap();
    fixture.token.remove(&name("a"), soon()).unwrap();
    assert!(generation(&fixture) > 1 << 40);
}

#[test]
fn a_token_that_is_being_built_is_none_before_it_is_published() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("new")).unwrap();
    let tokendir = fs::File::open(directory.path()).unwrap();
    let path = directory.path().join("new");
    let token = FileToken::build(
        tokendir.as_fd(),
        TokenName::new("new".as_ref()).unwrap(),
        &path,
        new_object(sample()).access,
        Options::default(),
        Arc::new(Diagnostics::new()),
    )
    .unwrap();
    let now = Patience::Now;
    token
        .update(
            &ObjectId::Token,
            &mut |attributes| {
                attributes.insert(LABEL, Value::Bytes(b"label".to_vec()));
                Ok(())
            },
            None,
            now,
        )
        .unwrap();
    // Whom the directory belongs to may have put anything there.
    let victim = directory.path().join("victim");
    fs::write(&victim, b"12345678").unwrap();
    fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
    fs::hard_link(&victim, path.join("generation")).unwrap();
    token
        .create(&name("a"), &new_object(sample()), now)
        .unwrap();
    token
        .create(&name("b"), &new_object(sample()), now)
        .unwrap();
    token
        .update(
            &id("a"),
            &mut |attributes| {
                attributes.insert(LABEL, Value::Bytes(b"changed".to_vec()));
                Ok(())
            },
            None,
            now,
        )
        .unwrap();
    token.remove(&name("b"), now).unwrap();
    assert_eq!(token.list(now).unwrap().len(), 1);
    assert!(token.object(&ObjectId::Token, now).is_ok());
    assert!(!Path::new(&path.join("token.object")).exists());
    token.publish().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(
        (mode(&victim), mode(&path.join("generation"))),
        (0o600, 0o640)
    );
    assert_eq!(fs::read(&victim).unwrap(), b"12345678");
    let mut names: Vec<_> = fs::read_dir(&path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "a.lock",
            "a.object",
            "generation",
            "token.lock",
            "token.object"
        ]
    );
    // A SoftHSM that knows one of that name from before has to see that it is another.
    let generation: [u8; 8] = fs::read(path.join("generation"))
        .unwrap()
        .try_into()
        .unwrap();
    assert!(u64::from_be_bytes(generation) > 1 << 40);
    let own = token.object(&ObjectId::Token, soon()).unwrap();
    assert_eq!(own.attributes.bytes(LABEL), Some(&b"label"[..]));
    assert!(own.generation.unwrap() > 1 << 40);
    assert_eq!(own.metadata.mode, 0o640);
    assert!(token.publish().is_err());
}
