"""The panels in a real JupyterLab, on real guests: plugged, unplugged, noticed, restarted, in two windows."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from ivshmem_lab.lab.linux import build_linux_image

from .books import LIMIT_MS, last_cell, picture, written
from .conftest import KERNEL_IS_IDLE

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from playwright.sync_api import Locator, Page

    Open = Callable[[Path], AbstractContextManager[Page]]
    RunAll = Callable[[Page], list[dict[str, object]]]

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

SAVE = "() => window.jupyterapp.commands.execute('docmanager:save')"
RESTART = """async () => {
    const session = window.jupyterapp.shell.currentWidget.sessionContext.session;
    await session.kernel.restart();
}"""
COUNT = "echo ivshmem=$(cat /sys/bus/pci/devices/*/device | grep -c 0x1110)."
UNICORN = """from ivshmem_lab import Lab
from ivshmem_lab.widgets import LabDashboard
lab = Lab()
board = lab.server("board")
alice = lab.vm("alice", "probe", {"watch": 1})
me = lab.peer("me", connect=board)
lab.start()
LabDashboard(lab)"""
LINUX = """from ivshmem_lab import Lab
from ivshmem_lab.widgets import LabDashboard
lab = Lab()
board = lab.server("board")
alice = lab.vm("alice", guest="linux", emulator="qemu")
me = lab.peer("me", connect=board)
lab.start()
alice.wait_ready(90)
alice.run(["sh", "-c", "echo 7 > /proc/sys/kernel/printk"], check=True)
LabDashboard(lab)"""


def ran(page: Page, run_all: RunAll) -> Locator:
    assert [cell["errors"] for cell in run_all(page)] == [[]]
    return shown(page)


def shown(page: Page) -> Locator:
    root = page.locator(".jp-OutputArea-output .ivl-dashboard")
    root.wait_for(timeout=LIMIT_MS)
    root.locator(".ivl-hotplug").wait_for(state="attached", timeout=LIMIT_MS)
    return root


def plug(root: Locator) -> None:
    root.get_by_test_id("open").click()
    root.get_by_test_id("limit").fill("40")
    root.get_by_test_id("plug").click()
    done(root, "plugged in and seen by the guest")


def unplug(root: Locator) -> None:
    root.get_by_test_id("unplug-hot0").click()
    done(root, "unplugged")


def done(root: Locator, words: str) -> None:
    root.get_by_test_id("status").last.get_by_text(words).wait_for(timeout=LIMIT_MS)


def tab(root: Locator, name: str) -> Locator:
    """Go to a part, where they are tabs."""
    root.get_by_role("tab", name=name, exact=True).click()
    return root


def on_console(root: Locator, words: str) -> None:
    root.get_by_test_id("lines").get_by_text(words).first.wait_for(timeout=LIMIT_MS)


def typed(root: Locator, line: str) -> None:
    root.get_by_test_id("input").fill(line)
    root.get_by_test_id("input").press("Enter")


def emulators() -> list[int]:
    """Return the processes of this run that emulate machines."""
    token = f"IVSHMEM_LAB_TEST_RUN={os.environ['IVSHMEM_LAB_TEST_RUN']}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = process.joinpath("cmdline").read_bytes()
            ours = token in process.joinpath("environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if ours and (b"qemu-system" in words or b"unicorn" in words or b"reaper" in words):
            found.append(int(process.name))
    return found


def test_a_unicorn_guest_gets_and_loses_a_device_in_two_windows(
    open_notebook: Open, run_all: RunAll, tmp_path: Path
) -> None:
    with open_notebook(written(tmp_path / "bench.ipynb", UNICORN)) as page:
        root = tab(ran(page, run_all), "Hot-plug")
        page.evaluate(SAVE)
        context = page.context.browser.new_context(
            viewport={"width": 1400, "height": 1000}
        )  # a window, not a tab behind
        context.set_default_timeout(LIMIT_MS)
        other = context.new_page()
        errors: list[str] = []
        context.on(
            "request", lambda sent: errors.extend([sent.url] * (urlsplit(sent.url).hostname not in {None, "127.0.0.1"}))
        )
        other.on("pageerror", lambda error: errors.append(str(error)))
        other.goto(page.url)
        other.wait_for_function(KERNEL_IS_IDLE)
        second = tab(shown(other), "Hot-plug")

        plug(root)
        done(second, "plugged in and seen by the guest")
        assert "peer 1 present" in second.get_by_test_id("others").inner_text()
        assert root.get_by_test_id("python").last.inner_text() == "alice.plug(board).wait_seen(40)"
        unplug(second)
        done(root, "unplugged")
        root.get_by_test_id("others").get_by_text("peer 1 left").wait_for(timeout=LIMIT_MS)
        picture(page, "bench-unicorn-unplugged")
        for each in (root, second):
            tab(each, "Consoles")
            on_console(each, "came slot")
            on_console(each, "leave slot")
        picture(other, "bench-unicorn-console")
        assert errors == []

        assert emulators()
        page.evaluate(RESTART)
        page.wait_for_function(KERNEL_IS_IDLE)
        deadline = time.monotonic() + 10.0
        while emulators() and time.monotonic() < deadline:
            page.evaluate("() => new Promise((done) => setTimeout(done, 50))")
        assert emulators() == []
        context.close()


AGAIN = """from ivshmem_lab import Lab
from ivshmem_lab.widgets import LabDashboard
lab = globals().get("lab") or Lab()
benches = [*globals().get("benches", []), LabDashboard(lab)]
benches[-1]"""
WATCHED = """parts = lambda bench: {each.watched for each in (bench, bench.builder, bench.hotplug, bench.console)}
print([parts(each) for each in benches])"""


def test_a_cell_that_is_run_again_leaves_a_widget_that_costs_little(
    open_notebook: Open, run_all: RunAll, tmp_path: Path
) -> None:
    with open_notebook(written(tmp_path / "again.ipynb", AGAIN, WATCHED)) as page:
        for _ in range(3):
            assert [cell["errors"] for cell in run_all(page)] == [[], []]
            shown(page)
        deadline = time.monotonic() + LIMIT_MS / 1000  # what a window says of itself is not waited for
        while (said := last_cell(page)) != "[{False}, {False}, {True}]\n":
            assert time.monotonic() < deadline, said


@pytest.mark.qemu
def test_a_linux_guest_on_qemu_notices_what_is_plugged(open_notebook: Open, run_all: RunAll, tmp_path: Path) -> None:
    build_linux_image(quiet=True)
    with open_notebook(written(tmp_path / "linux.ipynb", LINUX)) as page:
        root = tab(ran(page, run_all), "Hot-plug")
        plug(root)
        tab(root, "Consoles")
        on_console(root, "[1af4:1110]")
        typed(root, COUNT)
        on_console(root, "ivshmem=1.")
        tab(root, "Hot-plug")
        unplug(root)
        root.get_by_test_id("steps").get_by_text("Drained and guarded").wait_for(timeout=LIMIT_MS)
        picture(page, "bench-linux-unplugged")
        tab(root, "Consoles")
        typed(root, COUNT)
        on_console(root, "ivshmem=0.")
        picture(page, "bench-linux-console")
