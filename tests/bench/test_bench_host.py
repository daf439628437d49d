"""The circumstances of a measurement: CPUs, clock, machine."""

from __future__ import annotations

import contextlib
import os

import pytest

from ivshmem_lab.bench.clock import TscReader, measure_tsc
from ivshmem_lab.bench.host import HostFacts, Pinning, on_cpus
from ivshmem_lab.errors import UsageError


def test_this_thread_moves_and_comes_back_even_after_an_error() -> None:
    before = os.sched_getaffinity(0)
    with contextlib.suppress(ZeroDivisionError), on_cpus(max(before)):
        assert os.sched_getaffinity(0) == {max(before)}
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before
    with on_cpus(None):
        assert os.sched_getaffinity(0) == before


def test_what_is_measured_gets_one_cpu_and_the_rest_the_others() -> None:
    pinning = Pinning.choose()
    assert {pinning.measured, *pinning.others} == os.sched_getaffinity(0)
    assert (pinning.measured in pinning.others) == (len(os.sched_getaffinity(0)) == 1)
    assert f"CPU {pinning.measured}" in str(pinning)


def test_where_there_is_one_cpu_all_run_on_it_and_it_says_so() -> None:
    (only,) = list(os.sched_getaffinity(0))[:1]
    with on_cpus(only):
        pinning = Pinning.choose()
    assert pinning == Pinning(only, frozenset({only}))
    assert str(pinning) == f"everything on CPU {only}, the only one"


def test_the_facts_name_machine_and_versions() -> None:
    facts = HostFacts.look(qemu="7.2.1")
    assert set(facts.as_dict()) == {"cpu", "cores", "load", "kernel", "python", "unicorn", "qemu"}
    assert all(facts.as_dict()[name] for name in ("cpu", "cores", "kernel", "python", "unicorn"))
    assert "QEMU 7.2.1 (TCG)" in str(facts)
    assert "QEMU" not in str(HostFacts.look())


def test_the_counter_only_grows() -> None:
    reader = TscReader()
    readings = [reader.read() for _ in range(20)]
    assert readings == sorted(set(readings))


def test_two_measurements_of_the_clock_agree_within_their_errors() -> None:
    one, other = measure_tsc(), measure_tsc(0.02)
    assert one.hz > 1e6
    ppm = abs(one.hz - other.hz) / one.hz * 1e6
    assert ppm <= one.error_ppm + other.error_ppm + 1000  # and what the kernel steers its clock by meanwhile
    assert f"{one.hz / 1e6:.1f} MHz" in str(one)


def test_no_time_is_too_short_to_measure_over() -> None:
    with pytest.raises(UsageError, match="over_s 0"):
        measure_tsc(0)
