//! Damages and the answer to each; round trips; reading beside writers.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::diagnostics::Diagnostics;
use crate::error::ErrorKind;
use crate::store::attribute::{Attributes, Value};
use crate::store::{ObjectId, ObjectName, Options, Patience, Token, TokenName};

pub(super) const LABEL: u64 = 3;
pub(super) const CLASS: u64 = 0;
pub(super) const TEMPLATE: u64 = 0x4000_0211;
const MECHANISMS: u64 = 0x4000_0600;

pub(super) fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

pub(super) fn sample() -> Attributes {
    let mut template = Attributes::new();
    template.insert(CLASS, Value::Ulong(4));
    template.insert(LABEL, Value::Bytes(b"in a map".to_vec()));
    template.insert(0x162, Value::Bool(true));
    template.insert(MECHANISMS, Value::Mechs([1, 0x40].into()));
    let mut attributes = Attributes::new();
    attributes.insert(CLASS, Value::Ulong(u64::MAX));
    attributes.insert(1, Value::Bool(false));
    attributes.insert(LABEL, Value::Bytes(b"label".to_vec()));
    attributes.insert(0x102, Value::Bytes(Vec::new()));
    attributes.insert(TEMPLATE, Value::Map(template));
    attributes.insert(0x4000_0212, Value::Map(Attributes::new()));
    attributes.insert(MECHANISMS, Value::Mechs([0x0d, 0x40].into()));
    attributes
}

#[test]
fn what_is_written_is_what_is_read() {
    let decoded = decode(&encode(7, &sample())).unwrap();
    assert_eq!(decoded.generation, Some(7));
    assert_eq!(decoded.attributes, sample());
    assert_eq!(decoded.trailing, None);
}

#[test]
fn of_a_repeated_type_the_last_wins_whatever_its_kind() {
    let mut bytes = words(&[1, LABEL, KIND_BYTES, 1]);
    bytes.push(b'a');
    bytes.extend(words(&[LABEL, KIND_ULONG, 5]));
    let attributes = decode(&bytes).unwrap().attributes;
    assert_eq!(attributes.len(), 1);
    assert_eq!(attributes.ulong(LABEL), Some(5));
}

#[test]
fn of_a_repeated_type_in_a_map_the_first_wins() {
    let entry = |value| words(&[CLASS, KIND_ULONG, value]);
    let mut bytes = words(&[1, TEMPLATE, KIND_MAP, 48]);
    bytes.extend(entry(1));
    bytes.extend(entry(2));
    let Some(Value::Map(map)) = decode(&bytes)
        .unwrap()
        .attributes
        .of_type(TEMPLATE)
        .cloned()
    else {
        panic!("no map");
    };
    assert_eq!(map.ulong(CLASS), Some(1));
}

