"""Snapshots are plain values with a version; a device takes over its own kind only, and says what differs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem_lab.device.effects import Effects, MapBar, SendMsi
from ivshmem_lab.device.ivshmem import Ivshmem
from ivshmem_lab.device.pci import COMMAND
from ivshmem_lab.errors import SnapshotMismatchError

MIB = 1 << 20


def make(vectors: int = 2, memory_bytes: int = MIB, peer_id: int = 1) -> Ivshmem:
    return Ivshmem(memory_bytes, vectors=vectors, peer_id=peer_id)


def through_json(device: Ivshmem) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(json.dumps(device.snapshot()))
    return state


def test_a_snapshot_has_a_version_and_names_its_device() -> None:
    state = through_json(make())
    named = {name: state[name] for name in ("version", "model", "memory_bytes", "vectors")}
    assert named == {"version": 1, "model": "ivshmem-doorbell", "memory_bytes": MIB, "vectors": 2}
    assert bytes.fromhex(state["config"]) == make().config_bytes()


def test_registers_bars_and_masks_arrive_and_the_id_stays() -> None:
    source, target = make(peer_id=1), make(peer_id=7)
    source.write_config(0x10, 4, 0xE0000000)
    source.write_config(COMMAND, 2, 6)
    source.write_bar(0, 0, 4, 0xABCD)
    source.write_bar(0, 4, 4, 5)
    source.write_bar(1, 8, 4, 0x41)
    assert target.restore(through_json(source)) == (MapBar(0, 0xE0000000),)
    assert (target.int_mask, target.int_status, target.peer_id) == (0xABCD, 5, 7)
    assert target.snapshot() == source.snapshot()


def test_what_pends_and_is_not_masked_is_sent_on_arrival() -> None:
    source, target = make(), make()
    source.write_config(COMMAND, 2, 4)
    source.write_config(0x42, 2, 0xC000)
    source.write_bar(1, 0, 4, 0xFEE00000)
    source.write_bar(1, 8, 4, 0x41)
    source.write_bar(1, 12, 4, 0)
    assert source.interrupt(0) == ()
    assert source.interrupt(1) == ()
    state = through_json(source)
    assert target.restore(state) == ()
    assert target.msix is not None
    assert target.msix.pending == 3
    sent: Effects = target.write_config(0x42, 2, 0x8000)
    assert sent == (SendMsi(0xFEE00000, 0x41),), "vector 1 is masked in its entry"
    assert target.msix.pending == 2


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (make(vectors=3), {"vectors": (2, 3)}),
        (make(memory_bytes=2 * MIB), {"memory_bytes": (MIB, 2 * MIB)}),
        (make(vectors=0), {"model": ("ivshmem-doorbell", "ivshmem-plain"), "vectors": (2, 0)}),
    ],
)
def test_a_snapshot_of_another_device_is_refused_by_name_and_changes_nothing(
    other: Ivshmem, what: dict[str, tuple[object, object]]
) -> None:
    before = other.snapshot()
    with pytest.raises(SnapshotMismatchError) as caught:
        other.restore(through_json(make()))
    assert caught.value.mismatches == what
    for name, (there, here) in what.items():
        assert f"{name} is {there} there and {here} here" in str(caught.value)
    assert other.snapshot() == before


def test_a_snapshot_of_another_version_is_refused() -> None:
    with pytest.raises(SnapshotMismatchError, match="version is 2 there and 1 here"):
        make().restore({**through_json(make()), "version": 2})


accesses = st.tuples(st.integers(0, 2), st.integers(0, 260), st.sampled_from([1, 2, 4]), st.integers(0, (1 << 32) - 1))


@given(st.sampled_from([0, 1, 130]), st.lists(accesses, max_size=30), st.lists(st.integers(0, 129), max_size=4))
def test_whatever_was_done_to_a_device_its_copy_is_the_same(
    vectors: int, writes: list[tuple[int, int, int, int]], events: list[int]
) -> None:
    source, target = make(vectors), make(vectors)
    for where, offset, size, bits in writes:
        value = bits & (1 << 8 * size) - 1
        if where == 2:
            source.write_config(offset, size, value)
        elif where == 0 or vectors:
            source.write_bar(where, offset, size, value)
    for vector in events:
        source.interrupt(vector)
    target.restore(through_json(source))
    assert target.mapped == source.mapped
    assert target.config_bytes() == source.config_bytes()
    assert repr(target).splitlines()[1:] == repr(source).splitlines()[1:]
