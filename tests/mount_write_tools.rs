//! The tools with which people write files change a store through a mount: after each, an independent reader finds in the
//! store what was meant, the mount shows it, and a session that was open before sees it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod mount_common;
mod support;
mod write_common;

use std::fs;
use std::path::Path;

use mount_common::*;
use support::independent;
use support::template::{boolean, ulong};
use support::*;
use write_common::*;

/// Runs lines of shell one after the other; each says which attribute of the data object it changes, and to what.
fn play(bench: &mut Bench, steps: &[(&str, &str, &str)]) {
    let (data, ..) = bench.handles;
    for (line, file, content) in steps {
        bench.quiet(line);
        // What is only truncated takes effect when the kernel tells of the last close, which is after it.
        if line.starts_with("truncate") || line.starts_with(':') {
            let wanted = Some(content.as_bytes().to_vec());
            eventually(SOON, line, || bench.stored_data(file) == wanted);
        }
        let stored = bench.stored_data(file);
        let text = |bytes: &[u8]| bytes.escape_ascii().to_string();
        assert_eq!(
            stored.as_deref().map(text),
            Some(text(content.as_bytes())),
            "{} backend: `{line}`: this is what the store has in {file}\n{}",
            bench.backend(),
            bench.log()
        );
        if *file == "CKA_LABEL" {
            let live = bench.client.label(data).unwrap();
            assert_eq!(
                live.as_deref().map(text),
                Some(text(content.as_bytes())),
                "{} backend: `{line}`: this is what the live session sees",
                bench.backend()
            );
        }
        assert_eq!(
            fs::read(bench.of_data(file)).unwrap(),
            content.as_bytes(),
            "`{line}`: in the mount"
        );
    }
    bench.settle();
    bench.assert_sessions_agree();
    bench.assert_no_leftovers();
}

