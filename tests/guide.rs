//! docs/guide.md, typed as it stands: each section on a machine of its own, with the sections that it builds on before it, on both
//! backends; then a look at what it promises, and last a SoftHSM that logs in with the old PIN and signs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod guide_common;
mod support;

use std::collections::BTreeSet;
use std::panic::catch_unwind;

use guide_common::{Block, GUIDE, Machine, blocks};
use support::*;

/// Makes the store of the guide, as the application's user.
const STORE: &str = "
signer() { runuser -u signer -- \"$@\"; }
for label in production staging; do
    signer softhsm2-util --init-token --free --label $label --pin 1234 --so-pin 5678
done
p11() { signer pkcs11-tool --module /usr/lib/softhsm/libsofthsm2.so --token-label production --login --pin 1234 \"$@\" 2>&1; }
p11 --keypairgen --key-type rsa:1024 --id 01 --label web-server --usage-sign
p11 --keypairgen --key-type EC:prime256v1 --id 02 --label code-signing --usage-sign
cd /dev/shm
echo 'a note' >note
chmod 644 note
p11 --write-object note --type data --label note
p11 --read-object --type pubkey --id 01 --output-file public.der
mv public.der /root/
rm note
# It is older than its backup: rsync leaves a directory the time at which it made it, if that is in the same second as the right one.
find /var/lib/softhsm/tokens -mindepth 1 -exec touch -d '2026-01-02 03:04:05.678901234' {} +
";

/// For what is looked at afterwards: what a store holds, with owners, modes and times; and a command that has to fail, which `!`
/// does not ask for under `set -e`.
const TREE: &str = "
not() { if \"$@\"; then echo \"not expected: $*\"; return 1; fi; }
tree() {
    mkdir -p /run/tree
    tokenfs mount -o ro \"$@\" /run/tree
    (cd /run/tree && find . -mindepth 1 -printf '%P %y %m %u:%g %T@\\n' | sort && find . -type f -exec sha256sum {} + | sort)
    tokenfs umount /run/tree
}
";

/// What SoftHSM must be able to do in the end: the user of the application, with the old PIN, and the old public key.
const SIGNS: &str = "
echo message >/dev/shm/message
chmod 644 /dev/shm/message
runuser -u signer -- pkcs11-tool --module /usr/lib/softhsm/libsofthsm2.so --token-label production --login --pin 1234 \
    --sign --mechanism SHA256-RSA-PKCS --id 01 --input-file /dev/shm/message --output-file /dev/shm/signature
openssl dgst -sha256 -verify /root/public.der -keyform DER -signature /dev/shm/signature /dev/shm/message
rm -f /dev/shm/message /dev/shm/signature
";

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
    /// Which backends the section is for.
    backends: &'static [Backend],
}

const BEFORE: &str = "Before you start";
const RSYNC: &str = "With rsync";
const TAR: &str = "With tar";
const RESTIC: &str = "With restic";
const BORG: &str = "With borg";
/// The store is what it was, down to owners, modes and times.
const SAME: &str = "tree | diff /root/reference - && signs";
const CHANGED_TO_DB: &str =
    "tree | diff /root/reference - && ls /var/lib/softhsm/tokens-*/*/sqlite3.db && signs";

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
        backends: &BACKENDS,
    }
}

