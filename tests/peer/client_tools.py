"""The command ivshmem-client as a process whose lines are read one by one."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from typing import Self

LIMIT_S = 20.0


class Command:
    """A command that runs; ended at the latest with the `with` block."""

    def __init__(self, module: str, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )
        self.printed = b""

    def _read(self, deadline: float) -> bool:
        assert self.process.stdout is not None
        left_s = deadline - time.monotonic()
        assert left_s > 0, f"only this was printed: {self.printed!r}"
        assert select.select([self.process.stdout], [], [], left_s)[0], f"only this was printed: {self.printed!r}"
        more = os.read(self.process.stdout.fileno(), 65536)
        self.printed += more
        return bool(more)

    def until(self, words: str) -> str:
        """Read until these words were printed; return everything up to their end."""
        deadline = time.monotonic() + LIMIT_S
        while words.encode() not in self.printed:
            assert self._read(deadline), f"it ended after {self.printed!r}"
        before, found, self.printed = self.printed.partition(words.encode())
        return (before + found).decode()

    def line(self) -> str:
        return self.until("\n")

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())

    def rest(self) -> tuple[int, str]:
        """Close its input and read to its end; return the exit status and what it printed."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        deadline = time.monotonic() + LIMIT_S
        while self._read(deadline):
            pass
        return self.process.wait(LIMIT_S), self.printed.decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(LIMIT_S)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def client(*options: str) -> Command:
    return Command("ivshmem_lab.peer.cli", *options)
