"""The command line: what it refuses, what it explains, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ivshmem_lab import __version__
from ivshmem_lab.cli import main

WRONG_CALLS = {
    "": "no command is given; there are demo, up, vm, doctor, translate, trace, bench",
    "bench": "server, channel, device, doorbell, linux; none is given",
    "bench nope": "'nope' is none of them",
    "trace nowhere.jsonl": "nowhere.jsonl",
    "frobnicate": "invalid choice: 'frobnicate'",
    "demo --frobnicate": "unrecognized arguments: --frobnicate",
    "demo --round 5": "unrecognized arguments: --round 5",  # no abbreviations: they break with the next option
    "demo --rounds": "argument --rounds: expected one argument",
    "demo --rounds many": "--rounds 'many' is not a whole number",
    "demo --rounds -5": "--rounds '-5' is not a whole number",
    "demo --rounds 0": "rounds 0 is not allowed; 1 to 1000000",
    "demo --rounds 1000001": "rounds 1000001 is not allowed",
    "demo --bytes plenty": "--bytes 'plenty' is not a size",
    "demo --bytes 0": "bytes 0 is not allowed: whole chunks of 64K, less than 4G",
    "demo --bytes 100K": "bytes 100K is not allowed",
    "demo --bytes 4G": "bytes 4G is not allowed",
    "demo --figure picture": "figure 'picture' has no kind that is known; let it end in .png, .svg, .pdf",
    "demo --figure /no/where/a.png": "there is no directory '/no/where'; make it, or choose another",
    "demo --figure /proc/a.png": "figure '/proc/a.png' cannot be written",
    "demo --figure DIR.png": "DIR.png' is a directory; name a file in it",
}


@pytest.mark.parametrize("words", WRONG_CALLS)
def test_a_wrong_call_gets_one_line_that_names_it(words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DIR.png").mkdir()
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ivshmem-lab")
    assert err.count("\n") == 1
    assert WRONG_CALLS[words] in err
    assert [path.name for path in tmp_path.iterdir()] == ["DIR.png"]


def test_a_figure_that_is_there_is_untouched_by_the_look_at_it(tmp_path, monkeypatch) -> None:
    figure = tmp_path / "a.png"
    figure.write_bytes(b"old")
    assert main(["demo", "--figure", str(figure), "--bytes", "1"]) == 2
    assert figure.read_bytes() == b"old"


@pytest.mark.parametrize("words", [["--help"], ["demo", "--help"]])
def test_help_goes_to_stdout_and_has_an_example(words, capsys) -> None:
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\n  ivshmem-lab demo" in out
    assert "Exit status: 0 done" in out


def test_the_version(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ivshmem-lab {__version__}\n"


def test_the_package_runs_as_a_module() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "ivshmem_lab", "--version"], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, f"ivshmem-lab {__version__}\n", "")


def test_a_reader_that_left_is_said_in_one_line(tmp_path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "ivshmem_lab", "demo", "--no-qemu", "--rounds", "8", "--bytes", "64K"]
    run = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    os.close(writing)
    assert (run.returncode, run.stderr) == (1, "ivshmem-lab demo: nobody reads the results\n")
