//! `tokenfs convert` makes tokens anew in another store, whole or not at all, and says what is in the way.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod check_common;
mod convert_common;
mod mount_common;
mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use check_common::{Checked, objects};
use convert_common::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::*;

fn mtime(path: &Path) -> (i64, i64) {
    let metadata = fs::metadata(path).unwrap();
    (metadata.mtime(), metadata.mtime_nsec())
}

/// A tokendir that is not there yet.
fn beside(softhsm: &Softhsm, name: &str) -> PathBuf {
    softhsm.directory.path().join(name)
}

both_backends! {
    fn what_a_golden_store_holds_is_the_same_in_either_backend_and_back(backend) {
        for golden in GOLDEN {
            let softhsm = Softhsm::golden(golden, backend);
            let before = softhsm.snapshot();
            for to in BACKENDS {
                let (new, back) = (beside(&softhsm, &format!("to-{to}")), beside(&softhsm, &format!("back-{to}")));
                let said = converted(&softhsm.tokendir, &new, to);
                assert_eq!(said, format!("4 tokens, 36 objects converted to {to} in {}", new.display()));
                assert_same(&softhsm.tokendir, &new);
                assert_clean(&new, to);
                converted(&new, &back, backend);
                assert_same(&softhsm.tokendir, &back);
                // What has a file of its own has its time again, which a database remembered.
                if backend == Backend::File {
                    let times = |tokendir: &Path| -> Vec<(PathBuf, (i64, i64))> {
                        let mut paths = walk(tokendir);
                        paths.retain(|path| path.extension().is_some_and(|end| end == "object"));
                        let named = paths.iter().map(|path| path.strip_prefix(tokendir).unwrap());
                        named.map(|path| (path.to_owned(), mtime(&tokendir.join(path)))).collect()
                    };
                    assert_eq!(times(&softhsm.tokendir), times(&back));
                }
                // As `cp -a` would have it.
                assert_eq!(mode(&new), mode(&softhsm.tokendir));
                for token in names(&new) {
                    assert_eq!(mtime(&softhsm.tokendir.join(&token)), mtime(&new.join(&token)));
                    assert_eq!(mode(&new.join(&token)), 0o700);
                }
            }
            before.assert_same(&softhsm.snapshot());
        }
    }

    fn an_existing_token_is_not_touched_and_the_others_are_converted(backend) {
        for to in BACKENDS {
            let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
            let new = beside(&softhsm, "new");
            let token = names(&softhsm.tokendir).remove(1);
            let one = convert(&softhsm.tokendir, &new, to, &[&token]);
            assert_eq!((one.code, names(&new)), (0, vec![token.clone()]), "{one:#?}");
            let before = Snapshot::of(&new.join(&token));

            let all = convert(&softhsm.tokendir, &new, to, &[]);
            assert_eq!(all.code, 1, "{all:#?}");
            assert!(all.last_line().starts_with("3 tokens, ") && all.last_line().ends_with("; 1 token was not"), "{all:#?}");
            let path = new.join(&token).display().to_string();
            assert_eq!(all.err.lines().count(), 1, "{all:#?}");
            assert!(all.err.contains(&path) && all.err.contains("stays as it is"), "{all:#?}");
            before.assert_same(&Snapshot::of(&new.join(&token)));
            assert_same(&softhsm.tokendir, &new);

            // A directory that is no token, but has its name.
            fs::remove_dir_all(new.join(&token)).unwrap();
            fs::create_dir(new.join(&token)).unwrap();
            fs::write(new.join(&token).join("notes"), "mine").unwrap();
            let all = convert(&softhsm.tokendir, &new, to, &[&token]);
            assert_eq!(all.code, 1, "{all:#?}");
            assert_eq!(names(&new.join(&token)), ["notes"]);
        }
    }

    fn a_slot_that_is_taken_is_refused_before_anything_is_written(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        let (new, other) = (beside(&softhsm, "new"), beside(&softhsm, "other"));
        converted(&softhsm.tokendir, &new, backend);
        let before = Snapshot::of(&new);
        fs::create_dir(&other).unwrap();
        let token = names(&new).remove(0);
        let doubled = other.join("another-name");
        fs::rename(softhsm.tokendir.join(token), &doubled).unwrap();
        for to in BACKENDS {
            let refused = convert(&other, &new, to, &[]);
            assert_eq!(refused.code, 1, "{refused:#?}");
            assert!(refused.err.contains("has this serial number"), "{refused:#?}");
            before.assert_same(&Snapshot::of(&new));
        }
    }

    fn tokens_are_named_as_in_tokenfs_tree(backend) {
        let softhsm = Softhsm::golden(Golden::V2_7_0, backend);
        let new = beside(&softhsm, "new");
        for wrong in ["nobody", ""] {
            let refused = convert(&softhsm.tokendir, &new, Backend::Db, &["dup", wrong]);
            assert_eq!((refused.code, refused.out.as_str()), (2, ""), "{refused:#?}");
            assert!(!new.exists());
        }
        let done = convert(&softhsm.tokendir, &new, Backend::Db, &["dup", "sopin-only", "dup"]);
        assert_eq!(done.code, 0, "{done:#?}");
        assert!(done.last_line().starts_with("3 tokens, 4 objects converted to db in "), "{done:#?}");
    }

    fn each_damaged_object_is_named_and_the_other_tokens_are_converted(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        let token = softhsm.token_directories().into_iter().max_by_key(|token| {
            softhsm.read()[token.file_name().unwrap().to_str().unwrap()].objects.len()
        });
        let token = token.unwrap();
        let name = token.file_name().unwrap().to_str().unwrap().to_owned();
        let mut damaged: Vec<String> = Vec::new();
        match backend {
            Backend::File => for path in objects(&token).iter().take(2) {
                let length = fs::metadata(path).unwrap().len();
                fs::OpenOptions::new().write(true).open(path).unwrap().set_len(length - 3).unwrap();
                damaged.push(path.file_stem().unwrap().to_str().unwrap().to_owned());
            },
            Backend::Db => {
                sh(&token, "sqlite3 sqlite3.db \"update attribute_boolean set value = 'maybe' where object_id in (3, 5)\"");
                for row in ["3", "5"] {
                    damaged.push(mount_common::object_name(backend, &name, row));
                }
            }
        }
        for to in BACKENDS {
            let new = beside(&softhsm, &format!("new-{to}"));
            let done = convert(&softhsm.tokendir, &new, to, &[]);
            assert_eq!(done.code, 1, "{done:#?}");
            assert!(done.last_line().starts_with("3 tokens, 4 objects converted"), "{done:#?}");
            assert_eq!(done.err.lines().count(), damaged.len(), "{done:#?}");
            for object in &damaged {
                assert!(done.err.contains(object.as_str()), "{object}: {done:#?}");
            }
            assert!(!new.join(&name).exists());
            assert_clean(&new, to);
            // Where nothing is converted nothing is there.
            let none = beside(&softhsm, "none");
            assert_eq!(convert(&softhsm.tokendir, &none, to, &[&name]).code, 1);
            assert!(!none.exists());
        }
    }

    fn an_ordinary_user_gets_what_is_his_and_root_keeps_owners(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        give(&softhsm.tokendir, ALICE);
        for to in BACKENDS {
            let by_root = beside(&softhsm, &format!("root-{to}"));
            converted(&softhsm.tokendir, &by_root, to);
            // BOB may read it all, and can give nothing to ALICE.
            let home = beside(&softhsm, &format!("bob-{to}"));
            fs::create_dir(&home).unwrap();
            give(&home, BOB);
            let open = home.join("source");
            sh(Path::new("/"), &format!("cp -a {} {}", softhsm.tokendir.display(), open.display()));
            sh(&open, "chmod -R a+rX .");
            let by_bob = home.join("new");
            let mut command = with_arguments(tokenfs_as(BOB), &open, &by_bob, to);
            let done = Checked::of(&mut command);
            assert_eq!((done.code, done.err.as_str()), (0, ""), "{done:#?}");
            for (new, user) in [(&by_root, ALICE), (&by_bob, BOB)] {
                assert_same(&softhsm.tokendir, new);
                for path in walk(new) {
                    let metadata = fs::symlink_metadata(&path).unwrap();
                    assert_eq!((metadata.uid(), metadata.gid()), (user.uid, user.gid), "{}", path.display());
                }
                assert_clean(new, to);
            }
        }
    }

    fn a_directory_that_may_not_be_read_is_said_and_the_rest_is_converted(backend) {
        let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
        give(softhsm.directory.path(), ALICE);
        let closed = softhsm.token_directories().remove(0);
        give(&closed, BOB);
        let new = beside(&softhsm, "new");
        let mut command = with_arguments(tokenfs_as(ALICE), &softhsm.tokendir, &new, Backend::File);
        let done = Checked::of(&mut command);
        assert_eq!((done.code, names(&new).len()), (1, 3), "{done:#?}");
        assert!(done.err.contains(closed.to_str().unwrap()), "{done:#?}");
    }

    fn modes_are_those_of_the_source_without_the_mask(backend) {
        let softhsm = Softhsm::golden(Golden::V2_7_0, backend);
        sh(&softhsm.tokendir, "chmod 1775 .; chmod 2770 *; chmod 660 */*; chmod 440 */token.object */sqlite3.db 2>/dev/null || true");
        for (to, mask) in [(Backend::File, "0007"), (Backend::Db, "0027")] {
            let new = beside(&softhsm, &format!("new-{to}"));
            let mut command = command(&softhsm.tokendir, &new, to);
            let done = Checked::of(command.args(["--umask", mask]));
            // Twice the same option.
            assert_eq!(done.code, 2, "{done:#?}");
            let mut command = tokenfs();
            command.args(["convert", "--umask", mask, "--to", &to.to_string()]);
            let done = Checked::of(command.args([&softhsm.tokendir, &new]).env("SOFTHSM2_CONF", &softhsm.conf));
            assert_eq!((done.code, done.err.as_str()), (0, ""), "{done:#?}");
            assert_eq!(mode(&new), 0o1775);
            let mask = u32::from_str_radix(mask, 8).unwrap();
            for token in names(&new) {
                let token = new.join(token);
                assert_eq!(mode(&token), 0o2770 & !mask);
                let own = token.join(if to == Backend::File { "token.object" } else { "sqlite3.db" });
                assert_eq!(mode(&own), 0o440 & !mask, "{}", own.display());
            }
        }
    }
}

