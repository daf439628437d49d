"""Servers that let some peers in as they should, and then do what a test wants."""

from __future__ import annotations

import contextlib
import os
import socket
import threading

from ivshmem_lab.ipc.sockets import bind_unix
from ivshmem_lab.wire.messages import PROTOCOL_VERSION

OWN_ID = 7
INTRODUCTION = [(PROTOCOL_VERSION, None), (OWN_ID, None), (-1, "memory"), (OWN_ID, "eventfd")]


class BadServer:
    """Introduces `good` peers with one vector, and answers everybody else with `messages`.

    Parameters
    ----------
    messages
        (value, what is passed with it): None, ``"memory"``, ``"eventfd"``, ``"memfd"``, or the size of another memory.
    closes
        Hang up then, after `cut` more bytes.
    """

    def __init__(self, path, size_bytes=4096, good=0, messages=(), *, closes=True, cut=0):
        self.path = str(path)
        self._memory = os.memfd_create("bad", os.MFD_CLOEXEC)
        os.truncate(self._memory, size_bytes)
        self._good, self._messages, self._closes, self._cut = good, messages, closes, cut
        self.bad_peers = []
        self._peers = []
        self._listener = bind_unix(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            good = self._good > 0
            self._good -= 1
            with contextlib.suppress(OSError):  # gone already
                self.say(sock, INTRODUCTION if good else self._messages)
                if self._cut and not good:
                    sock.sendall(bytes(self._cut))
            (self._peers if good else self.bad_peers).append(sock)
            if self._closes and not good:
                sock.shutdown(socket.SHUT_RDWR)

    def say(self, sock, messages):
        for value, what in messages:
            fd = self._descriptor(what)
            socket.send_fds(sock, [value.to_bytes(8, "little", signed=True)], [] if fd is None else [fd])
            if fd is not None and fd != self._memory:
                os.close(fd)

    def _descriptor(self, what):
        if what is None or what == "memory":
            return self._memory if what else None
        if what == "eventfd":
            return os.eventfd(0)
        fd = os.memfd_create("other", os.MFD_CLOEXEC)
        os.truncate(fd, 4096 if what == "memfd" else what)
        return fd

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for sock in (*self._peers, *self.bad_peers):
            sock.close()
        os.close(self._memory)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()
