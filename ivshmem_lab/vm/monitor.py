"""The QMP side of a virtual machine: ``qemu.qmp`` with time limits, our errors and no loose ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

from qemu.qmp import ExecuteError, Message, QMPClient, QMPError, Runstate

from ..errors import QmpCommandError, UsageError, VmError
from .hints import hint_for
from .text import VmTimeoutError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping


class MonitorLostError(VmError):
    """The connection to the machine's monitor is gone, or never was."""


class Monitor:
    """A QMP connection on the running loop.

    Parameters
    ----------
    name
        The machine's name.
    on_event
        Called with an event's name and data, before the answer that the machine gave after it.
    """

    def __init__(self, name: str, on_event: Callable[[str, Mapping[str, object]], None]) -> None:
        self._name = name
        self._on_event = on_event
        self._client = QMPClient(name)
        # Without a filter the client would queue every event for ever; this one looks at each in passing.
        self._client.events.event_filter = self._look

    @property
    def connected(self) -> bool:
        """Whether commands can be sent."""
        return self._client.runstate is Runstate.RUNNING

    async def connect(self, sock: socket.socket, timeout_s: float) -> None:
        """Take the greeting and wait until the machine's main loop answers.

        Parameters
        ----------
        sock
            Our end of a socket pair; it belongs to this object from here on.
        timeout_s
            For all of it, in seconds.

        Raises
        ------
        VmTimeoutError
            The machine said nothing, or not enough, in time.
        MonitorLostError
            The machine ended, or spoke something else.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._client.connect(sock)
                # The greeting comes early; this is answered by the main loop, so after the devices were made.
                await self._client.execute("query-status")
        except TimeoutError as error:
            raise VmTimeoutError(f"{self._name} gave no answer in {timeout_s:g} s") from error
        except (QMPError, OSError, EOFError) as error:
            raise MonitorLostError(f"the monitor of {self._name} is gone: {error}") from error
        finally:
            if self._client.runstate is Runstate.IDLE:  # otherwise the client holds it
                sock.close()

    async def execute(self, command: str, arguments: Mapping[str, Any], timeout_s: float) -> Any:
        """Execute a command; see `Vm.execute`. Raises MonitorLostError when there is nobody to answer."""
        if not self.connected:
            raise MonitorLostError(f"the monitor of {self._name} is not connected")
        try:
            json.dumps(arguments)  # a message that cannot be sent would cost the connection
        except (TypeError, ValueError) as error:
            raise UsageError(f"{command}: an argument cannot be written as JSON: {error}") from error
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, arguments or None)
        except ExecuteError as error:
            desc = error.error.error.desc
            raise QmpCommandError(command, error.error_class, desc, hint_for(desc)) from error
        except TimeoutError as error:
            raise VmTimeoutError(
                f"{command}: {self._name} gave no answer in {timeout_s:g} s; it may hang: closing it always works"
            ) from error
        except (QMPError, OSError, EOFError) as error:
            raise MonitorLostError(f"the monitor of {self._name} is gone: {error}") from error

    def send_fd(self, fd: int) -> None:
        """Pass a file descriptor along; the next ``add-fd`` or ``getfd`` takes it.

        Raises
        ------
        MonitorLostError
            The connection is gone.
        """
        if not self.connected:
            raise MonitorLostError(f"the monitor of {self._name} is not connected")
        try:
            self._client.send_fd_scm(fd)
        except (QMPError, OSError) as error:
            raise MonitorLostError(f"the monitor of {self._name} is gone: {error}") from error

    async def disconnect(self) -> None:
        """Give the connection back; what broke it is known already and is not raised again."""
        if self._client.runstate is not Runstate.IDLE:
            # ValueError: a line beyond the client's limit of 10 MiB; RecursionError: JSON nested too deep.
            with contextlib.suppress(QMPError, OSError, EOFError, ValueError, RecursionError):
                await self._client.disconnect()

    def _look(self, event: Message) -> bool:
        data = event.get("data")
        self._on_event(str(event["event"]), data if isinstance(data, dict) else {})
        return False  # nothing is to be queued
