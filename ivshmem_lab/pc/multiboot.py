"""A multiboot kernel: reading the ELF file, and what the kernel finds in memory when it starts.

Ref: Multiboot Specification 0.6.96, sections 3.1 (header), 3.2 (machine state), 3.3 (boot information);
System V ABI, chapter 4 (object files).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from ..errors import GuestError
from ..units import KIB, MIB, format_size

HEADER_MAGIC = 0x1BADB002
LOADER_MAGIC = 0x2BADB002
SEARCH_BYTES = 8192
INFO_ADDRESS = 0x9000
"""Where the boot information lies: low memory that no kernel at 1 MiB and above touches."""
INFO_LIMIT = 0x80000
CPUID_PAGE_ALIGN, CPUID_MEMORY, ADDRESSES = 0x1, 0x2, 0x10000
EM_386, ET_EXEC, PT_LOAD = 3, 2, 1


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the kernel: bytes at a physical address, zeros behind them up to `size`."""

    address: int
    data: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel ready to be loaded."""

    entry: int
    segments: tuple[Segment, ...]
    command_line: str


@dataclass(frozen=True, slots=True)
class Start:
    """The CPU state in which the kernel is entered (32-bit protected mode, paging off)."""

    eip: int
    eax: int
    ebx: int


def parse(image: bytes, name: str, command_line: str) -> Kernel:
    """Read a 32-bit multiboot ELF.

    Parameters
    ----------
    image
        The file's bytes.
    name
        Its path, for messages.
    command_line
        What the kernel is told (the loader's convention: path first).

    Raises
    ------
    GuestError
        When it is no 32-bit x86 ELF, or has no multiboot header, or is cut off.
    """
    wanted = "a 32-bit x86 ELF with a multiboot header is needed, such as those of `ivshmem_lab.guests`"
    if image[:4] != b"\x7fELF":
        raise GuestError(f"kernel {name!r} is not an ELF file; {wanted}")
    if image[4:6] != b"\x01\x01" or len(image) < 52:
        raise GuestError(f"kernel {name!r} is not a 32-bit little-endian ELF; {wanted}")
    kind, machine = struct.unpack_from("<HH", image, 16)
    if (kind, machine) != (ET_EXEC, EM_386):
        raise GuestError(
            f"kernel {name!r} is an ELF of type {kind} for machine {machine}, not an x86 executable; {wanted}"
        )
    header = next(
        (
            fields
            for offset in range(0, min(SEARCH_BYTES, len(image)) - 11, 4)
            if (fields := struct.unpack_from("<III", image, offset))[0] == HEADER_MAGIC
            and sum(fields) & 0xFFFFFFFF == 0
        ),
        None,
    )
    if header is None:
        raise GuestError(f"kernel {name!r} has no multiboot header in its first {SEARCH_BYTES} bytes; {wanted}")
    if header[1] & 0xFFFF & ~(CPUID_PAGE_ALIGN | CPUID_MEMORY):
        raise GuestError(f"kernel {name!r} asks for multiboot features {header[1]:#x}; only 0x1 and 0x2 are offered")
    entry, table = struct.unpack_from("<II", image, 24)
    entry_size, count = struct.unpack_from("<HH", image, 42)
    segments = []
    for index in range(count):
        at = table + index * entry_size
        if at + 32 > len(image):
            raise GuestError(f"kernel {name!r} is cut off: program header {index} lies behind its end")
        p_type, offset, _, address, file_size, size = struct.unpack_from("<IIIIII", image, at)
        if p_type != PT_LOAD or not size:
            continue
        if offset + file_size > len(image):
            raise GuestError(f"kernel {name!r} is cut off: segment {index} lies behind its end")
        if file_size > size:
            raise GuestError(f"kernel {name!r} is damaged: segment {index} has {file_size} bytes for {size} of memory")
        segments.append(Segment(address, image[offset : offset + file_size], size))
    if not segments:
        raise GuestError(f"kernel {name!r} has nothing to load; {wanted}")
    return Kernel(entry, tuple(segments), command_line)


def information(kernel: Kernel, ram_bytes: int) -> bytes:
    """Build the boot information as it lies at `INFO_ADDRESS`: memory sizes, command line, memory map."""
    text = os.fsencode(kernel.command_line) + b"\0"
    text_address = INFO_ADDRESS + 128
    map_address = text_address + (len(text) + 7) // 8 * 8
    ranges = [(0, 640 * KIB), (MIB, ram_bytes - MIB)]
    memory_map = b"".join(struct.pack("<IQQI", 20, start, size, 1) for start, size in ranges)
    flags = 0x1 | 0x4 | 0x40
    info = struct.pack("<IIII", flags, 640, (ram_bytes - MIB) // KIB, 0) + struct.pack("<I", text_address)
    info = info.ljust(44, b"\0") + struct.pack("<II", len(memory_map), map_address)
    return (info.ljust(128, b"\0") + text).ljust(map_address - INFO_ADDRESS, b"\0") + memory_map


def check_fit(kernel: Kernel, name: str, ram_bytes: int) -> None:
    """Refuse a kernel that does not fit.

    Raises
    ------
    GuestError
        Names the segment, and the memory that is there.
    """
    for segment in kernel.segments:
        if segment.address < INFO_LIMIT or segment.address + segment.size > ram_bytes:
            raise GuestError(
                f"kernel {name!r} wants {segment.size} bytes at {segment.address:#x}; this machine has memory for kernels "
                f"from {INFO_LIMIT:#x} to {ram_bytes:#x} (-m {format_size(ram_bytes)})"
            )
    room = INFO_LIMIT - INFO_ADDRESS - 256
    if len(os.fsencode(kernel.command_line)) > room:
        raise GuestError(f"the kernel's command line has {len(os.fsencode(kernel.command_line))} bytes; {room} fit")


def load(kernel: Kernel, ram: memoryview) -> Start:
    """Put kernel and boot information into memory.

    Returns
    -------
    Start
        How the CPU enters the kernel.
    """
    for segment in kernel.segments:
        filled = segment.address + len(segment.data)
        ram[segment.address : filled] = segment.data
        ram[filled : segment.address + segment.size] = bytes(segment.size - len(segment.data))
    info = information(kernel, len(ram))
    ram[INFO_ADDRESS : INFO_ADDRESS + len(info)] = info
    return Start(kernel.entry, LOADER_MAGIC, INFO_ADDRESS)
