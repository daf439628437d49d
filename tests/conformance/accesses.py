"""Accesses to an ivshmem device as values, carried out over qtest on our machine and on real QEMU, and compared.

Ref: `qemu-ivshmem.md`, section 9: a stopped QEMU with ``-qtest`` is a device without a guest.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from machines import served
from qtest_client import Qtest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

MIB = 1 << 20
KINDS = ("unicorn", "qemu")
SLOT = 4
PLACES = {
    0: (0xE0000000, 0xE2000000, 0xE00F0F00),
    1: (0xE0010000, 0xE3000000),
    2: (0xE0100000, 0xE4000000, 1 << 32),
}
"""Where BARs are put: nowhere over another or over memory."""
WIDE = (2,)
"""BARs of 64 bits."""
MAILBOX, MAILBOX_BYTES = 0x2000, 64
"""Guest memory to which interrupt messages are sent."""
TARGETS = (MAILBOX, MAILBOX + 4, MAILBOX + 60, 0xFEE00000, 0x90000000)
"""Addresses of messages: the mailbox, the local APIC, nowhere."""


@dataclass(frozen=True)
class Step:
    """Some requests of one purpose.

    Attributes
    ----------
    text
        What it does, for people.
    lines
        qtest requests.
    settles
        An eventfd may have been rung: it is waited for.
    qmp
        A QMP command with its arguments instead of lines.
    """

    text: str
    lines: tuple[str, ...] = ()
    settles: bool = False
    qmp: tuple[str, tuple[tuple[str, Any], ...]] | None = None


NOTHING = Step("")
"""What a step shrinks to."""


# -- what there is to do -----------------------------------------------------------------------------------------------


def config(
    offset: int, size: int, value: int | None = None, *, port_offset: int | None = None, slot: int = SLOT
) -> Step:
    """Read or write configuration space; `port_offset` puts the access elsewhere on the data ports."""
    at = (offset & 3) if port_offset is None else port_offset
    letter = {1: "b", 2: "w", 4: "l"}[size]
    select = f"outl 0xcf8 {0x80000000 | slot << 11 | offset & 0xFC:#x}"
    if value is None:
        return Step(f"config {offset:#x} size {size}", (select, f"in{letter} {0xCFC + at:#x}"))
    line = f"out{letter} {0xCFC + at:#x} {value & (1 << 8 * size) - 1:#x}"
    return Step(f"config {offset:#x} size {size} = {value:#x}", (select, line))


def ports(port: int, size: int, value: int | None = None) -> Step:
    letter = {1: "b", 2: "w", 4: "l"}[size]
    line = f"in{letter} {port:#x}" if value is None else f"out{letter} {port:#x} {value:#x}"
    return Step(line, (line,))


def memory(address: int, size: int, value: int | None = None, *, settles: bool = False) -> Step:
    """Read or write physical memory or registers."""
    if value is None:
        return Step(f"read {address:#x} size {size}", (f"read {address:#x} {size}",))
    digits = (value & (1 << 8 * size) - 1).to_bytes(size, "little").hex()
    return Step(f"write {address:#x} size {size} = {value:#x}", (f"write {address:#x} {size} 0x{digits}",), settles)


def bar(index: int, offset: int, size: int, value: int | None = None, place: int = 0) -> Step:
    """Read or write inside a BAR, at one of its places."""
    rings = index == 0 and value is not None and offset < 16 and offset + size > 12
    if rings and value is not None and any(word & 0xFFFF > 0xFF for word in doorbells(offset, size, value)):
        return NOTHING  # the listed difference `doorbell vectors`
    return memory(PLACES[index][place % len(PLACES[index])] + offset, size, value, settles=rings)


def doorbells(offset: int, size: int, value: int) -> Iterator[int]:
    """Yield what the doorbell register gets of a write, which comes in aligned pieces of at most 4 bytes."""
    while size:
        width = 1 << min(size, 4, offset & -offset or 4).bit_length() - 1
        if offset & ~3 == 12:
            yield value & (1 << 8 * width) - 1
        offset, size, value = offset + width, size - width, value >> 8 * width


def move(index: int, place: int) -> Step:
    """Give a BAR another address, while it decodes or not."""
    address = PLACES[index][place % len(PLACES[index])]
    lines = config(0x10 + 4 * index, 4, address & 0xFFFFFFFF).lines
    if index in WIDE:
        lines += config(0x14 + 4 * index, 4, address >> 32).lines
    return Step(f"BAR {index} to {address:#x}", lines)


def ask_size(index: int) -> Step:
    """Ask for a BAR's size as drivers do, and put it back."""
    lines: tuple[str, ...] = ()
    for offset in (0x10 + 4 * index, 0x14 + 4 * index)[: 2 if index in WIDE else 1]:
        lines += config(offset, 4, 0xFFFFFFFF).lines + config(offset, 4).lines
    return Step(f"size of BAR {index}", lines + move(index, 0).lines)


def poke_bar(index: int, at: int, size: int, value: int) -> Step:
    """Write anything into a BAR's register while it decodes nothing, look, and put it back."""
    offset = 0x10 + 4 * index + (at & -size & 3)
    lines = config(4, 2, 0).lines + config(offset, size, value).lines + config(0x10 + 4 * index, 4).lines
    return Step(f"BAR {index} register {offset:#x} size {size} = {value:#x}", lines + move(index, 0).lines)


