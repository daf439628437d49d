from __future__ import annotations

import asyncio

import pytest

from ivshmem_lab.vm.events import EventLog


def test_events_are_kept_in_order_with_their_numbers_and_data():
    log = EventLog()
    log.note("STOP", {})
    log.note("DEVICE_DELETED", {"device": "hot0"})
    assert [(event.number, event.name, event.data) for event in log] == [
        (0, "STOP", {}),
        (1, "DEVICE_DELETED", {"device": "hot0"}),
    ]
    first, second = log
    assert first.time_s <= second.time_s


def test_only_the_last_are_kept_but_all_are_counted():
    log = EventLog(limit=3)
    for number in range(10):
        log.note("RTC_CHANGE", {"offset": number})
    assert (len(log), log.count) == (3, 10)
    assert [event.number for event in log] == [7, 8, 9]


def test_a_wait_finds_what_came_before_it_and_what_comes_later():
    async def test():
        log = EventLog()
        log.note("STOP", {"number": 0})
        assert (await log.wait("STOP", 1.0)).number == 0
        after = log.count
        waiter = asyncio.create_task(log.wait("STOP", 10.0, after=after))
        await asyncio.sleep(0)
        log.note("RESUME", {})
        await asyncio.sleep(0)
        assert not waiter.done()
        log.note("STOP", {"number": 2})
        assert (await waiter).data == {"number": 2}

    asyncio.run(test())


def test_two_who_wait_for_one_event_both_get_it():
    async def test():
        log = EventLog()
        waiters = [asyncio.create_task(log.wait("RESET", 10.0)) for _ in range(2)]
        await asyncio.sleep(0)
        log.note("RESET", {})
        assert [event.number for event in await asyncio.gather(*waiters)] == [0, 0]

    asyncio.run(test())


def test_what_does_not_come_in_time_ends_the_wait():
    async def test():
        log = EventLog()
        log.note("STOP", {})
        with pytest.raises(TimeoutError):
            await log.wait("STOP", 0.01, after=1)

    asyncio.run(test())


def test_listeners_hear_until_they_leave_even_while_being_told():
    async def test():
        heard = []

        def once(event):
            heard.append(event.name)
            leave()

        log = EventLog()
        leave = log.listen(once)
        log.listen(lambda event: heard.append(event.number))
        log.note("STOP", {})
        log.note("RESUME", {})
        assert heard == ["STOP", 0, 1]

    asyncio.run(test())
