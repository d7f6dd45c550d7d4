//! `.tokenfs/file` of a snapshot: the store in the layout of the `file` backend, as it was at one moment.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod layout_common;
mod mount_common;
mod support;
mod write_common;

use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use layout_common::*;
use support::template::{boolean, bytes, ulong};
use support::*;
use write_common::*;

const CKM_AES_KEY_GEN: u64 = 0x1080;

fn snapshot_of(softhsm: &Softhsm) -> Mount {
    MountOptions::new().argument("--snapshot").mount(softhsm)
}

/// All that `stat` says of a tree but when it was looked at.
fn stated(directory: &Path, with_numbers: bool) -> String {
    let numbers = if with_numbers { "%i %C@ " } else { "" };
    let format = format!("{numbers}%p %y %m %U %G %s %T@\\n");
    sh(
        directory,
        &format!("find . -mindepth 1 -printf '{format}' | sort"),
    )
}

fn assert_same_bytes(one: &Path, other: &Path) {
    let output = run(tool("diff").arg("-r").arg(one).arg(other));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "");
}

/// Files beside those of SoftHSM that a tokendir can have come to hold.
fn spoil(token: &Path) {
    let whole = walk(token)
        .into_iter()
        .find(|path| path.extension().is_some_and(|ending| ending == "object"));
    let whole = fs::read(whole.unwrap()).unwrap();
    let put = |name: &str, content: &[u8]| {
        fs::write(token.join(name), content).unwrap();
        set_mode(&token.join(name), 0o600);
    };
    put("torn.object", &whole[..whole.len() - 3]);
    put("torn.lock", b"");
    put("no-lock.object", &whole);
    put("empty.object", b"");
    put("trailing.object", &[&whole[..], b"xyz"].concat());
    // A true boolean that SoftHSM reads and does not write.
    let attribute = |number: u64| [number.to_be_bytes(), 1_u64.to_be_bytes()].concat();
    let odd = [&[7; 8][..], &attribute(1), &[1], &attribute(2), &[0]].concat();
    put("odd.object", &odd);
    // Nor does it write them in this order.
    let order = [&[7; 8][..], &attribute(2), &[0], &attribute(1), &[0xFF]].concat();
    put("order.object", &order);
    put("stray.lock", b"not empty");
    put("long.object", &[7; 700_000]);
    put("page.object", &[7; 4096]);
    let too_long = File::create(token.join("too-long.object")).unwrap();
    too_long.set_len(256 * 1024 * 1024 + 1).unwrap();
}

both_backends! {
    fn it_is_what_a_live_mount_showed_and_outlives_the_store(backend) {
        for golden in GOLDEN {
            let softhsm = Softhsm::golden(golden, backend);
            let live = Mount::new(&softhsm);
            let (copy, shown) = (copied(&live), stated(&layout(&live), true));
            live.unmount();
            let mount = snapshot_of(&softhsm);
            fs::remove_dir_all(&softhsm.tokendir).unwrap();
            assert_eq!(stated(&layout(&mount), true), shown);
            let later = copied(&mount);
            assert_same_bytes(&copy.tokendir, &later.tokendir);
            assert_eq!(stated(&copy.tokendir, false), stated(&later.tokendir, false));
            assert_opens(&later);
        }
    }

    fn a_copy_is_a_store_of_the_file_backend(backend) {
        let mut bench = Bench::new(backend);
        let mount = snapshot_of(&bench.softhsm);
        let copy = copied(&mount);
        // Made later, and in the store, and not in the copy.
        let more = [ulong(0, 0), boolean(1, true), boolean(2, false), bytes(3, "more")];
        let more = bench.client.create(&more).unwrap();
        assert_eq!(copied(&mount).snapshot().difference(&copy.snapshot()), "");
        bench.client.destroy(more).unwrap();
        let mut client = assert_works(&mut bench, &copy);
        let data = client.find_label("data").unwrap()[0];
        client.set_label(data, "changed").unwrap();
        run(tokenfs().arg("check").arg("--config").arg(&copy.conf));
    }

    fn a_copy_beside_a_softhsm_that_writes_is_whole(backend) {
        let mut bench = Bench::new(backend);
        let (over, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
        let mut writer = bench.softhsm.p11();
        writer.open("test", Some(PIN)).unwrap();
        std::thread::scope(|scope| {
            let writing = scope.spawn(|| {
                let public = [boolean(1, true), boolean(2, false)];
                let mut made = 0;
                while !over.load(Relaxed) {
                    made += 1;
                    let label = format!("number {made}");
                    let data = [&public[..], &[ulong(0, 0), bytes(3, &*label)]].concat();
                    let data = writer.create(&data).unwrap();
                    let key = [&public[..], &[ulong(0x161, 32), bytes(3, &*label)]].concat();
                    let key = writer.generate(CKM_AES_KEY_GEN, &key).unwrap();
                    writer.set_label(data, "another label").unwrap();
                    writer.destroy(key).unwrap();
                    writer.destroy(data).unwrap();
                    rounds.store(made, Relaxed);
                }
            });
            let end = End(&over);
            for _ in 0..if full() { 100 } else { 8 } {
                let before = rounds.load(Relaxed);
                let mount = snapshot_of(&bench.softhsm);
                let copy = copied(&mount);
                mount.unmount();
                let said = text_of(tokenfs().arg("check").arg("--config").arg(&copy.conf));
                assert!(said.ends_with(" objects: clean\n"), "{said}");
                // Nothing in it is damaged, and what was there all the while is there.
                assert!(content(&copy.read())[&bench.token].1.len() >= 3);
                let mut client = copy.p11();
                client.open("test", Some(PIN)).unwrap();
                let private = client.find(&[ulong(0, 3)]).unwrap()[0].handle;
                let signature = client.sign(private, CKM_ECDSA, &[5; 32]).unwrap();
                assert_eq!(bench.client.verify(bench.handles.1, CKM_ECDSA, &[5; 32], &signature), Ok(true));
                eventually(SOON, "more changes", || writing.is_finished() || rounds.load(Relaxed) > before);
                assert!(!writing.is_finished(), "the writer failed");
            }
            drop(end);
            writing.join().unwrap();
        });
    }
}

/// Ends the writing, in a panic too.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

#[test]
fn of_a_file_store_the_bytes_are_its_own_damaged_or_not() {
    let bench = Bench::new(Backend::File);
    let token = bench.softhsm.token_directory();
    spoil(&token);
    let live = layout(&bench.mount).join(&bench.token);
    let mount = snapshot_of(&bench.softhsm);
    let shown = layout(&mount).join(&bench.token);
    assert_eq!(stated(&shown, true), stated(&live, true));
    for path in [&live, &shown] {
        let error = fs::read(path.join("too-long.object")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::EIO));
    }
    let copy = bench.outside.path().join("copy");
    let said = run_to_fail(tool("cp").arg("-a").arg(&shown).arg(&copy));
    assert_eq!(said.matches("cp:").count(), 1, "{said}");
    fs::remove_file(token.join("too-long.object")).unwrap();
    assert_same_bytes(&token, &copy);
    assert_eq!(stated(&token, false), stated(&copy, false));
    // It needs the store no more.
    fs::remove_dir_all(&token).unwrap();
    let again = bench.outside.path().join("again");
    run_to_fail(tool("cp").arg("-a").arg(&shown).arg(&again));
    assert_same_bytes(&copy, &again);
    mount.unmount();
}