#[test]
fn an_object_without_a_uuid_is_refused_by_name_where_it_needs_one() {
    let (softhsm, _client, object) = check_common::with_object();
    let token = softhsm.token_directory();
    for (old, new) in [("object", "odd.object"), ("lock", "odd.lock")] {
        fs::rename(object.with_extension(old), token.join(new)).unwrap();
    }
    let refused = convert(&softhsm.tokendir, &beside(&softhsm, "db"), Backend::Db, &[]);
    assert_eq!(refused.code, 1, "{refused:#?}");
    assert!(refused.err.contains("odd is no UUID"), "{refused:#?}");
    assert!(!beside(&softhsm, "db").exists());
    converted(&softhsm.tokendir, &beside(&softhsm, "file"), Backend::File);
    assert_same(&softhsm.tokendir, &beside(&softhsm, "file"));
}

#[test]
fn what_cannot_be_begun_is_exit_code_2_and_leaves_nothing() {
    let softhsm = Softhsm::golden(Golden::V2_6_1, Backend::File);
    let before = softhsm.snapshot();
    let (from, missing) = (&softhsm.tokendir, beside(&softhsm, "missing"));
    let token = softhsm.token_directories().remove(0);
    let inside = from.join("inside");
    let link = beside(&softhsm, "link");
    std::os::unix::fs::symlink(from, &link).unwrap();
    let deep = missing.join("deep");
    for (from, into) in [
        (from, from),
        (from, &link),
        (&link, from),
        (from, &inside),
        (&link, &inside),
        (&missing, &deep),
        (from, &deep),
        (&token, &missing),
        (from, &token),
        (&softhsm.conf, &missing),
        (from, &softhsm.conf),
    ] {
        let refused = convert(from, into, Backend::Db, &[]);
        assert_eq!(
            (refused.code, refused.out.as_str()),
            (2, ""),
            "{refused:#?}"
        );
        assert_eq!(refused.err.lines().count(), 1, "{refused:#?}");
        before.assert_same(&softhsm.snapshot());
        assert!(!missing.exists());
    }
    // `--to` has to be said.
    let unsaid = Checked::of(tokenfs().arg("convert").args([from, &missing]));
    assert_eq!((unsaid.code, missing.exists()), (2, false), "{unsaid:#?}");
}