def entry(vector: int, address: int, data: int, control: int) -> Step:
    """Fill an entry of the MSI-X table."""
    base = PLACES[1][0] + 16 * vector
    fields = ((0, address & 0xFFFFFFFF), (4, address >> 32), (8, data), (12, control))
    lines = tuple(f"writel {base + offset:#x} {value:#x}" for offset, value in fields)
    return Step(f"vector {vector}: {data:#x} to {address:#x}, control {control}", lines)


def ring(peer_id: int, vector: int) -> Step:
    return bar(0, 12, 4, peer_id << 16 | vector)


def mailbox() -> Step:
    """Look at the messages that came, and forget them."""
    lines = (f"read {MAILBOX:#x} {MAILBOX_BYTES}", f"memset {MAILBOX:#x} {MAILBOX_BYTES} 0")
    return Step("mailbox", lines)


def pending(vectors: int) -> Step:
    start = max(0x800, 16 * vectors)
    return bar(1, start, (vectors + 63) // 64 * 8)


def command(text: str, **arguments: Any) -> Step:
    return Step(f"QMP {text} {arguments}", qmp=(text, tuple(arguments.items())))


RESET = command("system_reset")
PLACED = (*(move(index, 0) for index in PLACES), config(4, 2, 6))
"""What makes a device reachable after a reset."""


# -- doing it on both --------------------------------------------------------------------------------------------------


class Pair:
    """Our machine and real QEMU with the same device.

    Parameters
    ----------
    directory
        For the sockets of two servers: one each, so that peer ids are equal.
    vectors
        0 for an ivshmem-plain, otherwise for an ivshmem-doorbell; None for no device.
    options
        Further options.
    served_vectors
        How many vectors the servers give, if not all.
    quirks
        ``x-quirks`` of our device.
    """

    def __init__(
        self,
        directory: Path,
        vectors: int | None,
        *options: str,
        served_vectors: int | None = None,
        quirks: str | None = None,
    ) -> None:
        self.vectors = vectors
        self.accesses = 0
        with contextlib.ExitStack() as stack:
            self.machines: dict[str, Qtest] = {}
            for kind in KINDS:
                device: list[str] = []
                if vectors:
                    path = directory / f"server.{kind}"
                    stack.enter_context(served(path, vectors=served_vectors or vectors, size_bytes=MIB))
                    device = ["-chardev", f"socket,id=c,path={path}"]
                    more = f",x-quirks={quirks}" if quirks and kind == "unicorn" else ""
                    device += ["-device", f"ivshmem-doorbell,chardev=c,vectors={vectors},addr={SLOT},id=d{more}"]
                elif vectors == 0:
                    device = ["-object", f"memory-backend-ram,id=m,size={MIB}"]
                    device += ["-device", f"ivshmem-plain,memdev=m,addr={SLOT},id=d"]
                self.machines[kind] = stack.enter_context(Qtest(kind, "-m", "16", *device, *options))
            self._stack = stack.pop_all()

    def reset(self) -> None:
        """Put both into the same state: after a reset, the device placed, memory empty."""
        self.compare([RESET, *PLACED, memory(PLACES[2][0], 16, 0), Step("", mailbox().lines[1:])])

    def compare(self, steps: Iterable[Step]) -> None:
        """Carry out steps on both.

        Raises
        ------
        AssertionError
            At the first difference, with all that led to it.
        """
        script = list(steps)
        self.accesses += sum(len(step.lines) for step in script)
        compare(script, *self.answers(script))

    def answers(self, steps: Sequence[Step]) -> tuple[list[Any], list[Any]]:
        """Carry out steps on both; returns our answers and QEMU's."""
        ours, theirs = (play(machine, steps) for machine in self.machines.values())
        return ours, theirs

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def compare(script: Sequence[Step], ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    """Compare the answers to a script.

    Raises
    ------
    AssertionError
        At the first difference, with all that led to it.
    """
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if our != their:
            told = "\n".join(f"  {step.text}" for step in script[: number + 1] if step.text)
            raise AssertionError(f"ours {our}\nQEMU {their}\nafter:\n{told}")


def _runs(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Cut where something has to be waited for."""
    run: list[Step] = []
    for step in steps:
        if step.qmp and run:
            yield run
            run = []
        run.append(step)
        if step.qmp or step.settles:
            yield run
            run = []
    if run:
        yield run


def play(machine: Qtest, steps: Sequence[Step]) -> list[Any]:
    """Carry out steps on one machine; returns an answer for each."""
    answers: list[Any] = []
    for run in _runs(steps):
        if run[0].qmp:
            answers.append(_qmp(machine, *run[0].qmp))
            continue
        lines = machine.ask_all(line for step in run for line in step.lines)
        for step in run:
            answers.append(lines[: len(step.lines)])
            lines = lines[len(step.lines) :]
        if run[-1].settles:
            for _ in range(3):
                machine.ask("endianness")  # each is a turn of its main loop
    return answers


def _qmp(machine: Qtest, name: str, arguments: tuple[tuple[str, Any], ...]) -> Any:
    if name == "event":
        return machine.qmp.event(dict(arguments)["name"])["data"]
    answer = machine.qmp.execute(name, **dict(arguments))
    if name == "system_reset" and "return" in answer:
        machine.qmp.hears("RESET")  # QEMU answers before it is done
        machine.qmp.events = [event for event in machine.qmp.events if event["event"] != "RESET"]
    if "error" in answer:
        return answer["error"]["class"]
    return answer["return"]
