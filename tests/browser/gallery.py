"""Every widget in every state, drawn without Jupyter: ``make gallery`` leaves the pictures in build/gallery.

The traits come from the package's own models; the front end gets them through a small model of anywidget's interface.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from playwright.sync_api import sync_playwright

from ivshmem_lab.server.events import MessageWithheld, PeerDeparted, PeerInfo, PeerJoined
from ivshmem_lab.topology.layout import complete, layout
from ivshmem_lab.topology.model import HostPeer, Link, Memory, Server, Topology, Vm
from ivshmem_lab.topology.plan import plan
from ivshmem_lab.topology.validate import validate
from ivshmem_lab.vm.device import DeviceState, Step
from ivshmem_lab.widgets import Console, HotplugPanel, LabDashboard, TopologyBuilder
from ivshmem_lab.widgets.builder_model import PALETTE, formats, view
from ivshmem_lab.widgets.console import _packed
from ivshmem_lab.widgets.console_model import Scrollback
from ivshmem_lab.widgets.hotplug_model import Operation, Subject, Way, seen_by_others
from ivshmem_lab.widgets.topology_picture import Standing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Page

OUTPUT = Path(__file__).resolve().parents[2] / "build" / "gallery"
WIDE, NARROW = 900, 420

LIGHT = {
    "--jp-ui-font-color1": "rgba(0,0,0,.87)",
    "--jp-ui-font-color2": "rgba(0,0,0,.6)",
    "--jp-layout-color1": "#fff",
    "--jp-layout-color2": "#eee",
    "--jp-border-color1": "#bdbdbd",
    "--jp-border-color2": "#e0e0e0",
    "--jp-border-color3": "#eee",
}
DARK = {
    "--jp-ui-font-color1": "rgba(255,255,255,.87)",
    "--jp-ui-font-color2": "rgba(255,255,255,.62)",
    "--jp-layout-color1": "#212121",
    "--jp-layout-color2": "#111",
    "--jp-border-color1": "#616161",
    "--jp-border-color2": "#424242",
    "--jp-border-color3": "#333",
}

SHOW = """async ({source, style, state, messages, children}) => {
    const make = (state, messages) => {
        const listeners = new Map();
        const hear = (name) => listeners.get(name) ?? listeners.set(name, new Set()).get(name);
        return {
            get: (name) => structuredClone(state[name]),
            set: (name, value) => { state[name] = value; hear(`change:${name}`).forEach((each) => each()); },
            save_changes: () => {},
            on: (name, f) => hear(name).add(f),
            off: (name, f) => hear(name).delete(f),
            tell: (content) => hear("msg:custom").forEach((f) => f(content)),
            send: (content) => {
                if (content.op === "shown") return;
                (window.sent ??= []).push(content);
                setTimeout(() => {
                    for (const each of messages) hear("msg:custom").forEach((f) => f(each));
                    hear("msg:custom").forEach((f) => f({type: "answer", req: content.req, ok: true, result: ""}));
                });
            },
        };
    };
    const model = make(state, messages);
    const parts = Object.fromEntries(Object.entries(children).map(([name, each]) => [name, make(each.state, each.messages)]));
    model.widget_manager = { get_model: async (name) => parts[name.replace("IPY_MODEL_", "")] };
    const url = URL.createObjectURL(new Blob([source], {type: "text/javascript"}));
    const widget = (await import(url)).default;
    document.head.append(Object.assign(document.createElement("style"), {textContent: style}));
    window.model = model;
    window.tell = model.tell;
    window.sent = [];
    await widget.render({ model, el: document.querySelector("#here"), signal: new AbortController().signal });
    await new Promise((done) => setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(done)), 60));
}"""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A widget in one state."""

    name: str
    widget: Any
    state: dict[str, Any]
    messages: tuple[dict[str, Any], ...] = ()
    width: int = WIDE
    dark: bool = False
    children: dict[str, Picture] = dataclasses.field(default_factory=dict)


# -- hot-plug ---------------------------------------------------------------------------------------------


