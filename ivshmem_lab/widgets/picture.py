"""Pictures that need nothing but themselves: for saved notebooks, and for pages without a network."""

from __future__ import annotations

from xml.sax.saxutils import escape

LINE = 20
CHARACTER = 7.3
MOST_LINES = 60

_FONT = "ui-monospace, 'DejaVu Sans Mono', Menlo, monospace"


def text_svg(title: str, lines: list[str]) -> str:
    """Return lines of text as SVG, in colours that can be read on light and on dark.

    >>> text_svg("Console", ["a < b"]).count("a &lt; b")
    2
    """
    shown = [_clean(line) for line in lines[:MOST_LINES]]
    if len(lines) > MOST_LINES:
        shown.append(f"… {len(lines) - MOST_LINES} more lines")
    width = int(max((len(line) for line in [title, *shown]), default=0) * CHARACTER) + 48
    height = (len(shown) + 2) * LINE + 16
    rows = "".join(
        f'<text x="16" y="{LINE * (number + 3) - 8}" xml:space="preserve">{escape(line)}</text>'
        for number, line in enumerate(shown)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="{_FONT}" font-size="12" fill="#212121">'
        f"<title>{escape(title)}</title><desc>{escape(chr(10).join(shown))}</desc>"
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="4" fill="#fff" stroke="#bdbdbd"/>'
        f'<text x="16" y="26" font-size="13" font-weight="600">{escape(title)}</text>{rows}</svg>'
    )


def _clean(line: str) -> str:
    """Leave out what XML cannot say."""
    return "".join(character if character.isprintable() else " " for character in line[:400])
