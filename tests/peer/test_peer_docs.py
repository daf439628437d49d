"""The Python blocks of ``docs/peers.md`` run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

from peer_tools import served

DOCS = Path(__file__).parents[2] / "docs"


def test_the_examples_of_the_guide_to_peers_run(tmp_path: Path) -> None:
    text = (DOCS / "peers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 7
    names: dict[str, object] = {"path": str(tmp_path / "s")}
    with served(tmp_path / "s", vectors=2, size_bytes=4 << 20):
        try:
            for block in blocks:
                exec(compile(block, "docs/peers.md", "exec"), names)
        finally:
            for name in ("alice", "bob"):
                if name in names:
                    names[name].close()  # type: ignore[attr-defined]
            names.clear()  # views of the memory
