"""Fetching packages with apt as an ordinary user: lists and cache in a folder of ours, nothing is installed.

The machine's own sources and keys are used (``/etc/apt``), so it asks the same archive as the machine does.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import LinuxImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_TIME_LIMIT_S = 600.0
_URI = re.compile(r"^'[^']*' (\S+) (\d+)", re.MULTILINE)
_REMEDY = "give a kernel of your own with --kernel and --initrd, or build the image where apt works and copy the cache"

# Lists and caches are ours; hooks of the machine (cleaning, notifying) are for root and its directories.
_CONFIGURATION = """\
Dir::State::lists "{root}/lists";
Dir::Cache "{root}/cache";
Dir::Log "{root}";
APT::Sandbox::User "";
Acquire::Retries "2";
Acquire::http::Timeout "30";
Acquire::Languages "none";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""


class Apt:
    """apt with private directories.

    Parameters
    ----------
    root
        The folder; made when it is not there.
    say
        Called with what is being done.

    Raises
    ------
    LinuxImageError
        There is no apt here.
    """

    def __init__(self, root: Path, say: Callable[[str], None]) -> None:
        for program in ("apt-get", "dpkg-deb"):
            if shutil.which(program) is None:
                raise LinuxImageError(f"{program} is not on PATH: this is no Debian or Ubuntu; {_REMEDY}")
        self._packages = root / "packages"
        self._say = say
        for path in (root / "lists" / "partial", root / "cache" / "archives" / "partial", self._packages):
            path.mkdir(parents=True, exist_ok=True)
        self._configuration = root / "apt.conf"
        self._configuration.write_text(_CONFIGURATION.format(root=root))

    def update(self) -> None:
        """Fetch the lists of packages."""
        self._say("fetching the lists of packages")
        self._get(["update", "-q"], "the lists of packages cannot be fetched")

    def fetch(self, package: str) -> Path:
        """Return the file of a package's newest version, downloaded when it is not there yet."""
        uris = self._get(["download", "--print-uris", "-q", package], f"package {package} cannot be found")
        found = _URI.search(uris)
        if found is None:
            raise LinuxImageError(f"apt-get says no address for package {package}: {uris.strip()[-300:]!r}; {_REMEDY}")
        path = self._packages / Path(found[1]).name
        if not path.is_file() or path.stat().st_size != int(found[2]):
            self._say(f"fetching {package}, {int(found[2]) / 1e6:.1f} MB")
            with tempfile.TemporaryDirectory(dir=self._packages) as place:
                # apt checks what it fetched against the signed lists.
                self._get(["download", "-q", package], f"package {package} cannot be fetched", cwd=place)
                (fetched,) = Path(place).glob("*.deb")
                fetched.replace(path)
        return path

    def _get(self, arguments: Sequence[str], failure: str, cwd: str | None = None) -> str:
        command = ["apt-get", "-c", str(self._configuration), *arguments]
        done = _run(command, failure, cwd)
        # `update` ends with 0 although an archive could not be reached, and warns.
        if done.returncode or re.search(r"^[EW]: Failed to fetch", done.stderr, re.MULTILINE):
            said = " ".join(done.stderr.split())[-400:] or f"exit status {done.returncode}"
            raise LinuxImageError(f"{failure}; is the network there? apt-get said: {said}; {_REMEDY}")
        return done.stdout


def read_depends(deb: Path) -> list[str]:
    """Return the names of the packages that one depends on, first alternatives only."""
    done = _run(["dpkg-deb", "-f", str(deb), "Pre-Depends", "Depends"], f"{deb.name} cannot be read")
    if done.returncode:
        raise LinuxImageError(f"{deb.name} cannot be read: {done.stderr.strip()}; delete it and try again")
    words = re.sub(r"^[\w-]+:", "", done.stdout, flags=re.MULTILINE).replace("\n", ",").split(",")
    return [match[1] for word in words if (match := re.match(r"\s*([a-z0-9][a-z0-9+.-]+)", word))]


def unpack(deb: Path, target: Path) -> None:
    """Unpack a package's files under a folder, without installing it."""
    done = _run(["dpkg-deb", "-x", str(deb), str(target)], f"{deb.name} cannot be unpacked")
    if done.returncode:
        with contextlib.suppress(OSError):
            deb.unlink()
        raise LinuxImageError(f"{deb.name} cannot be unpacked: {done.stderr.strip()}; it was deleted, try again")


def _run(command: Sequence[str], failure: str, cwd: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIME_LIMIT_S,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LinuxImageError(f"{failure}: {error}; {_REMEDY}") from error
