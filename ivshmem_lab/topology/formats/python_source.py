"""A Python program that makes a lab, in the shape that `write` gives it; read by its syntax alone, never run."""

from __future__ import annotations

import ast
import warnings
from typing import TYPE_CHECKING, Any, NoReturn

from ...errors import UsageError
from ...units import parse_size
from ..edit import add, changed, find, put
from ..model import HostPeer, Link, Memory, Server, Topology, Vm
from ..plan import Verb, plan
from ..python_line import python_line
from .lost import Parsed, Rendered, difference

if TYPE_CHECKING:
    from ..edit import Node

_HEAD = '''\
"""A lab of ivshmem_lab; Enter ends it."""

from ivshmem_lab import Lab

with Lab() as lab:
'''
_TAIL = """\
    print(lab)
    input()
"""
_REASONS = {"": "a program cannot say it"}
_MAKERS: dict[str, type] = {"server": Server, "memory": Memory, "vm": Vm, "peer": HostPeer}
_POSITIONAL = {"server": ("size", "vectors"), "memory": ("size",), "vm": ("guest", "args"), "peer": ("connect",)}
_FIELDS = {"size": "size_bytes", "memory": "memory_bytes"}
_SHAPE = (
    "only lab.server(…), lab.memory(…), lab.vm(…), lab.peer(…), NAME.start(), NAME.plug(…), lab.start(), print(lab) and input()"
    " are read, with plain values"
)


def write(topology: Topology) -> Rendered:
    """Write a program that makes a lab; `parse` reads it back."""
    actions = plan(Topology(), topology)
    lines = [python_line(action) for action in actions if action.verb is not Verb.START]
    starts = [number for number, action in enumerate(actions) if action.verb is Verb.START]
    if starts:
        lines.insert(starts[0], "lab.start()")
    text = _HEAD + "".join(f"    {line}\n" for line in lines) + _TAIL
    return Rendered(text, tuple(difference(topology, parse(text).topology, _REASONS, in_order=False)))


