"""``--fault slow-attach`` as a guest sees it: no id yet, then its id, then interrupts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from command_tools import Foreground
from machines import LIMIT_S, Machine

from ivshmem_lab.guests import guest_path
from ivshmem_lab.peer.peer import Peer

if TYPE_CHECKING:
    from pathlib import Path

GUEST = ["-kernel", str(guest_path("intx")), "-append", "exit=2"]
DEVICE = ["-device", "ivshmem,chardev=c,msi=off,size=1"]


def test_our_server_s_slow_attach_shows_a_guest_minus_one_then_its_id_and_intx(tmp_path: Path) -> None:
    path = tmp_path / "s"
    options = ("-S", str(path), "-M", f"iv-slow-{os.getpid()}", "-l", "1M", "-n", "1")
    with Foreground(*options, "--fault", "slow-attach:peer=0,seconds=4") as server:
        while not path.exists():
            server.line()
        chardev = ["-chardev", f"socket,path={path},id=c"]
        with Machine("unicorn", *chardev, *DEVICE, *GUEST) as machine:
            machine.says("intx: position ffffffff\n")
            machine.says("intx: attached as 0, memory 1d1d1d1d\n")
            with Peer.connect(path, timeout_s=LIMIT_S) as peer:
                for number in (1, 2):
                    peer.ring(0, 0)
                    machine.says(f"intx: interrupt {number} status 1 then 0\n")
            assert machine.wait() == 1
