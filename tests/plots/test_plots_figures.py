"""Figures: what is drawn is what was measured, and it is read without colours, too."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.figure import Figure

from ivshmem_lab.errors import UsageError
from ivshmem_lab.plots.latency import draw_ecdf
from ivshmem_lab.plots.overview import overview
from ivshmem_lab.plots.style import look
from ivshmem_lab.plots.throughput import draw_throughput

SAMPLES = {"alice ↔ bob": np.arange(1.0, 101.0), "carol ↔ dave": np.arange(11.0, 111.0)}
RUNS = {"alice ↔ bob": [1.0, 2.0, 1.5], "carol ↔ dave": [3.0]}


@pytest.fixture
def axes():
    return Figure().add_subplot()


def test_the_curve_is_the_share_of_round_trips_that_took_at_most_so_long(axes) -> None:
    assert draw_ecdf(axes, SAMPLES) is axes
    times, share = axes.lines[0].get_data()
    for time_us in (1.0, 25.0, 50.0, 100.0):
        assert share[np.asarray(times) <= time_us].max() == pytest.approx(time_us / 100)


def test_percentiles_carry_markers_on_the_curve(axes) -> None:
    draw_ecdf(axes, {"one": SAMPLES["alice ↔ bob"]})
    marks = [line for line in axes.lines if line.get_linestyle() == "None"]
    assert [list(line.get_data()[0]) for line in marks] == [[50.0, 90.0, 99.0]]
    assert [list(line.get_data()[1]) for line in marks] == [[0.5, 0.9, 0.99]]


def test_the_legend_names_each_path_with_its_median(axes) -> None:
    draw_ecdf(axes, SAMPLES)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "alice ↔ bob: 50.0 µs",
        "carol ↔ dave: 60.0 µs",
    ]
    assert "µs" in axes.get_xlabel()
    assert axes.get_xscale() == "log"


def test_bars_are_medians_and_dots_are_runs(axes) -> None:
    assert draw_throughput(axes, RUNS) is axes
    assert [bar.get_width() for bar in axes.patches] == [1.5, 3.0]
    assert [list(line.get_xdata()) for line in axes.lines] == [[1.0, 2.0, 1.5], [3.0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(RUNS)
    assert {text.get_text() for text in axes.texts} == {"1.50", "3.00"}


def test_series_differ_by_more_than_colour() -> None:
    looks = [look(index) for index in range(6)]
    for part in ("color", "line", "marker", "hatch"):
        assert len({str(getattr(each, part)) for each in looks}) == 6, part
    assert look(6) == look(0)


@pytest.mark.parametrize(
    ("draw", "values"),
    [
        (draw_ecdf, {}),
        (draw_ecdf, {"zero": [0.0, 1.0]}),
        (draw_ecdf, {"none": []}),
        (draw_throughput, {}),
        (draw_throughput, {"none": []}),
    ],
)
def test_what_cannot_be_drawn_is_refused(axes, draw, values) -> None:
    with pytest.raises(UsageError):
        draw(axes, values)


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_overview_holds_both_parts_and_all_lines_of_the_caption(kind: str, start: bytes) -> None:
    figure = overview(SAMPLES, RUNS, "Title", ["a machine", "a pinning"])
    assert len(figure.axes) == 2
    picture = io.BytesIO()
    figure.savefig(picture, format=kind)
    assert picture.getvalue().startswith(start)
    assert figure.get_suptitle() == "Title"
    assert figure.get_supxlabel() == "a machine\na pinning"
    low = figure._supxlabel.get_window_extent().y1
    assert all(axes.get_tightbbox().y0 > low for axes in figure.axes), "the caption lies under nothing"
