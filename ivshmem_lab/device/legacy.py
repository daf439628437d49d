"""The legacy ``ivshmem`` device, revision 0, as QEMU had it until 3.1.

Ref: QEMU 2.5 ``docs/specs/ivshmem_device_spec.txt``; QEMU 2.9 ``hw/misc/ivshmem.c`` for what each variant uses:
interrupt pin 1 always; INTx only with ``msi=off``; MSI-X with ``msi=on`` and a server. An event without MSI-X sets
IntrStatus to 1, whichever vector it was; the line is raised while ``IntrStatus & IntrMask`` is not 0. IVPosition reads -1
and BAR 2 is empty until the server has sent the memory.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ..errors import DeviceError
from .effects import Effects, SetIntx
from .ivshmem import MEMORY_BAR, Ivshmem
from .pci import COMMAND_INTX_DISABLE, STATUS, STATUS_INTERRUPT
from .registers import INT_MASK, INT_STATUS, IV_POSITION, NO_ID

DEPRECATED = "ivshmem is deprecated, please use ivshmem-plain or ivshmem-doorbell instead"
"""QEMU's notice (2.6 to 3.1)."""


class LegacyIvshmem(Ivshmem):
    """One revision 0 device as its guest sees it.

    Parameters
    ----------
    memory_bytes
        Size of BAR 2 (``size``): a power of two, at least 4096.
    server
        True with a server (``chardev``): the memory comes with `attach`. False with memory of its own (``shm``).
    msi
        False: interrupts come as INTx, and there is no MSI-X.
    vectors
        MSI-X vectors, with a server and `msi`.
    use64
        BAR 2 is a 64-bit one.
    ioeventfd, quirks
        As for `Ivshmem`.

    Raises
    ------
    UsageError
        When a BAR cannot show that size.
    DeviceError
        When the number of vectors is out of range, or `ioeventfd` is on without `msi`.

    Examples
    --------
    >>> device = LegacyIvshmem(1 << 20, server=True, msi=False)
    >>> hex(device.read_bar(0, 8, 4))
    '0xffffffff'
    >>> device.attach(5)
    ()
    >>> device.read_bar(0, 8, 4), device.write_bar(0, 0, 4, 1), device.interrupt(0)
    (5, (), (SetIntx(level=True),))
    >>> device.read_bar(0, 4, 4), device.after_read()
    (1, (SetIntx(level=False),))
    """

    REVISION = 0
    PIN = 1
    MEANINGS: ClassVar[dict[str, str]] = {
        INT_MASK.name: "INTx mask; the line follows IntrStatus & IntrMask with msi=off",
        INT_STATUS.name: "INTx status; reading clears it and lowers the line",
        IV_POSITION.name: "own peer id; -1 until the memory is attached; 0 without a server",
    }

    def __init__(
        self,
        memory_bytes: int,
        *,
        server: bool,
        msi: bool = True,
        vectors: int = 1,
        ioeventfd: bool = False,
        use64: bool = True,
        quirks: str = "none",
    ) -> None:
        if ioeventfd and not msi:
            raise DeviceError("ioeventfd/irqfd requires MSI")
        if not use64 and memory_bytes > 1 << 31:
            raise DeviceError(f"use64=off: a BAR of 32 bits shows up to 2G, not {memory_bytes} bytes; leave use64 on")
        self.server = server
        self.msi = msi
        self.attached = not server
        self.line = False
        """The level of INTA as the board sees it."""
        super().__init__(
            memory_bytes,
            vectors=vectors if server and msi else 0,
            ioeventfd=ioeventfd,
            use64=use64,
            quirks=quirks,
        )
        if server:
            self.registers.set(IV_POSITION, NO_ID)

    def _model(self) -> str:
        return "ivshmem"

    # -- the server's side ---------------------------------------------------------------------------

    def attach(self, peer_id: int) -> Effects:
        """Take the memory and the id that the server sent.

        Returns
        -------
        Effects
            `MapBar`, when software has switched BAR 2 on already.
        """
        if not 0 <= peer_id <= 0xFFFF:
            raise DeviceError(f"peer id {peer_id} is out of range: 0 to 65535")
        self.registers.set(IV_POSITION, peer_id)
        self.attached = True
        return self._remap()

    def bar_address(self, index: int) -> int | None:
        """Return where a BAR is visible; BAR 2 is nowhere until the memory is attached."""
        return None if index == MEMORY_BAR and not self.attached else super().bar_address(index)

    def interrupt(self, vector: int) -> Effects:
        """Take an event: a message with MSI-X; else IntrStatus becomes 1, whichever vector it was."""
        if self.msi:
            return super().interrupt(vector)
        self.registers.set(INT_STATUS, 1)
        return self._drive_line()

    @property
    def _rings(self) -> bool:
        return self.server

    # -- INTx ----------------------------------------------------------------------------------------

    def _drive_line(self) -> Effects:
        """Bring the pin to what registers and configuration say (PCI 3.0, sections 6.2.2 and 6.2.3)."""
        asserted = not self.msi and bool(self.int_status & self.int_mask)
        status = self._config[STATUS] & ~STATUS_INTERRUPT
        self._config[STATUS] = status | (STATUS_INTERRUPT if asserted else 0)
        level = asserted and not self.command & COMMAND_INTX_DISABLE
        if level == self.line:
            return ()
        self.line = level
        return (SetIntx(level),)

    def after_read(self) -> Effects:
        """Return what the last read of a register has changed: reading IntrStatus lowers the line."""
        return self._drive_line()

    def _write_register(self, offset: int, value: int, vector_mask: int) -> Effects:
        effects = super()._write_register(offset, value, vector_mask)
        return effects if offset not in (INT_MASK.offset, INT_STATUS.offset) else effects + self._drive_line()

    def _config_written(self, offset: int, size: int) -> Effects:
        return super()._config_written(offset, size) + self._drive_line()

    def reset(self) -> Effects:
        """Reset registers and configuration; id, peers and memory stay, the line goes down."""
        return super().reset() + self._drive_line()

    # -- moving --------------------------------------------------------------------------------------

    def snapshot_identity(self) -> dict[str, Any]:
        """Return what must be the same on a device that takes over a snapshot of this one."""
        return {**super().snapshot_identity(), "msi": self.msi, "server": self.server}

    def restore(self, state: dict[str, Any]) -> Effects:
        """Take over what `snapshot` returned; a line that was up is raised here, too."""
        config = bytearray.fromhex(state["config"])
        config[STATUS] &= ~STATUS_INTERRUPT
        self._config[STATUS] &= ~STATUS_INTERRUPT
        return super().restore({**state, "config": config.hex()}) + self._drive_line()

    def _interrupts(self) -> str:
        if self.msi:
            return "no interrupts: without a server there is no MSI-X, and msi=on uses no INTx"
        return f"INTx: line {'raised' if self.line else 'low'}"