both_backends! {
    fn shells_and_small_tools_change_a_value(backend) {
        let mut bench = Bench::new(backend);
        play(&mut bench, &[
            ("echo text >$o/CKA_LABEL", "CKA_LABEL", "text\n"),
            ("printf text >$o/CKA_LABEL", "CKA_LABEL", "text"),
            ("printf ' more' >>$o/CKA_LABEL", "CKA_LABEL", "text more"),
            ("echo x | tee $o/CKA_LABEL >/dev/null", "CKA_LABEL", "x\n"),
            ("echo y | tee -a $o/CKA_LABEL >/dev/null", "CKA_LABEL", "x\ny\n"),
            ("printf abcdef | dd of=$o/CKA_LABEL bs=1 status=none", "CKA_LABEL", "abcdef"),
            ("printf XY | dd of=$o/CKA_LABEL bs=1 seek=2 conv=notrunc status=none", "CKA_LABEL", "abXYef"),
            ("printf gh | dd of=$o/CKA_LABEL oflag=append conv=notrunc status=none", "CKA_LABEL", "abXYefgh"),
            ("printf Z | dd of=$o/CKA_LABEL bs=1 seek=3 conv=fsync status=none", "CKA_LABEL", "abXZ"),
            ("truncate -s 2 $o/CKA_LABEL", "CKA_LABEL", "ab"),
            ("truncate -s +2 $o/CKA_LABEL", "CKA_LABEL", "ab\0\0"),
            ("truncate -s 0 $o/CKA_LABEL", "CKA_LABEL", ""),
            ("( echo one; echo two ) >$o/CKA_LABEL", "CKA_LABEL", "one\ntwo\n"),
            ("exec 3<>$o/CKA_LABEL; printf ONE >&3; exec 3>&-", "CKA_LABEL", "ONE\ntwo\n"),
            (": >$o/CKA_LABEL", "CKA_LABEL", ""),
            ("python3 -c 'open(\"'$o'/CKA_LABEL\",\"w\").write(\"snake\")'", "CKA_LABEL", "snake"),
            ("head -c 100000 /dev/zero | tr '\\0' x >$o/CKA_VALUE; printf small >$o/CKA_VALUE", "CKA_VALUE", "small"),
            ("echo 0 >$o/CKA_COPYABLE", "CKA_COPYABLE", "false\n"),
            ("printf CK_TRUE >$o/CKA_COPYABLE", "CKA_COPYABLE", "true\n"),
            ("echo 0x0 >$o/CKA_CLASS", "CKA_CLASS", "CKO_DATA\n"),
            ("echo CKM_RSA_PKCS >$o/CKA_ALLOWED_MECHANISMS", "CKA_ALLOWED_MECHANISMS", "CKM_RSA_PKCS\n"),
            ("echo 0x0 >>$o/CKA_ALLOWED_MECHANISMS", "CKA_ALLOWED_MECHANISMS", "CKM_RSA_PKCS_KEY_PAIR_GEN\nCKM_RSA_PKCS\n"),
        ]);
    }

    fn copies_and_renames_change_a_value(backend) {
        let mut bench = Bench::new(backend);
        fs::write(bench.outside.path().join("CKA_LABEL"), "from outside").unwrap();
        fs::write(bench.outside.path().join("other"), "another").unwrap();
        play(&mut bench, &[
            ("cp $out/CKA_LABEL $o/CKA_LABEL", "CKA_LABEL", "from outside"),
            ("cp -a $out/other $o/CKA_LABEL", "CKA_LABEL", "another"),
            ("cp -p --remove-destination $out/CKA_LABEL $o/", "CKA_LABEL", "from outside"),
            ("install -m 600 $out/other $o/CKA_LABEL", "CKA_LABEL", "another"),
            ("install -b -m 600 $out/CKA_LABEL $o/CKA_LABEL", "CKA_LABEL", "from outside"),
            ("cp $out/other $out/moved; mv $out/moved $o/CKA_LABEL", "CKA_LABEL", "another"),
            ("mv $o/CKA_LABEL $o/CKA_LABEL~; mv $o/CKA_LABEL~ $o/CKA_LABEL", "CKA_LABEL", "another"),
            ("mv $o/CKA_LABEL $o/.kept; echo new >$o/CKA_LABEL; rm $o/.kept", "CKA_LABEL", "new\n"),
            ("cp $o/CKA_LABEL $o/.CKA_LABEL.new; echo er >>$o/.CKA_LABEL.new; mv $o/.CKA_LABEL.new $o/CKA_LABEL", "CKA_LABEL", "new\ner\n"),
            ("cp --backup=simple $out/CKA_LABEL $o/CKA_LABEL", "CKA_LABEL", "from outside"),
            ("mv -f $o/CKA_APPLICATION $o/CKA_OBJECT_ID", "CKA_OBJECT_ID", "tests"),
            ("sed -i 's/outside/inside/' $o/CKA_LABEL", "CKA_LABEL", "from inside"),
            ("sed -i.bak 's/inside/beside/' $o/CKA_LABEL", "CKA_LABEL", "from beside"),
            ("sed -i 's/true/false/' $o/CKA_COPYABLE", "CKA_COPYABLE", "false\n"),
            ("rsync -a $out/other $o/CKA_LABEL", "CKA_LABEL", "another"),
            ("rsync -a --inplace $out/CKA_LABEL $o/", "CKA_LABEL", "from outside"),
            ("rsync -a --checksum --backup $out/other $o/CKA_LABEL", "CKA_LABEL", "another"),
            ("tar c -C $out CKA_LABEL | tar x -C $o", "CKA_LABEL", "from outside"),
            ("printf tarred >$out/CKA_LABEL; tar c -C $out CKA_LABEL | tar x --overwrite -C $o", "CKA_LABEL", "tarred"),
            ("printf unlinked >$out/CKA_LABEL; tar c -C $out CKA_LABEL | tar x --unlink-first -C $o", "CKA_LABEL", "unlinked"),
            ("rm $o/CKA_LABEL; cp $out/other $o/CKA_LABEL", "CKA_LABEL", "another"),
        ]);
        // It was renamed to CKA_OBJECT_ID; a session gives it its default, which is empty.
        assert!(bench.stored_data("CKA_APPLICATION").is_none_or(|value| value.is_empty()));
    }

    fn vim_saves(backend) {
        let mut bench = Bench::new(backend);
        bench.quiet("echo start >$o/CKA_LABEL");
        let variants = [
            "set nobackup writebackup", "set backup", "set nobackup nowritebackup", "set backupcopy=yes",
            "set backupcopy=no", "set backup backupcopy=no backupext=.orig", "set backupcopy=auto,breakhardlink",
            "set noswapfile", "set fsync",
        ];
        for (index, variant) in variants.iter().enumerate() {
            let before = if index == 0 { "start".to_owned() } else { format!("vim {}", index - 1) };
            let line = format!(
                "vim -u DEFAULTS -i NONE -es -c '{variant}' -c '%s/^{before}$/vim {index}/' -c wq $o/CKA_LABEL </dev/null"
            );
            let wanted = format!("vim {index}\n");
            play(&mut bench, &[(line.as_str(), "CKA_LABEL", wanted.as_str())]);
        }
        // As somebody at a terminal has it, with its swap file in the same directory.
        let last = variants.len() - 1;
        let line = format!(
            "timeout 30 script -qec \"vim -i NONE -c '%s/^vim {last}$/at a terminal/' -c w -c q $o/CKA_LABEL\" /dev/null </dev/null >/dev/null"
        );
        play(&mut bench, &[(line.as_str(), "CKA_LABEL", "at a terminal\n")]);
        assert_eq!(bench.quiet("ls -A $o"), bench.quiet("find $o -mindepth 1 -printf '%f\n' | sort"));
    }

    fn nano_saves(backend) {
        let mut bench = Bench::new(backend);
        bench.quiet("echo line >$o/CKA_LABEL");
        // Keys have to come after nano has its screen: cut the line, type another, write, leave.
        let keys = r"( sleep 1; printf '\013'; sleep 0.2; printf 'nano was here'; sleep 0.2; printf '\017'; sleep 0.2; printf '\r'; sleep 0.3; printf '\030'; sleep 0.3 )";
        for options in ["-I", "-I -B"] {
            let line = format!("{keys} | timeout 30 script -qec 'nano {options} {}/CKA_LABEL' /dev/null >/dev/null", bench.data);
            bench.quiet("echo line >$o/CKA_LABEL");
            play(&mut bench, &[(line.as_str(), "CKA_LABEL", "nano was here\n")]);
        }
    }

    fn modes_owners_and_times_are_set(backend) {
        let mut bench = Bench::new(backend);
        for line in [
            "chmod 600 $o/CKA_LABEL", "chmod u=rw,go= $o/CKA_LABEL", "chmod -R u+rwX,go= $o", "chown 0:0 $o/CKA_LABEL",
            "chown -R 0:0 $o", "chgrp 0 $o", "touch $o/CKA_LABEL", "touch $o", "touch -a $o/CKA_LABEL", "touch -c $o/CKA_URL",
        ] {
            bench.quiet(line);
        }
        assert!(bench.stored_data("CKA_URL").is_none(), "touch -c made a file");
        bench.quiet("touch -d '2020-02-02 02:02:02.25 UTC' $o/CKA_LABEL");
        let wanted = (1_580_608_922, 250_000_000);
        assert_eq!(mtime(&bench.of_data("CKA_LABEL")), wanted, "touch -d of a file");
        assert_eq!(mtime(&bench.of_data("CKA_VALUE")), wanted, "all attributes share the time of the object");
        bench.quiet("touch -m -d @1600000000 $o");
        assert_eq!(mtime(&bench.at(&bench.data)).0, 1_600_000_000, "touch -d of an object");
        if backend == Backend::File {
            assert_eq!(mtime(&bench.backing(&bench.data)).0, 1_600_000_000, "the backing file's time");
        }
        let reference = mtime(&bench.at(&bench.public).join("CKA_LABEL"));
        bench.quiet("touch -r $p/CKA_LABEL $o/CKA_LABEL");
        assert_eq!(mtime(&bench.of_data("CKA_LABEL")), reference, "touch -r");
        // The time is the object's as long as its content is what it was, a remount included.
        bench.quiet("touch -d @1700000000 $o/CKA_LABEL");
        let Bench { mount, softhsm, token, data, .. } = &mut bench;
        std::mem::replace(mount, Mount::new(softhsm)).unmount();
        assert_eq!(mtime(&mount.join(token).join(data).join("CKA_LABEL")).0, 1_700_000_000, "after a remount");
        bench.quiet("printf newer >$o/CKA_LABEL");
        assert!(mtime(&bench.of_data("CKA_LABEL")).0 > 1_700_000_000, "a change has a time");
        bench.assert_sessions_agree();
    }

    fn attributes_come_and_go(backend) {
        let mut bench = Bench::new(backend);
        let label = bench.handles.0;
        // Of a type that SoftHSM knows, and of a vendor's.
        bench.quiet("printf 20260101 >$p/CKA_START_DATE; printf x >$o/0x80001234.bytes; echo true >$o/0x80001235.bool");
        assert_eq!(bench.stored(format!("{}/CKA_START_DATE", bench.public)).as_deref(), Some(&b"20260101"[..]));
        assert_eq!(bench.stored_data("0x80001234.bytes").as_deref(), Some(&b"x"[..]));
        bench.quiet("rm $o/0x80001234.bytes $o/0x80001235.bool $o/CKA_APPLICATION");
        assert!(!bench.of_data("CKA_APPLICATION").exists(), "what was unlinked is gone from the mount at once");
        bench.settle();
        assert_eq!(bench.stored_data("0x80001234.bytes"), None);
        assert_eq!(bench.stored_data("CKA_APPLICATION"), None);
        // Maps are directories.
        bench.quiet("mkdir -p $p/CKA_WRAP_TEMPLATE && echo true >$p/CKA_WRAP_TEMPLATE/CKA_EXTRACTABLE && echo CKK_AES >$p/CKA_WRAP_TEMPLATE/CKA_KEY_TYPE");
        bench.settle();
        let map = format!("{}/CKA_WRAP_TEMPLATE", bench.public);
        assert_eq!(bench.stored(format!("{map}/CKA_KEY_TYPE")).as_deref(), Some(&b"CKK_AES\n"[..]));
        assert_eq!(bench.stored(format!("{map}/CKA_EXTRACTABLE")).as_deref(), Some(&b"true\n"[..]));
        bench.quiet("rm $p/CKA_WRAP_TEMPLATE/CKA_KEY_TYPE");
        bench.settle();
        assert_eq!(bench.stored(format!("{map}/CKA_KEY_TYPE")), None);
        bench.quiet("rm -r $p/CKA_WRAP_TEMPLATE");
        bench.settle();
        assert!(!expected(&bench.softhsm).contains_key(&Path::new(&bench.token).join(&map)));
        assert!(bench.client.label(label).unwrap().is_some());
        bench.assert_sessions_agree();
    }

    fn objects_are_removed(backend) {
        let mut bench = Bench::new(backend);
        bench.quiet("rm -r $o");
        assert!(!bench.at(&bench.data).exists(), "gone from the mount");
        eventually(SOON, "rm -r of an object reaches the store", || !bench.has(&bench.data));
        assert_eq!(bench.client.find_label("data").unwrap(), [0_u64; 0], "a live session");
        // In one step, at once.
        bench.quiet("mv $p .gone");
        assert!(!bench.has(&bench.public), "mv to a name with a dot removes the object at once");
        assert_eq!(bench.client.find_label("public").unwrap(), [0_u64; 0], "a live session");
        assert_eq!(bench.quiet("ls -A").lines().count(), 2, "token/ and the private key");
        // The name with a dot is scratch: it can be entered, brought back, and thrown away.
        bench.quiet("test -f .gone/CKA_LABEL && mv .gone $p");
        bench.settle();
        assert!(bench.has(&bench.public), "mv back");
        assert_eq!(bench.client.find_label("public").unwrap().len(), 1, "a live session");
        bench.quiet("mv $p .gone && rm -r .gone && rm -rf $k");
        bench.settle();
        assert_eq!(bench.client.find(&[]).unwrap(), []);
        bench.assert_sessions_agree();
        bench.assert_no_leftovers();
    }

    fn objects_are_made(backend) {
        let mut bench = Bench::new(backend);
        let id = |number: u8| format!("00000000-0000-4000-8000-0000000000{number:02x}");
        let lines = [
            "cp -a $k $n", "cp -r $k $n", "mkdir $n && cp $k/* $n/ 2>/dev/null || cp -r $k/* $n/", "mkdir $n && tar --format=posix -cf $out/k.tar -C $k . && tar xf $out/k.tar -C $n",
            "rsync -a $k/ $n/", "cp -a $k .tmp && mv .tmp $n", "mkdir .tmp && cp -a $k/. .tmp/ && mv .tmp $n",
            "mkdir $n && rsync -a --inplace $k/ $n/", "mv $k .k && cp -a .k $n && mv .k $k",
        ];
        for (index, line) in lines.iter().enumerate() {
            let name = id(index as u8);
            bench.quiet(&format!("n={name}; {line}"));
            eventually(SOON, line, || bench.has(&name));
            bench.settle();
            let copied: Vec<_> = expected(&bench.softhsm).into_iter().filter_map(|(path, content)| {
                let path = path.strip_prefix(&bench.token).ok()?;
                Some((path.strip_prefix(&name).ok()?.to_owned(), content))
            }).collect();
            let original = fs::read_dir(bench.at(&bench.private)).unwrap().count();
            assert!(copied.len() > original, "`{line}`: {copied:?}");
            // The session of before finds it, signs with it, changes it and destroys it.
            assert_eq!(bench.client.find_label("private").unwrap().len(), 2, "`{line}`: a live session finds the copy");
            bench.assert_sessions_agree();
            bench.quiet(&format!("echo true >{name}/CKA_DERIVE"));
            let copies = bench.client.find(&[boolean(0x10c, true)]).unwrap();
            assert_eq!(copies.len(), 1, "`{line}`: a live session sees that one of the keys derives");
            let copy = copies[0].handle;
            bench.assert_signs(copy);
            let label = bench.stored(format!("{name}/CKA_LABEL")).unwrap();
            bench.client.set_label(copy, "copy").unwrap();
            let changed = bench.stored(format!("{name}/CKA_LABEL")).unwrap();
            assert!(changed != label && changed.len() == 32, "`{line}`: SoftHSM's change reaches the store");
            eventually(SOON, "SoftHSM's change in the mount", || {
                fs::read(bench.at(&name).join("CKA_LABEL")).is_ok_and(|shown| shown == changed)
            });
            bench.client.destroy(copy).unwrap();
            eventually(SOON, "SoftHSM's removal in the mount", || !bench.at(&name).exists());
            assert!(bench.has(&bench.private) && !bench.has(&name), "`{line}`: the copy is destroyed, and nothing else");
            // What was scratch for a while has to be searched again (`db`).
            let keys = bench.client.find(&[ulong(0, 3)]).unwrap();
            assert_eq!(keys.len(), 1, "`{line}`: private keys");
            bench.assert_signs(keys[0].handle);
        }
        bench.assert_no_leftovers();
    }

    fn an_object_is_restored_over_itself(backend) {
        let mut bench = Bench::new(backend);
        bench.quiet("cp -a $k $out/key && cp -a $o $out/data && tar --format=posix -cf $out/all.tar . && cp -a . $out/all");
        let before = expected(&bench.softhsm);
        for line in [
            "cp -a $out/key/. $k/", "rm -r $k; cp -a $out/key $k", "rsync -a --delete $out/key/ $k/", "tar xf $out/all.tar",
            "cd $out/all; find . -type f >../files; cd $t; tar x --unlink-first -f $out/all.tar -T $out/files", "tar x --recursive-unlink -f $out/all.tar ./$k", "rsync -a --delete $out/all/ ./",
            "rsync -a --inplace --delete $out/all/ ./", "rsync -ac $out/all/ ./", "mv $k .old; cp -a $out/key $k; rm -r .old",
            "printf changed >$o/CKA_LABEL; rm $o/CKA_VALUE; echo false >$k/CKA_SIGN; rsync -ac --delete $out/all/ ./",
            "rm -r $k $o; rsync -a $out/all/ ./", "rm -r $k $o; tar xf $out/all.tar",
        ] {
            bench.quiet(line);
            bench.settle();
            assert_same(&before, &expected(&bench.softhsm));
            for dir in ["key/ $k/", "data/ $o/", "all/ ./"] {
                assert_eq!(bench.quiet(&format!("diff -r $out/{dir}")), "", "after `{line}`");
                let again = format!("rsync -a --itemize-changes $out/{dir}");
                // Only what was restored has its old time; on db the time of an object that was given none is that of the
                // database.
                let source = &dir[..dir.find('/').unwrap()];
                let restored = line.contains("$out/all/ ./") || line.contains(&format!("$out/{source}"));
                if restored && !line.contains("-ac") && !line.contains("-T ") && !line.contains("./$k") {
                    assert_eq!(bench.quiet(&again), "", "after `{line}`, rsync of {dir} moves something");
                }
            }
            let keys = bench.client.find_label("private").unwrap();
            assert_eq!(keys.len(), 1, "after `{line}`");
            bench.assert_signs(keys[0]);
            bench.assert_sessions_agree();
        }
        bench.assert_no_leftovers();
    }

    fn rsync_moves_nothing_the_second_time(backend) {
        let bench = Bench::new(backend);
        let other = Softhsm::new(backend);
        let into = Mount::new(&other);
        let from = bench.mount.path().display();
        let to = into.path().display();
        for options in ["-a", "-a --delete", "-a --inplace", "-aH --delete --checksum"] {
            bench.quiet(&format!("rsync {options} {from}/ {to}/"));
            std::thread::sleep(HELD);
            // A busy machine can take longer than that over it.
            eventually(SOON, "the tokens", || leftovers(&other.tokendir).is_empty());
            assert_same(&expected(&bench.softhsm), &expected(&other));
            let token = bench.softhsm.token_directory();
            let name = token.file_name().unwrap();
            let times = [token.clone(), bench.mount.path().join(name), other.tokendir.join(name), into.path().join(name)]
                .map(|path| fs::metadata(path).map(|m| m.modified().unwrap()));
            let again = bench.quiet(&format!("rsync {options} --itemize-changes {from}/ {to}/"));
            assert_eq!(again, "", "rsync {options}, the second time: source, in its mount, target, in its mount: {times:#?}");
            into.join(&bench.token).read_dir().unwrap();
        }
        into.unmount();
        let into = Mount::new(&other);
        let to = into.path().display();
        assert_eq!(bench.quiet(&format!("rsync -a --delete --itemize-changes {from}/ {to}/")), "", "after a remount");
        assert!(leftovers(&other.tokendir).is_empty(), "{:?}", leftovers(&other.tokendir));
        let mut client = other.p11();
        client.open("test", Some(PIN)).unwrap();
        agree(&other, &bench.token, &mut client);
    }

    fn a_token_is_restored_where_the_file_system_cannot_rename_to_a_free_name_in_one_step(backend) {
        // There renameat2(2) with a flag is EINVAL.
        let bench = Bench::new(backend);
        bench.quiet("cp -a $t $out/token && mkdir $out/real $out/tokens $out/mnt");
        let tokenfs = env!("CARGO_BIN_EXE_tokenfs");
        let options = format!("--backend {} --tokendir $out/tokens", bench.backend());
        bench.quiet(&format!(
            "trap 'umount -l $out/mnt 2>/dev/null || true; umount -l $out/tokens' EXIT; bindfs $out/real $out/tokens
             {tokenfs} mount {options} $out/mnt
             cp -a $out/token $out/mnt/$(basename $t)
             diff -r $out/token $out/mnt/$(basename $t)
             {tokenfs} umount $out/mnt"
        ));
        bench.quiet(&format!("{tokenfs} check --backend {} --tokendir $out/real >$out/said", bench.backend()));
        let said = fs::read_to_string(bench.outside.path().join("said")).unwrap();
        assert!(said.contains("1 token, ") && said.contains(": clean"), "{said}");
    }

    fn tokens_are_made_and_removed(backend) {
        let mut bench = Bench::new(backend);
        let whole = expected(&bench.softhsm);
        // Out, away, and back.
        bench.quiet("cp -a $t $out/token && tar --format=posix -cf $out/token.tar -C .. $(basename $t)");
        let mount = bench.mount.path().to_owned();
        for restore in ["cp -a $out/token $t", "cp -r $out/token $t", "tar xf $out/token.tar", "rsync -a $out/token/ $t/", "mkdir $t && cp -a $out/token/. $t/"] {
            let at = |line: &str| {
                let mut shell = bench.shell(line);
                let output = shell.current_dir(&mount).output().unwrap();
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                assert!(output.status.success() && said.is_empty(), "`{line}`: {said}\n{}", bench.log());
            };
            at("rm -r $t");
            assert!(!bench.directory().exists(), "before `{restore}`");
            let left = || walk(&bench.softhsm.tokendir).len();
            eventually(SOON, "rm -r of a token leaves nothing of it", || left() == 1);
            at(restore);
            if restore.starts_with("rsync") || restore.starts_with("cp -a") {
                // Who says what is finished has said so by the time that it ends.
                assert!(bench.softhsm.read().contains_key(&bench.token), "{backend} backend, right after `{restore}`");
            }
            eventually(SOON, restore, || bench.softhsm.read().contains_key(&bench.token));
            std::thread::sleep(HELD);
            assert_same(&whole, &expected(&bench.softhsm));
            bench.assert_in_agreement();
            bench.assert_no_leftovers();
            let mut fresh = bench.softhsm.p11();
            fresh.open("test", Some(PIN)).unwrap();
            agree(&bench.softhsm, &bench.token, &mut fresh);
            let key = fresh.find_label("private").unwrap()[0];
            fresh.sign(key, CKM_ECDSA, &[7; 32]).unwrap();
            fresh.set_label(key, "elsewhere").unwrap();
            fresh.set_label(key, "private").unwrap();
            fresh.init_token("second", Some(PIN)).unwrap();
            fresh.close().unwrap();
            // Only the label's ciphertext is another now.
            eventually(SOON, "the second token in the mount", || fs::read_dir(&mount).unwrap().count() == 2);
            let second = fs::read_dir(&mount).unwrap().map(|e| e.unwrap().file_name()).find(|n| *n != *bench.token).unwrap();
            at(&format!("rm -r {}", second.display()));
            eventually(SOON, "the second token leaves the store", || bench.softhsm.token_directories().len() == 1);
        }
        bench.client.reinitialize().unwrap();
        bench.client.open("test", Some(PIN)).unwrap();
    }

    fn a_token_is_copied_out_of_another_mount(backend) {
        // Both ways: from the same backend and from the other.
        for from in BACKENDS {
            let source = Softhsm::golden(Golden::V2_6_1, from);
            let target = Softhsm::new(backend);
            let (out, into) = (Mount::new(&source), Mount::new(&target));
            let wanted = expected(&source);
            let mut copy = tool("cp");
            copy.arg("-a").arg(out.join(".")).arg(into.path());
            let output = run(&mut copy);
            assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
            std::thread::sleep(HELD);
            let names = |tree: &Tree| tree.keys().cloned().collect::<Vec<_>>();
            let is = expected(&target);
            assert_eq!(names(&wanted), names(&is), "{from} to {backend}");
            assert_same(&wanted, &is);
            assert_same(&wanted, &seen(&into));
            run(tool("diff").arg("-r").arg(out.path()).arg(into.path()));
            let left = leftovers(&target.tokendir);
            assert!(left.is_empty(), "{from} to {backend}: left in the store: {left:?}");
            let mut client = target.p11();
            for (name, token) in target.read() {
                let Some(_) = independent::token_key(&token, independent::CKA_OS_USERPIN, PIN) else { continue };
                let serial = independent::get_bytes(&token.token, 0x8000_534a).unwrap().to_vec();
                client.open(&String::from_utf8(serial).unwrap(), Some(PIN)).unwrap();
                agree(&target, &name, &mut client);
            }
        }
    }

    fn the_tokens_own_attributes_are_changed(backend) {
        let bench = Bench::new(backend);
        bench.quiet("printf '%-32s' renamed >token/CKA_OS_TOKENLABEL");
        assert_eq!(bench.stored("token/CKA_OS_TOKENLABEL").unwrap(), format!("{:32}", "renamed").into_bytes());
        let mut fresh = bench.softhsm.p11();
        assert_eq!(fresh.tokens().unwrap()[0].0.trim_end(), "renamed");
        fresh.open("renamed", Some(PIN)).unwrap();
        bench.quiet("cp -a token/CKA_OS_USERPIN $out/pin; sed -i '/CKF_USER_PIN_COUNT_LOW/d' token/CKA_OS_TOKENFLAGS; cp $out/pin token/CKA_OS_USERPIN");
        fresh.open("renamed", Some(PIN)).unwrap();
        bench.settle();
    }
}
