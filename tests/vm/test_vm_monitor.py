"""A machine whose monitor breaks the protocol: an error of ours in time, the machine can be closed, nothing is complained of."""

from __future__ import annotations

import asyncio
import sys

import pytest

from ivshmem_lab.errors import QmpCommandError, VmError
from ivshmem_lab.vm.command import Machine
from ivshmem_lab.vm.qemu import Emulator
from ivshmem_lab.vm.text import VmTimeoutError
from ivshmem_lab.vm.vm import Vm

PRELUDE = r"""
import json, os, signal, socket, sys, time
fd = next(int(word.rpartition("=")[2]) for word in sys.argv if word.startswith("socket,id=qmp,fd="))
monitor = socket.socket(fileno=fd)
def hear(): return json.loads(monitor.recv(65536))  # a command has no line end
def say(text): monitor.sendall(text.encode() if isinstance(text, str) else text)
def answer(**fields): say(json.dumps({**fields, "id": hear()["id"]}) + "\n")
say('{"QMP": {"version": {}, "capabilities": []}}\n')
hear()
say('{"return": {}}\n')
answer(**{"return": {}})
"""

BROKEN = {
    "a line of 11 MiB": 'hear(); say("x" * (11 << 20) + "\\n"); signal.pause()',
    "nested without end": 'hear(); say("[" * 200000 + "\\n"); signal.pause()',
    "no JSON": 'hear(); say("Segmentation fault\\n"); signal.pause()',
    "an answer to nobody": 'hear(); say(\'{"return": {}, "id": "other"}\\n\'); signal.pause()',
    "an error without words": 'answer(error={"class": "GenericError"}); signal.pause()',
    "a closed connection": "hear(); monitor.close(); signal.pause()",
    "half an answer and death": "hear(); say('{\"ret'); os._exit(0)",
    "silence": "signal.pause()",
}


def conversation(tmp_path, script, test):
    """Run a test against a machine that is a script; fail on everything that asyncio complains of."""
    complaints = []

    async def run():
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
        (tmp_path / "fake.py").write_text(PRELUDE + script)
        vm = Vm(Machine("x"), Emulator("fake", (sys.executable, "-I", "-S", str(tmp_path / "fake.py")), "1.0"))
        try:
            await vm.launch()
            return await test(vm)
        finally:
            await vm.close()
            assert await vm.wait_end(1.0)
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
    assert complaints == []


@pytest.mark.parametrize("case", BROKEN)
def test_a_monitor_that_breaks_the_protocol_is_an_error_in_time(tmp_path, case):
    async def test(vm):
        with pytest.raises(VmError, match="query-pci") as caught:
            await vm.execute("query-pci", timeout_s=0.5)
        assert not isinstance(caught.value, QmpCommandError)

    conversation(tmp_path, BROKEN[case], test)


def test_a_command_that_timed_out_does_not_spoil_the_next(tmp_path):
    async def test(vm):
        with pytest.raises(VmTimeoutError, match=r"query-pci: x gave no answer in 0.05 s; it may hang"):
            await vm.execute("query-pci", timeout_s=0.05)
        assert await vm.execute("query-version") == {"late": 2}

    script = """
first, second = (hear() for _ in range(2))
say(json.dumps({"return": {"late": 1}, "id": first["id"]}) + "\\n")
say(json.dumps({"return": {"late": 2}, "id": second["id"]}) + "\\n")
signal.pause()
"""
    conversation(tmp_path, script, test)


def test_a_flood_of_events_is_kept_in_bounded_memory(tmp_path):
    async def test(vm):
        assert await vm.execute("query-status") == {}
        assert (vm.events.count, len(vm.events)) == (20000, 1000)

    script = """
say('{"event": "RTC_CHANGE", "data": {"offset": 1}, "timestamp": {"seconds": 1, "microseconds": 1}}\\n' * 20000)
answer(**{"return": {}})
signal.pause()
"""
    conversation(tmp_path, script, test)
