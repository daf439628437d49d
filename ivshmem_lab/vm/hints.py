"""What to do about QEMU's own error messages, where that is known (texts measured, QEMU 7.2)."""

from __future__ import annotations

_HINTS = (
    ("does not support hotplugging", "on q35 devices are plugged into root ports: define the VM with root_ports=…"),
    ("no slot/function available", "every slot of the bus is taken; unplug a device, or start another VM"),
    ("Failed to connect to", "no server listens there; start one, or look at the path"),
    ("can't use already busy memdev", "one memory backend serves one device; add another backend over the same memory"),
    ("can not be deleted", "a device still uses it; unplug that device first, and wait until the guest has let it go"),
    ("is in use", "a chardev serves one device and one plug; open a new one each time"),
    ("is busy", "a device still uses it; unplug that device first, and wait until the guest has let it go"),
    ("backing store size", "the object has another size than was asked for; give its own size"),
    ("can't open backing store", "there is no such file; give an existing one, for example under /dev/shm"),
    ("number of MSI-X vectors is invalid", "1 to 2048 vectors are allowed"),
    (
        "master must connect to the server before any peers",
        "master=on needs peer id 0: let it join a fresh server first",
    ),
    ("is not a valid device model name", "this machine has ivshmem-plain and ivshmem-doorbell"),
    ("Migration is disabled when using feature 'peer mode'", "unplug the device first, or define it with master=on"),
    ("already in the process of unplug", "the guest was asked already; wait for it, or force it"),
    ("Device 'ivshmem' could not be initialized", "look at the machine's log"),
    ("server sent version", "that server speaks another protocol than version 0 (QEMU 2.5 and later)"),
    ("server sent invalid", "what listens there is no ivshmem server"),
)


def hint_for(desc: str) -> str:
    """Return what to do about an error message; empty when nothing is known.

    Examples
    --------
    >>> hint_for("Bus 'pcie.0' does not support hotplugging")
    'on q35 devices are plugged into root ports: define the VM with root_ports=…'
    >>> hint_for("something new")
    ''
    """
    return next((hint for text, hint in _HINTS if text in desc), "")
