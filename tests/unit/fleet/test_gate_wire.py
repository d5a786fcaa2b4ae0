"""Show that the two lines of a node's socket are read as they were written, and nothing else is."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inventorykit import fact

from handfast.errors import FormatError, HandfastError
from handfast.fleet.gate.wire import LINE, read_reply, read_request, refusal, reply, request
from handfast.fleet.identity import Statement
from handfast.fleet.inventory.facts import Inventory, gather


@given(st.binary(max_size=64))
def test_a_request_is_read_as_it_was_written(challenge: bytes) -> None:
    """One form for each challenge, and within the bound."""
    line = request(challenge)
    assert read_request(line) == challenge
    assert len(line) <= LINE
    with pytest.raises(ValueError, match="a challenge of 65 bytes"):
        request(bytes(65))


@given(st.binary(max_size=200) | st.from_regex(rb"handfast\.node/1 [0-9a-fA-F ]{0,140}\n?"))
def test_no_other_line_is_a_request(line: bytes) -> None:
    """What is read is what would be written, byte for byte; all else is refused."""
    try:
        challenge = read_request(line)
    except FormatError:
        return
    assert request(challenge) == line


@given(st.dictionaries(st.from_regex(r"[a-z][a-z.]{0,9}", fullmatch=True), st.text(max_size=30)))
def test_an_answer_is_read_as_it_was_written(values: dict[str, str]) -> None:
    """One line, whatever is in it."""
    told: Inventory = gather(fact(name, value) for name, value in values.items())
    statement = Statement("body\n", "00", "11")
    for each in (told, statement):
        line = reply(each)
        assert line.index(b"\n") == len(line) - 1
        assert read_reply(line, "a test") == each


@given(st.text(max_size=5000))
def test_a_refusal_is_heard(why: str) -> None:
    """With its reason, which is bounded."""
    with pytest.raises(HandfastError) as error:
        read_reply(refusal(why), "a test")
    assert str(error.value) == f"a test answers: {why[:4096] or 'no reason was given'}"


@given(st.binary(max_size=100) | st.from_regex(rb'\{"(inventory|statement|error)":.{0,40}\}\n'))
def test_any_bytes_are_an_answer_or_an_error_of_ours(line: bytes) -> None:
    """No answer brings a rank down."""
    with contextlib.suppress(HandfastError):
        assert read_reply(line, "a test")
