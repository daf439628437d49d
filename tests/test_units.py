"""Sizes as people write them, and the error tree."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem_lab import errors
from ivshmem_lab.units import GIB, KIB, MIB, TIB, check_memory_size, format_size, is_power_of_two, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4194304", 4 * MIB),
        ("4M", 4 * MIB),
        ("4m", 4 * MIB),
        ("4MB", 4 * MIB),
        ("4MiB", 4 * MIB),
        (" 4 MiB ", 4 * MIB),
        ("64k", 64 * KIB),
        ("1.5G", 3 * GIB // 2),
        ("0.5k", 512),
        ("2T", 2 * TIB),
        ("512B", 512),
        ("0x1000", 4096),
        ("0x10k", 16 * KIB),
        (4096, 4096),
    ],
)
def test_a_size_is_read(text: str | int, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("64", 64 * MIB), ("0x40", 64 * MIB), ("1.5", 3 * MIB // 2), ("64k", 64 * KIB), (64, 64)]
)
def test_a_bare_number_as_text_takes_the_default_unit(text: str | int, size_bytes: int) -> None:
    assert parse_size(text, default_suffix="m") == size_bytes


@pytest.mark.parametrize(
    "text", ["", "M", "four", "4X", "4 M M", "-4M", "+4M", "1e6", "4,5M", "1.M", ".5M", "0x", "0x1.8k"]
)
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(errors.UsageError, match=r"^memory .* is not a size; write bytes or a number with K, M, G or T"):
        parse_size(text, "memory")


@pytest.mark.parametrize("value", [None, 4.0, True, b"4M"])
def test_what_is_neither_text_nor_whole_number_is_refused(value: object) -> None:
    with pytest.raises(errors.UsageError, match="is not a size"):
        parse_size(value)  # type: ignore[arg-type]


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(errors.UsageError, match="size -1 is negative; sizes start at 0"):
        parse_size(-1)


@pytest.mark.parametrize("text", ["1.5", "0.3k", "1.0001M"])
def test_a_part_of_a_byte_is_refused(text: str) -> None:
    with pytest.raises(errors.UsageError, match="is not a whole number of bytes"):
        parse_size(text)


@given(st.integers(0, 1 << 60))
def test_what_is_written_is_read_back(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0"),
        (1, "1"),
        (1000, "1000"),
        (1024, "1K"),
        (1536 * KIB, "1536K"),
        (4 * MIB, "4M"),
        (GIB, "1G"),
        (2 * TIB, "2T"),
    ],
)
def test_a_size_is_written_in_the_largest_unit_that_divides_it(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@given(st.integers(-4, 1 << 20))
def test_powers_of_two_are_those_with_one_bit(number: int) -> None:
    assert is_power_of_two(number) == (number > 0 and number.bit_count() == 1)


@given(st.integers(12, 62))
def test_a_power_of_two_from_one_page_is_a_memory_size(exponent: int) -> None:
    assert check_memory_size(1 << exponent) == 1 << exponent


@given(st.integers(4097, 1 << 50).filter(lambda size_bytes: size_bytes & (size_bytes - 1)))
def test_any_other_size_is_refused_with_the_two_nearest(size_bytes: int) -> None:
    with pytest.raises(errors.UsageError) as caught:
        check_memory_size(size_bytes)
    below, above = (parse_size(word) for word in str(caught.value).rpartition(": ")[2].split(" and "))
    assert below < size_bytes < above == 2 * below
    assert is_power_of_two(below)


def test_3m_is_refused_with_2m_and_4m() -> None:
    with pytest.raises(errors.UsageError, match=r"^-l 3M is not a power of two; the nearest that are: 2M and 4M$"):
        check_memory_size(3 * MIB, "-l")


@pytest.mark.parametrize("size_bytes", [0, 1, 2048])
def test_less_than_a_page_is_refused(size_bytes: int) -> None:
    with pytest.raises(errors.UsageError, match="is too small: at least one page, 4K"):
        check_memory_size(size_bytes)


def test_a_protocol_error_says_which_field() -> None:
    error = errors.RemoteProtocolError("version", "1 arrived, 0 is allowed")
    assert (error.field, error.detail) == ("version", "1 arrived, 0 is allowed")
    assert str(error) == "version: 1 arrived, 0 is allowed"


def test_a_refused_command_says_class_and_words() -> None:
    error = errors.QmpCommandError("device_add", "DeviceNotFound", "no bus")
    assert (error.command, error.qmp_class, error.desc) == ("device_add", "DeviceNotFound", "no bus")
    assert str(error) == "device_add: no bus (DeviceNotFound)"


def test_every_error_is_drawn_in_the_tree_where_it_stands() -> None:
    drawn: dict[str, str] = {}
    ancestors: list[tuple[int, str]] = [(-1, "Exception")]
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"([ │├└─]*)(\w+Error)\b", line):
            column = found.start(2)
            while ancestors[-1][0] >= column:
                ancestors.pop()
            drawn[found[2]] = ancestors[-1][1]
            ancestors.append((column, found[2]))
    defined = {name: thing for name, thing in vars(errors).items() if isinstance(thing, type)}
    assert drawn == {name: thing.__bases__[0].__name__ for name, thing in defined.items()}
