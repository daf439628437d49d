"""Our emulator beside real QEMU 7.2: the same questions, the same answers."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

import bare
import pytest
from machines import LIMIT_S, Machine, Qmp, memfd_backend, served

from ivshmem_lab.guests import guest_path
from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.peer.peer import Peer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.qemu

KINDS = ("unicorn", "qemu")
MIB = 1 << 20
PROBE = str(guest_path("probe"))
EXIT_OK = 1

Ask = Any


# -- the same registers ------------------------------------------------------------------------------------------------


def probe_prints(kind: str, options: list[str]) -> list[str]:
    with Machine(kind, "-kernel", PROBE, "-append", "exit=1", *options) as machine:
        lines = machine.lines()
        assert (machine.wait(), lines[-1]) == (EXIT_OK, "probe: done")
        return [line for line in lines if not line.startswith("addr ")]


def doorbells(path: Path, *vectors: int, properties: str = "") -> list[str]:
    """Options of doorbell devices in slots from 4 on, all of one server."""
    options = []
    for index, count in enumerate(vectors):
        options += ["-chardev", f"socket,id=c{index},path={path}"]
        options += ["-device", f"ivshmem-doorbell,chardev=c{index},vectors={count},addr={4 + index}{properties}"]
    return options


@pytest.mark.parametrize("master", ["", ",master=on", ",master=off", ",master=auto"])
def test_the_probe_prints_the_same_of_a_plain_device(master: str) -> None:
    with SharedMemory.create_memfd(MIB) as memory:
        memory.array()[[0, -1]] = [0x5A, 0xA5]
        options = [*memfd_backend(memory), "-device", f"ivshmem-plain,memdev=m,addr=4{master}"]
        ours, theirs = (probe_prints(kind, options) for kind in KINDS)
    assert ours == theirs
    assert f"memory size {MIB} first 0000005a last a5000000" in ours


@pytest.mark.parametrize("vectors", [(1,), (2,), (129,), (1, 3)], ids=str)
def test_the_probe_prints_the_same_of_doorbell_devices(vectors: tuple[int, ...], tmp_path: Path) -> None:
    prints = []
    for kind in KINDS:
        # A server each, so that the peer ids are equal.
        path = tmp_path / kind
        with served(path, vectors=max(vectors)):
            prints.append(probe_prints(kind, doorbells(path, *vectors)))
    assert prints[0] == prints[1]
    assert [line for line in prints[0] if line.startswith("peer_id")] == [f"peer_id {i}" for i in range(len(vectors))]
    assert sum(line.startswith("msix vectors") for line in prints[0]) == len(vectors)


@pytest.mark.parametrize("properties", [",ioeventfd=on", ",ioeventfd=off", ",master=on"])
def test_the_probe_prints_the_same_whatever_a_doorbell_device_is_told(properties: str, tmp_path: Path) -> None:
    prints = []
    for kind in KINDS:
        path = tmp_path / kind
        with served(path, vectors=2):
            prints.append(probe_prints(kind, doorbells(path, 2, properties=properties)))
    assert prints[0] == prints[1]
    assert "peer_id 0" in prints[0]


# -- the same conversation ---------------------------------------------------------------------------------------------

RAM = {"qom-type": "memory-backend-ram"}
UNIX_NOWHERE = {"addr": {"type": "unix", "data": {"path": "/nope/s"}}, "server": False}


def backend(kind: str, **data: Any) -> Ask:
    return {"id": "c", "backend": {"type": kind, "data": data}}


CONVERSATIONS: dict[str, list[tuple[str, Ask]]] = {
    "requests": [
        ("query-status", {"x": 1}),
        ("nope", {}),
        ("query-name", {}),
        ("qmp_capabilities", {}),
        ("quit", {"x": 1}),
        ("qom-list", {}),
        ("device_del", {"id": 3}),
        ("cont", {"x": 1}),
        ("system_reset", {"x": 1}),
    ],
    "objects": [
        ("object-add", {}),
        ("object-add", {"id": "m"}),
        ("object-add", RAM),
        ("object-add", {**RAM, "id": "m"}),
        ("object-add", {**RAM, "id": "m", "size": 0}),
        ("object-add", {**RAM, "id": "m", "size": "1M"}),
        ("object-add", {**RAM, "id": "1m", "size": MIB}),
        ("object-add", {**RAM, "id": "m", "size": MIB, "share": "on"}),
        ("object-add", {**RAM, "id": "m", "size": MIB, "nope": 1}),
        ("object-add", {"qom-type": "nope", "id": "m", "size": MIB}),
        ("object-add", {"qom-type": 3, "id": "m"}),
        ("object-add", {**RAM, "id": 3}),
        ("object-add", {"qom-type": "memory-backend-file", "id": "m", "size": MIB}),
        ("object-add", {**RAM, "id": "m", "size": MIB}),
        ("object-add", {**RAM, "id": "m", "size": MIB}),
        ("object-add", {"qom-type": "memory-backend-memfd", "id": "k", "size": MIB}),
        ("qom-get", {"path": "/objects/m", "property": "type"}),
        ("qom-get", {"path": "/objects/m", "property": "size"}),
        ("qom-get", {"path": "/objects/m", "property": "share"}),
        ("qom-get", {"path": "/objects/k", "property": "share"}),
        ("qom-get", {"path": "/objects/m", "property": "nope"}),
        ("object-del", {}),
        ("object-del", {"id": "nope"}),
        ("object-del", {"id": "m"}),
        ("object-del", {"id": "m"}),
        ("qom-get", {"path": "/objects/m", "property": "size"}),
    ],
    "plain devices": [
        ("device_add", {}),
        ("device_add", {"driver": "nope"}),
        ("device_add", {"driver": 3}),
        ("device_add", {"driver": "ivshmem-plain"}),
        ("device_add", {"driver": "ivshmem-plain", "memdev": "nope"}),
        ("device_add", {"driver": "ivshmem-plain", "memdev": "nope", "id": "d"}),
        ("device_add", {"driver": "ivshmem-plain", "vectors": 2}),
        ("device_add", {"driver": "isa-debug-exit"}),
        ("object-add", {**RAM, "id": "m", "size": MIB}),
        ("device_add", {"driver": "ivshmem-plain", "memdev": "m", "id": "1x"}),
        ("device_add", {"driver": "ivshmem-plain", "memdev": "m", "addr": "zz"}),
        ("device_add", {"driver": "ivshmem-plain", "memdev": "m", "addr": "20"}),
        ("device_add", {"driver": "ivshmem-plain", "memdev": "m", "bus": "nope"}),
        ("device_add", {"driver": "ivshmem-plain", "memdev": "m", "master": "bogus"}),
        ("device_add", {"driver": "ivshmem-plain", "memdev": "m", "id": "d", "addr": "6"}),
        ("device_add", {"driver": "ivshmem-plain", "memdev": "m", "id": "e"}),
        ("object-del", {"id": "m"}),
        ("object-add", {**RAM, "id": "k", "size": 4096}),
        ("device_add", {"driver": "ivshmem-plain", "memdev": "k", "id": "d"}),
        ("device_add", {"driver": "ivshmem-plain", "memdev": "k", "id": "e", "addr": "6"}),
        ("device_add", {"driver": "ivshmem-plain", "memdev": "k", "addr": "0x7"}),
        ("qom-list", {"path": "/machine/peripheral"}),
        ("qom-get", {"path": "/machine/peripheral/d", "property": "type"}),
        ("qom-get", {"path": "/machine/peripheral/d", "property": "addr"}),
        ("qom-get", {"path": "/machine/peripheral/d", "property": "legacy-addr"}),
        ("qom-get", {"path": "/machine/peripheral/d", "property": "memdev"}),
        ("qom-get", {"path": "/machine/peripheral/d", "property": "master"}),
        ("qom-get", {"path": "/machine/peripheral/d", "property": "hotplugged"}),
        ("qom-get", {"path": "/machine/peripheral/d", "property": "hotpluggable"}),
        ("qom-get", {"path": "/machine/peripheral/d", "property": "realized"}),
        ("qom-get", {"path": "/machine/peripheral/d", "property": "parent_bus"}),
        ("qom-get", {"path": "/machine/peripheral/d", "property": "nope"}),
        ("device_del", {}),
        ("device_del", {"id": "nope"}),
        ("device_del", {"id": "/machine/peripheral/nope"}),
        ("device_del", {"id": "/machine/peripheral/d"}),
        ("device_del", {"id": "d"}),
        ("device_del", {"id": "/machine/peripheral/d"}),
        ("object-del", {"id": "m"}),
    ],
    "doorbell devices": [
        ("device_add", {"driver": "ivshmem-doorbell"}),
        ("device_add", {"driver": "ivshmem-doorbell", "vectors": 2}),
        ("device_add", {"driver": "ivshmem-doorbell", "chardev": "nope"}),
        ("device_add", {"driver": "ivshmem-doorbell", "chardev": "serial"}),
        ("device_add", {"driver": "ivshmem-doorbell", "chardev": "nope", "memdev": "m"}),
        ("device_add", {"driver": "ivshmem-doorbell", "size": "1M"}),
    ],
    "chardevs": [
        ("chardev-add", {}),
        ("chardev-add", {"id": 3, "backend": {}}),
        ("chardev-add", {"id": "c"}),
        ("chardev-add", {"id": "c", "backend": 3}),
        ("chardev-add", {"id": "c", "backend": {}}),
        ("chardev-add", {"id": "c", "backend": {"type": "null"}}),
        ("chardev-add", {"id": "c", "backend": {"type": 3, "data": {}}}),
        ("chardev-add", {"id": "c", "backend": {"type": "null", "data": {}, "z": 1}}),
        ("chardev-add", backend("nope")),
        ("chardev-add", backend("null", x=1)),
        ("chardev-add", backend("file")),
        ("chardev-add", backend("file", out=3)),
        ("chardev-add", backend("file", out="/nope/f")),
        ("chardev-add", backend("socket")),
        ("chardev-add", backend("socket", addr={"data": {}})),
        ("chardev-add", backend("socket", addr={"type": "nope", "data": {}})),
        ("chardev-add", backend("socket", addr={"type": "unix"})),
        ("chardev-add", backend("socket", addr={"type": "unix", "data": {}})),
        ("chardev-add", backend("socket", addr={"type": "unix", "data": {"path": "/nope/s", "y": 1}})),
        ("chardev-add", backend("socket", **{**UNIX_NOWHERE, "server": "x"})),
        ("chardev-add", backend("socket", **{**UNIX_NOWHERE, "x": 1})),
        ("chardev-add", backend("socket", **UNIX_NOWHERE)),
        ("chardev-add", backend("socket", **{**UNIX_NOWHERE, "server": True, "wait": False})),
        ("chardev-add", backend("null")),
        ("chardev-add", backend("null")),
        ("qom-get", {"path": "/chardevs/c", "property": "type"}),
        ("chardev-remove", {}),
        ("chardev-remove", {"id": "nope"}),
        ("chardev-remove", {"id": "serial"}),
        ("chardev-remove", {"id": "monitor"}),
        ("chardev-remove", {"id": "c"}),
        ("chardev-remove", {"id": "c"}),
    ],
    "the tree": [
        ("qom-list", {"path": "/nope"}),
        ("qom-list", {"path": ""}),
        ("qom-list", {"path": "/machine/peripheral"}),
        ("qom-list", {"path": "/machine/peripheral/nope"}),
        ("qom-get", {"path": "/machine", "property": "type"}),
        ("qom-get", {"path": "machine", "property": "type"}),
        ("qom-get", {"path": "/", "property": "type"}),
        ("qom-get", {"path": "/machine/peripheral", "property": "type"}),
        ("qom-get", {"path": "/machine/peripheral/nope", "property": "type"}),
        ("qom-get", {"path": "/chardevs/serial", "property": "type"}),
        ("qom-get", {"path": "/machine"}),
        ("qom-get", {"path": 3, "property": "type"}),
    ],
    "run state": [
        ("query-status", {}),
        ("stop", {}),
        ("query-status", {}),
        ("cont", {}),
        ("cont", {}),
        ("query-status", {}),
        ("stop", {}),
        ("stop", {}),
        ("query-status", {}),
        ("system_reset", {}),
        ("query-status", {}),
        ("cont", {}),
    ],
}


def without_our_more(ours: Ask, theirs: Ask) -> Ask:
    """Cut our words to the length of QEMU's where ours say more behind them: what is allowed."""
    if "error" not in ours or "error" not in theirs:
        return ours
    said, wanted = ours["error"]["desc"], theirs["error"]["desc"]
    longer = said.startswith(wanted) and re.match(r"[;:]| \(|$", said[len(wanted) :])
    return {**ours, "error": {**ours["error"], "desc": wanted}} if longer else ours


