"""A host peer that goes and comes back under a lease is the same to everybody."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from peer_tools import LIMIT_S, scripted, served

from ivshmem_lab.errors import PeerError, RemoteProtocolError, UsageError
from ivshmem_lab.peer.peer import Peer
from ivshmem_lab.wire.lease import lease_address, lease_of_address

if TYPE_CHECKING:
    from pathlib import Path


def test_holder_that_comes_back_has_its_id_and_nobody_heard_that_it_was_gone(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as stays:
        heard: list[int] = []
        stays.on_leave(heard.append)
        with Peer.connect(tmp_path / "s", lease="red") as holder:
            stays.ring(holder.peer_id)
            assert holder.wait(0, LIMIT_S) == 1
            stays.ring(holder.peer_id)  # nobody takes it: counters start at 0 for who comes back
        with Peer.connect(tmp_path / "s") as stranger, Peer.connect(tmp_path / "s", lease="red") as holder:
            assert (holder.peer_id, stranger.peer_id) == (1, 2)
            assert holder.wait(0, 0) == 0
            stays.ring(1)
            assert holder.wait(0, LIMIT_S) == 1
            assert stays.wait_for_peer(2, LIMIT_S) == 2
        assert stays.dispatch(LIMIT_S) == 1
        assert heard == [2]


def test_lease_that_is_held_is_refused_by_its_name(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s", lease="red") as holder:
        with pytest.raises(PeerError, match="lease 'red' is held by somebody who is connected"):
            Peer.connect(tmp_path / "s", lease="red")
        with Peer.connect(tmp_path / "s", lease="blue") as other:
            other.ring(holder.peer_id)
        assert holder.wait(0, LIMIT_S) == 1


@pytest.mark.parametrize("name", ["", "a b", "a/b", "x" * 49, "\0"])
def test_impossible_name_of_a_lease_is_a_usage_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"lease name .* is not allowed; 1 to 48 letters"):
        Peer.connect(tmp_path / "s", lease=name)


def test_server_that_breaks_off_later_is_not_said_to_refuse_a_lease(tmp_path: Path) -> None:
    with scripted(tmp_path / "s") as script:
        script.introduce((0, None), end=True)
        with pytest.raises(RemoteProtocolError, match="closed before it sent the peer id"):
            Peer.connect(tmp_path / "s", LIMIT_S, lease="red")


def test_address_holds_the_longest_name_and_gives_it_back() -> None:
    name = "x" * 48
    address = lease_address(name, "4194304-0123456789abcdef")
    assert len(address) <= 108  # unix(7), sun_path
    assert lease_of_address(address) == name
    for other in (b"", "", "/tmp/ivshmem_socket", b"\0other"):
        assert lease_of_address(other) is None
