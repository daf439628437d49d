from __future__ import annotations

import asyncio
import functools
import os
import signal
import threading

import pytest

from ivshmem_lab.errors import LabError
from ivshmem_lab.lab.loop import LabLoop


@pytest.fixture
def loop():
    loop = LabLoop()
    yield loop
    loop.close()


def test_work_runs_on_the_labs_thread_and_its_result_comes_back(loop):
    async def work():
        return threading.current_thread().name

    assert loop.call(work()) == "ivshmem-lab"
    assert threading.current_thread() is threading.main_thread()


def test_an_error_of_the_work_is_raised_where_it_was_asked_for(loop):
    async def work():
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        loop.call(work())


def test_it_works_where_an_event_loop_is_running_already(loop):
    async def notebook_cell():
        async def work():
            return asyncio.get_running_loop()

        return loop.call(work()) is not asyncio.get_running_loop()

    assert asyncio.run(notebook_cell())


def test_its_own_thread_is_refused_instead_of_waiting_for_itself(loop):
    async def inner():
        return 1

    async def outer():
        return loop.call(inner())

    with pytest.raises(LabError, match="the lab's own thread cannot wait for itself"):
        loop.call(outer(), timeout_s=10.0)


def test_a_time_limit_cancels_the_work(loop):
    cancelled = threading.Event()

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(LabError, match=r"not done in 0\.05 s"):
        loop.call(work(), timeout_s=0.05)
    assert cancelled.is_set()


def test_a_timeout_of_the_works_own_is_not_taken_for_ours(loop):
    async def work():
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        loop.call(work(), timeout_s=10.0)


@pytest.mark.parametrize("finish", [False, True])
def test_ctrl_c_waits_until_the_work_has_cleaned_up_or_finished(loop, finish):
    steps = []

    async def work():
        nonlocal tell
        seen, running = asyncio.Event(), asyncio.get_running_loop()
        tell = functools.partial(running.call_soon_threadsafe, seen.set)
        os.kill(os.getpid(), signal.SIGINT)  # the main thread, which waits for us, gets it
        try:
            await seen.wait()
            await (asyncio.sleep(0) if finish else asyncio.Event().wait())
            steps.append("finished")
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            steps.append("cleaned up")
            raise

    def handler(*_):
        tell()
        raise KeyboardInterrupt

    tell = None
    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.call(work(), finish=finish)
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps == ["finished" if finish else "cleaned up"]


def test_many_threads_may_ask_at_once(loop):
    async def work(number):
        await asyncio.sleep(0)
        return number

    answers = {}
    threads = [threading.Thread(target=lambda n=n: answers.update({n: loop.call(work(n))})) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: n for n in range(20)}


def test_closing_ends_the_thread_and_whoever_waits():
    loop = LabLoop("to be closed")
    begun = threading.Event()
    outcome = []

    async def endless():
        begun.set()
        await asyncio.Event().wait()

    def ask():
        try:
            loop.call(endless())
        except LabError as error:
            outcome.append(str(error))

    asker = threading.Thread(target=ask)
    asker.start()
    assert begun.wait(10.0)
    loop.close()
    loop.close()
    asker.join(10.0)
    assert outcome == ["the lab was closed, or this was interrupted, before it was done"]
    assert "to be closed" not in [thread.name for thread in threading.enumerate()]

    async def late():
        return 1

    with pytest.raises(LabError, match="the lab is closed"):
        loop.call(late())


def test_work_handed_over_while_the_loop_ends_is_answered_too():
    for _ in range(20):
        loop = LabLoop()
        outcome = []

        async def work():
            return 1

        def ask(loop=loop, outcome=outcome, work=work):
            try:
                while True:
                    loop.call(work())
            except LabError:
                outcome.append("told")

        asker = threading.Thread(target=ask)
        asker.start()
        loop.close()
        asker.join(10.0)
        assert outcome == ["told"]
