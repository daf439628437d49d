"""What a guest wrote, as lines that are safe to show: bounded, searchable, with the time of each.

A guest may write anything. Of ECMA-48 the colours, bold and "erase line" are kept; every other sequence is taken out,
and what is left of control and direction characters becomes a visible sign. No line is ever markup.
"""

from __future__ import annotations

import datetime as dt
import re
from collections import deque
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

KEPT_LINES = 10_000
LONGEST_LINE = 4096
"""Characters; a longer line goes on in the next one."""
TAB = 8

_LONGEST_SEQUENCE = 256
_PLAIN = re.compile(
    r"[\x20-\x7e\xa0-\u180d\u180f-\u200a\u2010-\u2027\u2030-\u205f\u2070-\ufefe\uff00-\ufff8\ufffc-\U000dffff]+"
)
_COLOURS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")


class _Where(Enum):
    TEXT = auto()
    ESCAPE = auto()
    CSI = auto()
    STRING = auto()  # OSC, DCS, SOS, PM, APC: to ST or BEL
    STRING_ESCAPE = auto()


@dataclass(frozen=True, slots=True)
class Style:
    """How a piece of text is set: the foreground's name or an empty text, and bold."""

    colour: str = ""
    bold: bool = False


PLAIN = Style()


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a line in one style."""

    text: str
    style: Style = PLAIN


@dataclass(frozen=True, slots=True)
class Line:
    """One line.

    Attributes
    ----------
    number
        0 for the first line of the guest; it stays when older lines are forgotten.
    time_s
        When its first character came, `time.time`.
    spans
        Its text, in pieces of one style.
    """

    number: int
    time_s: float
    spans: tuple[Span, ...] = ()

    @property
    def text(self) -> str:
        """The text without styles."""
        return "".join(span.text for span in self.spans)


@dataclass(frozen=True, slots=True)
class Found:
    """A place where a searched text stands: line number, first and last-but-one character."""

    line: int
    start: int
    end: int


class Scrollback:
    r"""The last lines of one guest.

    >>> seen = Scrollback()
    >>> seen.feed("boot\x1b[31m failed\x1b[0m\n$ ", time_s=0.0)
    >>> seen.text()
    'boot failed\n$ '
    >>> seen.lines()[0].spans[1]
    Span(text=' failed', style=Style(colour='red', bold=False))

    Parameters
    ----------
    limit_lines
        How many are kept; `dropped` counts the others.

    Attributes
    ----------
    dropped : int
        Lines that were forgotten because there were too many.
    revision : int
        Grows with every change.
    """

    def __init__(self, limit_lines: int = KEPT_LINES) -> None:
        self.dropped = 0
        self.revision = 0
        self._done: deque[Line] = deque(maxlen=limit_lines - 1)
        self._number = 0
        self._begin(0.0)
        self._style = PLAIN
        self._where = _Where.TEXT
        self._sequence = ""

    # -- in -------------------------------------------------------------------------------------------

    def feed(self, text: str, time_s: float) -> None:
        """Take what the guest wrote; sequences may be cut anywhere.

        Parameters
        ----------
        text
            As it was decoded.
        time_s
            When it came, `time.time`.
        """
        if not text:
            return
        self.revision += 1
        at = 0
        while at < len(text):
            if self._where is _Where.TEXT and (run := _PLAIN.match(text, at)):
                self._put(run.group(), time_s)
                at = run.end()
            else:
                self._take(text[at], time_s)
                at += 1

    def clear(self) -> None:
        """Forget all lines; the numbers go on."""
        self.revision += 1
        self._done.clear()
        self._number += 1
        self._begin(0.0)

    # -- out ------------------------------------------------------------------------------------------

    def lines(self, after: int = -1) -> list[Line]:
        """Return the lines with a number greater than `after`, the unfinished last one included unless it is empty."""
        found: list[Line] = []
        for line in reversed(self._done):
            if line.number <= after:
                break
            found.append(line)
        found.reverse()
        last = self._last()
        if last.spans and last.number > after:
            found.append(last)
        return found

    @property
    def first(self) -> int:
        """Number of the oldest line that is kept."""
        return self._done[0].number if self._done else self._number

    def __len__(self) -> int:
        return len(self._done) + bool(self._cells)

    def text(self, *, timestamps: bool = False) -> str:
        """Return the lines as one text; an unfinished last line has no line end."""
        rows = [(f"{clock(line.time_s)}  " if timestamps else "") + line.text for line in self.lines()]
        return "\n".join(rows) + ("\n" if rows and not self._cells else "")

    def search(self, wanted: str, *, match_case: bool = False) -> list[Found]:
        """Find a text (no pattern) in every line; an empty one is nowhere."""
        if not wanted:
            return []
        pattern = re.compile(re.escape(wanted), 0 if match_case else re.IGNORECASE)
        return [
            Found(line.number, match.start(), match.end())
            for line in self.lines()
            for match in pattern.finditer(line.text)
        ]

    def save(self, path: str | os.PathLike[str], *, timestamps: bool = False) -> Path:
        """Write the lines to a file (UTF-8), and return its path.

        Raises
        ------
        OSError
            It cannot be written.
        """
        where = Path(path)
        where.write_text(self.text(timestamps=timestamps), encoding="utf-8")
        return where

    # -- inside ---------------------------------------------------------------------------------------

    def _begin(self, time_s: float) -> None:
        self._time_s = time_s
        self._cells: list[tuple[str, Style]] = []
        self._column = 0

    def _last(self) -> Line:
        return Line(self._number, self._time_s, tuple(_spans(self._cells)))

    def _put(self, text: str, time_s: float) -> None:
        for character in text:
            if self._column >= LONGEST_LINE:
                self._end_line(time_s)
            if not self._cells:
                self._time_s = time_s
            while len(self._cells) < self._column:
                self._cells.append((" ", PLAIN))
            self._cells[self._column : self._column + 1] = [(character, self._style)]
            self._column += 1

    def _end_line(self, time_s: float) -> None:
        if not self._cells:
            self._time_s = time_s
        if len(self._done) == self._done.maxlen:
            self.dropped += 1
        self._done.append(self._last())
        self._number += 1
        self._begin(time_s)

    def _take(self, character: str, time_s: float) -> None:
        match self._where:
            case _Where.TEXT:
                self._take_control(character, time_s)
            case _Where.ESCAPE:
                self._where = _Where.CSI if character == "[" else _Where.STRING if character in "]PX^_" else _Where.TEXT
                self._sequence = ""
                if character == "\x1b":
                    self._where = _Where.ESCAPE
                elif character == "\n":  # a broken sequence takes no line end with it
                    self._end_line(time_s)
            case _Where.CSI:
                self._take_csi(character, time_s)
            case _Where.STRING | _Where.STRING_ESCAPE:
                self._sequence += character
                ended = character == "\a" or (self._where is _Where.STRING_ESCAPE and character == "\\")
                if ended or len(self._sequence) > _LONGEST_SEQUENCE or character == "\n":
                    self._where = _Where.TEXT
                    if character == "\n":
                        self._end_line(time_s)
                else:
                    self._where = _Where.STRING_ESCAPE if character == "\x1b" else _Where.STRING

    def _take_control(self, character: str, time_s: float) -> None:
        match character:
            case "\n":
                self._end_line(time_s)
            case "\r":
                self._column = 0
            case "\b":
                self._column = max(0, self._column - 1)
            case "\t":
                self._put(" " * (TAB - self._column % TAB), time_s)
            case "\x1b":
                self._where = _Where.ESCAPE
            case "\a" | "\0":
                pass  # a bell rings nowhere; serial lines are padded with NUL
            case _:
                self._put(visible(character), time_s)

    def _take_csi(self, character: str, time_s: float) -> None:
        if "\x40" <= character <= "\x7e":
            self._where = _Where.TEXT
            if character == "m":
                self._style = _styled(self._style, self._sequence)
            elif character == "K" and self._sequence in {"", "0"}:
                del self._cells[self._column :]
            elif character == "K" and self._sequence == "2":
                self._cells.clear()
        elif "\x20" <= character <= "\x3f" and len(self._sequence) < _LONGEST_SEQUENCE:
            self._sequence += character
        else:  # no sequence at all
            self._where = _Where.TEXT
            self._take(character, time_s)


def visible(character: str) -> str:
    r"""Return signs that every font has for a character that has none or that turns the direction of what follows.

    >>> visible("\x07"), visible("\x7f"), visible("\u202e")
    ('^G', '^?', '<U+202E>')
    """
    code = ord(character)
    if code < 0x20:
        return f"^{chr(0x40 + code)}"
    return "^?" if code == 0x7F else f"<U+{code:04X}>"


def clock(time_s: float) -> str:
    """Return the time of day here, to the millisecond: ``12:04:18.431``."""
    moment = dt.datetime.fromtimestamp(time_s).astimezone()
    return f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03d}"


def _spans(cells: list[tuple[str, Style]]) -> Iterator[Span]:
    begun = 0
    for at in range(1, len(cells) + 1):
        if at == len(cells) or cells[at][1] != cells[begun][1]:
            yield Span("".join(character for character, _ in cells[begun:at]), cells[begun][1])
            begun = at


def _styled(style: Style, parameters: str) -> Style:
    """Apply SGR (ECMA-48, 8.3.117); what is not known changes nothing, extended colours are passed over."""
    codes = [
        int(code) if code.isdecimal() and len(code) < 4 else 0 if not code else -1 for code in parameters.split(";")
    ]
    at = 0
    while at < len(codes):
        code = codes[at]
        match code:
            case 0:
                style = PLAIN
            case 1:
                style = Style(style.colour, True)
            case 22:
                style = Style(style.colour, False)
            case 39:
                style = Style("", style.bold)
            case _ if 30 <= code <= 37 or 90 <= code <= 97:
                style = Style(_COLOURS[code % 10], style.bold)
            case 38 | 48:
                at += {5: 2, 2: 4}.get(codes[at + 1] if at + 1 < len(codes) else -1, 0)
        at += 1
    return style
