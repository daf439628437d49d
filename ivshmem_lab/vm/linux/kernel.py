"""A kernel out of its compressed image (Linux, Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header").

QEMU starts an uncompressed ``vmlinux`` by its PVH entry, which is quicker under TCG than unpacking it there: with xz by 3 s.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import lzma
import struct
from typing import Any

from .errors import LinuxImageError

_ELF = b"\x7fELF"
_LZ4_LEGACY_BLOCK = 8 << 20
"""Most uncompressed bytes of a block (lz4, doc/lz4_Frame_format.md, "Legacy frame")."""


class UnpackerMissingError(LinuxImageError):
    """The package that can unpack this compression is not installed."""


def extract_vmlinux(image: bytes) -> bytes:
    """Return the ELF inside a bzImage.

    Raises
    ------
    UnpackerMissingError
        It is compressed with lz4 or zstd and the package for it is not installed.
    LinuxImageError
        It is no bzImage, or its payload is nothing that we know.
    """
    if image[:4] == _ELF:
        return image
    if image[0x202:0x206] != b"HdrS" or len(image) < 0x250:
        raise LinuxImageError("the kernel is no bzImage (no 'HdrS' at 0x202); give a vmlinuz of x86-64, or a vmlinux")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start : start + length]
    if len(payload) != length or not length:
        raise LinuxImageError(f"the kernel's payload ({length} bytes at {start}) is not inside its {len(image)} bytes")
    kernel = decompress(payload, "the kernel")
    if kernel[:4] != _ELF:
        raise LinuxImageError("the kernel's payload is no ELF")
    return kernel


def decompress(data: bytes, what: str) -> bytes:
    """Unpack by the first bytes: xz, lzma, gzip, bzip2, lz4 (legacy frames), zstd.

    Raises
    ------
    UnpackerMissingError, LinuxImageError
        As :func:`extract_vmlinux`.
    """
    try:
        if data.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
            return lzma.LZMADecompressor().decompress(data)  # what follows is the size, not another stream
        if data.startswith(b"\x1f\x8b"):
            return gzip.decompress(data)
        if data.startswith(b"BZh"):
            return bz2.BZ2Decompressor().decompress(data)
        if data.startswith(b"\x02\x21\x4c\x18"):
            return _unpack_lz4_legacy(data, _load("lz4.block", "lz4", what))
        if data.startswith(b"\x28\xb5\x2f\xfd"):
            reader = _load("zstandard", "zstd", what).ZstdDecompressor().decompressobj()
            return bytes(reader.decompress(data))
    except UnpackerMissingError:
        raise
    except Exception as error:  # each library has an error of its own
        raise LinuxImageError(f"{what} cannot be unpacked: {error}") from error
    raise LinuxImageError(f"{what} is compressed in a way that is unknown here; it begins with {data[:6].hex()}")


def _load(module: str, compression: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnpackerMissingError(
            f"{what} is compressed with {compression}, and the package for that is not installed; "
            "install it: pip install 'ivshmem-lab[linux]'"
        ) from error


def _unpack_lz4_legacy(data: bytes, lz4_block: Any) -> bytes:
    at, parts = 4, []
    while at + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, at)
        if size > len(data) - at - 4:  # the uncompressed size, which the kernel's build adds
            break
        parts.append(lz4_block.decompress(data[at + 4 : at + 4 + size], uncompressed_size=_LZ4_LEGACY_BLOCK))
        at += 4 + size
    return b"".join(parts)
