"""The command ``ivshmem-lab translate``."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ivshmem_lab.cli import main

SCRIPT = """\
# how we start it
exec qemu-kvm -name "my guest" \\
    -chardev socket,path=/tmp/s,id=c \\
    -device ivshmem,chardev=c,msi=off,id=iv
"""
TRANSLATED = (
    "exec qemu-kvm -name 'my guest' -chardev socket,path=/tmp/s,id=c "
    "-device ivshmem-doorbell,id=iv,chardev=c,vectors=1,ioeventfd=off,master=auto\n"
)


def test_a_file_becomes_a_line_for_a_shell_and_what_is_lost_goes_to_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "start.sh").write_text(SCRIPT)
    assert main(["translate", str(tmp_path / "start.sh")]) == 0
    out, err = capsys.readouterr()
    assert out == TRANSLATED
    assert err.startswith("ivshmem-lab translate: lost: ivshmem device 'iv': msi=off has no modern form")
    assert len(err.splitlines()) == 2  # and the size


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(SCRIPT))
    assert main(["translate", "-"]) == 0
    assert capsys.readouterr().out == TRANSLATED


def test_words_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["translate", "--json", "--", "qemu", "-device", "ivshmem,shm=a b,use64=0", "-append", "--"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert err == ""
    assert told["argv"][:3] == [
        "qemu",
        "-object",
        "memory-backend-file,id=ivshmem-mem,mem-path=/dev/shm/a b,size=4M,share=on",
    ]
    assert told["argv"][-2:] == ["-append", "--"]
    assert "'memory-backend-file,id=ivshmem-mem,mem-path=/dev/shm/a b,size=4M,share=on'" in told["command"]
    assert [(note["code"], note["lost"]) for note in told["notes"]] == [("use64", True)]
    assert (told["from"], told["to"]) == ("legacy", "qemu")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give what to translate in a FILE (- for standard input), or"),
        (["file", "--", "word"], "give what to translate in a FILE"),
        (["/nonexistent"], "'/nonexistent' cannot be read: No such file"),
        (["--", "-device", "ivshmem"], "You must specify either 'shm' or 'chardev'"),
        (["--from", "xml", "-"], "invalid choice: 'xml'"),
    ],
)
def test_a_wrong_call_is_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["translate", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["translate", "--help"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"examples:\n  ivshmem-lab translate -- qemu-system-x86_64 .*-device ivshmem,", out)
    assert "legacy: -device ivshmem,… of QEMU up to 3.1" in " ".join(out.split())


LAB = """\
version: 1
servers: {board: {size: 1M, vectors: 2}}
memories: {frame: {size: 1M}}
vms:
  alice: {guest: pingpong, args: role=pong, devices: [{server: board}, {memory: frame}]}
  bob: {emulator: qemu, guest: pingpong, args: role=ping peer=0 rounds=3 exit=1, devices: [{server: board}]}
peers: {me: {server: board}}
"""


@pytest.mark.qemu
def test_a_topology_becomes_a_script_that_starts_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lab.yaml").write_text(LAB)
    assert main(["translate", "--from", "yaml", "--to", "qemu", str(tmp_path / "lab.yaml")]) == 0
    script, err = capsys.readouterr()
    assert err.startswith(
        "ivshmem-lab translate: lost: peers.me: all of it: a host peer is the lab's own process; start"
    )
    assert len(err.splitlines()) == 1
    script = script.replace("/tmp/board", f"{tmp_path}/board").replace("=/dev/shm/", f"={tmp_path}/")
    # Peer ids follow the order of joining, and bob looks for peer 0.
    first, second = script.split("qemu-system-x86_64")
    waiting = "until grep -q peer_id=0 alice.log; do sleep 0.1; done\n"
    first = first.replace(" &\n", ' & pids="$! $pids"\n')
    second = second.replace("wait\n", 'wait $!; echo "bob: $?"; kill $pids; wait\n')
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with subprocess.Popen(
        ["sh", "-c", f"{first}{waiting}qemu-system-x86_64{second}"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as shell:
        try:
            out, err = shell.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(shell.pid, signal.SIGKILL)  # with all that it has started
            raise
    assert "bob: 1" in out, err
    assert "rounds=3" in (tmp_path / "bob.log").read_text()


def test_a_topology_becomes_a_program_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lab.yaml").write_text(LAB.replace("emulator: qemu, ", ""))
    assert main(["translate", "--from", "guess", "--to", "python", str(tmp_path / "lab.yaml")]) == 0
    program, err = capsys.readouterr()
    assert err == ""
    done = subprocess.run(
        [sys.executable, "-c", program], input="\n", capture_output=True, text=True, timeout=60, check=True
    )
    assert re.search(r"^alice +unicorn VM +running +1 +2 +1M +board$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("origin", "text", "argv", "message"),
    [
        ("yaml", "version: 1\nvm: {}", [], "lab:2:1: unknown key 'vm'"),
        ("yaml", "version: 1\npeers: {me: {server: x}}", [], "lab: peers.me.server: there is no server 'x'"),
        ("libvirt", "<!DOCTYPE x><domain/>", [], "the XML has a document type (x)"),
        ("python", "import os", [], "lab:1:1: this is not read"),
        ("qemu", "ls", ["--to", "yaml"], "there is no QEMU command line"),
    ],
)
def test_what_is_described_wrongly_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], origin: str, text: str, argv: list[str], message: str
) -> None:
    (tmp_path / "lab").write_text(text)
    assert main(["translate", "--from", origin, *argv, str(tmp_path / "lab")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.replace(f"{tmp_path}/", "")


def test_a_pasted_command_line_becomes_a_topology_file(capsys: pytest.CaptureFixture[str]) -> None:
    words = "kvm -m 64 -chardev socket,path=/run/one,id=c -device ivshmem,chardev=c,size=8,vectors=2,msi=off"
    assert main(["translate", "--to", "yaml", "--json", "--", *words.split()]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["from"], told["to"], [each["path"] for each in told["lost"]]) == ("legacy", "yaml", ["vms.vm1"])
    assert main(["translate", "--to", "yaml", "--", *words.split()]) == 0
    out, err = capsys.readouterr()
    assert out == told["text"]
    assert "one:" in out
    assert "size: 8M" in out
    assert err == (
        "ivshmem-lab translate: lost: vms.vm1: ivshmem device with chardev=c: msi=off: a lab's devices have MSI-X only\n"
    )