def parse(text: str, source: str = "program") -> Parsed:
    """Read a program of the shape that `write` gives.

    Raises
    ------
    UsageError
        It is no Python, or does something else: ``source:line:column: …``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(text)
    except SyntaxError as error:
        raise UsageError(f"{source}:{error.lineno or 1}:{error.offset or 1}: no Python: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"{source}: no Python: {error}") from error
    return _Reader(source).read(tree)


class _Reader:
    def __init__(self, source: str) -> None:
        self.source = source
        self.topology = Topology()
        self.variables: dict[str, str] = {}

    def error(self, node: ast.AST, text: str) -> UsageError:
        line, column = getattr(node, "lineno", 1), getattr(node, "col_offset", 0) + 1
        return UsageError(f"{self.source}:{line}:{column}: {text}")

    def fail(self, node: ast.AST, text: str) -> NoReturn:
        raise self.error(node, text)

    def read(self, tree: ast.Module) -> Parsed:
        body = [node for node in tree.body if not _is_text(node)]
        for node in body:
            match node:
                case ast.ImportFrom(module="ivshmem_lab", names=[ast.alias(name="Lab", asname=None)], level=0):
                    continue
                case ast.With(
                    items=[
                        ast.withitem(ast.Call(ast.Name("Lab"), args=[], keywords=[]), optional_vars=ast.Name("lab"))
                    ],
                    body=statements,
                ):
                    for statement in statements:
                        self.statement(statement)
                case ast.Assign([ast.Name("lab")], ast.Call(ast.Name("Lab"), args=[], keywords=[])):
                    continue  # a notebook has no with
                case _:
                    self.statement(node)
        return Parsed(self.topology)

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign([ast.Name(variable)], ast.Call(ast.Attribute(ast.Name("lab"), kind)) as call) if (
                kind in _MAKERS
            ):
                if variable == "lab":
                    self.fail(node, "lab is the lab itself; choose another name")
                self.variables[variable] = self.make(kind, call)
            case ast.Expr(ast.Call(ast.Attribute(ast.Name("lab"), kind)) as call) if kind in _MAKERS:
                self.make(kind, call)
            case ast.Expr(ast.Call(ast.Attribute(subject, "plug")) as call):
                self.plug(self.member(subject), call)
            case ast.Expr(ast.Call(ast.Attribute(ast.Name("lab"), "start"), args=[], keywords=[])):
                pass
            case ast.Expr(ast.Call(ast.Attribute(subject, "start"), args=[], keywords=[])):
                self.member(subject)
            case ast.Expr(ast.Call(ast.Name("print"), args=[ast.Name("lab")], keywords=[])):
                pass
            case ast.Expr(ast.Call(ast.Name("input"))) | ast.Pass():
                pass
            case _:
                self.fail(node, f"this is not read: {_SHAPE}")

    def make(self, kind: str, call: ast.Call) -> str:
        if not call.args:
            self.fail(call, f"lab.{kind}() needs a name")
        name = self.value(call.args[0])
        if not isinstance(name, str):
            self.fail(call.args[0], f"a name is a text, not {name!r}")
        given: list[tuple[str, ast.expr]] = list(zip(_POSITIONAL[kind], call.args[1:], strict=False))
        if len(given) < len(call.args) - 1:
            self.fail(call, f"lab.{kind}() has too many values without a name")
        for keyword in call.keywords:
            if keyword.arg is None:
                self.fail(keyword.value, f"** is not read: {_SHAPE}")
            given.append((keyword.arg, keyword.value))
        item: Node = Server(name) if kind == "server" else Memory(name) if kind == "memory" else Vm(name)
        if kind == "peer":
            item = HostPeer(name, "")
        for key, node in given:
            item = self.set(item, kind, key, node)
        if isinstance(item, HostPeer) and not item.server:
            self.fail(call, f"lab.peer({name!r}) needs connect=SERVER")
        self.topology = self.checked(call, lambda: add(self.topology, item))
        return name

    def set(self, item: Any, kind: str, key: str, node: ast.expr) -> Any:
        if key == "connect" and kind in ("vm", "peer"):
            ends = [self.end(each) for each in (node.elts if isinstance(node, ast.List | ast.Tuple) else [node])]
            if not all(isinstance(end, Server) for end in ends) or (kind == "peer" and len(ends) != 1):
                self.fail(node, "connect= takes servers, and one for a peer")
            if kind == "peer":
                return changed(item, {"server": ends[0].name})
            return put(item, devices=tuple(Link(server=end.name) for end in ends))
        if key in ("size_bytes", "memory_bytes", "server", "devices"):
            self.fail(node, f"lab.{kind}() has no {key!r}")
        value = self.value(node)
        if key in _FIELDS and value is not None:
            suffix = "m" if key == "memory" and isinstance(value, str) else ""
            value = self.checked(node, lambda: parse_size(value, key, default_suffix=suffix))
        if key == "args" and isinstance(value, dict):
            value = " ".join(f"{k}={int(v) if isinstance(v, bool) else v}" for k, v in value.items())
        return self.checked(node, lambda: changed(item, {_FIELDS.get(key, key): value}))

    def plug(self, name: str, call: ast.Call) -> None:
        vm = find(self.topology, name)
        if not isinstance(vm, Vm) or len(call.args) != 1 or any(keyword.arg is None for keyword in call.keywords):
            self.fail(call, f"VM.plug(SERVER or MEMORY, …) is read: {_SHAPE}")
        end = self.end(call.args[0])
        link = Link(server=end.name) if isinstance(end, Server) else Link(memory=end.name)
        values = {str(keyword.arg): self.value(keyword.value) for keyword in call.keywords}
        if {"server", "memory"} & values.keys():
            self.fail(call, "plug() takes what is plugged first, without a name")
        new = self.checked(call, lambda: changed(link, values))
        with_it = put(vm, devices=(*vm.devices, new))
        vms = tuple(with_it if each.name == name else each for each in self.topology.vms)
        self.topology = put(self.topology, vms=vms)

    def member(self, node: ast.expr) -> str:
        match node:
            case ast.Name(variable) if variable in self.variables:
                return self.variables[variable]
            case ast.Subscript(ast.Name("lab"), ast.Constant(str() as name)):
                found: Node = self.checked(node, lambda: find(self.topology, name))
                return found.name
            case _:
                raise self.error(node, f"this is no member of the lab that was made before: {ast.unparse(node)}")

    def end(self, node: ast.expr) -> Server | Memory:
        found = find(self.topology, self.member(node))
        if not isinstance(found, Server | Memory):
            self.fail(node, f"{found.name} is no server and no memory")
        return found

    def value(self, node: ast.expr) -> Any:
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, RecursionError):
            self.fail(node, f"this is no plain value: {_SHAPE}")

    def checked(self, node: ast.AST, make: Any) -> Any:
        try:
            return make()
        except UsageError as error:
            self.fail(node, str(error))


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
