"""Which ipykernel the tests of this run talk to: the installed one, or the one that `make kernels` asks for."""

from __future__ import annotations

import asyncio
import os
from importlib.metadata import version
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def test_the_kernel_is_of_the_version_that_was_asked_for() -> None:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import ipykernel; print(ipykernel.__version__)")])
    asyncio.run(NotebookClient(book, kernel_name="python3").async_execute())
    asked = os.environ.get("IVSHMEM_LAB_IPYKERNEL")
    wanted = Path(asked).name.removeprefix("ipykernel-") if asked else version("ipykernel")
    assert book.cells[0].outputs[0].text.strip() == wanted