def _step(state: DeviceState, at_s: float, command: str = "", **more: Any) -> Step:
    said = {"execute": command, "arguments": {"id": "hot0", "driver": "ivshmem-doorbell"}} if command else None
    answer = more.pop("answer", {"return": {}} if command and "error" not in more else None)
    return Step(state, more.pop("what", command or state.value), 0.0012, said, answer, done_s=at_s, **more)


def _operation(way: Way, *steps: Step, source: str = "board", vm: str = "bob") -> Operation:
    made = Operation(
        way, Subject(vm, source, "hot0", source == "board", source == "board"), 0.0, 1.7e9, 10.0, peer_id=1
    )
    for each in steps:
        made.note(each)
    return made


PLUGGED = (
    _step(DeviceState.READY, 0.001),
    _step(DeviceState.CONNECTED, 0.0024, "chardev-add"),
    _step(DeviceState.PLUGGED, 0.0051, "device_add"),
)
ASKED = (
    _step(DeviceState.SEEN, 0.001, what="all that the server sent is read"),
    _step(DeviceState.UNPLUGGING, 0.0026, "device_del"),
)
GONE = (
    _step(
        DeviceState.DELETED,
        0.42,
        answer={"event": "DEVICE_DELETED", "data": {"device": "hot0", "path": "/machine/peripheral/hot0"}},
    ),
    _step(DeviceState.GUARDED, 0.45),
    _step(DeviceState.ABSENT, 0.46, "chardev-remove"),
)


def _vms(count: int = 2, devices: bool = True) -> list[dict[str, Any]]:
    names = ["bob", "alice", "carol", "dave", *(f"worker{number}" for number in range(12))][:count]
    row = {
        "device_id": "hot0",
        "source": "board",
        "peer": "peer 1",
        "place": "pci.0 slot 0x04",
        "fixed": False,
        "words": "pci.0 slot 0x04 · peer 1",
    }
    boot = {**row, "device_id": "ivshmem0", "source": "scratch", "words": "there since the start", "fixed": True}
    return [
        {
            "name": name,
            "emulator": "qemu",
            "state": "running",
            "reason": "",
            "live": True,
            "devices": [row, boot] if devices else [],
        }
        for name in names
    ]


def _others(gone: bool = False) -> list[dict[str, Any]]:
    events = [(0.0, PeerJoined(1, 11, 0))]
    there = {number: PeerInfo(number, 10 + number, 0, 2, 0) for number in (0, 1, 2, 3)}
    if gone:
        events += [(1.0, MessageWithheld(3, 1, "peer 1 left")), (1.0, PeerDeparted(1, "closed"))]
        del there[1]
    rows = seen_by_others(
        1, there, events, {0: "alice", 1: "bob", 2: "me", 3: "dave"}, {2: {0, 3} | (set() if gone else {1})}
    )
    return [dataclasses.asdict(row) for row in rows]


def hotplug_state(
    operation: Operation | None = None, now_s: float = 2.4, gone: bool = False, **more: Any
) -> dict[str, Any]:
    """Return the traits of a `HotplugPanel`."""
    state: dict[str, Any] = {
        "vms": _vms(),
        "sources": [
            {"name": "board", "kind": "server", "words": "server, 4M, 2 vectors", "vectors": 2},
            {"name": "scratch", "kind": "memory", "words": "memory, 1M", "vectors": 0},
        ],
        "slots": {"bob": [[f"pci.0 slot {slot:#04x}", "hot0" if slot == 4 else "", slot] for slot in range(2, 32)]},
        "operations": {},
        "others": {},
        "python": "",
        "status": "",
        "problem": "",
    }
    if operation is not None:
        state["operations"] = {"bob": operation.view(now_s)}
        state["others"] = {"bob": _others(gone)} if operation.subject.peers else {}
        state["status"] = operation.sentence(now_s)
        state["python"] = (
            f"bob.device({operation.subject.source}).unplug(10)"
            if operation.way is Way.UNPLUG
            else "bob.plug(board).wait_seen(10)"
        )
    return {**state, **more}


