"""The command ivshmem-server as a process whose lines are read one by one."""

from __future__ import annotations

import select
import subprocess
import sys
from typing import Self

LIMIT_S = 20.0


class Foreground:
    """The command with -F -v, and what it prints; ended at the latest with the `with` block."""

    def __init__(self, *options: str) -> None:
        code = "import sys; from ivshmem_lab.server.cli import main; sys.exit(main())"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "-F", "-v", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        self._printed = b""

    def line(self) -> str:
        assert self.process.stdout is not None
        while b"\n" not in self._printed:
            assert select.select([self.process.stdout], [], [], LIMIT_S)[0], "it prints nothing"
            more = self.process.stdout.read(4096)
            assert more, "it ended"
            self._printed += more
        line, _, self._printed = self._printed.partition(b"\n")
        return line.decode()

    def end(self, number: int) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, (self._printed + out).decode(), err.decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(LIMIT_S)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
