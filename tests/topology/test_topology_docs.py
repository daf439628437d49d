"""The examples of ``docs/topology.md``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ivshmem_lab.topology.formats.whole import WHOLE_FORMATS

if TYPE_CHECKING:
    import pytest

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "topology.md").read_text(encoding="utf-8")


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    exec(compile(block, "docs/topology.md", "exec"), {})
    assert capsys.readouterr().out == (
        "stop vm alice (unicorn, pc, guest probe)\nremove vm alice (unicorn, pc, guest probe)\n"
    )


def test_every_format_is_in_the_table() -> None:
    rows = re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(rows)) == list(WHOLE_FORMATS)
