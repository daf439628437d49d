from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys

import pytest

from ivshmem_lab.vm.process import Process, death_signal_launcher

PRINT = "import os, sys; print({}, flush=True)"


def python(expression, *then):
    return [sys.executable, "-I", "-S", "-c", "; ".join([PRINT.format(expression), *then])]


def output_of(argv, **how):
    async def run():
        process = Process.spawn("x", argv, **how)
        assert await process.wait(20.0)
        return process

    process = asyncio.run(run())
    return process.log.text.strip(), process


def test_it_has_a_session_of_its_own_and_no_input():
    said, process = output_of(python("os.getsid(0), repr(sys.stdin.read())"))
    assert said == f"{process.pid} ''"
    assert os.getsid(0) != process.pid


def test_only_the_file_descriptors_that_were_passed_are_inherited(tmp_path):
    with (tmp_path / "kept").open("w") as kept, (tmp_path / "not").open("w") as other:
        os.set_inheritable(other.fileno(), True)
        said, _ = output_of(python("sorted(map(int, os.listdir('/proc/self/fd')))"), pass_fds=[kept.fileno()])
        fds = set(map(int, said.strip("[]").split(", ")))
        assert kept.fileno() in fds
        assert other.fileno() not in fds


def test_it_may_open_as_many_files_as_the_hard_limit_allows():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard > 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        limit = "resource.getrlimit(resource.RLIMIT_NOFILE)"
        # It begins with ours; what it is raised to may arrive a moment later.
        waits = f"import resource\nwhile {limit} != ({hard}, {hard}): pass\nprint('raised')"
        said, _ = output_of([sys.executable, "-I", "-S", "-c", waits])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert said == "raised"


def test_it_is_pinned_and_the_thread_that_started_it_is_not():
    before = os.sched_getaffinity(0)
    cpu = max(before)
    said, _ = output_of(python("os.sched_getaffinity(0)"), cpu=cpu)
    assert said == f"{{{cpu}}}"
    assert os.sched_getaffinity(0) == before


def test_its_variables_stand_beside_the_inherited_ones():
    said, _ = output_of(python("os.environ['OWN'], 'PATH' in os.environ"), environment={"OWN": "1"})
    assert said == "1 True"


def test_the_last_words_on_standard_error_are_there_when_it_has_ended():
    said, process = output_of(python("1", "print('sorry', file=sys.stderr)", "sys.exit(3)"))
    assert said.splitlines() == ["1", "sorry"]
    assert process.returncode == 3


def test_a_signal_to_a_process_that_has_ended_is_nothing():
    async def run():
        process = Process.spawn("x", python("1", "sys.stdin.read()", "import signal; signal.pause()"))
        await process.log.wait_text("1", 20.0)
        process.send_signal(signal.SIGKILL)
        assert await process.wait(20.0)
        process.send_signal(signal.SIGKILL)
        return process

    assert asyncio.run(run()).returncode == -signal.SIGKILL


def test_a_program_that_cannot_be_executed_leaves_nothing(monkeypatch):
    monkeypatch.setattr("ivshmem_lab.vm.process.death_signal_launcher", tuple)

    async def run():
        with pytest.raises(FileNotFoundError):
            Process.spawn("x", ["/nonexistent/program"])

    asyncio.run(run())


@pytest.mark.skipif(not death_signal_launcher(), reason="no setpriv of util-linux here")
def test_the_kernel_kills_it_when_its_parent_is_killed():
    script = (
        "import asyncio, sys, signal\n"
        "from ivshmem_lab.vm.process import Process\n"
        "async def main():\n"
        "    p = Process.spawn('x', [sys.executable, '-I', '-S', '-c', 'print(1, flush=True); import signal; signal.pause()'])\n"
        "    await p.log.wait_text('1', 20)\n"
        "    print(p.pid, flush=True)\n"
        "    signal.pause()\n"
        "asyncio.run(main())\n"
    )

    async def run():
        parent = Process.spawn("parent", [sys.executable, "-c", script])
        child = os.pidfd_open(int(await parent.log.wait_text("\n", 20.0)))
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(child, ended.set)
        parent.send_signal(signal.SIGKILL)
        try:
            async with asyncio.timeout(20.0):
                await ended.wait()
        finally:
            asyncio.get_running_loop().remove_reader(child)
            os.close(child)
        assert await parent.wait(20.0)

    asyncio.run(run())
