"""Traces are read, drawn, and replayed to clients that cannot tell the difference."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from ivshmem_lab.errors import PeerError, RemoteProtocolError, ServerError, UsageError
from ivshmem_lab.peer.peer import Peer
from ivshmem_lab.server.events import LeaseReturned, PeerDeparted, PeerJoined, PeerSettled, ServerStrained
from ivshmem_lab.server.recorder import Recorder
from ivshmem_lab.trace import Sent, Trace, main, read_trace, replay, replay_at, swim_lane

if TYPE_CHECKING:
    from pathlib import Path

LIMIT_S = 20.0
HELLO_0 = [(0, 0, False), (0, 0, False), (0, -1, True), (0, 0, True), (0, 0, True)]
HELLO_1 = [(1, 0, False), (1, 1, False), (1, -1, True), (1, 0, True), (1, 0, True), (1, 1, True), (1, 1, True)]


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """Record two peers with two vectors; the second leaves. Three milliseconds between messages."""
    with Recorder(tmp_path / "t.jsonl", 2, 65536) as recorder:
        start_ns = recorder._start_ns
        moment = iter(range(start_ns, start_ns + 10**12, 3_000_000))
        recorder.event(next(moment), PeerJoined(0, 11, 1000))
        for peer_id, value, has_fd in HELLO_0:
            recorder.message(next(moment), peer_id, value, has_fd)
        recorder.event(next(moment), PeerSettled(0))
        recorder.event(next(moment), PeerJoined(1, 12, 1000))
        for peer_id, value, has_fd in [*HELLO_1, (0, 1, True), (0, 1, True)]:
            recorder.message(next(moment), peer_id, value, has_fd)
        recorder.event(next(moment), PeerDeparted(1, "it closed the connection"))
        recorder.message(next(moment), 0, 1, False)
    return tmp_path / "t.jsonl"


# Reading


def test_trace_is_read_as_it_was_written(record: Path) -> None:
    trace = read_trace(record)
    assert (trace.vectors, trace.memory_bytes, trace.truncated, trace.peers) == (2, 65536, False, [0, 1])
    assert [(1, each.value, each.has_fd) for each in trace.conversation(1)] == HELLO_1
    assert trace.conversation(0)[0] == Sent(3_000_000, 0, 0, False)
    with pytest.raises(UsageError, match=r"nothing was said to peer 7 in this trace; its peers are \[0, 1\]"):
        trace.conversation(7)


def test_conversation_ends_where_the_id_is_given_again(record: Path, tmp_path: Path) -> None:
    with Recorder(tmp_path / "again", 1, 4096) as recorder:
        for value in (0, 0):
            recorder.message(recorder._start_ns, 0, value, False)
        recorder.event(recorder._start_ns, LeaseReturned(0, "board"))
        recorder.message(recorder._start_ns, 0, 0, False)
    assert len(read_trace(tmp_path / "again").conversation(0)) == 2


def test_trace_of_a_killed_server_is_read_up_to_its_last_whole_line(record: Path) -> None:
    whole = len(read_trace(record).records)
    record.write_bytes(record.read_bytes()[:-5])
    trace = read_trace(record)
    assert (len(trace.records), trace.truncated) == (whole - 1, True)
    assert "the trace ends in the middle of a line" in swim_lane(trace)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no trace that"),
        ("{}\n", "is no trace that"),
        ("hello\n", "line 1 is not JSON"),
        ("[]\n", "line 1 is not a JSON object"),
        ('{"ivshmem_trace": 2}\n', "is no trace that"),
        ('{"ivshmem_trace": 1, "vectors": 1}\n', "line 1: it does not say what the server was"),
        ("{HEADER}\n{}\n", "line 2: '{}' is no record"),
        ('{HEADER}\n{"time_ns": 1, "peer": 0, "value": 0}\n', "line 2"),
        ('{HEADER}\n{"time_ns": 1, "peer": 0, "value": 1e99, "has_fd": true}\n', "line 2"),
        ('{HEADER}\n{"time_ns": 1, "peer": 0, "value": 99999999999999999999, "has_fd": true}\n', "line 2"),
        ('{HEADER}\n{"time_ns": 1, "peer": 70000, "value": 0, "has_fd": true}\n', "line 2"),
        ('{HEADER}\n{"time_ns": 1, "peer": "x", "value": 0, "has_fd": true}\n', "line 2"),
        ("{HEADER}\n\n", "line 2 is not JSON"),
    ],
)
def test_file_that_is_no_trace_is_refused_by_line(text: str, words: str, tmp_path: Path) -> None:
    header = json.dumps({"ivshmem_trace": 1, "vectors": 1, "memory_bytes": 4096})
    (tmp_path / "t").write_text(text.replace("{HEADER}", header))
    with pytest.raises(UsageError) as refused:
        read_trace(tmp_path / "t")
    assert words in str(refused.value)


def test_missing_trace_is_said() -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_trace("/nonexistent/t")


# Drawing


def test_swim_lane_has_a_column_per_peer_and_an_arrow_per_message(record: Path) -> None:
    assert swim_lane(read_trace(record)) == (
        "     time ms    server    peer 0    peer 1\n"
        "       0.000       │         ○                [peer joined: pid 11, uid 1000]\n"
        "       3.000       ├─────────▷                version 0\n"
        "       6.000       ├─────────▷                you are peer 0\n"
        "       9.000       ├─────────▶                the memory\n"
        "      12.000       ├─────────▶                your vector 0\n"
        "      15.000       ├─────────▶                your vector 1\n"
        "      18.000       │         ✓                [peer settled]\n"
        "      21.000       │         │         ○      [peer joined: pid 12, uid 1000]\n"
        "      24.000       ├─────────┼─────────▷      version 0\n"
        "      27.000       ├─────────┼─────────▷      you are peer 1\n"
        "      30.000       ├─────────┼─────────▶      the memory\n"
        "      33.000       ├─────────┼─────────▶      peer 0's vector 0\n"
        "      36.000       ├─────────┼─────────▶      peer 0's vector 1\n"
        "      39.000       ├─────────┼─────────▶      your vector 0\n"
        "      42.000       ├─────────┼─────────▶      your vector 1\n"
        "      45.000       ├─────────▶         │      peer 1's vector 0\n"
        "      48.000       ├─────────▶         │      peer 1's vector 1\n"
        "      51.000       │         │         ╳      [peer departed: reason it closed the connection]\n"
        "      54.000       ├─────────▷                peer 1 left\n"
    )


def test_swim_lane_of_one_peer_understands_what_the_others_heard(record: Path) -> None:
    drawing = swim_lane(read_trace(record), [1])
    assert "peer 0's vector 1" in drawing
    assert "peer 1 left" not in drawing
    assert len(drawing.splitlines()) == 1 + 1 + len(HELLO_1) + 1
    with pytest.raises(UsageError, match="peer 5 is not in this trace"):
        swim_lane(read_trace(record), [5])


def test_event_of_no_peer_and_a_wrong_version_are_drawn(tmp_path: Path) -> None:
    with Recorder(tmp_path / "t", 1, 4096) as recorder:
        recorder.event(recorder._start_ns, ServerStrained("no more descriptors"))
        recorder.message(recorder._start_ns, 0, 3, False)
        recorder.message(recorder._start_ns, 0, 0, False)
        recorder.message(recorder._start_ns, 0, -1, False)
    drawing = swim_lane(read_trace(tmp_path / "t"))
    for words in ("[server strained: reason no more descriptors]", "version 3 (wrong)", "but without its fd"):
        assert words in drawing


# Replaying


def test_replay_is_the_same_conversation_with_new_memory_and_lines(record: Path, tmp_path: Path) -> None:
    trace = read_trace(record)
    counts: list[int] = []
    thread = threading.Thread(target=lambda: counts.append(replay_at(trace, tmp_path / "s", 1)))
    thread.start()
    peer = connected(tmp_path / "s")
    with peer:
        assert (peer.peer_id, peer.vectors, peer.peers, peer.size_bytes) == (1, 2, {0: 2}, 65536)
        peer.ring(1, 1)
        assert peer.wait(1, LIMIT_S) == 1
        peer.memory[5] = 7
        assert not peer.memory[6]
    thread.join(LIMIT_S)
    assert counts == [len(HELLO_1)]
    assert not (tmp_path / "s").exists()


def connected(path: Path) -> Peer:
    """Join as soon as somebody listens."""
    never = threading.Event()
    for _ in range(1000):
        try:
            return Peer.connect(path)
        except PeerError:
            never.wait(0.01)
    pytest.fail("nobody listens")


def test_replay_keeps_the_pace(record: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        trace = read_trace(record)
        said = trace.conversation(0)
        recorded_s = (said[-1].time_ns - said[0].time_ns) / 1e9
        started = threading.Event()
        took: list[float] = []

        def play() -> None:
            import time

            began = time.monotonic()
            started.set()
            replay(trace, ours, 0, speed=1.0)
            took.append(time.monotonic() - began)

        thread = threading.Thread(target=play)
        thread.start()
        thread.join(LIMIT_S)
        assert recorded_s == pytest.approx(0.051)
        assert took[0] >= recorded_s


def test_replay_ends_when_the_client_leaves(record: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        assert replay(read_trace(record), ours, 0) < len(HELLO_0) + 3


def test_replay_to_a_client_that_does_not_read_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    endless = Trace(1, 4096, [Sent(0, 0, 0, False)] * 100_000)
    with (
        ours,
        theirs,
        pytest.raises(ServerError, match=r"the client has read nothing for 0.05 s; \d+ messages are out"),
    ):
        replay(endless, ours, 0, timeout_s=0.05)


def test_recorded_fault_is_replayed_too(tmp_path: Path) -> None:
    with Recorder(tmp_path / "t", 1, 4096) as recorder:
        recorder.message(recorder._start_ns, 0, 3, False)
    trace = read_trace(tmp_path / "t")
    thread = threading.Thread(target=replay_at, args=(trace, tmp_path / "s", 0))
    thread.start()
    with pytest.raises(RemoteProtocolError, match="the server speaks version 3"):
        connected(tmp_path / "s")
    thread.join(LIMIT_S)


# The command


def test_command_draws_and_tells_facts(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(record)]) == 0
    assert capsys.readouterr().out == swim_lane(read_trace(record))
    assert main([str(record), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "vectors": 2,
        "memory_bytes": 65536,
        "seconds": pytest.approx(0.054),
        "messages": {"0": 8, "1": 7},
        "events": {"PeerJoined": 2, "PeerSettled": 1, "PeerDeparted": 1},
        "truncated": False,
    }


def test_command_replays(record: Path, tmp_path: Path) -> None:
    code = "import sys; from ivshmem_lab.trace import main; sys.exit(main())"
    command = [sys.executable, "-c", code, str(record), "--replay", str(tmp_path / "s"), "--peer", "1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        with connected(tmp_path / "s") as peer:
            assert peer.peers == {0: 2}
        out, _ = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, json.loads(out)) == (0, {"peer": 1, "messages": 7, "replayed": 7})


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--peer", "9"], 2, "peer 9 is not in this trace"),
        (["--replay", "/tmp/never", "--peer", "0", "--peer", "1"], 2, "a replay is for one peer"),
        (["--replay", "/tmp/never", "--peer", "9"], 2, "nothing was said to peer 9"),
        (["--replay", "x" * 108, "--peer", "1"], 2, "has 108 bytes"),
    ],
)
def test_wrong_call_of_the_command_is_refused(
    options: list[str], status: int, words: str, record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(record), *options]) == status
    assert words in capsys.readouterr().err
