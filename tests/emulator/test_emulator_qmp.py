"""QMP as bytes on a socket: however they are cut, and whoever sends them."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import LIMIT_S, Machine, Qmp
from qemu.qmp import QMPClient

from ivshmem_lab.emulator.qmp import OBJECT_LIMIT_BYTES, JsonSplitter, QmpError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CAPABILITIES = b'{"execute": "qmp_capabilities"}'
STATUS = b'{"execute": "query-status", "id": "a } in a string, and a \\" too"}'


@pytest.fixture(scope="module")
def listening(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Path]]:
    """One machine for all, that listens for QMP clients at a path."""
    path = tmp_path_factory.mktemp("q") / "q"
    with Machine("unicorn", "-S", "-qmp", f"unix:{path},server=on,wait=off") as machine:
        machine.qmp.negotiate()
        yield machine, path


@pytest.fixture
def client(listening: tuple[Machine, Path]) -> Iterator[Qmp]:
    """A client that has just connected."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(listening[1]))
        yield Qmp(sock)


# -- pieces ------------------------------------------------------------------------------------------------------------


def test_the_greeting_tells_a_version_and_no_capabilities(client: Qmp) -> None:
    greeting = client.answer()["QMP"]
    assert greeting["capabilities"] == []
    assert set(greeting["version"]["qemu"]) == {"major", "minor", "micro"}


def test_objects_may_be_cut_anywhere_and_need_no_line_end(client: Qmp) -> None:
    client.negotiate()
    for cut in range(1, len(STATUS)):
        client.send(STATUS[:cut])
        client.send(STATUS[cut:])
        answer = client.answer()
        assert (answer["return"]["status"], answer["id"]) == ("prelaunch", json.loads(STATUS)["id"])


def test_byte_by_byte_and_many_at_once_are_the_same(client: Qmp) -> None:
    client.answer()
    for byte in CAPABILITIES + STATUS:
        client.send(bytes([byte]))
    client.send((STATUS + b"\n \t\r\n") * 10 + STATUS * 10)
    assert client.answer() == {"return": {}}
    assert [client.answer()["return"]["running"] for _ in range(21)] == [False] * 21


def test_before_the_negotiation_only_that_is_answered(client: Qmp) -> None:
    client.answer()
    client.send(b'{"execute": "query-status"}')
    error = client.answer()["error"]
    assert (error["class"], "qmp_capabilities" in error["desc"]) == ("CommandNotFound", True)
    assert client.execute("qmp_capabilities") == {"return": {}}
    assert client.execute("qmp_capabilities")["error"]["class"] == "CommandNotFound"
    assert "return" in client.execute("query-status")


@pytest.mark.parametrize(
    "garbage",
    [
        b"hello\n",
        b"}",
        b"]",
        b"\x00\xff\xfe",
        b"1\n",
        b'"text"\n',
        b"{]",
        b"{nope}",
        b'{"execute": }',
        b'{"execute": "stop", "execute": "cont"}',
        b"[]",
        b"{}",
        b'{"execute": 5}',
        b'{"execute": "stop", "arguments": []}',
        b'{"execute": "stop", "nope": 1}',
        b'{"execute": "\xff"}',
        b'{"execute": "\\ud800"}',
        b"[" * 5000 + b"]" * 5000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"id": ' + b"9" * 5000 + b"}",
    ],
)
def test_garbage_gets_an_error_and_the_session_goes_on(client: Qmp, garbage: bytes) -> None:
    client.negotiate()
    client.send(garbage)
    error = client.answer()["error"]
    assert error["class"] in ("GenericError", "CommandNotFound")
    assert "internal" not in error["desc"]
    # What follows on garbage may be taken as part of it; a later object is an object again.
    answers = []
    client.send(b'\n{"execute": "query-status", "id": 77}')
    while (answer := client.answer()).get("id") != 77:
        answers.append(answer)
    assert "return" in answer
    assert all("error" in other for other in answers)


def test_an_object_that_never_ends_is_given_up(client: Qmp) -> None:
    client.negotiate()
    client.send(b'{"execute": "' + b"x" * OBJECT_LIMIT_BYTES)
    assert str(OBJECT_LIMIT_BYTES) in client.answer()["error"]["desc"]
    client.send(b'\n"}{"execute": "query-status", "id": 1}')
    while (answer := client.answer()).get("id") != 1:
        pass
    assert "return" in answer


@given(st.lists(st.binary(max_size=30), max_size=20))
def test_after_any_bytes_objects_are_objects_again(pieces: list[bytes]) -> None:
    splitter = JsonSplitter()
    for found in [found for piece in pieces for found in splitter.feed(piece)]:
        assert isinstance(found, QmpError) or found[:1] in b"{["
    # The end of a string, if one is open, and of all that is open; twice, for what the first may have escaped.
    splitter.feed(b'"' + b"]" * 700 + b'"' + b"]" * 700 + b"\n")
    assert splitter.feed(b"{}") == [b"{}"]


def test_what_comes_before_and_behind_garbage_is_answered(client: Qmp) -> None:
    client.negotiate()
    client.send(STATUS + b"what? \n" + STATUS + b"}}}" + STATUS)
    kinds = ["return" in client.answer() for _ in range(5)]
    assert kinds == [True, False, True, False, True]


json_values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text(), json_values, max_size=3), min_size=1, max_size=5), st.data())
def test_objects_come_out_of_the_splitter_as_they_went_in(objects: list[dict[str, Any]], data: st.DataObject) -> None:
    text = b"\n".join(json.dumps(each).encode() for each in objects)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    splitter = JsonSplitter()
    found: list[Any] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        found += splitter.feed(text[start:end])
    assert [json.loads(each) for each in found] == objects