def _hotplug() -> Iterator[Picture]:
    waiting = _operation(Way.UNPLUG, *ASKED)
    silent = _operation(Way.UNPLUG, *ASKED)
    silent.silent()
    failed = _operation(
        Way.PLUG,
        *PLUGGED[:2],
        _step(DeviceState.CONNECTED, 0.004, "device_add", error="Bus 'pcie.0' does not support hotplugging"),
    )
    failed.fail("bob: device_add: Bus 'pcie.0' does not support hotplugging", 0.004)
    done = _operation(Way.UNPLUG, *ASKED, *GONE)
    adding = _step(DeviceState.CONNECTED, 0.0024, "object-add")
    memory = _operation(Way.PLUG, PLUGGED[0], adding, PLUGGED[2], _step(DeviceState.SEEN, 0.03), source="scratch")
    yield Picture("hotplug-empty", HotplugPanel, hotplug_state(vms=[], sources=[]))
    yield Picture("hotplug-running", HotplugPanel, hotplug_state())
    yield Picture("hotplug-no-devices", HotplugPanel, hotplug_state(vms=_vms(1, devices=False)))
    yield Picture("hotplug-plugging", HotplugPanel, hotplug_state(_operation(Way.PLUG, *PLUGGED), 0.8))
    yield Picture("hotplug-waiting", HotplugPanel, hotplug_state(waiting))
    yield Picture("hotplug-waiting-dark", HotplugPanel, hotplug_state(waiting), dark=True)
    yield Picture("hotplug-silent", HotplugPanel, hotplug_state(silent, 11.0))
    yield Picture("hotplug-failed", HotplugPanel, hotplug_state(failed))
    yield Picture("hotplug-failed-dark", HotplugPanel, hotplug_state(failed), dark=True)
    yield Picture("hotplug-done-withheld", HotplugPanel, hotplug_state(done, 12.0, gone=True))
    yield Picture("hotplug-memory", HotplugPanel, hotplug_state(memory, 1.0))
    yield Picture("hotplug-narrow", HotplugPanel, hotplug_state(waiting), width=NARROW)
    yield Picture("hotplug-16-vms", HotplugPanel, hotplug_state(waiting, vms=_vms(16)))
    yield Picture(
        "hotplug-problem",
        HotplugPanel,
        hotplug_state(problem="bob is busy: waiting for the guest; wait for it, or give it up"),
    )


# -- consoles ---------------------------------------------------------------------------------------------

WRITTEN = (
    "ivshmem: 1af4:1110 at 00:04.0\n"
    "BAR 2 at 0xfe000000, 4 MiB\n"
    "\x1b[32mpeer 1 is ready\x1b[0m, \x1b[1mpingpong\x1b[0m: 500 warm-up rounds\n"
    "\x1b[31mv1: message 3 from peer 2\x1b[0m <script>alert(1)</script>\n"
    "start \x01 and direction \u202e are signs\n"
    "$ "
)


def _tabs(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "state": state,
            "word": state,
            "note": {
                "failed": f"{name} is failed, exit status -11: QEMU ended by signal 11 (SIGSEGV)",
                "stopped": f"{name} is stopped, exit status 3: its guest ended the machine",
            }.get(state, ""),
            "can_type": state == "running",
        }
        for name, state in pairs
    ]


def console_message(vm: str, text: str = WRITTEN) -> dict[str, Any]:
    """Return lines as `Console` sends them."""
    seen = Scrollback()
    for line in text.splitlines(keepends=True):
        seen.feed(line, 1.7e9)
    return {"type": "lines", "vm": vm, "first": seen.first, "lines": [_packed(line) for line in seen.lines()]}


def console_state(*tabs: tuple[str, str], **more: Any) -> dict[str, Any]:
    """Return the traits of a `Console`."""
    return {
        "tabs": _tabs(*tabs),
        "python": 'alice.console.write("c\\n")',
        "status": "alice: 1 characters typed",
        "problem": "",
        **more,
    }


