"""The command ``unicorn-system-x86_64``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import sys
from typing import TYPE_CHECKING, Any

from ..errors import IvshmemLabError
from .commands import commands
from .emulator import Emulator
from .options import Options, parse_arguments
from .qmp import QmpSession
from .qtest_session import QtestLog, QtestSession

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .chardev import Chardev

    Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

ANSWER_S = 0.5
"""At the end: for so long QMP clients may take to get their last answers."""

PROGRAM = "unicorn-system-x86_64"

HELP = f"""\
usage: {PROGRAM} [options]

A small PC on the Unicorn engine that takes QEMU's options, for ivshmem work: no root, no KVM, no QEMU.

machine
  -m SIZE                 memory, bare numbers are MiB (default 128M, up to 3G)
  -kernel FILE            32-bit multiboot ELF to start
  -append TEXT            its command line (after the file's path, as QEMU does)
  -S                      do not start; wait for QMP's cont
  -incoming ADDRESS       take over another process's machine: unix:PATH, tcp:HOST:PORT, or defer (until migrate-incoming)
  -only-migratable        refuse devices that cannot move
  -no-reboot              a guest that resets itself ends the machine
  -machine pc|q35|none -accel tcg|qtest -cpu qemu64 -smp 1 -name NAME -display none
  -nodefaults -no-user-config
  -block-hook auto|native|python    how the CPU is interrupted (ours, not QEMU's)
devices
  -object memory-backend-{{file,memfd,ram}},id=ID,size=SIZE[,share=on][,mem-path=FILE]
  -device ivshmem-plain,memdev=ID[,id=ID][,addr=SLOT]
  -device ivshmem-doorbell,chardev=ID[,vectors=N][,id=ID][,addr=SLOT]
  -device pcie-root-port|pcie-pci-bridge|pci-bridge,id=ID[,bus=ID]     then -device ...,bus=ID is behind it
  -device isa-debug-exit,iobase=0xf4,iosize=0x04
connections
  -chardev socket,id=ID,path=SOCKET[,server=on,wait=off] | socket,id=ID,fd=N | stdio,id=ID | file,id=ID,path=FILE | null,id=ID
  -serial chardev:ID | stdio | file:PATH | unix:PATH[,server=on,wait=off] | null
  -qmp unix:PATH,server=on,wait=off      or      -mon chardev=ID,mode=control
  -qtest unix:PATH|chardev:ID [-qtest-log FILE|none]    with -accel qtest no guest runs (libqtest)
other
  -h, -help               this text
  -version                version

example
  ivshmem-server -F -S /tmp/ivshmem_socket -n 2 &
  {PROGRAM} -nodefaults -display none -m 32 -kernel probe.elf -append exit=1 -serial stdio \\
      -device isa-debug-exit,iobase=0xf4,iosize=0x04 \\
      -chardev socket,path=/tmp/ivshmem_socket,id=ivshmem -device ivshmem-doorbell,chardev=ivshmem,vectors=2

exit status: 0 ended by quit or a signal, 2 wrong call, 1 failed, or what the guest wrote to isa-debug-exit (v << 1 | 1)
"""


class _Process:
    """The machine with its QMP connections."""

    def __init__(self, options: Options) -> None:
        self._sessions: set[QmpSession] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._log: QtestLog | None = None
        self.emulator = Emulator(options, self._emit)
        self._commands = commands(self.emulator)

    def _emit(self, name: str, data: dict[str, Any] | None) -> None:
        for session in self._sessions:
            session.event(name, data)

    async def run(self) -> int:
        emulator = self.emulator
        try:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                emulator.loop.add_signal_handler(number, self._signalled)
            await self._start()
            for name in emulator.options.monitors if not emulator.ended.done() else ():
                chardev = emulator.claim_chardev(name, "QMP")
                self._tasks.add(asyncio.create_task(self._serve(chardev, self._talk)))
            if emulator.options.qtest is not None and not emulator.ended.done():
                self._log = QtestLog(emulator.options.qtest_log)
                chardev = emulator.claim_chardev(emulator.options.qtest, "qtest")
                self._tasks.add(asyncio.create_task(self._serve(chardev, self._talk_qtest)))
            return await emulator.ended
        finally:
            await self._let_answer()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await emulator.close()
            if self._log is not None:
                self._log.close()

    async def _let_answer(self) -> None:
        """Give commands that are being carried out the time to be answered: the guest may have ended the machine."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_S):
                for session in list(self._sessions):
                    await session.idle.wait()

    async def _start(self) -> None:
        """Start the machine, unless a signal ends it before."""
        start = asyncio.create_task(self.emulator.start())
        self.emulator.ended.add_done_callback(lambda _: start.cancel())
        await asyncio.wait([start])
        if not start.cancelled():
            start.result()

    def _signalled(self) -> None:
        self._emit("SHUTDOWN", {"guest": False, "reason": "host-signal"})
        self.emulator.end(0)

    async def _serve(self, chardev: Chardev, talk: Talk) -> None:
        """Talk over a character device: once, or with one client after the other."""
        if chardev.sock is None:
            await talk(*await _stdio())
            return
        if not chardev.listening:
            await talk(*await asyncio.open_unix_connection(sock=chardev.sock))
            return
        chardev.sock.setblocking(False)
        while True:
            sock, _ = await self.emulator.loop.sock_accept(chardev.sock)
            await talk(*await asyncio.open_unix_connection(sock=sock))

    async def _talk_qtest(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        emulator = self.emulator
        assert self._log is not None
        session = QtestSession(
            emulator.machine if emulator.options.machine != "none" else None,
            has_clock=emulator.options.driven,
            events=emulator.runner.events,
            on_vcpu=emulator.on_vcpu,
            log=self._log,
        )
        await session.serve(reader, writer)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = QmpSession(self._commands)
        self._sessions.add(session)
        try:
            await session.serve(reader, writer)
        finally:
            self._sessions.discard(session)
            try:
                async with asyncio.timeout(ANSWER_S):
                    await writer.wait_closed()
            except (OSError, TimeoutError):
                writer.transport.abort()  # nobody reads


async def _stdio() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sys.stdout)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def _run(options: Options) -> int:
    return await _Process(options).run()


def main(argv: list[str] | None = None) -> int:
    """Run one machine until it ends.

    Parameters
    ----------
    argv
        The options, None for those of the process.

    Returns
    -------
    int
        Exit status.
    """
    # 16 peers with 64 vectors each are 1024 descriptors, the usual soft limit.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    logging.basicConfig(format=f"{PROGRAM}: %(message)s", level=logging.WARNING)
    try:
        options = parse_arguments(sys.argv[1:] if argv is None else argv)
        if options.help:
            print(HELP, end="")
            return 0
        if options.version:
            from .. import __version__

            print(f"{PROGRAM} (ivshmem_lab {__version__})")
            return 0
        return asyncio.run(_run(options))
    except IvshmemLabError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
