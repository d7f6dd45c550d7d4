//! What an operator with a backup does about a damaged object: remove it, or put a good one in its place, by one command, while
//! listing it goes on to say `EIO`, so that no copy takes it for an empty one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod mount_common;
mod support;
mod write_common;

use std::ffi::OsStr;
use std::fs;
use std::sync::Arc;

use support::*;
use tokenfs::error::ErrorKind;
use tokenfs::store::{
    Access, Metadata, NewObject, ObjectId, ObjectName, Options, Patience, Store, TokenName,
};
use write_common::*;

/// A mount with a copy of the whole token in `$out/backup`, and the private key damaged since.
fn damaged(backend: Backend, options: &MountOptions) -> Bench {
    let bench = Bench::with(backend, options);
    bench.quiet("cp -a . $out/backup");
    damage(&bench);
    let key = bench.at(&bench.private);
    eventually(SOON, "the damage to be seen", || {
        fs::read_dir(&key).is_err()
    });
    bench
}

fn damage(bench: &Bench) {
    damage_key(&bench.softhsm, &bench.token, &bench.private);
}

fn assert_says_io_error(bench: &Bench, line: &str) {
    let said = bench.fails(line);
    assert!(said.contains("Input/output error"), "`{line}`: {said}");
}

/// The private key is in the store again as it was in the backup, and a session signs with it.
#[track_caller]
fn assert_restored(bench: &mut Bench) {
    bench.settle();
    bench.quiet("diff -r $out/backup .");
    bench.assert_no_leftovers();
    bench.assert_sessions_agree();
    let found = bench.client.find(&[template::ulong(0, 3)]).unwrap();
    let [found] = &found[..] else {
        panic!("there should be one private key");
    };
    bench.assert_signs(found.handle);
}

/// It is gone, and nothing else is.
#[track_caller]
fn assert_removed(bench: &mut Bench) {
    assert!(!bench.has(&bench.private), "{}", bench.log());
    bench.settle();
    bench.assert_no_leftovers();
    bench.assert_sessions_agree();
    bench.quiet("rm -r $out/backup/$k && diff -r $out/backup .");
    let log = bench.log();
    let line = log
        .lines()
        .find(|line| line.contains("removed the damaged object"));
    let line = line.unwrap_or_else(|| panic!("the log does not tell of it:\n{log}"));
    assert!(
        line.contains(&bench.private) && line.contains(" warning: "),
        "{line}"
    );
}

