"""Reading multiboot ELFs, good and bad, and what a kernel finds in memory."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ivshmem_lab.errors import GuestError
from ivshmem_lab.guests import available, guest_path
from ivshmem_lab.pc import multiboot

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
PROBE = guest_path("probe").read_bytes()


def elf(
    *segments: tuple[int, bytes, int], flags: int = 0, entry: int = MIB, magic: int = multiboot.HEADER_MAGIC
) -> bytes:
    """Make an ELF with these (address, data, size in memory); the header lies right behind the tables."""
    table = 52
    header_at = table + 32 * len(segments)
    body = struct.pack("<III", magic, flags, -(magic + flags) & 0xFFFFFFFF)
    image = b"\x7fELF\x01\x01\x01".ljust(16, b"\0")
    image += struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, entry, table, 0, 0, 52, 32, len(segments), 0, 0, 0)
    programs, data = b"", body
    for address, content, size in segments:
        programs += struct.pack("<IIIIIIII", 1, header_at + len(data), address, address, len(content), size, 7, 4)
        data += content
    return image + programs + data


@pytest.mark.parametrize("name", available())
def test_our_guest_programs_are_read(name: str) -> None:
    path = guest_path(name)
    kernel = multiboot.parse(path.read_bytes(), str(path), f"{path} exit=1")
    assert kernel.segments[0].address == MIB
    assert any(segment.address <= kernel.entry < segment.address + segment.size for segment in kernel.segments)
    multiboot.check_fit(kernel, str(path), 16 * MIB)


def test_every_truncation_of_a_real_elf_is_refused_or_loads_all_there_is() -> None:
    whole = multiboot.parse(PROBE, "probe", "probe")
    needed = PROBE.index(whole.segments[-1].data) + len(whole.segments[-1].data)
    # Every length around the headers, every 13th beyond: that is code and data, byte for byte alike.
    for length in {*range(700), *range(700, len(PROBE), 13), needed - 1, needed}:
        try:
            kernel = multiboot.parse(PROBE[:length], "probe", "probe")
        except GuestError:
            assert length < needed
        else:
            # What is cut off is no part of any segment: symbols and names of sections.
            assert (length >= needed, kernel) == (True, whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image: b"", "not an ELF file"),
        (lambda image: b"#!/bin/sh\n", "not an ELF file"),
        (lambda image: image[:4] + b"\x02" + image[5:], "not a 32-bit little-endian ELF"),
        (lambda image: image[:5] + b"\x02" + image[6:], "not a 32-bit little-endian ELF"),
        (lambda image: image[:16] + b"\x03" + image[17:], "type 3"),
        (lambda image: image[:18] + b"\x3e" + image[19:], "machine 62"),
        (lambda image: image[:44] + b"\xff\x7f" + image[46:], "cut off: program header"),
        (lambda image: image[:28] + b"\xff\xff\xff\x7f" + image[32:], "cut off: program header"),
        (lambda image: elf((MIB, b"", 0)), "nothing to load"),
        (lambda image: elf(), "nothing to load"),
        (lambda image: elf((MIB, b"x", 1), magic=0x12345678), "no multiboot header in its first 8192"),
        (lambda image: elf((MIB, b"x", 1), flags=4), "features 0x4"),
        (lambda image: elf((MIB, b"xy", 1)), "segment 0"),
    ],
)
def test_what_is_no_kernel_is_refused_with_the_reason(change: Callable[[bytes], bytes], words: str) -> None:
    with pytest.raises(GuestError, match=f"'/some/path'.*{words}"):
        multiboot.parse(change(PROBE), "/some/path", "k")


def test_addresses_in_the_header_are_for_kernels_that_are_no_elf() -> None:
    assert multiboot.parse(elf((MIB, b"x", 1), flags=0x10003), "k", "k").segments == (multiboot.Segment(MIB, b"x", 1),)


@given(st.binary(max_size=300))
@example(b"\x7fELF")
@example(b"\x7fELF\x01\x01")
@example(b"\x7fELF\x01\x01" + bytes(46))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(GuestError):
        multiboot.parse(data, "noise", "noise")


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_elf_is_refused_or_fits_or_does_not(changes: list[tuple[int, int]]) -> None:
    image = bytearray(PROBE)
    for offset, byte in changes:
        image[offset] = byte
    ram = memoryview(bytearray(4 * MIB))
    try:
        kernel = multiboot.parse(bytes(image), "damaged", "damaged")
        multiboot.check_fit(kernel, "damaged", len(ram))
    except GuestError:
        return
    multiboot.load(kernel, ram)
    assert len(ram) == 4 * MIB


@pytest.mark.parametrize(
    ("address", "size"), [(0, 16), (0x9000, 16), (4 * MIB - 8, 16), (0xFFFFFFF0, 0x20), (MIB, 0xFFFFFFFF), (8 * MIB, 1)]
)
def test_a_segment_outside_of_memory_is_refused_with_the_memory_that_is_there(address: int, size: int) -> None:
    kernel = multiboot.parse(elf((address, b"x", size)), "big", "big")
    with pytest.raises(GuestError, match=rf"{size} bytes at {address:#x}.*to 0x400000 \(-m 4M\)"):
        multiboot.check_fit(kernel, "big", 4 * MIB)


def test_a_command_line_that_does_not_fit_is_refused() -> None:
    kernel = multiboot.parse(elf((MIB, b"x", 1)), "k", "k " + "é" * 300_000)
    with pytest.raises(GuestError, match="600002 bytes"):
        multiboot.check_fit(kernel, "k", 4 * MIB)


def test_loading_puts_bytes_zeros_and_information_where_they_belong() -> None:
    ram = bytearray(b"\xee" * 4 * MIB)
    kernel = multiboot.parse(elf((MIB, b"code", 16), (2 * MIB, b"", 8)), "k", "k a=1 ü")
    start = multiboot.load(kernel, memoryview(ram))
    assert (start.eip, start.eax, start.ebx) == (MIB, multiboot.LOADER_MAGIC, multiboot.INFO_ADDRESS)
    assert ram[MIB : MIB + 17] == b"code" + bytes(12) + b"\xee"
    assert ram[2 * MIB : 2 * MIB + 9] == bytes(8) + b"\xee"
    flags, lower, upper, _, text = struct.unpack_from("<IIIII", ram, start.ebx)
    assert (flags, lower, upper) == (0x45, 640, 3 * 1024)
    assert bytes(ram[text : ram.index(0, text)]).decode() == "k a=1 ü"
    length, address = struct.unpack_from("<II", ram, start.ebx + 44)
    entries = [struct.unpack_from("<IQQI", ram, address + offset) for offset in range(0, length, 24)]
    assert entries == [(20, 0, 640 * 1024, 1), (20, MIB, 3 * MIB, 1)]