@pytest.mark.parametrize("topic", CONVERSATIONS)
def test_a_conversation_has_the_same_answers_and_events(topic: str) -> None:
    answers: dict[str, list[Ask]] = {}
    events: dict[str, list[Ask]] = {}
    for kind in KINDS:
        with Machine(kind, "-S", "-name", "alice") as machine:
            machine.qmp.negotiate()
            answers[kind] = []
            for command, arguments in CONVERSATIONS[topic]:
                answers[kind].append(machine.qmp.execute(command, **arguments))
                if command == "system_reset" and not arguments:
                    machine.qmp.hears("RESET")  # QEMU answers before it is done
            machine.qmp.ok("quit")
            assert machine.qmp.closed()
            assert machine.wait() == 0
            events[kind] = [(event["event"], event.get("data")) for event in machine.qmp.events]
    for asked, ours, theirs in zip(CONVERSATIONS[topic], answers["unicorn"], answers["qemu"], strict=True):
        assert (asked, without_our_more(ours, theirs)) == (asked, theirs)
    assert events["unicorn"] == events["qemu"]


@pytest.mark.parametrize(
    "raw",
    [
        b"[]",
        b"{}",
        b'{"execute":3}',
        b'{"execute":"stop","x":1}',
        b'{"execute":"stop","arguments":3}',
        b'{"execute":"nope","id":[1,{"a":null}]}',
        b'{"arguments":{}}',
        b'{"execute":"query-name","id":null}',
        b'{"execute":"query-name","execute":"stop"}',
    ],
)
def test_requests_of_a_wrong_shape_get_the_same_answer(raw: bytes) -> None:
    answers = []
    for kind in KINDS:
        with Machine(kind, "-S") as machine:
            before = machine.qmp
            before.answer()
            before.send(b'{"execute": "query-status"}')
            first = before.answer()
            assert before.execute("qmp_capabilities") == {"return": {}}
            before.send(raw)
            answers.append((first, before.answer()))
    assert answers[0] == answers[1]


