"""Unmodified Linux guests on real QEMU: the image built by nobody, commands, interrupts by VFIO, memory, TCP beside.

Two guests are booted once for all of it.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from linux_tools import as_nobody, build, places

from ivshmem_lab import Lab
from ivshmem_lab.bench.host import MeasurementError
from ivshmem_lab.bench.linux import Pair, find_failures, measure
from ivshmem_lab.errors import UsageError, VmError
from ivshmem_lab.guests.linux import tool_path
from ivshmem_lab.lab.linux import LinuxVm
from ivshmem_lab.peer.channel import Channel, ChannelClosedError, area_bytes
from ivshmem_lab.topology.model import Link, Memory, Server, Topology, Vm
from ivshmem_lab.vm.completed import GuestCommandError
from ivshmem_lab.vm.linux.guest import Cable, LinuxGuest
from ivshmem_lab.vm.linux.image import CACHE_VARIABLE, find_image
from ivshmem_lab.vm.linux.modules import WANTED, find_modules, modinfo, read_module
from ivshmem_lab.vm.text import VmTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ivshmem_lab.peer.peer import Peer

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="the image is made of Debian's packages"),
]

TOOL = "ivshmem-tool"
LIMIT_S = 30.0


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder that another user may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="ivlab-linux-", dir="/tmp") as path:
        Path(path).chmod(0o755)
        yield Path(path)


@pytest.fixture(scope="module")
def environment(home: Path) -> dict[str, str]:
    return places(home)


@pytest.fixture(scope="module")
def image(environment: dict[str, str]) -> dict[str, Any]:
    return build(environment)


@pytest.fixture(scope="module")
def pair(image: dict[str, Any], environment: dict[str, str]) -> Iterator[Pair]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, environment[CACHE_VARIABLE])
        with Lab() as lab, Cable() as cable:
            board = lab.server("board", size="16M", vectors=3)
            alice, bob = (
                lab.vm(name, guest=LinuxGuest(cable=cable), emulator="qemu", connect=board) for name in ("alice", "bob")
            )
            assert isinstance(alice, LinuxVm)
            assert isinstance(bob, LinuxVm)
            me = lab.peer("me", connect=board)
            lab.start()
            alice.wait_ready(LIMIT_S * 2)
            bob.wait_ready(LIMIT_S * 2)
            for vm in (alice, bob):
                assert isinstance(vm.peer_id, int)
                me.wait_for_peer(vm.peer_id, LIMIT_S)
            for vector in range(3):  # a peer opens what it waits with when it first waits
                me.ring(me.peer_id, vector)
                assert me.wait(vector, LIMIT_S) == 1
            yield Pair(alice, bob, me, cable)


@pytest.fixture
def alice(pair: Pair) -> LinuxVm:
    return pair.alice


@pytest.fixture
def me(pair: Pair) -> Peer:
    return pair.me


# The image


def test_nobody_builds_an_image_with_what_the_kernel_needs(image: dict[str, Any], environment: dict[str, str]) -> None:
    assert Path(image["kernel"]).read_bytes()[:4] == b"\x7fELF"
    assert "cloud" in image["name"]
    assert any(name.startswith("busybox-static_") for name in image["packages"])
    assert Path(image["initrd"]).stat().st_size < 4 << 20
    cache = Path(environment[CACHE_VARIABLE]) / "linux"
    assert {path.name for path in cache.iterdir()} == {"apt", "images", "latest.json", "lock"}
    owners = {path.stat().st_uid for path in cache.rglob("*")}
    assert owners == {65534 if os.geteuid() == 0 else os.geteuid()}


def test_it_is_built_once_and_found_again(image: dict[str, Any], environment: dict[str, str]) -> None:
    before = Path(image["kernel"]).stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, environment[CACHE_VARIABLE])
        found = find_image(tool_path())
        assert found is not None
        assert str(found.kernel) == image["kernel"]
        other = Path(environment[CACHE_VARIABLE]).parent / "other-tool"
        other.write_bytes(tool_path().read_bytes() + b"\0")
        assert find_image(other) is None, "another tool makes another image"
    assert build(environment) == image
    assert Path(image["kernel"]).stat().st_mtime_ns == before


def test_two_that_build_at_once_build_one_image_without_the_network(
    image: dict[str, Any], environment: dict[str, str], tmp_path: Path
) -> None:
    """From the packages that are there, as after a new version of us: apt is not asked."""
    cache = tmp_path / "cache"
    shutil.copytree(environment[CACHE_VARIABLE], cache)
    shutil.rmtree(cache / "linux" / "images")
    code = (
        "from ivshmem_lab.vm.linux.image import build_image; from ivshmem_lab.guests.linux import tool_path\n"
        "print(build_image(tool_path(), say=lambda text: print('*', text)).kernel)"
    )
    inherited = {**os.environ, CACHE_VARIABLE: str(cache), "no_proxy": "*", "http_proxy": "http://127.0.0.1:9"}
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=inherited)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=LIMIT_S)[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0][-1] == said[1][-1]
    assert [line for lines in said for line in lines].count("* unpacking the kernel") == 1
    assert [path.name for path in (cache / "linux" / "images").iterdir()] == [Path(image["kernel"]).parent.name]


def test_nobody_boots_a_guest_in_little_memory_and_uses_the_device(
    image: dict[str, Any], environment: dict[str, str]
) -> None:
    code = (
        "from ivshmem_lab import Lab\n"
        "from pathlib import Path\n"
        "import json, os\n"
        "with Lab() as lab:\n"
        "    board = lab.server('board', size='4M', vectors=2)\n"
        "    vm = lab.vm('guest', guest='linux', emulator='qemu', connect=board)\n"
        "    lab.start()\n"
        "    vm.run(['ivshmem-tool', 'write', '64', '--text', 'from the guest'], check=True)\n"
        "    info = vm.run(['ivshmem-tool', 'info'], check=True).json()\n"
        "    status = Path(f'/proc/{vm.pid}/status').read_text()\n"
        "    peak = int(status.split('VmHWM:')[1].split()[0])\n"
        "    print(json.dumps({'uid': os.geteuid(), 'info': info, 'peak_kib': peak, 'argv': vm.argv,\n"
        "                      'memory': bytes(board.memory[64:78]).decode()}))\n"
    )
    done = as_nobody([sys.executable, "-c", code], environment)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["uid"] == (65534 if os.geteuid() == 0 else os.geteuid())
    assert answer["memory"] == "from the guest"
    assert answer["info"]["devices"][0]["vectors"] == 2
    assert answer["peak_kib"] < 400 << 10
    assert "kvm" not in " ".join(answer["argv"])


# Commands


def test_a_command_gives_status_output_and_errors_apart(alice: LinuxVm) -> None:
    done = alice.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (done.exit_code, done.stdout, done.stderr) == (3, "out\n", "err\n")
    assert alice.run(["sh", "-c", "kill -TERM $$"]).exit_code == -15
    with pytest.raises(GuestCommandError, match="'false' in alice ended with exit status 1"):
        alice.run(["false"], check=True)


def test_a_command_that_is_not_there_is_told_with_the_guests_reason(alice: LinuxVm) -> None:
    with pytest.raises(VmError, match="'no-such-thing' could not be run in alice: No such file or directory"):
        alice.run(["no-such-thing"])
    with pytest.raises(VmError, match="Permission denied"):
        alice.run(["/proc"])


def test_bytes_go_in_and_come_out_unchanged(alice: LinuxVm) -> None:
    data = bytes(range(256)) * 8192
    assert alice.run(["cat"], stdin=data).stdout_bytes == data


def test_the_words_arrive_as_they_are(alice: LinuxVm) -> None:
    words = ["with blank", "", "ü\n'\"$x", "-x"]
    assert alice.run(["printf", "%s|", *words]).stdout == "with blank||ü\n'\"$x|-x|"


def test_a_command_over_its_time_is_killed_with_its_children(alice: LinuxVm) -> None:
    with pytest.raises(VmTimeoutError, match=r"did not end in 1\.5 s and was killed; its last words: 'started\\n'"):
        alice.run(["sh", "-c", "echo started; sleep 4711 & sleep 4711"], timeout_s=1.5)
    alice.run(["sh", "-c", "while ps | grep -q '[s]leep 4711'; do sleep 0.05; done"], timeout_s=5, check=True)


def test_what_a_command_leaves_in_the_background_is_not_waited_for(alice: LinuxVm) -> None:
    done = alice.run(["sh", "-c", "sleep 4712 & echo $!"], timeout_s=LIMIT_S)
    assert done.exit_code == 0
    assert alice.run(["kill", done.stdout.strip()]).exit_code == 0


def test_many_commands_run_at_once(alice: LinuxVm) -> None:
    running = [alice.begin_command(["sh", "-c", f"seq 1 2000; echo end {number}"]) for number in range(20)]
    assert [command.wait(LIMIT_S).stdout.splitlines()[-1] for command in running] == [f"end {n}" for n in range(20)]


def test_commands_come_from_several_threads(alice: LinuxVm) -> None:
    answers: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda n=n: answers.update({n: alice.run(["echo", str(n)]).stdout})) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert answers == {n: f"{n}\n" for n in range(8)}


def test_the_kernel_is_the_distributions_and_its_modules_are_signed(alice: LinuxVm, image: dict[str, Any]) -> None:
    assert alice.run(["uname", "-r"]).stdout.strip() == image["name"]
    assert alice.run(["cat", "/proc/sys/kernel/tainted"]).stdout == "0\n"
    loaded = {line.split()[0] for line in alice.run(["lsmod"]).stdout.splitlines()}
    assert set(WANTED) <= loaded
    assert "was not loaded" not in alice.console.text()


def test_modules_say_what_they_need(tmp_path: Path, image: dict[str, Any], environment: dict[str, str]) -> None:
    (deb,) = (Path(environment[CACHE_VARIABLE]) / "linux/apt/packages").glob("linux-image-[0-9]*.deb")
    subprocess.run(["dpkg-deb", "-x", deb, tmp_path], check=True)
    files = find_modules(tmp_path)
    said = modinfo(read_module(files["vfio_pci"]))
    assert "vfio" in said["depends"].split(",")
    assert said["license"] == "GPL v2"


# The device


def test_info_tells_the_device_and_its_peer_id(pair: Pair) -> None:
    for vm in (pair.alice, pair.bob):
        (device,) = vm.run([TOOL, "info"], check=True).json()["devices"]
        assert (device["kind"], device["vectors"], device["memory_bytes"]) == ("ivshmem-doorbell", 3, 16 << 20)
        assert device["peer_id"] == vm.peer_id


def test_what_one_writes_the_others_read(pair: Pair) -> None:
    pair.alice.run([TOOL, "write", "0x1000", "--hex", "00ff10"], check=True)
    assert pair.bob.run([TOOL, "read", "4K", "3"], check=True).json()["hex"] == "00ff10"
    assert bytes(pair.me.memory[0x1000:0x1003]) == b"\x00\xff\x10"
    pair.me.memory[0x2000:0x2006] = list(b"to you")
    assert pair.bob.run([TOOL, "read", "8K", "6", "--raw"], check=True).stdout == "to you"
    big = os.urandom(300_000)
    pair.bob.run([TOOL, "write", "1M", "--stdin"], stdin=big, check=True)
    assert bytes(pair.me.memory[1 << 20 : (1 << 20) + len(big)]) == big


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["read", "16M", "1"], 2, "1 bytes at offset 16777216 are not inside the 16777216 bytes"),
        (["write", "16777215", "--text", "ab"], 2, "2 bytes at offset 16777215 are not inside"),
        (["write", "0", "--hex", "0g"], 2, "--hex 0g is not pairs"),
        (["info", "--device", "x"], 2, "option --device is not known here"),
        (["read", "0", "1", "--device", "0000:00:1f.0"], 1, "0000:00:1f.0 is no ivshmem device (1af4:1110)"),
        (["wait", "3", "--timeout", "1"], 2, "vector 3 is not there: the device has 3"),
        (["wait", "1", "--timeout", "1"], 1, "0 of 1 interrupts came in 1 s"),
        (["stream", "send", "--ring", "1000"], 2, "no power of two"),
        (["stream", "send", "--offset", "16M"], 2, "not inside the 16777216 bytes"),
        (["stream", "receive", "--poll", "--timeout", "1", "--offset", "8M"], 1, "nothing moved for 1 s"),
    ],
)
def test_the_tool_says_what_was_wrong(alice: LinuxVm, words: list[str], status: int, said: str) -> None:
    done = alice.run([TOOL, *words])
    assert done.exit_code == status
    assert said in done.stderr


def test_the_host_and_the_guests_ring_each_other_on_every_vector(pair: Pair) -> None:
    bob = pair.bob.peer_id
    assert isinstance(bob, int)
    rings: list[Callable[[int], object]] = [
        lambda vector: pair.me.ring(bob, vector),
        lambda vector: pair.alice.run([TOOL, "ring", str(bob), str(vector)], check=True),
    ]
    for vector in range(3):
        for ring in rings:  # one after the other: two that come close together may become one
            waiting = pair.bob.begin_command([TOOL, "wait", str(vector)])
            waiting.wait_text("ready", LIMIT_S)
            ring(vector)
            assert waiting.wait(LIMIT_S).json()["interrupts"] == 1
        pair.alice.run([TOOL, "ring", str(pair.me.peer_id), str(vector)], check=True)
        assert pair.me.wait(vector, LIMIT_S) == 1


def test_interrupts_of_one_device_go_to_one_program_at_a_time(pair: Pair) -> None:
    holder = pair.alice.begin_command([TOOL, "wait", "0", "--timeout", "60"])
    holder.wait_text("ready", LIMIT_S)
    try:
        assert "is held by another program" in pair.alice.run([TOOL, "wait", "1"]).stderr
    finally:
        assert holder.kill()


def test_ten_thousand_interrupts_each_way_and_256_mib_arrive_whole_with_tcp_beside(pair: Pair) -> None:
    result = measure(pair, rounds=10_000, size_bytes=256 << 20, tcp_rounds=300, tcp_bytes=8 << 20, turns=2)
    assert result["interrupts"] == {"wanted_each_way": 10_000, "to_alice": 10_000, "to_bob": 10_000}
    assert result["stream"]["memory"]["bytes"] == 256 << 20
    assert all(stream["same"] for stream in result["stream"].values())
    assert find_failures(result) == []
    for trip in result["round_trip_us"].values():
        assert 0 < trip["minimum"] <= trip["p50"] <= trip["p90"] <= trip["p99"] <= trip["maximum"]
    counts = {name: trip["n"] for name, trip in result["round_trip_us"].items()}
    assert counts == {"interrupts": 10_000, "host_interrupts": 2_500, "tcp": 300}
    print(json.dumps(result))


def test_a_lost_interrupt_and_a_wrong_sum_are_told() -> None:
    stream = {"same": True}
    streams = {"memory": stream, "memory_interrupts": {"same": False}, "tcp": stream}
    counts = {"wanted_each_way": 10, "to_alice": 10, "to_bob": 9}
    failures = find_failures({"interrupts": counts, "stream": streams})
    assert len(failures) == 2
    assert failures[0] == "9 interrupts came to bob, not 10"


def test_a_peer_that_does_not_answer_ends_the_measurement(pair: Pair) -> None:
    words = ["pingpong", "ping", "9", "--rounds", "5", "--timeout", "1"]
    with pytest.raises(MeasurementError, match="no interrupt in time after 0 of 105 rounds"):
        pair.both(["wait", "0", "--timeout", "3"], words)


@pytest.mark.parametrize("poll", [["--poll"], []], ids=["looking", "woken"])
def test_the_guests_channel_is_the_hosts(pair: Pair, poll: list[str]) -> None:
    """The tool and `Channel` are the two ends of one channel, in both directions."""
    ring, offset, vector = 1 << 16, 1 << 20, 2
    words = ["--offset", str(offset), "--ring", str(ring), "--vector", str(vector), *poll]
    pair.me.memory[offset : offset + 128] = 0  # another test's bytes
    receiver = Channel.receiver(pair.me, offset, area_bytes(ring), vector=vector)
    sending = pair.alice.begin_command([TOOL, "stream", "send", *words, "--bytes", "1M", "--message", "8K"])
    got = b""
    with receiver:
        for _ in range(128):
            got += receiver.receive(LIMIT_S) or b""
        with pytest.raises(ChannelClosedError, match="has closed"):
            receiver.receive(LIMIT_S)
    sent = sending.wait(LIMIT_S)
    assert sent.json()["bytes"] == len(got) == 1 << 20
    assert [int.from_bytes(got[at : at + 8], "little") for at in range(0, len(got), 8192)] == list(range(128))

    receiving = pair.alice.begin_command([TOOL, "stream", "receive", *words])
    receiving.wait_text("ready", LIMIT_S)
    with Channel.sender(pair.me, offset, area_bytes(ring), vector=vector) as sender:
        for at in range(0, len(got), 8192):
            sender.send(got[at : at + 8192], LIMIT_S)
    received = receiving.wait(LIMIT_S).json()
    assert (received["bytes"], received["messages"]) == (1 << 20, 128)
    assert received["checksum"] == sent.json()["checksum"]


# Around it


def test_a_guest_that_ends_tells_those_who_wait(image: dict[str, Any], environment: dict[str, str]) -> None:
    """With a kernel and an initrd of one's own, which happen to be ours."""
    guest = LinuxGuest(kernel=image["kernel"], initrd=image["initrd"], append="quiet")
    with Lab() as lab:
        vm = lab.vm("carol", guest=guest, emulator="qemu")
        assert isinstance(vm, LinuxVm)
        lab.start()
        assert vm.run(["cat", "/proc/cmdline"]).stdout.endswith(" quiet\n")
        assert vm.run([TOOL, "info"]).json() == {"devices": []}
        assert "there is no ivshmem device" in vm.run([TOOL, "read", "0", "1"]).stderr
        waiting = vm.begin_command(["sleep", "4713"])
        vm.begin_command(["poweroff", "-f"])
        with pytest.raises(VmError, match="carol ended"):
            waiting.wait(LIMIT_S)
        assert vm.wait_end(LIMIT_S)
        with pytest.raises(VmError):
            vm.run(["true"])


