"""Reading the kernel that the command line names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import GuestError
from ..pc import multiboot

if TYPE_CHECKING:
    from .options import Options


def read_kernel(options: Options) -> multiboot.Kernel | None:
    """Read the multiboot kernel of ``-kernel``, None without one.

    Raises
    ------
    GuestError
        When it cannot be read, is no multiboot kernel, or does not fit into the machine's memory.
    """
    path = options.kernel
    if path is None:
        return None
    try:
        image = Path(path).read_bytes()
    except OSError as error:
        raise GuestError(f"kernel {path!r} cannot be read: {error.strerror}") from error
    # QEMU's multiboot loader puts the kernel's path before -append.
    kernel = multiboot.parse(image, path, f"{path} {options.append}".rstrip())
    multiboot.check_fit(kernel, path, options.memory_bytes)
    return kernel
