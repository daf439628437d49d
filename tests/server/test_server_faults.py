"""Every fault shows the symptom that the catalogue promises, on our own peer."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ivshmem_lab.errors import PeerError, RemoteProtocolError, UnknownPeerError, UsageError
from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.peer.peer import Peer
from ivshmem_lab.server.events import Delivery, PeerDeparted
from ivshmem_lab.server.faults import (
    CATALOGUE,
    MEMORY,
    OWN_ID,
    VERSION,
    Churn,
    Cut,
    Delay,
    Drop,
    Duplicate,
    Faults,
    IdCollision,
    LeaveOutFd,
    SlowAttach,
    WrongVersion,
    describe_faults,
    parse_fault,
)
from ivshmem_lab.server.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ivshmem_lab.server.events import FaultPlan, ServerEvent
    from ivshmem_lab.server.faults import Fault

LIMIT_S = 20.0
GUIDE = Path(__file__).parents[2] / "docs" / "server.md"


@contextlib.contextmanager
def spoilt(path: Path, plan: FaultPlan | None, churn: Churn | None = None) -> Iterator[list[ServerEvent]]:
    """Run a server with two vectors and a fault in a thread; give what it tells. The churn has ended at the end."""
    with SharedMemory.create_memfd(1 << 16) as memory:
        started = threading.Event()
        hooks: list[Callable[[], object]] = []
        events: list[ServerEvent] = []

        async def run() -> None:
            stop = asyncio.Event()
            loop = asyncio.get_running_loop()
            hooks.append(lambda: loop.call_soon_threadsafe(stop.set))
            server = Server(path, memory, 2, events.append, faults=plan)
            await server.start()
            started.set()
            await stop.wait()
            if churn is not None:
                await churn.run(str(path))
            await server.close()

        thread = threading.Thread(target=asyncio.run, args=(run(),))
        thread.start()
        try:
            assert started.wait(LIMIT_S)
            yield events
        finally:
            hooks[0]()
            thread.join(LIMIT_S)


def until(peer: Peer, condition: Callable[[], bool]) -> None:
    """Let a peer hear its server until something is so."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        peer.wait(0, timeout_s=0.05)


def fields(plan: FaultPlan, path: Path) -> str:
    """Join a spoilt server; return the field of the protocol error that it must raise."""
    with spoilt(path, plan), pytest.raises(RemoteProtocolError) as error:
        Peer.connect(path)
    return error.value.field


def test_nothing_is_spoilt_by_default(tmp_path: Path) -> None:
    with spoilt(tmp_path / "s", Faults([])), Peer.connect(tmp_path / "s") as a, Peer.connect(tmp_path / "s") as b:
        assert (a.vectors, b.vectors, b.peers) == (2, 2, {0: 2})
    plans = [fault.plan() for fault in CATALOGUE if fault.plan is not Churn]
    assert all(plan.deliver(5, 1000, 0, True) == Delivery() for plan in plans if not isinstance(plan, Delay))


def test_delay_makes_joining_take_longer_and_beyond_the_limit_it_fails(tmp_path: Path) -> None:
    with spoilt(tmp_path / "s", Delay(seconds=0.05)):
        began = time.monotonic()
        with Peer.connect(tmp_path / "s") as peer:
            until(peer, lambda: peer.vectors == 2)
        assert time.monotonic() - began >= 5 * 0.05
        with pytest.raises(PeerError, match=r"did not introduce us within 0.05 s"):
            Peer.connect(tmp_path / "s", timeout_s=0.05)


def test_slow_attach_holds_back_the_id(tmp_path: Path) -> None:
    with spoilt(tmp_path / "s", SlowAttach(seconds=0.3)):
        with pytest.raises(PeerError, match=r"the peer id, the shared memory did not come"):
            Peer.connect(tmp_path / "s", timeout_s=0.1)
        began = time.monotonic()
        with Peer.connect(tmp_path / "s") as peer:
            assert peer.vectors == 2
        assert time.monotonic() - began >= 0.3


