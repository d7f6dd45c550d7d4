//! What each system call that writes does in a mount, sentence by sentence of the contract (docs/tree.md, "Writing"): when a
//! value takes effect, which errno a refusal has, what is visible where meanwhile.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod mount_common;
mod support;
mod write_common;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use mount_common::*;
use nix::libc;
use nix::sys::stat::Mode;
use support::*;
use write_common::calls::*;
use write_common::*;

/// `open` of the data object's label for writing, from the start.
fn truncated(path: &Path) -> File {
    options().truncate(true).open(path).unwrap()
}

fn opened(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

fn appending(path: &Path) -> File {
    OpenOptions::new().append(true).open(path).unwrap()
}

/// The log has a line that has all of these words.
#[track_caller]
fn assert_logged(bench: &Bench, words: &[&str]) {
    let log = bench.log();
    let has = |line: &str| words.iter().all(|word| line.contains(word));
    assert!(
        log.lines().any(has),
        "no line with {words:?} in .tokenfs/log:\n{log}"
    );
}

impl Bench {
    #[track_caller]
    fn assert_label(&self, wanted: &str, when: &str) {
        let stored = self
            .stored_data("CKA_LABEL")
            .map(|l| l.escape_ascii().to_string());
        let wanted = wanted.as_bytes().escape_ascii().to_string();
        assert_eq!(
            stored,
            Some(wanted),
            "{} backend: the label in the store {when}",
            self.backend()
        );
    }

    fn label(&self) -> PathBuf {
        self.of_data("CKA_LABEL")
    }
}

both_backends! {
    fn numbered_backups_are_refused(backend) {
        let bench = Bench::alone(backend);
        bench.quiet("printf new >$out/v");
        for tool in ["cp", "mv", "install -m 600"] {
            for _ in 0..2 {
                bench.quiet("cp $out/v $out/w");
                let said = bench.fails(&format!("timeout 20 {tool} --backup=numbered $out/w $o/CKA_LABEL"));
                assert!(said.contains("Invalid argument"), "{said}");
            }
        }
        bench.assert_label("data", "nothing was done");
        assert_logged(&bench, &["CKA_LABEL.~1~", "--backup=simple"]);
    }

    fn what_is_open_and_lost_its_name_can_be_opened_once_more(backend) {
        let bench = Bench::alone(backend);
        fs::write(bench.label(), "old").unwrap();
        let open = File::open(bench.label()).unwrap();
        bench.quiet("printf new >$o/.t; mv $o/.t $o/CKA_LABEL");
        let again = PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd()));
        assert_eq!(fs::read(&again).unwrap(), b"old");
        // It is another file than what has its name now.
        let writing = options().truncate(true).open(&again).unwrap();
        writing.write_all_at(b"nowhere", 0).unwrap();
        close(writing).unwrap();
        bench.assert_label("new", "which is another file");
        let writing = options().open(&again).unwrap();
        writing.write_all_at(b"longer", 0).unwrap();
        nix::unistd::truncate(&again, 4).unwrap();
        assert_eq!(writing.metadata().unwrap().len(), 4);
        close(writing).unwrap();
        bench.assert_label("new", "which is another file");
    }

    fn who_extends_a_file_that_a_child_has_written_is_told_its_length(backend) {
        let bench = Bench::alone(backend);
        bench.quiet("printf 12345678 >$o/CKA_VALUE");
        let script = "import os,sys; f=sys.argv[1]; d=os.open(f,os.O_RDWR); p=os.fork(); p or (os.write(d,b'C'*14), os._exit(0)); os.wait(); \
            os.posix_fallocate(d,0,6000); seen=(os.fstat(d).st_size, os.stat(f).st_size, len(os.pread(d,9999,0))); assert seen==(6000,)*3, seen";
        bench.quiet(&format!("python3 -c \"{script}\" $o/CKA_VALUE"));
        eventually(SOON, "what was extended", || bench.stored_data("CKA_VALUE").is_some_and(|value| value.len() == 6000));
    }

    fn what_was_mapped_and_closed_is_renamed_as_it_was_written(backend) {
        let bench = Bench::alone(backend);
        let script = "python3 -c 'import mmap,os,sys; fd=os.open(sys.argv[1],os.O_RDWR); \
            m=mmap.mmap(fd,3,mmap.MAP_SHARED); os.close(fd); m[0:3]=b\"two\"; m.close(); \
            os.rename(sys.argv[1],sys.argv[2])' $o/.t $o/CKA_LABEL";
        for _ in 0..10 {
            bench.quiet("printf one >$o/.t");
            bench.quiet(script);
            bench.assert_label("two", "after it was renamed");
        }
    }

    fn what_becomes_an_attribute_is_what_was_closed_last(backend) {
        let bench = Bench::alone(backend);
        let label = || String::from_utf8(bench.stored(format!("{OTHER}/CKA_LABEL")).unwrap()).unwrap();
        let reopened = || File::options().write(true).truncate(true).open(bench.at(".new/CKA_LABEL")).unwrap();
        let begin = || {
            bench.quiet(&format!("rm -rf {OTHER}; cp -r $o .new; printf one >.new/CKA_LABEL"));
            let open = reopened();
            assert_eq!(fs::read(bench.at(".new/CKA_LABEL")).unwrap(), b"", "it is scratch");
            open
        };
        let publish = || fs::rename(bench.at(".new"), bench.at(OTHER)).unwrap();
        let mut open = begin();
        publish();
        assert_eq!(label(), "one", "it was cut and is being written");
        open.write_all(b"tw").unwrap();
        assert_eq!(label(), "one");
        open.write_all(b"o").unwrap();
        close(open).unwrap();
        assert_eq!(label(), "two");
        // Half of it is written by then.
        let mut open = begin();
        open.write_all(b"thr").unwrap();
        publish();
        assert_eq!(label(), "one");
        open.write_all(b"ee").unwrap();
        close(open).unwrap();
        assert_eq!(label(), "three");
        // Somebody else has closed it meanwhile.
        let mut open = begin();
        bench.quiet("printf four >>.new/CKA_LABEL");
        open.write_all(b"x").unwrap();
        publish();
        assert_eq!(label(), "four");
        close(open).unwrap();
        assert_eq!(label(), "xour");
        // What was closed is not being written, also where nothing was written into it, which is heard later.
        for _ in 0..20 {
            drop(begin());
            publish();
            assert_eq!(label(), "");
        }
        bench.quiet(&format!("rm -rf {OTHER}; cp -r $o .new; : >.new/CKA_LABEL; mv .new {OTHER}"));
        assert_eq!(label(), "");
        // The same of a single file.
        let single = || bench.stored_data("CKA_LABEL").unwrap();
        bench.quiet("printf one >$o/.t");
        let mut open = File::options().write(true).truncate(true).open(bench.of_data(".t")).unwrap();
        open.write_all(b"tw").unwrap();
        fs::rename(bench.of_data(".t"), bench.of_data("CKA_LABEL")).unwrap();
        assert_eq!(single(), b"one");
        open.write_all(b"o").unwrap();
        close(open).unwrap();
        assert_eq!(single(), b"two");
        bench.quiet("printf one >$o/.t; : >$o/.t; mv $o/.t $o/CKA_LABEL");
        assert_eq!(single(), b"");
        assert_eq!(bench.log(), "");
    }

    fn what_is_written_without_a_pause_while_its_directory_becomes_an_object_gets_there(backend) {
        let bench = Bench::alone(backend);
        for truncate in [false, true] {
            for round in 0..lasting(15, 60).as_secs() {
                bench.quiet(&format!("rm -rf {OTHER}; cp -r $o .new; printf 0000 >.new/CKA_LABEL"));
                let label = |of: &str| bench.at(of).join("CKA_LABEL");
                let closed = std::sync::atomic::AtomicU64::new(0);
                let over = std::sync::atomic::AtomicBool::new(false);
                let mut writer = File::options().write(true).truncate(truncate).open(label(".new")).unwrap();
                thread::scope(|scope| {
                    scope.spawn(|| {
                        for number in 1.. {
                            writer.write_all(format!("{number:04}").as_bytes()).unwrap();
                            close(writer).unwrap();
                            closed.store(number, std::sync::atomic::Ordering::SeqCst);
                            let opened = [".new", OTHER].iter().find_map(|of| {
                                File::options().write(true).truncate(truncate).open(label(of)).ok()
                            });
                            let Some(opened) = opened else { break };
                            writer = opened;
                            if over.load(std::sync::atomic::Ordering::SeqCst) {
                                break;
                            }
                        }
                    });
                    thread::sleep(Duration::from_millis(3));
                    fs::rename(bench.at(".new"), bench.at(OTHER)).unwrap();
                    let before = closed.load(std::sync::atomic::Ordering::SeqCst);
                    let stored = bench.stored(format!("{OTHER}/CKA_LABEL")).unwrap();
                    over.store(true, std::sync::atomic::Ordering::SeqCst);
                    let stored: u64 = String::from_utf8(stored).unwrap().parse().unwrap_or(0);
                    assert!(stored >= before, "{stored} in the store, {before} was closed; {truncate}, round {round}");
                });
            }
        }
    }

    fn what_scratch_was_renamed_over_keeps_the_number_that_it_has_then(backend) {
        let bench = Bench::alone(backend);
        let label = bench.label();
        for pause in [0, 20, 60, 100] {
            bench.quiet("echo -n new >$o/.t; mv $o/.t $o/CKA_LABEL");
            let number = || fs::metadata(&label).unwrap().ino();
            let then = number();
            thread::sleep(Duration::from_millis(pause));
            let file = truncated(&label);
            let opened = file.metadata().unwrap();
            assert_eq!((opened.ino(), opened.len()), (then, 0), "when it is opened and cut, after {pause} ms");
            file.write_all_at(b"newer", 0).unwrap();
            assert_eq!(file.metadata().unwrap().len(), 5);
            drop(file);
            thread::sleep(Duration::from_millis(pause));
            assert_eq!(number(), then, "after {pause} ms");
            bench.assert_label("newer", "after it was renamed over");
            // What the kernel has of the scratch is not what the attribute is.
            bench.quiet("echo 1 >$o/.t; cat $o/.t >/dev/null; stat $o/.t >/dev/null; mv $o/.t $o/CKA_MODIFIABLE");
            let text = bench.quiet("stat -c %s $o/CKA_MODIFIABLE; cat $o/CKA_MODIFIABLE");
            assert_eq!(text, "5\ntrue\n", "after {pause} ms");
        }
    }

    fn a_value_takes_effect_with_the_first_flush_after_a_write(backend) {
        let bench = Bench::alone(backend);
        // echo x >f: open with O_TRUNC, dup, close, write, close.
        let original = truncated(&bench.label());
        let mut duplicate = original.try_clone().unwrap();
        close(original).unwrap();
        bench.assert_label("data", "after a flush with nothing written");
        duplicate.write_all(b"echo\n").unwrap();
        bench.assert_label("data", "after a write that was not flushed");
        let second = duplicate.try_clone().unwrap();
        close(second).unwrap();
        bench.assert_label("echo\n", "after the first flush after a write");
        duplicate.write_all(b"more").unwrap();
        bench.assert_label("echo\n", "after another write");
        duplicate.sync_all().unwrap();
        bench.assert_label("echo\nmore", "after fsync");
        duplicate.write_all(b" and").unwrap();
        duplicate.sync_data().unwrap();
        bench.assert_label("echo\nmore and", "after fdatasync");
        duplicate.write_all(b" end").unwrap();
        close(duplicate).unwrap();
        bench.assert_label("echo\nmore and end", "after the last close");
    }

    fn truncation_alone_takes_effect_with_the_last_close(backend) {
        let bench = Bench::alone(backend);
        let file = truncated(&bench.label());
        let duplicate = file.try_clone().unwrap();
        close(file).unwrap();
        bench.assert_label("data", "while a truncated file is open");
        close(duplicate).unwrap();
        eventually(SOON, "the truncation", || bench.stored_data("CKA_LABEL") == Some(Vec::new()));
        fs::write(bench.label(), "some text").unwrap();
        let file = opened(&bench.label());
        file.set_len(4).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 4);
        bench.assert_label("some text", "while the file is open");
        close(file).unwrap();
        eventually(SOON, "ftruncate", || bench.stored_data("CKA_LABEL") == Some(b"some".to_vec()));
        nix::unistd::truncate(&bench.label(), 2).unwrap();
        bench.assert_label("so", "after truncate(2)");
        nix::unistd::truncate(&bench.label(), 4).unwrap();
        bench.assert_label("so\0\0", "after truncate(2) to a longer value");
        nix::unistd::truncate(&bench.label(), 0).unwrap();
        bench.assert_label("", "after truncate(2) to nothing");
        let flag = bench.of_data("CKA_COPYABLE");
        let old = bench.stored_data("CKA_COPYABLE");
        assert_eq!(nix::unistd::truncate(&flag, 0), Err(nix::errno::Errno::EINVAL), "a boolean cannot be empty");
        drop(truncated(&flag));
        thread::sleep(HELD);
        assert_eq!(bench.stored_data("CKA_COPYABLE"), old, "a boolean that was only truncated");
        assert_eq!(fs::read(&flag).ok(), old, "the same in the mount");
        assert_logged(&bench, &["CKA_COPYABLE"]);
    }

    fn the_writers_descriptor_is_a_file_like_any_other(backend) {
        let bench = Bench::alone(backend);
        let mut file = opened(&bench.label());
        assert_eq!(file.metadata().unwrap().len(), 4);
        file.write_all_at(b"XY", 2).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 4);
        file.write_all_at(b"end", 8).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 11, "fstat after a write behind the end");
        let mut piece = [0; 20];
        assert_eq!(file.read_at(&mut piece, 0).unwrap(), 11);
        assert_eq!(&piece[..11], b"daXY\0\0\0\0end");
        file.set_len(3).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 3);
        assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), 3, "SEEK_END");
        file.write_all(b"!").unwrap();
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "daX!");
        close(file).unwrap();
        bench.assert_label("daX!", "after all that");
        assert_eq!(fs::metadata(bench.label()).unwrap().len(), 4);
        // A large value in small pieces and out of order.
        let value: Vec<u8> = (0..200_000_u32).map(|i| ((i * 7) >> 3) as u8).collect();
        let file = truncated(&bench.of_data("CKA_VALUE"));
        for at in (0..value.len()).step_by(10_000).rev() {
            file.write_all_at(&value[at..at + 10_000], at as u64).unwrap();
        }
        assert_eq!(file.metadata().unwrap().len(), 200_000);
        close(file).unwrap();
        assert!(bench.stored_data("CKA_VALUE").unwrap() == value, "the large value in the store");
        assert!(fs::read(bench.of_data("CKA_VALUE")).unwrap() == value, "the large value in the mount");
        // Holes, by seeking behind the end.
        let mut file = truncated(&bench.label());
        file.seek(SeekFrom::Start(3)).unwrap();
        file.write_all(b"x").unwrap();
        close(file).unwrap();
        bench.assert_label("\0\0\0x", "after a hole");
    }

    fn descriptors_that_cannot_write_or_read_say_so(backend) {
        let bench = Bench::alone(backend);
        let mut reader = File::open(bench.label()).unwrap();
        assert_eq!(errno(reader.write(b"x")), libc::EBADF);
        assert_eq!(errno(reader.set_len(0)), libc::EINVAL);
        let mut writer = options().open(bench.label()).unwrap();
        assert_eq!(errno(writer.read(&mut [0])), libc::EBADF);
        drop((reader, writer));
        bench.assert_label("data", "afterwards");
    }

    fn exclusive_creation_is_exclusive(backend) {
        let bench = Bench::alone(backend);
        let create = |name: &str| options().create_new(true).open(bench.of_data(name));
        assert_eq!(errno(create("CKA_LABEL")), libc::EEXIST);
        let mut file = create("CKA_URL").unwrap();
        assert_eq!(errno(create("CKA_URL")), libc::EEXIST, "what is only begun is there too");
        file.write_all(b"https://example.org").unwrap();
        close(file).unwrap();
        assert_eq!(bench.stored_data("CKA_URL").as_deref(), Some(&b"https://example.org"[..]));
        let mut file = create(".scratch").unwrap();
        file.write_all(b"x").unwrap();
        assert_eq!(errno(create(".scratch")), libc::EEXIST, "scratch too");
        drop(file);
        assert_eq!(errno(create(".scratch")), libc::EEXIST, "scratch that is closed too");
        // Of many that try at once, one succeeds.
        let won = thread::scope(|scope| {
            let tries: Vec<_> = (0..8).map(|_| scope.spawn(|| create("CKA_SUBJECT").is_ok())).collect();
            tries.into_iter().map(|t| t.join().unwrap()).filter(|won| *won).count()
        });
        assert_eq!(won, 1, "of eight that create the same attribute");
    }

    fn of_two_writers_each_is_whole_and_the_last_close_wins(backend) {
        let bench = Bench::alone(backend);
        for order in [[0, 1], [1, 0]] {
            let texts = ["the first of two", "second"];
            let mut writers = [0, 1].map(|_| Some(truncated(&bench.label())));
            for (writer, text) in writers.iter_mut().zip(texts) {
                writer.as_mut().unwrap().write_all(&text.as_bytes()[..3]).unwrap();
            }
            for (writer, text) in writers.iter_mut().zip(texts) {
                writer.as_mut().unwrap().write_all(&text.as_bytes()[3..]).unwrap();
            }
            for index in order {
                close(writers[index].take().unwrap()).unwrap();
                bench.assert_label(texts[index], "after a close");
            }
            assert_eq!(fs::read(bench.label()).unwrap(), texts[order[1]].as_bytes());
        }
        // Many at once, and a reader beside them.
        let texts: Vec<String> = (0..4).map(|n| format!("{n}").repeat(50 + n * 7)).collect();
        let known: BTreeSet<Vec<u8>> = texts.iter().map(|t| t.clone().into_bytes()).collect();
        fs::write(bench.label(), &texts[0]).unwrap();
        let over = Instant::now() + Duration::from_secs(1);
        let (mut writes, mut reads) = (0, 0);
        thread::scope(|scope| {
            let bench = &bench;
            let writers: Vec<_> = texts.iter().map(|text| scope.spawn(move || {
                let mut count = 0;
                while Instant::now() < over {
                    fs::write(bench.label(), text).unwrap();
                    count += 1;
                }
                count
            })).collect();
            while Instant::now() < over {
                let read = fs::read(bench.label()).unwrap();
                assert!(known.contains(&read), "half a value: {}", read.escape_ascii());
                reads += 1;
            }
            writes = writers.into_iter().map(|w| w.join().unwrap()).sum();
        });
        println!("{backend}: {writes} writes by four at once, {reads} reads, each whole");
        assert!(known.contains(&bench.stored_data("CKA_LABEL").unwrap()));
    }

    /// A cut counts from the moment in which it was made, whenever one hears that the file is closed: what is stored after that stays.
    fn what_is_stored_after_a_cut_is_not_cut(backend) {
        let mut bench = Bench::alone(backend);
        let object = bench.handles.0;
        let cut: [fn(&Path) -> File; 3] = [
            truncated,
            |path| {
                let file = opened(path);
                file.set_len(2).unwrap();
                file
            },
            |path| {
                // The last one counts.
                let file = truncated(path);
                file.set_len(2).unwrap();
                file
            },
        ];
        for cut in cut {
            for sync in [false, true] {
                bench.client.set_label(object, "before").unwrap();
                let file = cut(&bench.label());
                bench.client.set_label(object, "SoftHSM's").unwrap();
                if sync {
                    file.sync_all().unwrap();
                }
                close(file).unwrap();
                thread::sleep(Duration::from_millis(100));
                bench.assert_label("SoftHSM's", "after a cut that was made before");
                assert_eq!(fs::read(bench.label()).unwrap(), b"SoftHSM's");
                // By somebody else in the mount, too.
                let file = cut(&bench.label());
                fs::write(bench.label(), "mine").unwrap();
                close(file).unwrap();
                thread::sleep(Duration::from_millis(50));
                bench.assert_label("mine", "after a cut that was made before");
                // What was cut and written is whole, and the last close wins.
                let mut file = cut(&bench.label());
                bench.client.set_label(object, "SoftHSM's").unwrap();
                file.write_all(b"whole").unwrap();
                close(file).unwrap();
                bench.assert_label("whole", "after a write");
                // Of nothing else is anything kept that was not meant.
                drop(cut(&bench.label()));
                eventually(SOON, "the cut", || bench.stored_data("CKA_LABEL").unwrap().len() <= 2);
            }
        }
        // Without a pause after close has returned.
        let mut lost = 0;
        for _ in 0..50 {
            bench.client.set_label(object, "before").unwrap();
            assert_eq!(fs::read(bench.label()).unwrap(), b"before");
            close(cut[1](&bench.label())).unwrap();
            bench.client.set_label(object, "SoftHSM's").unwrap();
            thread::sleep(Duration::from_millis(20));
            lost += usize::from(bench.stored_data("CKA_LABEL").unwrap() != b"SoftHSM's");
        }
        assert_eq!(lost, 0, "of 50 updates of SoftHSM's");
    }

    /// The same of what has become scratch.
    fn what_is_written_into_scratch_after_a_cut_is_not_cut(backend) {
        let bench = Bench::alone(backend);
        let file = truncated(&bench.label());
        fs::rename(bench.at(&bench.data), bench.at(".gone")).unwrap();
        fs::write(bench.at(".gone/CKA_LABEL"), "written later").unwrap();
        close(file).unwrap();
        thread::sleep(Duration::from_millis(100));
        fs::rename(bench.at(".gone"), bench.at(&bench.data)).unwrap();
        bench.assert_label("written later", "when it is back");
    }

    /// The kernel writes a page back through whichever descriptor the file is mapped by.
    fn what_is_changed_in_a_mapping_is_stored_by_who_syncs_or_closes_it(backend) {
        let bench = Bench::alone(backend);
        for end in ["os.fsync(a)", "os.close(a)"] {
            fs::write(bench.label(), "aaaaaaaa").unwrap();
            let script = format!(
                "import mmap,os,sys
a=os.open(sys.argv[1],os.O_RDWR); first=mmap.mmap(a,0); b=os.open(sys.argv[1],os.O_RDWR); second=mmap.mmap(b,0)
first[0:4]=b'bbbb'; first.flush(); {end}
print(open(sys.argv[1]).read())"
            );
            let said = bench.quiet(&format!("python3 -c \"{script}\" $o/CKA_LABEL"));
            assert_eq!(said.trim(), "bbbbaaaa", "{end}");
        }
    }

    fn appending_loses_nothing(backend) {
        let bench = Bench::alone(backend);
        let (mut one, mut two) = (appending(&bench.label()), appending(&bench.label()));
        one.write_all(b"+1").unwrap();
        two.write_all(b"+2").unwrap();
        one.write_all(b"+3").unwrap();
        close(one).unwrap();
        let mut late = appending(&bench.label());
        close(two).unwrap();
        late.write_all(b"+4").unwrap();
        close(late).unwrap();
        let label = String::from_utf8(bench.stored_data("CKA_LABEL").unwrap()).unwrap();
        let parts: BTreeSet<&str> = label.split('+').collect();
        assert_eq!(parts, BTreeSet::from(["data", "1", "2", "3", "4"]), "what two appended: {label}");
        assert_eq!(label.len(), "data+1+2+3+4".len(), "{label}");
        fs::write(bench.label(), "").unwrap();
        thread::scope(|scope| {
            for who in ["a", "b", "c"] {
                let path = bench.label();
                scope.spawn(move || {
                    for number in 0..30 {
                        let mut file = appending(&path);
                        file.write_all(format!("{who}{number}\n").as_bytes()).unwrap();
                        close(file).unwrap();
                    }
                });
            }
        });
        let label = String::from_utf8(bench.stored_data("CKA_LABEL").unwrap()).unwrap();
        let lines: BTreeSet<&str> = label.lines().collect();
        assert_eq!((lines.len(), label.lines().count()), (90, 90), "lines that three appended at once: {label}");
    }

    fn duplicates_that_are_closed_at_once_commit_once(backend) {
        // Two processes that share a descriptor, as a shell and what it runs do.
        let bench = Bench::alone(backend);
        fs::write(bench.label(), "").unwrap();
        for round in 0..100 {
            let mut file = appending(&bench.label());
            let duplicate = file.try_clone().unwrap();
            file.write_all(format!("{round}\n").as_bytes()).unwrap();
            thread::scope(|scope| {
                scope.spawn(|| close(duplicate));
                scope.spawn(|| close(file));
            });
        }
        let label = String::from_utf8(bench.stored_data("CKA_LABEL").unwrap()).unwrap();
        let wanted: String = (0..100).map(|round| format!("{round}\n")).collect();
        let doubled: Vec<_> = (0..100).map(|n| n.to_string()).filter(|n| label.lines().filter(|line| line == n).count() > 1).collect();
        assert!(label == wanted, "{backend} backend: of 100 appended once, these are there twice: {doubled:?}");
    }

    fn who_has_the_old_value_open_keeps_it(backend) {
        let mut bench = Bench::alone(backend);
        let data = bench.handles.0;
        let mut reader = File::open(bench.label()).unwrap();
        let mut start = [0; 2];
        reader.read_exact(&mut start).unwrap();
        fs::write(bench.label(), "quite another value").unwrap();
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!((start, rest.as_str()), (*b"da", "ta"), "after a change through the mount");
        let mut reader = File::open(bench.label()).unwrap();
        bench.client.set_label(data, "softhsm's").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "quite another value", "after a change by SoftHSM");
        // Unlinked, and removed with all of the object.
        let mut reader = File::open(bench.of_data("CKA_VALUE")).unwrap();
        bench.quiet("rm -r $o");
        bench.settle();
        text.clear();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "value", "of an object that was removed");
    }

    fn an_object_is_listed_once_while_it_is_renamed(backend) {
        let bench = Bench::alone(backend);
        let token = bench.at("");
        let names = ["a", "b"].map(|last| format!("00000000-0000-4000-8000-00000000000{last}"));
        let wanted = fs::read_dir(&token).unwrap().count();
        bench.quiet(&format!("mv $o {}", names[0]));
        let over = Instant::now() + Duration::from_secs(2);
        thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0.. {
                    if Instant::now() > over && round % 2 == 0 {
                        break;
                    }
                    fs::rename(token.join(&names[round % 2]), token.join(&names[(round + 1) % 2])).unwrap();
                }
            });
            let mut listings = 0;
            while Instant::now() < over {
                let listed: Vec<_> = fs::read_dir(&token).unwrap().map(|entry| entry.unwrap().file_name()).collect();
                assert_eq!(listed.len(), wanted, "{listed:?}");
                listings += 1;
            }
            assert!(listings > 20, "{listings}");
        });
    }

    fn what_is_written_through_a_shared_mapping_is_where_it_was_mapped(backend) {
        let bench = Bench::alone(backend);
        for (flag, letters) in [("0", "DA"), ("os.O_APPEND", "Da")] {
            bench.quiet("printf data >$o/CKA_LABEL");
            bench.quiet(&format!("python3 -c 'import mmap,os,sys; fd=os.open(sys.argv[1],os.O_RDWR|{flag}); \
                m=mmap.mmap(fd,0,mmap.MAP_SHARED); m[:2]=b\"{letters}\"; m.flush(); m.close(); os.close(fd)' $o/CKA_LABEL"));
            bench.assert_label(&format!("{letters}ta"), flag);
        }
    }

    fn a_value_that_cannot_be_is_refused_by_write_or_by_close(backend) {
        let mut bench = Bench::alone(backend);
        bench.quiet("echo CKM_RSA_PKCS >$o/CKA_ALLOWED_MECHANISMS");
        let before = expected(&bench.softhsm);
        for (name, bad, can_begin) in [
            ("CKA_COPYABLE", "maybe", false), ("CKA_COPYABLE", "true\nfalse", true), ("CKA_COPYABLE", "2", false), ("CKA_COPYABLE", "tru", true),
            ("CKA_CLASS", "CKO_NOTHING", false), ("CKA_CLASS", "CKO_PRIV", true), ("CKA_CLASS", "0x", true), ("CKA_CLASS", "-1", false),
            ("CKA_CLASS", "99999999999999999999", false), ("CKA_CLASS", "0x1ffffffffffffffff", false),
            ("CKA_ALLOWED_MECHANISMS", "CKM_NONE", false), ("CKA_ALLOWED_MECHANISMS", "CKM_RSA_PKCS CKM_SHA_1", false),
            ("CKA_ALLOWED_MECHANISMS", "CKM_RSA_PKCS\nCKM_SH", true),
        ] {
            let path = bench.of_data(name);
            let mut file = truncated(&path);
            let whole = format!("{bad}\n");
            assert_eq!(errno(file.write_all(whole.as_bytes())), libc::EINVAL, "write of {bad:?} and a newline to {name}");
            let _ = close(file);
            assert_same(&before, &expected(&bench.softhsm));
            assert_logged(&bench, &[name]);
            // Without a newline more may follow, as long as that can make it a value.
            let mut file = truncated(&path);
            let told = errno(file.write_all(bad.as_bytes()));
            if can_begin {
                assert_eq!(told, 0, "write of {bad:?} to {name}: more may follow");
                assert_eq!(close(file), Err(nix::errno::Errno::EINVAL), "close after {bad:?} in {name}");
                let mut file = truncated(&path);
                file.write_all(bad.as_bytes()).unwrap();
                assert_eq!(errno(file.sync_all()), libc::EINVAL, "fsync after {bad:?} in {name}");
            } else {
                assert_eq!(told, libc::EINVAL, "write of {bad:?} to {name}: nothing that follows makes it a value");
                let said = bench.fails(&format!("printf %s '{bad}' >$o/{name}"));
                assert!(said.contains("Invalid argument"), "a shell tells its user: {said}");
            }
            assert_same(&before, &expected(&bench.softhsm));
        }
        // Piece by piece is well, byte by byte too.
        let mut file = truncated(&bench.of_data("CKA_COPYABLE"));
        for byte in b"false\n" {
            file.write_all(&[*byte]).unwrap();
        }
        close(file).unwrap();
        assert_eq!(bench.stored_data("CKA_COPYABLE").as_deref(), Some(&b"false\n"[..]));
        // The mount shows the old value after a refusal, and takes the next one.
        bench.fails("echo maybe >$o/CKA_COPYABLE");
        assert_eq!(bench.quiet("cat $o/CKA_COPYABLE"), "false\n");
        bench.quiet("echo true >$o/CKA_COPYABLE");
        assert_eq!(bench.quiet("cat $o/CKA_COPYABLE"), "true\n");
        let said = bench.fails("echo maybe >$o/CKA_COPYABLE");
        assert!(said.contains("Invalid argument"), "a shell tells its user: {said}");
        bench.assert_sessions_agree();
    }

    fn a_private_objects_byte_string_has_to_be_a_ciphertext(backend) {
        let mut bench = Bench::alone(backend);
        let path = bench.at(&bench.private).join("CKA_LABEL");
        let before = expected(&bench.softhsm);
        for length in [1, 15, 16, 31, 33, 47] {
            let mut file = truncated(&path);
            let written = errno(file.write_all(&vec![b'x'; length]));
            let closed = close(file);
            assert!(
                written == libc::EINVAL || closed == Err(nix::errno::Errno::EINVAL),
                "{length} bytes for a private label: write {}, close {closed:?}", name(written)
            );
            assert_same(&before, &expected(&bench.softhsm));
        }
        assert_logged(&bench, &["CKA_LABEL"]);
        // A program that ignores what close says hears of a text, and of nothing that can be a part of a ciphertext.
        for text in ["my key", "a key with a newline\\n", "Schlüssel"] {
            let said = bench.fails(&format!("printf '{text}' >$k/CKA_LABEL"));
            assert!(said.contains("Invalid argument"), "printf {text:?}: {said}");
        }
        let old = fs::read(&path).unwrap();
        for size in [1, 3, 16] {
            bench.quiet(&format!("cat $k/CKA_LABEL >$out/label; dd if=$out/label of=$k/CKA_LABEL bs={size} status=none"));
            assert_eq!(fs::read(&path).unwrap(), old, "dd bs={size}");
        }
        bench.fails("mv $o/CKA_LABEL $k/CKA_LABEL || { cp $o/CKA_LABEL $k/.l && mv $k/.l $k/CKA_LABEL; }");
        assert_eq!(bench.stored(format!("{}/CKA_LABEL", bench.private)).unwrap().len(), 32);
        // The dates are in the clear, and nothing at all is well.
        bench.quiet("printf 20270101 >$k/CKA_END_DATE; : >$k/CKA_SUBJECT");
        let date = format!("{}/CKA_END_DATE", bench.private);
        assert_eq!(bench.stored(&date).as_deref(), Some(&b"20270101"[..]));
        // SoftHSM stores a date in the clear, and takes it for a ciphertext when a session asks for it (P11Attribute::retrieve).
        bench.quiet("rm $k/CKA_END_DATE");
        bench.settle();
        // What is not a ciphertext keeps an object from becoming private.
        let log = bench.log();
        let mut file = truncated(&bench.of_data("CKA_PRIVATE"));
        let written = errno(file.write_all(b"true\n"));
        let closed = close(file);
        assert_eq!((written, closed), (libc::EINVAL, Ok(())), "CKA_PRIVATE turned on: a shell hears of it");
        assert_eq!(bench.stored_data("CKA_PRIVATE").as_deref(), Some(&b"false\n"[..]));
        assert_ne!(bench.log(), log, "a line in .tokenfs/log says why");
        // And a new object from being made. It stays pending, or is refused when its directory is synced.
        bench.quiet("mkdir 00000000-0000-4000-8000-000000000001; cd 00000000-0000-4000-8000-000000000001; echo CKO_DATA >CKA_CLASS; printf clear >CKA_LABEL; ! echo true 2>/dev/null >CKA_PRIVATE");
        thread::sleep(HELD);
        bench.assert_sessions_agree();
    }

    fn a_token_label_or_serial_number_that_is_too_long_is_refused_by_write(backend) {
        let mut bench = Bench::alone(backend);
        let before = expected(&bench.softhsm);
        for (name, length) in [("CKA_OS_TOKENLABEL", 33), ("CKA_OS_TOKENSERIAL", 17)] {
            let said = bench.fails(&format!("printf '%-{length}s' x >token/{name}"));
            assert!(said.contains("Invalid argument"), "{said}");
            assert_same(&before, &expected(&bench.softhsm));
            assert_logged(&bench, &[name, "crashes every program"]);
        }
        bench.assert_sessions_agree();
    }

    fn what_says_nothing_of_being_private_is_private_to_softhsm(backend) {
        // SoftHSM's default for CKA_PRIVATE is true (`getBooleanValue(CKA_PRIVATE, true)`): without the attribute it takes byte
        // strings in the clear for ciphertexts.
        let mut bench = Bench::alone(backend);
        let path = bench.at("00000000-0000-4000-8000-000000000001");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("CKA_CLASS"), "CKO_DATA\n").unwrap();
        fs::write(path.join("CKA_TOKEN"), "true\n").unwrap();
        fs::write(path.join("CKA_LABEL"), "in the clear").unwrap();
        let synced = File::open(&path).and_then(|directory| directory.sync_all());
        thread::sleep(HELD);
        assert_works(&bench.softhsm, &format!("a new object without CKA_PRIVATE (fsync: {})", name(errno(synced))));
        let _ = fs::remove_dir_all(&path);
        bench.settle();
        let _ = fs::remove_file(bench.of_data("CKA_PRIVATE"));
        thread::sleep(HELD);
        assert_works(&bench.softhsm, "CKA_PRIVATE unlinked");
        fs::write(bench.of_data("CKA_PRIVATE"), "false\n").unwrap();
        thread::sleep(HELD);
        bench.assert_sessions_agree();
    }

    fn what_is_emptied_and_not_removed_is_whole_again(backend) {
        // A session that has read that an object is not private puts its next text into it in the clear, and SoftHSM takes an object
        // that does not say so for private.
        let mut bench = Bench::alone(backend);
        let before = expected(&bench.softhsm);
        for (line, said) in [("rm $o/*", "CKA_PRIVATE"), ("rm $o/CKA_PRIVATE", "CKA_PRIVATE"), ("mv $o/CKA_PRIVATE $o/.x", "CKA_PRIVATE"), ("rm token/*", "CKA_OS_TOKENSERIAL"), ("rm token/CKA_OS_TOKENFLAGS", "CKA_OS_TOKENFLAGS")] {
            bench.quiet(line);
            eventually(SOON, "the log says that it is back", || bench.log().contains(said) && bench.log().contains("is back"));
            bench.settle();
            assert_same(&before, &expected(&bench.softhsm));
            bench.client.set_label(bench.handles.0, "data").unwrap();
            assert_works(&bench.softhsm, line);
        }
        bench.quiet("rm $o/*; rmdir $o");
        bench.settle();
        assert!(!bench.has(&bench.data));
        bench.assert_sessions_agree();
    }

    fn a_removal_that_fails_in_its_last_step_leaves_the_object_whole(backend) {
        let mut bench = Bench::with(backend, &MountOptions::new().option("lock_wait=1"));
        let before = expected(&bench.softhsm);
        let said = match backend {
            Backend::File => {
                let held = exclusively(&bench.backing(&bench.data).with_extension("lock"));
                let said = bench.fails("rm -r $o");
                drop(held);
                said
            }
            Backend::Db => {
                let database = rusqlite::Connection::open(bench.softhsm.token_directory().join("sqlite3.db")).unwrap();
                database.execute_batch("BEGIN EXCLUSIVE").unwrap();
                let said = bench.fails("rm -r $o");
                database.execute_batch("ROLLBACK").unwrap();
                said
            }
        };
        assert!(said.contains("busy"), "{said}");
        thread::sleep(HELD * 4);
        bench.settle();
        assert_same(&before, &expected(&bench.softhsm));
        bench.client.set_label(bench.handles.0, "data").unwrap();
        assert_works(&bench.softhsm, "an object that was to be removed");
        bench.quiet("rm -r $o");
        bench.settle();
        assert!(!bench.has(&bench.data));
    }

    fn a_doubled_serial_number_is_refused(backend) {
        // Every program that uses SoftHSM would abort at its start (SlotManager::insertToken).
        let bench = Bench::alone(backend);
        let token = bench.directory();
        let token = token.display();
        let said = bench.fails(&format!("cp -a {token} {token}-copy"));
        assert!(said.contains("Invalid argument"), "{said}");
        assert_logged(&bench, &["CKA_OS_TOKENSERIAL", "has this serial number"]);
        bench.quiet(&format!("printf 0123456789abcdef >{token}-copy/token/CKA_OS_TOKENSERIAL; sync {token}-copy"));
        assert_works(&bench.softhsm, "two tokens with serial numbers of their own");
        // Nor can one that is there take the number of another.
        bench.fails(&format!("cp {token}/token/CKA_OS_TOKENSERIAL {token}-copy/token/CKA_OS_TOKENSERIAL"));
        assert_works(&bench.softhsm, "the number of another token was refused");
    }

    fn a_token_that_is_not_all_there_stays_pending(backend) {
        let bench = Bench::alone(backend);
        let copy = bench.mount.path().join("copy");
        for (lacks, has) in [("CKA_OS_TOKENSERIAL", "TOKENFLAGS"), ("CKA_OS_TOKENFLAGS", "TOKENSERIAL")] {
            bench.quiet(&format!("mkdir -p {0}/token; cp token/CKA_OS_TOKENLABEL {0}/token/; printf 42 >{0}/token/CKA_OS_TOKENFLAGS; printf 0123456789abcdef >{0}/token/CKA_OS_TOKENSERIAL; rm {0}/token/{lacks}", copy.display()));
            thread::sleep(HELD);
            bench.fails(&format!("sync {}", copy.display()));
            assert_logged(&bench, &[lacks, "stays pending"]);
            assert!(copy.join(format!("token/CKA_OS_{has}")).exists());
            assert_works(&bench.softhsm, &format!("a token without {lacks}"));
            bench.quiet(&format!("rm -r {}", copy.display()));
        }
    }

    fn the_number_of_the_empty_slot_is_refused(backend) {
        // SoftHSM shows an empty slot beside the tokens, whose number is how many these are.
        let bench = Bench::alone(backend);
        let own = bench.at("token/CKA_OS_TOKENSERIAL");
        let write = |path: &Path, serial: &str| {
            let mut file = File::create(path).unwrap();
            let written = errno(file.write_all(serial.as_bytes()));
            let _ = close(file);
            written
        };
        // By `write`, since that is where a shell looks.
        let refused = libc::EINVAL;
        assert_eq!(write(&own, "0000000000000001"), refused);
        assert_logged(&bench, &["CKA_OS_TOKENSERIAL", "slot 1"]);
        // However it gets there.
        bench.quiet("printf 0000000000000001 >token/0x80001234.bytes; printf 0000000000000001 >token/.serial");
        for line in ["mv token/0x80001234.bytes token/CKA_OS_TOKENSERIAL", "mv token/.serial token/CKA_OS_TOKENSERIAL"] {
            assert!(bench.fails(line).contains("cannot move"), "{line}");
        }
        bench.quiet("rm token/0x80001234.bytes token/.serial");
        assert_works(&bench.softhsm, "the number of the empty slot beside one token was refused");
        // That of the one beside two is well as long as there are not two.
        assert_eq!(write(&own, "0000000000000002"), 0);
        assert_works(&bench.softhsm, "the number of another slot");
        let token = bench.directory();
        let copy = PathBuf::from(format!("{}-copy", token.display()));
        bench.quiet(&format!("mkdir -p {1}/token; cd {0}/token; cp *FLAGS *PIN {1}/token/; printf '%-32s' copy >{1}/token/CKA_OS_TOKENLABEL", token.display(), copy.display()));
        let of_copy = copy.join("token/CKA_OS_TOKENSERIAL");
        assert_eq!(write(&of_copy, "0123456789abcdef"), refused);
        assert_logged(&bench, &["-copy", "slot 2"]);
        assert_works(&bench.softhsm, "a second token would have been one too many");
        assert_eq!(write(&own, "fedcba9876543210"), 0);
        assert_eq!(write(&of_copy, "0123456789abcdef"), 0);
        bench.quiet(&format!("sync {}", copy.display()));
        assert_works(&bench.softhsm, "two tokens");
    }

    fn a_copy_of_a_tokendir_is_refused(backend) {
        let bench = Bench::new(backend);
        bench.quiet("cp -a ../.tokenfs/file $out/backup");
        let before = expected(&bench.softhsm);
        for line in ["cp -a $out/backup/. ../", "rsync -a $out/backup/ ../", "cp $out/backup/*/*.object .", "cp $k/CKA_LABEL ./00000000-0000-4000-8000-000000000001"] {
            let said = bench.fails(line);
            assert!(said.contains("Invalid argument"), "`{line}`: {said}");
        }
        assert_logged(&bench, &["it belongs into a tokendir and not into a mount"]);
        assert_same(&before, &expected(&bench.softhsm));
    }

    fn a_directory_that_somebody_has_open_can_be_removed_and_made_again(backend) {
        let bench = Bench::new(backend);
        let other = Softhsm::new(backend);
        let into = Mount::new(&other);
        bench.quiet(&format!("cp -a $k $out/key; cp -a . {}", into.join(&bench.token).display()));
        for (what, line) in [
            (bench.at(&bench.private), "rm -r $k; cp -a $out/key $k".to_owned()),
            (bench.at(&bench.private), "rm -r $k/*; mkdir .new; cp -a $out/key/. .new; mv -T .new $k; rm -r $k; cp -a $out/key $k".to_owned()),
            (into.join(&bench.token), format!("rm -r {0}; cp -a . {0}", into.join(&bench.token).display())),
        ] {
            let listed = |path: &Path| fs::read_dir(path).unwrap().count();
            let before = listed(&what);
            // As a shell has it that stands in there.
            let held = File::open(&what).unwrap();
            bench.quiet(&line);
            assert_eq!(listed(&what), before, "after `{line}`");
            drop(held);
            assert_eq!(listed(&what), before, "after `{line}`, when nobody has the old one open any more");
        }
    }

    fn what_cannot_work_fails_at_once(backend) {
        let bench = Bench::alone(backend);
        let other = bench.softhsm.p11().init_token("other", Some(PIN)).unwrap();
        let find_other = || fs::read_dir(bench.mount.path()).unwrap().map(|e| e.unwrap().file_name()).find(|n| *n != *bench.token);
        eventually(SOON, "the other token", || find_other().is_some());
        let elsewhere = bench.mount.join(find_other().unwrap());
        assert!(elsewhere.join("token").is_dir(), "{other}");
        let before = expected(&bench.softhsm);
        let (object, token) = (bench.at(&bench.data), bench.directory());
        let label = object.join("CKA_LABEL");
        let new = token.join("00000000-0000-4000-8000-000000000009");
        let nix = |result: nix::Result<()>| result.err().map_or(0, |e| e as i32);
        let mkfifo = |path: &Path| nix(nix::unistd::mkfifo(path, Mode::S_IRUSR));
        let create = |path: PathBuf| errno(options().create(true).truncate(false).open(path));
        let long = "CKA_".to_owned() + &"X".repeat(300);
        let inner = "x".repeat(200);
        let refusals: Vec<(&str, i32, &[i32])> = vec![
            ("link", errno(fs::hard_link(&label, object.join("CKA_URL"))), &[libc::EPERM]),
            ("link to scratch", errno(fs::hard_link(&label, object.join(".x"))), &[libc::EPERM]),
            ("symlink", errno(std::os::unix::fs::symlink("CKA_LABEL", object.join("CKA_URL"))), &[libc::EPERM]),
            ("symlink as scratch (emacs's lock)", errno(std::os::unix::fs::symlink("x", object.join(".#CKA_LABEL"))), &[libc::EPERM]),
            ("symlink at the root", errno(std::os::unix::fs::symlink("x", bench.mount.join("x"))), &[libc::EPERM]),
            ("mkfifo", mkfifo(&object.join("CKA_URL")), &[libc::EPERM]),
            ("mkfifo in a token", mkfifo(&token.join("fifo")), &[libc::EPERM]),
            ("rename of an object to another token", errno(fs::rename(&object, elsewhere.join(&bench.data))), &[libc::EXDEV]),
            ("rename of an attribute to another token", errno(fs::rename(&label, elsewhere.join("token/CKA_OS_TOKENLABEL"))), &[libc::EXDEV]),
            ("rmdir of an object with attributes", errno(fs::remove_dir(&object)), &[libc::ENOTEMPTY]),
            ("rmdir of a token with objects", errno(fs::remove_dir(&token)), &[libc::ENOTEMPTY]),
            ("rmdir of a file", errno(fs::remove_dir(&label)), &[libc::ENOTDIR]),
            ("unlink of a directory", errno(fs::remove_file(&object)), &[libc::EISDIR]),
            ("unlink of nothing", errno(fs::remove_file(object.join("CKA_URL"))), &[libc::ENOENT]),
            ("unlink of scratch that is not there", errno(fs::remove_file(object.join(".x"))), &[libc::ENOENT]),
            ("mkdir of an object that is there", errno(fs::create_dir(&object)), &[libc::EEXIST]),
            ("mkdir of a token that is there", errno(fs::create_dir(&token)), &[libc::EEXIST]),
            ("mkdir where an attribute is", errno(fs::create_dir(&label)), &[libc::EEXIST]),
            ("create of an unknown attribute", create(object.join("CKA_NEWNAME")), &[libc::EINVAL]),
            ("create of a bad number", create(object.join("0xZZ")), &[libc::EINVAL]),
            ("create of another spelling", create(object.join("cka_label")), &[libc::EINVAL]),
            ("create of a number without a kind", create(object.join("0x80001234")), &[libc::EINVAL]),
            ("rename to an unknown attribute", errno(fs::rename(&label, object.join("CKA_NEWNAME"))), &[libc::EINVAL]),
            ("mkdir of an unknown attribute", errno(fs::create_dir(object.join("CKA_NEWNAME"))), &[libc::EINVAL]),
            ("a file where a map belongs", create(object.join("CKA_WRAP_TEMPLATE")), &[libc::EINVAL, libc::EISDIR]),
            ("a directory where a file belongs", errno(fs::create_dir(object.join("CKA_URL"))), &[libc::EINVAL, libc::ENOTDIR]),
            ("create below nothing", create(new.join("CKA_LABEL")), &[libc::ENOENT]),
            ("create below a file", create(label.join("CKA_LABEL")), &[libc::ENOTDIR]),
            ("a name that is too long", create(object.join(&long)), &[libc::ENAMETOOLONG]),
            ("mkdir of a long object", errno(fs::create_dir(token.join(inner.repeat(2)))), &[libc::ENAMETOOLONG]),
            ("open of a directory for writing", errno(options().open(&object)), &[libc::EISDIR]),
            ("rename of nothing", errno(fs::rename(object.join("CKA_URL"), object.join("CKA_ID"))), &[libc::ENOENT]),
            ("rename of a file over a directory", errno(fs::rename(&label, &object)), &[libc::EISDIR, libc::EINVAL, libc::ENOTEMPTY]),
            ("rename of an object over a full one", errno(fs::rename(&object, bench.at(&bench.public))), &[libc::ENOTEMPTY, libc::EEXIST]),
            ("rename of an object into itself", errno(fs::rename(&object, object.join("x"))), &[libc::EINVAL]),
            ("a file far too large", errno(opened(&object.join("CKA_VALUE")).set_len(1 << 40)), &[libc::EFBIG]),
            ("create in .tokenfs", create(bench.mount.join(".tokenfs/x")), &[libc::EROFS, libc::EACCES, libc::EPERM]),
            ("mkdir in .tokenfs", errno(fs::create_dir(bench.mount.join(".tokenfs/x"))), &[libc::EROFS, libc::EACCES, libc::EPERM]),
            ("writing the log", errno(options().open(bench.mount.join(".tokenfs/log"))), &[libc::EROFS, libc::EACCES, libc::EPERM]),
            ("rmdir of token/", errno(fs::remove_dir(token.join("token"))), &[libc::ENOTEMPTY, libc::EPERM, libc::EBUSY]),
            ("rename of token/", errno(fs::rename(token.join("token"), token.join(".x"))), &[libc::EPERM, libc::EBUSY, libc::EINVAL]),
            ("rename of an object over token/", errno(fs::rename(&object, token.join("token"))), &[libc::ENOTEMPTY, libc::EEXIST, libc::EPERM, libc::EBUSY, libc::EINVAL]),
        ];
        let wrong: Vec<String> = refusals.iter().filter(|(_, is, wanted)| !wanted.contains(is)).map(|(what, is, wanted)| {
            let wanted: Vec<_> = wanted.iter().map(|e| name(*e)).collect();
            format!("{what}: {}, and not {}", name(*is), wanted.join(" or "))
        }).collect();
        assert!(wrong.is_empty(), "{backend} backend:\n{}\n--- log\n{}", wrong.join("\n"), bench.log());
        let said = bench.fails("setfattr -n user.x -v y $o/CKA_LABEL");
        assert!(said.contains("Operation not supported"), "{said}");
        thread::sleep(HELD);
        assert_same(&before, &expected(&bench.softhsm));
        bench.assert_in_agreement();
        assert_logged(&bench, &["CKA_NEWNAME"]);
        assert_logged(&bench, &["0xZZ"]);
    }

    fn fsync_works_and_works_again(backend) {
        let bench = Bench::alone(backend);
        // On what nothing was written to, first: an answer of ENOSYS would turn fsync off.
        for _ in 0..3 {
            for path in [bench.mount.path(), &bench.directory(), &bench.at(&bench.data), &bench.label(), &bench.mount.join(".tokenfs"), &bench.mount.join(".tokenfs/log")] {
                assert_eq!(errno(File::open(path).unwrap().sync_all()), 0, "fsync of {}", path.display());
                assert_eq!(errno(File::open(path).unwrap().sync_data()), 0, "fdatasync of {}", path.display());
            }
        }
        let mut file = truncated(&bench.label());
        for round in 0..3 {
            file.write_all(format!("{round}").as_bytes()).unwrap();
            file.sync_all().unwrap();
            bench.assert_label(&"012"[..=round], "after fsync");
        }
        drop(file);
        // What is pending is written when its directory is synced, and when its parent is.
        for (round, synced) in ["object", "token"].iter().enumerate() {
            let name = format!("00000000-0000-4000-8000-00000000000{round}");
            let path = bench.at(&name);
            fs::create_dir(&path).unwrap();
            fs::write(path.join("CKA_CLASS"), "CKO_DATA\n").unwrap();
            fs::write(path.join("CKA_TOKEN"), "true\n").unwrap();
            let directory = if *synced == "object" { path } else { bench.directory() };
            File::open(directory).unwrap().sync_all().unwrap();
            assert!(bench.has(&name), "after fsync of the directory of the {synced}");
            // And so are unlinks.
            let label = bench.of_data(["CKA_APPLICATION", "CKA_VALUE"][round]);
            fs::remove_file(&label).unwrap();
            let directory = if *synced == "object" { bench.at(&bench.data) } else { bench.directory() };
            File::open(directory).unwrap().sync_all().unwrap();
            assert_eq!(bench.stored_data(label.file_name().unwrap().to_str().unwrap()), None, "an unlink after fsync of the {synced}");
        }
    }

    fn space_that_is_allocated_first_is_no_value(backend) {
        let bench = Bench::alone(backend);
        use nix::fcntl::{FallocateFlags, fallocate, posix_fallocate};
        // As restic does: a file of NULs first, then what belongs there.
        for (file, text) in [("CKA_LABEL", "restored"), ("CKA_COPYABLE", "false\n"), ("CKA_CLASS", "CKO_DATA\n"), ("CKA_URL", "new")] {
            for how in 0..4 {
                let path = bench.of_data(file);
                let mut opened = options().create(true).truncate(true).open(&path).unwrap();
                let length = text.len() as i64;
                let result = match how {
                    0 => fallocate(&opened, FallocateFlags::empty(), 0, length),
                    1 => fallocate(&opened, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, length),
                    2 => posix_fallocate(&opened, 0, length),
                    _ => opened.set_len(length as u64).map_err(|e| nix::errno::Errno::from_raw(e.raw_os_error().unwrap())),
                };
                let unsupported = how < 2 && result == Err(nix::errno::Errno::EOPNOTSUPP);
                assert!(result.is_ok() || unsupported, "{file}, way {how}: {result:?}");
                // A flush in between.
                // posix_fallocate may have written NULs itself, which are no value.
                let flushed = close(opened.try_clone().unwrap());
                assert!(flushed.is_ok() || how == 2, "{file}, way {how}: a flush before anything was written: {flushed:?}");
                opened.write_all(text.as_bytes()).unwrap();
                close(opened).unwrap_or_else(|e| panic!("{file}, way {how}: {e}: {}", bench.log()));
                assert_eq!(bench.stored_data(file).as_deref(), Some(text.as_bytes()), "{file}, way {how}");
            }
        }
        // Longer than what comes in the end, and cut to it.
        let mut file = truncated(&bench.label());
        file.set_len(4096).unwrap();
        file.write_all(b"short").unwrap();
        file.set_len(5).unwrap();
        close(file).unwrap();
        bench.assert_label("short", "after a preallocation that was cut");
        bench.quiet("fallocate -l 3 $o/CKA_LABEL || true");
    }

    fn what_was_cut_off_counts_when_it_is_synced(backend) {
        let bench = Bench::alone(backend);
        bench.quiet("printf abcdef >$o/CKA_LABEL");
        let file = options().open(bench.of_data("CKA_LABEL")).unwrap();
        file.set_len(2).unwrap();
        assert_eq!(bench.stored_data("CKA_LABEL").unwrap(), b"abcdef");
        file.sync_all().unwrap();
        assert_eq!(bench.stored_data("CKA_LABEL").unwrap(), b"ab");
        drop(file);
        let file = options().open(bench.of_data("CKA_PRIVATE")).unwrap();
        file.set_len(2).unwrap();
        assert_eq!(errno(file.sync_all()), libc::EINVAL, "a part of a word");
        drop(file);
        assert_eq!(bench.stored_data("CKA_PRIVATE").unwrap(), b"false\n");
    }

    fn a_token_that_was_put_together_in_scratch_is_moved_to_its_place(backend) {
        let bench = Bench::alone(backend);
        let before = expected(&bench.softhsm);
        bench.quiet("name=$(basename $t); cp -a . $out/token; cd ..; rm -r $name; cp -a $out/token .new; mv -T .new $name; ! ls -d .new 2>/dev/null");
        eventually(SOON, "the token", || leftovers(&bench.softhsm.tokendir).is_empty());
        bench.settle();
        assert_same(&before, &expected(&bench.softhsm));
        assert_eq!(bench.log(), "");
    }

    fn a_pending_object_is_in_the_mount_alone_and_appears_whole(backend) {
        let bench = Bench::alone(backend);
        let name = "00000000-0000-4000-8000-000000000001";
        let path = bench.at(name);
        let before = expected(&bench.softhsm);
        // By a process that has ended when it is left alone.
        bench.quiet(&format!("mkdir {name}"));
        fs::write(path.join("CKA_LABEL"), "pending").unwrap();
        assert!(bench.quiet("ls -A").contains(name), "a pending object is listed");
        assert_eq!(fs::read(path.join("CKA_LABEL")).unwrap(), b"pending");
        // Without a class it is none, however long that takes.
        thread::sleep(HELD * 2);
        assert_same(&before, &expected(&bench.softhsm));
        assert_eq!(fs::read(path.join("CKA_LABEL")).unwrap(), b"pending");
        let watcher = Watcher::start(&bench.softhsm, &bench.token);
        fs::write(path.join("CKA_CLASS"), "CKO_DATA\n").unwrap();
        // Whoever goes on writing is not interrupted.
        let started = Instant::now();
        for (pieces, attribute) in ["CKA_VALUE", "CKA_APPLICATION", "CKA_OBJECT_ID", "CKA_TOKEN", "CKA_PRIVATE", "CKA_MODIFIABLE"].into_iter().enumerate() {
            thread::sleep(Duration::from_millis(60));
            let text = if pieces < 3 { "bytes" } else { "true\n" };
            let text = if attribute == "CKA_PRIVATE" { "false\n" } else { text };
            fs::write(path.join(attribute), text).unwrap();
        }
        let slow = started.elapsed() > Duration::from_secs(1);
        eventually(SOON, "a pending object that is left alone", || bench.has(name));
        thread::sleep(Duration::from_millis(100));
        let sizes = watcher.stop();
        // Two attributes, and six more.
        assert!(slow || sizes == BTreeSet::from([8]), "numbers of attributes that the store had of it: {sizes:?}");
        bench.settle();
        assert_eq!(bench.stored(format!("{name}/CKA_VALUE")).unwrap(), b"bytes");
        // Setting its times ends the waiting at once.
        let name = "00000000-0000-4000-8000-000000000002";
        let path = bench.at(name);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("CKA_CLASS"), "CKO_DATA\n").unwrap();
        let began = Instant::now();
        let absent = !bench.has(name);
        assert!(absent || began.elapsed() > Duration::from_millis(100), "pending, and in the store already");
        File::open(&path).unwrap().set_modified(std::time::UNIX_EPOCH + Duration::from_secs(1_500_000_000)).unwrap();
        assert!(bench.has(name), "after its times were set");
        assert_eq!(mtime(&path).0, 1_500_000_000);
        // The end of the mount does too.
        let name = "00000000-0000-4000-8000-000000000003";
        fs::create_dir(bench.at(name)).unwrap();
        fs::write(bench.at(name).join("CKA_PRIVATE"), "false\n").unwrap();
        fs::remove_file(bench.of_data("CKA_APPLICATION")).unwrap();
        let Bench { mount, softhsm, token, data, .. } = bench;
        mount.unmount();
        let tree = expected(&softhsm);
        assert!(tree.contains_key(&Path::new(&token).join(name)), "pending when it was unmounted");
        assert!(!tree.contains_key(&Path::new(&token).join(data).join("CKA_APPLICATION")), "an unlink held when it was unmounted");
        assert!(leftovers(&softhsm.tokendir).is_empty());
    }

    fn an_object_that_never_was_one_leaves_nothing(backend) {
        let bench = Bench::alone(backend);
        let before = bench.softhsm.snapshot();
        bench.quiet("mkdir 00000000-0000-4000-8000-000000000001 && rmdir 00000000-0000-4000-8000-000000000001");
        bench.quiet("mkdir 00000000-0000-4000-8000-000000000001 && echo CKO_DATA >00000000-0000-4000-8000-000000000001/CKA_CLASS && rm -r 00000000-0000-4000-8000-000000000001");
        bench.quiet("mkdir .scratch && echo CKO_DATA >.scratch/CKA_CLASS && mkdir -p .scratch/CKA_WRAP_TEMPLATE && rm -r .scratch");
        bench.quiet("mkdir .left && echo CKO_DATA >.left/CKA_CLASS");
        thread::sleep(HELD);
        before.assert_same(&bench.softhsm.snapshot());
        bench.assert_in_agreement();
    }

    fn unlinks_are_held(backend) {
        let bench = Bench::alone(backend);
        let before = expected(&bench.softhsm);
        let watcher = Watcher::start(&bench.softhsm, &bench.token);
        // tar, borg, install: unlinked, then written.
        for round in 0..20 {
            for attribute in ["CKA_LABEL", "CKA_VALUE", "CKA_APPLICATION"] {
                let path = bench.of_data(attribute);
                let old = fs::read(&path).unwrap();
                fs::remove_file(&path).unwrap();
                assert!(!path.exists(), "round {round}: an unlinked attribute is gone from the mount");
                fs::write(&path, old).unwrap();
            }
        }
        thread::sleep(HELD);
        let sizes = watcher.stop();
        assert_eq!(sizes.len(), 0, "objects that came or lost attributes: {sizes:?}");
        assert_same(&before, &expected(&bench.softhsm));
        // An rm -r that does not finish leaves what it has not got to, whole for at least as long as it works.
        let started = Instant::now();
        fs::remove_file(bench.of_data("CKA_LABEL")).unwrap();
        let stored = expected(&bench.softhsm);
        if started.elapsed() < Duration::from_millis(150) {
            assert_same(&before, &stored);
        }
        thread::sleep(HELD);
        assert_eq!(bench.stored_data("CKA_LABEL"), None, "an unlink that was left alone");
        assert_eq!(bench.stored_data("CKA_VALUE").as_deref(), Some(&b"value"[..]));
        bench.settle();
    }

    fn scratch_is_not_listed_and_never_stored(backend) {
        let mut bench = Bench::alone(backend);
        let before = bench.softhsm.snapshot();
        let names = [".CKA_LABEL.x8Kd2p", "CKA_LABEL~", "sedA1B2C3", "4913", "CKA_LABEL.tmp", ".CKA_LABEL.swp", "#CKA_LABEL#", "Makefile"];
        for name in names {
            let path = bench.of_data(name);
            fs::write(&path, name).unwrap();
            assert_eq!(fs::read(&path).unwrap(), name.as_bytes());
            assert_eq!(fs::metadata(&path).unwrap().len(), name.len() as u64);
            let mut more = appending(&path);
            more.write_all(b"+").unwrap();
            drop(more);
            nix::unistd::truncate(&path, 1).unwrap();
            assert_eq!(fs::read(&path).unwrap(), &name.as_bytes()[..1]);
            set_mode(&path, 0o600);
        }
        bench.quiet("mkdir .dir && echo x >.dir/file && mkdir .dir/CKA_WRAP_TEMPLATE && touch -d @1 .dir/file && mv .dir/file .dir/other && mv .dir .dir2");
        let listed = bench.quiet("ls -A . $o; find . | grep -c scratch || true");
        for name in names.iter().chain(&[".dir", ".dir2"]) {
            assert!(!listed.lines().any(|line| line == *name), "{name} is listed: {listed}");
        }
        thread::sleep(HELD);
        before.assert_same(&bench.softhsm.snapshot());
        bench.assert_in_agreement();
        // It is bounded.
        let huge = File::create(bench.of_data(".huge")).unwrap();
        let refused = errno(huge.set_len(1 << 40));
        assert!([libc::ENOSPC, libc::EFBIG].contains(&refused), "a terabyte of scratch: {}", name(refused));
        let block = vec![1; 1 << 20];
        let refused = (0..4096).find_map(|at| huge.write_all_at(&block, at << 20).err().map(|e| (at, e)));
        let (megabytes, refused) = refused.expect("4 GiB of scratch were taken");
        assert!([libc::ENOSPC, libc::EFBIG].contains(&refused.raw_os_error().unwrap()), "{refused}");
        println!("{backend}: scratch ends at {megabytes} MiB");
        drop(huge);
        // What is full does not keep anybody from changing the store.
        fs::write(bench.label(), "still").unwrap();
        bench.assert_label("still", "while scratch is full");
        // It is gone with the mount.
        let Bench { mount, softhsm, .. } = &mut bench;
        std::mem::replace(mount, Mount::new(softhsm)).unmount();
        for name in names {
            assert!(!bench.of_data(name).exists(), "{name} has outlived the mount");
        }
        bench.assert_no_leftovers();
    }

    /// What has a name now is not what somebody still has open who opened it by that name.
    fn what_is_done_to_a_file_that_lost_its_name_is_not_done_to_the_next(backend) {
        use nix::sys::stat::{fchmod, futimens};
        use nix::sys::time::TimeSpec;
        let mut bench = Bench::alone(backend);
        let label = bench.handles.0;
        let scratch = bench.of_data(".new");
        fs::write(bench.label(), "the first").unwrap();
        let replace = |bench: &Bench, text: &str| {
            fs::write(&scratch, text).unwrap();
            fs::rename(&scratch, bench.label()).unwrap();
        };
        let by_name = |bench: &Bench| {
            let found = fs::metadata(bench.label()).unwrap();
            (found.len(), found.mode(), found.mtime(), found.mtime_nsec())
        };
        let mut held = Vec::new();
        for (round, text) in ["a second", "the third one", "four"].into_iter().enumerate() {
            let file = match round {
                0 => File::open(bench.label()).unwrap(),
                _ => File::options().write(true).open(bench.label()).unwrap(),
            };
            let before = file.metadata().unwrap();
            if round == 1 {
                fs::remove_file(bench.label()).unwrap();
                fs::write(bench.label(), text).unwrap();
            } else {
                replace(&bench, text);
            }
            let found = by_name(&bench);
            assert_eq!(found.0, text.len() as u64);
            let old = TimeSpec::new(1, 0);
            futimens(&file, &old, &old).unwrap();
            fchmod(&file, Mode::from_bits_truncate(0o400)).unwrap();
            if round == 2 {
                file.set_len(3).unwrap();
                assert_eq!(file.metadata().unwrap().len(), 3);
            } else {
                assert_eq!(file.metadata().unwrap().len(), before.len());
            }
            assert_eq!(by_name(&bench), found, "round {round}");
            assert_ne!(file.metadata().unwrap().ino(), fs::metadata(bench.label()).unwrap().ino());
            held.push(file);
        }
        // What has the name is told of as ever, also when the others are gone.
        for (round, text) in ["changed by SoftHSM", "once more"].into_iter().enumerate() {
            bench.client.set_label(label, text).unwrap();
            eventually(SOON, "the size", || by_name(&bench).0 == text.len() as u64);
            assert_eq!(fs::read_to_string(bench.label()).unwrap(), text);
            if round == 0 {
                held.clear();
                thread::sleep(Duration::from_millis(100));
            }
        }
        replace(&bench, "in the end");
        bench.assert_label("in the end", "in the end");
        // So where the whole object is another one.
        bench.quiet("cp -a $o $out/copy");
        let file = File::open(bench.label()).unwrap();
        bench.client.destroy(label).unwrap();
        eventually(SOON, "it is gone", || !bench.label().exists());
        bench.quiet("cp -a $out/copy $t/$o");
        let found = by_name(&bench);
        let old = TimeSpec::new(1, 0);
        futimens(&file, &old, &old).unwrap();
        assert_eq!(by_name(&bench), found);
        bench.settle();
        bench.assert_no_leftovers();
    }

    /// Whoever has a file open goes on to write into it, whatever it is called by then.
    fn what_is_open_goes_along_to_scratch_and_back(backend) {
        let bench = Bench::alone(backend);
        let open = |path: &Path| File::options().read(true).write(true).open(path).unwrap();
        let aside = bench.of_data(".aside");
        let mut file = open(&bench.label());
        file.write_all(b"one").unwrap();
        fs::rename(bench.label(), &aside).unwrap();
        file.write_all(b"two").unwrap();
        file.sync_all().unwrap();
        assert_eq!(fs::read(&aside).unwrap(), b"onetwo");
        file.write_all(b"three").unwrap();
        drop(file);
        assert_eq!(fs::read(&aside).unwrap(), b"onetwothree");
        // What is appended is appended to what it has by then.
        let mut file = File::options().append(true).open(&aside).unwrap();
        fs::rename(&aside, bench.label()).unwrap();
        bench.assert_label("onetwothree", "in its place again");
        fs::rename(bench.label(), &aside).unwrap();
        file.write_all(b"four").unwrap();
        drop(file);
        assert_eq!(fs::read(&aside).unwrap(), b"onetwothreefour");
        // To an attribute again while it is open, and gone while it is.
        let mut file = open(&bench.of_data("CKA_APPLICATION"));
        fs::rename(bench.of_data("CKA_APPLICATION"), bench.of_data(".other")).unwrap();
        file.write_all(b"1234567890").unwrap();
        fs::rename(bench.of_data(".other"), bench.label()).unwrap();
        drop(file);
        bench.assert_label("1234567890", "by way of scratch");
        let mut file = open(&bench.label());
        fs::rename(bench.label(), bench.of_data(".gone")).unwrap();
        fs::remove_file(bench.of_data(".gone")).unwrap();
        file.write_all(b"nowhere").unwrap();
        file.sync_all().unwrap();
        drop(file);
        assert!(!bench.label().exists() && !bench.of_data(".gone").exists());
        // So with a map, and an object with its maps.
        let entry = |directory: &str| bench.of_data(directory).join("CKA_ID");
        fs::create_dir(bench.of_data("CKA_WRAP_TEMPLATE")).unwrap();
        fs::write(entry("CKA_WRAP_TEMPLATE"), "id").unwrap();
        let mut file = open(&entry("CKA_WRAP_TEMPLATE"));
        fs::rename(bench.of_data("CKA_WRAP_TEMPLATE"), bench.of_data(".map")).unwrap();
        file.write_all(b"new id").unwrap();
        drop(file);
        assert_eq!(fs::read(entry(".map")).unwrap(), b"new id");
        fs::rename(bench.of_data(".map"), bench.of_data("CKA_WRAP_TEMPLATE")).unwrap();
        fs::rename(&aside, bench.label()).unwrap();
        let object = bench.label().parent().unwrap().to_owned();
        let put_aside = object.with_file_name(".object");
        let mut files = [open(&bench.label()), open(&entry("CKA_WRAP_TEMPLATE"))];
        fs::rename(&object, &put_aside).unwrap();
        for file in &mut files {
            file.write_all(b"aside").unwrap();
            file.sync_all().unwrap();
        }
        assert_eq!(fs::read(put_aside.join("CKA_LABEL")).unwrap(), b"asideothreefour");
        assert_eq!(fs::read(put_aside.join("CKA_WRAP_TEMPLATE/CKA_ID")).unwrap(), b"asided");
        for file in &mut files {
            file.write_all(b", back").unwrap();
        }
        fs::rename(&put_aside, &object).unwrap();
        drop(files);
        bench.assert_label("aside, backfour", "in its place again");
        assert_eq!(fs::read(entry("CKA_WRAP_TEMPLATE")).unwrap(), b"aside, back");
        bench.settle();
        bench.assert_no_leftovers();
    }

    fn renaming_scratch_commits_it(backend) {
        let mut bench = Bench::alone(backend);
        let label = bench.handles.0;
        let scratch = bench.of_data(".CKA_LABEL.new");
        fs::write(&scratch, "renamed").unwrap();
        bench.assert_label("data", "before the rename");
        fs::rename(&scratch, bench.label()).unwrap();
        bench.assert_label("renamed", "right after the rename");
        assert_eq!(bench.client.label(label).unwrap().unwrap(), b"renamed");
        assert!(!scratch.exists());
        // A value that cannot be is refused, and the scratch stays.
        let bad = bench.of_data(".CKA_COPYABLE.new");
        fs::write(&bad, "maybe\n").unwrap();
        let old = bench.stored_data("CKA_COPYABLE");
        assert_eq!(errno(fs::rename(&bad, bench.of_data("CKA_COPYABLE"))), libc::EINVAL);
        assert_eq!(fs::read(&bad).unwrap(), b"maybe\n");
        assert_eq!(bench.stored_data("CKA_COPYABLE"), old);
        assert_logged(&bench, &["CKA_COPYABLE"]);
        // To a name that is not there yet, and not over one that is (RENAME_NOREPLACE), and exchanged.
        fs::write(&scratch, "https://").unwrap();
        fs::rename(&scratch, bench.of_data("CKA_URL")).unwrap();
        assert_eq!(bench.stored_data("CKA_URL").as_deref(), Some(&b"https://"[..]));
        fs::write(&scratch, "no").unwrap();
        use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
        let refused = renameat2(AT_FDCWD, &scratch, AT_FDCWD, &bench.label(), RenameFlags::RENAME_NOREPLACE);
        assert_eq!(refused, Err(nix::errno::Errno::EEXIST));
        bench.assert_label("renamed", "after RENAME_NOREPLACE");
        // An attribute to scratch leaves the object without it, once it is left alone.
        fs::rename(bench.of_data("CKA_URL"), bench.of_data("CKA_URL~")).unwrap();
        assert_eq!(fs::read(bench.of_data("CKA_URL~")).unwrap(), b"https://");
        bench.settle();
        assert_eq!(bench.stored_data("CKA_URL"), None);
        // An open descriptor goes with the name.
        let mut file = File::create(bench.of_data(".late")).unwrap();
        file.write_all(b"early").unwrap();
        fs::rename(bench.of_data(".late"), bench.label()).unwrap();
        bench.assert_label("early", "after a rename of what is still open");
        file.write_all(b", late").unwrap();
        drop(file);
        bench.settle();
        let stored = bench.stored_data("CKA_LABEL").unwrap();
        assert!([&b"early"[..], b"early, late"].contains(&&*stored), "{}", stored.escape_ascii());
        // An object to another name, and a scratch directory to an object.
        let names = ["00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000002"];
        bench.quiet(&format!("mkdir .tmp && cp $o/* .tmp/ && mv .tmp {}", names[0]));
        assert!(bench.has(names[0]), "right after the rename");
        bench.quiet(&format!("mv {} {}", names[0], names[1]));
        bench.settle();
        assert!(bench.has(names[1]) && !bench.has(names[0]));
        bench.assert_sessions_agree();
        bench.assert_no_leftovers();
    }

    fn a_mount_that_is_read_only_refuses_everything(backend) {
        let (softhsm, client, handles) = configured(backend, "");
        let bench = Bench::beside(softhsm, client, handles, &MountOptions::new().option("ro"));
        let before = bench.softhsm.snapshot();
        for line in ["echo x >$o/CKA_LABEL", "rm $o/CKA_LABEL", "mkdir x", "mv $o .gone", "touch $o", "chmod 600 $o/CKA_LABEL", "echo >$o/.scratch", "rm -r $o"] {
            let said = bench.fails(line);
            assert!(said.contains("Read-only file system"), "`{line}`: {said}");
        }
        before.assert_same(&bench.softhsm.snapshot());
    }

    fn the_log_says_why_and_never_what(backend) {
        let bench = Bench::alone(backend);
        for line in ["echo s3cr3t-text >$o/CKA_COPYABLE", "printf s3cr3t-text >$k/CKA_LABEL", "echo s3cr3t-text >$o/CKA_CLASS"] {
            bench.fails(&format!("python3 -c 'import os,sys; fd=os.open(sys.argv[1],os.O_WRONLY|os.O_TRUNC); os.write(fd,sys.argv[2].encode()); os.close(fd)' {} \"$(printf {})\"",
                line.split('>').nth(1).unwrap(), if line.starts_with("echo") { "'s3cr3t-text\\n.'" } else { "s3cr3t-text" }));
        }
        let log = bench.log();
        assert!(log.lines().count() >= 3, "{log}");
        assert!(!log.contains("s3cr3t"), "{log}");
        assert_logged(&bench, &["CKA_COPYABLE", &bench.data]);
        assert_logged(&bench, &["CKA_LABEL", &bench.private]);
    }

    fn a_notification_does_not_deadlock_with_its_own_operation(backend) {
        // Writers, readers and lookups of the same names at once: each change sends notifications about what others ask for.
        let bench = Bench::alone(backend);
        let over = Instant::now() + Duration::from_secs(2);
        let count = std::sync::atomic::AtomicU64::new(0);
        thread::scope(|scope| {
            for worker in 0..4 {
                let (bench, count) = (&bench, &count);
                scope.spawn(move || {
                    let label = bench.label();
                    let mut round = 0;
                    while Instant::now() < over {
                        round += 1;
                        match worker {
                            0 => fs::write(&label, format!("{round}")).unwrap(),
                            1 => drop(fs::read(&label).unwrap()),
                            2 => {
                                let scratch = bench.of_data(".n");
                                fs::write(&scratch, "x").unwrap();
                                fs::rename(&scratch, bench.of_data("CKA_URL")).unwrap();
                            }
                            _ => drop(bench.at(&bench.data).read_dir().unwrap().flatten().filter(|e| e.metadata().is_ok()).count()),
                        }
                        count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    }
                });
            }
        });
        println!("{backend}: {count:?} operations in 2 s");
        bench.settle();
    }
}

