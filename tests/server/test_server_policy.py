"""Who may join, as what: strangers are refused by name, observers cannot write, nobody can resize the memory."""

from __future__ import annotations

import asyncio
import faulthandler
import mmap
import os
import select
import shutil
import signal
import socket
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from server_tools import LIMIT_S, Client, open_fds, serving

from ivshmem_lab.errors import UsageError
from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.server.events import ClientRefused, PeerDeparted, PeerJoined, PeerSettled
from ivshmem_lab.server.policy import Admission, Credentials, NotAdmittedError, Policy, Rule
from ivshmem_lab.server.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ME = os.getuid()
STRANGER = 61234
OBSERVING = Policy(rules=(Rule("observer", uid=ME),))

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else in a child")


@pytest.fixture
def public() -> Iterator[Path]:
    """Make a directory that everybody can enter; pytest's own can be entered by its user only."""
    path = Path(tempfile.mkdtemp(prefix="ivlab-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


async def in_child(deed: Callable[[], str], uid: int | None = None) -> str:
    """Do something in a child process, as somebody else if asked to; return what it said, or how it died."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()  # a child that dies on purpose
            if uid is not None:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            words = deed()
        except BaseException as error:  # noqa: BLE001
            words = f"{type(error).__name__}: {error}"
        os.write(writing, words.encode())
        os._exit(0)
    os.close(writing)
    ended = asyncio.Event()
    pidfd = os.pidfd_open(child)
    asyncio.get_running_loop().add_reader(pidfd, ended.set)
    try:
        async with asyncio.timeout(LIMIT_S):
            await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
    return outcome(child, reading)


def outcome(child: int, pipe_fd: int) -> str:
    with os.fdopen(pipe_fd) as pipe:
        words = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return words if status >= 0 else signal.Signals(-status).name


@pytest.mark.parametrize(
    ("policy", "who", "words"),
    [
        (Policy(uids={1, 2}), Credentials(9, 3, 3), r"uid 3 \(gid 3, pid 9\) may not join; allowed are uids \[1, 2\]"),
        (Policy(gids={5}), Credentials(9, 3, 3), r"allowed are gids \[5\]"),
        (Policy(uids=set(), gids={5}), Credentials(9, 0, 0), r"allowed are uids \[\] and gids \[5\]"),
        (Policy(peers_per_uid=2), Credentials(9, 3, 3), "uid 3 has 2 peers already; 2 are allowed"),
    ],
)
def test_policy_refuses_by_name(policy: Policy, who: Credentials, words: str) -> None:
    with pytest.raises(NotAdmittedError, match=words):
        policy.admit(who, 2)


def test_policy_admits_by_uid_or_gid_and_the_first_rule_says_the_role() -> None:
    policy = Policy(
        uids={1}, gids={5}, rules=(Rule("peer", uid=1, gid=7), Rule("observer", uid=1), Rule("observer", gid=6))
    )
    assert policy.admit(Credentials(9, 1, 7), 0) == "peer"
    assert policy.admit(Credentials(9, 1, 6), 0) == "observer"
    assert policy.admit(Credentials(9, 2, 5), 0) == "peer"
    assert Policy().admit(Credentials(9, 2, 5), 10**6) == "peer"
    assert Policy(rules=(Rule("observer"),)).admit(Credentials(9, 2, 5), 0) == "observer"


def test_impossible_rules_are_refused() -> None:
    with pytest.raises(UsageError, match="role 'guest' is not known; roles are peer, observer"):
        Rule("guest")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="0 peers per uid"):
        Policy(peers_per_uid=0)


def test_more_peers_of_one_uid_than_allowed_are_refused_and_a_departure_helps(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", policy=Policy(peers_per_uid=2)) as watched:
            with await watched.join({0: 1}):
                with await watched.join({0: 1, 1: 1}), Client(watched.path) as third:
                    refused = await watched.event(ClientRefused)
                    assert refused.reason == f"uid {ME} has 2 peers already; 2 are allowed"
                    await third.until_end()
                await watched.event(PeerDeparted)
                (await watched.join({0: 1, 2: 1})).close()
            assert watched.server.status()["counters"]["refusals"] == 1

    asyncio.run(scenario())


@needs_root
def test_strangers_uid_is_refused_by_name_and_nobody_hears_of_it(public: Path) -> None:
    policy = Policy(uids={ME}, socket_mode=0o666)

    async def scenario() -> None:
        async with serving(public / "s", policy=policy) as watched:
            with await watched.join({0: 1}) as alice:

                def knock() -> str:
                    with socket.socket(socket.AF_UNIX) as sock:
                        sock.connect(watched.path)
                        return repr(sock.recv(8))

                assert await in_child(knock, STRANGER) == "b''"
                refused = await watched.event(ClientRefused)
                assert refused.uid == STRANGER
                assert f"uid {STRANGER} (gid {STRANGER}, pid {refused.pid}) may not join" in refused.reason
                (await watched.join({0: 1, 1: 1})).close()
                await alice.until(lambda: 1 in alice.departures)

    asyncio.run(scenario())


@needs_root
def test_socket_mode_keeps_strangers_out_by_default(public: Path) -> None:
    async def scenario() -> None:
        async with serving(public / "s") as watched:

            def knock() -> str:
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(watched.path)
                return "connected"

            assert stat.S_IMODE(os.stat(watched.path).st_mode) == 0o600  # noqa: PTH116
            assert "PermissionError" in await in_child(knock, STRANGER)

    asyncio.run(scenario())


def map_for_writing(fd: int) -> str:
    with mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE):
        return "mapped"


def reopen_for_writing(fd: int) -> str:
    os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
    return "opened"


def resize(fd: int) -> str:
    os.ftruncate(fd, 1 << 20)
    return "resized"


def write_to_a_reading_map(fd: int) -> str:
    import ctypes

    with mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ) as readable:
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        address = libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        assert bytes(readable[:1]) == b"\0"
        ctypes.memset(address, 1, 1)
    return "wrote"


def test_observer_reads_but_cannot_write_ring_or_be_heard_of(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=2) as watched:
            with await watched.join({0: 2}) as alice:
                watched.server.expect(os.getpid(), Admission(role="observer"))
                with Client(watched.path) as eve:
                    await eve.until(lambda: eve.protocol.ready)
                    await watched.event(PeerSettled, 2)
                    with await watched.join({0: 2, 2: 2}):
                        await alice.until_vectors({0: 2, 2: 2})
                    await watched.event(PeerDeparted)
                    eve.drain()
                    assert (eve.peer_id, eve.vectors, eve.departures) == (1, {}, [])
                    watched.memory.map[5] = 77
                    with mmap.mmap(eve.memory_fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ) as view:
                        assert view[5] == 77
                    fd = eve.memory_fd
                    assert "PermissionError: [Errno 13]" in await in_child(lambda: map_for_writing(fd))
                    assert "[Errno 22]" in await in_child(lambda: resize(fd))
                    assert await in_child(lambda: write_to_a_reading_map(fd)) == "SIGSEGV"
                    assert watched.server.peers[1].role == "observer"
                await watched.event(PeerDeparted, 2)
                alice.drain()
                assert alice.departures == [2]

    before = open_fds()
    asyncio.run(scenario())
    assert open_fds() == before


@needs_root
def test_observer_of_another_uid_cannot_open_the_memory_for_writing(public: Path) -> None:
    """With the server's own uid or root it could: there, the role keeps from accidents only."""
    policy = Policy(rules=(Rule("observer", uid=STRANGER),), socket_mode=0o666)

    async def scenario() -> None:
        async with serving(public / "s", policy=policy) as watched:

            def observe(deed: Callable[[int], str]) -> str:
                with Client(watched.path) as client:
                    while not client.protocol.ready and select.select([client.sock], [], [], LIMIT_S)[0]:
                        client.drain()
                    return deed(client.memory_fd)

            assert "PermissionError: [Errno 13]" in await in_child(lambda: observe(reopen_for_writing), STRANGER)
            assert "PermissionError: [Errno 13]" in await in_child(lambda: observe(map_for_writing), STRANGER)
            assert await in_child(lambda: observe(reopen_for_writing)) == "opened"  # a peer, and the same uid
            roles = [event for event in watched.events if isinstance(event, PeerJoined)]
            assert [event.uid for event in roles] == [STRANGER, STRANGER, ME]

    asyncio.run(scenario())


def test_memory_that_others_may_write_cannot_have_observers(tmp_path: Path) -> None:
    with SharedMemory.create_memfd(4096) as memory:
        os.fchmod(memory.fd, 0o666)
        with pytest.raises(UsageError, match="memory with mode 0666 cannot have observers"):
            Server(tmp_path / "s", memory, policy=OBSERVING)
        with pytest.raises(UsageError, match="mode 0666"):
            Server(tmp_path / "s", memory).expect(1, Admission(role="observer"))


def test_no_peer_can_resize_a_memfd_under_the_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s") as watched:
            with await watched.join({0: 1}) as alice:
                for size_bytes in (0, 4096, watched.memory.size_bytes * 2):
                    with pytest.raises(PermissionError):
                        os.ftruncate(alice.memory_fd, size_bytes)

    asyncio.run(scenario())
