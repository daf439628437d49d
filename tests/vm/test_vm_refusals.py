"""What real QEMU 7.2 and our machine refuse over QMP: their words, our hint, and that they live on."""

from __future__ import annotations

import asyncio

import pytest

from ivshmem_lab.errors import QmpCommandError
from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.server.server import Server
from ivshmem_lab.vm.command import Machine
from ivshmem_lab.vm.qemu import find_emulator
from ivshmem_lab.vm.vm import Vm

BOTH = ["unicorn", pytest.param("qemu", marks=pytest.mark.qemu)]


def backend(name, **more):
    return {"qom-type": "memory-backend-memfd", "id": name, "size": 1 << 20, "share": True, **more}


def chardev(name, path):
    address = {"type": "unix", "data": {"path": path}}
    return {"id": name, "backend": {"type": "socket", "data": {"addr": address, "server": False}}}


PLAIN = {"driver": "ivshmem-plain", "memdev": "m"}
DOORBELL = {"driver": "ivshmem-doorbell", "chardev": "c", "vectors": 1}

REFUSALS = {
    "no memdev": ("device_add", {"driver": "ivshmem-plain"}, "You must specify a 'memdev'", ""),
    "no chardev": ("device_add", {"driver": "ivshmem-doorbell"}, "You must specify a 'chardev'", ""),
    "unknown memdev": ("device_add", {**PLAIN, "memdev": "nope"}, "Device 'nope' not found", ""),
    "unknown chardev": ("device_add", {**DOORBELL, "chardev": "nope"}, "can't find value 'nope'", ""),
    "no server": ("chardev-add", chardev("c1", "/nonexistent/none.sock"), "Failed to connect to", "start one"),
    "chardev used twice": ("device_add", {**DOORBELL, "chardev": "used"}, "is in use", "open a new one each time"),
    "memdev used twice": (
        "device_add",
        {**PLAIN, "memdev": "used-m"},
        "already busy memdev: used-m",
        "another backend",
    ),
    "backend in use": ("object-del", {"id": "used-m"}, "object 'used-m' is in use, can not be deleted", "unplug"),
    "chardev in use": ("chardev-remove", {"id": "used"}, "Chardev 'used' is busy", "unplug that device first"),
    "no such directory": (
        "object-add",
        backend("f", **{"qom-type": "memory-backend-file", "mem-path": "/nonexistent/x"}),
        "can't open backing store /nonexistent/x for guest RAM: No such file or directory",
        "there is no such file",
    ),
    "unknown bus": ("device_add", {**PLAIN, "bus": "nobus"}, "Bus 'nobus' not found", ""),
    "slot taken": ("device_add", {**PLAIN, "addr": "1"}, "slot 1 function 0 not available for ivshmem-plain", ""),
    "no such slot": ("device_add", {**PLAIN, "addr": "0x40"}, "doesn't take value '0x40'", ""),
    "no vectors": ("device_add", {**DOORBELL, "vectors": 0}, "The number of MSI-X vectors is invalid", "1 to 2048"),
    "many vectors": (
        "device_add",
        {**DOORBELL, "vectors": 2049},
        "The number of MSI-X vectors is invalid",
        "1 to 2048",
    ),
    "master, not 0": ("device_add", {**DOORBELL, "master": True}, "master must connect to the server before", "id 0"),
    "legacy device": ("device_add", {"driver": "ivshmem"}, "'ivshmem' is not a valid device model name", "-plain and"),
    "unknown device": ("device_del", {"id": "nosuch"}, "Device 'nosuch' not found", ""),
}


@pytest.mark.parametrize("kind", BOTH)
def test_a_refused_command_has_the_machines_words_and_a_hint_and_the_machine_lives(kind, tmp_path):
    async def refused(vm, case, path):
        command, arguments, words, hint = REFUSALS[case]
        if arguments.get("chardev") == "c":
            await vm.execute("chardev-add", **chardev("c", path))
        if arguments.get("memdev") == "m":
            await vm.execute("object-add", **backend("m"))
        with pytest.raises(QmpCommandError) as caught:
            await vm.execute(command, **arguments)
        if (case, vm.emulator.kind) == ("no such directory", "unicorn"):  # ours has the remedy in its own words
            words, hint = "cannot open the file '/nonexistent/x'", ""
        assert words in caught.value.desc, case
        assert bool(hint) == bool(caught.value.hint), (case, caught.value.hint)
        assert hint in caught.value.hint, case
        for remove, name in (("chardev-remove", arguments.get("chardev")), ("object-del", arguments.get("memdev"))):
            if name in {"c", "m"}:
                await vm.execute(remove, id=name)  # what the refused device had used is free again
        await vm.execute("query-status")

    async def test():
        memory = SharedMemory.create_memfd(1 << 20, "refusals")
        server = Server(str(tmp_path / "s"), memory, 1, shield_qemu=True)
        await server.start()
        vm = Vm(Machine("x"), find_emulator(kind))
        try:
            await vm.launch()
            await vm.execute("chardev-add", **chardev("used", server.path))
            await vm.execute("device_add", driver="ivshmem-doorbell", chardev="used", vectors=1, id="d0")
            await vm.execute("object-add", **backend("used-m"))
            await vm.execute("device_add", driver="ivshmem-plain", memdev="used-m", id="d1")
            for case in REFUSALS:
                if (case, kind) == ("legacy device", "unicorn"):  # ours has it
                    continue
                await refused(vm, case, server.path)
        finally:
            await vm.close()
            await server.close()
            memory.close()

    asyncio.run(test())


@pytest.mark.parametrize("kind", BOTH)
def test_a_q35_says_that_its_first_bus_takes_nothing_later(kind):
    async def test():
        vm = Vm(Machine("x", machine="q35"), find_emulator(kind))
        try:
            await vm.launch()
            await vm.execute("object-add", **backend("m"))
            with pytest.raises(QmpCommandError, match=r"'pcie.0' does not support hotplugging.*root_ports="):
                await vm.execute("device_add", **PLAIN)
        finally:
            await vm.close()

    asyncio.run(test())


@pytest.mark.parametrize("kind", BOTH)
def test_memory_of_another_size_than_its_file_is_refused(kind, tmp_path):
    async def test():
        vm = Vm(Machine("x"), find_emulator(kind))
        try:
            await vm.launch()
            (tmp_path / "f").write_bytes(bytes(1 << 20))
            file = {"qom-type": "memory-backend-file", "mem-path": str(tmp_path / "f"), "size": 2 << 20}
            words = "holds 1M, less than the 2M asked for" if kind == "unicorn" else "does not match.*its own size"
            with pytest.raises(QmpCommandError, match=words):
                await vm.execute("object-add", **backend("f", **file))
            await vm.execute("object-add", **backend("f", **{**file, "size": 1 << 20}))
        finally:
            await vm.close()

    asyncio.run(test())
