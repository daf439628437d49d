"""A QEMU command line, cut into options without losing a word.

Ref: QEMU 7.2 manual, "Invocation", and the options without a value of older releases back to 1.0.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...errors import UsageError
from ...keyval import split_pairs
from ..ivshmem import IvshmemDevice, Note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

WITHOUT_VALUE = frozenset(
    [
        "h",
        "help",
        "version",
        "audio-help",
        "S",
        "s",
        "preconfig",
        "snapshot",
        "usb",
        "nographic",
        "curses",
        "sdl",
        "no-frame",
        "alt-grab",
        "ctrl-grab",
        "no-quit",
        "full-screen",
        "portrait",
        "win2k-hack",
        "no-fd-bootchk",
        "rtc-td-hack",
        "tdf",
        "no-acpi",
        "no-hpet",
        "no-reboot",
        "no-shutdown",
        "daemonize",
        "singlestep",
        "enable-kvm",
        "no-kvm",
        "no-kvm-irqchip",
        "no-kvm-pit",
        "no-kvm-pit-reinjection",
        "enable-nesting",
        "enable-fips",
        "nodefaults",
        "nodefconfig",
        "no-user-config",
        "only-migratable",
        "mem-prealloc",
        "semihosting",
        "xen-attach",
        "xen-domid-restrict",
        "xen-create",
        "old-param",
        "localtime",
        "std-vga",
        "enable-sync-profile",
    ]
)
"""Options that take no value; every other one is followed by its value."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option with its value, or a word that is none (the program, a disk image).

    Attributes
    ----------
    words
        As they were written.
    """

    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name without its dashes; empty for a plain word."""
        word = self.words[0]
        return word.removeprefix("--") if word.startswith("--") else word[1:] if word.startswith("-") else ""

    @property
    def value(self) -> str:
        """The value; empty when there is none."""
        return self.words[1] if len(self.words) > 1 else ""

    def pairs(self, first_key: str) -> dict[str, str]:
        """Read the value as ``name=value,…``; QEMU's JSON form gives nothing.

        Raises
        ------
        UsageError
            When it is not of that form.
        """
        if self.value.startswith("{"):
            return {}
        return split_pairs(self.value, first_key, self.words[0])


@dataclass(frozen=True, slots=True)
class CommandLine:
    """Options that pass through, and ivshmem devices as values, in order."""

    items: tuple[Option | IvshmemDevice, ...]

    @property
    def devices(self) -> tuple[IvshmemDevice, ...]:
        """The ivshmem devices."""
        return tuple(item for item in self.items if isinstance(item, IvshmemDevice))


@dataclass(slots=True)
class Written:
    """A command line in some format, and what the format could not say."""

    argv: list[str] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


_QUOTED = re.compile(r"""(?:\A|(?<=\s))\#[^\n]* | '[^']*' | "(?:\\.|[^"\\])*" | \\.""", re.DOTALL | re.VERBOSE)
"""Comments, quotations and escapes of a shell."""


_END_OF_COMMAND = re.compile(r"(?<![<>])&+|;|\n")


def _joined(quoted: re.Match[str]) -> str:
    r"""Take the ends of lines behind a ``\`` away, which `shlex` keeps."""
    text = quoted[0]
    return (
        text
        if text[0] in "#'"
        else re.sub(r"\\(.)", lambda escape: escape[0] * (escape[1] != "\n"), text, flags=re.DOTALL)
    )


def split_shell(text: str) -> list[str]:
    r"""Split a command line as a shell does: quotes, ``\`` at the end of a line, comments.

    Raises
    ------
    UsageError
        When a quotation is not closed.
    """
    try:
        return shlex.split(_QUOTED.sub(_joined, text), comments=True)
    except ValueError as error:
        raise UsageError(f"the command line cannot be split into words: {error}") from error


def split_commands(text: str) -> list[list[str]]:
    r"""Split a script into the words of its commands: at the ends of lines, ``;`` and ``&``.

    >>> split_commands("a 'b;' & # no\nc d; e")
    [['a', 'b;'], ['c', 'd'], ['e']]

    Raises
    ------
    UsageError
        When a quotation is not closed.
    """
    commands, at = [""], 0
    for quoted in [*_QUOTED.finditer(text), None]:
        first, *others = _END_OF_COMMAND.split(text[at : quoted.start() if quoted else len(text)])
        commands[-1] += first
        commands += others
        if quoted:
            commands[-1] += quoted[0]
            at = quoted.end()
    return [words for command in commands if (words := split_shell(command))]


def cut(argv: Sequence[str]) -> list[Option]:
    """Cut words into options.

    >>> [option.words for option in cut(["qemu-system-x86_64", "-S", "-m", "64"])]
    [('qemu-system-x86_64',), ('-S',), ('-m', '64')]

    Raises
    ------
    UsageError
        When the last option lacks its value.
    """
    options = []
    words = iter(argv)
    for word in words:
        option = Option((word,))
        if option.name and option.name not in WITHOUT_VALUE:
            value = next(words, None)
            if value is None:
                raise UsageError(f"{word}: requires an argument, and the command line ends there")
            option = Option((word, value))
        options.append(option)
    return options


def ids(items: Iterable[Option | IvshmemDevice]) -> set[str]:
    """Return every ``id`` that a command line uses."""
    found = set()
    for item in items:
        if isinstance(item, IvshmemDevice):
            found |= {name for name in (item.device_id, item.memdev, item.chardev) if name}
        elif "id=" in item.value and item.name in ("object", "device", "chardev", "netdev", "drive"):
            found.add(item.pairs("").get("id", ""))
    return found


def read_number(text: str, what: str) -> int:
    """Read a count.

    Raises
    ------
    UsageError
        When it is none.
    """
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if value < 0:
        raise UsageError(f"{what} expects a number, not {text!r}")
    return value


def write_all(line: CommandLine, write: Callable[[IvshmemDevice, Written], None]) -> Written:
    """Write what passes through, and each device with `write`."""
    written = Written()
    for item in line.items:
        if isinstance(item, Option):
            written.argv += item.words
        else:
            write(item, written)
    return written
