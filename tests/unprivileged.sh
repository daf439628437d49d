#!/bin/sh
# Runs tests as a user without rights, without KVM, in 2 GB of memory: what Binder gives. Needs root to become that user.
#
# usage: tests/unprivileged.sh [PYTEST-ARGUMENT ...]        (default: tests/lab tests/vm tests/qemu)
# The tree is copied for a user id that nobody has, with a private /dev/shm and no capabilities, and a memory cgroup limits all
# processes together (v2 or v1; where neither can be written, the address space of each process is limited to 4 GB instead,
# and a line says so). It ends by itself after LIMIT_S seconds, and leaves nothing.
set -eu
: "${LIMIT_S:=1800}" "${MEMORY_BYTES:=2147483648}" "${UNPRIVILEGED_UID:=61184}"

[ "$(id -u)" = 0 ] || { echo "unprivileged.sh: run it as root: it becomes another user" >&2; exit 2; }
here=$(cd "$(dirname "$0")/.." && pwd)
python=$here/.venv/bin/python
[ -x "$python" ] || { echo "unprivileged.sh: no $python; run make test first" >&2; exit 2; }
[ $# -gt 0 ] || set -- tests/lab tests/vm tests/qemu

work=$(mktemp -d /tmp/unprivileged.XXXXXX)
group=
case $(stat -fc %T /sys/fs/cgroup) in
  cgroup2fs) group=/sys/fs/cgroup/unprivileged.$$ limit=memory.max ;;
  *) group=/sys/fs/cgroup/memory/unprivileged.$$ limit=memory.limit_in_bytes ;;
esac
if mkdir "$group" 2>/dev/null && echo "$MEMORY_BYTES" 2>/dev/null >"$group/$limit"; then
  echo "memory: $MEMORY_BYTES bytes for all processes together, by a cgroup"
else
  rmdir "$group" 2>/dev/null || true
  group=
  echo "memory: no cgroup can be written here; each process is limited to 4 GB of address space instead"
fi
clean() {
  [ -z "$group" ] || { for pid in $(cat "$group/cgroup.procs"); do kill -9 "$pid" 2>/dev/null || true; done; sleep 1; rmdir "$group"; }
  rm -rf "$work"
}
trap clean EXIT INT TERM

(cd "$here" && git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf -) | tar -xf - -C "$work"
mkdir "$work/home" "$work/tmp"
chmod 755 "$work"
chown -R "$UNPRIVILEGED_UID:$UNPRIVILEGED_UID" "$work"

export WORK="$work" HERE="$here" PYTHON_HOME="$(dirname "$(dirname "$(readlink -f "$python")")")"
export GROUP="$group" ID="$UNPRIVILEGED_UID" LIMIT="$LIMIT_S" ROOT_HOME="$(getent passwd 0 | cut -d: -f6)"
# In a mount namespace of its own, root's home can be opened for the one Python that may lie in it, and KVM is gone.
unshare -m sh -eu -c '
  mount -t tmpfs -o size=1g,mode=1777 none /dev/shm
  [ ! -e /dev/kvm ] || mount --bind /dev/null /dev/kvm
  case $PYTHON_HOME in "$ROOT_HOME"/*)
    mkdir "$WORK/python" && mount --bind "$PYTHON_HOME" "$WORK/python"
    mount -t tmpfs -o mode=755 none "$ROOT_HOME"
    mkdir -p "$PYTHON_HOME" && mount --bind "$WORK/python" "$PYTHON_HOME" && umount "$WORK/python" ;;
  esac
  if [ -n "$GROUP" ]; then echo $$ >"$GROUP/cgroup.procs"; else ulimit -v 4194304; fi
  cd "$WORK"
  exec setpriv --reuid "$ID" --regid "$ID" --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs \
    env -i PATH="$PATH" LANG="${LANG:-C.UTF-8}" HOME="$WORK/home" TMPDIR="$WORK/tmp" PYTHONPATH="$WORK" \
    timeout "$LIMIT" "$HERE/.venv/bin/python" -m pytest -p no:cacheprovider -q "$@"
' sh "$@"
