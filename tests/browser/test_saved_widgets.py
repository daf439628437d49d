"""What is left of a widget in a saved notebook, and in HTML that is read where there is no network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import nbformat
import pytest

from ivshmem_lab import Lab
from ivshmem_lab.widgets import Console, HotplugPanel, LabDashboard

from .conftest import SCREENSHOTS

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import Browser

PRIORITY = ["image/svg+xml", "image/png", "text/html", "text/plain"]


@pytest.mark.browser
@pytest.mark.timeout(120)
def test_html_of_a_saved_notebook_shows_the_pictures_without_a_network(browser: Browser, tmp_path: Path) -> None:
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    book = nbformat.v4.new_notebook()
    with Lab() as lab:
        lab.vm("alice", "probe", {"watch": 1}, connect=lab.server("board"))
        for kind in (HotplugPanel, Console, LabDashboard):
            widget = kind(lab)
            data, metadata = widget._repr_mimebundle_()
            output = nbformat.v4.new_output("display_data", data, metadata=metadata)
            book.cells.append(nbformat.v4.new_code_cell("widget", outputs=[output]))
            widget.close()
    nbformat.validate(book)
    html, _ = HTMLExporter(config=Config({"NbConvertBase": {"display_data_priority": PRIORITY}})).from_notebook_node(
        book
    )
    page_path = tmp_path / "lab.html"
    page_path.write_text(html)
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(f"file://{page_path}")
    sizes = page.eval_on_selector_all(".jp-OutputArea-output img", "(all) => all.map((each) => each.naturalWidth)")
    assert len(sizes) == 3
    assert min(sizes) > 100, "one was not drawn"
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    (SCREENSHOTS / "saved-widgets.png").write_bytes(page.screenshot(full_page=True))
    context.close()
