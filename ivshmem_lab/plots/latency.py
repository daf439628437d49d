"""Round trips, drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ..errors import UsageError
from ..stats.summary import percentile
from .style import look

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

MARKED = (50.0, 90.0, 99.0)
"""The percentiles that carry a marker."""


def draw_ecdf(axes: Axes, samples_us: Mapping[str, ArrayLike]) -> Axes:
    """Draw how many of the round trips took at most how long, a curve for each path.

    Parameters
    ----------
    axes
        Where to draw.
    samples_us
        Label, and round trips in µs.

    Raises
    ------
    UsageError
        Nothing to draw, or a time that has no place on a logarithmic scale.
    """
    if not samples_us:
        raise UsageError("no round trips to draw")
    axes.set_xscale("log")
    last = 0.0
    for index, (label, samples) in enumerate(samples_us.items()):
        values = np.asarray(samples, dtype=np.float64)
        marks = [percentile(values, percent) for percent in MARKED]
        if values.min() <= 0:
            raise UsageError(f"{label}: a round trip of {values.min()} µs cannot be drawn on a logarithmic scale")
        style = look(index)
        axes.ecdf(values, color=style.color, linestyle=style.line, linewidth=1.8)
        axes.plot(
            marks,
            [percent / 100 for percent in MARKED],
            color=style.color,
            marker=style.marker,
            markersize=7,
            markeredgecolor="white",
            linestyle="none",
            zorder=3,
        )
        # The legend shows line and marker together.
        axes.plot(
            [], [], color=style.color, linestyle=style.line, marker=style.marker, label=f"{label}: {marks[0]:.1f} µs"
        )
        last = max(last, *marks)
    axes.set_xlim(right=last * 3)  # and room for the legend
    axes.set_ylim(0, 1.02)
    for percent in MARKED:
        axes.axhline(percent / 100, color="0.85", linewidth=0.8, zorder=0)
    axes.set_yticks([0, 0.25, *(percent / 100 for percent in MARKED)], ["0", "25 %", "p50", "p90", "p99"])
    axes.set_xlabel("round trip in µs, logarithmic")
    axes.set_ylabel("of all round trips")
    _label_decades(axes)
    axes.legend(title="path: median", loc="lower right", frameon=True, framealpha=0.9, handlelength=3.5)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _label_decades(axes: Axes) -> None:
    """Label 1, 2 and 5 of each decade as plain numbers: within one decade matplotlib shows next to none."""
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", which="major", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
