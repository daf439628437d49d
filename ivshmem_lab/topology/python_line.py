"""The Python line that does what an action does, as a user would write it."""

from __future__ import annotations

import json
import keyword
from typing import TYPE_CHECKING, Any

from ..units import format_size, parse_size
from .model import HostPeer, Link, Memory, Server, Vm
from .plan import Verb, is_plugged

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .plan import Action

_TAKEN = frozenset({"lab", "Lab"})


def variable(name: str) -> str:
    """Return the variable of a member, or ``lab["…"]`` where its name cannot be one.

    >>> variable("board"), variable("my-board")
    ('board', 'lab["my-board"]')
    """
    return name if is_variable(name) else f"lab[{_text(name)}]"


def is_variable(name: str) -> bool:
    """Whether a member's name is a Python name that nothing else has."""
    return name.isidentifier() and name.isascii() and not keyword.iskeyword(name) and name not in _TAKEN


def python_line(action: Action) -> str:
    """Return the line that does the same in Python, in a lab called ``lab``.

    >>> from .plan import Action
    >>> python_line(Action(Verb.CREATE, "board", Server("board")))
    'board = lab.server("board", size="4M", vectors=2)'
    >>> python_line(Action(Verb.PLUG, "carol", Link(server="board")))
    'carol.plug(board)'
    """
    subject = variable(action.name)
    match action.verb, action.item:
        case Verb.PLUG | Verb.UNPLUG, Link() as link:
            named = [(key, getattr(link, key)) for key in ("vectors", "master", "ioeventfd")]
            words = [variable(link.target), *(f"{key}={_text(value)}" for key, value in named if value is not None)]
            return f"{subject}.{action.verb.value}({', '.join(words)})"
        case Verb.STOP, _:
            return f"{subject}.stop()"
        case Verb.START, _:
            return f"{subject}.start()"
        case ((Verb.REMOVE | Verb.LEAVE), _):
            return f"{subject}.close()"
    made = _made(action.item)
    return f"{subject} = {made}" if is_variable(action.name) else made


def python_lines(actions: Iterable[Action]) -> list[str]:
    """Return the lines of a whole plan."""
    return [python_line(action) for action in actions]


def _made(item: Any) -> str:
    match item:
        case Server():
            policy = [(key, getattr(item, key)) for key in ("peers_per_uid", "observer_uid")]
            more = "".join(f", {key}={value}" for key, value in policy if value is not None)
            return f"lab.server({_text(item.name)}, size={_size(item.size_bytes)}, vectors={item.vectors}{more})"
        case Memory():
            return f"lab.memory({_text(item.name)}, size={_size(item.size_bytes)})"
        case HostPeer():
            return f"lab.peer({_text(item.name)}, connect={variable(item.server)})"
        case Vm():
            return f"lab.vm({', '.join(_vm_words(item))})"
    raise TypeError(f"{item!r} is not made")


def _vm_words(vm: Vm) -> Iterable[str]:
    yield _text(vm.name)
    yield f"guest={_text(vm.guest)}"
    if vm.args is not None:
        yield f"args={_text(vm.args)}"
    if vm.emulator != "unicorn":
        yield f"emulator={_text(vm.emulator)}"
    servers = [variable(link.target) for link in vm.devices if not is_plugged(link, vm)]
    if servers:
        yield f"connect={servers[0] if len(servers) == 1 else '[' + ', '.join(servers) + ']'}"
    if vm.memory_bytes is not None:
        yield f"memory={_size(vm.memory_bytes)}"
    if vm.machine != "pc":
        yield f"machine={_text(vm.machine)}"
    for key in ("root_ports", "cpu"):
        if getattr(vm, key) is not None:
            yield f"{key}={getattr(vm, key)}"
    if vm.accel != "tcg":
        yield f"accel={_text(vm.accel)}"


def _size(size_bytes: int) -> str:
    text = format_size(size_bytes)
    return _text(text) if parse_size(text) == size_bytes and not text.isdigit() else str(size_bytes)


def _text(value: object) -> str:
    """Write a value as Python does, texts in double quotes where they are plain."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and value.isprintable() else repr(value)
