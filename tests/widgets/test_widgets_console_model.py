"""The lines of a guest: what it writes can neither grow without bound nor become anything but text."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem_lab.widgets.console_model import LONGEST_LINE, Found, Scrollback, Span, Style, clock


def fed(*pieces: str, limit: int = 100) -> Scrollback:
    seen = Scrollback(limit)
    for number, piece in enumerate(pieces):
        seen.feed(piece, float(number))
    return seen


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("a\r\nb\n", "a\nb\n"),
        ("10 %\r20 %", "20 %"),
        ("abc\rX\x1b[K\n", "X\n"),
        ("abc\x1b[2K\rnew", "new"),
        ("ab\bC", "aC"),
        ("a\tb", "a       b"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;javascript:x\x1b\\link", "link"),
        ("\x1b[2J\x1b[Hx", "x"),
        ("\x1b(Bx", "Bx"),
        ("a\x00\x07b", "ab"),
        ("\x01\x7f\x9b\u202e", "^A^?<U+009B><U+202E>"),
        ("<b>&amp;", "<b>&amp;"),
        ("\x1b[31\nx", "\nx"),
        ("\x1bP" + "q" * 1000, "q" * 743),
    ],
)
def test_what_is_shown_of_what_was_written(written: str, shown: str) -> None:
    assert fed(written).text() == shown


def test_colours_and_bold_are_kept_and_other_attributes_are_not() -> None:
    line = fed("a\x1b[1;32mb\x1b[22;38;5;196;4mc\x1b[39md\x1b[95me").lines()[0]
    assert line.spans == (
        Span("a"),
        Span("b", Style("green", True)),
        Span("c", Style("green")),
        Span("d"),
        Span("e", Style("magenta")),
    )


def test_old_lines_go_and_are_counted_and_numbers_stay() -> None:
    seen = fed("".join(f"{number}\n" for number in range(12)), limit=10)
    assert (len(seen), seen.dropped, seen.first) == (9, 3, 3)
    assert [line.text for line in seen.lines(after=9)] == ["10", "11"]


def test_a_line_without_end_goes_on_in_the_next() -> None:
    seen = fed("x" * (LONGEST_LINE + 1))
    assert [len(line.text) for line in seen.lines()] == [LONGEST_LINE, 1]


def test_a_line_has_the_time_of_its_first_character() -> None:
    seen = fed("", "a", "b\n", "\n", "c")
    assert [(line.text, line.time_s) for line in seen.lines()] == [("ab", 1.0), ("", 3.0), ("c", 4.0)]
    assert seen.text(timestamps=True).splitlines()[0] == f"{clock(1.0)}  ab"


def test_searching_takes_the_text_as_it_is() -> None:
    seen = fed("Peer 1\npeer 2 (peer)\n")
    assert seen.search("peer") == [Found(0, 0, 4), Found(1, 0, 4), Found(1, 8, 12)]
    assert seen.search("peer", match_case=True) == [Found(1, 0, 4), Found(1, 8, 12)]
    assert seen.search("(") == [Found(1, 7, 8)]
    assert seen.search("") == []


def test_clearing_forgets_lines_but_not_their_numbers(tmp_path) -> None:
    seen = fed("a\nb")
    seen.clear()
    seen.feed("c\n", 0.0)
    assert [(line.number, line.text) for line in seen.lines()] == [(2, "c")]
    assert seen.save(tmp_path / "out.txt").read_text() == "c\n"


@given(st.lists(st.text(alphabet=st.one_of(st.sampled_from("\x1b[]m;0123K\r\n\b\t\x07\\P"), st.characters()))))
def test_any_text_in_any_pieces_shows_the_same_and_nothing_that_acts(pieces: list[str]) -> None:
    whole, cut = fed("".join(pieces)), fed(*pieces)
    assert whole.text() == cut.text()
    assert whole.text() == fed(*"".join(pieces)).text()
    for line in whole.lines():
        assert len(line.text) <= LONGEST_LINE
        assert not [c for c in line.text if unicodedata.category(c) in {"Cc", "Zl", "Zp"} or c in "\u202e\u2066\u200f"]
