"""What a format writes, it reads back: property tests of both dialects."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem_lab.errors import UsageError
from ivshmem_lab.topology.formats import FORMATS, legacy_argv, qemu_argv, translate
from ivshmem_lab.topology.formats.argv import CommandLine, cut
from ivshmem_lab.topology.ivshmem import IvshmemDevice, Master

words = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1)
shared = st.fixed_dictionaries(
    {
        "device_id": st.none() | words,
        "master": st.sampled_from(Master),
        "others": st.sampled_from([(), (("addr", "5"),), (("bus", "pci.0"), ("romfile", "a,b"))]),
    }
)
powers = st.integers(0, 40).map(lambda bits: 1 << bits)
plain = st.builds(lambda common, shm, size: IvshmemDevice(shm=shm, size_bytes=size, **common), shared, words, powers)
doorbell = st.builds(
    lambda common, chardev, vectors, ioeventfd: IvshmemDevice(
        chardev=chardev, vectors=vectors, ioeventfd=ioeventfd, **common
    ),
    shared,
    words,
    st.integers(0, 4096),
    st.booleans(),
)
legacy_doorbell = st.builds(
    lambda device, size, msix, bar_64bit: replace(
        device, size_bytes=size, msix=msix, ioeventfd=device.ioeventfd and msix, bar_64bit=bar_64bit
    ),
    doorbell,
    powers,
    st.booleans(),
    st.booleans(),
)
PASSING = ("qemu-system-x86_64", "-S", "-m", "64", "-append", "-device ivshmem,shm=no", "-chardev", "null,id=c,,d")


def command_line(devices: list[IvshmemDevice]) -> CommandLine:
    return CommandLine((*cut(PASSING), *devices))


@given(st.lists(plain | legacy_doorbell, max_size=4))
def test_the_legacy_dialect_reads_what_it_writes(devices: list[IvshmemDevice]) -> None:
    written = legacy_argv.write(command_line(devices))
    assert written.notes == []
    assert legacy_argv.parse(written.argv) == command_line(devices)


@given(st.lists(plain | doorbell, max_size=4))
def test_todays_dialect_reads_what_it_writes(devices: list[IvshmemDevice]) -> None:
    written = qemu_argv.write(command_line(devices))
    assert written.notes == []
    assert qemu_argv.parse(written.argv) == command_line(devices)


@given(st.lists(words))
@pytest.mark.parametrize("name", FORMATS)
def test_any_words_are_read_or_refused_and_nothing_is_lost(name: str, argv: list[str]) -> None:
    try:
        line = FORMATS[name].parse(argv)
    except UsageError:
        return
    if not line.devices:
        assert FORMATS[name].write(line).argv == argv


def test_todays_line_becomes_a_legacy_one() -> None:
    text = "-object memory-backend-file,size=1M,id=m,share=on,mem-path=/dev/shm/b -device ivshmem-plain,memdev=m"
    written = translate(text.split(), "qemu", "legacy")
    assert (written.argv, written.notes) == (["-device", "ivshmem,size=1M,shm=b,role=peer"], [])
    written = translate(["-device", "ivshmem-doorbell,chardev=c,master=auto"], "qemu", "legacy")
    assert written.argv == ["-device", "ivshmem,chardev=c,vectors=1,msi=on,ioeventfd=on"]
    assert [note.code for note in written.notes] == ["size"]


@pytest.mark.parametrize(
    "backend",
    [
        "memory-backend-file,id=m,mem-path=/tmp/b,size=1M,share=on",
        "memory-backend-file,id=m,mem-path=/dev/shm/b,size=1M",
        "memory-backend-file,id=m,mem-path=/dev/shm/b,size=1M,share=off",
        "memory-backend-file,id=m,mem-path=/dev/shm/b,size=1M,share=on,prealloc=on",
        "memory-backend-memfd,id=m,size=1M,share=on",
    ],
)
def test_a_backend_that_is_more_than_shared_memory_is_left_alone(backend: str) -> None:
    argv = ["-object", backend, "-device", "ivshmem-plain,memdev=m,master=on"]
    line = qemu_argv.parse(argv)
    assert line.devices == (IvshmemDevice(memdev="m", master=Master.ON),)
    assert qemu_argv.write(line).argv == argv


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("ivshmem-plain", "You must specify a 'memdev'"),
        ("ivshmem-doorbell", "You must specify a 'chardev'"),
        ("ivshmem-plain,memdev=m,vectors=2", "Property 'ivshmem-plain.vectors' not found"),
        ("ivshmem-plain,memdev=m,master=boss", "Parameter 'master' does not accept value 'boss'"),
    ],
)
def test_a_device_that_todays_qemu_refuses_is_refused_with_its_words(device: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        qemu_argv.parse(["-device", device])
