//! A mounted store with a live session beside it, and the questions that tests of writing put to both: what the store holds
//! according to the independent reader, what the mount shows, what the session sees.
#![allow(dead_code)]

pub mod calls;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::mount_common::{assert_same, expected, object_name, seen};
use crate::support::independent::{self, Object, Value};
use crate::support::template::{boolean, bytes, ulong};
use crate::support::*;

pub const CKM_EC_KEY_PAIR_GEN: u64 = 0x1040;
pub const CKM_ECDSA: u64 = 0x1041;
pub const CKA_ID: u64 = 0x102;
pub const CKA_VALUE: u64 = 0x11;
pub const CKA_APPLICATION: u64 = 0x10;

/// secp256r1.
pub const CURVE: [u8; 10] = [6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7];

/// How long something that is held or pending may take to take effect, on a machine that is busy.
pub const SOON: Duration = Duration::from_secs(5);

/// A little more than what is held is held for.
pub const HELD: Duration = Duration::from_millis(450);

/// What the tests make in a token: a data object, a public key, and a private key that is private.
pub fn fill(client: &mut P11) -> (u64, u64, u64) {
    let data = [
        ulong(0, 0),
        boolean(1, true),
        boolean(2, false),
        bytes(3, "data"),
        bytes(CKA_APPLICATION, "tests"),
        bytes(CKA_VALUE, "value"),
    ];
    let data = client.create(&data).unwrap();
    let public = [
        boolean(1, true),
        boolean(2, false),
        bytes(3, "public"),
        bytes(CKA_ID, "id"),
        boolean(0x10a, true),
        bytes(0x180, CURVE),
    ];
    let private = [
        boolean(1, true),
        boolean(2, true),
        bytes(3, "private"),
        bytes(CKA_ID, "id"),
        boolean(0x108, true),
    ];
    let pair = client.generate_pair(CKM_EC_KEY_PAIR_GEN, &public, &private);
    let (public, private) = pair.unwrap();
    (data, public, private)
}

/// A store with one token, mounted, and a session that was opened before anything else happened.
#[derive(Debug)]
pub struct Bench {
    pub mount: Mount,
    pub client: P11,
    pub softhsm: Softhsm,
    /// The name of the token's directory.
    pub token: String,
    /// The names of the directories of the data object, the public key and the private key.
    pub data: String,
    pub public: String,
    pub private: String,
    /// Their handles in the session.
    pub handles: (u64, u64, u64),
    /// A directory on another file system than the mount.
    pub outside: tempfile::TempDir,
    turn: Option<MutexGuard<'static, ()>>,
}

/// A name that no object has.
pub const OTHER: &str = "11111111-2222-4333-8444-555555555555";

/// Whose turn it is, of the tests that must be alone in their process.
static TURN: Mutex<()> = Mutex::new(());

impl Bench {
    pub fn new(backend: Backend) -> Self {
        Self::with(backend, &MountOptions::new())
    }

    pub fn with(backend: Backend, options: &MountOptions) -> Self {
        let (softhsm, mut client) = Softhsm::with_token(backend);
        let handles = fill(&mut client);
        Self::beside(softhsm, client, handles, options)
    }

    /// Mounts a store whose only token has been filled by that session.
    pub fn beside(
        softhsm: Softhsm,
        client: P11,
        handles: (u64, u64, u64),
        options: &MountOptions,
    ) -> Self {
        let mount = options.mount(&softhsm);
        let name = softhsm.token_directory();
        let token = name.file_name().unwrap().to_str().unwrap().to_owned();
        let of_class = |class| object_of_class(&softhsm, &token, class);
        Self {
            data: of_class(0),
            public: of_class(2),
            private: of_class(3),
            mount,
            client,
            softhsm,
            token,
            handles,
            outside: temporary(),
            turn: None,
        }
    }

