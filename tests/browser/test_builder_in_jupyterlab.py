"""The topology builder in a real JupyterLab, with real machines: by mouse, by keys, under way, pasted, in the dark, and in Python."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from .books import LIMIT_MS, last_cell, picture, violations, written

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from playwright.sync_api import Locator, Page

    Open = Callable[[Path], AbstractContextManager[Page]]
    RunAll = Callable[[Page], list[dict[str, object]]]

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

EMPTY = """from ivshmem_lab import Lab
from ivshmem_lab.widgets import TopologyBuilder
lab = Lab()
TopologyBuilder(lab)"""
BUSY = """import threading, time
from ivshmem_lab import Lab
from ivshmem_lab.topology.model import Server, Topology, Vm
from ivshmem_lab.widgets import TopologyBuilder
lab = Lab()
builder = TopologyBuilder(lab)
builder.draft = Topology((Server("board"),), (), (Vm("alice"), Vm("bob")))
told = 0
def tell():
    global told
    while not lab.closed:
        told += 1
        builder.answer({"op": "change", "name": "board", "key": "vectors", "value": str(1 + told % 9)})
        time.sleep(0.05)
threading.Thread(target=tell, daemon=True).start()
builder"""
LEGACY = (
    "qemu-system-x86_64 -name old -m 64 -vnc :1 -device ivshmem,size=4,shm=scratch "
    "-chardev socket,path=/tmp/ivshmem_socket,id=c -device ivshmem,chardev=c,size=4,vectors=2,msi=on"
)
DASHBOARD = """from ivshmem_lab import Lab
from ivshmem_lab.widgets import LabDashboard
lab = Lab()
LabDashboard(lab)"""
DARK = "() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})"
IS_DARK = "() => document.body.dataset.jpThemeLight === 'false' && !document.querySelector('#jupyterlab-splash')"


def shown(page: Page, run_all: RunAll) -> Locator:
    assert [cell["errors"] for cell in run_all(page)] == [[]]
    root = page.locator(".jp-OutputArea-output .ivl-builder")
    root.wait_for(timeout=LIMIT_MS)
    root.scroll_into_view_if_needed()
    return root


def middle(part: Locator) -> tuple[float, float]:
    box = part.bounding_box()
    assert box is not None
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def drag(page: Page, part: Locator, x: float, y: float) -> None:
    page.mouse.move(*middle(part))
    page.mouse.down()
    page.mouse.move(x - 30, y - 20, steps=4)
    page.mouse.move(x, y, steps=4)
    page.mouse.up()


def node(root: Locator, name: str) -> Locator:
    return root.get_by_test_id(f"node-{name}")


def lines(root: Locator, testid: str) -> list[str]:
    return root.get_by_test_id(testid).locator("li").all_inner_texts()


def running(root: Locator, *names: str) -> None:
    for name in names:
        root.locator(f'[data-testid="node-{name}"][data-state="running"][data-draft=""]').wait_for(timeout=LIMIT_MS)


def test_two_machines_and_a_server_are_drawn_with_the_mouse_and_run(
    open_notebook: Open, run_all: RunAll, tmp_path: Path
) -> None:
    with open_notebook(written(tmp_path / "drawn.ipynb", EMPTY)) as page:
        root = shown(page, run_all)
        assert root.get_by_test_id("apply").inner_text() == "Apply (no changes)"
        box = root.get_by_test_id("canvas").bounding_box()
        assert box is not None
        for number, kind in enumerate(("unicorn", "server", "unicorn")):
            thing = root.get_by_test_id(f"palette-{kind}").locator(".ivl-thing")
            x, y = ((130, 60), (430, 150), (130, 260))[number]
            drag(page, thing, box["x"] + x, box["y"] + y)
            node(root, ("vm", "board", "vm2")[number]).wait_for(timeout=LIMIT_MS)
        # A machine cannot be connected with another: it says why, and what to do.
        page.mouse.move(*middle(node(root, "vm").locator(".ivl-port")))
        page.mouse.down()
        page.mouse.move(*middle(node(root, "vm2")), steps=6)
        root.get_by_test_id("hint").get_by_text("they meet at a server or a memory").wait_for(timeout=LIMIT_MS)
        assert node(root, "board").get_attribute("data-target") == "yes"
        assert node(root, "vm2").get_attribute("data-target") == "no"
        picture(page, "builder-connecting", ".ivl-builder")
        page.mouse.up()
        for name in ("vm", "vm2"):
            drag(page, node(root, name).locator(".ivl-port"), *middle(node(root, "board")))
            root.get_by_test_id(f"device-{name}-0").wait_for(timeout=LIMIT_MS)
        root.get_by_text("Apply (5 changes)").wait_for(timeout=LIMIT_MS)
        assert lines(root, "plan")[0] == "create server board (4M, 2 vectors)"
        root.get_by_test_id("apply").click()
        running(root, "vm", "vm2", "board")
        root.get_by_text("5 changes applied").wait_for(timeout=LIMIT_MS)
        assert set(root.locator(".ivl-badge").all_inner_texts()) == {"peer 0 · 2 vectors", "peer 1 · 2 vectors"}
        picture(page, "builder-running", ".ivl-builder")
        # What runs is asked about before it is taken out, and Undo brings it back.
        node(root, "vm2").locator(".ivl-bnode-main").click()
        page.keyboard.press("Delete")
        root.get_by_test_id("question").get_by_text("Remove vm2 from the draft?").wait_for(timeout=LIMIT_MS)
        root.get_by_test_id("yes").click()
        root.get_by_text("Apply (2 changes)").wait_for(timeout=LIMIT_MS)
        root.get_by_test_id("undo").click()
        running(root, "vm2")
        assert violations(page, ".ivl-builder") == []


def walk(page: Page, where: str, key: str = "Tab") -> None:
    """Go on with a key until the focus is where it shall be."""
    for _ in range(80):
        if page.evaluate("(where) => document.activeElement?.matches(where)", where):
            return
        page.keyboard.press(key)
    pytest.fail(f"{where} is not reached by {key}")


def test_the_same_is_drawn_by_keys_alone(open_notebook: Open, run_all: RunAll, tmp_path: Path) -> None:
    with open_notebook(written(tmp_path / "typed.ipynb", EMPTY)) as page:
        root = shown(page, run_all)
        page.keyboard.press("Escape")
        page.evaluate("() => document.querySelector('.ivl-builder [data-testid=layout]').focus()")  # as Tab gets there
        for kind, name in (("unicorn", "vm"), ("unicorn", "vm2"), ("server", "board")):
            forward = kind == "unicorn" and name == "vm"
            walk(page, f"[data-testid=add-{kind}]", "Tab" if forward else "Shift+Tab")
            page.keyboard.press("Enter")
            node(root, name).wait_for(timeout=LIMIT_MS)
            page.wait_for_function(
                "(name) => document.activeElement?.closest('.ivl-bnode')?.dataset.key === name", arg=name
            )
        before = middle(node(root, "board"))
        for _ in range(4):
            page.keyboard.press("ArrowDown")
        page.keyboard.press("Shift+ArrowDown")
        page.wait_for_function(
            "(y) => document.querySelector('[data-testid=node-board]').getBoundingClientRect().y > y", arg=before[1]
        )
        for name in ("vm", "vm2"):
            walk(page, f"[data-key={name}] .ivl-bnode-main", "Shift+Tab" if name == "vm" else "Tab")
            page.keyboard.press("c")
            root.get_by_test_id("hint").get_by_text("Enter connects").wait_for(timeout=LIMIT_MS)
            page.keyboard.press("Enter")
            root.get_by_test_id(f"device-{name}-0").wait_for(timeout=LIMIT_MS)
        page.keyboard.press("Control+z")
        root.get_by_test_id("device-vm2-0").wait_for(state="detached", timeout=LIMIT_MS)
        page.keyboard.press("Control+Shift+z")
        root.get_by_test_id("device-vm2-0").wait_for(timeout=LIMIT_MS)
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.activeElement?.dataset.testid === 'field-name'")
        page.keyboard.press("Control+a")
        page.keyboard.type("bob")
        page.keyboard.press("Tab")
        node(root, "bob").wait_for(timeout=LIMIT_MS)
        walk(page, "[data-testid=apply]", "Shift+Tab")
        page.keyboard.press("Enter")
        running(root, "vm", "bob", "board")
        walk(page, "[data-key=bob] .ivl-bnode-main")
        page.keyboard.press("Space")
        root.locator('[data-testid="node-bob"][data-state="paused"]').wait_for(timeout=LIMIT_MS)
        assert root.get_by_test_id("python").inner_text() == "bob.pause()"
        picture(page, "builder-by-keys", ".ivl-builder")


def test_a_drag_wins_over_news_that_come_twenty_times_a_second(
    open_notebook: Open, run_all: RunAll, tmp_path: Path
) -> None:
    with open_notebook(written(tmp_path / "busy.ipynb", BUSY)) as page:
        root = shown(page, run_all)
        body = node(root, "alice").locator(".ivl-bnode-main")
        main = body.element_handle()
        page.evaluate(
            "(main) => { window.news = 0; new MutationObserver(() => window.news++).observe(document.querySelector('[data-testid=plan]'), {subtree: true, characterData: true, childList: true}); window.main = main; }",
            main,
        )
        start = middle(body)
        page.mouse.move(*start)
        page.mouse.down()
        seen = []
        for step in range(1, 31):
            page.mouse.move(start[0] + 8 * step, start[1] + 6 * step)
            page.evaluate("() => new Promise((done) => setTimeout(done, 25))")
            at = middle(body)
            seen.append((at[0] - start[0] - 8 * step, at[1] - start[1] - 6 * step))
        page.mouse.up()
        assert max(abs(part) for off in seen for part in off) <= 8, "it stays under the pointer, but for the grid"
        page.wait_for_function("() => window.news >= 15")
        end = middle(body)
        assert abs(end[0] - start[0] - 240) <= 8
        assert abs(end[1] - start[1] - 180) <= 8
        assert page.evaluate("() => window.main.isConnected"), "patched, not made anew"


def test_a_legacy_command_line_is_pasted_and_runs_as_today_s_devices(
    open_notebook: Open, run_all: RunAll, tmp_path: Path
) -> None:
    with open_notebook(written(tmp_path / "pasted.ipynb", EMPTY)) as page:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        root = shown(page, run_all)
        page.evaluate("(text) => navigator.clipboard.writeText(text)", LEGACY)
        root.get_by_test_id("canvas").focus()
        page.keyboard.press("Control+v")
        node(root, "old").wait_for(timeout=LIMIT_MS)
        root.get_by_test_id("lost").get_by_text("-vnc :1").wait_for(timeout=LIMIT_MS)
        picture(page, "builder-pasted", ".ivl-builder")
        root.get_by_test_id("close-text").click()
        plan = lines(root, "plan")
        assert "create server ivshmem_socket (4M, 2 vectors)" in plan
        assert "create memory scratch (4M)" in plan
        assert "define vm old (qemu, pc, guest none)" in plan
        node(root, "old").locator(".ivl-bnode-main").click()
        root.get_by_test_id("field-emulator").select_option("unicorn")
        root.get_by_test_id("field-guest").fill("probe")
        root.get_by_test_id("field-guest").press("Enter")
        root.get_by_text("define vm old (unicorn, pc, guest probe)").wait_for(timeout=LIMIT_MS)
        root.get_by_test_id("apply").click()
        running(root, "old")
        root.get_by_test_id("export").click()
        root.get_by_test_id("format").select_option("libvirt")
        page.wait_for_function("() => document.querySelector('[data-testid=text]').value.includes('<shmem name=')")


def test_the_bench_in_the_dark_has_nothing_for_axe_to_find(
    open_notebook: Open, run_all: RunAll, tmp_path: Path
) -> None:
    with open_notebook(written(tmp_path / "dark.ipynb", DASHBOARD)) as page:
        root = shown(page, run_all)
        root.get_by_test_id("add-unicorn").click()
        root.get_by_test_id("add-server").click()
        node(root, "board").wait_for(timeout=LIMIT_MS)
        page.evaluate(DARK)
        page.wait_for_function(IS_DARK)
        picture(page, "bench-in-jupyterlab-dark")
        assert violations(page, ".ivl-dashboard") == []
        page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Light'})")
        page.wait_for_function(
            "() => document.body.dataset.jpThemeLight === 'true' && !document.querySelector('#jupyterlab-splash')"
        )
        assert violations(page, ".ivl-dashboard") == []


LAST = "() => [...document.querySelectorAll('.ivl-dashboard > .ivl-footer [data-testid=python]')].at(-1).textContent"
TELL = "import json; from dataclasses import asdict; print(json.dumps(asdict(lab.topology())))"


def told(page: Page) -> dict[str, object]:
    """Run the last cell, which tells the lab's topology."""
    topology: dict[str, object] = json.loads(last_cell(page))
    return topology