#[test]
fn progress_is_shown_on_a_terminal_alone() {
    let softhsm = Softhsm::golden(Golden::V2_6_1, Backend::File);
    let plain = convert(
        &softhsm.tokendir,
        &beside(&softhsm, "plain"),
        Backend::Db,
        &[],
    );
    assert_eq!((plain.err.as_str(), plain.out.lines().count()), ("", 1));
    let line = format!(
        "{} convert --umask 0077 --backend file --to db {} {}",
        binary().display(),
        softhsm.tokendir.display(),
        beside(&softhsm, "shown").display()
    );
    let mut terminal = tool("script");
    terminal
        .env("TERM", "xterm")
        .args(["-qec", &line, "/dev/null"]);
    let shown = text_of(&mut terminal);
    assert!(shown.contains("4/4") && shown.contains('%'), "{shown}");
    let last = shown.trim_end().lines().last().unwrap();
    assert!(
        last.contains("4 tokens, 36 objects converted to db in "),
        "{shown}"
    );
}

#[test]
fn nothing_of_fuse_is_touched() {
    let softhsm = Softhsm::golden(Golden::V2_6_1, Backend::File);
    let (trace, new) = (beside(&softhsm, "trace"), beside(&softhsm, "new"));
    let mut traced = tool("strace");
    traced.args(["-f", "-o"]).arg(&trace).arg(binary());
    let done = Checked::of(&mut with_arguments(
        traced,
        &softhsm.tokendir,
        &new,
        Backend::Db,
    ));
    assert_eq!(done.code, 0, "{done:#?}");
    let trace = fs::read_to_string(trace).unwrap();
    assert!(trace.contains("sqlite3.db"));
    for call in [
        "/dev/fuse",
        "fusermount",
        " mount(",
        "execve(\"/bin",
        "fsopen(",
    ] {
        assert!(!trace.contains(call), "{call}");
    }
}

