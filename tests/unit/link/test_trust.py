"""Shows that who shares a secret is linked, and nobody else."""

from __future__ import annotations

import hashlib

import pytest
from linkkit import A, B, Side, chance, deliver, pair

from handfast.link.frame import LinkError, Reason
from handfast.link.trust import Secret

TRUSTS = tuple(Secret(b"the secret of one run", name) for name in "ab")
WRONG = tuple(Secret(b"the secret of another", name) for name in "ab")


def test_two_holders_of_the_secret_meet_and_talk() -> None:
    """In both directions, under the highest epoch that both speak, by two keys."""
    one, other = (Side(who, (A, B), trusts=TRUSTS, realm="run") for who in (0, 1))
    for side in (one, other):
        side.do(side.end.begin())
    pair(one, other)
    for side in (one, other):
        side.do(side.end.send("hello"))
    deliver(one, other)
    assert one.got == other.got == [(B.epoch, "hello")]
    assert one.end.session.keys == other.end.session.keys[::-1]
    assert len(set(one.end.session.keys)) == 2


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_wrong_secret_is_refused_by_both_ends(wrong: int) -> None:
    """Whichever of them has it, and nothing follows from what it said."""
    sides = [Side(who, trusts=WRONG if who == wrong else TRUSTS, realm="run") for who in (0, 1)]
    for side in sides:
        side.do(side.end.begin())
    deliver(*sides)
    assert [side.end.refused for side in sides] == [{Reason.SIGNATURE: 1}] * 2
    assert [len(side.disk) for side in sides] == [1, 1]


def test_an_end_of_another_realm_is_refused_by_name_lm_resiliency_77() -> None:
    """Two runs under one secret have nothing to say to each other."""
    one, other = Side(0, trusts=TRUSTS, realm="run-1"), Side(1, trusts=TRUSTS, realm="run-2")
    one.do(one.end.begin())
    with pytest.raises(LinkError, match="realm: an end of 'run-1'; this one is of 'run-2'"):
        other.end.receive(one.out[0])


def test_who_is_not_expected_is_refused_and_so_is_this_end_itself() -> None:
    """A holder of the secret that is no peer; and one's own offer, played back."""
    one, other = Side(0, trusts=TRUSTS), Side(1, trusts=TRUSTS, peers={"c", "d"})
    for side in (one, other):
        side.do(side.end.begin())
        with pytest.raises(LinkError, match=r"peer: '[ab]' is not expected"):
            other.end.receive(side.out[0])


def test_what_was_recorded_opens_nothing_again() -> None:
    """A whole handshake, played to a new connection: its proofs are over other nonces."""
    one, other = Side(0, trusts=TRUSTS), Side(1, trusts=TRUSTS)
    said = []
    for side in (one, other):
        side.do(side.end.begin())
    while one.out or other.out:
        said += one.out
        deliver(one, other)
    for _ in range(3):
        one.do(one.end.session.again())
        said += one.out
        one.out.clear()
    fresh = Side(1, trusts=TRUSTS)
    fresh.do(fresh.end.begin())
    for frame in said:
        fresh.hear(frame)
    assert fresh.opened is None
    assert fresh.end.refused[Reason.SIGNATURE]


def test_a_later_peer_on_one_connection_is_refused() -> None:
    """Several may come to a listener; once one has proved itself, it is that one's."""
    trusts = (*TRUSTS, Secret(b"the secret of one run", "c"))
    listener = Side(1, trusts=trusts, peers={"a", "c"})
    listener.do(listener.end.begin())
    one = Side(0, trusts=trusts)
    one.do(one.end.begin())
    late = Side(0, trusts=(trusts[2], trusts[1]), life=7)
    late.do(late.end.begin())
    offer = late.out[0]
    pair(one, listener)
    assert listener.opened is not None
    with pytest.raises(LinkError, match="peer: 'c' is not expected"):
        listener.end.receive(offer)


def test_lives_of_several_peers_are_kept_apart() -> None:
    """An older life of one is refused, whoever else has spoken on this connection before."""
    trusts = (*TRUSTS, Secret(b"the secret of one run", "c"))
    known = {"c": Side(0, trusts=(trusts[2], trusts[1]), life=9).end.session.offer.node}
    listener = Side(1, trusts=trusts, peers={"a", "c"}, known=known)
    listener.do(listener.end.begin())
    first = Side(0, trusts=trusts, life=3)
    first.do(first.end.begin())
    listener.hear(first.out[0])
    old = Side(0, trusts=(trusts[2], trusts[1]), life=8)
    old.do(old.end.begin())
    with pytest.raises(LinkError, match="incarnation: life 8 of a peer whose life 9"):
        listener.end.receive(old.out[0])


def test_a_secret_that_is_no_secret_is_refused_at_once() -> None:
    """Sixteen bytes at the least."""
    with pytest.raises(ValueError, match="at least 16 bytes, this one 6"):
        Secret(b"secret", "a")


def test_a_handshake_under_a_secret_is_the_same_in_every_release() -> None:
    """Golden: offers, proofs of both roles and frame keys. Agents of two builds rest on them."""
    one, other = (
        Side(who, (A, B), trusts=TRUSTS, realm="run", chance=chance(128 * who)) for who in (0, 1)
    )
    for side in (one, other):
        side.do(side.end.begin())
    said = [one.out[0], other.out[0]]
    one.hear(said[1])
    other.hear(said[0])
    said += [one.out[-1], other.out[-1]]
    pair(one, other)
    assert one.opened is not None
    found = [hashlib.sha256(each).hexdigest()[:32] for each in (*said, *one.end.session.keys)]
    assert found == GOLDEN


GOLDEN = [
    "8d225e6ab683ffc87bbb4addb47f8e47",
    "1e56f7d778cc8da19a9275aa10444f08",
    "810b41fb0940a72f2a55db5062e86c3c",
    "e987919f8b17ec361e55971a3aa3b150",
    "8ec1311047d2b4d73373fd488b2334b4",
    "c4a09529f1eb58c743b681f9dab2cfee",
]
