"""What the demonstration is to do, and the refusal of what it cannot."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..bench import throughput
from ..errors import UsageError
from ..units import MIB

DEFAULT_FIGURE = Path("ivshmem-demo.png")
FIGURE_FORMATS = (".png", ".svg", ".pdf")
MOST_ROUNDS = 1_000_000


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What is to be done.

    Attributes
    ----------
    rounds : int
        Timed round trips of each path: so many interrupts each way.
    size_bytes : int
        Bytes of each stream; each is run `throughput.TURNS` times.
    figure : Path
        Where the figure goes.
    qemu : bool
        False leaves real QEMU out even where it is installed.
    """

    rounds: int = 2000
    size_bytes: int = 64 * MIB
    figure: Path = DEFAULT_FIGURE
    qemu: bool = True

    def check(self) -> None:
        """Refuse what cannot be done, before anything is started.

        Raises
        ------
        UsageError
            A value is not allowed, or the figure cannot be written there.
        """
        if not 1 <= self.rounds <= MOST_ROUNDS:
            raise UsageError(f"rounds {self.rounds} is not allowed; 1 to {MOST_ROUNDS}")
        throughput.check_stream_bytes(self.size_bytes, "bytes")
        check_figure(self.figure)


def check_figure(path: Path) -> None:
    """Refuse a file that could not be written at the end of the work; leaves nothing behind.

    Raises
    ------
    UsageError
        Its kind is unknown, its directory does not exist, or one may not write there.
    """
    if path.suffix.lower() not in FIGURE_FORMATS:
        raise UsageError(f"figure {str(path)!r} has no kind that is known; let it end in {', '.join(FIGURE_FORMATS)}")
    if path.is_dir():
        raise UsageError(f"figure {str(path)!r} is a directory; name a file in it")
    if not path.parent.is_dir():
        raise UsageError(
            f"figure {str(path)!r}: there is no directory {str(path.parent)!r}; make it, or choose another"
        )
    try:
        if path.exists():
            with path.open("ab"):
                pass
        else:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
    except OSError as error:
        raise UsageError(
            f"figure {str(path)!r} cannot be written ({error.strerror}); choose another place with --figure PATH"
        ) from error