    /// For a test that has no other beside it in its process: whatever starts a program has duplicates of all open files for a
    /// moment, and closes them, which is a flush.
    pub fn alone(backend: Backend) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        Self {
            turn: Some(turn),
            ..Self::new(backend)
        }
    }

    pub fn backend(&self) -> Backend {
        self.softhsm.backend
    }

    /// The directory of the token in the mount.
    pub fn directory(&self) -> PathBuf {
        self.mount.join(&self.token)
    }

    /// A path below the token's directory in the mount.
    pub fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        self.directory().join(path)
    }

    /// An attribute of the data object in the mount.
    pub fn of_data(&self, name: &str) -> PathBuf {
        self.at(&self.data).join(name)
    }

    /// A shell that knows `$o`, the data object, `$p` and `$k`, the keys, and `$out`, somewhere else, in the directory of the
    /// token.
    pub fn shell(&self, line: &str) -> Command {
        let mut shell = Command::new("bash");
        shell
            .args(["-euo", "pipefail", "-c", line])
            .current_dir(self.directory())
            .env("LC_ALL", "C.UTF-8")
            .env("TERM", "xterm")
            .env("HOME", self.outside.path())
            .env("o", &self.data)
            .env("p", &self.public)
            .env("k", &self.private)
            .env("t", self.directory())
            .env("out", self.outside.path());
        shell
    }

    /// A line that must succeed and complain of nothing.
    #[track_caller]
    pub fn quiet(&self, line: &str) -> String {
        let output = self.shell(line).output().unwrap();
        let said = both(&output);
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{} backend: `{line}`: {}\n{said}\n--- .tokenfs/log\n{}",
            self.backend(),
            output.status,
            self.log()
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A line that must fail; what it said.
    #[track_caller]
    pub fn fails(&self, line: &str) -> String {
        let output = self.shell(line).env("LC_ALL", "C").output().unwrap();
        let said = both(&output);
        assert!(
            !output.status.success(),
            "{} backend: `{line}` should have failed\n{said}",
            self.backend()
        );
        said
    }

    /// `.tokenfs/log`.
    pub fn log(&self) -> String {
        fs::read_to_string(self.mount.join(".tokenfs/log")).unwrap_or_else(|e| format!("({e})"))
    }

    /// What the file at a path below the token's directory has to hold, according to the store.
    pub fn stored(&self, path: impl AsRef<Path>) -> Option<Vec<u8>> {
        let path = Path::new(&self.token).join(path);
        expected(&self.softhsm).remove(&path).flatten()
    }

    /// The same of an attribute of the data object.
    pub fn stored_data(&self, name: &str) -> Option<Vec<u8>> {
        self.stored(Path::new(&self.data).join(name))
    }

    /// Whether the store has an object.
    pub fn has(&self, object: &str) -> bool {
        expected(&self.softhsm).contains_key(&Path::new(&self.token).join(object))
    }

    /// The mount shows what is in the store, and nothing else.
    #[track_caller]
    pub fn assert_in_agreement(&self) {
        assert_same(&expected(&self.softhsm), &seen(&self.mount));
    }

    /// Waits for what is held and pending.
    pub fn settle(&self) {
        std::thread::sleep(HELD);
        let deadline = Instant::now() + SOON;
        while expected(&self.softhsm) != seen(&self.mount) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(100));
        }
        self.assert_in_agreement();
    }

    /// The live session sees every object of the store and no other, with what is stored in it; so does a new process. On
    /// `db` a live session has what PKCS #11 calls not modifiable from its cache, so only a new process is asked.
    #[track_caller]
    pub fn assert_sessions_agree(&mut self) {
        if self.backend() == Backend::File {
            agree(&self.softhsm, &self.token, &mut self.client);
        } else {
            let stored = self.softhsm.read()[&self.token].objects.len();
            assert_eq!(
                self.client.find(&[]).unwrap().len(),
                stored,
                "objects of a live session"
            );
        }
        let mut fresh = self.softhsm.p11();
        fresh.open("test", Some(PIN)).unwrap();
        agree(&self.softhsm, &self.token, &mut fresh);
    }

    /// Nothing that is none of SoftHSM's is left in the token's directory.
    #[track_caller]
    pub fn assert_no_leftovers(&self) {
        let left = leftovers(&self.softhsm.tokendir);
        assert!(left.is_empty(), "left in the store: {left:?}");
    }

    /// `C_Sign` with a private key, and `C_Verify` with the public key of the session.
    #[track_caller]
    pub fn assert_signs(&mut self, private: u64) {
        let signature = self.client.sign(private, CKM_ECDSA, &[7; 32]).unwrap();
        let (_, public, _) = self.handles;
        let verified = self.client.verify(public, CKM_ECDSA, &[7; 32], &signature);
        assert_eq!(verified, Ok(true), "the signature of a key from the mount");
    }

    /// The backing file of the data object, or the database.
    pub fn backing(&self, object: &str) -> PathBuf {
        let token = self.softhsm.tokendir.join(&self.token);
        match self.backend() {
            Backend::File => token.join(format!("{object}.object")),
            Backend::Db => token.join("sqlite3.db"),
        }
    }
}

