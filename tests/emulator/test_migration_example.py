"""The example of docs/migration.md, as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from machines import LIMIT_S

from ivshmem_lab.guests import guest_path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "migration.md"


def script(text: str) -> tuple[str, str]:
    """Take the first console block apart: what is typed, and what the last command prints."""
    found = re.search(r"```console\n(.*?)```", text, re.DOTALL)
    assert found
    typed, said = [], []
    for line in found[1].splitlines():
        prompt = re.match(r"[$>] ", line)
        inside_document = typed and "<<'END'" in "\n".join(typed) and typed[-1] != "END"
        (typed if prompt or inside_document else said).append(line[2:] if prompt else line)
    return "\n".join(typed), "\n".join(said)


def test_the_example_moves_a_machine(tmp_path: Path) -> None:
    typed, said = script(DOCUMENT.read_text())
    memory = tmp_path / "shm"
    memory.mkdir()
    (tmp_path / "migrant.elf").symlink_to(guest_path("migrant"))
    commands = f"""
        unicorn-system-x86_64() {{ exec {shlex.quote(sys.executable)} -m ivshmem_lab.emulator "$@"; }}
        python() {{ {shlex.quote(sys.executable)} "$@"; }}
    """
    typed = typed.replace("/dev/shm", str(memory))
    shell = subprocess.Popen(
        ["bash", "-c", commands + typed],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert shell.stdout is not None
        printed = shell.stdout.readline()
        shell.wait(LIMIT_S)
    finally:
        os.killpg(shell.pid, signal.SIGTERM)
        _, errors = shell.communicate(timeout=LIMIT_S)
    assert (shell.returncode, errors) == (0, "")
    keys = [re.findall(r"'([a-z-]+)':", text) for text in (printed, said)]
    assert "'status': 'completed'" in printed
    assert keys[0][: len(keys[1])] == keys[1]
