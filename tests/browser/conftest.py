"""JupyterLab and a browser in front of it, both fresh, both on this machine only."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from playwright.sync_api import Browser, Page, Request

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"

START_LIMIT_S = 60.0
STOP_LIMIT_S = 15.0
STEP_LIMIT_MS = 60_000

QUIET_FLAGS = [
    "--no-sandbox",  # the tests may run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

NO_NEWS = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}

RUN_ALL = """async () => {
    const app = window.jupyterapp;
    await app.started;
    await app.commands.execute("notebook:run-all-cells");
    return app.shell.currentWidget.content.widgets
        .filter(cell => cell.model.type === "code")
        .map(cell => ({
            source: cell.model.sharedModel.getSource(),
            execution_count: cell.model.executionCount,
            errors: cell.model.outputs.toJSON().filter(output => output.output_type === "error"),
        }));
}"""

DRAWN = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
KERNEL_IS_IDLE = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"


class JupyterLab(NamedTuple):
    """A running server: its address and the folder that it shows."""

    url: str
    folder: Path


def wait_until_it_answers(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Ask for the server's status until it comes; fail when the server ends instead."""
    deadline = time.monotonic() + START_LIMIT_S
    ended = os.pidfd_open(process.pid)
    try:
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{url}/api/status", timeout=5):
                    return
            except (urllib.error.URLError, TimeoutError):
                if select.select([ended], [], [], 0.1)[0]:
                    break
    finally:
        os.close(ended)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def jupyterlab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterLab]:
    """Start JupyterLab with settings of its own, on a free port of the loopback address."""
    home, folder = tmp_path_factory.mktemp("jupyter"), tmp_path_factory.mktemp("notebooks")
    overrides = home / "config" / "labconfig" / "default_setting_overrides.json"
    overrides.parent.mkdir(parents=True)
    overrides.write_text(json.dumps(NO_NEWS))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True"]
    command += [f"--ServerApp.root_dir={folder}", "--LabApp.extension_manager=readonly"]
    command += ["--LabApp.expose_app_in_browser=True", f"--LabApp.workspaces_dir={home / 'workspaces'}"]
    log = home / "jupyterlab.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, "JUPYTER_CONFIG_DIR": str(home / "config")},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_it_answers(process, url, log)
        yield JupyterLab(url, folder)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Start Debian's chromium.

    It ends with the module: while Playwright runs, this thread counts as inside an event loop,
    and no other test could start one of its own. Its processes come and go as it likes and it
    litters its runtime directory, so both are kept out of what is watched for leaks.
    """
    environment = {name: value for name, value in os.environ.items() if name != "IVSHMEM_LAB_TEST_RUN"}
    environment["XDG_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("chromium"))
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=QUIET_FLAGS, env=environment
        )
        yield chromium
        chromium.close()


@pytest.fixture
def open_notebook(
    jupyterlab: JupyterLab, browser: Browser, request: pytest.FixtureRequest
) -> Callable[[Path], AbstractContextManager[Page]]:
    """Open a copy of a notebook: ``with open_notebook(path) as page``.

    At the end of the block the page must have had no error and asked no other machine for
    anything. When the block fails, a picture of the page is left in build/screenshots.
    """

    @contextmanager
    def opened(path: Path) -> Iterator[Page]:
        # A name of its own: JupyterLab would give a known name its old kernel back.
        name = re.sub(r"\W+", "-", request.node.name)
        copy = jupyterlab.folder / f"{name}-{path.name}"
        shutil.copy(path, copy)
        context = browser.new_context(viewport={"width": 1400, "height": 1000})
        context.set_default_timeout(STEP_LIMIT_MS)
        page = context.new_page()
        errors: list[str] = []
        strangers: list[str] = []

        def note_stranger(sent: Request) -> None:
            where = urlsplit(sent.url)
            if where.scheme not in ("data", "blob") and where.hostname != "127.0.0.1":
                strangers.append(sent.url)

        page.on("pageerror", lambda error: errors.append(str(error)))
        context.on("request", note_stranger)
        try:
            page.goto(f"{jupyterlab.url}/lab/tree/{copy.name}?reset")
            page.wait_for_function(KERNEL_IS_IDLE)
            yield page
            page.evaluate(DRAWN)
            assert errors == []
            assert strangers == []
        except BaseException:
            SCREENSHOTS.mkdir(parents=True, exist_ok=True)
            (SCREENSHOTS / f"{name}.png").write_bytes(page.screenshot())
            raise
        finally:
            shut_down_kernels(jupyterlab.url)
            context.close()

    return opened


def shut_down_kernels(url: str) -> None:
    """End every session of the server, and with it its kernel."""
    with urllib.request.urlopen(f"{url}/api/sessions", timeout=10) as answer:
        sessions = json.load(answer)
    for session in sessions:
        delete = urllib.request.Request(f"{url}/api/sessions/{session['id']}", method="DELETE")
        with urllib.request.urlopen(delete, timeout=STOP_LIMIT_S):
            pass


@pytest.fixture(scope="session")
def run_all() -> Callable[[Page], list[dict[str, object]]]:
    """Do "Run All Cells" on the open notebook; return source, execution count and errors of each code cell."""

    def run(page: Page) -> list[dict[str, object]]:
        cells: list[dict[str, object]] = page.evaluate(RUN_ALL)
        return cells

    return run
