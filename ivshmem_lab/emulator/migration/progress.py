"""How far a migration is, in the shape of ``query-migrate``.

Ref: QEMU 7.2 QMP reference, ``MigrationInfo`` and ``MigrationStats``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from ...units import PAGE_BYTES


@dataclass(slots=True)
class Progress:
    """The counters of one migration, at the source.

    Attributes
    ----------
    total_bytes
        Size of all memory that moves.
    zero_pages, normal_pages
        What was found in it so far.
    sent_bytes
        Length of the stream so far.
    """

    total_bytes: int = 0
    zero_pages: int = 0
    normal_pages: int = 0
    sent_bytes: int = 0
    passes: int = 0
    _started_s: float = field(default_factory=time.monotonic)
    _set_up_s: float | None = None
    _stopped_s: float | None = None
    _ended_s: float | None = None

    def set_up(self) -> None:
        """Take the time at which source and destination agreed."""
        self._set_up_s = time.monotonic()

    def stopped(self) -> None:
        """Take the time at which the guest was stopped."""
        self._stopped_s = time.monotonic()

    def ended(self) -> None:
        """Take the time at which it was over."""
        self._ended_s = time.monotonic()

    def as_qmp(self) -> dict[str, Any]:
        """Return times in milliseconds, and the counters."""
        end_s = time.monotonic() if self._ended_s is None else self._ended_s
        set_up_s = self._set_up_s if self._set_up_s is not None else end_s
        times = {"total-time": _ms(end_s - self._started_s), "setup-time": _ms(set_up_s - self._started_s)}
        if self._stopped_s is not None:
            key = "expected-downtime" if self._ended_s is None else "downtime"
            times[key] = _ms(end_s - self._stopped_s)
        normal_bytes = self.normal_pages * PAGE_BYTES
        copying_s = end_s - set_up_s
        return {
            **times,
            "ram": {
                "total": self.total_bytes,
                "remaining": self.total_bytes - normal_bytes - self.zero_pages * PAGE_BYTES,
                "transferred": self.sent_bytes,
                "duplicate": self.zero_pages,
                "normal": self.normal_pages,
                "normal-bytes": normal_bytes,
                "skipped": 0,
                "dirty-pages-rate": 0,
                "dirty-sync-count": self.passes,
                "dirty-sync-missed-zero-copy": 0,
                "page-size": PAGE_BYTES,
                "mbps": 8e-6 * self.sent_bytes / copying_s if copying_s > 0 else 0.0,
                "multifd-bytes": 0,
                "pages-per-second": 0,
                "postcopy-requests": 0,
                "postcopy-bytes": 0,
                # The guest stands still from the first page on.
                "precopy-bytes": 0,
                "downtime-bytes": self.sent_bytes,
            },
        }


def _ms(seconds: float) -> int:
    return round(1000 * seconds)
