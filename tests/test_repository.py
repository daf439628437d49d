"""What the checkout, the wheel, the notebooks and Binder's folder promise each other."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import ivshmem_lab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BINDER = ROOT / "binder"
FIRST_NOTEBOOK = "notebooks/00-start-here.ipynb"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NOT_SHIPPED = shutil.ignore_patterns("__pycache__")


# Versions


def test_the_package_and_pyproject_agree_on_the_version() -> None:
    assert ivshmem_lab.__version__ == PROJECT["version"]


def test_the_changelog_has_a_section_for_this_version() -> None:
    sections = re.findall(r"^## \[?([\w.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert PROJECT["version"] in sections


# Commands


@pytest.mark.parametrize("script", PROJECT["scripts"])
def test_each_command_explains_itself_with_an_example(
    script: str, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    run = run_cli([script, "--help"])
    assert (run.returncode, run.stderr) == (0, "")
    assert "example" in run.stdout.lower()
    assert re.search(rf"^\W*{script} -|^\W*{script} [a-z]", run.stdout, re.MULTILINE), "no example line to copy"


@pytest.mark.parametrize("script", PROJECT["scripts"])
def test_ctrl_c_while_a_command_loads_is_a_quiet_end(script: str) -> None:
    module, function = PROJECT["scripts"][script].split(":")
    code = f"""
import signal, sys
class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name.endswith(".cli"):
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, CtrlC())
from {module} import {function}
sys.exit({function}())
"""
    run = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, timeout=30, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (130, b"", b"")


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Build the wheel from a copy of what is needed for it, and name the files in it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "ivshmem_lab", source / "ivshmem_lab", ignore=NOT_SHIPPED)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", target, source]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = target.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_file_of_the_package(wheel: set[str]) -> None:
    files = {path for path in (ROOT / "ivshmem_lab").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {name for name in wheel if name.startswith("ivshmem_lab/")} == {
        str(path.relative_to(ROOT)) for path in files
    }


@pytest.mark.parametrize(
    "pattern",
    [
        r"ivshmem_lab/py\.typed",
        r"ivshmem_lab/guests/.*probe\.elf",
        r"ivshmem_lab/guests/.*pingpong\.elf",
        r"ivshmem_lab/guests/.*stream\.elf",
        r"ivshmem_lab/guests/.*echo\.elf",
        r"ivshmem_lab/guests/.*\.json",
        r"ivshmem_lab/guests/.*\.c",
        r"ivshmem_lab/guests/.*\.S",
        r"ivshmem_lab/guests/.*\.ld",
        r"ivshmem_lab-[\d.]+\.dist-info/licenses/LICENSE",
    ],
)
def test_the_wheel_holds_guests_types_and_licence(wheel: set[str], pattern: str) -> None:
    assert any(re.fullmatch(pattern, name) for name in wheel)


# Notebooks


def test_the_first_notebook_is_there() -> None:
    assert ROOT / FIRST_NOTEBOOK in NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_saved_without_results(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert (cell.get("execution_count"), cell.get("outputs", [])) == (None, []), cell.source


# Binder


def pins() -> dict[str, Version]:
    """Read binder/requirements.txt, which ends with this package itself."""
    lines = [line for line in (BINDER / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines.pop() == "-e ."
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def everything_under(requirements: Iterable[Requirement]) -> set[str]:
    """Name what these requirements need, and what that needs, from what is installed here."""
    names: set[str] = set()
    todo = [(requirement, "") for requirement in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        names.add(canonicalize_name(requirement.name))
        for further in importlib.metadata.requires(requirement.name) or []:
            # Each extra asks once more; "" asks for what is needed without any.
            todo.extend((Requirement(further), asked) for asked in {"", *requirement.extras})
    return names


LAB = [Requirement(text) for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["lab"]]]


@pytest.mark.parametrize("requirement", LAB, ids=lambda requirement: requirement.name)
def test_a_binder_pin_is_within_our_range(requirement: Requirement) -> None:
    assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_binder_pins_everything_that_will_be_installed() -> None:
    assert everything_under(LAB) <= set(pins())


def test_binder_takes_the_kernel_whose_threads_were_looked_at() -> None:
    # Which thread runs a widget's callback differs from one minor version of ipykernel to the next.
    assert pins()["ipykernel"] == Version("7.4.0")


def test_binder_runs_a_python_that_we_support() -> None:
    name, version = (BINDER / "runtime.txt").read_text().strip().split("-")
    assert name == "python"
    assert Version(version) in SpecifierSet(PROJECT["requires-python"])


def test_repo2docker_accepts_the_folder(tmp_path: Path) -> None:
    shutil.copytree(BINDER, tmp_path / "binder")
    # Without docker: it reads the folder and prints the Dockerfile that it would build.
    command = [sys.executable, "-m", "repo2docker", "--no-build", "--debug", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert "Building conda environment for python=3.11\n" in run.stderr
    steps = [
        r"apt-get install .*\bqemu-system-x86\b",
        r"^COPY .* src/ \$\{REPO_DIR\}",  # `-e .` needs the checkout to be there
        r'pip install .*-r "binder/requirements\.txt"',
        r"^RUN \./binder/postBuild",
    ]
    found = [re.search(step, run.stdout, re.MULTILINE) for step in steps]
    places = [match.start() for match in found if match]
    assert len(places) == len(steps), run.stdout
    assert places == sorted(places), run.stdout


def test_post_build_makes_jupyter_open_the_first_notebook(tmp_path: Path) -> None:
    bin_directory = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "PATH": f"{bin_directory}:{os.environ['PATH']}",
    }
    subprocess.run([BINDER / "postBuild"], cwd=ROOT, env=environment, timeout=60, check=True)
    (written,) = (tmp_path / "config").iterdir()
    assert json.loads(written.read_text())["LabApp"]["default_url"] == f"/lab/tree/{FIRST_NOTEBOOK}"


# The Makefile


def test_a_python_that_is_too_old_gets_one_clear_line(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    run = subprocess.run(
        ["make", "-C", tmp_path, ".venv/bin/python", "PYTHON=/nowhere/python3.9"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "ivshmem-lab needs Python 3.11 or newer, and '/nowhere/python3.9' is not" in run.stderr.splitlines()[0]
    assert not (tmp_path / ".venv").exists()