const TRIALS: &[Trial] = &[
    section(BEFORE, &[], "", "tokenfs check | grep clean"),
    section(RSYNC, &[BEFORE], "", "tree >after && cmp after reference"),
    section(TAR, &[BEFORE], "", "stat -c %a /etc/softhsm/backup-passphrase /var/backups/softhsm/*.gpg | diff <(echo 600; echo 600) -"),
    section(RESTIC, &[BEFORE, TAR], "", "true"),
    section(BORG, &[BEFORE, TAR], "", "true"),
    section(
        "Every night",
        &[BEFORE],
        "",
        "mkdir /var/backups/softhsm/2001-01-{01..31}-030000 && env -i /usr/local/sbin/softhsm-backup
         ls -d /var/backups/softhsm/20* | wc -l | grep -x 30
         test -d /var/backups/softhsm/latest/*/token && not test -e /var/backups/softhsm/2001-01-02-030000
         # A copy that fails is an error, leaves no mount, and is not the latest.
         printf '#!/bin/sh\\nexit 23\\n' >/usr/local/bin/rsync; chmod 755 /usr/local/bin/rsync
         rm /var/backups/softhsm/latest; not softhsm-backup; not test -e /var/backups/softhsm/latest
         not grep -F fuse.tokenfs /proc/self/mountinfo",
    ),
    section("Check a backup", &[BEFORE, RSYNC], "", "tree | diff /root/reference - && not ls /dev/shm/scratch-*"),
    section("The whole store", &[BEFORE, RSYNC], LOST, SAME),
    section("The whole store, from tar", &[BEFORE, TAR], LOST, SAME),
    section("The whole store, from restic", &[BEFORE, TAR, RESTIC], LOST, SAME),
    section("The whole store, from borg", &[BEFORE, TAR, BORG], LOST, SAME),
    section(
        "One token",
        &[BEFORE, RSYNC],
        "rm -r $(grep -rla 'production ' /var/lib/softhsm/tokens | xargs dirname | sort -u)",
        SAME,
    ),
    section(
        "An object that was lost",
        &[BEFORE, RSYNC],
        "runuser -u signer -- pkcs11-tool --module /usr/lib/softhsm/libsofthsm2.so --token-label production --login --pin 1234 \
         --delete-object --type privkey --id 01",
        SAME_CONTENT,
    ),
    section(
        "An object that is damaged",
        &[BEFORE, RSYNC],
        "for file in /var/lib/softhsm/tokens/*/*-*.object; do
             [ -e \"$file\" ] || continue
             # The private RSA key is the longest.
             object=$(ls -S /var/lib/softhsm/tokens/*/*-*.object | head -n 1)
             truncate -s -3 \"$object\"
             break
         done
         for file in /var/lib/softhsm/tokens/*/sqlite3.db; do
             [ -e \"$file\" ] || continue
             sqlite3 \"$file\" \"update attribute_array set value = x'0102' where object_id =
                 (select object_id from attribute_integer where type = 0 and value = 3)\"
         done
         if tokenfs check; then exit 1; fi",
        SAME_CONTENT,
    ),
    section(
        "One attribute",
        &[BEFORE, RSYNC],
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
    Trial {
        backends: &[Backend::File],
        ..section("Without a mount", &[BEFORE], "", CHANGED_TO_DB)
    },
    Trial {
        backends: &[Backend::Db],
        ..section(
            "Without a mount, from db to file",
            &[BEFORE],
            "mv /var/lib/softhsm/tokens /var/lib/softhsm/tokens-db
             sed -i 's|/tokens/|/tokens-db|' /etc/softhsm/softhsm2.conf",
            "tree | diff /root/reference - && ls /var/lib/softhsm/tokens-file/*/token.object && signs",
        )
    },
    Trial {
        backends: &[Backend::File],
        ..section("With a mount of each", &[BEFORE], "", CHANGED_TO_DB)
    },
    section(
        "A plain copy for the file backend",
        &[BEFORE],
        "",
        "tree --tokendir /var/backups/softhsm/tokendir --backend file | diff /root/reference -
         rm -r /var/lib/softhsm/tokens && cp -a /var/backups/softhsm/tokendir /var/lib/softhsm/tokens
         sed -i 's|= db|= file|' /etc/softhsm/softhsm2.conf && signs",
    ),
    section(
        "What is in a backup",
        &[BEFORE, RSYNC],
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

fn of<'a>(all: &'a [Block], section: &str) -> Vec<&'a Block> {
    all.iter()
        .filter(|block| block.section == section)
        .collect()
}

fn try_on(trial: &Trial, backend: Backend, all: &[Block]) {
    let own = of(all, trial.section);
    println!("{backend}: {:?}, {} blocks", trial.section, own.len());
    let changes = trial.backends.len() == 1 || trial.section.starts_with("A plain copy");
    let machine = Machine::new(backend, changes);
    let functions = format!("{TREE}\nsigns() {{ {SIGNS}\n}}\n");
    machine.run(STORE);
    machine.run(&format!(
        "{functions} PATH=/opt:$PATH; tree >/root/reference"
    ));
    for earlier in trial.after {
        machine.follow(&of(all, earlier));
    }
    machine.run(trial.misfortune);
    let output = machine.follow(&own);
    machine.run(&format!("cat >/root/output <<'END'\n{output}END\n"));
    machine.run(&format!("{functions}{}", trial.proof));
}

fn the_guide_works(backend: Backend) {
    let all = blocks(GUIDE);
    let of_backend = TRIALS
        .iter()
        .filter(|trial| trial.backends.contains(&backend));
    let failed: Vec<&str> = of_backend
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
    let typed: BTreeSet<&str> = all.iter().map(|block| block.section.as_str()).collect();
    let tried: BTreeSet<&str> = TRIALS.iter().map(|trial| trial.section).collect();
    assert_eq!(
        typed, tried,
        "sections with commands, and sections that are tried"
    );
    println!("{} sections with {} blocks", typed.len(), all.len());
}