fn both(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

/// The name in the mount of the only object of a class.
pub fn object_of_class(softhsm: &Softhsm, token: &str, class: u64) -> String {
    let of_class = |object: &Object| independent::get(object, 0) == Some(&Value::Ulong(class));
    let stored = softhsm.read().remove(token).expect("the token");
    let mut found = stored.objects.iter().filter(|(_, object)| of_class(object));
    let (id, _) = found.next().expect("an object of that class");
    object_name(softhsm.backend, token, id)
}

/// All that a session sees is what is stored, and the other way round.
#[track_caller]
pub fn agree(softhsm: &Softhsm, token: &str, client: &mut P11) {
    agree_under(PIN, softhsm, token, client);
}

/// The same for a token whose user has another PIN.
#[track_caller]
pub fn agree_under(pin: &str, softhsm: &Softhsm, token: &str, client: &mut P11) {
    // A session gives an object that lacks something its defaults, which are stored then: so the store is read after it.
    let found = client.find(&[]).unwrap();
    let seen: Vec<_> = found
        .into_iter()
        .map(|found| {
            let seen = client.get(found.handle);
            let stored = || independent::lines(&softhsm.read());
            let seen = seen.unwrap_or_else(|why| {
                panic!(
                    "{found:?} cannot be read by a session: {why:?}\n{}",
                    stored()
                )
            });
            (seen, found)
        })
        .collect();
    let stored = softhsm.read().remove(token).expect("the token");
    assert!(stored.damaged.is_empty(), "{:?}", stored.damaged);
    let key = independent::token_key(&stored, independent::CKA_OS_USERPIN, pin).expect("the key");
    let clear = stored.objects.values();
    let clear = clear.map(|o| independent::in_the_clear(o, &key));
    let mut clear: Vec<Object> = clear.collect::<Result<_, _>>().unwrap();
    for (seen, found) in seen {
        let mut why = Vec::new();
        let at = clear.iter().position(|object| {
            let matches = independent::matches_session(softhsm.backend, object, &seen);
            matches.map_err(|reason| why.push(reason)).is_ok()
        });
        let at = at.unwrap_or_else(|| panic!("{found:?} is not what is stored: {why:#?}"));
        clear.remove(at);
    }
    assert!(clear.is_empty(), "the session does not see {clear:?}");
}

/// What is below a tokendir and is none of SoftHSM's.
pub fn leftovers(tokendir: &Path) -> Vec<PathBuf> {
    let known = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let suffix = [".object", ".lock"].iter().any(|end| name.ends_with(end));
        // SQLite leaves a journal lie whose header was never written, and uses it for its next transaction.
        if name == "sqlite3.db-journal" {
            let magic = [0xd9, 0xd5, 0x05, 0xf9, 0x20, 0xa1, 0x63, 0xd7];
            return !fs::read(path).is_ok_and(|journal| journal.starts_with(&magic));
        }
        // A directory of the tokendir is a token.
        let token = |file: &str| path.join(file).exists();
        if path.is_dir() {
            return path.parent() != Some(tokendir) || token("token.object") || token("sqlite3.db");
        }
        suffix || ["generation", "sqlite3.db"].contains(&&*name)
    };
    let mut left = walk(tokendir);
    left.retain(|path| {
        // A lock file belongs to an object.
        let lonely = path.extension().is_some_and(|e| e == "lock")
            && !path.with_extension("object").exists();
        !known(path) || lonely
    });
    left
}

/// Damages the private key of a token, as a crash of SoftHSM does it, or somebody's SQL.
pub fn damage_key(softhsm: &Softhsm, token: &str, key: &str) {
    let token = softhsm.tokendir.join(token);
    match softhsm.backend {
        Backend::File => {
            let path = token.join(format!("{key}.object"));
            let whole = fs::read(&path).unwrap();
            let modified = fs::metadata(&path).unwrap().modified().unwrap();
            fs::write(&path, &whole[..whole.len() - 3]).unwrap();
            // It has been at rest for as long as before.
            let file = fs::File::options().write(true).open(&path).unwrap();
            file.set_modified(modified).unwrap();
        }
        Backend::Db => {
            let of_key = "object_id = (select object_id from attribute_integer where type = 0 and value = 3)";
            let statement = format!("update attribute_array set value = x'0102' where {of_key}");
            run(tool("sqlite3")
                .arg(token.join("sqlite3.db"))
                .arg(&statement));
        }
    }
}

/// Seconds and nanoseconds of the last modification.
pub fn mtime(path: &Path) -> (i64, i64) {
    let metadata = fs::symlink_metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    (metadata.mtime(), metadata.mtime_nsec())
}

/// A store with further options of the configuration.
pub fn configured(backend: Backend, more: &str) -> (Softhsm, P11, (u64, u64, u64)) {
    let softhsm = Softhsm::new(backend);
    softhsm.configure(more);
    let mut client = softhsm.p11();
    client.init_token("test", Some(PIN)).unwrap();
    client.open("test", Some(PIN)).unwrap();
    let handles = fill(&mut client);
    (softhsm, client, handles)
}

/// How long a run takes that is bounded by time.
pub fn lasting(plain: u64, thorough: u64) -> Duration {
    let seconds = std::env::var("TOKENFS_TEST_SECONDS").ok();
    let seconds = seconds.map(|text| text.parse().expect("TOKENFS_TEST_SECONDS"));
    Duration::from_secs(seconds.unwrap_or(if full() { thorough } else { plain }))
}
