"""QEMU's name=value,name=value."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem_lab.errors import UsageError
from ivshmem_lab.keyval import join_pairs, parse_switch, split_pairs


def test_pairs_may_hold_commas_and_switches() -> None:
    assert split_pairs("socket,id=a,,b,server,wait=off", "backend", "-chardev") == {
        "backend": "socket",
        "id": "a,b",
        "server": "on",
        "wait": "off",
    }
    assert split_pairs("file,id=c,path=a=b", "backend", "-chardev")["path"] == "a=b"


@pytest.mark.parametrize("text", ["", ",", "a=1,a=2", "=1", "a,=1"])
def test_pairs_without_a_name_or_with_one_twice_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"-device {text}")):
        split_pairs(text, "", "-device")


names = st.text(st.characters(exclude_characters="=,\0", exclude_categories=["Cs"]), min_size=1)
values = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(st.dictionaries(names, values, min_size=1))
def test_what_is_joined_is_split_into_the_same(pairs: dict[str, str]) -> None:
    assert split_pairs(join_pairs(pairs.items()), "", "-x") == pairs


@given(names, st.dictionaries(names.filter(lambda name: name != "driver"), values))
def test_a_leading_value_needs_no_name(driver: str, pairs: dict[str, str]) -> None:
    text = join_pairs([("driver", driver), *pairs.items()], "driver")
    assert text.startswith(driver)
    assert split_pairs(text, "driver", "-device") == {"driver": driver, **pairs}


def test_a_switch_is_on_or_off() -> None:
    assert [parse_switch(word, "msi") for word in ("on", "yes", "off", "n")] == [True, True, False, False]
    with pytest.raises(UsageError, match="msi: 'maybe' is neither on nor off"):
        parse_switch("maybe", "msi")