def _consoles() -> Iterator[Picture]:
    three = (("alice", "running"), ("bob", "running"), ("dave", "failed"))
    said = (console_message("alice"),)
    many = [(f"worker{number}", "running") for number in range(16)]
    long = console_message("alice", "".join(f"line {number}: {'x' * (number % 90)}\n" for number in range(300)))
    yield Picture("console-empty", Console, console_state(python="", status=""))
    yield Picture("console-nothing-yet", Console, console_state(("alice", "starting")))
    yield Picture("console-running", Console, console_state(*three), said)
    yield Picture("console-dark", Console, console_state(*three), said, dark=True)
    yield Picture("console-narrow", Console, console_state(*three), said, width=NARROW)
    yield Picture("console-failed", Console, console_state(("dave", "failed")), (console_message("dave"),))
    yield Picture("console-stopped", Console, console_state(("alice", "stopped")), said)
    yield Picture("console-16-vms", Console, console_state(*many), (console_message("worker0"),))
    yield Picture("console-long", Console, console_state(("alice", "running")), (long,))


# -- the topology builder ---------------------------------------------------------------------------------


def builder_state(
    wanted: Topology, current: Topology | None = None, standing: dict[str, Standing] | None = None, **more: Any
) -> dict[str, Any]:
    """Return the traits of a `TopologyBuilder`."""
    current = wanted if current is None else current
    found = validate(wanted)
    return {
        "drawing": view(wanted, current, complete(wanted, layout(wanted)), standing or {}),
        "changes": [] if found else [str(action) for action in plan(current, wanted)],
        "problems": [{"name": each.path.split(".")[1], "text": str(each)} for each in found],
        "rates": {"bob-0": {"sent": 52_000.0, "come": 52_000.0, "words": "104.0 k irq/s"}} if current.vms else {},
        "history": {"undo": "add carol", "redo": ""},
        "applying": {},
        "palette": [[key, what, words] for key, (_, what, words) in PALETTE.items()],
        "formats": [list(each) for each in formats()],
        "python": "bob.pause()",
        "status": "carol joins board: 4M, 2 vectors",
        "problem": "",
        **more,
    }


def _lab(vms: int, *, state: str = "running") -> tuple[Topology, dict[str, Standing]]:
    names = [f"worker{number}" for number in range(vms)] if vms > 3 else ["bob", "alice", "dave"][:vms]
    to_all = (Link(server="board"), Link(memory="scratch"))
    topology = Topology(
        (Server("board"),) if vms else (),
        (Memory("scratch", 1 << 20),) if vms else (),
        tuple(
            Vm(each, "qemu" if each == "bob" else "unicorn", devices=to_all[: 1 + number % 2])
            for number, each in enumerate(names)
        ),
        (HostPeer("me", "board"),) if vms else (),
    )
    standing = {each: Standing(state, "", (("board", number),)) for number, each in enumerate(names)}
    standing |= {"board": Standing("running"), "scratch": Standing("present")}
    standing["me"] = Standing("present", "", (("board", vms),))
    if state == "failed":
        standing[names[-1]] = Standing("failed", "ended by signal 11 (SIGSEGV)")
        standing |= {each: Standing("running", "", (("board", number),)) for number, each in enumerate(names[:-1])}
    return topology, standing


def _builders() -> Iterator[Picture]:
    there, standing = _lab(2)
    drafted = Topology(
        (*there.servers, Server("spare", 1 << 20, 1)),
        there.memories,
        (
            *there.vms,
            Vm("carol", guest="probe", args="watch=1", devices=(Link(server="board"), Link(memory="scratch"))),
        ),
        there.peers,
    )
    wrong = Topology(there.servers, (), (Vm("carol", devices=(Link(server="gone"),)),), (HostPeer("me", ""),))
    busy = {"done": 1, "of": 4, "step": "define vm carol (unicorn, pc, guest probe)"}
    empty = builder_state(Topology(), python="", status="", history={"undo": "", "redo": ""})
    yield Picture("builder-empty", TopologyBuilder, empty, width=1304)
    yield Picture("builder-small", TopologyBuilder, builder_state(there, there, standing), width=1304)
    yield Picture("builder-draft", TopologyBuilder, builder_state(drafted, there, standing), width=1304)
    yield Picture("builder-draft-dark", TopologyBuilder, builder_state(drafted, there, standing), width=1304, dark=True)
    yield Picture(
        "builder-applying", TopologyBuilder, builder_state(drafted, there, standing, applying=busy), width=1304
    )
    yield Picture("builder-problems", TopologyBuilder, builder_state(wrong, Topology(there.servers)), width=1304)
    for name, (topology, stands) in {"failed": _lab(3, state="failed"), "16-vms": _lab(16)}.items():
        state = builder_state(topology, topology, stands)
        yield Picture(f"builder-{name}", TopologyBuilder, state, width=1304)
    yield Picture("builder-medium", TopologyBuilder, builder_state(drafted, there, standing))
    yield Picture("builder-narrow", TopologyBuilder, builder_state(drafted, there, standing), width=NARROW)
    said = "board is a server; there is no machine of this name"
    yield Picture("builder-problem", TopologyBuilder, builder_state(there, there, standing, problem=said))


