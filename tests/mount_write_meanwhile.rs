//! What somebody else does between two steps of an operation: between what was looked at and the lock, between a commit and the name, between a
//! removal and a restore. Each of these lost something once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod mount_common;
mod support;
mod write_common;

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use mount_common::{assert_same, expected};
use support::template::{boolean, bytes, ulong};
use support::*;
use tokenfs::store::attribute::{Attributes, Value};
use tokenfs::store::file::{decode, encode};
use write_common::*;

/// What keeps all others from writing an object, as a SoftHSM does that is about to.
enum Held {
    File(File, PathBuf),
    Db(rusqlite::Connection),
}

impl Held {
    fn data_of(bench: &Bench) -> Self {
        match bench.backend() {
            Backend::File => {
                let object = bench.backing(&bench.data);
                Self::File(exclusively(&object.with_extension("lock")), object)
            }
            Backend::Db => {
                let opened = rusqlite::Connection::open(bench.backing("")).unwrap();
                opened.execute_batch("begin immediate").unwrap();
                Self::Db(opened)
            }
        }
    }

    /// What SoftHSM does to the data object before it lets go.
    fn change(self, attribute_type: u64, value: &Value) {
        match self {
            Self::File(_lock, object) => {
                let decoded = decode(&fs::read(&object).unwrap()).unwrap();
                let mut attributes: Attributes = decoded.attributes;
                attributes.insert(attribute_type, value.clone());
                let next = decoded.generation.unwrap() + 1;
                fs::write(&object, encode(next, &attributes)).unwrap();
            }
            Self::Db(opened) => {
                let (table, value) = match value {
                    Value::Bytes(bytes) => ("attribute_binary", bytes.clone()),
                    // One boolean in it.
                    Value::Map(_) => {
                        let mut entry = 0x162_u64.to_ne_bytes().to_vec();
                        entry.extend(1_u32.to_ne_bytes());
                        entry.push(1);
                        ("attribute_array", entry)
                    }
                    other => panic!("{other:?}"),
                };
                let row: i64 = opened
                    .query_row(
                        "select object_id from attribute_integer where type = 0 and value = 0",
                        [],
                        |row| row.get(0),
                    )
                    .unwrap();
                let attribute_type = i64::try_from(attribute_type).unwrap();
                opened
                    .execute(
                        &format!("delete from {table} where type = ? and object_id = ?"),
                        (attribute_type, row),
                    )
                    .unwrap();
                opened
                    .execute(
                        &format!("insert into {table} (value, type, object_id) values (?, ?, ?)"),
                        (value, attribute_type, row),
                    )
                    .unwrap();
                opened.execute_batch("commit").unwrap();
            }
        }
    }
}

/// Starts `line` while a SoftHSM is about to change the data object, has it do so, and waits for both; the status of the line.
fn beside(bench: &Bench, line: &str, attribute_type: u64, value: &Value) -> std::process::Output {
    let held = Held::data_of(bench);
    let running = bench
        .shell(line)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // By now it has looked, and waits.
    thread::sleep(Duration::from_millis(400));
    held.change(attribute_type, value);
    running.wait_with_output().unwrap()
}

fn text(text: &str) -> Value {
    Value::Bytes(text.as_bytes().to_vec())
}

