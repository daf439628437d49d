"""How fast interrupts go over the links of a lab, where somebody counts them: our emulator does, real QEMU does not."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..errors import VmError
from ..lab.members import LabVm
from ..vm.state import VmState

if TYPE_CHECKING:
    from ..lab.lab import Lab

EVERY_S = 0.5


class Rates:
    """Interrupts per second of each device, from two counts of its machine.

    Parameters
    ----------
    lab
        Whose machines.
    """

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._counts: dict[tuple[str, str], tuple[int, int]] = {}
        self._counted_s = 0.0
        self._rates: dict[str, tuple[float, float]] = {}

    def look(self) -> dict[str, tuple[float, float]]:
        """Return (sent, come) per second by ``"machine-number"``, as links are named; counted twice a second at most.

        A device that is idle is left out.
        """
        now_s = time.monotonic()
        took_s = now_s - self._counted_s
        if took_s < EVERY_S:
            return self._rates
        counts: dict[tuple[str, str], tuple[int, int]] = {}
        rates: dict[str, tuple[float, float]] = {}
        for name, vm in list(self._lab.members.items()):
            if not isinstance(vm, LabVm) or vm.state is not VmState.RUNNING:
                continue
            try:
                found = vm.doorbells()
            except VmError:  # it has ended meanwhile
                continue
            for number, each in enumerate(vm.attached):
                now = found.get(each.device_id)
                if now is None:
                    continue
                counts[name, each.device_id] = now
                before = self._counts.get((name, each.device_id), now)
                sent, come = ((new - old) / took_s for new, old in zip(now, before, strict=True))
                if sent or come:
                    rates[f"{name}-{number}"] = sent, come
        self._counts, self._counted_s, self._rates = counts, now_s, rates
        return rates


def in_words(per_second: float) -> str:
    """Write a rate shortly.

    >>> in_words(52130.0), in_words(12.4)
    ('52.1 k', '12')
    """
    return f"{per_second / 1000:.1f} k" if per_second >= 1000 else f"{per_second:.0f}"