def test_the_devices_of_a_running_guest_follow_the_topology(image: dict[str, Any], environment: dict[str, str]) -> None:
    board, frame = Server("board", 4 << 20, 2), Memory("frame", 256 << 20)
    at_board, at_frame = Link(server="board"), Link(memory="frame")
    with pytest.MonkeyPatch.context() as patch, Lab() as lab:
        patch.setenv(CACHE_VARIABLE, environment[CACHE_VARIABLE])
        pids = set()
        for devices in ((at_board,), (at_board, at_frame), ()):
            wanted = Topology((board,), (frame,), (Vm("dora", "qemu", "linux", devices=devices),))
            lab.apply(wanted)
            assert lab.topology() == wanted
            vm = lab["dora"]
            assert isinstance(vm, LinuxVm)
            vm.wait_ready(LIMIT_S * 2)
            for device in vm.devices:
                device.wait_seen(LIMIT_S)
            shown = vm.run([TOOL, "info"]).json()["devices"]
            sizes = {"board": board.size_bytes, "frame": frame.size_bytes}
            assert sorted(each["memory_bytes"] for each in shown) == sorted(sizes[link.target] for link in devices)
            pids.add(vm.pid)
        assert len(pids) == 1


def test_the_command_boots_runs_and_passes_on(
    image: dict[str, Any], environment: dict[str, str], run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, environment[CACHE_VARIABLE])
        done = run_cli(["ivshmem-lab", "linux", "run", "--", "sh", "-c", f"{TOOL} info; echo bad >&2; exit 4"], 60.0)
    assert done.returncode == 1
    assert json.loads(done.stdout)["devices"][0]["memory_bytes"] == 4 << 20
    assert done.stderr == "bad\nivshmem-lab linux run: the command ended with exit status 4\n"


def test_linux_is_for_qemu() -> None:
    with Lab() as lab, pytest.raises(UsageError, match="emulator='unicorn' runs no Linux"):
        lab.vm("dora", guest="linux")


def test_the_tool_goes_where_it_is_copied(alice: LinuxVm) -> None:
    assert stat.S_IMODE(tool_path().stat().st_mode) == 0o644, "data in the package"
    alice.run(["sh", "-c", "cat >/tmp/t && chmod +x /tmp/t"], stdin=tool_path().read_bytes(), check=True)
    assert alice.run(["/tmp/t", "info"], check=True).json()["devices"]