/// A process that opens a file, says so, and looks, when it is told to go on, whether it is as long as what is read from it, and mapped.
fn reader(file: &Path, mode: &str, written: usize) -> std::process::Child {
    let script = "import mmap,os,sys; f=os.open(sys.argv[1],getattr(os,sys.argv[2])); s=os.fstat(f); n=int(sys.argv[3]); \
        n and (os.write(f,n*b'w'), os.ftruncate(f,n), os.fsync(f), os.fstat(f)); print(1,flush=True); sys.stdin.readline(); \
        s=os.fstat(f); d=os.pread(f,s.st_size+9,0); assert len(d)==s.st_size, (len(d), s.st_size); \
        m=mmap.mmap(f,0,prot=mmap.PROT_READ)[:]; assert m==d; \
        g=os.open(sys.argv[1],os.O_RDONLY); s=os.fstat(g); d=os.read(g,9999); assert len(d)==s.st_size, (len(d), s.st_size); \
        os.close(g); os.close(f); t=os.stat(sys.argv[1]).st_size; d=open(sys.argv[1],'rb').read(); assert len(d)==t, (len(d),t)";
    tool("python3")
        .args(["-c", script])
        .arg(file)
        .arg(mode)
        .arg(written.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

both_backends! {
    fn a_copy_that_is_held_up_is_not_taken_for_finished(backend) {
        let bench = Bench::new(backend);
        let objects = [&bench.data, &bench.public, &bench.private];
        let copy = |at: usize| format!("00000000-0000-4000-8000-00000000000{at}");
        let mut missing = Vec::new();
        for (at, object) in objects.into_iter().enumerate() {
            let (from, to) = (bench.at(object), bench.at(copy(at)));
            fs::create_dir(&to).unwrap();
            let mut files: Vec<_> = fs::read_dir(&from).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            // One that it could be made without by hand, and is made with by SoftHSM.
            let last = if at == 0 { "CKA_OBJECT_ID" } else { "CKA_EC_PARAMS" };
            files.retain(|file| file != last);
            for file in files {
                let (from, to) = (from.join(&file), to.join(&file));
                if from.is_dir() {
                    fs::create_dir(to).unwrap();
                } else {
                    fs::write(to, fs::read(from).unwrap()).unwrap();
                }
            }
            missing.push((from.join(last), to.join(last)));
        }
        // The same by a process that has ended, which means that it is so.
        let ended = copy(9);
        bench.quiet(&format!("mkdir {ended} && echo false >{ended}/CKA_PRIVATE && echo CKO_DATA >{ended}/CKA_CLASS"));
        eventually(SOON, "what was left alone by who has ended", || bench.has(&ended));
        thread::sleep(HELD * 2);
        for (at, object) in objects.into_iter().enumerate() {
            assert!(!bench.has(&copy(at)), "{object} was taken for finished");
        }
        for (from, to) in missing {
            fs::write(to, fs::read(from).unwrap()).unwrap();
        }
        // It is whole, and left alone.
        for (at, object) in objects.into_iter().enumerate() {
            eventually(SOON, "what is complete", || bench.has(&copy(at)));
            bench.quiet(&format!("diff -r {object} {}", copy(at)));
        }
        bench.settle();
        assert_eq!(bench.log(), "");
    }

    fn a_map_that_is_filled_while_another_one_is_renamed_over_it_stays(backend) {
        let bench = Bench::new(backend);
        bench.quiet("mkdir $o/CKA_WRAP_TEMPLATE $o/CKA_UNWRAP_TEMPLATE; echo true >$o/CKA_WRAP_TEMPLATE/CKA_TOKEN");
        let entries = Value::Map([(0x162, Value::Bool(true))].into_iter().collect::<std::collections::BTreeMap<_, _>>().into());
        let output = beside(&bench, "mv -T $o/CKA_WRAP_TEMPLATE $o/CKA_UNWRAP_TEMPLATE", 0x4000_0212, &entries);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("not empty"), "{output:?}");
        bench.settle();
        assert_eq!(bench.stored_data("CKA_UNWRAP_TEMPLATE/CKA_EXTRACTABLE").unwrap(), b"true\n");
        assert_eq!(bench.stored_data("CKA_WRAP_TEMPLATE/CKA_TOKEN").unwrap(), b"true\n");
    }

    fn scratch_of_an_object_that_softhsm_destroys_goes_with_it(backend) {
        let mut bench = Bench::new(backend);
        let full = |directory: &str| format!("for n in 1 2 3; do head -c 60000000 /dev/zero >{directory}/.big$n; done");
        bench.quiet(&full("$o"));
        bench.quiet("cp -a $o $out/backup");
        let (data, ..) = bench.handles;
        bench.client.destroy(data).unwrap();
        eventually(SOON, "the object to go", || !bench.at(&bench.data).exists());
        // It takes no room that somebody needs.
        bench.quiet(&full("$p"));
        bench.quiet("rm $p/.big1 $p/.big2 $p/.big3; touch $p/.x; cp -a $p $out/public");
        let (_, public, _) = bench.handles;
        bench.client.destroy(public).unwrap();
        eventually(SOON, "the object to go", || !bench.at(&bench.public).exists());
        // And another one gets none of it.
        bench.quiet("cp -a $out/public $p");
        assert!(!bench.at(&bench.public).join(".x").exists());
    }

    fn what_could_not_come_back_is_not_taken_away(backend) {
        let bench = Bench::new(backend);
        // It has no value yet, and none that is empty.
        bench.quiet("touch $o/CKA_TRUSTED");
        let said = bench.fails("mv $o .gone");
        assert!(said.contains("cannot move"), "{said}");
        assert!(bench.log().contains("CKA_TRUSTED has no value yet"), "{}", bench.log());
        bench.quiet("rm $o/CKA_TRUSTED; mv $o .gone; mv .gone $o");
        // A text in the clear in a private object.
        let held = Held::data_of(&bench);
        match held {
            Held::File(_lock, object) => {
                let decoded = decode(&fs::read(&object).unwrap()).unwrap();
                let mut attributes: Attributes = decoded.attributes;
                attributes.insert(2, Value::Bool(true));
                fs::write(&object, encode(decoded.generation.unwrap() + 1, &attributes)).unwrap();
            }
            Held::Db(opened) => {
                let data = "(select object_id from attribute_integer where type = 0 and value = 0)";
                opened.execute_batch(&format!("update attribute_boolean set value = 1 where type = 2 and object_id = {data}; commit")).unwrap();
            }
        }
        eventually(SOON, "the change", || fs::read(bench.of_data("CKA_PRIVATE")).is_ok_and(|text| text == b"true\n"));
        let before = expected(&bench.softhsm);
        bench.fails("mv $o .gone");
        assert!(bench.log().contains("it could not be put back as it is (CKA_LABEL of a private object is a ciphertext"), "{}", bench.log());
        assert_same(&before, &expected(&bench.softhsm));
    }

    fn signals_at_the_end_take_nothing_away(backend) {
        let bench = Bench::new(backend);
        // Pending for as long as this thread lives, but for the end of the mount.
        fs::create_dir(bench.at(OTHER)).unwrap();
        for (name, text) in [("CKA_PRIVATE", "false\n"), ("CKA_CLASS", "CKO_DATA\n")] {
            fs::write(bench.at(OTHER).join(name), text).unwrap();
        }
        fs::remove_file(bench.of_data("CKA_LABEL")).unwrap();
        let held = Held::data_of(&bench);
        // It is being written, and waits.
        thread::sleep(HELD);
        let server = nix::unistd::Pid::from_raw(bench.mount.pid().cast_signed());
        run(tool("umount").arg(bench.mount.path()));
        for _ in 0..3 {
            thread::sleep(Duration::from_millis(300));
            let _ = nix::sys::signal::kill(server, nix::sys::signal::Signal::SIGTERM);
        }
        drop(held);
        eventually(SOON, "the end of the server", || nix::sys::signal::kill(server, None).is_err());
        assert!(bench.has(OTHER), "what was pending is lost: {}", bench.mount.said());
        assert_eq!(bench.stored_data("CKA_LABEL"), None);
    }

    fn who_has_inherited_a_descriptor_may_close_it(backend) {
        let bench = Bench::new(backend);
        let script = "import os,sys; f=os.open(sys.argv[1],os.O_WRONLY|os.O_TRUNC); os.setuid(65534); os.write(f,b'by nobody'); os.close(f)";
        run(tool("python3").args(["-c", script]).arg(bench.of_data("CKA_LABEL")));
        assert_eq!(bench.stored_data("CKA_LABEL").unwrap(), b"by nobody");
        // And nobody else sees what is in the mount.
        let said = run_to_fail(as_user(BOB, "cat").arg(bench.of_data("CKA_LABEL")));
        assert!(said.contains("Permission denied"), "{said}");
    }

    fn what_is_unlinked_does_not_come_back_by_a_rename(backend) {
        let bench = Bench::new(backend);
        bench.quiet("mkdir $o/CKA_WRAP_TEMPLATE; cd $o/CKA_WRAP_TEMPLATE; echo true >CKA_EXTRACTABLE; echo true >CKA_TOKEN");
        bench.settle();
        let listed = bench.quiet("rm $o/CKA_WRAP_TEMPLATE/CKA_EXTRACTABLE && mv $o/CKA_WRAP_TEMPLATE $o/.t && ls $o/.t");
        assert_eq!(listed, "CKA_TOKEN\n");
        // Nor what stands in its place and has no value yet.
        assert_eq!(bench.quiet("rm $o/CKA_MODIFIABLE; touch $o/CKA_MODIFIABLE; mv $o/CKA_MODIFIABLE $o/.x; cat $o/.x"), "");
        bench.quiet("rm $o/.x; mv $o/.t $o/CKA_WRAP_TEMPLATE");
        bench.settle();
        assert_eq!(bench.stored_data("CKA_MODIFIABLE"), None);
        assert_eq!(bench.stored_data("CKA_WRAP_TEMPLATE/CKA_EXTRACTABLE"), None);
        assert_eq!(bench.stored_data("CKA_WRAP_TEMPLATE/CKA_TOKEN").unwrap(), b"true\n");
    }

    fn what_is_being_written_for_the_first_time_is_nobody_elses(backend) {
        let bench = Bench::new(backend);
        let value = |name: &str| bench.stored_data(name).map(|text| String::from_utf8(text).unwrap());
        // One process that starts no other: whoever does has duplicates of all that is open for a moment, and closes them.
        let write = |name: &str, meanwhile: &str| {
            let script = format!(
                "import os,sys,time; p=sys.argv[1]; x=os.path.dirname(p)+'/.x'; f=os.open(p,os.O_WRONLY|os.O_CREAT|os.O_EXCL|os.O_APPEND); \
                 os.write(f,b'half'); {meanwhile}; time.sleep(.1); os.write(f,b'rest'); os.close(f)"
            );
            run(tool("python3").args(["-c", &script]).arg(bench.of_data(name)));
        };
        // `touch`.
        write("CKA_URL", "os.close(os.open(p,os.O_WRONLY))");
        eventually(SOON, "the value", || value("CKA_URL").as_deref() == Some("halfrest"));
        // `mv`, and back.
        write("CKA_ISSUER", "os.rename(p,x)");
        fs::rename(bench.of_data(".x"), bench.of_data("CKA_ISSUER")).unwrap();
        eventually(SOON, "the value", || value("CKA_ISSUER").as_deref() == Some("halfrest"));
        // `truncate`.
        write("CKA_SERIAL_NUMBER", "os.truncate(p,2)");
        eventually(SOON, "the value", || value("CKA_SERIAL_NUMBER").as_deref() == Some("harest"));
    }

    fn append_can_be_turned_off_and_on(backend) {
        let bench = Bench::new(backend);
        let script = "import fcntl,os,sys; f=os.open(sys.argv[1],os.O_WRONLY|os.O_APPEND); fcntl.fcntl(f,fcntl.F_SETFL,0); os.pwrite(f,b'D',0);             fcntl.fcntl(f,fcntl.F_SETFL,os.O_APPEND); os.pwrite(f,b'!',0); os.close(f)";
        run(tool("python3").args(["-c", script]).arg(bench.of_data("CKA_LABEL")));
        assert_eq!(bench.stored_data("CKA_LABEL").unwrap(), b"Data!");
        // A scratch file that is cut has been changed now.
        assert_ne!(bench.quiet("echo long >$o/.x; touch -d @1000000000 $o/.x; truncate -s 2 $o/.x; stat -c %Y $o/.x"), "1000000000\n");
        assert_ne!(bench.quiet("touch -d @1000000000 $o/.x; : >$o/.x; stat -c %Y $o/.x"), "1000000000\n");
        // What takes long to be read is no value.
        let said = bench.fails("yes 1 | head -c 1100000 >$o/CKA_ALLOWED_MECHANISMS");
        assert!(said.contains("File too large"), "{said}");
    }

    fn what_gets_the_name_of_another_one_is_not_taken_for_that(backend) {
        let mut bench = Bench::new(backend);
        let make = |bench: &mut Bench, label: &str| {
            let data = [ulong(0, 0), boolean(1, true), boolean(2, false), bytes(3, label), bytes(CKA_VALUE, label)];
            bench.client.create(&data).unwrap()
        };
        let handles = ["d1", "d2", "d3"].map(|label| make(&mut bench, label));
        bench.settle();
        let names = ["d1", "d2", "d3"].map(|label| {
            let found = bench.quiet(&format!("grep -lx {label} */CKA_LABEL | cut -d/ -f1"));
            found.trim().to_owned()
        });
        let [a, b, c] = &names;
        let swap = |a: &str, b: &str| bench.quiet(&format!("mv {a} .t; mv {b} {a}; mv .t {b}"));
        // All have their names again, and then two have not.
        swap(a, c);
        swap(a, c);
        swap(b, a);
        thread::sleep(HELD);
        for label in ["d1", "d2", "d3"] {
            let found = bench.client.find(&[bytes(3, label)]).unwrap();
            assert_eq!(found.len(), 1, "{label}");
            let value = bench.client.get_bytes(found[0].handle, CKA_VALUE).unwrap();
            assert_eq!(value.as_deref(), Some(label.as_bytes()), "a session that has searched again");
        }
        if backend == Backend::File {
            // There a handle is that of a name, whatever has it.
            return;
        }
        // What it knows of the first one is not of another one.
        let _ = bench.client.destroy(handles[0]);
        bench.settle();
        let mut fresh = bench.softhsm.p11();
        fresh.open("test", Some(PIN)).unwrap();
        for label in ["d2", "d3"] {
            assert_eq!(fresh.find(&[bytes(3, label)]).unwrap().len(), 1, "{label} was destroyed by the handle of d1");
        }
    }

    fn a_token_that_is_held_up_is_not_taken_for_finished(backend) {
        let bench = Bench::new(backend);
        let backup = bench.outside.path().join("backup");
        bench.quiet("cp -a . $out/backup && cd .. && rm -r $t");
        fs::create_dir(bench.directory()).unwrap();
        fs::create_dir(bench.at("token")).unwrap();
        for entry in fs::read_dir(backup.join("token")).unwrap() {
            let entry = entry.unwrap();
            fs::write(bench.at("token").join(entry.file_name()), fs::read(entry.path()).unwrap()).unwrap();
        }
        thread::sleep(HELD * 2);
        assert!(bench.softhsm.read().is_empty(), "it was taken for finished");
        // Whoever goes on with it says when it is.
        bench.quiet("cp -a $out/backup/. $t/");
        bench.quiet("diff -r $out/backup $t");
        eventually(SOON, "the token", || !bench.softhsm.read().is_empty());
        assert_eq!(bench.softhsm.read()[&bench.token].objects.len(), 3);
    }

    /// What has been shown once is not removed for what was unlinked before, although it is the same again.
    fn what_is_set_after_an_unlink_and_seen_stays(backend) {
        let mut bench = Bench::new(backend);
        let object = bench.handles.0;
        for way in ["rm $o/CKA_LABEL", "mv $o/CKA_LABEL $o/.bak"] {
            bench.client.set_label(object, "web").unwrap();
            eventually(SOON, "the label", || fs::read(bench.of_data("CKA_LABEL")).is_ok_and(|label| label == b"web"));
            bench.quiet(way);
            bench.client.set_label(object, "tmp").unwrap();
            eventually(SOON, "what SoftHSM has set", || fs::read(bench.of_data("CKA_LABEL")).is_ok_and(|label| label == b"tmp"));
            bench.client.set_label(object, "web").unwrap();
            std::thread::sleep(HELD * 2);
            assert_eq!(bench.stored_data("CKA_LABEL").unwrap(), b"web", "{backend}: {way}");
            assert!(bench.log().contains("it was removed here, and somebody else has given it another value"));
        }
    }

    /// Who stands in a directory that SoftHSM has destroyed is not in what gets its name by a rename.
    fn who_stands_in_what_softhsm_has_destroyed_is_not_in_what_is_renamed_to_it(backend) {
        let bench = Bench::new(backend);
        bench.quiet("cp -a $o $out/copy");
        let restore = format!("cp -a $out/copy .new; mv -T .new {}", bench.data);
        for line in [format!("mv -T $p {}", bench.data), restore] {
            let inside = fs::File::open(bench.at(&bench.data)).unwrap();
            let mut client = bench.softhsm.p11();
            client.open("test", Some(PIN)).unwrap();
            let found = client.find(&[ulong(0, 0)]).unwrap();
            client.destroy(found[0].handle).unwrap();
            eventually(SOON, "it is gone", || fs::metadata(bench.at(&bench.data)).is_err());
            bench.quiet(&line);
            let before = bench.stored_data("CKA_LABEL").unwrap();
            let written = nix::fcntl::openat(&inside, "CKA_LABEL", nix::fcntl::OFlag::O_WRONLY | nix::fcntl::OFlag::O_TRUNC, nix::sys::stat::Mode::empty());
            assert!(written.is_err(), "{backend}: `{line}`");
            let removed = nix::unistd::unlinkat(&inside, "CKA_LABEL", nix::unistd::UnlinkatFlags::NoRemoveDir);
            assert!(removed.is_err(), "{backend}: `{line}`");
            std::thread::sleep(HELD);
            assert_eq!(bench.stored_data("CKA_LABEL").unwrap(), before, "{backend}: `{line}`");
            drop(inside);
            if line.starts_with("mv -T $p") {
                bench.quiet(&format!("mv -T {} $p; cp -a $out/copy {}", bench.data, bench.data));
            }
        }
    }

    fn what_softhsm_stores_while_an_object_is_moved_away_goes_with_it(backend) {
        let bench = Bench::new(backend);
        // What the mount knows of it is old enough to be believed.
        bench.quiet("cat $o/*");
        thread::sleep(Duration::from_millis(200));
        let moved = beside(&bench, "mv $o .gone", 3, &text("newer"));
        assert!(moved.status.success(), "{moved:?}");
        assert_eq!(fs::read(bench.at(".gone/CKA_LABEL")).unwrap(), b"newer");
        bench.quiet("mv .gone $o");
        assert_eq!(bench.stored_data("CKA_LABEL").unwrap(), b"newer");
    }

    fn what_softhsm_stores_while_an_object_is_removed_keeps_it(backend) {
        let bench = Bench::new(backend);
        bench.quiet("rm $o/*");
        let removed = beside(&bench, "rmdir $o", 3, &text("newer"));
        assert!(String::from_utf8_lossy(&removed.stderr).contains("not empty"), "{removed:?}");
        bench.settle();
        assert_eq!(bench.stored_data("CKA_LABEL").unwrap(), b"newer");
        assert_eq!(bench.stored_data("CKA_CLASS").unwrap(), b"CKO_DATA\n", "all of it is back");
    }

    fn a_map_that_somebody_else_makes_is_not_replaced_by_an_empty_one(backend) {
        for line in ["mkdir $o/CKA_WRAP_TEMPLATE", "mkdir $o/.map; mv -T $o/.map $o/CKA_WRAP_TEMPLATE"] {
            let bench = Bench::new(backend);
            let mut map = Attributes::new();
            map.insert(0x162, Value::Bool(true));
            let made = beside(&bench, line, 0x4000_0211, &Value::Map(map));
            assert!(!made.status.success(), "`{line}`: {made:?}");
            assert_eq!(bench.stored_data("CKA_WRAP_TEMPLATE/CKA_EXTRACTABLE").unwrap(), b"true\n", "`{line}`");
        }
    }

    fn what_is_written_and_closed_while_its_directory_becomes_an_object_is_not_lost(backend) {
        let bench = Bench::new(backend);
        bench.quiet("cp -r $o .new");
        let mut open = File::options().write(true).open(bench.at(".new/CKA_LABEL")).unwrap();
        let generation = bench.softhsm.tokendir.join(&bench.token).join("generation");
        let held = match backend {
            Backend::File => Held::File(exclusively(&generation), generation),
            Backend::Db => Held::data_of(&bench),
        };
        thread::scope(|scope| {
            let renaming = scope.spawn(|| fs::rename(bench.at(".new"), bench.at(OTHER)));
            thread::sleep(Duration::from_millis(300));
            open.rewind().unwrap();
            open.set_len(0).unwrap();
            open.write_all(b"two").unwrap();
            calls::close(open).unwrap();
            drop(held);
            renaming.join().unwrap().unwrap();
        });
        bench.settle();
        assert_eq!(bench.stored(format!("{OTHER}/CKA_LABEL")).unwrap(), b"two");
    }

    fn a_file_that_is_open_has_the_size_of_what_is_read_from_it(backend) {
        let bench = Bench::new(backend);
        let layout = bench.mount.path().join(".tokenfs/file").join(&bench.token);
        let files = [bench.of_data("CKA_LABEL"), layout.join(format!("{}.object", bench.data))];
        let change = |how: &str, value: &str| match how {
            "softhsm" => Held::data_of(&bench).change(3, &text(value)),
            _ => drop(bench.quiet(&format!("printf {value} >$o/CKA_LABEL; sync $o/CKA_LABEL"))),
        };
        for how in ["softhsm", "another process"] {
            for (old, new) in [(5000, 100), (100, 5000)] {
                for (file, mode) in files.iter().zip(["O_RDWR", "O_RDONLY"]) {
                    for is_seen in [false, true] {
                        let when = format!("{how}: {old} to {new}, {}, {is_seen}", file.display());
                        change(how, &"o".repeat(old));
                        // This has it open, and others look at it by its name.
                        let mut reader = reader(file, if is_seen { "O_RDONLY" } else { mode }, 0);
                        let mut line = [0; 2];
                        reader.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
                        change(how, &"n".repeat(new));
                        if is_seen {
                            // The kernel has heard of it.
                            thread::sleep(Duration::from_millis(100));
                            let seen = fs::metadata(file).unwrap().len();
                            assert_eq!(seen, fs::read(file).unwrap().len() as u64, "{when}");
                        }
                        let ended = {
                            reader.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
                            reader.wait_with_output().unwrap()
                        };
                        assert!(ended.status.success(), "{when}: {ended:?}");
                    }
                }
            }
        }
    }

    fn who_has_written_and_synced_a_file_is_told_how_long_that_is_which_he_reads(backend) {
        let bench = Bench::new(backend);
        let label = bench.of_data("CKA_LABEL");
        let others = ["softhsm", "printf $v >$o/CKA_LABEL", "truncate -s $((${#v}+1)) $o/CKA_LABEL", "printf $v >$o/.t; mv $o/.t $o/CKA_LABEL"];
        for how in others {
            for (old, new) in [(5000, 100), (100, 5000)] {
                let when = format!("{how}: {old} to {new}");
                bench.quiet("printf before >$o/CKA_LABEL");
                let mut writer = reader(&label, "O_RDWR", old);
                writer.stdout.as_mut().unwrap().read_exact(&mut [0; 2]).unwrap();
                assert_eq!(fs::read(&label).unwrap(), vec![b'w'; old], "{when}");
                let value = "n".repeat(new);
                match how {
                    "softhsm" => Held::data_of(&bench).change(3, &text(&value)),
                    _ => drop(bench.quiet(&format!("v={value}; {how}"))),
                }
                writer.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
                let ended = writer.wait_with_output().unwrap();
                assert!(ended.status.success(), "{when}: {ended:?}");
            }
        }
    }

    fn what_is_renamed_between_two_reads_of_a_directory_is_listed_once(backend) {
        let bench = Bench::new(backend);
        // The kernel is given all of it with the first read, and asks anew for what does not fit into that.
        let script = "import ctypes,os,struct,sys\n\
            d,a,b,first=sys.argv[1:5]; c=ctypes.CDLL(None); buf=ctypes.create_string_buffer(32768)\n\
            def read(f,size):\n  \
            k=c.getdents64(f,buf,size); q=0; r=[]\n  \
            while q<k:\n    \
            l=struct.unpack_from('<H',buf.raw,q+16)[0]; r.append(buf.raw[q+19:q+l].split(b'\\0')[0].decode()); q+=l\n  \
            return r\n\
            for i in range(20):\n  \
            f=os.open(d,os.O_RDONLY|os.O_DIRECTORY); names=read(f,int(first)); part=[a,b][i%2]; was=part in names\n  \
            os.rename(f'{d}/{part}',f'{d}/{[b,a][i%2]}')\n  \
            while (more:=read(f,32768)): names+=more\n  \
            os.close(f); found=[n for n in names if n in (a,b)]\n  \
            assert len(found)==1, (i,was,names)";
        fs::write(bench.outside.path().join("list.py"), script).unwrap();
        for first in [48, 64, 100, 200, 400] {
            bench.quiet(&format!("python3 $out/list.py $o CKA_LABEL CKA_URL {first}"));
            bench.quiet(&format!("python3 $out/list.py . ${{o##*/}} {OTHER} {first}"));
            bench.quiet(&format!("cp -r $o .new; mkdir .new/CKA_WRAP_TEMPLATE; python3 $out/list.py .new CKA_LABEL .x {first}; rm -r .new"));
        }
    }

    fn all_threads_of_who_writes_a_file_are_told_how_long_it_is(backend) {
        let bench = Bench::new(backend);
        let label = bench.of_data("CKA_LABEL");
        bench.quiet("printf '%0100d' 0 >$o/CKA_LABEL");
        let open = || File::options().write(true).truncate(true).open(&label).unwrap();
        let mut file = open();
        file.write_all(b"0123456789").unwrap();
        thread::scope(|scope| {
            let other = scope.spawn(|| (file.metadata().unwrap().len(), fs::metadata(&label).unwrap().len()));
            assert_eq!(other.join().unwrap(), (10, 10));
        });
        drop(file);
        // One that has ended.
        bench.quiet("printf '%0100d' 0 >$o/CKA_LABEL");
        let file = thread::scope(|scope| {
            let writing = scope.spawn(|| {
                let mut file = open();
                file.write_all(b"012345").unwrap();
                file
            });
            writing.join().unwrap()
        });
        thread::sleep(Duration::from_millis(50));
        assert_eq!(file.metadata().unwrap().len(), 6);
        drop(file);
        assert_eq!(fs::read(&label).unwrap(), b"012345");
    }

    fn who_maps_a_file_that_he_has_extended_is_told_how_long_it_is_when_the_kernel_has_written_a_page(backend) {
        let bench = Bench::new(backend);
        bench.quiet("printf short >$o/CKA_VALUE");
        let script = "import mmap,os,sys; n=65536; f=os.open(sys.argv[1],os.O_RDWR); os.ftruncate(f,n); m=mmap.mmap(f,n); \
            m[:n//2]=b'a'*(n//2); os.posix_fadvise(f,0,0,os.POSIX_FADV_DONTNEED); import time; time.sleep(.3); \
            assert os.fstat(f).st_size==n, os.fstat(f).st_size; m[n//2:]=b'b'*(n//2); m.flush(); os.close(f)";
        bench.quiet(&format!("python3 -c \"{script}\" $o/CKA_VALUE"));
        let value = bench.stored_data("CKA_VALUE").unwrap();
        assert!(value == [[b'a'; 32768], [b'b'; 32768]].concat(), "{}", value.len());
    }

    fn who_has_a_version_of_a_replaced_file_open_is_told_how_long_that_is(backend) {
        let bench = Bench::new(backend);
        let label = bench.of_data("CKA_LABEL");
        let opened = || {
            let mut reader = reader(&label, "O_RDONLY", 0);
            reader.stdout.as_mut().unwrap().read_exact(&mut [0; 2]).unwrap();
            reader
        };
        for replace in ["printf three >$o/.t; mv $o/.t $o/CKA_LABEL", "rm $o/CKA_LABEL; printf three >$o/CKA_LABEL", "sed -i s/e/eee/ $o/CKA_LABEL"] {
            for (first, second) in [("1", "of another length"), ("of another length", "1")] {
                bench.quiet(&format!("printf '{first}' >$o/CKA_LABEL"));
                let one = opened();
                bench.quiet(&format!("printf '{second}' >$o/CKA_LABEL"));
                let two = opened();
                bench.quiet(replace);
                for mut reader in [one, two] {
                    reader.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
                    let ended = reader.wait_with_output().unwrap();
                    assert!(ended.status.success(), "{replace}: {ended:?}");
                }
            }
        }
    }

    fn who_opens_a_file_while_its_object_is_moved_away_and_back_writes_into_it(backend) {
        let bench = Bench::new(backend);
        let over = std::sync::atomic::AtomicBool::new(false);
        let (from, to, file) = (bench.at(&bench.data), bench.at(".gone"), bench.of_data("CKA_APPLICATION"));
        let (mut kept, mut moved) = (0, 0);
        thread::scope(|scope| {
            let moving = scope.spawn(|| {
                let mut moved = 0;
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    let renamed = fs::rename(&from, &to).and_then(|()| fs::rename(&to, &from));
                    if renamed.is_err() {
                        // Nobody waits for what does not come back.
                        over.store(true, std::sync::atomic::Ordering::Relaxed);
                    }
                    renamed.unwrap();
                    moved += 1;
                }
                moved
            });
            let end = std::time::Instant::now() + lasting(4, 30);
            for number in 0.. {
                if std::time::Instant::now() > end {
                    break;
                }
                // It is somewhere else just now, or has come back since it was opened.
                let Ok(mut open) = File::options().write(true).truncate(true).open(&file) else { continue };
                let text = format!("{number}");
                if open.write_all(text.as_bytes()).is_err() {
                    continue;
                }
                thread::sleep(Duration::from_millis(number % 10));
                if calls::close(open).is_err() {
                    continue;
                }
                let mut seen = fs::read(&file);
                while seen.is_err() && !over.load(std::sync::atomic::Ordering::Relaxed) {
                    seen = fs::read(&file);
                }
                if seen.is_err() {
                    break;
                }
                if seen.unwrap() != text.as_bytes() {
                    over.store(true, std::sync::atomic::Ordering::Relaxed);
                    panic!("{number} was written and closed, and is not there");
                }
                kept += 1;
            }
            over.store(true, std::sync::atomic::Ordering::Relaxed);
            moved = moving.join().unwrap();
        });
        report!("{backend}: {kept} values were kept beside {moved} moves");
        assert!(kept > 20 && moved > 20, "{kept} {moved}");
    }

    fn a_descriptor_of_what_is_renamed_over_is_good_to_the_end(backend) {
        let bench = Bench::new(backend);
        let over = std::sync::atomic::AtomicBool::new(false);
        let file = bench.of_data("CKA_VALUE");
        let is_over = || over.load(std::sync::atomic::Ordering::Relaxed);
        thread::scope(|scope| {
            let renaming = scope.spawn(|| {
                while !is_over() {
                    fs::write(bench.of_data(".t"), [b'B'; 5000]).unwrap();
                    fs::rename(bench.of_data(".t"), &file).unwrap();
                }
            });
            let reading = scope.spawn(|| {
                while !is_over() {
                    let seen = fs::read(&file).unwrap();
                    // A program that another test starts closes its duplicates of the descriptor, and each close commits what was written
                    // by then: all of it, and not yet that it was cut.
                    let uncut = seen.len() == 5000 && seen[..3000] == [b'C'; 3000] && seen[3000..] == [b'B'; 2000];
                    let is_whole = seen == [b'B'; 5000] || seen == [b'C'; 3000] || seen == b"value";
                    assert!(is_whole || uncut, "{}", seen.len());
                }
            });
            let end = std::time::Instant::now() + lasting(3, 30);
            let mut rounds = 0;
            let mut write = || -> std::io::Result<()> {
                while std::time::Instant::now() < end {
                    let mut open = File::options().write(true).open(&file)?;
                    open.write_all(&[b'C'; 3000])?;
                    open.set_len(3000)?;
                    open.metadata()?;
                    calls::close(open)?;
                    rounds += 1;
                }
                Ok(())
            };
            let written = write();
            over.store(true, std::sync::atomic::Ordering::Relaxed);
            renaming.join().unwrap();
            reading.join().unwrap();
            written.unwrap();
            println!("{backend}: {rounds} rounds");
        });
    }

    fn what_is_closed_while_its_object_is_renamed_is_kept(backend) {
        let bench = Bench::new(backend);
        let mut at = bench.data.clone();
        for round in 0..60 {
            let next = format!("22222222-2222-4222-8222-{round:012}");
            let mut open = File::options().write(true).truncate(true).open(bench.at(&at).join("CKA_LABEL")).unwrap();
            open.write_all(next.as_bytes()).unwrap();
            thread::scope(|scope| {
                let renaming = scope.spawn(|| {
                    if round % 2 == 0 {
                        fs::rename(bench.at(&at), bench.at(".g")).unwrap();
                        fs::rename(bench.at(".g"), bench.at(&next)).unwrap();
                    } else {
                        fs::rename(bench.at(&at), bench.at(&next)).unwrap();
                    }
                });
                calls::close(open).unwrap();
                renaming.join().unwrap();
            });
            let label = fs::read(bench.at(&next).join("CKA_LABEL")).unwrap();
            assert_eq!(String::from_utf8_lossy(&label), next);
            at = next;
        }
        assert_eq!(bench.log(), "");
    }

    fn what_waits_to_be_removed_is_not_put_back_meanwhile(backend) {
        for are_readers_out in [false, true] {
            let bench = Bench::new(backend);
            bench.quiet("rm $o/*");
            let held = match Held::data_of(&bench) {
                Held::Db(opened) if are_readers_out => {
                    // So that the look-up before has to wait too.
                    opened.execute_batch("rollback; begin exclusive").unwrap();
                    Held::Db(opened)
                }
                held => held,
            };
            let removing = bench.shell("rmdir $o").spawn().unwrap();
            // Longer than it takes to be put back for having been left alone.
            thread::sleep(Duration::from_millis(2500));
            drop(held);
            assert!(removing.wait_with_output().unwrap().status.success());
            thread::sleep(HELD);
            assert!(!bench.has(&bench.data));
            assert_eq!(bench.log(), "");
        }
    }

    fn a_pending_object_that_is_renamed_while_it_is_edited_is_written(backend) {
        let bench = Bench::new(backend);
        let new = "22222222-2222-4222-8222-222222222222";
        bench.quiet(&format!("mkdir {new}; cd {new}; echo CKO_DATA >CKA_CLASS; echo true >CKA_TOKEN; echo false >CKA_PRIVATE"));
        let scratch = File::create(bench.at(new).join(".s")).unwrap();
        let attribute = File::create(bench.at(new).join("CKA_LABEL")).unwrap();
        bench.quiet(&format!("mv {new} {OTHER}; mv {OTHER}/CKA_TOKEN {OTHER}/.t; mv {OTHER}/.t {OTHER}/CKA_TOKEN"));
        thread::sleep(HELD);
        assert!(!bench.has(OTHER), "a file in it is open for writing");
        drop(scratch);
        thread::sleep(HELD);
        assert!(!bench.has(OTHER), "another file in it is open for writing");
        drop(attribute);
        eventually(SOON, "it to be written", || bench.has(OTHER));
    }

    fn what_is_made_while_its_object_or_directory_is_moved_is_not_lost(backend) {
        let bench = Bench::new(backend);
        // Into a scratch directory that becomes an object.
        bench.quiet("cp -r $o .new");
        let generation = bench.softhsm.tokendir.join(&bench.token).join("generation");
        let held = match backend {
            Backend::File => Held::File(exclusively(&generation), generation),
            Backend::Db => Held::data_of(&bench),
        };
        thread::scope(|scope| {
            let renaming = scope.spawn(|| fs::rename(bench.at(".new"), bench.at(OTHER)));
            thread::sleep(Duration::from_millis(300));
            let making = scope.spawn(|| fs::write(bench.at(".new/CKA_ID"), "made"));
            let removing = scope.spawn(|| fs::remove_file(bench.at(".new/CKA_LABEL")));
            thread::sleep(Duration::from_millis(300));
            drop(held);
            renaming.join().unwrap().unwrap();
            making.join().unwrap().unwrap();
            removing.join().unwrap().unwrap();
        });
        bench.settle();
        assert_eq!(bench.stored(format!("{OTHER}/CKA_ID")).unwrap(), b"made");
        assert_eq!(bench.stored(format!("{OTHER}/CKA_LABEL")), None);
        // Into an object that becomes scratch.
        let held = Held::data_of(&bench);
        thread::scope(|scope| {
            let renaming = scope.spawn(|| fs::rename(bench.at(&bench.data), bench.at(".gone")));
            thread::sleep(Duration::from_millis(300));
            let making = scope.spawn(|| fs::write(bench.of_data("CKA_ID"), "late"));
            thread::sleep(Duration::from_millis(300));
            drop(held);
            renaming.join().unwrap().unwrap();
            making.join().unwrap().unwrap();
        });
        assert_eq!(fs::read(bench.at(".gone/CKA_ID")).unwrap(), b"late");
    }

    fn who_has_a_file_open_while_its_object_gets_other_names_goes_on_to_write_into_it(backend) {
        let bench = Bench::new(backend);
        let over = std::sync::atomic::AtomicBool::new(false);
        let (first, second, gone) = (bench.at(&bench.data), bench.at(OTHER), bench.at(".gone"));
        let file = bench.of_data("CKA_APPLICATION");
        let mut written = 0;
        thread::scope(|scope| {
            let moving = scope.spawn(|| {
                let mut moved = 0_u64;
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    let aside = if moved.is_multiple_of(2) { &second } else { &gone };
                    for (from, to) in [(&first, aside), (aside, &first)] {
                        fs::rename(from, to).unwrap();
                        thread::sleep(Duration::from_micros(moved % 7 * 500));
                    }
                    moved += 1;
                }
                moved
            });
            let end = std::time::Instant::now() + lasting(4, 30);
            let mut outcome = Ok(());
            while std::time::Instant::now() < end && outcome.is_ok() {
                // It has another name just now.
                let Ok(mut open) = File::options().read(true).write(true).open(&file) else { continue };
                for _ in 0..4 {
                    written += 1;
                    outcome = open.set_len(0)
                        .and_then(|()| open.rewind())
                        .and_then(|()| open.write_all(format!("{written}").as_bytes()))
                        .and_then(|()| open.sync_all());
                    if outcome.is_err() {
                        break;
                    }
                }
                outcome = outcome.and(calls::close(open).map_err(std::io::Error::from));
            }
            over.store(true, std::sync::atomic::Ordering::Relaxed);
            let moved = moving.join().unwrap();
            assert!(outcome.is_ok(), "{outcome:?} in write {written}, after {moved} moves");
            report!("{backend}: {written} values were written through descriptors beside {moved} moves and back");
        });
        bench.settle();
        assert_eq!(bench.stored_data("CKA_APPLICATION").unwrap(), format!("{written}").as_bytes());
    }

    fn who_is_in_the_directory_of_an_object_while_it_gets_other_names_sees_nothing_of_it(backend) {
        let bench = Bench::new(backend);
        let over = std::sync::atomic::AtomicBool::new(false);
        let (first, second) = (bench.at(&bench.data), bench.at(OTHER));
        let open = File::open(&first).unwrap();
        // As the working directory of a shell does, it leads there without a look at any name before.
        let inside = PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd()));
        thread::scope(|scope| {
            let moving = scope.spawn(|| {
                let mut moved = 0_u64;
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    for (from, to) in [(&first, &second), (&second, &first)] {
                        fs::rename(from, to).unwrap();
                    }
                    moved += 1;
                    thread::sleep(Duration::from_micros(moved % 7 * 500));
                }
                moved
            });
            let end = std::time::Instant::now() + lasting(3, 30);
            let mut used = 0_u64;
            let mut use_it = || -> std::io::Result<()> {
                while std::time::Instant::now() < end {
                    open.metadata()?;
                    fs::read_dir(&inside)?.try_for_each(|entry| entry.map(drop))?;
                    fs::read(inside.join("CKA_APPLICATION"))?;
                    let mut made = File::create(inside.join(".made"))?;
                    made.write_all(b"made")?;
                    calls::close(made)?;
                    fs::remove_file(inside.join(".made"))?;
                    used += 1;
                }
                Ok(())
            };
            let outcome = use_it();
            over.store(true, std::sync::atomic::Ordering::Relaxed);
            let moved = moving.join().unwrap();
            assert!(outcome.is_ok(), "{outcome:?} in round {used}, after {moved} moves");
            report!("{backend}: a directory was used {used} times beside {moved} moves and back");
        });
    }

    /// `fchmod`, `fchown` and `futimens`, of which the kernel says by which number, and not through which descriptor.
    fn what_is_open_can_be_set_after_its_object_was_scratch(backend) {
        let bench = Bench::new(backend);
        let rename = |from: &str, to: &str| fs::rename(bench.at(from), bench.at(to)).unwrap();
        let time = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let set = |open: &File, what: &str| {
            let is_set = open.set_permissions(PermissionsExt::from_mode(0o600))
                .and_then(|()| open.set_times(fs::FileTimes::new().set_modified(time)))
                .and_then(|()| std::os::unix::fs::fchown(open, Some(0), None));
            is_set.unwrap_or_else(|e| panic!("{backend} backend: {what}: {e}"));
            assert_eq!(open.metadata().unwrap().modified().unwrap(), time, "{what}");
        };
        let attribute = File::open(bench.of_data("CKA_LABEL")).unwrap();
        // What rsync leaves: it has been scratch, too.
        fs::write(bench.of_data(".CKA_APPLICATION.x"), "new").unwrap();
        let replaced = File::open(bench.of_data(".CKA_APPLICATION.x")).unwrap();
        fs::rename(bench.of_data(".CKA_APPLICATION.x"), bench.of_data("CKA_APPLICATION")).unwrap();
        rename(&bench.data, ".gone");
        let scratch = File::open(bench.at(".gone/CKA_VALUE")).unwrap();
        for (from, to) in [(".gone", OTHER), (OTHER, &*bench.data), (&*bench.data, ".again"), (".again", OTHER)] {
            rename(from, to);
            for (open, name) in [(&attribute, "CKA_LABEL"), (&replaced, "CKA_APPLICATION"), (&scratch, "CKA_VALUE")] {
                set(open, &format!("{name} in {to}"));
                let seen = fs::metadata(bench.at(to).join(name)).unwrap();
                assert_eq!((seen.modified().unwrap(), seen.mode() & 0o777), (time, 0o600), "{name} in {to}");
            }
        }
        // And who is in a map, before and while its object is scratch.
        bench.quiet("echo true >$k/CKA_UNWRAP_TEMPLATE/CKA_EXTRACTABLE");
        let map = |at: &str| File::open(bench.at(at).join("CKA_UNWRAP_TEMPLATE")).unwrap();
        let before = map(&bench.private);
        rename(&bench.private, ".key");
        let within = map(".key");
        rename(".key", &bench.private);
        for open in [before, within] {
            open.metadata().unwrap();
            let inside = PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd()));
            assert_eq!(fs::read(inside.join("CKA_EXTRACTABLE")).unwrap(), b"true\n");
        }
    }

    /// An editor's swap file, while it edits.
    fn scratch_goes_along_with_its_object(backend) {
        let bench = Bench::new(backend);
        bench.quiet("printf swap >$k/.CKA_LABEL.swp; mkdir $k/.d; printf deep >$k/.d/f; printf map >$k/CKA_UNWRAP_TEMPLATE/.m");
        let mut at = bench.private.clone();
        for to in [OTHER, ".gone", OTHER, ".gone", &*bench.private.clone()] {
            bench.quiet(&format!("mv {at} {to}"));
            at = to.to_owned();
            bench.quiet(&format!("test \"$(cat {at}/.CKA_LABEL.swp {at}/.d/f {at}/CKA_UNWRAP_TEMPLATE/.m)\" = swapdeepmap"));
        }
        bench.settle();
        assert_eq!(bench.log(), "");
    }

    /// It does nothing between the removal and the restore, and so has to see by the object itself that it is another one.
    fn a_session_takes_no_restored_object_for_the_one_before(backend) {
        let mut bench = Bench::new(backend);
        // One that a restore has made before, so that both are first versions.
        bench.quiet("echo true >$o/CKA_MODIFIABLE; cp -a $o $out/o && rm -r $o && cp -a $out/o $o && sync .");
        let first = bench.client.find_label("data").unwrap()[0];
        assert_eq!(bench.client.label(first).unwrap().unwrap(), b"data");
        bench.quiet("printf restored | tee $out/o/CKA_LABEL >$out/o/CKA_APPLICATION && rm -r $o && cp -a $out/o $o && sync .");
        // It may say that the object is gone, but not what was in that.
        let seen = bench.client.label(first);
        assert!(seen != Ok(Some(b"data".to_vec())), "{seen:?}");
        assert!(bench.client.find_label("data").unwrap().is_empty());
        let now = bench.client.find_label("restored").unwrap()[0];
        bench.client.set_label(now, "set").unwrap();
        assert_eq!(bench.stored_data("CKA_LABEL").unwrap(), b"set");
        assert_eq!(bench.stored_data("CKA_APPLICATION").unwrap(), b"restored", "it wrote what was there before");
        bench.assert_sessions_agree();
    }

    /// Two of the same kind have the same generation, since SoftHSM has written each as often.
    fn a_session_takes_no_renamed_object_for_the_one_before(backend) {
        let mut bench = Bench::new(backend);
        let of = |label: &str| [ulong(0, 0), boolean(1, true), boolean(2, false), bytes(3, label)];
        let [a, b] = ["a", "b"].map(|label| bench.client.create(&of(label)).unwrap());
        for (handle, label) in [(a, "a"), (b, "b")] {
            assert_eq!(bench.client.label(handle).unwrap().unwrap(), label.as_bytes());
        }
        // SoftHSM may be at work on what it has just made.
        thread::sleep(Duration::from_millis(700));
        bench.quiet(&format!(
            "a=$(dirname $(grep -lx a */CKA_LABEL)); b=$(dirname $(grep -lx b */CKA_LABEL)); mv $a {OTHER} && mv $b $a && sync ."
        ));
        let now = bench.client.find_label("b").unwrap();
        assert_eq!(now.len(), 1);
        bench.client.set_label(now[0], "set").unwrap();
        bench.assert_sessions_agree();
        for (label, count) in [("a", 1), ("b", 0), ("set", 1)] {
            assert_eq!(bench.client.find_label(label).unwrap().len(), count, "{label}");
        }
    }

    /// The kernel lets nobody move a directory into itself; what the server knew of the tree was not as careful.
    fn directories_that_were_in_each_other_in_turn_hang_nobody(backend) {
        let bench = Bench::new(backend);
        let line = "mkdir .a .b; mv .a .b/; sleep .1; stat .b/.a >$out/1; mv .b/.a .; mv .b .a/; sleep .1; stat .a/.b >$out/2; rmdir .a/.b";
        bench.quiet(&format!("timeout 20 bash -euc '{line}'"));
        bench.quiet("timeout 20 bash -euc 'rmdir .a; printf changed >$o/CKA_LABEL; cat */CKA_* >$out/3 2>&1 || true'");
        assert_eq!(bench.stored_data("CKA_LABEL").unwrap(), b"changed");
    }

    fn what_a_backend_cannot_hold_is_refused_when_it_is_made(backend) {
        let bench = Bench::new(backend);
        let everywhere = ["0xd44b4601.bytes", "0xd44b4602.bytes"].as_slice();
        let in_databases = ["CKA_ID.mechs", "CKA_ALLOWED_MECHANISMS.bytes"].as_slice();
        let names = if backend == Backend::Db { [everywhere, in_databases].concat() } else { everywhere.to_vec() };
        for name in names {
            for line in [format!("echo CKM_RSA_PKCS >$o/{name}"), format!("touch $o/{name}"), format!("echo CKM_RSA_PKCS >$o/.x; mv $o/.x $o/{name}")] {
                let said = bench.fails(&line);
                assert!(said.contains("Invalid argument") || said.contains("subdirectory of itself"), "`{line}`: {said}");
            }
            assert!(bench.log().contains(name), "{}", bench.log());
            assert!(!bench.of_data(name).exists());
            // Nor does it get in with an object that is whole.
            bench.fails(&format!("cp -r $o .n; echo CKM_RSA_PKCS >.n/{name}; mv -T .n {OTHER}"));
            bench.quiet("rm -r .n");
        }
        // rsync looks at what happens to its files, and not at what happens to the times of their directory.
        let said = bench.fails(&format!("cp -r $o $out/o; echo x >$out/o/0xd44b4602.bytes; rsync -a $out/o/ {OTHER}/"));
        assert!(said.contains("0xd44b4602.bytes"), "{said}");
        bench.quiet(&format!("rm -rf {OTHER}"));
        bench.settle();
    }

    /// It is no token yet, and SoftHSM does not count it.
    fn a_token_that_is_pending_is_in_no_slot(backend) {
        let mut bench = Bench::new(backend);
        bench.client.init_token("second", Some(PIN)).unwrap();
        eventually(SOON, "the second token", || fs::read_dir(bench.mount.path()).unwrap().count() == 2);
        bench.quiet("mkdir -p ../pending/token; printf pending >../pending/token/CKA_OS_TOKENLABEL; printf 1037 >../pending/token/CKA_OS_TOKENFLAGS; sleep .5");
        for (serial, is_well) in [("0000000000000002", false), ("0000000000000003", true), ("zzzz", true)] {
            let line = format!("printf {serial} >token/CKA_OS_TOKENSERIAL");
            if is_well {
                bench.quiet(&line);
            } else {
                assert!(bench.fails(&line).contains("Invalid argument"), "{serial}");
            }
            let mut fresh = bench.softhsm.p11();
            fresh.open("second", Some(PIN)).unwrap();
        }
        bench.quiet("rm -r ../pending");
    }

    /// As by one program that unlinks before it writes, and another one that syncs what it has written beside it.
    fn what_is_unlinked_is_held_while_another_file_is_synced(backend) {
        let bench = Bench::new(backend);
        bench.quiet("printf old >$o/CKA_APPLICATION");
        for is_whole in [true, false] {
            fs::remove_file(bench.of_data("CKA_APPLICATION")).unwrap();
            let mut other = File::options().write(true).open(bench.of_data("CKA_LABEL")).unwrap();
            other.write_all(b"other").unwrap();
            if is_whole { other.sync_all().unwrap() } else { other.sync_data().unwrap() }
            assert_eq!(bench.stored_data("CKA_LABEL").unwrap(), b"other");
            assert_eq!(bench.stored_data("CKA_APPLICATION").unwrap(), b"old");
            bench.quiet("printf old >$o/CKA_APPLICATION; printf label >$o/CKA_LABEL");
        }
        fs::remove_file(bench.of_data("CKA_APPLICATION")).unwrap();
        File::open(bench.at(&bench.data)).unwrap().sync_all().unwrap();
        assert_eq!(bench.stored_data("CKA_APPLICATION"), None);
    }

    fn what_is_unlinked_while_its_new_object_is_being_written_is_gone(backend) {
        let bench = Bench::new(backend);
        let generation = bench.softhsm.tokendir.join(&bench.token).join("generation");
        bench.quiet(&format!("mkdir {OTHER}; echo CKO_DATA >{OTHER}/CKA_CLASS; echo false >{OTHER}/CKA_PRIVATE; printf label >{OTHER}/CKA_LABEL"));
        let held = match backend {
            Backend::File => Held::File(exclusively(&generation), generation),
            Backend::Db => Held::data_of(&bench),
        };
        // By now it has been left alone, and waits to be written.
        thread::sleep(Duration::from_millis(600));
        thread::scope(|scope| {
            let removing = scope.spawn(|| fs::remove_file(bench.at(OTHER).join("CKA_LABEL")));
            thread::sleep(Duration::from_millis(300));
            drop(held);
            removing.join().unwrap().unwrap();
        });
        assert!(!bench.at(OTHER).join("CKA_LABEL").exists());
        bench.settle();
        assert_eq!(bench.stored(format!("{OTHER}/CKA_CLASS")).unwrap(), b"CKO_DATA\n");
        assert_eq!(bench.stored(format!("{OTHER}/CKA_LABEL")), None);
        assert_eq!(bench.log(), "");
    }

    /// Who looks at an object that lacks something that SoftHSM stores in every one has it added.
    fn what_softhsm_adds_to_an_object_that_is_being_removed_does_not_keep_it(backend) {
        let mut bench = Bench::new(backend);
        let make = format!("mkdir {OTHER}; echo CKO_DATA >{OTHER}/CKA_CLASS; echo true >{OTHER}/CKA_TOKEN; echo false >{OTHER}/CKA_PRIVATE; printf bare >{OTHER}/CKA_LABEL; sync {OTHER}");
        for is_ours in [false, true] {
            bench.quiet(&make);
            let found = bench.client.find_label("bare").unwrap();
            bench.quiet(&format!("rm {OTHER}/*"));
            if is_ours {
                bench.quiet(&format!("echo true >{OTHER}/CKA_COPYABLE"));
            } else {
                bench.client.get_bytes(found[0], 3).unwrap();
            }
            eventually(SOON, "something in it", || fs::read_dir(bench.at(OTHER)).unwrap().count() > 0);
            if is_ours {
                assert!(bench.fails(&format!("rmdir {OTHER}")).contains("not empty"));
                // Nor while a file has no value yet.
                let said = bench.fails(&format!("rm {OTHER}/*; : >{OTHER}/CKA_TOKEN; rmdir {OTHER}"));
                assert!(said.contains("not empty"), "{said}");
                bench.quiet(&format!("rm -r {OTHER}"));
            } else {
                bench.quiet(&format!("rmdir {OTHER}"));
            }
            assert_eq!(bench.log(), "");
            bench.settle();
            assert_eq!(bench.client.find_label("bare").unwrap(), [0_u64; 0]);
            let check = tokenfs().args(["check", "--backend", &backend.to_string(), "--tokendir"]).arg(&bench.softhsm.tokendir).output().unwrap();
            assert!(check.status.success(), "{check:?}");
        }
    }

    fn tokenfs_umount_says_what_it_could_not_write(backend) {
        let bench = Bench::new(backend);
        bench.quiet("rm $o/CKA_PRIVATE");
        let refused = tokenfs().arg("umount").arg(bench.mount.path()).output().unwrap();
        let said = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{said}");
        let named = said.lines().any(|line| line.contains(&bench.data) && line.contains("the CKA_PRIVATE of an object goes with the whole object only"));
        assert!(named, "{said}");
        assert!(said.contains("is back; nothing is pending any more"), "{said}");
        assert_eq!(bench.stored_data("CKA_PRIVATE").unwrap(), b"false\n");
        bench.mount.unmount();
    }

    fn a_private_key_stays_private(backend) {
        let mut bench = Bench::new(backend);
        bench.fails("rm $k/CKA_PRIVATE; sync $k");
        bench.settle();
        assert_eq!(fs::read(bench.at(&bench.private).join("CKA_PRIVATE")).unwrap(), b"true\n");
        assert!(bench.log().contains("goes with the whole object only"), "{}", bench.log());
        let key = bench.handles.2;
        bench.assert_signs(key);
        let mut fresh = bench.softhsm.p11();
        fresh.open("test", Some(PIN)).unwrap();
        let key = fresh.find_label("private").unwrap()[0];
        fresh.sign(key, CKM_ECDSA, &[7; 32]).unwrap();
    }

    fn a_removal_that_softhsm_cannot_live_with_is_said(backend) {
        let mut bench = Bench::new(backend);
        bench.client.init_token("second", Some(PIN)).unwrap();
        eventually(SOON, "the second token", || {
            fs::read_dir(bench.mount.path()).unwrap().count() == 2
        });
        bench.quiet("cd ..; second=$(dirname $(dirname $(grep -l '^second ' */token/CKA_OS_TOKENLABEL))); printf deadbeef00000001 >$second/token/CKA_OS_TOKENSERIAL");
        // The slot of the other one, and that of the empty one, are refused where a shell looks.
        let taken = format!("deadbeef{}", &bench.token[bench.token.len() - 8..]);
        for serial in [&*taken, "deadbeef00000002"] {
            let said = bench.fails(&format!("cd ..; for t in */token; do printf {serial} >$t/CKA_OS_TOKENSERIAL; done"));
            assert!(said.contains("Invalid argument"), "{serial}: {said}");
        }
        let removed = std::process::Command::new("rm").arg("-r").arg(bench.directory()).output().unwrap();
        assert!(removed.status.success(), "{removed:?}");
        let log = bench.log();
        assert!(log.contains("SoftHSM's empty slot by now") && log.contains(&bench.token), "{log}");
    }
}