/// Each damage, with the byte that the error names and a part of what it says.
#[test]
fn every_damage_has_its_answer() {
    let table: &[(&str, Vec<u8>, u64, &str)] = &[
        ("nothing", vec![], 0, "empty"),
        ("a type alone", words(&[1, LABEL]), 16, "kind"),
        (
            "no value",
            words(&[1, CLASS, KIND_ULONG]),
            24,
            "unsigned long",
        ),
        (
            "half a ulong",
            [words(&[1, CLASS, KIND_ULONG]), vec![0; 7]].concat(),
            24,
            "7 are left",
        ),
        ("no boolean", words(&[1, 1, KIND_BOOLEAN]), 24, "boolean"),
        ("kind 0", words(&[1, CLASS, 0, 0]), 16, "0 is no kind"),
        ("kind 6", words(&[1, CLASS, 6, 0]), 16, "6 is no kind"),
        ("kind 2^63", words(&[1, CLASS, 1 << 63]), 16, "no kind"),
        (
            "a length of 1 too many",
            words(&[1, LABEL, KIND_BYTES, 1]),
            32,
            "byte string",
        ),
        (
            "a length of 2^63",
            words(&[1, LABEL, KIND_BYTES, 1 << 63]),
            32,
            "byte string",
        ),
        (
            "a length of 2^64-1",
            words(&[1, LABEL, KIND_BYTES, u64::MAX]),
            32,
            "byte string",
        ),
        ("no length", words(&[1, LABEL, KIND_BYTES]), 24, "length"),
        (
            "a set of 2^60",
            words(&[1, MECHANISMS, KIND_MECHANISMS, 1 << 60]),
            24,
            "mechanism set",
        ),
        (
            "a set of 2^61",
            words(&[1, MECHANISMS, KIND_MECHANISMS, 1 << 61]),
            24,
            "mechanism set",
        ),
        (
            "a set one short",
            words(&[1, MECHANISMS, KIND_MECHANISMS, 2, 1]),
            24,
            "mechanism set",
        ),
        (
            "no map length",
            words(&[1, TEMPLATE, KIND_MAP]),
            24,
            "length of an attribute map",
        ),
        (
            "a map of 2^63",
            words(&[1, TEMPLATE, KIND_MAP, 1 << 63, CLASS]),
            24,
            "attribute map",
        ),
        (
            "a map in a map",
            words(&[1, TEMPLATE, KIND_MAP, 24, TEMPLATE, KIND_MAP, 0]),
            40,
            "within an attribute map",
        ),
        (
            "a kind in a map",
            words(&[1, TEMPLATE, KIND_MAP, 24, CLASS, 9, 0]),
            40,
            "9 is no kind",
        ),
        (
            "an entry too long",
            words(&[1, TEMPLATE, KIND_MAP, 16, CLASS, KIND_ULONG, 0]),
            32,
            "beyond",
        ),
        (
            "a set repeats in a map",
            words(&[
                1,
                TEMPLATE,
                KIND_MAP,
                40,
                MECHANISMS,
                KIND_MECHANISMS,
                2,
                7,
                7,
            ]),
            72,
            "type of an entry",
        ),
    ];
    for (what, bytes, offset, says) in table {
        let error = decode(bytes).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Damaged, "{what}");
        assert_eq!(error.offset(), Some(*offset), "{what}: {error}");
        assert!(error.to_string().contains(says), "{what}: {error}");
    }
}

/// A cut behind an attribute loads, as it does in SoftHSM; a cut anywhere else is damage at a byte that is there.
#[test]
fn a_file_cut_at_any_byte_is_an_error_or_a_prefix() {
    let whole = encode(1, &sample());
    let all = decode(&whole).unwrap().attributes;
    let (mut prefixes, mut damaged, mut trailing) = (0, 0, 0);
    for cut in 0..whole.len() {
        match decode(&whole[..cut]) {
            Ok(decoded) => {
                prefixes += 1;
                trailing += usize::from(decoded.trailing.is_some());
                assert!(
                    decoded
                        .attributes
                        .iter()
                        .all(|(key, value)| all.get(key) == Some(value))
                );
                assert!(
                    decoded
                        .trailing
                        .is_none_or(|offset| offset <= cut as u64 && cut as u64 - offset < 8)
                );
            }
            Err(error) => {
                damaged += 1;
                assert_eq!(error.kind(), ErrorKind::Damaged);
                assert!(error.offset().unwrap() <= cut as u64, "{error}");
            }
        }
    }
    assert_eq!(
        (prefixes - trailing, damaged + prefixes),
        (all.len(), whole.len())
    );
}

fn scalar() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<bool>().prop_map(Value::Bool),
        any::<u64>().prop_map(Value::Ulong),
        prop::collection::vec(any::<u8>(), 0..64).prop_map(Value::Bytes),
        prop::collection::btree_set(any::<u64>(), 0..6).prop_map(Value::Mechs),
    ]
}

fn attributes(value: impl Strategy<Value = Value>) -> impl Strategy<Value = Attributes> {
    prop::collection::btree_map(any::<u64>(), value, 0..8).prop_map(|map| {
        let mut attributes = Attributes::new();
        for (attribute_type, value) in map {
            attributes.insert(attribute_type, value);
        }
        attributes
    })
}

