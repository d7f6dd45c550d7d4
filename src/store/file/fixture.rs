//! What the tests of this backend have in common: a token in a directory of its own, and what they ask of it.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::*;
use crate::diagnostics::Diagnostics;
use crate::error::Result;
use crate::store::attribute::{Attributes, Value};
use crate::store::{Access, NewObject, ObjectId, ObjectName, Options, Patience, Token, TokenName};

pub(super) const LABEL: u64 = 3;
pub(super) const CLASS: u64 = 0;
pub(super) const TEMPLATE: u64 = 0x4000_0211;
pub(super) const MECHANISMS: u64 = 0x4000_0600;

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

/// A token as SoftHSM leaves it, and the object `a` in it, which is no newborn.
pub(super) fn fixture() -> Fixture {
    let fixture = Fixture::new();
    fixture.write("generation", &7u64.to_be_bytes());
    fixture.write("a.object", &encode(5, &sample()));
    fixture.write("a.lock", b"");
    thread::sleep(born::GROWN);
    fixture
}

pub(super) fn name(name: &str) -> ObjectName {
    ObjectName::new(name.as_ref()).unwrap()
}

pub(super) fn set_label(fixture: &Fixture, object: &ObjectId, label: &[u8]) -> Result<()> {
    let value = Value::Bytes(label.to_vec());
    fixture.token.update(
        object,
        &mut |attributes| {
            attributes.insert(LABEL, value.clone());
            Ok(())
        },
        None,
        soon(),
    )
}

pub(super) fn label(fixture: &Fixture, object: &ObjectId) -> Vec<u8> {
    let object = fixture.token.object(object, soon()).unwrap();
    object.attributes.bytes(LABEL).unwrap().to_vec()
}

pub(super) fn new_object(attributes: Attributes) -> NewObject {
    NewObject {
        attributes,
        access: Access {
            mode: 0o640,
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
        },
        mtime: None,
    }
}

pub(super) fn files(fixture: &Fixture) -> Vec<String> {
    let mut files: Vec<String> = fs::read_dir(fixture.directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    files
}

pub(super) fn generation(fixture: &Fixture) -> u64 {
    let bytes = fs::read(fixture.path("generation")).unwrap();
    u64::from_be_bytes(bytes.try_into().unwrap())
}