def test_query_pci_has_the_same_shape() -> None:
    shapes = []
    for kind in KINDS:
        options = ["-object", "memory-backend-ram,id=m,size=1M", "-device", "ivshmem-plain,memdev=m,id=d,addr=4"]
        with Machine(kind, "-kernel", PROBE, *options) as machine:
            machine.says("probe: done")  # the firmware has given addresses
            machine.qmp.negotiate()
            machine.qmp.ok("object-add", **{**RAM, "id": "k", "size": 4096})
            machine.qmp.ok("device_add", driver="ivshmem-plain", memdev="k")  # without an id; nobody has mapped it
            buses = machine.qmp.ok("query-pci")
        for device in buses[0]["devices"]:
            for region in device["regions"]:
                region["address"] = -1 if region["address"] == -1 else "somewhere"
        shapes.append(buses)
    assert shapes[0] == shapes[1]
    (newcomer,) = [device for device in shapes[0][0]["devices"] if device["slot"] == 2]
    assert [region["address"] for region in newcomer["regions"]] == [-1, -1]


# -- the same life -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=KINDS)
def emulator(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


def watching(emulator: str, stack: contextlib.ExitStack) -> Machine:
    """A machine whose guest tells of devices that come, and lets go those that shall leave."""
    machine = stack.enter_context(Machine(emulator, "-kernel", PROBE, "-append", "watch=1"))
    machine.qmp.negotiate()
    machine.says("probe: watching")
    return machine


def test_a_plain_device_comes_and_goes(emulator: str) -> None:
    with contextlib.ExitStack() as stack:
        machine = watching(emulator, stack)
        qmp = machine.qmp
        for _ in range(2):
            qmp.ok("object-add", **{**RAM, "id": "m", "size": MIB})
            qmp.ok("device_add", driver="ivshmem-plain", memdev="m", id="d", addr="5")
            machine.says("came slot 05")
            machine.says(f"memory size {MIB}")
            machine.says("probe: done")
            assert qmp.execute("object-del", id="m")["error"]["class"] == "GenericError"
            qmp.ok("device_del", id="d")
            machine.says("leave slot 05")
            deleted = qmp.event("DEVICE_DELETED")["data"]
            assert deleted == {"device": "d", "path": "/machine/peripheral/d"}
            assert qmp.execute("device_del", id="d")["error"]["class"] == "DeviceNotFound"
            qmp.ok("object-del", id="m")


def test_a_doorbell_device_comes_and_goes_and_its_peer_leaves_with_the_chardev(emulator: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with contextlib.ExitStack() as stack:
        stack.enter_context(served(path, vectors=2))
        peer = stack.enter_context(Peer.connect(path))
        machine = watching(emulator, stack)
        qmp = machine.qmp
        address = {"type": "unix", "data": {"path": str(path)}}
        qmp.ok("chardev-add", id="c", backend={"type": "socket", "data": {"addr": address, "server": False}})
        joined = peer.wait_for_peer(timeout_s=LIMIT_S)
        qmp.ok("device_add", driver="ivshmem-doorbell", chardev="c", vectors=2, id="d")
        machine.says("came slot 02")
        machine.says(f"peer_id {joined}")
        machine.says("msix vectors 2 ")
        machine.says("probe: done")
        assert qmp.execute("chardev-remove", id="c")["error"]["desc"] == "Chardev 'c' is busy"
        qmp.ok("device_del", id="d")
        assert qmp.event("DEVICE_DELETED")["data"]["device"] == "d"
        assert peer.peers == {joined: 2}, "it leaves with its connection, not with the device"
        qmp.ok("chardev-remove", id="c")
        until_alone(peer)
        qmp.ok("quit")
        assert machine.wait() == 0


def until_alone(peer: Peer) -> None:
    for _ in range(int(LIMIT_S / 0.05)):
        if not peer.peers:
            return
        peer.wait(timeout_s=0.05)
    raise AssertionError(f"still there: {peer.peers}")


def test_a_reset_carries_out_a_pending_unplug_and_starts_the_guest_again(emulator: str) -> None:
    with Machine(emulator, "-kernel", PROBE) as machine:
        qmp = machine.qmp
        qmp.negotiate()
        qmp.ok("object-add", **{**RAM, "id": "m", "size": MIB})
        qmp.ok("device_add", driver="ivshmem-plain", memdev="m", id="d")
        machine.says("probe: done")  # this guest ejects nothing
        qmp.ok("device_del", id="d")
        qmp.ok("system_reset")
        machine.says("probe: done")
        assert {event["event"] for event in qmp.events} <= {"RESET", "DEVICE_DELETED"}
        assert qmp.event("RESET")["data"] == {"guest": False, "reason": "host-qmp-system-reset"}
        assert qmp.ok("qom-list", path="/machine/peripheral") == [{"name": "type", "type": "string"}]
        qmp.ok("object-del", id="m")


@pytest.mark.parametrize("reboot", [True, False], ids=["reboot", "no-reboot"])
def test_a_guest_that_resets_itself(emulator: str, reboot: bool, tmp_path: Path) -> None:
    fatal = b"\x0f\x01\x1d" + bare.word(bare.DATA) + bare.INT3  # no interrupt table any more: a triple fault
    elf = tmp_path / "fatal.elf"
    elf.write_bytes(bare.elf(bare.kernel(fatal)))
    with Machine(emulator, "-S", "-kernel", str(elf), *([] if reboot else ["-no-reboot"])) as machine:
        machine.qmp.negotiate()
        machine.qmp.ok("cont")
        event = machine.qmp.event("RESET" if reboot else "SHUTDOWN")
        assert event["data"] == {"guest": True, "reason": "guest-reset"}
        if reboot:
            machine.qmp.ok("quit")
        assert machine.wait() == 0


def test_stop_and_cont_hold_and_release_the_guest(emulator: str) -> None:
    with Machine(emulator, "-S", "-kernel", PROBE) as machine:
        qmp: Qmp = machine.qmp
        qmp.negotiate()
        assert qmp.ok("query-status")["status"] == "prelaunch"
        qmp.ok("cont")
        qmp.event("RESUME")
        machine.says("probe: done")
        qmp.ok("stop")
        qmp.event("STOP")
        assert qmp.ok("query-status") == {"status": "paused", "singlestep": False, "running": False}
        qmp.ok("quit")
        assert qmp.event("SHUTDOWN")["data"] == {"guest": False, "reason": "host-qmp-quit"}
        assert machine.wait() == 0


BARE_PROGRAMS: dict[str, Callable[[], bytes]] = {
    "debug exit": lambda: bare.out(0xF4, 41),
    "exceptions": lambda: b"\x31\xc9\xf7\xf1" * 3 + bare.UD2 * 2 + b"\xcd\x30" * 4 + sum_of(0, 6, 0x30),
    "interrupts": lambda: bare.repeat(50, bare.CLI + bare.send_to_self(0x40) + bare.STI + bare.HLT) + sum_of(0x40),
}


def sum_of(*vectors: int) -> bytes:
    """End the machine with the number of these interrupts."""
    code = b"\x31\xc0"
    for vector in vectors:
        code += b"\x03\x05" + bare.word(bare.COUNTS + 4 * vector)  # add eax, [count]
    return code + bare.out_eax(0xF4)


@pytest.mark.parametrize(("what", "value"), [("debug exit", 41), ("exceptions", 9), ("interrupts", 50)])
def test_a_few_instructions_end_alike(emulator: str, what: str, value: int, tmp_path: Path) -> None:
    skip = b"\x83\x04\x24\x02"
    handlers = {vector: skip + bare.increment(bare.COUNTS + 4 * vector) + bare.IRET for vector in (0, 6)}
    handlers[0x30] = bare.increment(bare.COUNTS + 4 * 0x30) + bare.IRET
    elf = tmp_path / "bare.elf"
    elf.write_bytes(bare.elf(bare.kernel(BARE_PROGRAMS[what]() + bare.SLEEP, handlers)))
    with Machine(emulator, "-kernel", str(elf)) as machine:
        assert machine.wait() == value << 1 & 0xFF | 1