# -- the bench --------------------------------------------------------------------------------------------


def _bench(name: str, vms: int = 2, *, state: str = "running", width: int = 1304, dark: bool = False) -> Picture:
    topology, standing = _lab(vms, state=state)
    names = [each.name for each in topology.vms]
    waiting = _operation(Way.UNPLUG, *ASKED)
    hotplug = hotplug_state(waiting, vms=_vms(vms)) if vms else hotplug_state(vms=[], sources=[])
    said = (console_message(names[0]),) if vms else ()
    running = vms - (state == "failed")
    return Picture(
        name,
        LabDashboard,
        {
            "summary": f"{running} of {vms} VMs running" if vms else "no VM yet",
            "can_start": False,
            "question": f"Stop {', '.join(names)}? What their guests hold in memory is lost." if vms else "",
            "builder": "IPY_MODEL_builder",
            "hotplug": "IPY_MODEL_hotplug",
            "console": "IPY_MODEL_console",
            "python": "bob.device(board).unplug(10)" if vms else "",
            "status": waiting.sentence(2.4) if vms else "",
            "problem": "",
        },
        width=width,
        dark=dark,
        children={
            "builder": Picture("", TopologyBuilder, builder_state(topology, topology, standing)),
            "hotplug": Picture("", HotplugPanel, hotplug),
            "console": Picture("", Console, console_state(*((each, "running") for each in names)), said),
        },
    )


def pictures() -> list[Picture]:
    """Return all there are."""
    benches = [
        _bench("bench-empty", 0),
        _bench("bench-running"),
        _bench("bench-dark", dark=True),
        _bench("bench-failed", 3, state="failed"),
        _bench("bench-narrow", width=640),
        _bench("bench-16-vms", 16),
    ]
    return [*_hotplug(), *_consoles(), *_builders(), *benches]


# -- drawing ----------------------------------------------------------------------------------------------


def show(page: Page, picture: Picture) -> None:
    """Draw a widget in one state on an empty page."""
    colours = "".join(f"{name}:{value};" for name, value in (DARK if picture.dark else LIGHT).items())
    ground = "#212121" if picture.dark else "#fff"
    page.set_viewport_size({"width": picture.width + 32, "height": 1300})
    page.set_content(
        f'<!doctype html><html lang="en"><head><title>{picture.name}</title></head>'
        f'<body data-jp-theme-light="{str(not picture.dark).lower()}" style="margin:16px;background:{ground};{colours}">'
        f'<main id="here" style="width:{picture.width}px"></main></body></html>'
    )
    children = {name: {"state": each.state, "messages": list(each.messages)} for name, each in picture.children.items()}
    page.evaluate(
        SHOW,
        {
            "source": str(picture.widget._esm),
            "style": str(picture.widget._css),
            "state": picture.state,
            "messages": list(picture.messages),
            "children": children,
        },
    )


def main(wanted: list[str]) -> int:
    """Draw those whose names begin with a wanted word, or all; tell where."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    chosen = [each for each in pictures() if not wanted or any(each.name.startswith(word) for word in wanted)]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page()
        for each in chosen:
            show(page, each)
            (OUTPUT / f"{each.name}.png").write_bytes(page.locator("#here").screenshot())
        browser.close()
    sheet = "".join(f'<h2>{each.name}</h2><img src="{each.name}.png" alt="">' for each in chosen)
    (OUTPUT / "index.html").write_text(f'<!doctype html><meta charset="utf-8"><title>Gallery</title>{sheet}')
    print(f"{len(chosen)} pictures: {OUTPUT / 'index.html'}")
    print(json.dumps([each.name for each in chosen]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