proptest! {
    #[test]
    fn every_object_survives_its_file(
        generation: u64,
        stored in attributes(prop_oneof![scalar(), attributes(scalar()).prop_map(Value::Map)]),
    ) {
        let decoded = decode(&encode(generation, &stored)).unwrap();
        prop_assert_eq!(decoded.attributes, stored);
        prop_assert_eq!(decoded.generation, Some(generation));
    }

    #[test]
    fn no_bytes_are_a_panic(bytes in prop::collection::vec(prop_oneof![Just(0u8), 0..6u8, any::<u8>()], 0..200)) {
        let _ = decode(&bytes);
    }

    #[test]
    fn no_flipped_byte_is_a_panic(at in 0..300usize, to: u8) {
        let mut bytes = encode(1, &sample());
        let length = bytes.len();
        bytes[at % length] = to;
        let _ = decode(&bytes);
    }
}

pub(super) struct Fixture {
    pub directory: tempfile::TempDir,
    pub token: Arc<FileToken>,
    pub diagnostics: Arc<Diagnostics>,
}

impl Fixture {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::write(
            directory.path().join("token.object"),
            encode(1, &Attributes::new()),
        )
        .unwrap();
        let diagnostics = Arc::new(Diagnostics::new());
        let path = directory.path();
        let name = TokenName::new(path.file_name().unwrap()).unwrap();
        let parent = fs::File::open(path.parent().unwrap()).unwrap();
        let token = FileToken::open(
            parent.as_fd(),
            name,
            path,
            Options::default(),
            Arc::clone(&diagnostics),
        )
        .unwrap();
        Self {
            directory,
            token: Arc::new(token),
            diagnostics,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }
}

pub(super) fn id(name: &str) -> ObjectId {
    ObjectId::Object(ObjectName::new(OsStr::new(name)).unwrap())
}

pub(super) fn soon() -> Patience {
    Patience::at_most(Duration::from_secs(3))
}

/// Puts the change of a file two seconds into the past as far as a file system lets one: waits them out.
pub(super) fn settle() {
    thread::sleep(read::SETTLED + Duration::from_millis(50));
}

#[test]
fn a_listing_has_what_softhsm_lists() {
    let fixture = Fixture::new();
    for name in ["b.object", "a.object", "..object", "no uuid.object"] {
        fixture.write(name, &encode(1, &sample()));
    }
    for name in [
        "a.lock",
        ".object",
        "generation",
        "x.objects",
        "object",
        "README",
    ] {
        fixture.write(name, b"");
    }
    fs::create_dir(fixture.path("dir.object")).unwrap();
    symlink(fixture.path("a.object"), fixture.path("link.object")).unwrap();
    let names = fixture.token.list(Patience::Now).unwrap();
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    // `..object` is the object `.`, which no directory can be called.
    assert_eq!(names, ["a", "b", "no uuid"]);
    for name in ["link", "dir", "absent"] {
        let error = fixture.token.object(&id(name), Patience::Now).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{name}: {error}");
    }
}

#[test]
fn a_damaged_object_names_file_and_byte_and_leaves_the_others_alone() {
    let fixture = Fixture::new();
    fixture.write("good.object", &encode(1, &sample()));
    fixture.write("torn.object", &encode(1, &sample())[..30]);
    let error = fixture
        .token
        .object(&id("torn"), Patience::Now)
        .unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::WouldBlock,
        "it may still be written"
    );
    let error = fixture.token.object(&id("torn"), soon()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert_eq!(
        (error.path(), error.offset()),
        (Some(fixture.path("torn.object").as_path()), Some(24))
    );
    assert!(
        fixture
            .token
            .object_metadata(&id("torn"), Patience::Now)
            .is_ok()
    );
    assert_eq!(
        fixture
            .token
            .object(&id("good"), Patience::Now)
            .unwrap()
            .attributes,
        sample()
    );
    // It is known now, and mended as soon as somebody mends it.
    assert_eq!(
        fixture
            .token
            .object(&id("torn"), Patience::Now)
            .unwrap_err(),
        error
    );
    fixture.write("torn.object", &encode(2, &sample()));
    assert_eq!(
        fixture
            .token
            .object(&id("torn"), Patience::Now)
            .unwrap()
            .generation,
        Some(2)
    );
}

