"""The first notebook, as a person meets it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from playwright.sync_api import Page

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "00-start-here.ipynb"


@pytest.mark.browser
@pytest.mark.timeout(180)
def test_run_all_cells_shows_no_error(
    open_notebook: Callable[[Path], AbstractContextManager[Page]],
    run_all: Callable[[Page], list[dict[str, object]]],
) -> None:
    with open_notebook(NOTEBOOK) as page:
        cells = run_all(page)
        assert cells, "the notebook has no code"
        assert [cell for cell in cells if cell["errors"] or not cell["execution_count"]] == []
