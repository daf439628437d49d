"""The ivshmem device on a user's own Unicorn engine.

The user keeps ``emu_start``. Registers and ports are answered by the same board and device as in our machine;
interrupts are delivered at the start of a block, through the guest's own handlers, and `PluggedDevice.wait`
waits for one while the guest is halted. `plug` and its parts are in `api`.
"""

from .api import plug
from .device import PluggedDevice

__all__ = ["PluggedDevice", "plug"]
