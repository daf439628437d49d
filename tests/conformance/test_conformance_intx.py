"""Interrupt pins, their routing and the 8259 pair: our machine and real QEMU 7.2 give the same answers and tell the same news.

Today's ivshmem has no INTx, so QEMU raises its pins with the ``edu`` device (QEMU 7.2, ``docs/specs/edu.txt``), and ours
with the legacy ``ivshmem``. Polling takes an interrupt as the CPU would, so no guest is needed.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import accesses as do
import pytest
from accesses import KINDS, MIB, Step
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from machines import served
from qtest_client import Qtest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(3600)]

ACCESSES = int(os.environ.get("IVSHMEM_LAB_ACCESSES", "4000"))
SEED = int(os.environ.get("IVSHMEM_LAB_SEED", "") or 20)
SLOTS = (4, 5, 6, 7, 8)
"""Two of them share a wire."""
PIN = {"unicorn": (4, 1, 4, 0), "qemu": (0x60, 1, 0x64, 1)}
"""Register and value that raise the pin, and that lower it."""
PIIX3 = 1
ROUTES = 0x60
STATUS_INTERRUPT = 8
TIMER = ("IRQ raise 0", "IRQ lower 0")
"""QEMU's timer holds line 0 from the reset on, until the routes are written."""
PORTS = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)
LINES = [3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15]
"""Lines that belong to nobody else: the timer, the keyboard, the cascade, the clock and the coprocessor have the others."""
FIRMWARE = ((0x20, (0x11,)), (0x21, (0x20, 4, 1, 0)), (0xA0, (0x11,)), (0xA1, (0x28, 2, 1, 0)))


def registers(slot: int) -> int:
    return 0xE0000000 + slot * 2 * MIB


def pin(kind: str, slot: int, raised: bool) -> Step:
    raise_at, raise_value, lower_at, lower_value = PIN[kind]
    offset, value = (raise_at, raise_value) if raised else (lower_at, lower_value)
    return Step(
        f"slot {slot} {'raised' if raised else 'lowered'}", (f"writel {registers(slot) + offset:#x} {value:#x}",)
    )


def out(port: int, *values: int) -> list[Step]:
    return [do.ports(port, 1, value) for value in values]


def look() -> list[Step]:
    """Read requests, what is in service and the masks of both; reading changes nothing."""
    script = []
    for port in (0x20, 0xA0):
        script += [*out(port, 0x0A), do.ports(port, 1), *out(port, 0x0B), do.ports(port, 1), do.ports(port + 1, 1)]
    return [*script, do.ports(0x4D0, 1), do.ports(0x4D1, 1)]


def poll() -> list[Step]:
    """Take an interrupt at both, as the CPU does."""
    return [step for port in (0xA0, 0x20) for step in (*out(port, 0x0C), do.ports(port, 1))]


def all_low(kind: str) -> list[Step]:
    return [pin(kind, slot, False) for slot in SLOTS]


def routed(kind: str, values: int) -> list[Step]:
    """Route the wires while nothing is raised, as drivers do."""
    return [*all_low(kind), do.config(ROUTES, 4, values, slot=PIIX3)]


def rerouted(where: int, values: int, size: int = 4) -> Step:
    return do.config(ROUTES + where, size, values, slot=PIIX3)


def placed(kind: str) -> list[Step]:
    script = [do.RESET]
    for slot in SLOTS:
        script += [do.config(0x10, 4, registers(slot), slot=slot), do.config(4, 2, 2, slot=slot)]
        if kind == "unicorn":
            script.append(Step("IntrMask", (f"writel {registers(slot):#x} 0xffffffff",)))
    # What was latched at power-on, by timer and clock, is taken away.
    script += [step for port, values in FIRMWARE for step in out(port, *values)]
    return [*script, *look()]


class Pair:
    """Our machine and real QEMU with devices that have a pin, and the news of interrupt lines."""

    def __init__(self, server: Path) -> None:
        devices = {
            "unicorn": [f"ivshmem,chardev=c{slot},size=1,msi=off,addr={slot}" for slot in SLOTS],
            "qemu": [f"edu,addr={slot}" for slot in SLOTS],
        }
        options = {kind: [word for device in devices[kind] for word in ("-device", device)] for kind in KINDS}
        for slot in SLOTS:
            options["unicorn"] += ["-chardev", f"socket,path={server},id=c{slot}"]
        with contextlib.ExitStack() as stack:
            stack.enter_context(served(server, size_bytes=MIB))
            self.machines = {
                kind: stack.enter_context(Qtest(kind, "-m", "16", "-machine", "pc", *options[kind])) for kind in KINDS
            }
            self._stack = stack.pop_all()
        for machine in self.machines.values():
            machine.ask("irq_intercept_in ioapic")
        self.accesses = 0

    def compare(self, ours: list[Step], theirs: list[Step]) -> None:
        """Carry out a script on each, reset before, and compare answers and news."""
        answers, news = [], []
        for (kind, machine), script in zip(self.machines.items(), (ours, theirs), strict=True):
            do.play(machine, [*all_low(kind), *placed(kind)])
            machine.irqs.clear()
            answers.append(do.play(machine, script))
            news.append([line for line in machine.irqs if line not in TIMER])
        self.accesses += sum(len(step.lines) for step in ours)
        do.compare(ours, *answers)
        assert news[0] == news[1], [step.text for step in ours]

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with contextlib.closing(Pair(tmp_path_factory.mktemp("pair") / "server")) as machines:
        yield machines


