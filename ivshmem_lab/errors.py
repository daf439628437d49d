"""The one error tree of ivshmem_lab.

::

    IvshmemLabError
    ├── UsageError                a wrong argument, option, size or path (commands end with status 2)
    ├── ProtocolError             the wire between server and peer
    │   ├── LocalProtocolError    our side asked for something the protocol forbids
    │   └── RemoteProtocolError   the other side broke the protocol; `.field` says where
    ├── SharedMemoryError         memory could not be made, opened or mapped
    ├── ServerError               the server could not start or go on
    ├── PeerError                 the host peer
    │   ├── PeerClosedError       the connection to the server is gone
    │   └── UnknownPeerError      no such peer id or vector
    ├── DeviceError               the device model or the machine was set up wrongly
    │   └── SnapshotMismatchError a snapshot of another device; `.mismatches` says what differs
    ├── GuestError                a guest program: not found, not an ELF, sources and ELF apart
    ├── VmError                   a virtual machine process
    │   ├── EmulatorNotFoundError the program is not installed
    │   ├── VmStartError          the process ended or said nothing in time
    │   ├── QmpCommandError       the machine refused a QMP command; `.qmp_class`, `.desc`, `.hint`
    │   ├── GuestSilentError      the guest does not let a device go; `force()` or `give_up()`
    │   └── MigrationError        a machine cannot move; `.side`, `.desc`, `.hint`
    └── LabError                  the lab (names, life cycle)
        └── ApplyError            a step of a plan; `.step`, `.done`

A message says what was wrong, with which value, what is allowed, and what to do next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class IvshmemLabError(Exception):
    """Root of all errors that ivshmem_lab raises on purpose."""


class UsageError(IvshmemLabError, ValueError):
    """A wrong argument, option, size or path: the caller's to mend."""


class ProtocolError(IvshmemLabError):
    """The wire between server and peer."""


class LocalProtocolError(ProtocolError):
    """Our side asked for something that the protocol forbids."""


class RemoteProtocolError(ProtocolError):
    """The other side broke the protocol.

    Parameters
    ----------
    field
        The part of the conversation that was wrong: ``"version"``, ``"peer id"``,
        ``"shared memory"``, ``"vector"``, ``"departure"`` or ``"message"``.
    detail
        What arrived and what is allowed.
    """

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"{field}: {detail}")
        self.field = field
        self.detail = detail


class SharedMemoryError(IvshmemLabError):
    """Shared memory could not be made, opened or mapped."""


class ServerError(IvshmemLabError):
    """The ivshmem server could not start or go on."""


class PeerError(IvshmemLabError):
    """Something about this process as a peer."""


class PeerClosedError(PeerError):
    """The connection to the server is gone."""


class UnknownPeerError(PeerError):
    """No such peer id, or no such vector of it."""


class DeviceError(IvshmemLabError):
    """The device model or the machine around it was set up wrongly."""


class SnapshotMismatchError(DeviceError):
    """A snapshot does not belong to this device.

    Parameters
    ----------
    name
        The device that shall take it over.
    mismatches
        What differs: ``{"vectors": (there, here)}``.
    """

    def __init__(self, name: str, mismatches: Mapping[str, tuple[object, object]]) -> None:
        differences = ", ".join(
            f"{what} is {there} there and {here} here" for what, (there, here) in mismatches.items()
        )
        super().__init__(f"{name}: the snapshot is of another device: {differences}")
        self.name = name
        self.mismatches = dict(mismatches)


class GuestError(IvshmemLabError):
    """A guest program could not be found, read or trusted."""


class VmError(IvshmemLabError):
    """Something about a virtual machine process."""


class EmulatorNotFoundError(VmError):
    """The emulator program is not installed."""


class VmStartError(VmError):
    """The virtual machine process ended, or said nothing, before it was ready."""


class QmpCommandError(VmError):
    """The machine refused a QMP command.

    Parameters
    ----------
    command
        The QMP command, for example ``"device_add"``.
    qmp_class
        QMP's error class, for example ``"GenericError"`` or ``"DeviceNotFound"``.
    desc
        The machine's own words.
    hint
        What to do about it, where that is known.
    """

    def __init__(self, command: str, qmp_class: str, desc: str, hint: str = "") -> None:
        super().__init__(f"{command}: {desc} ({qmp_class}){f'; {hint}' if hint else ''}")
        self.command = command
        self.qmp_class = qmp_class
        self.desc = desc
        self.hint = hint


class GuestSilentError(VmError, TimeoutError):
    """The guest was asked to let a device go, and has not done so in time."""


class MigrationError(VmError):
    """A machine could not move to another process; it runs on where it was.

    Parameters
    ----------
    side
        Who refused: ``"source"`` or ``"destination"``.
    desc
        The emulator's own words.
    hint
        What to do about it.
    """

    def __init__(self, side: str, desc: str, hint: str = "") -> None:
        super().__init__(f"the {side} says: {desc}{f'; {hint}' if hint else ''}")
        self.side = side
        self.desc = desc
        self.hint = hint


class LabError(IvshmemLabError):
    """Something about a lab: a name, an order of calls, a life cycle."""


class ApplyError(LabError):
    """A step of a plan could not be done; what was done before stays.

    Parameters
    ----------
    step
        The step, in the words of the plan.
    number
        Which it was, from 1.
    done
        The steps that were done.
    reason
        Why.
    left
        How many steps were not tried.
    """

    def __init__(self, step: str, number: int, done: Sequence[str], reason: Exception, left: int) -> None:
        rest = f"; {left} more not done" if left else ""
        super().__init__(f"step {number}, {step}: {reason} ({len(done)} done before{rest})")
        self.step = step
        self.number = number
        self.done = tuple(done)
        self.reason = reason
        self.left = left
