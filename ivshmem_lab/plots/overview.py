"""One figure of several parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from .latency import draw_ecdf
from .throughput import draw_throughput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike


def overview(
    samples_us: Mapping[str, ArrayLike],
    gbytes_per_s: Mapping[str, Sequence[float]],
    title: str,
    caption: Sequence[str],
) -> Figure:
    """Draw round trips on the left, throughput on the right, and the circumstances below.

    Parameters
    ----------
    samples_us, gbytes_per_s
        See `draw_ecdf` and `draw_throughput`; the same path should have the same place in both.
    title
        Above all.
    caption
        Lines below: machine, pinning, clock, numbers.

    Returns
    -------
    matplotlib.figure.Figure
        Of 12 by 6.2 inches; it belongs to no window and to no pyplot.
    """
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.45, 1])
    figure.suptitle(title, fontsize=14, weight="bold")
    draw_ecdf(left, samples_us).set_title("An interrupt there and back", fontsize=11)
    draw_throughput(right, gbytes_per_s).set_title("Bytes through shared memory", fontsize=11)
    # A label of the whole figure: the layout keeps its place free, however many lines there are.
    figure.supxlabel("\n".join(caption), x=0.012, ha="left", fontsize=8.5, color="0.25", linespacing=1.5)
    return figure
