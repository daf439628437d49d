"""Percentiles with their uncertainty, and plain tables of them.

A latency is a distribution with a long tail: a mean alone hides what matters, so none is offered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000
"""Bootstrap samples: enough for the two digits of an interval that one reads."""


def percentile(values: ArrayLike, percent: float) -> float:
    """Return the smallest measured value that `percent` of all values do not exceed.

    It is a value that was measured, never one between two of them, and it lies on the curve that
    an empirical distribution function draws.

    >>> percentile([1.0, 2.0, 3.0, 10.0], 50)
    2.0
    """
    return _percentile(_checked(values), percent)


def median_interval(blocks: Sequence[ArrayLike], *, resamples: int = RESAMPLES, seed: int = 1) -> tuple[float, float]:
    """Return a 95 % interval of the median, by the bootstrap percentile method.

    Values that were taken in one go resemble each other (same cache, same neighbours on the machine).
    With several blocks whole blocks are drawn, so that the interval shows how blocks differ; with a
    single one, single values.

    Parameters
    ----------
    blocks
        One-dimensional arrays of measured values.
    resamples
        How many times to draw.
    seed
        The same values and seed give the same interval.

    Raises
    ------
    UsageError
        There is no value, or one that is not a number.
    """
    arrays = [_checked(block) for block in blocks]
    if not arrays:
        raise UsageError("no blocks to take a median of; measure something first")
    random = np.random.default_rng(seed)
    if len(arrays) == 1:
        (values,) = arrays
        medians = [_percentile(random.choice(values, values.size), 50) for _ in range(resamples)]
    else:
        medians = [
            _percentile(np.concatenate([arrays[i] for i in drawn]), 50)
            for drawn in random.integers(len(arrays), size=(resamples, len(arrays)))
        ]
    return percentile(medians, 2.5), percentile(medians, 97.5)


@dataclass(frozen=True, slots=True)
class Summary:
    """What one says about a measured distribution; all values in the unit of what was summarised.

    Attributes
    ----------
    n : int
        How many values.
    minimum, p50, p90, p99, p999, maximum : float
        Percentiles, see `percentile`.
    p50_low, p50_high : float
        95 % interval of the median, see `median_interval`.
    """

    n: int
    minimum: float
    p50: float
    p90: float
    p99: float
    p999: float
    maximum: float
    p50_low: float
    p50_high: float

    def __str__(self) -> str:
        return (
            f"p50 {self.p50:.1f} (95 %: {self.p50_low:.1f} to {self.p50_high:.1f}), p90 {self.p90:.1f}, p99 {self.p99:.1f}, "
            f"p99.9 {self.p999:.1f}, min {self.minimum:.1f}, max {self.maximum:.1f}, n {self.n}"
        )


def summarize(*blocks: ArrayLike, seed: int = 1) -> Summary:
    """Summarise measured values, one array for each block that was taken in one go.

    Raises
    ------
    UsageError
        There is no value, or one that is not a number.

    Examples
    --------
    >>> summarize([3.0, 1.0, 2.0]).p50
    2.0
    """
    arrays = [_checked(block) for block in blocks]
    low, high = median_interval(arrays, seed=seed)
    values = np.concatenate(arrays)
    p50, p90, p99, p999 = (percentile(values, percent) for percent in (50, 90, 99, 99.9))
    return Summary(values.size, float(values.min()), p50, p90, p99, p999, float(values.max()), low, high)


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table for a terminal: columns two blanks apart, numbers to the right.

    >>> print(text_table(["path", "p50"], [["a", "9.5"], ["b", "12.5"]]))
    path   p50
    a      9.5
    b     12.5
    """
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    numeric = [bool(rows) and all(_is_number(row[index]) for row in rows) for index in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in (heads, *rows)
    )


def _percentile(values: NDArray[np.float64], percent: float) -> float:
    # Of 1000 values 99.9 % are 999, though 0.999 * 1000 is a little more in floating point.
    index = max(math.ceil(percent * values.size / 100 - 1e-9), 1) - 1
    return float(np.partition(values, index)[index])


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.replace(".", "", 1).replace(" ", "").isdigit()


def _checked(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise UsageError(f"values of shape {array.shape} are not a row of at least one number, all of them finite")
    return array
