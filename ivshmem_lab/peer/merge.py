"""Many senders, each with a ring of its own, read as one."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from ..errors import UsageError
from .ring import ChannelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .receiver import Receiver


class Merged:
    """Many senders, each with a channel of its own, read as one. Made by :func:`merge`.

    A channel that fails is left out from then on; its error comes out once, with the receiver as ``error.receiver``.
    """

    def __init__(self, receivers: list[Receiver]) -> None:
        self.receivers = receivers
        self._next = 0

    def receive(self, timeout_s: float | None = None) -> tuple[Receiver, bytes] | None:
        """Take the next message of any sender, in turns, and tell by which channel it came; None when the time is over.

        Raises
        ------
        MergedChannelError
            When one of the channels failed; it is left out from now on.
        UsageError
            When no channel is left.
        """
        if not self.receivers:
            raise UsageError("no channel is left to receive from; merge others")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            found = self._look()
            if found is not None:
                return found
            step_s = self._check_alive()
            if deadline is not None:
                step_s = min(step_s, deadline - time.monotonic())
                if step_s <= 0:
                    return None
            self.receivers[0].pause(step_s)

    def _look(self) -> tuple[Receiver, bytes] | None:
        for _ in range(len(self.receivers)):
            self._next = (self._next + 1) % len(self.receivers)
            receiver = self.receivers[self._next]
            with self._leaving_out(receiver):
                data = receiver.receive_now()
            if data is not None:
                return receiver, data
        return None

    def _check_alive(self) -> float:
        step_s = []
        for receiver in self.receivers:
            with self._leaving_out(receiver):
                step_s.append(receiver.check_alive())
        return min(step_s)

    @contextlib.contextmanager
    def _leaving_out(self, receiver: Receiver) -> Iterator[None]:
        try:
            yield
        except ChannelError as error:
            self.receivers.remove(receiver)
            raise MergedChannelError(receiver, error) from error


class MergedChannelError(ChannelError):
    """One of many channels failed; `receiver` is its end, the cause is its own error."""

    def __init__(self, receiver: Receiver, error: ChannelError) -> None:
        super().__init__(f"the channel at {receiver.offset:#x} is left out: {error}")
        self.receiver = receiver


def merge(receivers: list[Receiver]) -> Merged:
    """Read several channels as one; all wait for the same vector of the same peer, or none has a doorbell.

    Raises
    ------
    UsageError
        When there is none, or they do not wait for the same.
    """
    if len({(id(each.peer), each.vector if each.peer else 0) for each in receivers}) != 1:
        raise UsageError(f"{len(receivers)} channels cannot be merged: they need one peer and one vector in common")
    return Merged(list(receivers))
