"""The lab's side of its reaper: what to remove when the lab cannot."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import subprocess
import sys
from pathlib import Path

from ..errors import LabError
from . import reaper

_log = logging.getLogger(__name__)

_END_TIME_LIMIT_S = 10.0


class Guard:
    """A reaper process and the pipe to it.

    Parameters
    ----------
    directory
        The lab's directory; the reaper removes it with everything in it.

    Raises
    ------
    LabError
        The process could not be started.
    """

    def __init__(self, directory: Path) -> None:
        self._token = secrets.token_hex(16)
        script = str(Path(reaper.__file__).resolve())
        command = [sys.executable, "-I", "-S", script, str(os.getpid()), self._token, str(directory)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise LabError(f"the process that cleans up after the lab could not be started: {error}") from error

    @property
    def environment(self) -> dict[str, str]:
        """What the lab's processes must have in their environment to be found."""
        return {reaper.TOKEN_VARIABLE: self._token}

    @property
    def pid(self) -> int:
        """The reaper's process id."""
        return self._process.pid

    def add_process(self, pid: int) -> None:
        """Guard a child process that has not been waited for."""
        self._tell(f"+pid {pid} {reaper.start_time(pid)}")

    def remove_process(self, pid: int) -> None:
        """Forget a process that is gone."""
        self._tell(f"-pid {pid}")

    def add_path(self, path: str) -> None:
        """Guard a file or socket; a name with a line break cannot be guarded."""
        if "\n" not in path:
            self._tell(f"+path {path}")

    def remove_path(self, path: str) -> None:
        """Forget a file or socket that is gone."""
        if "\n" not in path:
            self._tell(f"-path {path}")

    def close(self) -> None:
        """Let the reaper remove what is left, the directory at least, and wait for its end. May be repeated."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_TIME_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(os.fsencode(line) + b"\n")
        except OSError as error:
            _log.warning("the reaper of this lab is gone (%s): a crash may now leave processes or files behind", error)
