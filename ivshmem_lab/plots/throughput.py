"""Throughput, drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import UsageError
from .style import look

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes


def draw_throughput(axes: Axes, gbytes_per_s: Mapping[str, Sequence[float]]) -> Axes:
    """Draw a bar for each path as long as its median throughput, with a dot for every run.

    Parameters
    ----------
    axes
        Where to draw.
    gbytes_per_s
        Label, and the throughput of each run in 10^9 bytes per second.

    Raises
    ------
    UsageError
        Nothing to draw.
    """
    if not gbytes_per_s or not all(gbytes_per_s.values()):
        raise UsageError("no throughput to draw")
    most = max(max(runs) for runs in gbytes_per_s.values())
    for index, runs in enumerate(gbytes_per_s.values()):
        style = look(index)
        median = float(np.median(runs))
        axes.barh(index, median, height=0.6, color=style.color, hatch=style.hatch, edgecolor="white", zorder=2)
        axes.plot(runs, [index] * len(runs), "o", color="black", markeredgecolor="white", markersize=6, zorder=3)
        axes.annotate(
            f"{median:.2f}", (max(median, *runs), index), (9, 0), textcoords="offset points", va="center", weight="bold"
        )
    axes.set_yticks(range(len(gbytes_per_s)), list(gbytes_per_s))
    axes.invert_yaxis()
    axes.set_xlim(0, most * 1.18)
    axes.set_xlabel("GB/s ($10^9$ bytes): bar = median, dots = runs")
    axes.grid(axis="x", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return axes
