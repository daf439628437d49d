"""What is wrong with a topology on this computer: guests, CPUs and emulators that are not there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import EmulatorNotFoundError, UsageError, VmError
from ..topology.validate import Problem, validate
from ..vm.accel import choose
from ..vm.linux.guest import LEAST_MEMORY_BYTES
from ..vm.qemu import find_emulator
from .arguments import read_cpu, read_guest, read_vm_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..topology.model import Topology, Vm


def problems_here(topology: Topology, current: Topology) -> list[Problem]:
    """Find every problem, those that `validate` names first.

    Parameters
    ----------
    topology
        What is wanted.
    current
        What is there: a machine that stays needs nothing any more.
    """
    found = validate(topology)
    known = {problem.path for problem in found}
    there = {replace(vm, devices=()) for vm in current.vms}
    new = [vm for vm in topology.vms if replace(vm, devices=()) not in there]
    return found + [problem for vm in new for problem in _vm(vm) if problem.path not in known]


def _vm(vm: Vm) -> Iterator[Problem]:
    path = f"vms.{vm.name}"
    if vm.guest != "linux":
        try:
            read_guest(vm.guest)
        except UsageError as error:
            hint = "choose another guest"
            yield Problem("guest", f"{path}.guest", str(error), "a guest of the package, or the path of an ELF", hint)
    if vm.memory_bytes is not None:
        least = LEAST_MEMORY_BYTES if vm.guest == "linux" else 0
        try:
            if read_vm_memory(vm.memory_bytes) < least:
                raise UsageError("it is too little for a Linux guest")
        except UsageError as error:
            allowed = "whole MiB, 96M or more" if least else "whole MiB, 1M or more"
            yield Problem("memory", f"{path}.memory", str(error), allowed, "choose another size, or leave it out")
    try:
        read_cpu(vm.cpu)
    except UsageError as error:
        hint = "choose one of them, or leave it out"
        yield Problem("cpu", f"{path}.cpu", str(error), "a CPU that this process may use", hint)
    try:
        find_emulator(vm.emulator)
    except EmulatorNotFoundError as error:
        hint = "install it, or write emulator: unicorn"
        yield Problem("emulator", f"{path}.emulator", str(error), "an emulator that is installed", hint)
        return
    except UsageError:
        return  # an emulator that does not exist: told already
    if vm.accel == "kvm" and vm.emulator == "qemu" and vm.guest != "linux":
        try:
            choose("kvm", "bare-metal")
        except VmError as error:
            yield Problem("accel", f"{path}.accel", str(error), "tcg or auto", "write accel: auto")
