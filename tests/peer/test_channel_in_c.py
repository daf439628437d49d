"""``guests/src/channel.h``: it compiles for guests, talks with the Python side, and is not led out of its area."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from peer_tools import LIMIT_S

from ivshmem_lab.guests import toolchain
from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.peer.channel import ChannelClosedError, Receiver, Sender, area_bytes

HERE = Path(__file__).parent
SIZE = area_bytes(4096)
COUNT = 2000

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not on PATH")


def gcc(*arguments: str) -> None:
    done = subprocess.run(
        ["gcc", "-Wall", "-Wextra", "-Werror", "-O2", "-I", str(toolchain.SOURCES), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("channel") / "channel_host"
    gcc(str(HERE / "channel_host.c"), "-o", str(path))
    return path


def message(index: int) -> bytes:
    return bytes((index + each) & 255 for each in range(index * 37 % 3000 % 2000))


def start(program: Path, memory: SharedMemory, role: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([program, str(memory.fd), str(SIZE), role, str(COUNT)], pass_fds=[memory.fd])


def test_the_header_compiles_for_guests_and_beside_their_own_headers(tmp_path: Path) -> None:
    source = tmp_path / "guest.c"
    calls = """
        struct channel_end e;
        int out(void *p) { return channel_open_sender(&e, p, 4224, 1) && channel_reserve(&e, 5) && channel_commit(&e, 5); }
        const void *in(void *p, u32 *n) { channel_open_receiver(&e, p, 4224, 1); return channel_peek(&e, n); }
        int end(void) { channel_close_sender(&e); channel_close_receiver(&e); return channel_release(&e); }
        u32 who(void) { return channel_sender_rings(&e) + channel_receiver_rings(&e); }
    """
    source.write_text(f'#include "ivshmem.h"\n#include "channel.h"\n{calls}')
    freestanding = [flag for flag in toolchain.FLAGS if not flag.startswith(("-Wl", "-static", "-s"))]
    gcc("-m32", "-ffreestanding", *freestanding, "-c", str(source), "-o", str(tmp_path / "guest.o"))


def test_the_header_is_plain_c99_for_programs_on_linux_too(tmp_path: Path) -> None:
    gcc("-std=c99", "-pedantic", "-D_DEFAULT_SOURCE", str(HERE / "channel_host.c"), "-o", str(tmp_path / "c99"))


def test_python_receives_what_c_sends(program: Path) -> None:
    with SharedMemory.create_memfd(SIZE) as memory:
        receiver = Receiver(memory.array(), 0, SIZE)
        with start(program, memory, "send") as sender:
            for index in range(COUNT):
                assert receiver.receive(LIMIT_S) == message(index)
            with pytest.raises(ChannelClosedError, match="has closed"):
                receiver.receive(LIMIT_S)
            assert sender.wait(LIMIT_S) == 0


def test_c_receives_what_python_sends(program: Path) -> None:
    with SharedMemory.create_memfd(SIZE) as memory, start(program, memory, "receive") as receiver:
        with Sender(memory.array(), 0, SIZE) as sender:
            for index in range(COUNT):
                sender.send(message(index), LIMIT_S)
        assert receiver.wait(LIMIT_S) == 0


def test_spoilt_words_do_not_lead_c_out_of_its_area(program: Path) -> None:
    done = subprocess.run(
        [program, "-1", "0", "fuzz", "20000"], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, "-11 is a SIGSEGV: it went outside"
    taken, errors = (int(number) for number in done.stdout.split()[1::2])
    assert taken > 10000
    assert errors > 10000
