//! docs/guide.md, pasted where it does not belong: into a new shell, behind a step that failed, over a store that is there. Nothing of
//! production is touched.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod guide_common;
mod support;

use guide_common::*;
use support::*;

/// What is on disk of the store, of its configuration, and where a lost variable would lead to.
const STATE: &str = "
state() {
    find / -mindepth 1 -maxdepth 1 -printf '%p\\n' | sort
    find /var/lib/softhsm /etc/softhsm -printf '%p %y %m %u:%g %T@\\n' | sort
    find /var/lib/softhsm /etc/softhsm -type f -exec sha256sum {} + | sort
}
";

/// After its backup the application has gone on: another PIN, and an object more.
const LATER: &str = "
signer() { runuser -u signer -- pkcs11-tool --module /usr/lib/softhsm/libsofthsm2.so --token-label production --login \"$@\" 2>&1; }
signer --pin 1234 --change-pin --new-pin 123456
signer --pin 123456 --keygen --key-type AES:32 --id 03 --label newer
state >/root/state";

/// A store with a backup of each kind, older than the store.
fn machine(backend: Backend, all: &[Block], tools: &[&str]) -> Machine {
    let machine = Machine::new(backend, false);
    machine.make_store();
    for section in [BEFORE, SCRIPT].iter().chain(tools) {
        machine.follow(&of(all, section));
    }
    machine.run(&format!("{STATE}{LATER}"));
    machine
}

/// The store is as it was, and what is mounted can be unmounted.
#[track_caller]
fn assert_untouched(machine: &Machine, what: &str, said: &str) {
    let changed = machine.run(&format!(
        "{STATE} ! mountpoint -q /mnt/tokens || tokenfs umount /mnt/tokens
         state | diff /root/state - || true"
    ));
    assert_eq!(changed, "", "changed by {what}, which said\n{said}");
}

/// Pastes a text into a new interactive shell in the clone, which goes on after what fails. What it said, on either stream.
fn paste(machine: &Machine, text: &str) -> String {
    let shell = "cd /root/clone; exec bash --norc --noprofile -i 2>&1";
    String::from_utf8_lossy(&machine.shell(shell, text).stdout).into_owned()
}

fn text(blocks: &[&Block]) -> String {
    blocks.iter().map(|block| block.text.as_str()).collect()
}

both_backends! {
    fn a_block_that_is_pasted_alone_does_nothing_to_a_store_that_is_there(backend) {
        let all = blocks(&guide(backend));
        let machine = machine(backend, &all, &[PASSPHRASE, RSYNC, TAR, RESTIC, BORG]);
        let harmless = |block: &&Block| {
            // These are told to change the store, whatever it is.
            let means_it = ["mv -T \"$tokendir\"", "tokenfs convert"];
            let restores = block.section.starts_with("The whole store") || block.section.starts_with("One token");
            let others = ["Check a backup", "An object that was lost", "An object that is damaged",
                "A token whose own attributes are damaged", "One attribute"];
            (restores || others.contains(&block.section.as_str())) && !means_it.iter().any(|means| block.text.contains(means))
        };
        let alone: Vec<&Block> = all.iter().filter(harmless).collect();
        assert!(alone.len() > 15, "{} blocks", alone.len());
        for block in alone {
            let said = paste(&machine, &block.text);
            assert_untouched(&machine, &format!("line {}", block.line), &said);
        }
        // It is known which token, and it is there.
        let one = of(&all, "One token");
        let said = paste(&machine, &text(&[one[0], one[2]]));
        assert_untouched(&machine, "a token that is there", &said);
    }

    fn a_check_that_gets_no_scratch_store_does_not_take_the_real_one(backend) {
        let all = blocks(&guide(backend));
        let machine = machine(backend, &all, &[RSYNC]);
        machine.run("printf '#!/bin/sh\\nexit 1\\n' >/usr/local/bin/mktemp; chmod 755 /usr/local/bin/mktemp");
        let check = text(&of(&all, "Check a backup")).replace("export PIN\n", &format!("export PIN\n{PIN}\n"));
        let said = paste(&machine, &check);
        assert_untouched(&machine, "a check without a scratch store", &said);
        assert!(said.contains("scratch: parameter null or not set"), "{said}");
        assert!(!said.contains("clean") && !said.contains("Slot"), "it looked at production:\n{said}");
    }

    fn the_script_takes_the_store_that_is_configured_and_no_mount_is_left(backend) {
        let all = blocks(&guide(backend));
        let machine = machine(backend, &all, &[]);
        // A store of a check that somebody forgot.
        machine.run("mkdir -p /root/other/tokens
             cp -a $(ls -d /var/lib/softhsm/tokens/* | head -n 1) /root/other/tokens/
             sed 's|/var/lib/softhsm/|/root/other/|' /etc/softhsm/softhsm2.conf >/root/other.conf
             SOFTHSM2_CONF=/root/other.conf softhsm-backup rsync
             ls -d /var/backups/softhsm/latest/*/token | wc -l | grep -x 2");
        // A tool that goes on working when the script is told to end.
        machine.run("printf '#!/bin/sh\\ntouch /run/at-work; while [ -e /run/at-work ]; do sleep .05; done\\n' >/usr/local/bin/borg
             chmod 755 /usr/local/bin/borg
             for signal in TERM HUP; do
                 softhsm-backup borg & script=$!
                 while [ ! -e /run/at-work ]; do sleep .05; done
                 mountpoint -q /mnt/snapshot
                 kill -$signal $script
                 rm /run/at-work
                 code=0; wait $script || code=$?
                 [ $code = 143 ]
                 ! mountpoint -q /mnt/snapshot || exit 1
             done
             tokenfs mount --snapshot /mnt/snapshot
             ! softhsm-backup borg || exit 1
             # It was somebody else's.
             mountpoint -q /mnt/snapshot && tokenfs umount /mnt/snapshot");
        assert_untouched(&machine, "the script", "");
    }

    fn a_move_to_a_host_that_has_a_token_moves_nothing(backend) {
        let all = blocks(&guide(backend));
        let machine = Machine::new(backend, false);
        machine.make_store();
        machine.follow(&of(&all, BEFORE));
        let blocks = of(&all, "Move to another host");
        machine.follow(&blocks);
        let there = || machine.run(&format!("{STATE} ssh root@new-host \"$(declare -f state); state\""));
        let before = there();
        machine.run(&format!("{STATE}{LATER}"));
        let said = paste(&machine, &text(&blocks));
        assert!(said.contains("NOT moved"), "{said}");
        assert_eq!(before, there(), "{said}");
        assert_untouched(&machine, "the move", &said);
    }

    fn a_change_of_the_backend_that_does_not_work_is_none(backend) {
        let all = blocks(&guide(backend));
        let change = text(&of(&all, "Change the backend"));
        let machine = machine(backend, &all, &[]);
        let pasted = |text: &str, why: &str| {
            let said = paste(&machine, text);
            assert!(said.contains(why), "{why:?} is not in\n{said}");
            machine.run("rm -rf /var/lib/softhsm/tokens-* /etc/softhsm/softhsm2.conf.new
                 touch -r /etc/softhsm/softhsm2.conf /etc/softhsm
                 touch -d \"@$(grep '^/var/lib/softhsm d' /root/state | cut -d' ' -f5)\" /var/lib/softhsm
                 touch -d \"@$(grep '^/etc/softhsm d' /root/state | cut -d' ' -f5)\" /etc/softhsm");
            assert_untouched(&machine, why, &said);
        };
        pasted(&change.replace("-u signer", "-u nobody-such"), "nobody-such");
        let now = format!("to={backend}\n");
        pasted(&change.replace("to=db\n", &now).replace("to=file\n", &now), &format!("objectstore.backend = {backend}"));
        if backend == Backend::File {
            // Debian's.
            pasted(&change, "Could not select token backend");
        }
    }
}

/// What reads without an error and is not whole is backed up, and is not what a restore takes. In the `file` backend, where
/// things get lost so.
#[test]
fn what_lacks_something_is_no_complete_backup() {
    let all = blocks(GUIDE);
    let machine = machine(Backend::File, &all, &[RSYNC, PASSPHRASE, TAR, RESTIC, BORG]);
    machine.run(
        r#"complete() { (
               . <(grep -E '^export (RESTIC|BORG)' /usr/local/sbin/softhsm-backup)
               readlink /var/backups/softhsm/latest
               ls /var/backups/softhsm/tokens-*
               restic --no-cache snapshots --quiet --tag complete --json | grep -o '"id":"[^"]*'
               borg list --short --glob-archives 'tokens-*'
           ); }
           own=$(grep -l 'production ' /var/lib/softhsm/tokens/*/token.object)
           cp -a $own /root/whole
           complete >/root/before
           for damage in 'rm -f' 'tee -a'; do
               $damage $own <<<x
               for tool in rsync tar restic borg; do
                   ! softhsm-backup $tool 2>/root/said || exit 1
                   grep 'not called complete' /root/said
               done
               cp -a /root/whole $own
           done
           complete | diff /root/before -
           for tool in rsync tar restic borg; do softhsm-backup $tool 2>/dev/null; done
           [ $(complete | wc -l) = $(($(wc -l </root/before) + 3)) ]"#,
    );
}

/// In the `file` backend, where that is a file of its own.
#[test]
fn a_token_object_that_is_gone_comes_from_a_scratch_store() {
    let all = blocks(GUIDE);
    let machine = machine(Backend::File, &all, &[RSYNC]);
    let command = GUIDE
        .lines()
        .find(|line| line.starts_with("`cp -a \"${scratch:?}"));
    let command = command.unwrap().split('`').nth(1).unwrap();
    machine.run("rm $(grep -l 'production ' /var/lib/softhsm/tokens/*/token.object)");
    let (token, check) = (of(&all, "One token"), of(&all, "Check a backup"));
    let said = paste(
        &machine,
        &format!("{}{}{command}\n", token[0].text, check[1].text),
    );
    // With the PIN of the backup, and the object that is newer.
    machine.look("tokenfs check | grep clean && signs && test -e $(dirname /var/lib/softhsm/tokens/*/token.object | head -n 1)
         pkcs11-tool --module /usr/lib/softhsm/libsofthsm2.so --token-label production --login --pin 1234 --list-objects | grep newer");
    println!("{said}");
}

both_backends! {
    fn a_value_that_is_wrong_comes_from_the_backup(backend) {
        let all = blocks(&guide(backend));
        let machine = machine(backend, &all, &[RSYNC]);
        // As long as it was, and as old: nothing but the value tells.
        machine.look("tree >/root/reference
             tokenfs mount /mnt/tokens
             object=$(readlink -e /mnt/tokens/.tokenfs/by-label/production/note.*)
             cd $object && touch -r . /root/time && printf 'a lie ' >CKA_VALUE && touch -r /root/time CKA_VALUE .
             cd / && tokenfs umount /mnt/tokens
             not diff <(tree) /root/reference
             echo $object | cut -d/ -f4,5 | sed 's|\\(.*\\)/|token=\\1\\nobject=|' >/root/names");
        let block = of(&all, "An object that is damaged")[1];
        let said = paste(&machine, &format!("{}{}", machine.run("cat /root/names"), block.text));
        assert_eq!(machine.look("tree | cut -d' ' -f1-4 | diff <(cut -d' ' -f1-4 /root/reference) - || true"), "", "{said}");
    }
}
