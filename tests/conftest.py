"""What every test gets: directories of its own, the rule that nothing is left behind, and `run_cli`."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import hypothesis
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent

NEEDS = {"qemu": ("qemu", "qemu-system-x86_64"), "browser": ("chromium", "chromium")}
"""Marker: its name in IVSHMEM_LAB_REQUIRE, and the program that it needs."""

TOKEN_VARIABLE = "IVSHMEM_LAB_TEST_RUN"
"""Environment variable that every process started by this run inherits, however far it moves away."""

SETTLE_S = 2.0
"""Longest wait for threads and processes that are already on their way out."""

OPENED_ONCE = re.compile(r"/dev/urandom$|\.(ttf|otf|ttc)$")
"""Files that libraries open once and keep: the random source, and fonts (matplotlib caches open ones)."""

# How long a test takes says something about the machine's other work, and nothing about the code.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")

_required: set[str] = set()
_home = Path()


def pytest_configure(config: pytest.Config) -> None:
    """Read IVSHMEM_LAB_REQUIRE, and give the run its own directories before anything is imported."""
    global _home
    _required.update(filter(None, os.environ.get("IVSHMEM_LAB_REQUIRE", "").split(",")))
    known = {name for name, _ in NEEDS.values()}
    if unknown := _required - known:
        raise pytest.UsageError(f"IVSHMEM_LAB_REQUIRE names {sorted(unknown)}; it may name {sorted(known)}")

    # A short path: a Unix socket's may have 107 bytes, and TMPDIR can be long.
    _home = Path(tempfile.mkdtemp(prefix="ivlab-", dir="/tmp"))
    for variable, name in {
        "XDG_RUNTIME_DIR": "run",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "jupyter-run",
        "IPYTHONDIR": "ipython",
        "JUPYTER_PATH": "kernels",
    }.items():
        (_home / name).mkdir(mode=0o700)
        os.environ[variable] = str(_home / name)
    os.environ["JUPYTER_PLATFORM_DIRS"] = "1"
    os.environ["MPLBACKEND"] = "agg"
    os.environ[TOKEN_VARIABLE] = f"{_home.name}-{os.getpid()}"
    _write_kernelspec(_home / "kernels" / "kernels" / "python3")
    _forget_pythonpath()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the run's own directories."""
    if _home.name:
        shutil.rmtree(_home, ignore_errors=True)


def _write_kernelspec(directory: Path) -> None:
    """Make the kernel "python3" this very interpreter, with figures inline as in any notebook."""
    directory.mkdir(parents=True)
    environment = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    if older := os.environ.get("IVSHMEM_LAB_IPYKERNEL"):  # another ipykernel than the installed one: `make kernels`
        environment["PYTHONPATH"] = older
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
        "env": environment,
    }
    (directory / "kernel.json").write_text(json.dumps(spec))