#[test]
fn the_lock_file_of_an_object_of_any_name_is_no_foreign_file() {
    let bench = Bench::new(Backend::File);
    bench.quiet("mkdir x.object; cp -r $o/. x.object/; sync .");
    assert!(bench.backing("x.object").exists());
    bench.mount.unmount();
    let checked = tokenfs()
        .arg("check")
        .env("SOFTHSM2_CONF", &bench.softhsm.conf)
        .output()
        .unwrap();
    assert!(checked.status.success(), "{checked:?}");
}

#[test]
fn the_mode_of_a_lock_file_that_is_somebody_elses_is_not_changed() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let bench = Bench::new(Backend::File);
    let lock = bench.backing(&bench.data).with_extension("lock");
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    fs::set_permissions(
        bench.of_data("CKA_LABEL"),
        fs::Permissions::from_mode(0o400),
    )
    .unwrap();
    assert_eq!(mode(&lock), 0o400, "its own is changed with it");
    // Who may rename files in the directory of a token can put there what he likes.
    std::os::unix::fs::chown(&lock, Some(12345), None).unwrap();
    fs::set_permissions(
        bench.of_data("CKA_LABEL"),
        fs::Permissions::from_mode(0o600),
    )
    .unwrap();
    assert_eq!(
        (mode(&lock), mode(&bench.backing(&bench.data))),
        (0o400, 0o600)
    );
}