def test_dropped_vector_is_missing_and_the_others_count_lower(tmp_path: Path) -> None:
    with (
        spoilt(tmp_path / "s", Drop(peer_id=1)),
        Peer.connect(tmp_path / "s") as whole,
        Peer.connect(tmp_path / "s") as robbed,
    ):
        assert whole.wait_for_peer(1, LIMIT_S) == 1
        until(robbed, lambda: robbed.vectors == 2)
        assert robbed.peers == {0: 1}
        with pytest.raises(UnknownPeerError, match="peer 0 has no vector 1"):
            robbed.ring(0, 1)
        robbed.ring(0, 0)
        assert whole.wait(1, LIMIT_S) == 1


def test_dropped_id_is_a_protocol_error(tmp_path: Path) -> None:
    assert fields(Drop(index=OWN_ID), tmp_path / "s") == "peer id"


def test_dropped_memory_never_comes(tmp_path: Path) -> None:
    with (
        spoilt(tmp_path / "s", Drop(index=MEMORY)),
        pytest.raises(PeerError, match="the shared memory did not come"),
    ):
        Peer.connect(tmp_path / "s", timeout_s=0.2)


def test_duplicated_vector_is_one_too_many(tmp_path: Path) -> None:
    with (
        spoilt(tmp_path / "s", Duplicate(peer_id=1)),
        Peer.connect(tmp_path / "s") as whole,
        Peer.connect(tmp_path / "s") as deceived,
    ):
        assert deceived.peers == {0: 3}
        deceived.ring(0, 2)  # the last one, as it believes
        assert whole.wait(1, LIMIT_S) == 1


def test_duplicated_departure_does_no_harm_to_our_peer(tmp_path: Path) -> None:
    with spoilt(tmp_path / "s", Duplicate(peer_id=0, index=7)), Peer.connect(tmp_path / "s") as stays:
        with Peer.connect(tmp_path / "s"):
            stays.wait_for_peer(1, LIMIT_S)
        until(stays, lambda: not stays.peers)  # the third is to come after the departure
        with Peer.connect(tmp_path / "s") as third:
            assert stays.wait_for_peer(2, LIMIT_S) == 2
            assert (stays.peers, third.peers) == ({2: 2}, {0: 2})


@pytest.mark.parametrize("after_bytes", [0, 1, 4, 7])
def test_cut_in_mid_message_is_a_protocol_error(after_bytes: int, tmp_path: Path) -> None:
    with spoilt(tmp_path / "s", Cut(after_bytes=after_bytes)) as events:
        words = f"after {after_bytes} of a message's 8 bytes" if after_bytes else "before it sent the shared memory"
        with pytest.raises(RemoteProtocolError, match=words) as error:
            Peer.connect(tmp_path / "s")
        assert error.value.field == "message"
    assert [event.reason for event in events if isinstance(event, PeerDeparted)] == [
        "the fault plan cut its connection"
    ]


def test_memory_without_its_fd_is_a_protocol_error(tmp_path: Path) -> None:
    assert fields(LeaveOutFd(), tmp_path / "s") == "shared memory"


def test_own_vector_without_its_fd_is_a_departure_of_ourselves(tmp_path: Path) -> None:
    assert fields(LeaveOutFd(index=3), tmp_path / "s") == "departure"


def test_wrong_version_is_a_protocol_error(tmp_path: Path) -> None:
    assert fields(WrongVersion(), tmp_path / "s") == "version"


def test_id_collision_steals_interrupts_until_the_holder_leaves(tmp_path: Path) -> None:
    with spoilt(tmp_path / "s", IdCollision(peer_id=1)):
        with Peer.connect(tmp_path / "s") as holder, Peer.connect(tmp_path / "s") as thief:
            assert (holder.peer_id, thief.peer_id, thief.peers) == (0, 0, {1: 2})
            holder.ring(0, 0)
            assert thief.wait(0, LIMIT_S) == 1
            assert holder.wait(0, timeout_s=0) == 0
            holder.close()
            with pytest.raises(RemoteProtocolError, match="the server says that we, peer 0, left") as error:
                thief.wait(0, LIMIT_S)
        assert error.value.field == "departure"