def _forget_pythonpath() -> None:
    """Let processes find the installed package; keep PYTHONPATH only where there is none but the checkout."""
    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if (
        "PYTHONPATH" in os.environ
        and not subprocess.run(
            [sys.executable, "-c", "import ivshmem_lab"], env=without, cwd="/", stderr=subprocess.DEVNULL, check=False
        ).returncode
    ):
        del os.environ["PYTHONPATH"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here, or fail it when IVSHMEM_LAB_REQUIRE asks for it."""
    for marker, (name, program) in NEEDS.items():
        if item.get_closest_marker(marker) is None or shutil.which(program):
            continue
        if name in _required:
            pytest.fail(f"{program} is not on PATH, and IVSHMEM_LAB_REQUIRE asks for {name}", pytrace=False)
        pytest.skip(f"{program} is not on PATH")


@dataclass(frozen=True)
class Process:
    """One process: the same as long as its pid is, whatever it is doing."""

    pid: int
    words: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.words} (pid {self.pid})"


class Belongings(NamedTuple):
    """What this process and its offspring hold at one moment."""

    files: Counter[str]
    threads: Counter[threading.Thread]
    processes: Counter[Process]
    shared_memory: Counter[str]
    runtime_files: Counter[str]

    @classmethod
    def now(cls) -> Belongings:
        """Look at /proc, /dev/shm and the runtime directory."""
        return cls(
            files=Counter(target for target in _open_files() if not OPENED_ONCE.search(target)),
            threads=Counter(threading.enumerate()),
            processes=Counter(_offspring()),
            # Other programs of this machine make objects, too: ours are called ivshmem-something.
            shared_memory=Counter(map(str, Path("/dev/shm").glob("ivshmem*"))),
            runtime_files=Counter(_runtime_files()),
        )

    def beyond(self, before: Belongings) -> dict[str, list[str]]:
        """Name what is held now and was not held before."""
        return {
            kind: [f"{thing}" if count == 1 else f"{thing} ({count} of them)" for thing, count in (now - then).items()]
            for kind, now, then in zip(self._fields, self, before, strict=True)
            if now - then
        }


def _open_files() -> Iterator[str]:
    for fd in Path("/proc/self/fd").iterdir():
        try:
            yield str(fd.readlink())
        except FileNotFoundError:  # the directory that was just listed
            continue


def _runtime_files() -> Iterator[str]:
    runtime = os.environ["XDG_RUNTIME_DIR"]
    for folder, folders, files in os.walk(runtime):
        for name in folders + files:
            # The directory that all labs share stays; what they put into it does not.
            if (folder, name) != (runtime, "ivshmem-lab"):
                yield str(Path(folder, name))


def _offspring() -> Iterator[Process]:
    """Name our children (dead ones that nobody waited for, too) and all who carry our token."""
    me = os.getpid()
    token = f"{TOKEN_VARIABLE}={os.environ[TOKEN_VARIABLE]}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        pid = int(process.name)
        try:
            # The name, in parentheses, may hold anything; the state and the parent's pid follow it.
            name, _, rest = process.joinpath("stat").read_text(errors="replace").rpartition(")")
            state, parent = rest.split()[:2]
            dead = state == "Z"
            if int(parent) == me:
                ours = True
            else:
                ours = pid != me and not dead and token in process.joinpath("environ").read_bytes().split(b"\0")
            if ours:
                words = process.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                yield Process(pid, f"{name.partition('(')[2]}, dead but not waited for" if dead else words)
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone meanwhile, or somebody else's
            continue


def _left_behind(before: Belongings) -> dict[str, list[str]]:
    """Compare, giving what is about to end a moment to do so."""
    left = Belongings.now().beyond(before)
    if left:
        gc.collect()
        deadline = time.monotonic() + SETTLE_S
        never = threading.Event()
        while (left := Belongings.now().beyond(before)) and time.monotonic() < deadline:
            never.wait(0.02)
    return left


def _report(left: dict[str, list[str]]) -> str:
    return "\n".join(
        ["left behind:", *(f"  {kind.replace('_', ' ')}: {thing}" for kind in left for thing in left[kind])]
    )


@pytest.fixture(scope="session", autouse=True)
def _run_leaves_nothing_behind() -> Iterator[None]:
    """Fail the run's last test when fixtures of a wider scope leave processes, memory or sockets."""
    before = Belongings.now()
    yield
    left = _left_behind(before._replace(files=Belongings.now().files, threads=Belongings.now().threads))
    if left:
        pytest.fail(f"the whole run {_report(left)}", pytrace=False)


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves open files, threads, processes, shared memory or sockets.

    What fixtures of a wider scope opened was there before, and is allowed.
    """
    before = Belongings.now()
    yield
    left = _left_behind(before)
    if left:
        pytest.fail(f"{request.node.nodeid} {_report(left)}", pytrace=False)


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run one of our commands, ``run_cli(["ivshmem-lab", "demo"], timeout_s=30)``, and return what it said."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]

    def run(argv: Sequence[str], timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
        # What an installed script does; it works from a bare checkout as well.
        module, function = scripts[argv[0]].split(":")
        code = f"import sys; from {module} import {function}; sys.argv[0] = {argv[0]!r}; sys.exit({function}())"
        return subprocess.run(
            [sys.executable, "-c", code, *argv[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run
