#!/bin/sh
# Install the packages of apt.txt that are missing. Where it may not, it says what to run and goes on,
# unless IVSHMEM_LAB_REQUIRE (for example "qemu,chromium") names one of them.
set -u

list=$(dirname "$0")/apt.txt

find_missing() {
    missing=""
    while read -r package; do
        dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing="$missing $package"
    done <"$list"
}

find_missing
[ -z "$missing" ] && exit 0

if [ "$(id -u)" -eq 0 ]; then
    as_root=""
else
    as_root="sudo -n"
fi

# apt-get's own output matters only when it fails.
if command -v apt-get >/dev/null && ${as_root:-env} true 2>/dev/null; then
    echo "Installing with apt:$missing ..."
    log=$(mktemp)
    $as_root apt-get update -qq >"$log" 2>&1 || cat "$log" >&2
    for package in $missing; do
        $as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -qq --no-install-recommends "$package" >"$log" 2>&1 || cat "$log" >&2
    done
    rm -f "$log"
    find_missing
    [ -z "$missing" ] && exit 0
fi

echo "Not installed:$missing. Tests that need them are skipped. To install: sudo apt-get install --no-install-recommends$missing" >&2
for name in $(echo "${IVSHMEM_LAB_REQUIRE:-}" | tr ',' ' '); do
    case "$missing" in
        *" $name"*)
            echo "IVSHMEM_LAB_REQUIRE asks for $name: stopping here." >&2
            exit 1
            ;;
    esac
done
