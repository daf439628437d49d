"""Asks a running server how it is, over its control socket, and shows the answer."""

from __future__ import annotations

import json
import socket
from typing import Any

from ..errors import ServerError
from ..units import format_size

_TIMEOUT_S = 5.0
_MOST_ANSWER_BYTES = 64 << 20


def ask_status(path: str) -> dict[str, Any]:
    """Return the status of the server whose control socket is at `path`.

    Raises
    ------
    ServerError
        When nobody answers there, or not as a control socket does.
    """
    answer = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_TIMEOUT_S)
        try:
            sock.connect(path)
            sock.sendall(b'{"execute": "status"}\n')
            while not answer.endswith(b"\n") and len(answer) < _MOST_ANSWER_BYTES:
                more = sock.recv(65536)
                if not more:
                    break
                answer += more
        except OSError as error:
            raise ServerError(
                f"no server answers on {path!r}: {error.strerror or error}; give the path of its --control"
            ) from error
    try:
        status = json.loads(answer)["return"]
        show_status(status)  # as much as we will want to read from it
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServerError(
            f"what answers on {path!r} is not the control socket of an ivshmem-server: {answer[:60]!r}"
        ) from error
    if not isinstance(status, dict):
        raise ServerError(f"what answers on {path!r} is not the control socket of an ivshmem-server")
    return status


def show_status(status: dict[str, Any]) -> str:
    """Return a status as text: the server, its counters, a line per peer."""
    memory, counters = status["memory"], status["counters"]
    name = f" {memory['name']}" if memory["name"] else ""
    size = format_size(memory["size_bytes"])
    lines = [
        f"{status['path']}: up {status['uptime_s']:.0f} s",
        f"memory{name} of {size} ({memory['kind']}), {status['vectors']} vectors per peer",
        f"{len(status['peers'])} peers; {status['open_files']} open files allow {status['peers_allowed']}",
        f"joins {counters['joins']}, leaves {counters['leaves']}, messages {counters['messages']}",
        f"longest queue {counters['queue_high_water']}, refused {counters['refusals']}, withheld {counters['withheld']}",
    ]
    drops = ", ".join(f"{reason}: {count}" for reason, count in counters["drops"].items())
    if drops:
        lines.append(f"dropped {drops}")
    lines += [f"lease {held['name']} of uid {held['uid']} is kept: id {held['id']}" for held in status["leases_held"]]
    if status["peers"]:
        lines.append(f"{'id':>6} {'pid':>8} {'uid':>6} {'role':<9} {'queued':>7} {'rings':>7}  lease")
    for peer in status["peers"]:
        waiting = peer.get("rings_waiting")
        rings = "?" if waiting is None else waiting
        shield = " (shielded)" if peer["shielded"] else ""
        lines.append(
            f"{peer['id']:>6} {peer['pid']:>8} {peer['uid']:>6} {peer['role']:<9} {peer['queued']:>7} {rings:>7}  "
            f"{peer['lease'] or '-'}{shield}"
        )
    return "\n".join(lines)
