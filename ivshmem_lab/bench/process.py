"""What a process has used so far, from the kernel (proc(5))."""

from __future__ import annotations

import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process (proc(5)): in ns where the kernel counts them, else in ticks of 10 ms."""
    try:
        threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
        spent_ns = [int(thread.read_text().split()[0]) for thread in threads]
        if spent_ns:
            return sum(spent_ns) / 1e9
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    except (OSError, IndexError):
        return 0.0


def rss_mb(pid: int) -> float:
    """Resident memory of a process in MB; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")), 0.0)
