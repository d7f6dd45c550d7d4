# shellcheck shell=bash
# Makes two machines out of this one, in the mount and PID namespace that it is called in, and stays until it is killed: each has all files
# of this machine in an overlay, so that a guide can write to /etc, /var and /usr/local and nothing of it is left.
#
#   machine.sh WORK TOKENFS BACKEND PREFIX
#
# WORK/here is the one where the guide is followed, and WORK/new-host the one that ssh reaches. TOKENFS is the program that
# `cargo build` makes. If PREFIX is not empty, SoftHSM is the one that is installed there.
set -euo pipefail
work=$1 tokenfs=$2 backend=$3 prefix=$4

mount -t tmpfs -o mode=755 tmpfs "$work"

machine() {
    local root=$work/$1 layers=$work/layers/$1 uid=$2 place
    mkdir -p "$root" "$layers/upper" "$layers/work"
    mount -t overlay -o "lowerdir=/,upperdir=$layers/upper,workdir=$layers/work" overlay "$root"
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
    mount -t tmpfs -o mode=755 tmpfs "$root/mnt"
    chroot "$root" useradd --uid "$uid" --no-user-group --gid softhsm --no-create-home --home-dir /nonexistent signer
    # What Debian's package makes.
    mount -t tmpfs -o mode=2770 tmpfs "$root/var/lib/softhsm"
    mkdir -m 2770 "$root/var/lib/softhsm/tokens"
    chgrp softhsm "$root/var/lib/softhsm" "$root/var/lib/softhsm/tokens"
    chmod 2770 "$root/var/lib/softhsm/tokens"
    printf '%s\n' '# SoftHSM v2 configuration file' '' \
        'directories.tokendir = /var/lib/softhsm/tokens/' "objectstore.backend = $backend" '' \
        'log.level = ERROR' 'slots.removable = false' 'slots.mechanisms = ALL' 'library.reset_on_fork = false' \
        >"$root/etc/softhsm/softhsm2.conf"
    chgrp softhsm "$root/etc/softhsm/softhsm2.conf"
    chmod 640 "$root/etc/softhsm/softhsm2.conf"
    if [ -n "$prefix" ]; then
        for place in lib/softhsm/libsofthsm2.so bin/softhsm2-util; do
            cp "$prefix/$place" "$root/usr/$place"
        done
        ln -sf /etc/softhsm/softhsm2.conf "$root$prefix/etc/softhsm2.conf"
        # Its own user has to get there.
        place=$prefix/lib/softhsm/libsofthsm2.so
        while [ "$place" != / ]; do
            chmod o+rX "$root$place"
            place=$(dirname "$place")
        done
    fi
}

machine here 4001
machine new-host 4002

# The clone, and what stands in for a build of ten minutes and for another machine. Everything else is real.
mkdir -p "$work/here/root/clone" "$work/here/opt/stand-ins"
cat >"$work/here/opt/stand-ins/cargo" <<END
#!/bin/sh
[ "\$*" = 'build --release' ] || { echo "cargo \$*: not in this test" >&2; exit 1; }
mkdir -p target/release && ln -sf /opt/tokenfs target/release/tokenfs
END
# ssh waits for the end of what it started, and until nobody has the pipe open any more; so does this.
cat >"$work/here/opt/stand-ins/ssh" <<END
#!/bin/sh
out=\$(mktemp)
if [ "\$1" = -n ]; then shift; exec </dev/null; fi
{ nsenter --root=/proc/1/root --wd=/proc/1/root /usr/sbin/chroot $work/new-host env -i HOME=/root PATH="\$PATH" sh -c "cd /root; \$2"; echo \$? >"\$out"; } | cat
read -r code <"\$out"
rm "\$out"
exit "\$code"
END
chmod 755 "$work/here/opt/stand-ins/"*
for root in here new-host; do
    touch "$work/$root/opt/tokenfs"
    mount --bind "$tokenfs" "$work/$root/opt/tokenfs"
done
# The new host is ready.
ln -s /opt/tokenfs "$work/new-host/usr/local/bin/tokenfs"
mkdir -p "$work/new-host/mnt/tokens"

echo ready
exec sleep infinity