both_backends! {
    fn a_damaged_object_can_be_removed(backend) {
        for line in ["rmdir $k", "rm -r $k", "rm -rf $k", "mv $k .gone", "mkdir $out/empty && cp -a $out/backup/. $out/empty && rm -r $out/empty/$k && rsync -a --delete $out/empty/ . || test $? = 23"] {
            let mut bench = damaged(backend, &MountOptions::new());
            let output = bench.shell(line).output().unwrap();
            assert!(output.status.success(), "`{line}`: {output:?}\n{}", bench.log());
            assert_removed(&mut bench);
        }
    }

    fn a_good_object_can_be_put_in_the_place_of_a_damaged_one(backend) {
        for line in [
            "cp -a $out/backup/$k .new && mv -T .new $k",
            "rmdir $k && cp -a $out/backup/$k .",
            "rm -rf $k && rsync -a $out/backup/ .",
            "tar -C $out/backup -c $k | tar --recursive-unlink -x",
            // An object that has another name so far.
            "cp -a $out/backup/$k 11111111-2222-4333-8444-555555555555 && mv -T 11111111-2222-4333-8444-555555555555 $k",
        ] {
            let mut bench = damaged(backend, &MountOptions::new());
            bench.quiet(line);
            assert_restored(&mut bench);
        }
    }

    fn what_is_put_in_the_place_of_a_damaged_object_has_none_of_its_scratch(backend) {
        for line in ["rmdir $k && cp -a $out/backup/$k .", "cp -a $out/backup/$k .new && mv -T .new $k"] {
            let bench = Bench::new(backend);
            bench.quiet("cp -a . $out/backup; touch $k/.x $k/CKA_UNWRAP_TEMPLATE/.x");
            damage(&bench);
            eventually(SOON, "the damage to be seen", || fs::read_dir(bench.at(&bench.private)).is_err());
            bench.quiet(line);
            for left in [".x", "CKA_UNWRAP_TEMPLATE/.x"] {
                assert!(!bench.at(&bench.private).join(left).exists(), "{line}: {left}");
            }
        }
    }

    fn what_would_hide_the_damage_or_lose_more_is_an_error(backend) {
        let bench = damaged(backend, &MountOptions::new());
        let before = bench.softhsm.snapshot();
        for line in ["ls $k", "cat $k/CKA_CLASS", "cp -a $k $out/copy", "tar -c . >$out/all.tar", "rsync -a ./ $out/copies", "cp -a $out/backup/$k .", "rsync -a $out/backup/ ."] {
            assert_says_io_error(&bench, line);
        }
        // Only what has nothing in it, or is damaged, is replaced.
        let said = bench.fails("cp -a $out/backup/$k .new && mv -T .new $o");
        assert!(said.contains("not empty"), "{said}");
        bench.fails("rmdir $o");
        before.assert_same(&bench.softhsm.snapshot());
        let hint = format!("rmdir '{}/{}' in the mount", bench.token, bench.private);
        assert!(bench.log().contains(&hint), "{}", bench.log());
        // Nothing is no object that could take its place.
        let said = bench.fails("mkdir -p .n/CKA_UNWRAP_TEMPLATE && mv -T .n $k");
        assert!(said.contains("cannot move"), "{said}");
        bench.quiet("rm -r .n");
        before.assert_same(&bench.softhsm.snapshot());
        // Nothing of it can be kept, so that it cannot come back as an object without attributes.
        bench.quiet("mv $k .gone");
        assert_says_io_error(&bench, "mv .gone $k");
        bench.quiet("rmdir .gone");
        assert!(!bench.has(&bench.private));
    }

    fn a_token_with_damaged_attributes_can_be_removed(backend) {
        let bench = Bench::new(backend);
        let own = bench.softhsm.tokendir.join(&bench.token);
        match backend {
            Backend::File => {
                let path = own.join("token.object");
                let whole = fs::read(&path).unwrap();
                fs::write(&path, &whole[..whole.len() - 3]).unwrap();
            }
            Backend::Db => {
                let statement = "update attribute_binary set value = 'x' where object_id = 1";
                run(tool("sqlite3").arg(own.join("sqlite3.db")).arg(statement));
            }
        }
        eventually(SOON, "the damage to be seen", || fs::read_dir(bench.at("token")).is_err());
        bench.quiet("cd .. && rm -r $t");
        assert!(!own.exists(), "{:?}", walk(&own));
    }

    fn who_may_not_write_it_cannot_remove_it(backend) {
        let (softhsm, client, handles) = configured(backend, "objectstore.umask = 0\n");
        for path in walk(&softhsm.tokendir) {
            set_mode(&path, if path.is_dir() { 0o777 } else { 0o644 });
        }
        set_mode(softhsm.directory.path(), 0o755);
        let options = MountOptions::new().umask(0).option("allow_other");
        let bench = Bench::beside(softhsm, client, handles, &options);
        damage(&bench);
        let key = bench.at(&bench.private);
        eventually(SOON, "the damage to be seen", || fs::read_dir(&key).is_err());
        let mut rmdir = as_user(ALICE, "rmdir");
        rmdir.arg(&key).current_dir("/").env("LC_ALL", "C");
        match backend {
            // As in any directory that is everybody's.
            Backend::File => drop(run(&mut rmdir)),
            Backend::Db => assert!(run_to_fail(&mut rmdir).contains("Permission denied")),
        }
        assert_eq!(key.exists(), backend == Backend::Db);
    }

    fn an_object_that_is_whole_by_then_stays(backend) {
        let mut bench = Bench::new(backend);

        let store = Store::open(&bench.softhsm.tokendir, Options::default(), Arc::default()).unwrap();
        let token = store.token(&TokenName::new(OsStr::new(&bench.token)).unwrap()).unwrap();
        let before = bench.softhsm.snapshot();
        let patience = || Patience::at_most(SOON);
        let name = |name: &str| ObjectName::new(OsStr::new(name)).unwrap();
        let other = token.object(&ObjectId::Object(name(&bench.data)), patience()).unwrap();
        let Metadata { mode, uid, gid, .. } = other.metadata;
        let new = NewObject {
            attributes: other.attributes.clone(),
            access: Access { mode, uid, gid },
            mtime: None,
        };
        for new in [None, Some(&new)] {
            let refused = token.replace_damaged(&name(&bench.private), new, patience());
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::NotEmpty);
            let absent = token.replace_damaged(&name("00000000-0000-4000-8000-000000000000"), new, patience());
            assert_eq!(absent.unwrap_err().kind(), ErrorKind::NotFound);
        }
        before.assert_same(&bench.softhsm.snapshot());
        bench.assert_sessions_agree();
    }
}
