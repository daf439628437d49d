"""Percentiles, intervals and tables."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivshmem_lab.errors import UsageError
from ivshmem_lab.stats.summary import Summary, median_interval, percentile, summarize, text_table

numbers = st.lists(st.floats(min_value=-1e9, max_value=1e9), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("percent", "value"), [(0, 1), (10, 1), (11, 2), (50, 5), (51, 6), (90, 9), (99, 10), (99.9, 10), (100, 10)]
)
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(percent: float, value: float) -> None:
    assert percentile(np.random.default_rng(0).permutation(np.arange(1.0, 11.0)), percent) == value


@given(numbers, st.floats(min_value=0, max_value=100))
def test_a_percentile_is_a_value_that_was_measured(values: list[float], percent: float) -> None:
    found = percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) >= percent / 100 * len(values) - 1e-6
    assert sum(value < found for value in values) <= percent / 100 * len(values) + 1e-6


@settings(max_examples=25)
@given(numbers)
def test_a_summary_is_in_order_and_does_not_depend_on_the_order_of_values(values: list[float]) -> None:
    one, other = summarize(values), summarize(values[::-1])
    assert one.minimum <= one.p50 <= one.p90 <= one.p99 <= one.p999 <= one.maximum
    assert (one.n, one.minimum, one.p50, one.maximum) == (len(values), min(values), other.p50, max(values))
    assert one.minimum <= one.p50_low <= one.p50_high <= one.maximum


def test_a_summary_names_all_percentiles_and_how_many_values_there_were() -> None:
    summary = summarize(np.arange(1.0, 1001.0))
    assert (summary.p50, summary.p90, summary.p99, summary.p999) == (500.0, 900.0, 990.0, 999.0)
    assert str(summary).startswith("p50 500.0 (95 %: ")
    assert str(summary).endswith("p90 900.0, p99 990.0, p99.9 999.0, min 1.0, max 1000.0, n 1000")


def test_the_interval_is_the_same_for_the_same_seed() -> None:
    values = np.random.default_rng(1).normal(size=200)
    assert median_interval([values], seed=5) == median_interval([values], seed=5)
    assert median_interval([values], seed=5) != median_interval([values], seed=6)


def test_about_95_of_100_intervals_hold_the_true_median() -> None:
    random = np.random.default_rng(2)
    intervals = [median_interval([random.normal(size=100)], resamples=300) for _ in range(100)]
    held = sum(low <= 0 <= high for low, high in intervals)
    assert 85 <= held < 100
    assert all(high - low < 1 for low, high in intervals)


def test_blocks_that_differ_widen_the_interval() -> None:
    # Half of the blocks saw a slower machine: 800 values, but only 8 independent ones.
    random = np.random.default_rng(3)
    blocks = [random.normal(10 + 5 * (block % 2), 0.1, size=100) for block in range(8)]
    low, high = median_interval(blocks)
    assert (low < 11, high > 14) == (True, True)
    low, high = median_interval([np.concatenate([random.normal(10, 0.1, 500), random.normal(15, 0.1, 300)])])
    assert high < 11


def test_blocks_may_have_different_lengths() -> None:
    assert summarize([1.0, 2.0], [3.0]).n == 3


@pytest.mark.parametrize("values", [[], [float("nan")], [1.0, float("inf")], [[1.0, 2.0]]])
def test_what_has_no_percentiles_is_refused(values: object) -> None:
    with pytest.raises(UsageError, match="not a row of at least one number"):
        summarize(values)


def test_no_blocks_have_no_median() -> None:
    with pytest.raises(UsageError, match="no blocks"):
        median_interval([])


def test_a_summary_is_a_plain_value() -> None:
    assert summarize([1.0]) == Summary(1, *[1.0] * 8)


def test_a_table_puts_numbers_to_the_right_and_words_to_the_left() -> None:
    assert text_table(["path", "µs", "state"], [["a ↔ b", "9.5", "ok"], ["c", "112.5", "WRONG"]]).splitlines() == [
        "path      µs  state",
        "a ↔ b    9.5  ok",
        "c      112.5  WRONG",
    ]


def test_a_table_with_a_line_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        text_table(["a", "b"], [["1"]])
