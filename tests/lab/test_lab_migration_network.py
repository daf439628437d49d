"""A machine crosses a network, from one host to another: two network namespaces, made as any user can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HOSTS = Path(__file__).with_name("two_hosts.py")
UNSHARE = ["unshare", "--user", "--map-root-user", "--net"]


@pytest.fixture(scope="module")
def namespaces():
    done = subprocess.run([*UNSHARE, "ip", "link"], capture_output=True, text=True, check=False)
    if done.returncode:
        say = pytest.fail if os.environ.get("IVSHMEM_LAB_REQUIRE") else pytest.skip
        say(f"this user can make no network namespaces, or ip (iproute2) is missing: {done.stderr}")


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("emulator", ["unicorn", pytest.param("qemu", marks=pytest.mark.qemu)])
def test_a_guest_computes_on_at_the_other_host(emulator):
    done = subprocess.run(
        [*UNSHARE, sys.executable, str(HOSTS), emulator], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["here"] == "stopped"
    assert told["there"]["state"] == "running"
    # It says so only when it found in both memories what it had written at the first host.
    assert "migrant: round=" in told["there"]["said"]
    assert told["sent_bytes"] > 1 << 20
