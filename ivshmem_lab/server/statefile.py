"""The file by which a server that comes back goes on with its ids and leases, also after ``kill -9``.

Ids are reserved in the file before they are given, a block at a time, so that a server that died without a word
gives none of them again. Eventfds die with the process (eventfd(2)): a lease brought back from here has its old
id and new ones. That confuses nobody, since every connection ended with the old server, and
whoever connects again learns everything anew.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..wire.lease import check_lease_name
from ..wire.messages import MAX_PEER_ID
from .leases import Lease, ServerState
from .packet import new_eventfd

if TYPE_CHECKING:
    from typing import Any

_BLOCK = 64  # ids reserved at a time
_LEAST = 32  # fewer left: the next block
_IDS = MAX_PEER_ID + 1


class StateFile:
    """What a server knows about its ids and leases, on disk, mode 0600; one file for each server.

    Parameters
    ----------
    path
        The file; it is replaced whole (rename(2)), never left half written.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._written: dict[str, Any] = {}
        self._failed = False
        self._done = False

    def load(self) -> ServerState | None:
        """Read what an earlier server left; None when there is no file.

        Raises
        ------
        UsageError
            When the file cannot be read or is no such file.
        """
        try:
            found = json.loads(Path(self.path).read_bytes())
            leases = [(check_lease_name(each["name"]), int(each["uid"]), int(each["id"])) for each in found["leases"]]
            next_id, vectors = int(found["next_id"]), int(found["vectors"])
            ids = [peer_id for _, _, peer_id in leases]
            if not all(0 <= number < _IDS for number in [next_id, *ids]) or len(set(ids)) != len(ids):
                raise ValueError(f"ids are different numbers from 0 to {MAX_PEER_ID}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError, UsageError) as error:
            raise UsageError(
                f"the state file {self.path!r} cannot be used: {error or type(error).__name__}; name another, or remove it to start afresh"
            ) from error
        return ServerState(
            next_id,
            vectors,
            [Lease(name, uid, peer_id, [new_eventfd() for _ in range(vectors)]) for name, uid, peer_id in leases],
        )

    def create(self, state: ServerState) -> None:
        """Write for the first time.

        Raises
        ------
        UsageError
            When the file cannot be written.
        """
        try:
            self._write(self._content(state, self._reserve(state.next_id)))
        except OSError as error:
            raise UsageError(f"the state file {self.path!r} cannot be written: {error}; name another place") from error

    def update(self, state: ServerState, *, last: bool = False) -> None:
        """Write what has changed; with `last`, give reserved ids back, and write nothing any more.

        A failure is said once: the peers need the server more.
        """
        if self._done:
            return
        self._done = last
        reserved = state.next_id if last else self._reserve(state.next_id)
        content = self._content(state, reserved)
        if content == self._written:
            return
        try:
            self._write(content)
        except OSError as error:
            if not self._failed:
                print(f"ivshmem-server: the state file {self.path!r} is out of date: {error}", file=sys.stderr)
            self._failed = True

    def _reserve(self, next_id: int) -> int:
        reserved = self._written.get("next_id", next_id)
        left = (reserved - next_id) % _IDS
        return reserved if _LEAST <= left <= _BLOCK else (next_id + _BLOCK) % _IDS

    @staticmethod
    def _content(state: ServerState, reserved: int) -> dict[str, Any]:
        leases = [{"name": each.name, "uid": each.uid, "id": each.peer_id} for each in state.leases]
        return {"next_id": reserved, "vectors": state.vectors, "leases": leases}

    def _write(self, content: dict[str, Any]) -> None:
        fd, temporary = tempfile.mkstemp(prefix=".ivshmem-state-", dir=Path(self.path).parent)
        try:
            with os.fdopen(fd, "w") as file:
                json.dump(content, file)
            Path(temporary).replace(self.path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        self._written = content