#[test]
fn a_change_of_the_tokens_own_that_softhsm_overwrites_is_said_at_once() {
    let bench = Bench::new(Backend::File);
    let file = bench
        .softhsm
        .tokendir
        .join(&bench.token)
        .join("token.object");
    let old = fs::read(&file).unwrap();
    let label = format!("{:32}", "ours");
    fs::write(bench.at("token/CKA_OS_TOKENLABEL"), &label).unwrap();
    let present = decode(&fs::read(&file).unwrap()).unwrap();
    let old = decode(&old).unwrap();
    {
        // As a SoftHSM does that has read the old one, and notes a login in it.
        let _lock = exclusively(&file);
        let next = present.generation.unwrap() + 1;
        fs::write(&file, encode(next, &old.attributes)).unwrap();
    }
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while !bench.log().contains("CKA_OS_TOKENLABEL") {
        assert!(std::time::Instant::now() < end, "{}", bench.log());
        thread::sleep(Duration::from_millis(20));
    }
}

/// One that had the token open when that was removed writes its copy of the token's own attributes when it logs in next.
#[test]
fn a_token_is_restored_over_what_softhsm_writes_meanwhile() {
    let bench = Bench::new(Backend::File);
    bench.quiet("cp -a . $out/backup");
    let own = bench
        .softhsm
        .tokendir
        .join(&bench.token)
        .join("token.object");
    let copy = fs::read(&own).unwrap();
    for written in [&copy[..], &copy[..copy.len() - 1], b""] {
        bench.quiet("cd .. && rm -r $t && mkdir $t && cp -a $out/backup/*-* $t/");
        fs::write(&own, written).unwrap();
        bench.quiet("cd .. && cp -a $out/backup/token $t/ && touch -r $out/backup $t && sync $t && diff -r $out/backup $t");
        bench.assert_in_agreement();
        let log = bench.log();
        assert!(log.contains("had written its copy"), "{log}");
        bench.assert_no_leftovers();
    }
    // Another token is nobody's copy.
    let mut other = Attributes::new();
    other.insert(
        tokenfs::pkcs11::CKA_OS_TOKENSERIAL,
        text("0123456789abcdef"),
    );
    other.insert(tokenfs::pkcs11::CKA_OS_TOKENFLAGS, Value::Ulong(1));
    bench.quiet("cd .. && rm -r $t && mkdir $t && cp -a $out/backup/*-* $t/");
    fs::write(&own, encode(1, &other)).unwrap();
    bench.quiet("cp -a $out/backup/token .");
    let said = bench.fails("sync .");
    assert!(said.contains("File exists"), "{said}");
    assert!(
        bench.log().contains("another token in its directory"),
        "{}",
        bench.log()
    );
    fs::remove_file(&own).unwrap();
    // Nor is what is no file.
    fs::create_dir(&own).unwrap();
    let said = bench.fails("sync .");
    assert!(said.contains("File exists"), "{said}");
    fs::remove_dir(&own).unwrap();
    bench.quiet("sync .");
}
