"""Shows how one end goes through a change of epoch, and what it refuses on the way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from linkkit import BACK, A, B

from handfast.core.lattice import Epoch
from handfast.errors import Refused
from handfast.link import switch as sw
from handfast.link.frame import LinkError, Reason
from handfast.link.switch import Phase, Spoken, Word
from handfast.link.window import SPAN, Window

OTHER_B = Spoken(B.epoch, "bundle x")


def word(number: int = 1, **fields: object) -> Word:
    """A word of a peer that speaks A and has heard nothing."""
    said = {"heard": 0, "now": A, "next": None, "sending": A.epoch, "last": -1, "asks": True}
    return Word(number, **{**said, **fields})  # of the fields given


def test_the_phases_come_in_their_order() -> None:
    """Neither both before it is durable, nor new before the peer's promise, nor new-only early."""
    state = sw.ask(sw.begin(A), B)
    assert sw.phase(state) is Phase.OLD
    assert not sw.takes(state, B.epoch)
    assert sw.says(state).next is None
    state = sw.accepted(state)
    assert sw.phase(state) is Phase.BOTH
    assert sw.takes(state, A.epoch)
    assert sw.takes(state, B.epoch)
    assert not sw.may_turn(state)
    state = sw.hear(state, word())
    assert not sw.may_turn(state)
    state = sw.hear(state, word(2, next=B))
    assert sw.may_turn(state)
    state = sw.turn(state, last=9)
    assert not sw.may_turn(state)
    assert sw.phase(state) is Phase.TURNED
    assert (sw.says(state).sending, sw.says(state).last) == (B.epoch, 9)
    assert not sw.may_close(state, settled=100)
    state = sw.hear(state, word(3, next=B, sending=B.epoch, last=4))
    assert not sw.may_close(state, settled=4)
    assert sw.may_close(state, settled=5)
    state = sw.closed(state)
    assert not sw.takes(state, A.epoch)
    assert sw.takes(state, B.epoch)
    assert sw.phase(state) is Phase.NEW
    state = sw.hear(state, word(4, now=B, sending=B.epoch, last=4))
    assert sw.phase(state) is Phase.OLD


def test_an_old_word_changes_nothing() -> None:
    """Doubled and overtaken words are as if they had not come."""
    state = sw.hear(sw.begin(A), word(3, heard=1))
    for each in (word(3, heard=1), word(3), word(2, next=B)):
        assert sw.hear(state, each) is state
    assert not sw.unheard(state)
    assert sw.unheard(sw.begin(A))


def test_a_number_is_never_used_again() -> None:
    """Neither the one spoken, nor a lower one; a rollback goes up."""
    state = sw.begin(B)
    for to in (A, B, OTHER_B):
        with pytest.raises(Refused, match="a rollback goes up"):
            sw.ask(state, to)
    asked = sw.ask(state, BACK)
    with pytest.raises(Refused, match="is not over"):
        sw.ask(asked, Spoken(Epoch(3, 1), "bundle c"))
    with pytest.raises(LinkError, match="used before"):
        sw.hear(state, word(now=B, next=A, sending=B.epoch))
    with pytest.raises(RuntimeError):
        sw.turn(state, 0)
    with pytest.raises(RuntimeError):
        sw.closed(state)


def test_one_number_for_two_bundles_is_refused() -> None:
    """In a handshake as on an open link, whatever else is in common."""
    with pytest.raises(LinkError) as caught:
        sw.choose((A, B), (A, OTHER_B))
    assert caught.value.reason is Reason.DIGEST
    with pytest.raises(LinkError, match="bundle b here and bundle x"):
        sw.hear(sw.ask(sw.begin(A), B), word(next=OTHER_B))


def test_the_highest_in_common_is_chosen() -> None:
    """The same by both ends; and where there is none, both are named."""
    assert sw.choose((A, B), (A, B)) == B
    assert sw.choose((A, B), (A,)) == A
    assert sw.choose((B, BACK), (A, B)) == sw.choose((A, B), (B, BACK)) == B
    with pytest.raises(LinkError, match=r"the peer speaks 1/2, this end 1/1"):
        sw.choose((A,), (B,))


# Sequence numbers


@given(st.lists(st.one_of(st.integers(0, 40), st.integers(0, 3 * SPAN)), max_size=200))
def test_each_number_is_taken_once(numbers: list[int]) -> None:
    """Against a plain set: taken once, or too late; the floor is below all that may still come."""
    window, taken = Window(), set()
    for number in numbers:
        newest = max(taken, default=-1)
        refused = None
        try:
            window.check(number)
        except LinkError as error:
            refused = error.reason
        if refused is None:
            assert number not in taken
            window.take(number)
            taken.add(number)
        else:
            assert number in taken or number <= newest - SPAN
            assert refused in (Reason.REPLAYED, Reason.LATE)
    assert window.floor not in taken
    assert window.lost == len(set(range(window.floor)) - taken)


def test_what_does_not_come_is_given_up() -> None:
    """By its reader, or by what is far ahead: it is counted, and never taken later."""
    window = Window()
    for number in (0, 1, 4):
        window.take(number)
    assert window.floor == 2
    window.give_up(2)
    window.give_up(1)
    assert (window.floor, window.lost) == (3, 1)
    window.give_up(3)
    assert (window.floor, window.lost) == (5, 2)
    window.take(5 + SPAN)
    assert window.floor == 6
    window.take(10 * SPAN)
    assert window.floor == 9 * SPAN + 1
    with pytest.raises(LinkError, match="late"):
        window.check(7)
