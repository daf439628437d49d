"""Topology files: YAML, and JSON, which the same parser reads; errors name line and column.

::

    version: 1
    servers:
      board: {size: 4M, vectors: 2}
    vms:
      alice: {guest: pingpong, devices: [{server: board}]}
    peers:
      me: {server: board}
    positions:                 # where a drawing has them, in px; may be left out
      board: [360, 24]
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from ...errors import UsageError
from ...units import format_size, parse_size
from ..model import HostPeer, Link, Memory, Server, Topology, Vm

if TYPE_CHECKING:
    from collections.abc import Mapping

VERSION = 1
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")  # JSON has them as they are, YAML does not
_KINDS: dict[str, type] = {"servers": Server, "memories": Memory, "vms": Vm, "peers": HostPeer}
_NUMBERS = ("vectors", "cpu", "root_ports", "peers_per_uid", "observer_uid")
_SWITCHES = ("ioeventfd",)


@dataclass(frozen=True, slots=True)
class TopologyFile:
    """A topology as it stands in a file.

    Attributes
    ----------
    topology
        What the file describes.
    places
        Where its parts stand in the text: path to line and column, both from 1.
    positions
        Where its parts are drawn, as far as the file says: name to left and upper edge, in px.
    """

    topology: Topology
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    positions: dict[str, tuple[int, int]] = field(default_factory=dict)

    def place(self, path: str) -> tuple[int, int]:
        """Find where a path stands, or the nearest part around it."""
        while path and path not in self.places:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.places.get(path, (1, 1))


def parse(text: str, source: str = "topology") -> TopologyFile:
    """Read a topology file.

    Raises
    ------
    UsageError
        It is no YAML, or not of this schema: ``source:line:column: …``.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise UsageError(f"{where}: {error.problem}; mend the YAML there") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{source}: no YAML: {str(error).splitlines()[0]}") from error
    if node is None:
        raise UsageError(f"{source}:1:1: the file is empty; begin with version: {VERSION}")
    return _Reader(source).read(node)


