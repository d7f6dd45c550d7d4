# Installs what is missing, on Debian and what derives from it. Sourced after common.sh.
# shellcheck shell=bash disable=SC2034

# To build tokenfs (the SQLite that it links is compiled from C).
PACKAGES_BUILD=(build-essential pkg-config ca-certificates)

# What the demo needs besides: a SoftHSM, something that makes keys in it, and FUSE.
PACKAGES_DEMO=(softhsm2 opensc openssl fuse3)

# What the tests need besides: clients of SoftHSM, the libraries of its `db` build, the tools that must simply work in a
# mount, and what looks at a mount from outside.
PACKAGES_TEST=(
    gnutls-bin libssl-dev libsqlite3-dev
    acl attr bindfs borgbackup e2fsprogs gnupg nano openssl procps python3 restic rsync sqlite3 strace tmux util-linux vim xz-utils
    shellcheck
)

# missing_packages PACKAGE…: those that are not installed, one per line.
missing_packages() {
    local package
    for package in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || printf '%s\n' "$package"
    done
}

# install_missing PACKAGE…: calls apt-get only when something is missing.
install_missing() {
    local missing
    if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
        die "this is no Debian, and nothing is installed here by itself. Install what these Debian packages have: $*"
    fi
    mapfile -t missing < <(missing_packages "$@")
    [ "${#missing[@]}" != 0 ] || return 0
    say "installing ${missing[*]}"
    # An unattended apt-get asks nothing and starts no services' dialogues. It fails on an old list: hence the update.
    if ! as_root true 2>/dev/null; then
        die "neither root nor sudo. Have an administrator run:  apt-get install ${missing[*]}"
    fi
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq </dev/null >&2 || say "apt-get update failed; trying with the lists there are"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        -o Dpkg::Use-Pty=0 "${missing[@]}" </dev/null >&2 ||
        die "could not install ${missing[*]}: see apt-get's messages above"
}

# need_cargo: rustup's cargo may not be on the path of a shell that asks nothing.
need_cargo() {
    command -v cargo >/dev/null || PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
    command -v cargo >/dev/null ||
        die "no cargo. Install Rust 1.89 or newer, with rustup (https://rustup.rs) or from your distribution"
}

# need_fuse: a machine without udev has /dev/fuse for root alone, or not at all.
need_fuse() {
    if [ ! -e /dev/fuse ]; then
        as_root modprobe fuse 2>/dev/null || true
        [ -e /dev/fuse ] || as_root mknod -m 0666 /dev/fuse c 10 229 2>/dev/null || true
        [ -e /dev/fuse ] || die "no /dev/fuse: this kernel or container has no FUSE"
    fi
    if [ "$(stat -c %a /dev/fuse)" != 666 ] && [ "$(id -u)" = 0 ]; then
        say "/dev/fuse has mode $(stat -c %a /dev/fuse), as on a machine without udev: setting 0666, so that ordinary users can mount"
        chmod 0666 /dev/fuse
    fi
    if [ ! -r /dev/fuse ] || [ ! -w /dev/fuse ]; then
        die "/dev/fuse cannot be opened by $(id -un): as root, run  chmod 0666 /dev/fuse"
    fi
}
