"""``python -m ivshmem_lab.emulator``: the command ``unicorn-system-x86_64``."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