#[test]
fn trailing_bytes_are_a_warning() {
    let fixture = Fixture::new();
    let mut bytes = encode(1, &sample());
    let end = bytes.len();
    bytes.extend([0; 3]);
    fixture.write("odd.object", &bytes);
    assert_eq!(
        fixture
            .token
            .object(&id("odd"), Patience::Now)
            .unwrap()
            .attributes,
        sample()
    );
    assert!(
        fixture
            .diagnostics
            .render()
            .contains(&format!("at byte {end}"))
    );
}

#[test]
fn the_same_version_is_the_same_arc_and_every_change_is_seen() {
    let fixture = Fixture::new();
    let mut attributes = sample();
    fixture.write("a.object", &encode(1, &attributes));
    let get = || fixture.token.object(&id("a"), soon()).unwrap();
    let first = get();
    assert!(Arc::ptr_eq(&first, &get()), "within the clock tick");
    thread::sleep(Duration::from_millis(60));
    assert!(Arc::ptr_eq(&first, &get()), "after the clock tick");
    // In place, of the same size, as often as a tick of a coarse clock has room for.
    for n in 0..200u64 {
        attributes.insert(CLASS, Value::Ulong(n));
        fixture.write("a.object", &encode(1, &attributes));
        assert_eq!(get().attributes.ulong(CLASS), Some(n));
    }
    fs::remove_file(fixture.path("a.object")).unwrap();
    assert_eq!(
        fixture.token.object(&id("a"), soon()).unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

/// What 2.6.1 does: truncate, and the rest only after the locks are gone. The file ends at a buffer's end meanwhile.
#[test]
fn a_file_that_looks_unfinished_is_waited_for() {
    let fixture = Fixture::new();
    let mut attributes = sample();
    attributes.insert(0x11, Value::Bytes(vec![7; 9000]));
    let whole = encode(1, &attributes);
    for cut in [0, 4096, 8192] {
        fixture.write("a.object", &whole[..cut]);
        let (path, whole) = (fixture.path("a.object"), whole.clone());
        let writer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(120));
            fs::write(path, whole).unwrap();
        });
        let object = fixture.token.object(&id("a"), soon()).unwrap();
        assert_eq!(object.attributes, attributes, "cut at {cut}");
        writer.join().unwrap();
    }
}

#[test]
fn a_whole_file_of_a_multiple_of_the_buffer_is_believed_after_a_second() {
    let fixture = Fixture::new();
    let mut attributes = Attributes::new();
    attributes.insert(0x11, Value::Bytes(vec![7; 4096 - 32]));
    let bytes = encode(1, &attributes);
    assert_eq!(bytes.len(), 4096);
    fixture.write("a.object", &bytes);
    assert_eq!(
        fixture
            .token
            .object(&id("a"), Patience::Now)
            .unwrap_err()
            .kind(),
        ErrorKind::WouldBlock
    );
    settle();
    assert_eq!(
        fixture
            .token
            .object(&id("a"), Patience::Now)
            .unwrap()
            .attributes,
        attributes
    );
}

#[test]
fn an_empty_file_is_damaged_after_a_second() {
    let fixture = Fixture::new();
    fixture.write("a.object", b"");
    settle();
    let error = fixture.token.object(&id("a"), Patience::Now).unwrap_err();
    assert_eq!(
        (error.kind(), error.offset()),
        (ErrorKind::Damaged, Some(0))
    );
}

#[test]
fn a_sparse_giant_is_refused_without_reading_it() {
    let fixture = Fixture::new();
    let file = fs::File::create(fixture.path("a.object")).unwrap();
    file.set_len(1 << 40).unwrap();
    let error = fixture.token.object(&id("a"), soon()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
}

/// A write lock as SoftHSM takes it: another process, a POSIX lock over the whole file.
pub(super) fn hold(path: &Path, for_seconds: f64) -> std::process::Child {
    let script = "import fcntl,sys,time\nf=open(sys.argv[1],'r+b')\nfcntl.lockf(f,fcntl.LOCK_EX)\nprint('held',flush=True)\ntime.sleep(float(sys.argv[2]))";
    let mut child = std::process::Command::new("python3")
        .args(["-c", script])
        .arg(path)
        .arg(for_seconds.to_string())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("python3 is needed: install the package python3");
    let mut line = String::new();
    let out = child.stdout.as_mut().unwrap();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).unwrap();
    assert_eq!(line, "held\n");
    child
}

