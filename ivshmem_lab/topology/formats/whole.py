"""The formats of whole topologies by name: reading, writing, and telling one from the other."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import UsageError
from . import commands, libvirt_xml, python_source, yaml_file
from .lost import Lost, Parsed, Rendered

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..model import Topology

    Positions = Mapping[str, tuple[int, int]]
    Guests = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class WholeFormat:
    """A format that a whole topology can be written in.

    Attributes
    ----------
    name, what
        Its name, and a few words.
    """

    name: str
    what: str
    _parse: Callable[[str, str, Guests], Parsed]
    _write: Callable[[Topology, Positions, Guests], Rendered]
    has_positions: bool = False

    def parse(self, text: str, source: str = "topology", guests: Guests | None = None) -> Parsed:
        """Read a topology; what has no place in one is told.

        Parameters
        ----------
        text
            What was written.
        source
            Its name, for messages.
        guests
            Names of guests and the paths of their files, for formats that name files.

        Raises
        ------
        UsageError
            It is not of this format.
        """
        return self._parse(text, source, guests or {})

    def write(self, topology: Topology, positions: Positions | None = None, guests: Guests | None = None) -> Rendered:
        """Write a valid topology; what the format cannot say is told."""
        rendered = self._write(topology, positions or {}, guests or {})
        if not positions or self.has_positions:
            return rendered
        lost = Lost("positions", f"where {len(positions)} nodes are drawn", f"{self.name} has no place for it")
        return Rendered(rendered.text, (*rendered.lost, lost))


def _read_file(text: str, source: str, _: Guests) -> Parsed:
    file = yaml_file.parse(text, source)
    return Parsed(file.topology, (), file.positions)


WHOLE_FORMATS = {
    "yaml": WholeFormat(
        "yaml",
        "a topology file, for ivshmem-lab up",
        _read_file,
        lambda topology, positions, _: Rendered(yaml_file.write_yaml(topology, positions)),
        has_positions=True,
    ),
    "json": WholeFormat(
        "json",
        "the same in JSON",
        _read_file,
        lambda topology, positions, _: Rendered(yaml_file.write_json(topology, positions)),
        has_positions=True,
    ),
    "qemu": WholeFormat(
        "qemu",
        "a script with ivshmem-server and -device ivshmem-plain,… and ivshmem-doorbell,…",
        lambda text, _, guests: commands.parse(text, "qemu", guests),
        lambda topology, _, guests: commands.write(topology, "qemu", guests),
    ),
    "legacy": WholeFormat(
        "legacy",
        "the same with -device ivshmem,… of QEMU up to 3.1",
        lambda text, _, guests: commands.parse(text, "legacy", guests),
        lambda topology, _, guests: commands.write(topology, "legacy", guests),
    ),
    "libvirt": WholeFormat(
        "libvirt",
        "domain XML with <shmem>",
        lambda text, _, guests: libvirt_xml.parse(text, guests),
        lambda topology, _, guests: libvirt_xml.write(topology, guests),
    ),
    "python": WholeFormat(
        "python",
        "a program with Lab()",
        lambda text, source, _: python_source.parse(text, source),
        lambda topology, _, __: python_source.write(topology),
    ),
}
"""All formats, by the name that ``ivshmem-lab translate`` takes."""


def guess(text: str) -> str:
    """Return the name of the format that a text looks like.

    >>> guess("qemu-system-x86_64 -device ivshmem,shm=board"), guess("version: 1")
    ('legacy', 'yaml')
    """
    begin = text.lstrip("\ufeff \t\r\n")
    if begin.startswith("<"):
        return "libvirt"
    if begin.startswith("{"):
        return "json"
    if re.search(r"\bLab\(\)|^\s*(\w+ = )?lab\.\w+\(", text, re.MULTILINE):
        return "python"
    if re.search(r"-device\s+['\"]?(driver=)?ivshmem,", text):
        return "legacy"
    if re.search(r"-device\s|ivshmem-server|-system-x86_64", text):
        return "qemu"
    return "yaml"


def named(name: str) -> WholeFormat:
    """Find a format.

    Raises
    ------
    UsageError
        There is none of that name.
    """
    if name not in WHOLE_FORMATS:
        raise UsageError(f"there is no format {name!r}; there are {', '.join(WHOLE_FORMATS)}")
    return WHOLE_FORMATS[name]
