"""The CPU as named values: what an engine computes with is all in them."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import pytest

from ivshmem_lab.emulator import cpustate
from ivshmem_lab.emulator.cpu import UnicornCpu
from ivshmem_lab.emulator.runner import Runner, RunState
from ivshmem_lab.errors import DeviceError
from ivshmem_lab.guests import guest_path
from ivshmem_lab.pc import multiboot
from ivshmem_lab.pc.machine import Hooks, Machine

MEMORY_BYTES = 4 << 20
LAZY_BYTES = 24
"""The engine works the flags out of their last operands when they are asked for: two forms of the same flags."""


def engine() -> tuple[mmap.mmap, UnicornCpu, Machine]:
    memory = mmap.mmap(-1, MEMORY_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    path = str(guest_path("probe"))
    cpu = UnicornCpu()
    machine = Machine(cpu, memoryview(memory), multiboot.parse(guest_path("probe").read_bytes(), path, path), Hooks())
    cpu.attach(machine, whole_machine=True)
    return memory, cpu, machine


def context(cpu: UnicornCpu) -> bytes:
    """Return everything that the engine keeps of a CPU, without the lead that is the engine's own."""
    saved = cpu.save()
    return ctypes.string_at(saved.context, saved.size)


@pytest.fixture
def halted() -> Any:
    """A CPU that ran the probe to its end: paging with NX, SSE, descriptor tables, all in use."""
    memory, cpu, machine = engine()
    runner = Runner(cpu)
    runner.start(machine)
    runner.call(runner.resume).result()
    while not runner.call(lambda: runner._halted).result():
        pass
    runner.call(runner.pause).result()
    yield memory, cpu, runner
    runner.close()


def test_an_engine_that_takes_over_the_registers_is_in_the_same_state(halted: Any) -> None:
    memory, cpu, runner = halted
    state = runner.call(runner.save).result()
    other_memory, other, other_machine = engine()
    other_memory[:] = memory[:]
    other_runner = Runner(other)
    other_runner.start(other_machine, incoming=True)
    assert other_runner.state is RunState.INMIGRATE
    try:
        other_runner.call(lambda: other_runner.load(state)).result()
        assert other_runner.call(other_runner.save).result() == state
        assert state["registers"]["EFER"] == 0x800
        assert state["halted"] is True
        here, there = context(cpu), context(other)
        assert len(here) == len(there)
        # Beyond the lead and the lazy flags there is one pointer into the engine that has run.
        differing = [at for at in range(0x20, len(here)) if here[at] != there[at]]
        assert len({at // 8 for at in differing}) <= LAZY_BYTES // 8 + 2, [hex(at) for at in differing]
    finally:
        other_runner.close()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("EAX", "1", "CPU register EAX is '1'; it has to be a number of 64 bits"),
        ("EAX", -1, "it has to be a number of 64 bits"),
        ("EAX", 1 << 64, "it has to be a number of 64 bits"),
        ("EAX", True, "it has to be a number of 64 bits"),
        ("GDTR", [0, 1], r"CPU register GDTR is \[0, 1\]; it has to be 4 numbers"),
        ("FP0", None, "CPU register FP0 is None; it has to be 2 numbers"),
        ("XMM0", 1 << 128, "it has to be a number of 128 bits"),
        ("CS", 0x1000, "CPU register CS is 0x1000, and the descriptor table has no such segment"),
        ("GDTR", [0, 0xF0000000, 0xFFFF, 0], "CPU register CS is 0x8, and the descriptor table has no such segment"),
    ],
)
def test_registers_that_cannot_be_are_refused_by_name(halted: Any, name: str, value: object, message: str) -> None:
    memory, cpu, runner = halted
    state = runner.call(lambda: cpustate.save(cpu)).result()
    other_memory, other, _ = engine()
    other_memory[:] = memory[:]
    try:
        with pytest.raises(DeviceError, match=message):
            cpustate.load(other, {**state, name: value})
        with pytest.raises(DeviceError, match=f"CPU register {name} is None"):
            cpustate.load(other, {key: value for key, value in state.items() if key != name})
    finally:
        other.close()
