//! docs/guide.md, typed as it stands: each section on a machine of its own, with the sections that it builds on before it, on both
//! backends; then a look at what it promises, and last a SoftHSM that logs in with the old PIN and signs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod guide_common;
mod support;

use std::collections::BTreeSet;
use std::panic::catch_unwind;

use guide_common::*;
use support::*;

/// Empties the store.
const LOST: &str = "find /var/lib/softhsm/tokens -mindepth 1 -delete";

/// How a section is shown to work.
struct Trial {
    section: &'static str,
    /// Sections that are followed before.
    after: &'static [&'static str],
    /// What befalls the store between those and this one.
    misfortune: &'static str,
    /// What has to be so then.
    proof: &'static str,
}

/// The store is what it was, down to owners, modes and times.
const SAME: &str = "tree | diff /root/reference - && signs";
/// For each tool: old backups go, the latest thirty stay; one that fails is an error, takes nothing away, and leaves no mount.
const EVERY_NIGHT: &str = r#"
cd /var/backups/softhsm
export TZ=Pacific/Auckland RESTIC_REPOSITORY=$PWD/restic RESTIC_PASSWORD_FILE=/etc/softhsm/backup-passphrase
export BORG_REPO=$PWD/borg BORG_PASSCOMMAND='cat /etc/softhsm/backup-passphrase'
next() { while [ -e "$(date -u +%F-%H%M%S)" ]; do :; done; }
complete() { readlink latest; ls -d 20* tokens-*; restic snapshots --tag complete; borg list --glob-archives 'tokens-*'; }
night() { next; env -i /usr/local/sbin/softhsm-backup "$1"; }
fails() { not night "$1"; not grep -F fuse.tokenfs /proc/self/mountinfo; }
mkdir 2001-01-{01..31}-030000
touch tokens-2001-01-{01..31}-030000.tar.gz.gpg
for tool in rsync tar restic borg; do night $tool; done
ls -d 20* | wc -l | grep -x 30
ls -d latest/*/token
not test -e 2001-01-02-030000
ls tokens-* | wc -l | grep -x 30
before=$(complete)
grep complete <<<"$before"
printf '#!/bin/sh\nexit 2\n' >/usr/local/bin/gpg
chmod 755 /usr/local/bin/gpg
fails tar
rm /usr/local/bin/gpg
damage
for tool in rsync tar restic borg; do fails $tool; done
# A store without tokens, which is one that is not mounted.
mv /var/lib/softhsm/tokens /root/tokens
mkdir /var/lib/softhsm/tokens
for tool in rsync tar restic borg; do fails $tool; done
diff <(echo "$before") <(complete)
grep -Fx '17 3 * * * root /usr/local/sbin/softhsm-backup rsync' /etc/cron.d/softhsm-backup
"#;

/// A section whose proof is what it prints, and that it does not fail.
const fn section(
    section: &'static str,
    after: &'static [&'static str],
    misfortune: &'static str,
    proof: &'static str,
) -> Trial {
    Trial {
        section,
        after,
        misfortune,
        proof,
    }
}

const TRIALS: &[Trial] = &[
    section(BEFORE, &[], "", "tokenfs check | grep clean"),
    section(SCRIPT, &[BEFORE], "", "not softhsm-backup
         not softhsm-backup zip
         not grep -F fuse.tokenfs /proc/self/mountinfo"),
    section(
        RSYNC,
        &[BEFORE, SCRIPT],
        "",
        // Where it is moved to, it leads into itself.
        "mv /var/backups/softhsm /root/moved
         mkdir /run/compared
         tokenfs mount -o ro /run/compared
         diff -r /root/moved/latest/ /run/compared/
         tokenfs umount /run/compared
         tree | diff /root/reference -",
    ),
    section(PASSPHRASE, &[BEFORE], "", "stat -c %a /etc/softhsm/backup-passphrase | grep -x 600
         test -s /etc/softhsm/backup-passphrase"),
    section(TAR, &[BEFORE, SCRIPT, PASSPHRASE], "", "stat -c %a /var/backups/softhsm/tokens-*.gpg | grep -x 600"),
    section(RESTIC, &[BEFORE, SCRIPT, PASSPHRASE], "", "true"),
    section(BORG, &[BEFORE, SCRIPT, PASSPHRASE], "", "true"),
    section("Every night", &[BEFORE, SCRIPT, PASSPHRASE, RESTIC, BORG], "", EVERY_NIGHT),
    section(
        "Check a backup",
        &[BEFORE, SCRIPT, RSYNC],
        "",
        // The one thing that differs is said to be the private RSA key.
        "tree | diff /root/reference -
         not ls /dev/shm/scratch-*
         grep -c differ /root/output | grep -x 1
         object=$(dirname $(grep -o '/var/backups/softhsm/latest/.*/CKA_ID' /root/output | cut -d' ' -f1))
         cat $object/CKA_CLASS $object/CKA_KEY_TYPE | diff - <(echo CKO_PRIVATE_KEY; echo CKK_RSA)",
    ),
    section(
        "If `tokenfs umount` refuses",
        &[BEFORE],
        // A private object without its CKA_PRIVATE, from a copy that was broken off, is what may go; what is refused of one that is there may not.
        "tokenfs mount /mnt/tokens
         new=$(ls -d /mnt/tokens/*/token | head -n 1 | xargs dirname)/aaaaaaaa-1234-5678-9abc-123456789abc
         mkdir $new && echo CKO_DATA >$new/CKA_CLASS && echo text >$new/CKA_LABEL
         not tee /mnt/tokens/.tokenfs/by-label/production/web-server.public_key/CKA_VERIFY <<<maybe
         not tokenfs umount /mnt/tokens 2>/root/said
         sed -n 's|^tokenfs: \\(/.*\\): pending: .*|\\1|p' /root/said | diff - <(echo $new)
         rm -r $new",
        SAME,
    ),
    section(
        "The whole store",
        &[BEFORE, SCRIPT, RSYNC],
        // Not in the usual place, which is somebody else's, and not for the first time.
        "cd /var/lib/softhsm
         cp -a tokens elsewhere
         sed -i 's|/tokens/|/elsewhere/|' /etc/softhsm/softhsm2.conf
         find elsewhere -mindepth 1 -delete",
        "cd /var/lib/softhsm
         ls -d elsewhere.20* && not ls -d tokens.*
         tree | diff /root/reference - && signs",
    ),
    section("The whole store, from tar", &[BEFORE, SCRIPT, PASSPHRASE, TAR], LOST, SAME),
    section(
        "The whole store, from restic",
        &[BEFORE, SCRIPT, PASSPHRASE, RESTIC],
        "lost_after_an_incomplete restic
         usermod --uid 4003 signer",
        "stat -c %u /var/lib/softhsm/tokens/* | sort -u | grep -x 4001
         chown -R signer:softhsm /var/lib/softhsm/tokens/*
         tree | diff /root/reference - && signs",
    ),
    section(
        "The whole store, from borg",
        &[BEFORE, SCRIPT, PASSPHRASE, BORG],
        "lost_after_an_incomplete borg
         usermod --uid 4003 signer",
        "stat -c %u /var/lib/softhsm/tokens/* | sort -u | grep -x 4003
         tree | diff /root/reference - && signs",
    ),
    section(
        "One token",
        &[BEFORE, SCRIPT, RSYNC],
        // What makes it a token, or the database itself, is damaged.
        "for file in $(grep -rla 'production ' /var/lib/softhsm/tokens); do truncate -s 20 $file; done
         not tokenfs check",
        SAME,
    ),
    section(
        "An object that was lost",
        &[BEFORE, SCRIPT, RSYNC],
        "runuser -u signer -- pkcs11-tool --module /usr/lib/softhsm/libsofthsm2.so --token-label production --login --pin 1234 \
         --delete-object --type privkey --id 01",
        SAME_CONTENT,
    ),
    section(
        "An object that is damaged",
        &[BEFORE, SCRIPT, RSYNC],
        "damage",
        SAME_CONTENT,
    ),
    section(
        "A token whose own attributes are damaged",
        &[BEFORE, SCRIPT, RSYNC],
        // With an object that is newer than the backup.
        "runuser -u signer -- pkcs11-tool --module /usr/lib/softhsm/libsofthsm2.so --token-label production --login --pin 1234 \
             --keygen --key-type AES:32 --id 03 --label newer
         tree >/root/reference
         for file in /var/lib/softhsm/tokens/*/token.object; do
             [ ! -e \"$file\" ] || truncate -s -3 $(grep -l 'production ' /var/lib/softhsm/tokens/*/token.object)
             break
         done
         for file in $(grep -l 'production ' /var/lib/softhsm/tokens/*/sqlite3.db); do
             sqlite3 $file \"update attribute_integer set value = 'text' where object_id = 1\"
         done
         if tokenfs check; then exit 1; fi",
        SAME_CONTENT,
    ),
    section(
        "One attribute",
        &[BEFORE, SCRIPT, RSYNC],
        "tokenfs mount /mnt/tokens
         echo false >/mnt/tokens/.tokenfs/by-label/production/web-server.public_key/CKA_VERIFY
         tokenfs umount /mnt/tokens",
        SAME_CONTENT,
    ),
    section("Move to another host", &[BEFORE], "", "true"),
    section(
        "Owners and modes",
        &[BEFORE, "Move to another host"],
        "",
        // The new host's user has the same name and another number.
        "ssh root@new-host 'stat -c %u /var/lib/softhsm/tokens/*' | grep -x 4002
         ssh root@new-host \"$(declare -f tree); tree\" | diff /root/reference -
         ssh root@new-host 'cat >/root/public.der' </root/public.der
         ssh root@new-host \"$(declare -f signs); signs\"",
    ),
    section(
        "Change the backend",
        &[BEFORE],
        // Not for the first time: what is in the usual place is not the store any more.
        "cd /var/lib/softhsm
         cp -a tokens tokens-now
         rm -rf tokens/*/token* tokens/*/sqlite3.db
         sed -i 's|/tokens/|/tokens-now|' /etc/softhsm/softhsm2.conf",
        "cd /var/lib/softhsm
         if ls tokens-now/*/token.object; then ls tokens-now-db/*/sqlite3.db; else ls tokens-now-file/*/token.object; fi
         diff <(stat -c '%a %U:%G' tokens-now) <(stat -c '%a %U:%G' tokens-now-*)
         not test -e /etc/softhsm/softhsm2.conf.new
         tree | diff /root/reference - && signs",
    ),
    section(
        "A plain copy for the file backend",
        &[BEFORE],
        "",
        "copy=$(echo /var/backups/softhsm/tokendir-*)
         tree --tokendir $copy --backend file | diff /root/reference -
         rm -r /var/lib/softhsm/tokens
         cp -a $copy /var/lib/softhsm/tokens
         sed -i 's|= db|= file|' /etc/softhsm/softhsm2.conf
         signs",
    ),
    section(
        "What is in a backup",
        &[BEFORE, SCRIPT, RSYNC],
        // A secret key that anybody can read is what the section is to find.
        "pkcs11-tool --module /usr/lib/softhsm/libsofthsm2.so --token-label production --login --pin 1234 \
             --keygen --key-type AES:32 --id 03 --label open
         tokenfs mount /mnt/tokens && rsync -a /mnt/tokens/ /var/backups/softhsm/latest/ && tokenfs umount /mnt/tokens",
        "cd /var/backups/softhsm/latest
         # A private object has nothing to read in it, and all of the data object is there.
         not grep -raE 'web-server|code-signing' $(grep -rlx true --include=CKA_PRIVATE . | xargs dirname)
         # The one key that is open, and none of the other two.
         grep -c CKA_PRIVATE /root/output | grep -x 1
         cat $(dirname $(grep CKA_PRIVATE /root/output))/CKA_LABEL | grep -x open
         grep -rxq 'a note' --include=CKA_VALUE .",
    ),
];

/// The content is what it was; an object that was written anew in a `db` store gives its time to the database.
const SAME_CONTENT: &str =
    "tree | cut -d' ' -f1-4 | diff <(cut -d' ' -f1-4 /root/reference) - && signs";

fn try_on(trial: &Trial, backend: Backend, all: &[Block]) {
    let own = of(all, trial.section);
    println!("{backend}: {:?}, {} blocks", trial.section, own.len());
    let changes = trial.section.starts_with("Change the backend")
        || trial.section.starts_with("A plain copy");
    let machine = Machine::new(backend, changes);
    machine.make_store();
    for earlier in trial.after {
        machine.follow(&of(all, earlier));
    }
    machine.look(trial.misfortune);
    let output = machine.follow(&own);
    machine.run(&format!("cat >/root/output <<'END'\n{output}END\n"));
    machine.look(trial.proof);
}

fn the_guide_works(backend: Backend) {
    let all = blocks(&guide(backend));
    let failed: Vec<&str> = TRIALS
        .iter()
        .filter(|trial| catch_unwind(|| try_on(trial, backend, &all)).is_err())
        .map(|trial| trial.section)
        .collect();
    assert!(
        failed.is_empty(),
        "sections that do not work as they stand: {failed:?}"
    );
}

#[test]
fn the_guide_works_with_a_file_store() {
    the_guide_works(Backend::File);
}

#[test]
fn the_guide_works_with_a_db_store() {
    the_guide_works(Backend::Db);
}

#[test]
fn every_block_of_the_guide_is_run() {
    let all = blocks(GUIDE);
    for line in GUIDE.lines().filter(|line| line.contains("ssh root@")) {
        assert!(
            line.contains("| ssh root@"),
            "{line:?} reads what is pasted behind it: ssh -n"
        );
    }
    let typed: BTreeSet<&str> = all.iter().map(|block| block.section.as_str()).collect();
    let tried: BTreeSet<&str> = TRIALS.iter().map(|trial| trial.section).collect();
    assert_eq!(
        typed, tried,
        "sections with commands, and sections that are tried"
    );
    println!("{} sections with {} blocks", typed.len(), all.len());
}
