"""``bench channel`` measures something and says what; how fast it is depends on the machine."""

from __future__ import annotations

import json
import os

import pytest

from ivshmem_lab.bench.channel import main

FEW = ["--rounds", "2", "--trips", "20", "--messages", "70"]


def test_json_has_every_figure_and_nothing_is_copied_in_place(capsys: pytest.CaptureFixture[str]) -> None:
    allowed = os.sched_getaffinity(0)
    assert main([*FEW, "--message-bytes", "4096", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["micros"]) == {
        *("trip_eventfd", "trip_epoll", "trip_peer"),
        *("numpy_copy", "send", "send_all", "in_place"),
    }
    assert all(value > 0 for value in result["micros"].values())
    micros = result["micros"]
    assert result["trip_ratio"] == pytest.approx(micros["trip_peer"] / micros["trip_eventfd"], abs=0.001)
    assert result["message_ratio"] == pytest.approx(micros["numpy_copy"] / micros["send_all"], abs=0.001)
    assert (result["in_place_copied_bytes"], result["message_bytes"], result["rounds"]) == (0, 4096, 2)
    assert os.sched_getaffinity(0) == allowed


def test_the_table_names_the_cpu_and_what_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    cpu = min(os.sched_getaffinity(0))
    assert main([*FEW, "--cpu", str(cpu)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"CPU {cpu}, ")
    assert "wanted: at most 1.5" in said
    assert "bytes copied by reserve and commit: 0" in said


@pytest.mark.parametrize(
    "wrong",
    [["--rounds", "0"], ["--message-bytes", "8"], ["--cpu", "99999"], ["--messages", "x"], ["--ring-bytes", "5000000"]],
)
def test_a_wrong_call_ends_with_status_2(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(wrong) == 2
    assert "ivshmem-lab bench channel: " in capsys.readouterr().err
