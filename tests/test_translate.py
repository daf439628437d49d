"""The command ``ivshmem-lab translate``."""

from __future__ import annotations

import io
import json
import re
from typing import TYPE_CHECKING

import pytest

from ivshmem_lab.cli import main

if TYPE_CHECKING:
    from pathlib import Path

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
        ([], "give the command line in a FILE (- for standard input), or its words after --"),
        (["file", "--", "word"], "give the command line in a FILE"),
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
