"""What the owner of an engine must not do while a device is plugged is refused by name; `stop` is the safe way."""

from __future__ import annotations

import asyncio
import re
import struct
import threading

import pytest
from unicorn import UC_ARCH_X86, UC_HOOK_BLOCK, UC_HOOK_INSN, UC_MODE_64, Uc
from unicorn.x86_const import UC_X86_INS_IN, UC_X86_REG_RAX

import ivshmem_lab
from ivshmem_lab.errors import DeviceError, UsageError

CODE, WORK = 0x10000, 0x20000
SPIN = b"\xff\x04\x25" + struct.pack("<I", WORK) + b"\xff\xc0\xeb\xf5"  # again: inc [WORK]; inc eax; jmp again


@pytest.fixture
def uc():
    engine = Uc(UC_ARCH_X86, UC_MODE_64)
    engine.mem_map(0, 1 << 20)
    engine.mem_write(CODE, SPIN)
    return engine


class Elsewhere:
    """Calls something in another thread once the guest runs; keeps what it raised."""

    def __init__(self, uc, call, device) -> None:
        self.error = None
        self._running = threading.Event()
        uc.hook_add(UC_HOOK_BLOCK, lambda *_: self._running.set())
        self._thread = threading.Thread(target=self._run, args=(call, device))
        self._thread.start()

    def _run(self, call, device) -> None:
        self._running.wait(10)
        try:
            call()
        except (DeviceError, UsageError) as error:
            self.error = error
        device.stop()

    def join(self) -> None:
        self._thread.join()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda uc: uc.emu_stop(), r"device\.stop\(\)"),
        (lambda uc: uc.emu_start(CODE, -1), "another thread's emu_start"),
        (lambda uc: uc.mem_map(0x200000, 0x1000), r"mem_map\(\) while"),
        (lambda uc: uc.mem_unmap(0x1000, 0x1000), r"mem_unmap\(\) while"),
        (lambda uc: uc.reg_write(UC_X86_REG_RAX, 1), r"reg_write\(\) while"),
    ],
)
def test_call_from_another_thread_is_refused_and_the_guest_is_unharmed(uc, call, words):
    with ivshmem_lab.plug(uc, "64K") as device:
        other = Elsewhere(uc, lambda: call(uc), device)
        uc.emu_start(CODE, -1)
        other.join()
        assert re.search(words, str(other.error))
        assert struct.unpack("<I", uc.mem_read(WORK, 4))[0] == uc.reg_read(UC_X86_REG_RAX) > 0


@pytest.mark.parametrize("native", [None, False])
def test_stop_from_another_thread_doubles_nothing(uc, native):
    with ivshmem_lab.plug(uc, "64K", native_hook=native) as device:
        pc, stops = CODE, 300
        go, end = threading.Semaphore(0), threading.Event()

        def stopper() -> None:
            while not end.is_set():
                go.acquire()
                device.stop()

        thread = threading.Thread(target=stopper)
        thread.start()
        for _ in range(stops):
            go.release()
            uc.emu_start(pc, -1)
            pc = device._open().cpu.pc
        end.set()
        go.release()
        thread.join()
        assert struct.unpack("<I", uc.mem_read(WORK, 4))[0] == uc.reg_read(UC_X86_REG_RAX)


def test_stop_before_the_start_is_not_lost_and_ends_a_wait(uc):
    with ivshmem_lab.plug(uc, "64K") as device:
        device.stop()
        uc.emu_start(CODE, -1)
        device.stop()
        assert device.wait(None) is None


def test_timeout_is_refused_with_the_remedy(uc):
    with ivshmem_lab.plug(uc, "64K"), pytest.raises(UsageError, match=r"threading\.Timer\(seconds, device\.stop\)"):
        uc.emu_start(CODE, -1, timeout=1000)


def test_count_goes_on_working(uc):
    with ivshmem_lab.plug(uc, "64K"):
        uc.emu_start(CODE, -1, count=6)
        assert uc.reg_read(UC_X86_REG_RAX) == 2


@pytest.mark.parametrize("name", ["mem_map", "mem_unmap", "mem_protect"])
def test_our_addresses_are_defended_until_they_are_given_back(uc, name):
    arguments = {"mem_protect": (1,)}.get(name, ())
    with ivshmem_lab.plug(uc, "64K") as device:
        address = device.bars[2]
        with pytest.raises(DeviceError, match=r"device\.unplug\(\) gives the addresses back"):
            getattr(uc, name)(address + 0x1000, 0x1000, *arguments)
        device.unplug()
        uc.mem_map(address, 0x10000)


def test_later_hook_on_in_is_refused_and_one_on_out_is_not(uc):
    with ivshmem_lab.plug(uc, "64K"):
        with pytest.raises(DeviceError, match="port_in="):
            uc.hook_add(UC_HOOK_INSN, lambda *_: 0, None, 1, 0, UC_X86_INS_IN)
        uc.hook_add(UC_HOOK_BLOCK, lambda *_: None)


def test_stop_in_a_ports_handler_is_named(uc):
    uc.mem_write(CODE, b"\xee\xeb\x00\xeb\xfe")  # out dx, al; jmp +0; jmp to itself
    with (
        ivshmem_lab.plug(uc, "64K", port_out=lambda *_: uc.emu_stop()),
        pytest.raises(DeviceError, match="a port's handler"),
    ):
        uc.emu_start(CODE, -1)


def test_server_on_the_callers_own_loop_is_refused(uc, server_beside):
    async def call() -> None:
        ivshmem_lab.plug(uc, server=server_beside)

    with pytest.raises(DeviceError, match=r"asyncio\.to_thread"):
        asyncio.run(call())
    with pytest.raises(UsageError, match="no path of a socket"):
        ivshmem_lab.plug(uc, server=5)
