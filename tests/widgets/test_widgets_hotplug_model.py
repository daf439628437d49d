"""The life of a device as the panel shows it, and what the others are told."""

from __future__ import annotations

import json

import pytest

from ivshmem_lab.server.events import MessageWithheld, PeerDeparted, PeerInfo, PeerJoined
from ivshmem_lab.vm.device import DeviceState, Step
from ivshmem_lab.widgets.hotplug_model import Operation, Phase, Subject, Way, seen_by_others, stages

SERVER = Subject("bob", "board", "hot0", peers=True, guards=True)
MEMORY = Subject("bob", "scratch", "hot0", peers=False)


def step(state: DeviceState, at_s: float, command: str = "", answer: object = None, error: str = "", what: str = ""):
    said = {"execute": command, "arguments": {"id": "hot0"}} if command else None
    return Step(state, what or command or state.value, 0.001, said, answer, error, at_s)


PLUGGING = [
    step(DeviceState.READY, 100.001),
    step(DeviceState.CONNECTED, 100.002, "chardev-add", {"return": {}}),
    step(DeviceState.PLUGGED, 100.003, "device_add", {"return": {}}),
]
SEEN = step(DeviceState.SEEN, 100.03)
ASKING = [
    step(DeviceState.SEEN, 100.001, what="all that the server sent is read"),
    step(DeviceState.UNPLUGGING, 100.002, "device_del", {"return": {}}),
]
LEAVING = [
    step(DeviceState.DELETED, 101.0, answer={"event": "DEVICE_DELETED", "data": {"device": "hot0"}}),
    step(DeviceState.GUARDED, 101.2),
    step(DeviceState.ABSENT, 101.3, "chardev-remove", {"return": {}}),
]


def begun(way: Way, subject: Subject = SERVER, *steps: Step) -> Operation:
    operation = Operation(way, subject, 100.0, 1.7e9, 10.0, peer_id=1)
    for each in steps:
        operation.note(each)
    return operation


def marks(operation: Operation, now_s: float) -> str:
    return " ".join(stage["mark"] for stage in operation.view(now_s)["stages"])


def test_plugging_goes_from_ready_to_seen() -> None:
    operation = begun(Way.PLUG)
    assert marks(operation, 100.0) == "now todo todo todo"
    for each in PLUGGING:
        operation.note(each)
    assert (operation.phase, marks(operation, 100.5)) == (Phase.WAITING, "done done done now")
    assert operation.view(100.5)["stages"][-1]["time"] == "0.5 of 10 s"
    assert not operation.view(100.5)["can_force"]
    operation.note(SEEN)
    assert (operation.phase, marks(operation, 101.0)) == (Phase.DONE, "done done done done")


def test_unplugging_goes_from_asked_to_closed() -> None:
    operation = begun(Way.UNPLUG, SERVER, *ASKING)
    view = operation.view(102.402)
    assert marks(operation, 102.402) == "done done now todo todo"
    assert view["waited_s"] == 2.4
    assert (view["can_give_up"], view["can_force"], view["can_wait"]) == (True, True, False)
    for each in LEAVING:
        operation.note(each)
    assert (operation.phase, marks(operation, 103.0)) == (Phase.DONE, "done done done done done")
    assert not operation.view(103.0)["can_give_up"]


def test_a_silent_guest_can_be_waited_for_again_forced_or_left() -> None:
    operation = begun(Way.UNPLUG, SERVER, *ASKING)
    operation.silent()
    view = operation.view(200.0)
    assert (view["can_give_up"], view["can_force"], view["can_wait"]) == (True, True, True)
    assert "bob's other devices" in view["question"]
    operation.wait(200.0)
    assert operation.view(201.0)["waited_s"] == 1.0
    operation.give_up(202.0)
    assert operation.phase is Phase.GIVEN_UP
    assert not operation.view(203.0)["question"]


def test_a_guest_that_lets_go_later_is_followed_through() -> None:
    operation = begun(Way.UNPLUG, SERVER, *ASKING)
    operation.give_up(102.0)
    for each in LEAVING:
        operation.note(each)
    assert operation.phase is Phase.DONE


def test_a_guest_that_was_asked_before_has_only_to_be_waited_for() -> None:
    operation = begun(Way.UNPLUG)
    operation.asked_before(100.0)
    assert marks(operation, 101.0) == "done done now todo todo"
    operation.silent()
    assert operation.view(120.0)["can_force"]


def test_a_refusal_is_in_qemus_words_with_the_way_back() -> None:
    operation = begun(Way.PLUG, SERVER, *PLUGGING[:2])
    operation.note(step(DeviceState.CONNECTED, 100.01, "device_add", error="Bus 'pcie.0' does not support hotplugging"))
    operation.note(step(DeviceState.ABSENT, 100.02, "chardev-remove", {"return": {}}))
    operation.fail("Bus 'pcie.0' does not support hotplugging", 100.02)
    view = operation.view(101.0)
    assert marks(operation, 101.0) == "done done failed todo"
    assert view["error"] == "Bus 'pcie.0' does not support hotplugging"
    assert "Nothing is left" in view["way_back"]
    assert [(each["direction"], each["name"]) for each in view["qmp"]] == [
        ("sent", "chardev-add"),
        ("got", "return"),
        ("sent", "device_add"),
        ("got", "error"),
        ("sent", "chardev-remove"),
        ("got", "return"),
    ]


def test_messages_are_whole_json_with_their_time() -> None:
    sent, got, event = begun(Way.UNPLUG, SERVER, *ASKING, LEAVING[0]).messages()
    assert json.loads(sent["json"]) == {"execute": "device_del", "arguments": {"id": "hot0"}}
    assert (sent["at"], got["at"], event["name"]) == ("1.0 ms", "2.0 ms", "DEVICE_DELETED")


def test_a_memory_has_no_peers_and_a_machine_of_ours_no_guards() -> None:
    assert [stage.key for stage in stages(Way.UNPLUG, MEMORY)] == ["asked", "guest", "closed"]
    assert [stage.key for stage in stages(Way.PLUG, MEMORY)] == ["ready", "open", "plugged", "guest"]


@pytest.mark.parametrize("way", Way)
def test_every_phase_has_a_sentence(way: Way) -> None:
    for phase in Phase:
        operation = begun(way)
        operation.phase = phase
        assert operation.sentence(100.0).startswith("bob / board: ")


def peer(peer_id: int, queued: int = 0) -> PeerInfo:
    return PeerInfo(peer_id, 1000 + peer_id, 0, 2, queued)


def test_the_others_see_who_is_there_who_left_and_what_is_withheld() -> None:
    joined = [(1.0, PeerJoined(number, 1000 + number, 0)) for number in range(4)]
    left = [*joined, (2.0, MessageWithheld(2, 1, "peer 1 left")), (2.0, PeerDeparted(1, "closed"))]
    names = {0: "alice", 2: "dave", 3: "me"}
    here = {number: peer(number) for number in range(4)}
    seen = seen_by_others(1, here, joined, names, {3: {0, 1, 2}})
    assert [(each.name, each.mark) for each in seen] == [
        ("alice", "present"),
        ("pid 1001", "self"),
        ("dave", "present"),
        ("me", "present"),
    ]
    gone = {number: info for number, info in here.items() if number != 1}
    seen = seen_by_others(1, gone, left, names, {3: {0, 1, 2}})
    assert [(each.name, each.mark) for each in seen] == [("alice", "absent"), ("dave", "withheld"), ("me", "pending")]
    assert seen[1].words == "“peer 1 left” withheld"
    assert seen_by_others(9, here, joined, names, {}) == []