def test_churn_is_seen_to_come_and_go_and_takes_up_ids(tmp_path: Path) -> None:
    with spoilt(tmp_path / "s", None, Churn(rounds=20)) as events, Peer.connect(tmp_path / "s"):
        pass
    assert [event.peer_id for event in events if isinstance(event, PeerDeparted)] == list(range(21))


def test_churn_ends_when_the_server_is_gone(tmp_path: Path) -> None:
    asyncio.run(asyncio.wait_for(Churn(rounds=10**6).run(str(tmp_path / "s")), LIMIT_S))


def test_faults_of_one_peer_leave_the_others_alone(tmp_path: Path) -> None:
    with spoilt(tmp_path / "s", WrongVersion(peer_id=1)), Peer.connect(tmp_path / "s") as first:
        with pytest.raises(RemoteProtocolError):
            Peer.connect(tmp_path / "s")
        with Peer.connect(tmp_path / "s") as third:
            third.ring(0)
            assert first.wait(0, LIMIT_S) == 1


def test_several_faults_join(tmp_path: Path) -> None:
    both = Faults([Delay(seconds=0.5), Delay(index=2, seconds=0.25), Duplicate(index=2, copies=3), WrongVersion()])
    assert both.deliver(0, 2, -1, True) == Delivery(delay_s=0.75, copies=3)
    assert both.deliver(0, VERSION, 0, False) == Delivery(delay_s=0.5, value=1)
    assert both.deliver(0, 9, 0, True) == Delivery(delay_s=0.5)


@pytest.mark.parametrize("fault", CATALOGUE, ids=lambda fault: fault.name)
def test_every_fault_is_documented_and_can_be_asked_for(fault: Fault) -> None:
    assert parse_fault(fault.name) == fault.plan()
    printed = describe_faults()
    assert f"\n{fault.name}  [" in printed
    for words in (fault.does, fault.symptom, fault.qemu):
        assert len(words) > 20
        assert words in printed


def test_guide_has_the_same_table_of_faults() -> None:
    harm = {True: "**harms it**: ", False: ""}
    rows = [
        f"| `{each.name}` | {each.does} | {each.symptom} | {harm[each.harms_qemu]}{each.qemu} |" for each in CATALOGUE
    ]
    assert (
        GUIDE.read_text()
        .partition("## Wrong on purpose")[2]
        .partition("|---|---|---|---|\n")[2]
        .startswith("\n".join(rows) + "\n\n")
    )


def test_tests_that_the_guide_names_exist() -> None:
    named = set(re.findall(r"`(test_\w+\.py)`", GUIDE.read_text()))
    assert len(named) > 5
    assert named <= {path.name for path in GUIDE.parents[1].glob("tests/*/*.py")}


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("drop:peer=3,index=5", Drop(peer_id=3, index=5)),
        ("cut:after_bytes=0x7", Cut(after_bytes=7)),
        ("delay:seconds=1.5,peer=0", Delay(peer_id=0, seconds=1.5)),
        ("churn:rounds=3,pause_s=0.5", Churn(3, 0.5)),
    ],
)
def test_settings_are_read(text: str, plan: object) -> None:
    assert parse_fault(text) == plan


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hail", "fault 'hail' is not known; there are delay, slow-attach, drop"),
        ("drop:seconds=1", "fault 'drop' has no setting 'seconds'; it has peer, index"),
        ("drop:peer=-1", "peer=-1 is not allowed; a whole number from 0 to 65535"),
        ("drop:peer", "peer= is not allowed"),
        ("cut:after_bytes=8", "after_bytes=8 is not allowed; a whole number from 0 to 7"),
        ("delay:seconds=nan", "seconds=nan is not allowed; a number from 0 to 3600"),
        ("delay:seconds=soon", "seconds=soon is not allowed"),
    ],
)
def test_wrong_fault_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_fault(text)
    assert words in str(refused.value)