/// A new SoftHSM finds objects by label and reads all of them.
#[track_caller]
fn assert_works(softhsm: &Softhsm, when: &str) {
    let mut client = softhsm.p11();
    client.open("test", Some(PIN)).unwrap();
    let found = client.find_label("private");
    assert!(
        found.as_ref().is_ok_and(|keys| keys.len() == 1),
        "{when}: SoftHSM does not find a key any more: {found:?}"
    );
    for object in client.find(&[]).unwrap() {
        let seen = client.get(object.handle);
        assert!(
            seen.is_ok(),
            "{when}: SoftHSM cannot read {object:?}: {:?}",
            seen.err()
        );
    }
}

/// Looks at the store all the while, and collects of how many attributes the objects are that come, change or lose some.
#[derive(Debug)]
struct Watcher {
    over: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: thread::JoinHandle<BTreeSet<usize>>,
}

impl Watcher {
    fn start(softhsm: &Softhsm, token: &str) -> Self {
        let over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let done = over.clone();
        let (backend, path) = (softhsm.backend, softhsm.tokendir.join(token));
        let sizes = move || match backend {
            Backend::File => {
                let token = support::independent::read_file_token(&path);
                token
                    .objects
                    .into_iter()
                    .map(|(name, object)| (name, object.len()))
                    .collect()
            }
            Backend::Db => counts(&path.join("sqlite3.db")),
        };
        let first: BTreeSet<(String, usize)> = sizes();
        let thread = thread::spawn(move || {
            let mut seen = BTreeSet::new();
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                seen.extend(
                    sizes()
                        .into_iter()
                        .filter(|entry| !first.contains(entry))
                        .map(|(_, size)| size),
                );
                thread::sleep(Duration::from_millis(1));
            }
            seen
        });
        Self { over, thread }
    }

    fn stop(self) -> BTreeSet<usize> {
        self.over.store(true, std::sync::atomic::Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn counts(database: &Path) -> BTreeSet<(String, usize)> {
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
    let connection = rusqlite::Connection::open_with_flags(database, flags).unwrap();
    connection.busy_timeout(Duration::from_secs(10)).unwrap();
    let tables = ["boolean", "integer", "binary", "array"]
        .map(|t| format!("select object_id, type from attribute_{t}"));
    let sql = format!(
        "select object_id, count(*) from ({}) where object_id > 1 group by object_id",
        tables.join(" union all ")
    );
    let mut statement = connection.prepare(&sql).unwrap();
    let rows = statement.query_map([], |row| {
        Ok((
            row.get::<_, i64>(0)?.to_string(),
            row.get::<_, i64>(1)? as usize,
        ))
    });
    rows.unwrap().map(Result::unwrap).collect()
}
