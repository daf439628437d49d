"""Sequences of accesses that Hypothesis makes up: our machine and real QEMU 7.2 give the same answers.

``IVSHMEM_LAB_ACCESSES`` says how many accesses there are at least (``make conformance``: 100 000), and
``IVSHMEM_LAB_SEED`` which. A sequence with different answers is made as short as it can be, and printed.
"""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import accesses as do
import pytest
from accesses import Pair, Step
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(3600)]

ACCESSES = int(os.environ.get("IVSHMEM_LAB_ACCESSES", "4000"))
SEED = int(os.environ.get("IVSHMEM_LAB_SEED", "") or random.SystemRandom().getrandbits(32))
PERSONALITIES = (0, 1, 2, 129)
STEPS = (40, 120)
EXAMPLES = 4

bits32 = st.one_of(st.sampled_from([0, 1, 2, 0xFF, 0x8000, 0xFFFF, 0xFFFFFFFF]), st.integers(0, 2**32 - 1))
bits64 = st.one_of(bits32, st.integers(0, 2**64 - 1))
widths = st.sampled_from([1, 2, 4])
places = st.integers(0, 2)


def maybe(values: st.SearchStrategy[int]) -> st.SearchStrategy[int | None]:
    return st.one_of(st.none(), values)


def config_steps() -> st.SearchStrategy[Step]:
    """Everything but the BARs, whose moves are steps of their own: they must not lie over each other."""
    offsets = st.one_of(st.integers(0, 0x0F), st.integers(0x28, 0x4F), st.integers(0x50, 0xFF))
    writes = st.builds(lambda at, size, value: do.config(at & -size, size, value), offsets, widths, bits32)
    reads = st.builds(
        lambda at, size, odd: do.config(at, size, port_offset=odd), st.integers(0, 0xFF), widths, st.integers(0, 3)
    )
    commands = st.builds(lambda value: do.config(4, 2, value), st.sampled_from([0, 2, 4, 6, 7, 0x106, 0x402, 0x507]))
    return st.one_of(writes, reads, commands)


def bar_steps(vectors: int) -> st.SearchStrategy[Step]:
    indices = st.sampled_from([0, 1, 2] if vectors else [0, 2])
    return st.one_of(
        st.builds(do.move, indices, places),
        st.builds(do.ask_size, indices),
        st.builds(do.poke_bar, indices, st.integers(0, 3), widths, bits32),
    )


def register_steps() -> st.SearchStrategy[Step]:
    offsets = st.one_of(st.integers(0, 19), st.integers(0, 0xFF))
    return st.builds(do.bar, st.just(0), offsets, st.integers(1, 9), maybe(bits64), places)


def memory_steps() -> st.SearchStrategy[Step]:
    return st.builds(do.bar, st.just(2), st.integers(0, 8), st.integers(1, 9), maybe(bits64), places)


def msix_steps(vectors: int) -> st.SearchStrategy[Step]:
    vector = st.one_of(st.integers(0, vectors - 1), st.sampled_from([0, vectors - 1]))
    table = st.one_of(
        st.integers(0, 16 * vectors + 16), st.integers(max(0x800, 16 * vectors), max(0x800, 16 * vectors) + 32)
    )
    return st.one_of(
        st.builds(do.bar, st.just(1), table, st.integers(1, 9), maybe(bits64), st.integers(0, 1)),
        st.builds(do.entry, vector, st.sampled_from(do.TARGETS), bits32, st.sampled_from([0, 0, 1, 2, 0xFFFFFFFE])),
        st.builds(
            lambda value: do.config(0x42, 2, value), st.sampled_from([0, 0x8000, 0x8000, 0x4000, 0xC000, 0xFFFF])
        ),
        st.builds(do.ring, st.sampled_from([0, 0, 0, 1, 0xFFFF]), st.one_of(vector, st.integers(0, 0xFF))),
        st.just(do.pending(vectors)),
        st.just(do.mailbox()),
    )


def steps(vectors: int) -> st.SearchStrategy[Step]:
    kinds = [
        st.just(do.NOTHING),
        config_steps(),
        bar_steps(vectors),
        register_steps(),
        register_steps(),
        memory_steps(),
    ]
    if vectors:
        kinds += [msix_steps(vectors)] * 3
    return st.one_of(*kinds)


@pytest.fixture(scope="module", params=PERSONALITIES, ids=lambda vectors: f"{vectors}-vectors")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with Pair(tmp_path_factory.mktemp("pair"), request.param) as machines:
        yield machines


def test_any_sequence_has_the_answers_of_qemu(pair: Pair, record_property: pytest.RecordProperty) -> None:
    assert pair.vectors is not None

    @settings(
        max_examples=EXAMPLES,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        verbosity=Verbosity.quiet,  # our own words are shorter
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(steps(pair.vectors), min_size=STEPS[0], max_size=STEPS[1]))
    def sequences(script: list[Step]) -> None:
        pair.reset()
        pair.compare(script)

    wanted, rounds = ACCESSES // len(PERSONALITIES), 0
    while pair.accesses < wanted:
        number = SEED + rounds
        try:
            seed(number)(sequences)()
        except AssertionError as error:
            error.add_note(f"the same again: IVSHMEM_LAB_SEED={number}")
            raise
        rounds += 1
    record_property("accesses", pair.accesses)
    print(f"{pair.accesses} accesses with {pair.vectors} vectors, seed {SEED}: the same answers")