# -- arguments ---------------------------------------------------------------------------------------------------------

ODD_VALUES = [None, 3, -1, 1 << 70, 1.5, True, "", "x" * 5000, "\0", "\ud800", [], [1], {}, {"a": 1}]
COMMANDS: dict[str, list[dict[str, Any]]] = {
    "device_add": [
        {"driver": "ivshmem-plain", "memdev": "m", "id": "d", "addr": "5", "master": "off", "bus": "pci.0"},
        {"driver": "ivshmem-doorbell", "chardev": "serial", "vectors": 1, "ioeventfd": True},
        {"driver": "isa-debug-exit", "iobase": 1, "iosize": 1},
    ],
    "device_del": [{"id": "d"}],
    "object-add": [{"qom-type": "memory-backend-file", "id": "k", "size": 4096, "share": True, "mem-path": "/nope/f"}],
    "object-del": [{"id": "k"}],
    "chardev-remove": [{"id": "c"}],
    "qom-get": [{"path": "/machine/peripheral/x", "property": "type"}],
    "qom-list": [{"path": "/nope"}],
}


def test_arguments_of_any_type_are_refused_or_taken_but_never_a_fault(client: Qmp) -> None:
    client.negotiate()
    for command, examples in COMMANDS.items():
        for example in examples:
            for name in example:
                for odd in ODD_VALUES:
                    answer = client.execute(command, **{**example, name: odd})
                    assert "internal error" not in str(answer), (command, name, odd)
    backend = {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": "/nope/s"}}, "server": False}}

    def spoil(node: dict[str, Any], put: Callable[[Any], Any]) -> Iterator[Any]:
        for name, value in node.items():
            for odd in ODD_VALUES:
                yield put({**node, name: odd})
            if isinstance(value, dict):
                yield from spoil(value, lambda inner, name=name: put({**node, name: inner}))

    for spoiled in spoil(backend, lambda node: node):
        assert "internal error" not in str(client.execute("chardev-add", id="c", backend=spoiled)), spoiled
        client.execute("chardev-remove", id="c")
    assert client.ok("query-status")["status"] == "prelaunch"


# -- clients -----------------------------------------------------------------------------------------------------------


def test_clients_come_one_after_the_other(listening: tuple[Machine, Path]) -> None:
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(listening[1]))
            client = Qmp(sock)
            client.negotiate()
            assert "return" in client.execute("query-status")


def test_a_client_that_leaves_in_the_middle_harms_nobody(listening: tuple[Machine, Path]) -> None:
    for data in (b"", b"{", CAPABILITIES, CAPABILITIES + STATUS * 200):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(listening[1]))
            sock.sendall(data)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(listening[1]))
        Qmp(sock).negotiate()


def test_two_monitors_see_the_same_events_and_only_their_own_answers(
    listening: tuple[Machine, Path], client: Qmp
) -> None:
    client.negotiate()
    machine, _ = listening
    machine.qmp.ok("cont")
    client.ok("stop")
    for each in (machine.qmp, client):
        assert each.event("RESUME")["timestamp"].keys() == {"seconds", "microseconds"}
        each.event("STOP")


def test_qemu_qmp_as_the_client(listening: tuple[Machine, Path]) -> None:
    async def talk() -> tuple[Any, Any, dict[str, Any]]:
        client = QMPClient("test")
        async with asyncio.timeout(LIMIT_S):
            await client.connect(str(listening[1]))
            try:
                status = await client.execute("query-status")
                names = {entry["name"] for entry in await client.execute("query-commands")}
                with client.listener("RESUME") as events:
                    await client.execute("cont")
                    event = await events.get()
                await client.execute("stop")
                return status, names, event
            finally:
                await client.disconnect()

    status, names, event = asyncio.run(talk())
    assert status == {"status": "prelaunch", "singlestep": False, "running": False} or status["status"] == "paused"
    wanted = "qmp_capabilities query-status query-version query-commands query-pci cont stop system_reset device_add"
    wanted += " device_del object-add object-del chardev-add chardev-remove qom-get qom-list quit"
    assert names >= set(wanted.split())
    assert event["event"] == "RESUME"


def test_every_listed_command_exists(client: Qmp) -> None:
    client.negotiate()
    for entry in client.ok("query-commands"):
        name = entry["name"]
        if name not in ("qmp_capabilities", "quit"):
            answer = client.execute(name, nope=1)
            assert answer["error"]["class"] != "CommandNotFound", name


def test_standard_input_and_output_speak_qmp(tmp_path: Path) -> None:
    import subprocess

    command = [sys.executable, "-m", "ivshmem_lab.emulator", "-S", "-qmp", "stdio"]
    said = CAPABILITIES + b'{"execute": "query-name"}{"execute": "quit"}'
    run = subprocess.run(command, input=said, capture_output=True, timeout=LIMIT_S, check=False)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert (run.returncode, run.stderr) == (0, b"")
    assert lines[1:3] == [{"return": {}}, {"return": {}}]
    assert {"return": {}} in lines[3:]
    assert "SHUTDOWN" in [line.get("event") for line in lines]


def test_quit_ends_the_process_and_the_path_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "q"
    with Machine("unicorn", "-S", "-qmp", f"unix:{path},server=on,wait=off") as machine:
        machine.qmp.negotiate()
        assert path.is_socket()
        machine.qmp.ok("quit")
        assert machine.qmp.event("SHUTDOWN")["data"] == {"guest": False, "reason": "host-qmp-quit"}
        assert machine.qmp.closed()
        assert (machine.wait(), machine.errors, list(tmp_path.iterdir())) == (0, "", [])