#[test]
fn what_is_missing_from_a_file_store_is_not_made_up() {
    let bench = Bench::new(Backend::File);
    let token = bench.softhsm.token_directory();
    for name in ["generation", "token.lock", &format!("{}.lock", bench.data)] {
        fs::remove_file(token.join(name)).unwrap();
    }
    fs::write(token.join(format!("{}.lock", bench.public)), "x").unwrap();
    let copy = copied(&snapshot_of(&bench.softhsm));
    assert_same_bytes(&bench.softhsm.tokendir, &copy.tokendir);
    assert_eq!(
        stated(&bench.softhsm.tokendir, false),
        stated(&copy.tokendir, false)
    );
}

/// In a snapshot nothing can be removed, so that nobody is told how.
#[test]
fn the_log_of_a_snapshot_names_damage_and_no_way_to_remove_it() {
    on_both(|backend| {
        let bench = Bench::new(backend);
        let token = bench.softhsm.token_directory();
        let (object, file) = match backend {
            Backend::File => {
                spoil(&token);
                ("torn", "torn.object")
            }
            Backend::Db => {
                damage_label(&bench);
                (&*bench.data, "sqlite3.db")
            }
        };
        let mount = snapshot_of(&bench.softhsm);
        let at = mount.join(&bench.token).join(object);
        let error = fs::read_dir(&at).map(|mut entries| entries.next().transpose());
        let error = error.and_then(|first| first).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::EIO));
        let shown = layout(&mount)
            .join(&bench.token)
            .join(format!("{object}.object"));
        // What can still be had of it.
        match backend {
            Backend::File => {
                let stored = fs::read(token.join(file)).unwrap();
                assert_eq!(fs::read(&shown).unwrap(), stored);
            }
            Backend::Db => {
                assert_eq!(fs::metadata(&shown).unwrap().len(), 0);
                let error = fs::read(&shown).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(nix::libc::EIO));
            }
        }
        let log = fs::read_to_string(mount.join(".tokenfs/log")).unwrap();
        let line = log.lines().find(|line| line.contains(object));
        let line = line.unwrap_or_else(|| panic!("{log}"));
        assert!(line.contains(file), "{line}");
        assert!(!log.contains("rmdir"), "{log}");
        mount.unmount();
    });
}

/// Damages the data object of a `db` token.
fn damage_label(bench: &Bench) {
    let sql = "update attribute_binary set value = 'text' where type = 3 and value = cast('data' as blob)";
    run(tool("sqlite3").arg(bench.backing("")).arg(sql));
}

#[test]
fn when_umount_returns_the_server_of_a_snapshot_is_gone() {
    on_both(|backend| {
        let (softhsm, _client) = Softhsm::with_token(backend);
        let mount = snapshot_of(&softhsm);
        let server = fs::read_to_string(mount.join(".tokenfs/server")).unwrap();
        let number = server.split(' ').next().unwrap();
        assert_eq!(number, mount.pid().to_string());
        let output = run(tokenfs().arg("umount").arg(mount.path()));
        // Whoever is to wait for it may not have done so yet.
        assert!(fs::read_link(format!("/proc/{number}/exe")).is_err());
        assert_eq!((&*output.stdout, &*output.stderr), (&b""[..], &b""[..]));
    });
}
