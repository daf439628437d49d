"""The host's side of a guest's agent against a guest that is broken, hostile or gone."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem_lab.errors import UsageError, VmError
from ivshmem_lab.vm import agent as agent_module
from ivshmem_lab.vm.agent import GuestAgent
from ivshmem_lab.vm.frames import FROM_GUEST, MAGIC, MOST_BYTES, AgentProtocolError, Frame, FrameDecoder, FrameType
from ivshmem_lab.vm.text import VmTimeoutError

if TYPE_CHECKING:
    from collections.abc import Coroutine

LIMIT_S = 10.0

frames = st.builds(Frame, st.sampled_from(sorted(FROM_GUEST)), st.integers(0, 2**32 - 1), st.binary(max_size=200))


@given(st.lists(frames, max_size=6), st.integers(1, 40))
def test_frames_arrive_whole_however_they_are_cut(sent: list[Frame], step: int) -> None:
    stream = b"".join(frame.to_bytes() for frame in sent)
    decoder = FrameDecoder()
    got = [frame for at in range(0, len(stream), step) for frame in decoder.feed(stream[at : at + step])]
    assert got == sent


@pytest.mark.parametrize(
    "head",
    [
        struct.pack("<IIII", MAGIC + 1, FrameType.OUTPUT, 1, 0),
        struct.pack("<IIII", MAGIC, FrameType.RUN, 1, 0),
        struct.pack("<IIII", MAGIC, 99, 1, 0),
        struct.pack("<IIII", MAGIC, FrameType.OUTPUT, 1, MOST_BYTES + 1),
    ],
)
def test_a_head_that_cannot_be_right_is_refused(head: bytes) -> None:
    with pytest.raises(AgentProtocolError, match="sent no frame"):
        FrameDecoder().feed(head)


class Guest:
    """The guest's end of the port, played by the test."""

    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair()
        self.agent = GuestAgent("alice", theirs)
        self.sock.setblocking(False)
        self._decoder = FrameDecoder(frozenset(FrameType))
        self._frames: list[Frame] = []

    async def take(self, kind: FrameType) -> Frame:
        """Return the next frame of a type that the host has sent."""
        loop = asyncio.get_running_loop()
        while True:
            while self._frames:
                frame = self._frames.pop(0)
                if frame.type is kind:
                    return frame
            self._frames = self._decoder.feed(await asyncio.wait_for(loop.sock_recv(self.sock, 65536), LIMIT_S))

    async def send(self, kind: FrameType, job: int = 0, data: bytes = b"") -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, Frame(kind, job, data).to_bytes())

    async def exit(self, job: int, status: int) -> None:
        await self.send(FrameType.EXIT, job, struct.pack("<I", status))


def play(scene: Any) -> None:
    """Run a scene with a guest, and give everything back."""

    async def whole() -> None:
        guest = Guest()
        try:
            work: Coroutine[Any, Any, None] = scene(guest)
            await asyncio.wait_for(work, LIMIT_S)
        finally:
            guest.agent.close()
            guest.sock.close()

    asyncio.run(whole())


def test_output_errors_and_status_come_back_to_the_command_that_they_belong_to() -> None:
    async def scene(guest: Guest) -> None:
        await guest.send(FrameType.HELLO, 0, b"1")
        await guest.agent.wait_ready(LIMIT_S)
        first = await guest.agent.start(["a", "b"], stdin=b"x" * 40000)
        second = await guest.agent.start(["c"])
        inputs = [await guest.take(FrameType.INPUT) for _ in range(2)]
        assert b"".join(frame.data for frame in inputs) == b"x" * 40000
        one, two = await guest.take(FrameType.RUN), await guest.take(FrameType.RUN)
        assert (one.data, two.data) == (b"a\0b\0", b"c\0")
        await guest.send(FrameType.OUTPUT, two.job, b"two")
        await guest.send(FrameType.OUTPUT, one.job, b"one")
        await guest.send(FrameType.ERROR, one.job, b"bad")
        await guest.exit(two.job, 0)
        await guest.exit(one.job, 9)  # killed by signal 9
        done = await first.wait()
        assert (done.stdout, done.stderr, done.exit_code, done.status) == ("one", "bad", -9, "signal SIGKILL")
        assert (await second.wait()).stdout == "two"

    play(scene)


