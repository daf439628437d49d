"""The tools of ``tests/emulator`` serve here, too; how much is compared is settable."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "emulator"))
