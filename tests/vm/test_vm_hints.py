"""The words are QEMU's (7.2); that it says them still is tested in test_vm_refusals.py."""

from __future__ import annotations

import pytest

from ivshmem_lab.errors import QmpCommandError
from ivshmem_lab.vm.hints import hint_for


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("Bus 'pcie.0' does not support hotplugging", "root_ports="),
        ("PCI: no slot/function available for ivshmem-plain, all in use or reserved", "unplug a device"),
        ("Property 'ivshmem-doorbell.chardev' can't take value 'c0': Device 'c0' is in use", "open a new one"),
        ("can't use already busy memdev: m5", "another backend"),
        ("Chardev 'c0' is busy", "unplug that device first"),
        ("object 'm5' is in use, can not be deleted", "unplug that device first"),
        ("backing store size 0x3e8 does not match 'size' option 0x1000", "its own size"),
        ("server sent version 1, expecting 0", "another protocol"),
        ("server sent invalid ID message", "no ivshmem server"),
        ("Migration is disabled when using feature 'peer mode' in device 'ivshmem'", "master=on"),
    ],
)
def test_known_words_come_with_a_remedy_of_their_own(words, hint):
    assert hint in hint_for(words)
    error = QmpCommandError("device_add", "GenericError", words, hint_for(words))
    assert str(error) == f"device_add: {words} (GenericError); {error.hint}"


def test_unknown_words_come_alone():
    assert hint_for("the moon is full") == ""
    assert str(QmpCommandError("x", "GenericError", "the moon is full")) == "x: the moon is full (GenericError)"