def test_a_command_that_takes_too_long_is_killed_in_the_guest() -> None:
    async def scene(guest: Guest) -> None:
        job = await guest.agent.start(["sleep", "1000"])

        async def obey() -> None:
            frame = await guest.take(FrameType.KILL)
            await guest.exit(frame.job, 9)

        obeying = asyncio.create_task(obey())
        with pytest.raises(VmTimeoutError, match=r"'sleep 1000' in alice did not end in 0\.05 s and was killed"):
            await job.wait(0.05)
        await obeying

    play(scene)


def test_a_guest_that_does_not_even_kill_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "_KILL_TIME_LIMIT_S", 0.05)

    async def scene(guest: Guest) -> None:
        job = await guest.agent.start(["sleep", "1000"])
        with pytest.raises(VmTimeoutError, match="could not be killed: the guest does not answer"):
            await job.wait(0.05)

    play(scene)


def test_a_command_whose_waiter_is_cancelled_is_killed() -> None:
    async def scene(guest: Guest) -> None:
        job = await guest.agent.start(["sleep"])
        waiting = asyncio.create_task(job.wait())
        await guest.take(FrameType.RUN)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (await guest.take(FrameType.KILL)).job == job.number

    play(scene)


@pytest.mark.parametrize(
    "stream",
    [
        b"Kernel panic - not syncing",
        Frame(FrameType.EXIT, 1, b"ab").to_bytes(),
        Frame(FrameType.EXIT, 1, struct.pack("<I", 0x137F)).to_bytes(),
    ],
    ids=["text", "short", "no end of a process"],
)
def test_a_guest_that_sends_nonsense_costs_itself_its_commands(stream: bytes) -> None:
    async def scene(guest: Guest) -> None:
        job = await guest.agent.start(["x"])
        guest.sock.send(stream)
        with pytest.raises(AgentProtocolError):
            await job.wait()
        with pytest.raises(AgentProtocolError):
            await guest.agent.start(["y"])

    play(scene)


def test_a_guest_that_floods_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "MOST_OUTPUT_BYTES", 100_000)

    async def scene(guest: Guest) -> None:
        job = await guest.agent.start(["yes"])
        for _ in range(4):
            await guest.send(FrameType.OUTPUT, job.number, bytes(MOST_BYTES))
        with pytest.raises(VmError, match="wrote more than"):
            await job.wait()
        assert (await guest.take(FrameType.KILL)).job == job.number

    play(scene)


def test_a_machine_that_ends_ends_its_commands() -> None:
    async def scene(guest: Guest) -> None:
        job = await guest.agent.start(["x"])
        guest.sock.close()
        with pytest.raises(VmError, match="alice ended"):
            await job.wait()
        with pytest.raises(VmError, match="alice ended"):
            await guest.agent.wait_ready(LIMIT_S)

    play(scene)


def test_a_guest_that_reads_nothing_holds_up_nobody_for_ever() -> None:
    async def scene(guest: Guest) -> None:
        starting = asyncio.create_task(guest.agent.start(["cat"], stdin=bytes(4 << 20)))
        await asyncio.sleep(0)
        guest.agent.close()
        with pytest.raises(VmError, match="was closed"):
            await starting

    play(scene)


def test_a_guest_that_never_boots_is_told_with_what_to_look_at() -> None:
    async def scene(guest: Guest) -> None:
        with pytest.raises(VmTimeoutError, match=r"said nothing in 0\.02 s.*console"):
            await guest.agent.wait_ready(0.02)

    play(scene)


@pytest.mark.parametrize("args", ["ls -l", [], [""], ["a", 1], ["a\0b"], ["x"] * 300, ["y" * 40000]])
def test_words_that_cannot_be_run_are_refused(args: Any) -> None:
    async def scene(guest: Guest) -> None:
        with pytest.raises(UsageError):
            await guest.agent.start(args)

    play(scene)
