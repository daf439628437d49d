"""Real QEMU 7.2 takes the command lines that ``translate`` makes of the legacy device's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from machines import Machine, served

from ivshmem_lab.topology.formats import translate

pytestmark = pytest.mark.qemu

MIB = 1 << 20


def ivshmem_devices(machine: Machine) -> list[dict[str, Any]]:
    machine.qmp.negotiate()
    (bus,) = machine.qmp.ok("query-pci")
    return [device for device in bus["devices"] if device["id"]["device"] == 0x1110]


# QEMU shows an "auto" as what it has become: "on" for the peer 0 and for memory alone.


def memory_bytes(device: dict[str, Any]) -> int:
    return next(region["size"] for region in device["regions"] if region["bar"] == 2)


@pytest.mark.parametrize(("role", "master"), [("", "on"), (",role=peer", "off"), (",role=master", "on")])
def test_qemu_takes_memory_without_a_server(role: str, master: str) -> None:
    name = f"ivshmem-translated-{os.getpid()}"
    written = translate(["-device", f"ivshmem,shm={name},size=2,id=iv,addr=6{role}"])
    try:
        with Machine("qemu", "-S", *written.argv) as machine:
            (device,) = ivshmem_devices(machine)
            assert (device["qdev_id"], device["slot"], memory_bytes(device)) == ("iv", 6, 2 * MIB)
            assert machine.qmp.ok("qom-get", path="/machine/peripheral/iv", property="master") == master
            machine.qmp.ok("quit")
            assert (machine.wait(), machine.errors) == (0, "")
        assert Path("/dev/shm", name).stat().st_size == 2 * MIB
    finally:
        Path("/dev/shm", name).unlink(missing_ok=True)


@pytest.mark.parametrize(("given", "ioeventfd"), [("", False), (",ioeventfd=on,msi=on", True), (",msi=off", False)])
def test_qemu_takes_a_server_s_device(given: str, ioeventfd: bool, tmp_path: Path) -> None:
    path = tmp_path / "a,b"
    with served(path, vectors=2, size_bytes=MIB):
        chardev = f"socket,path={str(path).replace(',', ',,')},id=c"
        written = translate(["-chardev", chardev, "-device", f"ivshmem,chardev=c,vectors=2,size=1,id=iv{given}"])
        with Machine("qemu", "-S", *written.argv) as machine:
            (device,) = ivshmem_devices(machine)
            assert (device["qdev_id"], memory_bytes(device)) == ("iv", MIB)
            get = {
                name: machine.qmp.ok("qom-get", path="/machine/peripheral/iv", property=name)
                for name in ("master", "vectors", "ioeventfd")
            }
            assert get == {"master": "on", "vectors": 2, "ioeventfd": ioeventfd}
            machine.qmp.ok("quit")
            assert (machine.wait(), machine.errors) == (0, "")