class _Reader:
    def __init__(self, source: str) -> None:
        self.source = source
        self.places: dict[str, tuple[int, int]] = {}

    def read(self, node: yaml.Node) -> TopologyFile:
        parts = self.mapping(node, "", {"version", "positions", *_KINDS})
        version = self.scalar(parts["version"]) if "version" in parts else None
        if type(version) is not int or version != VERSION:
            self.fail(parts.get("version", node), f"version is {version!r}; write version: {VERSION}")
        topology = Topology(
            **{
                kind: tuple(
                    self.item(of, kind, name, below) for name, below in self.mapping(parts[kind], kind, None).items()
                )
                for kind, of in _KINDS.items()
                if kind in parts
            }
        )
        positions = self.positions(parts["positions"], topology) if "positions" in parts else {}
        return TopologyFile(topology, self.places, positions)

    def positions(self, node: yaml.Node, topology: Topology) -> dict[str, tuple[int, int]]:
        known = {item.name for kind in _KINDS for item in getattr(topology, kind)}
        found = {}
        for name, below in self.mapping(node, "positions", known).items():
            pair = [self.scalar(each) for each in below.value] if isinstance(below, yaml.SequenceNode) else []
            if [type(each) for each in pair] != [int, int]:
                self.fail(below, f"positions.{name} is two numbers of px: [X, Y]")
            found[name] = pair[0], pair[1]
        return found

    def fail(self, node: yaml.Node, text: str) -> NoReturn:
        mark = node.start_mark
        raise UsageError(f"{self.source}:{mark.line + 1}:{mark.column + 1}: {text}")

    def mapping(self, node: yaml.Node, path: str, known: set[str] | None) -> dict[str, yaml.Node]:
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"):
            return {}
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, f"{path or 'the file'} is a mapping (key: value)")
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.fail(key, "a key is a word")
            name = key.value
            if known is not None and name not in known:
                self.fail(key, f"unknown key {name!r}; there are {', '.join(sorted(known))}")
            if name in found:
                self.fail(key, f"the key {name!r} is there twice; keep one")
            found[name] = value
            self.places[f"{path}.{name}".lstrip(".")] = (key.start_mark.line + 1, key.start_mark.column + 1)
        return found

    def item(self, of: type, kind: str, name: str, node: yaml.Node) -> Any:
        path = f"{kind}.{name}"
        values = self.values(of, path, node)
        if of is HostPeer and "server" not in values:
            self.fail(node, f"{path} names no server; write server: NAME")
        return of(name=name, **values)

    def values(self, of: type, path: str, node: yaml.Node) -> dict[str, Any]:
        keys = {part.name.removesuffix("_bytes"): part.name for part in fields(of) if part.name != "name"}
        nullable = {part.name for part in fields(of) if part.default is None or part.name == "guest"}
        values: dict[str, Any] = {}
        for key, below in self.mapping(node, path, set(keys)).items():
            values[keys[key]] = (
                self.devices(f"{path}.devices", below)
                if key == "devices"
                else self.value(f"{path}.{key}", keys[key], below, nullable=keys[key] in nullable)
            )
        return values

    def devices(self, path: str, node: yaml.Node) -> tuple[Link, ...]:
        if not isinstance(node, yaml.SequenceNode):
            self.fail(node, f"{path} is a list of devices: [{{server: NAME}}]")
        for index, below in enumerate(node.value):
            self.places[f"{path}[{index}]"] = (below.start_mark.line + 1, below.start_mark.column + 1)
        return tuple(Link(**self.values(Link, f"{path}[{index}]", below)) for index, below in enumerate(node.value))

    def scalar(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            self.fail(node, "one value is expected here")
        try:
            return yaml.SafeLoader("").construct_object(node)
        except (yaml.YAMLError, ValueError):
            return node.value

    def value(self, path: str, name: str, node: yaml.Node, *, nullable: bool) -> Any:
        value = self.scalar(node)
        if value is None and nullable:
            return None
        if name.endswith("_bytes"):
            try:
                return parse_size(value if type(value) is int else str(node.value))
            except UsageError as error:
                self.fail(node, f"{path}: {error}")
        if name in _NUMBERS and (type(value) is not int or value < 0):
            self.fail(node, f"{path} is a number from 0 on, not {node.value!r}")
        if name in _SWITCHES and not isinstance(value, bool):
            self.fail(node, f"{path} is true or false, not {node.value!r}")
        if name not in (*_NUMBERS, *_SWITCHES) and not isinstance(value, str):
            self.fail(node, f"{path} is a text, not {node.value!r}; put it in quotes")
        if isinstance(value, str):
            try:  # JSON writes one character beyond 16 bits as two
                return value.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeError:
                self.fail(node, f"{path} has half a character in it; take it out")
        return value


def tree(topology: Topology, positions: Mapping[str, tuple[int, int]] | None = None) -> dict[str, Any]:
    """Return a topology as the dicts and lists that a file holds; what has its default is left out.

    Positions of what is not there are left out, too.
    """
    found: dict[str, Any] = {"version": VERSION}
    for kind in _KINDS:
        items = getattr(topology, kind)
        if items:
            found[kind] = {item.name: _plain(item) for item in items}
    names = {item.name for kind in _KINDS for item in getattr(topology, kind)}
    if here := {name: list(place) for name, place in (positions or {}).items() if name in names}:
        found["positions"] = here
    return found


def _plain(item: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for part in fields(item):
        value = getattr(item, part.name)
        if part.name == "name" or value == part.default:
            continue
        if part.name == "devices":
            value = [_plain(link) for link in value]
        elif part.name.endswith("_bytes"):
            text = format_size(value)
            value = text if parse_size(text) == value else value
        plain[part.name.removesuffix("_bytes")] = value
    return plain


def write_yaml(topology: Topology, positions: Mapping[str, tuple[int, int]] | None = None) -> str:
    """Write a topology as YAML; `parse` reads it back."""
    # Escaped: PyYAML writes U+0085 and its like raw, and reads them back as blanks.
    return yaml.safe_dump(tree(topology, positions), sort_keys=False)


def write_json(topology: Topology, positions: Mapping[str, tuple[int, int]] | None = None) -> str:
    """Write a topology as JSON; `parse` reads it back."""
    text = json.dumps(tree(topology, positions), indent=2, ensure_ascii=False)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"
