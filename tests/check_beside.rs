//! `tokenfs check` beside writers: what one of them is making, and waits for its turn to go on with, is no finding; what is torn is told
//! although others never stop writing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod check_common;
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use check_common::*;
use support::*;
use tokenfs::diagnostics::Diagnostics;
use tokenfs::store::check::{Category, Settings};
use tokenfs::store::{Options, Store};

/// Longer than the check waits before it looks again, by far.
const TURN: Duration = Duration::from_secs(4);

/// The beginning of an object that somebody makes, or has torn.
enum Begun {
    File { path: PathBuf, whole: Vec<u8> },
    Db { path: PathBuf, row: i64 },
}

impl Begun {
    fn new(softhsm: &Softhsm, backend: Backend) -> Self {
        let token = softhsm.token_directory();
        match backend {
            Backend::File => {
                let path = token.join("11111111-2222-3333-4444-555555555555.object");
                let whole = fs::read(&objects(&token)[0]).unwrap();
                for path in [&path, &path.with_extension("lock")] {
                    fs::write(path, b"").unwrap();
                    set_mode(path, 0o600);
                }
                // Its class and no more.
                fs::write(&path, &whole[..ends(&whole)[1]]).unwrap();
                Self::File { path, whole }
            }
            Backend::Db => {
                let path = token.join("sqlite3.db");
                let writer = open(&path);
                writer
                    .execute("insert into object default values", [])
                    .unwrap();
                let row = writer.last_insert_rowid();
                Self::Db { path, row }
            }
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::File { path, .. } | Self::Db { path, .. } => path,
        }
    }

    fn finish(&self) {
        match self {
            Self::File { path, whole } => fs::write(path, whole).unwrap(),
            Self::Db { path, row } => {
                let tables = ["boolean", "integer", "binary", "array"].map(|table| {
                    format!(
                        "insert into attribute_{table} (value, type, object_id)
                         select value, type, {row} from attribute_{table} where object_id = 2;"
                    )
                });
                let all = format!("begin immediate; {} commit", tables.concat());
                open(path).execute_batch(&all).unwrap();
            }
        }
    }
}

fn open(path: &Path) -> rusqlite::Connection {
    let connection = rusqlite::Connection::open(path).unwrap();
    connection.busy_timeout(Duration::from_secs(180)).unwrap();
    connection
}

/// Somebody who makes and destroys objects until `done`, which nobody who checks may take for anything.
fn write_on(softhsm: &Softhsm, done: &AtomicBool) {
    let mut client = softhsm.p11();
    client.open("test", Some(PIN)).unwrap();
    while !done.load(Ordering::Relaxed) {
        let object = client.create(&data_object("passing")).unwrap();
        client.destroy(object).unwrap();
    }
}

/// A token with one object, and a second one that was begun.
fn begun(backend: Backend) -> (Softhsm, Begun) {
    let (softhsm, mut client) = Softhsm::with_token(backend);
    client.create(&data_object("it")).unwrap();
    drop(client);
    let begun = Begun::new(&softhsm, backend);
    (softhsm, begun)
}

both_backends! {
    fn an_object_whose_maker_waits_for_its_turn_is_no_finding(backend) {
        let (softhsm, begun) = begun(backend);
        let done = AtomicBool::new(false);
        let (checked, took) = std::thread::scope(|scope| {
            scope.spawn(|| write_on(&softhsm, &done));
            scope.spawn(|| {
                std::thread::sleep(TURN);
                begun.finish();
            });
            let start = Instant::now();
            let checked = check(&softhsm, &[]);
            done.store(true, Ordering::Relaxed);
            (checked, start.elapsed())
        });
        checked.assert_clean();
        assert!(took > TURN, "it was not seen half made");
    }

    fn what_is_torn_is_told_beside_somebody_who_writes_all_the_while(backend) {
        let (softhsm, begun) = begun(backend);
        let done = AtomicBool::new(false);
        let options = Options { read_only: true, ..Options::default() };
        let store = Store::open(&softhsm.tokendir, options, Arc::new(Diagnostics::new())).unwrap();
        let settings = Settings { only: Vec::new(), configured: None, mask: 0o077, longest: TURN };
        let (report, took) = std::thread::scope(|scope| {
            scope.spawn(|| write_on(&softhsm, &done));
            let start = Instant::now();
            let report = tokenfs::store::check::check(&store, &settings);
            done.store(true, Ordering::Relaxed);
            (report.unwrap(), start.elapsed())
        });
        assert!(report.failures.is_empty(), "{report:#?}");
        assert_eq!(report.findings.len(), 1, "{report:#?}");
        let found = &report.findings[0];
        assert_eq!((found.category, found.path.as_path()), (Category::Suspicious, begun.path()));
        assert!(took > TURN, "{took:?}");

        // And at once when it is alone.
        let start = Instant::now();
        let checked = look(&softhsm);
        assert_eq!((checked.code, checked.findings().len()), (1, 1), "{checked:#?}");
        assert!(start.elapsed() < TURN);
    }
}

/// Is set when it goes, so that whoever looks at it ends also when a check fails.
struct Ended<'a>(&'a AtomicBool);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The files that a mount writes beside those that it replaces are there for a moment only.
#[test]
fn a_mount_that_writes_all_the_while_leaves_nothing() {
    let (softhsm, mut client) = Softhsm::with_token(Backend::File);
    client.create(&data_object("it")).unwrap();
    drop(client);
    let mount = Mount::new(&softhsm);
    let object = objects(&softhsm.token_directory()).remove(0);
    let token = object.parent().unwrap().file_name().unwrap();
    let label = mount
        .join(token)
        .join(object.file_stem().unwrap())
        .join("CKA_LABEL");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let done = Ended(&done);
        scope.spawn(|| {
            let mut round = 0;
            while !done.0.load(Ordering::Relaxed) {
                round += 1;
                fs::write(&label, format!("label {round}\n")).unwrap();
            }
        });
        for _ in 0..20 {
            check(&softhsm, &[]).assert_clean();
        }
    });
}
