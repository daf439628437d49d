"""Closing a lab while another thread puts members into it leaves none behind."""

from __future__ import annotations

import threading

from ivshmem_lab.errors import IvshmemLabError
from ivshmem_lab.lab.lab import Lab


def test_peers_that_are_made_while_the_lab_closes_end_with_it():
    lab = Lab()
    board = lab.server("board", size="64K", vectors=1)
    made, some = [], threading.Event()

    def make() -> None:
        try:
            for number in range(1000):
                made.append(lab.peer(f"peer{number}", connect=board))
                if number == 3:
                    some.set()
        except IvshmemLabError:
            some.set()

    maker = threading.Thread(target=make)
    maker.start()
    some.wait()
    lab.close()
    maker.join()
    assert 4 <= len(made) < 1000
    assert all(peer.closed for peer in made)
