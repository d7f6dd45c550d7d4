//! The operations, and how they are chosen.

use proptest::prelude::*;
use proptest::sample::select;

/// How many descriptors a sequence uses.
pub const DESCRIPTORS: usize = 3;

/// One system call, or what else happens to a mount.
#[derive(Clone, PartialEq)]
pub enum Op {
    /// `open` for reading and writing, or for reading alone.
    Open { fd: usize, path: String, how: How },
    /// `write` where the descriptor is, or at its end with `O_APPEND`.
    Write(usize, &'static [u8]),
    /// `pwrite`.
    WriteAt(usize, u64, &'static [u8]),
    /// `pread`, all that there is.
    Read(usize),
    /// `close` of a duplicate.
    CloseDuplicate(usize),
    /// The last `close`.
    Close(usize),
    /// `ftruncate`.
    SetLength(usize, u64),
    /// `fsync`.
    Sync(usize),
    /// `truncate`.
    Truncate(String, u64),
    /// `unlink`.
    Unlink(String),
    /// `rename`.
    Rename(String, String),
    /// `mkdir`.
    MakeDir(String),
    /// `rmdir`.
    RemoveDir(String),
    /// `rm -r`.
    RemoveAll(String),
    /// `chmod`.
    Mode(String, u32),
    /// `utimensat`, seconds.
    Times(String, u64),
    /// `fsync` of a directory.
    SyncDir(String),
    /// All names of a directory.
    List(String),
    /// `stat`.
    Stat(String),
    /// `open`, `read`, `close`.
    Content(String),
    /// `open` with `O_CREAT | O_TRUNC`, `write`, `close`.
    Put(String, &'static [u8]),
    /// Nothing is done for a quarter of a second.
    LeaveAlone,
    /// The mount ends, and there is another one.
    Remount,
}

/// The flags of an `open`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct How {
    /// `O_RDWR`, else `O_RDONLY` and no other flag.
    pub write: bool,
    /// `O_CREAT`.
    pub create: bool,
    /// `O_EXCL`.
    pub exclusive: bool,
    /// `O_TRUNC`.
    pub truncate: bool,
    /// `O_APPEND`.
    pub append: bool,
}

impl std::fmt::Debug for Op {
    /// As it would be written in a test.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = |bytes: &[u8]| format!("b\"{}\"", bytes.escape_ascii());
        match self {
            Self::Open { fd, path, how } => {
                let mut flags = Vec::new();
                for (set, name) in [
                    (how.write, "write"),
                    (how.create, "create"),
                    (how.exclusive, "exclusive"),
                    (how.truncate, "truncate"),
                    (how.append, "append"),
                ] {
                    if set {
                        flags.push(name);
                    }
                }
                write!(f, "open({fd}, {path:?}, {:?})", flags.join(" "))
            }
            Self::Write(fd, data) => write!(f, "Write({fd}, {})", text(data)),
            Self::WriteAt(fd, at, data) => write!(f, "WriteAt({fd}, {at}, {})", text(data)),
            Self::Read(fd) => write!(f, "Read({fd})"),
            Self::CloseDuplicate(fd) => write!(f, "CloseDuplicate({fd})"),
            Self::Close(fd) => write!(f, "Close({fd})"),
            Self::SetLength(fd, length) => write!(f, "SetLength({fd}, {length})"),
            Self::Sync(fd) => write!(f, "Sync({fd})"),
            Self::Truncate(path, length) => write!(f, "truncate({path:?}, {length})"),
            Self::Unlink(path) => write!(f, "unlink({path:?})"),
            Self::Rename(from, to) => write!(f, "rename({from:?}, {to:?})"),
            Self::MakeDir(path) => write!(f, "mkdir({path:?})"),
            Self::RemoveDir(path) => write!(f, "rmdir({path:?})"),
            Self::RemoveAll(path) => write!(f, "rm_r({path:?})"),
            Self::Mode(path, mode) => write!(f, "chmod({path:?}, {mode:#o})"),
            Self::Times(path, time) => write!(f, "utimes({path:?}, {time})"),
            Self::SyncDir(path) => write!(f, "sync_dir({path:?})"),
            Self::List(path) => write!(f, "list({path:?})"),
            Self::Stat(path) => write!(f, "stat({path:?})"),
            Self::Content(path) => write!(f, "content({path:?})"),
            Self::Put(path, data) => write!(f, "put({path:?}, {})", text(data)),
            Self::LeaveAlone => write!(f, "LeaveAlone"),
            Self::Remount => write!(f, "Remount"),
        }
    }
}

/// The tokens of a store as it is to begin with.
pub const TOKENS: [&str; 2] = ["token-1", "token-2"];

/// The objects that they have.
pub const OBJECTS: [&str; 2] = [
    "00000000-0000-4000-8000-00000000000a",
    "00000000-0000-4000-8000-00000000000b",
];

/// Names of directories in a token: objects that are there, that can be made, and that cannot in one backend or both.
const IN_TOKEN: &[&str] = &[
    OBJECTS[0],
    OBJECTS[1],
    "00000000-0000-4000-8000-00000000000c",
    ".new",
    ".gone",
    "no-uuid",
    "CKA_LABEL",
    "4913",
];

/// Names in an object.
const IN_OBJECT: &[&str] = &[
    "CKA_LABEL",
    "CKA_ID",
    "CKA_CLASS",
    "CKA_PRIVATE",
    "CKA_SIGN",
    "CKA_MODULUS_BITS",
    "CKA_START_DATE",
    "CKA_KEY_TYPE",
    "CKA_ALLOWED_MECHANISMS",
    "0x80001234.bytes",
    "CKA_LABEL.ulong",
    "CKA_NEWNAME",
    "0xZZ",
    ".x",
    "CKA_LABEL~",
    "4913",
    "CKA_WRAP_TEMPLATE",
    "CKA_UNWRAP_TEMPLATE",
    ".d",
];

const MAPS: &[&str] = &["CKA_WRAP_TEMPLATE", "CKA_UNWRAP_TEMPLATE", ".d"];

/// Names in an attribute map, or in a scratch directory that is to become one.
const IN_MAP: &[&str] = &[
    "CKA_LABEL",
    "CKA_EXTRACTABLE",
    "CKA_KEY_TYPE",
    "CKA_LABEL.ulong",
    ".y",
    "CKA_UNWRAP_TEMPLATE",
    "CKA_NEWNAME",
];

/// Texts: values of one kind or another, and what is none.
const TEXTS: &[&[u8]] = &[
    b"a",
    b"",
    b"true\n",
    b"2048\n",
    b"CKO_SECRET_KEY\n",
    b"20261123",
    b"no value\n",
    b"CKM_AES_CBC\nCKM_RSA_PKCS\n",
    b"0x1f",
    b"1",
    b"\n",
    b"possible ciphertext, 32 bytes it",
];

fn token() -> impl Strategy<Value = String> {
    prop_oneof![9 => Just(TOKENS[0].to_owned()), 1 => Just(TOKENS[1].to_owned())]
}

fn in_token() -> impl Strategy<Value = String> {
    let name = prop_oneof![8 => select(&IN_TOKEN[..5]), 1 => select(IN_TOKEN)];
    (token(), name).prop_map(|(token, name)| format!("{token}/{name}"))
}

/// The directory of an object, or one in scratch that might become one.
fn object() -> impl Strategy<Value = String> {
    let name = prop_oneof![8 => Just(OBJECTS[0]), 1 => select(&IN_TOKEN[1..5])];
    (token(), name).prop_map(|(token, name)| format!("{token}/{name}"))
}

fn in_object() -> impl Strategy<Value = String> {
    let name = prop_oneof![3 => select(&IN_OBJECT[..6]), 3 => select(IN_OBJECT)];
    (object(), name).prop_map(|(object, name)| format!("{object}/{name}"))
}

fn in_map() -> impl Strategy<Value = String> {
    let name = prop_oneof![3 => select(&IN_MAP[..3]), 1 => select(IN_MAP)];
    (object(), select(MAPS), name).prop_map(|(object, map, name)| format!("{object}/{map}/{name}"))
}

/// What a file could be.
fn file() -> impl Strategy<Value = String> {
    prop_oneof![10 => in_object(), 3 => in_map(), 1 => in_token()]
}

/// What a directory could be.
fn directory() -> impl Strategy<Value = String> {
    let map = (object(), select(MAPS)).prop_map(|(object, map)| format!("{object}/{map}"));
    prop_oneof![4 => in_token(), 4 => map, 1 => in_object(), 1 => token()]
}

fn path() -> impl Strategy<Value = String> {
    prop_oneof![4 => file(), 1 => directory()]
}

/// Both in the same object, mostly.
fn pair() -> impl Strategy<Value = (String, String)> {
    let together = (object(), select(IN_OBJECT), select(IN_OBJECT))
        .prop_map(|(object, from, to)| (format!("{object}/{from}"), format!("{object}/{to}")));
    let objects = (token(), select(IN_TOKEN), select(IN_TOKEN))
        .prop_map(|(token, from, to)| (format!("{token}/{from}"), format!("{token}/{to}")));
    prop_oneof![5 => together, 3 => objects, 2 => (path(), path())]
}

fn how() -> impl Strategy<Value = How> {
    let writing = (any::<bool>(), 0..6_u8, any::<bool>(), 0..3_u8).prop_map(
        |(create, exclusive, truncate, append)| How {
            write: true,
            create,
            exclusive: create && exclusive == 5,
            truncate,
            append: append == 2,
        },
    );
    prop_oneof![1 => Just(How::default()), 6 => writing]
}

/// A token goes, and comes again.
fn of_tokens() -> impl Strategy<Value = Op> {
    let token = || TOKENS[1].to_owned();
    let own = move || format!("{}/token", token());
    let label = move || format!("{}/CKA_OS_TOKENLABEL", own());
    prop_oneof![
        3 => Just(Op::RemoveAll(token())),
        2 => Just(Op::MakeDir(token())),
        2 => Just(Op::MakeDir(own())),
        3 => select(TEXTS).prop_map(move |text| Op::Put(label(), text)),
        1 => Just(Op::SyncDir(token())),
        1 => Just(Op::List(token())),
    ]
}

/// What takes a while is rare.
fn op() -> impl Strategy<Value = Op> {
    prop_oneof![400 => call(), 20 => of_tokens(), 1 => Just(Op::LeaveAlone), 1 => Just(Op::Remount)]
}

fn call() -> impl Strategy<Value = Op> {
    let fd = || 0..DESCRIPTORS;
    let text = || select(TEXTS);
    prop_oneof![
        12 => (fd(), file(), how()).prop_map(|(fd, path, how)| Op::Open { fd, path, how }),
        12 => (fd(), text()).prop_map(|(fd, text)| Op::Write(fd, text)),
        3 => (fd(), 0..12_u64, text()).prop_map(|(fd, at, text)| Op::WriteAt(fd, at, text)),
        3 => fd().prop_map(Op::Read),
        5 => fd().prop_map(Op::CloseDuplicate),
        8 => fd().prop_map(Op::Close),
        2 => (fd(), 0..20_u64).prop_map(|(fd, length)| Op::SetLength(fd, length)),
        2 => fd().prop_map(Op::Sync),
        3 => (file(), 0..20_u64).prop_map(|(path, length)| Op::Truncate(path, length)),
        8 => file().prop_map(Op::Unlink),
        14 => pair().prop_map(|(from, to)| Op::Rename(from, to)),
        8 => directory().prop_map(Op::MakeDir),
        5 => directory().prop_map(Op::RemoveDir),
        3 => directory().prop_map(Op::RemoveAll),
        2 => (path(), select(&[0o600_u32, 0o640, 0o777, 0o400][..])).prop_map(|(path, mode)| Op::Mode(path, mode)),
        4 => (path(), 1_000_000_000..1_000_000_009_u64).prop_map(|(path, time)| Op::Times(path, time)),
        3 => directory().prop_map(Op::SyncDir),
        2 => directory().prop_map(Op::List),
        2 => path().prop_map(Op::Stat),
        2 => file().prop_map(Op::Content),
        16 => (file(), text()).prop_map(|(path, text)| Op::Put(path, text)),
    ]
}

/// A sequence of at most `most` operations.
pub fn sequences(most: usize) -> impl Strategy<Value = Vec<Op>> {
    prop::collection::vec(op(), 1..most)
}

// As sequences are spelled in tests.

pub fn open(fd: usize, path: &str, how: &str) -> Op {
    let has = |word| how.split(' ').any(|given| given == word);
    Op::Open {
        fd,
        path: path.to_owned(),
        how: How {
            write: has("write"),
            create: has("create"),
            exclusive: has("exclusive"),
            truncate: has("truncate"),
            append: has("append"),
        },
    }
}

macro_rules! of_path {
    ($($name:ident $variant:ident),*) => { $(
        pub fn $name(path: &str) -> Op {
            Op::$variant(path.to_owned())
        }
    )* };
}

of_path!(unlink Unlink, mkdir MakeDir, rmdir RemoveDir, rm_r RemoveAll, sync_dir SyncDir, list List, stat Stat, content Content);

pub fn put(path: &str, data: &'static [u8]) -> Op {
    Op::Put(path.to_owned(), data)
}

pub fn rename(from: &str, to: &str) -> Op {
    Op::Rename(from.to_owned(), to.to_owned())
}

pub fn truncate(path: &str, length: u64) -> Op {
    Op::Truncate(path.to_owned(), length)
}

pub fn chmod(path: &str, mode: u32) -> Op {
    Op::Mode(path.to_owned(), mode)
}

pub fn utimes(path: &str, time: u64) -> Op {
    Op::Times(path.to_owned(), time)
}
