"""The command ``ivshmem-lab up``."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ivshmem_lab.cli import main

DOC = Path(__file__).resolve().parent.parent / "docs" / "topology.md"


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """Take the example out of the documentation."""
    found = re.search(r"```yaml\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert found
    path = tmp_path / "lab.yaml"
    path.write_text(found[1])
    return path


def test_the_documented_example_starts_and_ends(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--json", "--exit-after", "0", str(example)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["plan"][0] == "create server board (4M, 2 vectors)"
    assert shown["plan"][-1] == "plug alice: memory scratch"
    table = "\n".join(shown["table"])
    assert re.search(r"^alice +\S.* running +1 ", table, re.MULTILINE), table
    assert re.search(r"^me +host peer +connected ", table, re.MULTILINE), table
    assert re.search(r"^scratch ", table, re.MULTILINE), table


def test_ctrl_c_ends_it_with_status_0(example: Path) -> None:
    command = [sys.executable, "-m", "ivshmem_lab", "up", str(example)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("me "):
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "everything is ended" in err


def test_problems_of_a_file_come_with_line_and_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lab.yaml"
    path.write_text("version: 1\nvms:\n  alice:\n    devices:\n      - server: board\n")
    assert main(["up", str(path)]) == 2
    assert f"{path}:5:9: vms.alice.devices[0].server: there is no server 'board'" in capsys.readouterr().err


def test_what_is_not_there_comes_with_line_and_column_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lab.yaml"
    path.write_text("version: 1\nvms:\n  alice:\n    guest: nope\n    cpu: 4096\n")
    assert main(["up", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{path}:4:5: vms.alice.guest: guest 'nope' is unknown; there are " in err
    assert f"{path}:5:5: vms.alice.cpu: cpu 4096 is not one this process may use" in err