#[test]
fn a_signal_ends_it_and_leaves_nothing() {
    let (softhsm, _client, object) = check_common::with_object();
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let held = exclusively(&object);
        let new = beside(&softhsm, "new");
        let mut command = command(&softhsm.tokendir, &new, Backend::File);
        let child = command
            .args(["--lock-wait", "60"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It waits for the lock, and its other thread for signals.
        eventually(Duration::from_secs(20), "the directory", || new.exists());
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        // Until its thread for signals has had its turn, and sleeps again, or all of it is gone: a conversion that is done before that is one.
        let threads = format!("/proc/{}/task", child.id());
        eventually(Duration::from_secs(20), "the signal has been taken", || {
            let mut threads = fs::read_dir(&threads).unwrap().flatten();
            threads.all(|thread| {
                let status = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
                let of = |field| {
                    let mut fields = status.lines().filter_map(|line| line.strip_prefix(field));
                    fields.next().unwrap_or_default().trim()
                };
                of("ShdPnd:").trim_matches('0').is_empty() && !of("State:").starts_with('R')
            })
        });
        drop(held);
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("stopped by SIG"), "{said}");
        assert!(!new.exists());
    }
}

#[test]
fn a_lock_that_stays_taken_is_said() {
    let (softhsm, _client, object) = check_common::with_object();
    let _held = exclusively(&object);
    let mut command = command(&softhsm.tokendir, &beside(&softhsm, "new"), Backend::Db);
    let done = Checked::of(command.args(["--lock-wait", "0.2"]));
    assert_eq!(done.code, 1, "{done:#?}");
    assert!(done.err.contains(object.to_str().unwrap()), "{done:#?}");
    assert_eq!(
        done.last_line().split(" in ").next(),
        Some("0 tokens, 0 objects converted to db")
    );
    let help = text_of(Command::new(binary()).args(["convert", "--help"]));
    assert!(help.contains("--lock-wait") && help.contains("Exit codes:"));
}
