"""One list of scripted accesses: our machine and real QEMU 7.2 give the same answers, but for the listed differences."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import accesses as do
import pytest
from accesses import MAILBOX, MIB, PLACED, PLACES, Pair, Step
from differences import DIFFERENCES, Difference

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.qemu

PATTERN = 0x8877665544332211


def configuration() -> list[Step]:
    """Read all of it in every width, write ones and zeros everywhere but into BARs, read it again."""
    plain = [offset for offset in range(0, 256, 4) if not 0x10 <= offset < 0x28]
    reads = [do.config(offset, size) for size in (1, 2, 4) for offset in range(0, 256, size)]
    writes = [do.config(offset, 4, value) for offset in plain for value in (0xFFFFFFFF, 0, 0x5A5A5A5A)]
    odd = [do.config(offset, size, port_offset=at) for offset in (0, 8, 0x40) for size in (1, 2, 4) for at in range(4)]
    return [*reads, *itertools.chain(*([write, *reads[-64:]] for write in writes[::7])), *writes, *reads, *odd]


def registers() -> list[Step]:
    """Every offset near the registers, and the end of the BAR, in every width."""
    script = []
    for size in range(1, 9):
        for offset in (*range(20), 0x80, 0xF8, *range(0xFC, 0x101)):
            script += [do.bar(0, offset, size, PATTERN), do.bar(0, 0, 16), do.bar(0, 4, 4, 0x12345678)]
            script += [do.bar(0, offset, size), do.bar(0, 0, 16)]
    return script


def vector_table(vectors: int) -> list[Step]:
    """Every width and alignment in the first entries, the last one, the pending bits and the gaps."""
    start = max(0x800, 16 * vectors)
    script = []
    for base in (0, 16 * (vectors - 1), 16 * vectors, start, start + (vectors + 63) // 64 * 8 - 8, start + 0x100):
        for size in (1, 2, 3, 4, 5, 8, 16):
            for offset in (*range(17), 20):
                script += [
                    do.bar(1, base + offset, size, PATTERN),
                    do.bar(1, base & -16, 32),
                    do.bar(1, base + offset, size),
                ]
    return script


def life_of_a_vector(vectors: int) -> list[Step]:
    """Rung in every state of masks, with and without bus mastering; what is lost, what pends, what is sent when."""
    last = vectors - 1
    script: list[Step] = []
    look = [do.pending(vectors), do.mailbox(), do.bar(0, 4, 4)]
    for control, mask, command in itertools.product((0, 0x8000, 0x4000, 0xC000), (0, 1), (2, 6)):
        script += [do.config(4, 2, command), do.config(0x42, 2, control)]
        for vector in {0, last}:
            script += [do.entry(vector, MAILBOX + 4 * (vector & 7), 0x1000 + vector, mask), do.ring(0, vector)]
            script += [do.ring(0, vector), *look]
        for following in (0xC000, 0x8000, 0, 0x8000):
            script += [do.config(0x42, 2, following), *look]
        script += [do.bar(1, 12, 4, 0), *look, do.bar(1, 12, 4, 1), do.bar(1, 16 * last + 8, 8, 0x2222), *look]
    # To nobody, and to a device's own register.
    script += [do.config(0x42, 2, 0x8000), do.config(4, 2, 6), do.ring(1, 0), do.ring(0, min(vectors, 255)), *look]
    return [*script, do.entry(0, PLACES[0][0], 0x77, 0), do.ring(0, 0), do.bar(0, 0, 4)]


def doorbell_quirks() -> list[Step]:
    """Vectors of more than 8 bits in every width and alignment, as the register path and the exact match take them."""
    script = [do.config(0x42, 2, 0x8000)]
    for size, vector in itertools.product((1, 2, 4, 8), (0, 1, 2, 0xFF, 0x100, 0x101, 0x1FF, 0xFFFF, 0x10001)):
        for offset in range(13 - size, 16):
            line = do.memory(PLACES[0][0] + offset, size, vector, settles=True)
            script += [line, do.pending(2), do.config(0x42, 2, 0x8000)]
    return script


def moves(bars: tuple[int, ...]) -> list[Step]:
    """Every BAR to every place, decoding or not; sizes; bytes of the registers; reads at all places."""
    look = [do.bar(index, 0, 4, place=place) for index in bars for place in range(3)]
    script: list[Step] = [do.bar(0, 0, 4, 0xAA), do.bar(2, 0, 4, 0xBB)]
    for command in (2, 0, 6):
        script += [do.config(4, 2, command), *look]
        for index, place in itertools.product(bars, (1, 2, 0)):
            script += [do.move(index, place), *look]
        for index in bars:
            script += [do.ask_size(index), *look]
            for at, size, value in itertools.product(range(4), (1, 2, 4), (0xFFFFFFFF, 0xE1234567)):
                script += [do.poke_bar(index, at, size, value)]
            script += [do.config(0x10 + 4 * index, 4, 0), *look, do.move(index, 0)]
    return script


def machine() -> list[Step]:
    """What is around the device: the other functions, the ports of hot-plug, configuration and firmware."""
    places = [(slot, offset) for slot in range(32) for offset in (0, 8, 0x0C, 0x2C, 0x3C)]
    script = [do.config(offset, 4, slot=slot) for slot, offset in places]
    script += [do.ports(port, size) for port in (0xAE00, 0xAE04, 0xAE08, 0xAE0C, 0xAE10) for size in (1, 2, 4)]
    script += [do.ports(0xCF8, size) for size in (1, 2, 4)]
    for item, size in ((0, 6), (3, 9), (5, 3), (0x7777, 2)):
        script += [do.ports(0x510, 2, item), *([do.ports(0x511, 1)] * size), do.ports(0x510, 2), do.ports(0x510, 1)]
    return [
        *script,
        *(do.ports(0x1234, size) for size in (1, 2, 4)),
        do.memory(0x90000000, 16),
        do.memory(MIB, 16, PATTERN),
    ]


@pytest.fixture(scope="module", params=[0, 1, 2, 64, 65, 129, 2048], ids=lambda vectors: f"{vectors}-vectors")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with Pair(tmp_path_factory.mktemp("pair"), request.param, served_vectors=min(request.param, 256)) as machines:
        yield machines


def test_configuration_space(pair: Pair) -> None:
    pair.compare(configuration())  # as it is at the start
    pair.reset()
    pair.compare(configuration())


def test_registers_in_every_width_and_alignment(pair: Pair) -> None:
    pair.reset()
    pair.compare(registers())


def test_bars_move_hide_and_tell_their_size(pair: Pair) -> None:
    pair.reset()
    pair.compare(moves((0, 1, 2) if pair.vectors else (0, 2)))


@pytest.mark.parametrize("pair", [1, 2, 64, 65, 129, 2048], indirect=True)
def test_the_vector_table_and_the_life_of_vectors(pair: Pair) -> None:
    pair.reset()
    pair.compare(vector_table(pair.vectors))
    pair.reset()
    pair.compare(life_of_a_vector(pair.vectors))


def test_what_survives_a_reset(pair: Pair) -> None:
    pair.reset()
    everything = [*configuration()[:448], do.bar(2, 0, 64)]
    change = [*(do.config(offset, 4, 0x33333333) for offset in (0x0C, 0x3C, 0x40, 0x50, 0xFC))]
    change += [do.bar(0, 0, 8, PATTERN), do.bar(2, 0, 8, PATTERN)]
    if pair.vectors:
        change += [do.config(0x42, 2, 0x8000), do.entry(0, MAILBOX, 1, 1), do.ring(0, 0), do.pending(pair.vectors)]
        everything += [do.bar(1, 0, 16), do.pending(pair.vectors)]
    pair.compare([*change, do.RESET, *everything, *PLACED, *everything, do.bar(0, 0, 16)])


def test_the_machine_around_the_device(pair: Pair) -> None:
    pair.reset()
    pair.compare(machine())


def test_hot_plug(tmp_path_factory: pytest.TempPathFactory) -> None:
    look = [do.ports(port, 4) for port in (0xAE00, 0xAE04, 0xAE0C, 0xAE00)]
    look += [do.config(offset, 4) for offset in (0, 4, 0x10, 0x18)] + [do.bar(0, 0, 4), do.bar(2, 0, 4)]
    ask = do.command("device_del", id="d")
    gone = do.command("event", name="DEVICE_DELETED")
    moved = [*(do.move(index, 0) for index in (0, 2)), do.config(4, 2, 6)]
    shown = [*look, *moved, *look, do.bar(0, 0, 4, 7), do.bar(2, 0, 4, 9), *look]
    script = [*look]
    endings = (
        [ask, *look, ask, do.ports(0xAE08, 4, 1 << 4), gone],  # asked for, twice; ejected
        [do.ports(0xAE08, 4, 1 << 4), gone],  # ejected without being asked
        [do.ports(0xAE08, 4, 1 << 4 | 1 << 9), gone],  # the lowest bit counts
        [
            do.ports(0xAE08, 2, 1 << 4),
            do.ports(0xAE08, 4, 1 << 5),
            *look,
            ask,
            do.RESET,
            gone,
        ],  # a reset carries it out
    )
    options: list[str] = []
    for number, ending in enumerate(endings):
        # A memory of its own each time: QEMU gives one up late, and aborts when it is used again before.
        options += ["-object", f"memory-backend-ram,id=m{number},size={MIB}"]
        plug = do.command("device_add", driver="ivshmem-plain", id="d", memdev=f"m{number}", addr="4")
        script += [plug, *shown, *ending, *look]
    with Pair(tmp_path_factory.mktemp("pair"), None, *options) as pair:
        pair.compare(script)


@pytest.fixture(scope="module")
def two_vectors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with Pair(tmp_path_factory.mktemp("pair"), 2) as machines:
        yield machines


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda difference: difference.name)
def test_a_listed_difference_is_one(two_vectors: Pair, difference: Difference) -> None:
    two_vectors.reset()
    ours, theirs = (answers[-1][-1] for answers in two_vectors.answers(difference.steps))
    assert ours != theirs, "no difference any more: take it off the list"
    assert ours == (difference.ours or ours)
    assert theirs == (difference.theirs or theirs)


def test_with_the_quirks_of_a_version_its_differences_are_gone(tmp_path_factory: pytest.TempPathFactory) -> None:
    listed = [difference for difference in DIFFERENCES if difference.quirk]
    for quirks in {difference.quirk for difference in listed}:
        with Pair(tmp_path_factory.mktemp("pair"), 2, quirks=quirks) as pair:
            for difference in listed:
                if difference.quirk == quirks:
                    pair.reset()
                    pair.compare(difference.steps)
                    # In every width, at every byte, to every kind of vector.
                    pair.compare(doorbell_quirks())
