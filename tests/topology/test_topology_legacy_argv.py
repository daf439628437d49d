"""The legacy ivshmem device, as a command line for today's QEMU: the mapping, word for word."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest

from ivshmem_lab.errors import UsageError
from ivshmem_lab.topology.formats import translate
from ivshmem_lab.topology.formats.argv import Written, split_shell

SERVER = "-chardev socket,path=/tmp/s,id=c "


def modern(text: str) -> Written:
    return translate(split_shell(text))


def line(text: str) -> str:
    return shlex.join(modern(text).argv)


def codes(text: str) -> list[tuple[str, bool]]:
    return [(note.code, note.lost) for note in modern(text).notes]


@pytest.mark.parametrize(
    ("size", "written"),
    [("", "4M"), (",size=1", "1M"), (",size=64K", "64K"), (",size=0x10", "16M"), (",size=2G", "2G")],
)
def test_memory_alone_becomes_a_shared_file_and_a_plain_device(size: str, written: str) -> None:
    assert line(f"-device ivshmem,shm=board{size}") == (
        f"-object memory-backend-file,id=ivshmem-mem,mem-path=/dev/shm/board,size={written},share=on "
        "-device ivshmem-plain,memdev=ivshmem-mem,master=auto"
    )
    assert codes(f"-device ivshmem,shm=board{size}") == []


@pytest.mark.parametrize(("role", "master"), [("", "auto"), (",role=peer", "off"), (",role=master", "on")])
def test_a_role_is_written_out_since_the_defaults_differ(role: str, master: str) -> None:
    assert line(f"-device ivshmem,shm=b{role}").endswith(f",master={master}")
    assert line(f"{SERVER}-device ivshmem,chardev=c{role}").endswith(f",master={master}")


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("", "vectors=1,ioeventfd=off"),
        (",vectors=4", "vectors=4,ioeventfd=off"),
        (",msi=on,ioeventfd=on,vectors=8", "vectors=8,ioeventfd=on"),
        (",ioeventfd,vectors=0x10", "vectors=16,ioeventfd=on"),
    ],
)
def test_a_server_s_device_keeps_its_vectors_and_its_ioeventfd(given: str, written: str) -> None:
    assert line(f"{SERVER}-device ivshmem,chardev=c{given}") == (
        f"{SERVER}-device ivshmem-doorbell,chardev=c,{written},master=auto"
    )


def test_what_has_no_modern_form_is_told_with_what_to_do() -> None:
    text = f"{SERVER}-device ivshmem,chardev=c,id=iv,size=1,msi=off,use64=0"
    assert codes(text) == [("intx", True), ("use64", True), ("size", True)]
    told = [str(note) for note in modern(text).notes]
    assert all(note.startswith("ivshmem device 'iv': ") for note in told)
    assert "msi=off has no modern form: INTx is gone" in told[0]
    assert "start the server with -l 1M" in told[2]
    assert codes("-object memory-backend-ram,id=m,size=1M -device ivshmem,x-memdev=m") == [("memdev", False)]
    # Without a server there never were interrupts, so that nothing is lost.
    assert codes("-device ivshmem,shm=b,msi=off,vectors=4") == []


def test_a_memory_backend_of_qemu_2_5_stays_what_it_is() -> None:
    assert line("-object memory-backend-ram,id=m,size=1M -device ivshmem,x-memdev=m,role=master") == (
        "-object memory-backend-ram,id=m,size=1M -device ivshmem-plain,memdev=m,master=on"
    )


def test_everything_else_passes_through_word_by_word() -> None:
    text = (
        "sudo -E qemu-kvm -S --enable-kvm -m 1G -append 'a=\"b c\" -device ivshmem,shm=x' -name a,,b -device e1000,id=e "
        "-device '{\"driver\":\"e1000\"}' -device ivshmem,help -nographic 'disk image.qcow2' -unknown x"
    )
    assert modern(text).argv == split_shell(text)


def test_other_properties_of_the_device_stay_in_their_order() -> None:
    assert line("-device ivshmem,addr=5.0,id=iv,shm=b,multifunction=on,bus=pci.0").endswith(
        "-device ivshmem-plain,id=iv,memdev=iv-mem,master=auto,addr=5.0,multifunction=on,bus=pci.0"
    )


def test_commas_in_values_stay_doubled_and_a_leading_slash_of_shm_goes() -> None:
    assert "mem-path=/dev/shm/a,,b,size=4M" in line("-device ivshmem,shm=/a,,b")
    assert "-chardev socket,path=/a,,b,id=c" in line("-chardev socket,path=/a,,b,id=c -device ivshmem,chardev=c")


def test_new_ids_are_nobody_else_s() -> None:
    argv = modern("-object iothread,id=ivshmem-mem -device ivshmem,shm=a -device ivshmem,shm=b").argv
    assert [word.split(",")[1] for word in argv if word.startswith("memory-backend")] == [
        "id=ivshmem-mem2",
        "id=ivshmem-mem3",
    ]


def test_global_properties_are_those_of_every_device_that_says_nothing_else() -> None:
    text = f"{SERVER}-global ivshmem.vectors=3 -global e1000.x=y -device ivshmem,chardev=c -device ivshmem,shm=b"
    assert "ivshmem-doorbell,chardev=c,vectors=3," in line(text)
    assert "-global e1000.x=y" in line(text)
    assert "ivshmem." not in line(text)
    assert ",vectors=2," in line(f"-global ivshmem.vectors=3 {SERVER}-device ivshmem,chardev=c,vectors=2")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("ivshmem", "You must specify either 'shm' or 'chardev'"),
        ("ivshmem,shm=", "You must specify either 'shm' or 'chardev'"),
        ("ivshmem,shm=a,chardev=c", "You must specify either 'shm' or 'chardev'"),
        ("ivshmem,shm=a,size=3", "Invalid size 3"),
        ("ivshmem,shm=a,size=0", "Invalid size 0"),
        ("ivshmem,shm=a,size=big", "size 'big' is not a size"),
        ("ivshmem,shm=a,role=boss", "'role' must be 'peer' or 'master', not 'boss'"),
        ("ivshmem,shm=a/b", "has no slash"),
        ("ivshmem,chardev=c,msi=off,ioeventfd=on", "ioeventfd/irqfd requires MSI"),
        ("ivshmem,chardev=c,vectors=many", "vectors expects a number, not 'many'"),
        ("ivshmem,chardev=c,msi=perhaps", "msi: 'perhaps' is neither on nor off"),
        ("ivshmem,shm=a,shm=b", "'shm' is given twice"),
    ],
)
def test_a_device_that_the_old_qemu_refused_is_refused_with_its_words(device: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as refused:
        translate(["qemu", "-device", device])
    assert f"-device {device}" in str(refused.value)


def test_a_command_line_that_ends_in_the_middle_is_refused() -> None:
    with pytest.raises(UsageError, match="-device: requires an argument"):
        translate(["qemu", "-device"])
    with pytest.raises(UsageError, match="cannot be split into words"):
        split_shell("qemu -name 'a")
    with pytest.raises(UsageError, match="there is no format 'yaml'"):
        translate([], "yaml")


def test_a_command_line_is_split_as_a_shell_splits_it() -> None:
    text = """# don't look here
    qemu \\
      -name 'a\\
b' "c\\
d\\\\" e\\
f \\' # nor "here
    -S"""
    shell = subprocess.run(
        ["sh", "-c", "printf '%s\\0' " + text.partition("\n")[2].replace("\n    -S", " -S")],
        capture_output=True,
        check=True,
    )
    assert split_shell(text)[:-1] == shell.stdout.decode().split("\0")[:-1]
    assert split_shell(text)[-1] == "-S"