def test_the_python_lines_of_the_bench_do_the_same_in_a_fresh_notebook(
    open_notebook: Open, run_all: RunAll, tmp_path: Path
) -> None:
    said: list[str] = []
    with open_notebook(written(tmp_path / "bench.ipynb", DASHBOARD, TELL)) as page:
        assert [cell["errors"] for cell in run_all(page)] == [[], []]
        bench = page.locator(".jp-OutputArea-output .ivl-dashboard")
        root = bench.locator(".ivl-builder")
        root.wait_for(timeout=LIMIT_MS)

        def note(act: Callable[[], object], begins: str) -> None:
            act()
            page.wait_for_function(f"(begins) => ({LAST})().startsWith(begins)", arg=begins, timeout=LIMIT_MS)
            if begins in DONE:
                bench.get_by_text(DONE[begins]).last.wait_for(timeout=LIMIT_MS)
            said.append(page.evaluate(LAST))

        for kind in ("unicorn", "server", "memory"):
            root.get_by_test_id(f"add-{kind}").click()
            node(root, {"unicorn": "vm", "server": "board", "memory": "frame"}[kind]).wait_for(timeout=LIMIT_MS)
        note(root.get_by_test_id("apply").click, "board = lab.server(")
        bench.get_by_role("tab", name="Hot-plug", exact=True).click()
        panel = bench.locator(".ivl-hotplug")
        for source in ("board", "frame"):
            panel.get_by_test_id("open").click()
            panel.get_by_test_id("source").select_option(source)
            note(panel.get_by_test_id("plug").click, f"vm.plug({source})")
        note(panel.get_by_test_id("unplug-hot0").click, "vm.device(board).unplug(")
        bench.get_by_role("tab", name="Topology", exact=True).click()
        node(root, "vm").locator(".ivl-bnode-main").focus()
        note(lambda: page.keyboard.press("Space"), "vm.pause()")
        root.locator('[data-testid="node-vm"][data-state="paused"]').wait_for(timeout=LIMIT_MS)
        there = told(page)
    with open_notebook(
        written(tmp_path / "fresh.ipynb", "from ivshmem_lab import Lab\nlab = Lab()", *said, TELL)
    ) as page:
        cells = run_all(page)
        assert [cell["errors"] for cell in cells] == [[]] * len(cells)
        here = told(page)
    assert here == there
    assert there["vms"][0]["devices"][0]["memory"] == "frame"  # type: ignore[index]


DONE = {
    "board = lab.server(": "changes applied",
    "vm.plug(board)": "plugged in and seen by the guest",
    "vm.plug(frame)": "plugged in and seen by the guest",
    "vm.device(board).unplug(": "unplugged",
}
"""What says that it is done."""
