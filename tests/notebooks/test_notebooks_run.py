"""Every notebook runs from top to bottom, twice in the same kernel."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from ivshmem_lab.lab.linux import build_linux_image

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
RUN_LIMIT_S = 60
START_LIMIT_S = 30


async def run_all_twice(path: Path) -> None:
    """Do what "Run All" does, two times; the first cell that fails is raised."""
    client = NotebookClient(
        nbformat.read(path, as_version=4),
        kernel_name="python3",
        startup_timeout=START_LIMIT_S,
        resources={"metadata": {"path": path.parent}},
    )
    async with client.async_setup_kernel():
        for _ in range(2):
            async with asyncio.timeout(RUN_LIMIT_S):
                for index, cell in enumerate(client.nb.cells):
                    await client.async_execute_cell(cell, index)


@pytest.mark.timeout(START_LIMIT_S + 2 * RUN_LIMIT_S + 20)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_twice_in_a_row(path: Path, tmp_path: Path) -> None:
    if 'guest=\\"linux\\"' in path.read_text(encoding="utf-8") and shutil.which("qemu-system-x86_64"):
        build_linux_image(quiet=True)  # fetched once; what the network takes is not the notebook's time
    # In a copy of the folder: what a notebook saves does not belong into the checkout.
    shutil.copytree(path.parent, tmp_path / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    asyncio.run(run_all_twice(tmp_path / "notebooks" / path.name))
