"""Where the console scripts start: Ctrl-C is a quiet end from here on, while a command's modules load as well."""

from __future__ import annotations

import signal
from importlib import import_module

_INTERRUPTED = 128 + signal.SIGINT


def _run(module: str) -> int:
    try:
        status: int = import_module(module).main()
    except KeyboardInterrupt:
        return _INTERRUPTED
    return status


def lab() -> int:
    """Run ``ivshmem-lab``; return the exit status, 130 after Ctrl-C."""
    return _run("ivshmem_lab.cli")


def server() -> int:
    """Run ``ivshmem-server``; return the exit status, 130 after Ctrl-C before it listens."""
    return _run("ivshmem_lab.server.cli")


def client() -> int:
    """Run ``ivshmem-client``; return the exit status, 130 after Ctrl-C."""
    return _run("ivshmem_lab.peer.cli")


def unicorn_system() -> int:
    """Run ``unicorn-system-x86_64``; return the exit status, 130 after Ctrl-C before the machine is there."""
    return _run("ivshmem_lab.emulator.cli")
