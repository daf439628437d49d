"""Notebooks that tests write, and pictures of what is in them."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

import nbformat

from .conftest import SCREENSHOTS

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import Page

LIMIT_MS = 20_000
AXE = resources.files("axe_playwright_python").joinpath("axe.min.js")
CHECK = """async (where) => (await axe.run(where)).violations.map(
    (each) => `${each.id}: ${each.nodes.map((node) => `${node.html} (${node.any.map((one) => one.message)})`).join("; ")}`)"""

RUN_LAST = """async () => {
    const { content } = window.jupyterapp.shell.currentWidget;
    content.activeCellIndex = content.widgets.length - 1;
    await window.jupyterapp.commands.execute("notebook:run-cell");
}"""
SAID_LAST = "() => window.jupyterapp.shell.currentWidget.content.widgets.at(-1).model.outputs.toJSON().map((each) => each.text ?? '').join('')"


def written(path: Path, *sources: str) -> Path:
    """Write a notebook with these cells."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, path)
    return path


def last_cell(page: Page) -> str:
    """Run the last cell of a notebook, and return what it printed."""
    page.evaluate(RUN_LAST)
    said: str = page.evaluate(SAID_LAST)
    return said


def picture(page: Page, name: str, what: str = ".ivl-dashboard") -> None:
    """Leave a picture of a widget."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    (SCREENSHOTS / f"{name}.png").write_bytes(page.locator(what).first.screenshot())


def violations(page: Page, where: str) -> list[str]:
    """Return what axe-core finds in a part of a page."""
    page.evaluate(AXE.read_text())
    found: list[str] = page.evaluate(CHECK, where)
    return found
