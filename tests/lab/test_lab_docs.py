"""The Python blocks of ``docs/hotplug.md`` and ``docs/migration.md`` run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_examples_of_the_guide_to_hotplug_run_in_the_order_of_the_page(capsys):
    text = (DOCS / "hotplug.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    names = {}
    try:
        for block in blocks:
            exec(compile(block, "docs/hotplug.md", "exec"), names)
    finally:
        if "lab" in names:
            names["lab"].close()
    said = capsys.readouterr().out
    assert said.startswith("pci.0 slot 0x02 is peer 0\nhot0 in alice, pci.0 slot 0x02: absent, peer 0\n")
    assert said.endswith("\nabsent\n")
    shown = re.search(r"^`print\(device\)` shows.*?^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1]

    def steps(text):
        return [re.sub(r"^ +[\d.]+ ms", "", line) for line in text.splitlines() if re.match(r" +[\d.]+ ms", line)]

    assert steps(said) == steps(shown)


def test_the_example_of_the_guide_to_migration_runs(capsys):
    text = (DOCS / "migration.md").read_text(encoding="utf-8")
    example, on_two_hosts = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert all(line.startswith("#") for line in on_two_hosts.splitlines())
    names = {}
    try:
        exec(compile(example, "docs/migration.md", "exec"), names)
    finally:
        if "lab" in names:
            names["lab"].close()
    assert capsys.readouterr().out.startswith("alice has moved to bob in ")
