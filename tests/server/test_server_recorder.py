"""What the recorder writes is what was sent, line by line, and a disk that is full harms nobody."""

from __future__ import annotations

import asyncio
import json
import stat
from typing import TYPE_CHECKING, Any

import pytest
from server_tools import Client

from ivshmem_lab.errors import UsageError
from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.server.events import PeerDeparted, PeerJoined, ServerStarted
from ivshmem_lab.server.recorder import Recorder
from ivshmem_lab.server.server import Server

if TYPE_CHECKING:
    from pathlib import Path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_message_and_event_of_a_server_is_recorded(tmp_path: Path) -> None:
    async def scenario(recorder: Recorder, memory: SharedMemory) -> None:
        server = Server(tmp_path / "s", memory, 1, tap=recorder)
        await server.start()
        try:
            with Client(server.path) as first:
                await first.until_vectors({0: 1})
                with Client(server.path) as second:
                    await second.until_vectors({0: 1, 1: 1})
                await first.until(lambda: first.departures == [1])
        finally:
            await server.close()

    record = tmp_path / "trace"
    with SharedMemory.create_memfd(1 << 16) as memory, Recorder(record, 1, memory.size_bytes) as recorder:
        asyncio.run(scenario(recorder, memory))
        written = lines(record)  # before it is closed: a server that is killed leaves as much
    header, *records = written
    assert (header["ivshmem_trace"], header["vectors"], header["memory_bytes"]) == (1, 1, 65536)
    times = [record["time_ns"] for record in records]
    assert times == sorted(times)
    assert times[0] >= 0
    sent = [each for each in records if "direction" in each]
    assert {each["direction"] for each in sent} == {"out"}
    heard = {peer: [(each["value"], each["has_fd"]) for each in sent if each["peer"] == peer] for peer in (0, 1)}
    hello = [(0, False), (0, False), (-1, True), (0, True)]
    assert heard == {
        0: [*hello, (1, True), (1, False)],
        1: [(0, False), (1, False), (-1, True), (0, True), (1, True)],
    }
    events = [each["event"] for each in records if "event" in each]
    assert events[0] == ServerStarted.__name__
    assert events.count(PeerJoined.__name__) == 2
    assert events.count(PeerDeparted.__name__) >= 1


def test_trace_is_private_and_replaces_an_old_one(tmp_path: Path) -> None:
    record = tmp_path / "trace"
    record.write_text("old\n" * 1000)
    record.unlink()
    with Recorder(record, 3, 4096) as recorder:
        recorder.message(0, 1, -1, True)
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    with Recorder(record, 3, 4096):
        pass
    assert len(lines(record)) == 1


def test_full_disk_ends_the_recording_and_is_said() -> None:
    with Recorder("/dev/full", 1, 4096) as recorder:
        for _ in range(3):
            recorder.message(0, 0, 0, False)
            recorder.event(0, PeerJoined(0, 1, 2))
        assert recorder.failure == "the trace '/dev/full' ends here: No space left on device"


def test_file_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be written: .*choose another file"):
        Recorder(tmp_path / "no" / "such", 1, 4096)