def test_every_route_of_every_wire(pair: Pair) -> None:
    """Line 0 is left out: QEMU's timer drives it."""

    def script(kind: str) -> list[Step]:
        steps = []
        for route in (*range(1, 0x12), 0x1A, 0x2B, 0x7F, 0x80, 0x8A, 0xFF):
            steps += routed(kind, route * 0x01010101)
            for slot in SLOTS:
                steps += [pin(kind, slot, True), *look()[:12], pin(kind, slot, False)]
        return steps

    pair.compare(*(script(kind) for kind in KINDS))


def test_shared_wires_and_lines_and_their_life_by_level_and_by_edge(pair: Pair) -> None:
    def script(kind: str) -> list[Step]:
        steps = []
        for level in (0, 0xFF):
            steps += [*out(0x4D0, level), *out(0x4D1, level), *routed(kind, 0x0A0B0A05), *look()]
            for slot in SLOTS:
                steps += [pin(kind, slot, True), *look(), *poll(), *look()]
            for slot in SLOTS:
                steps += [*out(0xA0, 0x20), *out(0x20, 0x20), *look(), pin(kind, slot, False), *look(), *poll()]
        return steps

    pair.compare(*(script(kind) for kind in KINDS))


def test_a_line_moves_with_its_route_while_it_is_raised(pair: Pair) -> None:
    def script(kind: str) -> list[Step]:
        steps = routed(kind, 0x0A0A0A0A)
        for slots in ((4,), (4, 5), (4, 5, 6, 7, 8)):
            steps += [pin(kind, slot, True) for slot in slots]
            for values in (0x0B0B0B0B, 0x0B0B0B0B, 0x8080800A, 0x0B0A0580, 0x80808080, 0x0A0A0A0A):
                steps += [rerouted(0, values), *look(), rerouted(1, values & 0xFF, 1), *look(), *poll()]
            steps += [*out(0xA0, 0x20), *out(0x20, 0x20), *all_low(kind), *look()]
        return steps

    pair.compare(*(script(kind) for kind in KINDS))


def test_interrupt_disable_silences_the_pin_but_not_the_status(pair: Pair) -> None:
    status = {}
    for kind, machine in pair.machines.items():
        do.play(machine, [*placed(kind), *routed(kind, 0x0B0B0B0B)])
        machine.irqs.clear()
        seen = []
        for value in (0x402, 2, 0, 0x402, 0x502):
            for step in (pin(kind, 5, True), do.config(4, 2, value, slot=5), do.config(4, 2, 2, slot=5)):
                do.play(machine, [step])
                seen.append(machine.config(5, 6, 2) & STATUS_INTERRUPT)
            do.play(machine, [do.config(4, 2, value | 2, slot=5), pin(kind, 5, False), do.config(4, 2, 2, slot=5)])
            seen.append(machine.config(5, 6, 2) & STATUS_INTERRUPT)
        status[kind] = (seen, machine.irqs)
    assert status["unicorn"] == status["qemu"]


commands = st.one_of(
    # Initialization in any order, end of interrupt, rotation, polling, masks, modes: whatever software may write.
    st.tuples(st.just("out"), st.sampled_from(PORTS), st.integers(0, 255)),
    st.tuples(st.just("out"), st.sampled_from([0x20, 0xA0]), st.sampled_from([0x20, 0x0A, 0x0B, 0x0C, 0xA0, 0x68])),
    st.tuples(st.just("in"), st.sampled_from(PORTS), st.just(1)),
    st.tuples(st.just("in"), st.sampled_from([0x20, 0xA0]), st.just(2)),
    st.tuples(st.just("pin"), st.sampled_from(SLOTS), st.booleans()),
    st.tuples(st.just("pin"), st.sampled_from(SLOTS), st.booleans()),
    st.tuples(st.just("poll"), st.just(0), st.just(0)),
    st.tuples(st.just("route"), st.integers(0, 3), st.sampled_from([*LINES, 0x80, 0xFF])),
)


def carried_out(kind: str, command: tuple[str, int, int]) -> list[Step]:
    name, where, value = command
    if name == "pin":
        return [pin(kind, where, bool(value))]
    if name == "route":
        return [rerouted(where, value, 1)]
    if name == "poll":
        return poll()
    return [do.ports(where, value)] if name == "in" else out(where, value)


def test_whatever_software_does_to_the_pair(pair: Pair) -> None:
    @settings(
        max_examples=10,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    @given(st.lists(commands, min_size=20, max_size=80))
    def sequences(work: list[tuple[str, int, int]]) -> None:
        scripts = ([step for command in work for step in carried_out(kind, command)] for kind in KINDS)
        pair.compare(*([*script, *look()] for script in scripts))

    before, rounds = pair.accesses, 0
    while pair.accesses - before < ACCESSES // 2:
        try:
            seed(SEED + rounds)(sequences)()
        except AssertionError as error:
            error.add_note(f"the same again: IVSHMEM_LAB_SEED={SEED + rounds}")
            raise
        rounds += 1
