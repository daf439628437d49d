"""The rooms: who may import whom, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(__file__).resolve().parent.parent / "ivshmem_lab"

ORDER = [
    *("errors", "units", "keyval"),
    *("wire", "device", "pc", "topology", "stats"),
    *("ipc", "server", "peer", "trace", "emulator", "guests", "vm"),
    *("lab", "bench", "plots", "widgets"),
    *("demo", "doctor", "magics", "translate", "up", "vm_cli", "cli", "entry", "__main__"),
]
"""A room imports only from rooms before it."""

FLOOR = {"errors", "units", "keyval"}
NARROWER = {
    "wire": FLOOR,
    "device": FLOOR,
    "pc": FLOOR | {"device"},
    "topology": FLOOR,
    "stats": FLOOR,
    "ipc": FLOOR,
    "server": FLOOR | {"wire", "ipc"},
    "peer": FLOOR | {"wire", "ipc"},
    "emulator": FLOOR | {"wire", "device", "pc", "ipc"},
    "guests": FLOOR,
    "plots": FLOOR | {"stats"},
}
"""Rooms that may import less than everything before them."""

PURE = ["errors", "units", "keyval", "wire", "device", "pc", "topology", "stats"]
EFFECTS = {"asyncio", "fcntl", "mmap", "multiprocessing", "selectors", "signal", "socket", "subprocess", "threading"}
HEAVY = ["IPython", "anywidget", "ipywidgets", "matplotlib", "numpy", "posix_ipc", "qemu", "unicorn", "yaml", "zmq"]
MOST_LINES = 400

FRONT_DOOR = PACKAGE / "__init__.py"
MODULES = sorted(PACKAGE.rglob("*.py"))
IN_ROOMS = [path for path in MODULES if path != FRONT_DOOR]


def module_name(path: Path) -> str:
    """Name a module the way Python does."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.Module, package: list[str]) -> Iterator[str]:
    """Name everything that a module imports anywhere in it, in full: "ivshmem_lab.wire.messages"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> list[str]:
    """Read the imports of one of our modules."""
    package = list(path.relative_to(PACKAGE.parent).parent.parts)
    return list(imported(ast.parse(path.read_text(), str(path)), package))


def room_of(name: str) -> str:
    """Name the room of a dotted name below ``ivshmem_lab``."""
    return name.split(".")[1]


def allowed_for(room: str) -> set[str]:
    """Name the rooms that a room may import from, itself included."""
    return {room} | NARROWER.get(room, set(ORDER[: ORDER.index(room)]))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import ivshmem_lab.wire.messages", ["ivshmem_lab.wire.messages"]),
        ("from ivshmem_lab.ipc import memory", ["ivshmem_lab.ipc.memory"]),
        ("from . import memory", ["ivshmem_lab.ipc.memory"]),
        ("from .memory import SharedMemory", ["ivshmem_lab.ipc.memory.SharedMemory"]),
        ("from .. import units", ["ivshmem_lab.units"]),
        ("def f():\n  from ..lab.lab import Lab", ["ivshmem_lab.lab.lab.Lab"]),
        ("if TYPE_CHECKING:\n  import unicorn as uc, numpy", ["unicorn", "numpy"]),
    ],
)
def test_the_reader_of_imports_names_them_in_full(text: str, names: list[str]) -> None:
    assert list(imported(ast.parse(text), ["ivshmem_lab", "ipc"])) == names


def test_no_room_is_allowed_what_comes_after_it() -> None:
    for room, allowed in NARROWER.items():
        assert allowed < set(ORDER[: ORDER.index(room)]) | {room}


@pytest.mark.parametrize("path", IN_ROOMS, ids=module_name)
def test_a_room_imports_only_from_rooms_above_it(path: Path) -> None:
    room = room_of(module_name(path))
    assert room in ORDER, f"{room} is a new room: give it a place in ORDER"
    ours = [name for name in imports_of(path) if name.startswith("ivshmem_lab.") and name != "ivshmem_lab.__version__"]
    assert {name for name in ours if room_of(name) not in allowed_for(room)} == set()


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_the_engine_imports_unicorn(path: Path) -> None:
    uses_unicorn = any(name.split(".")[0] == "unicorn" for name in imports_of(path))
    assert not uses_unicorn or path == PACKAGE / "emulator" / "engine.py"


@pytest.mark.parametrize("path", [path for path in IN_ROOMS if room_of(module_name(path)) in PURE], ids=module_name)
def test_a_pure_room_leaves_the_operating_system_alone(path: Path) -> None:
    assert {name.split(".")[0] for name in imports_of(path)} & EFFECTS == set()


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_module_says_what_it_is_for_and_fits_in_a_head(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{module_name(path)} has no docstring"
    assert len(text.splitlines()) <= MOST_LINES


def loaded_by(*modules: str) -> set[str]:
    """Import modules in a new interpreter; name the heavy packages that came with them."""
    code = f"import sys, {', '.join(modules)}; print(*(name for name in {HEAVY} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("ivshmem_lab") == set()


@pytest.mark.parametrize("room", PURE)
def test_a_pure_room_loads_nothing_heavy(room: str) -> None:
    modules = [module for module in map(module_name, IN_ROOMS) if room_of(module) == room]
    assert loaded_by("ivshmem_lab", *modules) <= {"stats": {"numpy"}, "topology": {"yaml"}}.get(room, set())


def test_the_reader_of_loaded_packages_sees_a_heavy_one() -> None:
    assert "numpy" in loaded_by("numpy")


def test_the_package_offers_its_public_names() -> None:
    code = "import ivshmem_lab; print(*(getattr(ivshmem_lab, name) is not None for name in ivshmem_lab.__all__))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert set(run.stdout.split()) == {"True"}, run.stderr
