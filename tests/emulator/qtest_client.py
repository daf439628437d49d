"""A small client of qtest, as libqtest is one: it listens, starts an emulator, and asks it line by line."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

from machines import LIMIT_S, Qmp

if TYPE_CHECKING:
    from collections.abc import Iterable

PROGRAMS = {
    "unicorn": ([sys.executable, "-m", "ivshmem_lab.emulator"], ["-accel", "qtest"]),
    # Debian's QEMU has no qtest accelerator; stopped, it runs no guest either.
    "qemu": (["qemu-system-x86_64"], ["-accel", "tcg", "-S"]),
}
WIDTHS = {1: "b", 2: "w", 4: "l"}
PIPELINED = 64
_numbers = itertools.count()


class Qtest:
    """One emulator, started with the options in libqtest's order.

    Parameters
    ----------
    kind
        ``"unicorn"`` or ``"qemu"``.
    options
        Further options.
    log
        What ``-qtest-log`` gets.
    connection
        What stands in the place of ``-qtest unix:PATH``; ``{}`` is the path.
    """

    def __init__(
        self,
        kind: str,
        *options: str,
        log: str = "/dev/null",
        connection: tuple[str, ...] = ("-qtest", "unix:{}"),
        accelerator: list[str] | None = None,
    ) -> None:
        directory = Path(os.environ["XDG_RUNTIME_DIR"])
        self.irqs: list[str] = []
        program, usual = PROGRAMS[kind]
        number = next(_numbers)
        paths = [directory / f"qtest-{number}.{kind}" for kind in ("sock", "qmp")]
        with contextlib.ExitStack() as stack:
            listeners = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in paths]
            for path, listener in zip(paths, listeners, strict=True):
                listener.bind(str(path))
                stack.callback(path.unlink)
                listener.listen()
                listener.settimeout(LIMIT_S)
            command = [*program, *(word.format(paths[0]) for word in connection), "-qtest-log", log]
            command += ["-chardev", f"socket,path={paths[1]},id=char0", "-mon", "chardev=char0,mode=control"]
            command += ["-display", "none", *(["-nodefaults"] if kind == "qemu" else []), *options]
            self._said = os.memfd_create("stderr")
            self.process = subprocess.Popen(
                [*command, *(usual if accelerator is None else accelerator)],
                stdin=subprocess.DEVNULL,
                stderr=self._said,
            )
            self.sock, _ = listeners[0].accept()
            qmp, _ = listeners[1].accept()
        self.sock.settimeout(LIMIT_S)
        self._buffer = b""
        self.qmp = Qmp(qmp)
        assert self.ask("endianness") == "little"
        self.qmp.negotiate()

    # -- lines -----------------------------------------------------------------------------------------

    def line(self) -> str:
        """Read the next line, whatever it is."""
        while b"\n" not in self._buffer:
            data = self.sock.recv(1 << 20)
            assert data, f"the emulator has hung up: {self.errors}"
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode()

    def answer(self) -> str:
        """Read the next answer; news of interrupt lines are kept."""
        while (line := self.line()).startswith("IRQ "):
            self.irqs.append(line)
        return line

    def raw(self, request: str) -> str:
        """Send a request; returns the whole answer."""
        self.sock.sendall(request.encode() + b"\n")
        return self.answer()

    def ask(self, request: str) -> str:
        """Send a request that succeeds; returns what stands behind the OK."""
        answer = self.raw(request)
        assert answer.startswith("OK"), (request, answer)
        return answer[3:]

    def ask_all(self, requests: Iterable[str]) -> list[str]:
        """Send requests without waiting for each answer."""
        answers = []
        remaining = iter(requests)
        while batch := list(itertools.islice(remaining, PIPELINED)):
            self.sock.sendall("".join(f"{request}\n" for request in batch).encode())
            answers += [self.answer() for _ in batch]
        return answers

    # -- accesses --------------------------------------------------------------------------------------

    def read(self, address: int, size: int = 4) -> int:
        return int.from_bytes(bytes.fromhex(self.ask(f"read {address:#x} {size:#x}")[2:]), "little")

    def write(self, address: int, value: int, size: int = 4) -> None:
        self.ask(f"write {address:#x} {size:#x} 0x{value.to_bytes(size, 'little').hex()}")

    def inp(self, port: int, size: int = 4) -> int:
        return int(self.ask(f"in{WIDTHS[size]} {port:#x}"), 16)

    def out(self, port: int, value: int, size: int = 4) -> None:
        self.ask(f"out{WIDTHS[size]} {port:#x} {value:#x}")

    def config(self, slot: int, offset: int, size: int = 4, value: int | None = None, bus: int = 0) -> int:
        self.out(0xCF8, 0x80000000 | bus << 16 | slot << 11 | offset & 0xFC)
        port = 0xCFC + (offset & 3)
        if value is None:
            return self.inp(port, size)
        self.out(port, value, size)
        return 0

    # -- its end ---------------------------------------------------------------------------------------

    @property
    def errors(self) -> str:
        return os.pread(self._said, 1 << 20, 0).decode()

    def terminate(self) -> int:
        """End it as libqtest does; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(LIMIT_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.sock.close()
        self.qmp.sock.close()
        os.close(self._said)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
