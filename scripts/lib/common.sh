# Functions that the scripts share. Sourced, not run: `. "$(dirname "$0")/lib/common.sh"`.
# shellcheck shell=bash disable=SC2034

# The root of the source tree.
TOKENFS_SOURCE=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# What outlives a run and is no part of the source tree.
TOKENFS_CACHE=${TOKENFS_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/tokenfs}

# say TEXT…: what happens next, on standard error, so that it never mixes with a result.
say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }

# die TEXT…: ends the script.
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# run COMMAND…: prints a command the way one would type it, then runs it.
run() {
    printf '\n\033[1m$ %s\033[0m\n' "$(quoted "$@")"
    "$@"
}

# quoted COMMAND…: with quotes only where a shell needs them.
quoted() {
    local word out=
    for word in "$@"; do
        case $word in
            '' | *[!A-Za-z0-9_./:=@%+,-]*) out+=" '${word//\'/\'\\\'\'}'" ;;
            *) out+=" $word" ;;
        esac
    done
    printf '%s' "${out# }"
}

# as_root COMMAND…: as root, through sudo if need be.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        return 126
    fi
}