#[test]
fn a_lock_is_waited_for_no_longer_than_the_limit() {
    for locked in ["a.object", "a.lock"] {
        let fixture = Fixture::new();
        fixture.write("a.object", &encode(1, &sample()));
        fixture.write("a.lock", b"");
        let mut holder = hold(&fixture.path(locked), 60.0);
        assert_eq!(
            fixture
                .token
                .object(&id("a"), Patience::Now)
                .unwrap_err()
                .kind(),
            ErrorKind::WouldBlock
        );
        let start = Instant::now();
        let limit = Duration::from_millis(200);
        let error = fixture
            .token
            .object(&id("a"), Patience::at_most(limit))
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{locked}");
        assert!(start.elapsed() >= limit && start.elapsed() < 5 * limit);
        holder.kill().unwrap();
        holder.wait().unwrap();
        assert!(fixture.token.object(&id("a"), soon()).is_ok());

        let mut holder = hold(&fixture.path(locked), 0.3);
        fs::File::open(fixture.path("a.object"))
            .unwrap()
            .set_modified(std::time::SystemTime::now())
            .unwrap();
        assert!(
            fixture.token.object(&id("a"), soon()).is_ok(),
            "{locked} is let go in time"
        );
        holder.wait().unwrap();
    }
}

#[test]
fn an_object_without_a_lock_file_is_read() {
    let fixture = Fixture::new();
    fixture.write("a.object", &encode(1, &sample()));
    assert!(fixture.token.object(&id("a"), Patience::Now).is_ok());
    assert!(
        fixture
            .token
            .object(&ObjectId::Token, Patience::Now)
            .is_ok()
    );
}

#[test]
fn a_long_file_is_not_read_while_others_wait() {
    let fixture = Fixture::new();
    let mut attributes = Attributes::new();
    attributes.insert(0x11, Value::Bytes(vec![7; 600 * 1024 + 1]));
    fixture.write("a.object", &encode(1, &attributes));
    let error = fixture.token.object(&id("a"), Patience::Now).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    let object = fixture.token.object(&id("a"), soon()).unwrap();
    assert_eq!(object.attributes, attributes);
    thread::sleep(Duration::from_millis(60));
    assert!(fixture.token.object(&id("a"), soon()).is_ok());
    assert!(
        fixture.token.object(&id("a"), Patience::Now).is_ok(),
        "it is known"
    );
}

/// Half a million attributes: a megabyte and more that somebody may have put there to keep us busy.
#[test]
fn many_attributes_take_no_longer_than_their_bytes() {
    let mut bytes = words(&[1]);
    for attribute_type in (0..500_000u64).rev() {
        bytes.extend(words(&[attribute_type, KIND_BOOLEAN]));
        bytes.push(1);
    }
    let mut map = words(&[1, TEMPLATE, KIND_MAP, 500_000 * 17]);
    map.extend_from_slice(&bytes[8..]);
    assert_eq!(decode(&bytes).unwrap().attributes.len(), 500_000);
    let decoded = decode(&map).unwrap();
    assert!(
        matches!(decoded.attributes.of_type(TEMPLATE), Some(Value::Map(map)) if map.len() == 500_000)
    );
}

#[test]
fn what_is_gone_is_not_kept() {
    let fixture = Fixture::new();
    fixture.write("a.object", &encode(1, &sample()));
    let object = fixture.token.object(&id("a"), soon()).unwrap();
    fs::remove_file(fixture.path("a.object")).unwrap();
    fixture.token.list(Patience::Now).unwrap();
    assert_eq!(Arc::strong_count(&object), 1);
}
