//! The store of the guide, and what befalls it and is looked at, in shell.

/// Makes the store of the guide, as the application's user.
pub const STORE: &str = "
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
pub const TREE: &str = "
not() { if \"$@\"; then echo \"not expected: $*\"; return 1; fi; }
tree() {
    mkdir -p /run/tree
    tokenfs mount -o ro \"$@\" /run/tree
    (cd /run/tree && find . -mindepth 1 -printf '%P %y %m %u:%g %T@\\n' | sort && find . -type f -exec sha256sum {} + | sort)
    tokenfs umount /run/tree
}
";

/// What SoftHSM must be able to do in the end: the user of the application, with the old PIN, and the old public key.
pub const SIGNS: &str = "
echo message >/dev/shm/message
chmod 644 /dev/shm/message
runuser -u signer -- pkcs11-tool --module /usr/lib/softhsm/libsofthsm2.so --token-label production --login --pin 1234 \
    --sign --mechanism SHA256-RSA-PKCS --id 01 --input-file /dev/shm/message --output-file /dev/shm/signature
openssl dgst -sha256 -verify /root/public.der -keyform DER -signature /dev/shm/signature /dev/shm/message
rm -f /dev/shm/message /dev/shm/signature
";

/// An object is damaged.
pub const DAMAGE: &str = "
for file in /var/lib/softhsm/tokens/*/*-*.object; do
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
if tokenfs check; then exit 1; fi";

/// A shell function that loses the whole store, after a backup that was incomplete and is the latest.
pub const INCOMPLETE: &str = r#"
lost_after_an_incomplete() {
    damage
    not softhsm-backup "$1"
    find /var/lib/softhsm/tokens -mindepth 1 -delete
}"#;
