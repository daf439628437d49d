"""What comes back from a command that has ended in a guest."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from typing import Any

from ..errors import VmError


@dataclass(frozen=True, slots=True)
class Completed:
    """A command that has ended in a guest.

    Attributes
    ----------
    args : tuple of str
    exit_code : int
        Its exit status; negative for a signal.
    stdout_bytes, stderr_bytes : bytes
    duration_s : float
        From the request to the last answer, on the host's clock.
    """

    args: tuple[str, ...]
    exit_code: int
    stdout_bytes: bytes
    stderr_bytes: bytes
    duration_s: float

    @property
    def stdout(self) -> str:
        """Its standard output as text."""
        return self.stdout_bytes.decode("utf-8", "replace")

    @property
    def stderr(self) -> str:
        """Its standard error as text."""
        return self.stderr_bytes.decode("utf-8", "replace")

    @property
    def status(self) -> str:
        """How it ended, in words."""
        if self.exit_code >= 0:
            return f"exit status {self.exit_code}"
        try:
            return f"signal {signal.Signals(-self.exit_code).name}"
        except ValueError:
            return f"signal {-self.exit_code}"

    def json(self) -> Any:
        """Return its standard output, read as JSON.

        Raises
        ------
        VmError
            It is none.
        """
        try:
            return json.loads(self.stdout_bytes)
        except ValueError as error:
            said = f"{self.stdout[:200]!r}, and on standard error {self.stderr[-200:]!r}"
            raise VmError(f"{' '.join(self.args)!r} did not print JSON ({self.status}) but {said}") from error


class GuestCommandError(VmError):
    """A command in a guest ended with another status than 0; `.completed` has all of it."""

    def __init__(self, name: str, completed: Completed) -> None:
        said = completed.stderr.strip()[-300:] or completed.stdout.strip()[-300:] or "nothing"
        super().__init__(f"{' '.join(completed.args)!r} in {name} ended with {completed.status}; it said: {said}")
        self.completed = completed
