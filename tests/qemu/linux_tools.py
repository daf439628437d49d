"""The image of a Linux guest, built once in a run, by a user who may do nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

NOBODY = 65534


def as_nobody(
    command: list[str], environment: dict[str, str], timeout_s: float = 110.0
) -> subprocess.CompletedProcess[str]:
    """Run a command without privileges: as uid 65534 when we are root, as ourselves otherwise.

    It may still read what its user may not: the checkout lies wherever it lies.
    """
    if os.geteuid() == 0:
        ids = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        caps = [f"--{which}=-all,+dac_read_search" for which in ("inh-caps", "ambient-caps", "bounding-set")]
        command = ["setpriv", *ids, *caps, *command]
    inherited = {key: value for key, value in os.environ.items() if key not in {"HOME", "XDG_RUNTIME_DIR"}}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**inherited, "HOME": "/nonexistent", **environment},
        timeout=timeout_s,
        check=False,
    )


def places(root: Path) -> dict[str, str]:
    """Make folders for `as_nobody` that are its own; return the environment that names them."""
    environment = {}
    for variable, name in (("IVSHMEM_LAB_CACHE", "cache"), ("XDG_RUNTIME_DIR", "run")):
        path = root / name
        path.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(path, NOBODY, NOBODY)
        environment[variable] = str(path)
    return environment


def build(environment: dict[str, str]) -> dict[str, Any]:
    """Build the image with the command, as nobody."""
    command = shutil.which("ivshmem-lab", path=str(Path(sys.executable).parent))
    assert command is not None
    done = as_nobody([command, "linux", "build", "--json"], environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "progress is for terminals"
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
