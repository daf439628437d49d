"""Inter-VM shared memory (ivshmem) to see, teach and measure.

Names load when they are first used, so that ``import ivshmem_lab`` costs little and the
pure rooms (``wire``, ``device``, ``pc``, ``stats``) import without Unicorn, QMP or Jupyter.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .emulator.plug import plug
    from .lab.lab import Lab
    from .peer.peer import Peer
    from .server.server import Server

__version__ = "0.1.0"

_HOMES = {
    "Lab": "ivshmem_lab.lab.lab",
    "Peer": "ivshmem_lab.peer.peer",
    "Server": "ivshmem_lab.server.server",
    "plug": "ivshmem_lab.emulator.plug",
}

__all__ = ["Lab", "Peer", "Server", "__version__", "plug"]


def __getattr__(name: str) -> object:
    """Load a public name from its room (PEP 562)."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ivshmem_lab' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Name everything public, loaded or not."""
    return sorted(__all__)
