"""Shows that two ends of a link agree, whatever becomes of single messages and in each crash."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linkkit import BACK, CODECS, KEYS, A, B, Dead, Side, Words, chance, deliver, linked, pair

from handfast.errors import HandfastError, Refused
from handfast.fleet.link.keyed import Keyed
from handfast.link import switch as sw
from handfast.link.frame import HEADER, MAX_BODY, NO_KEY, Kind, LinkError, Reason, seal, whole
from handfast.link.life import Node
from handfast.link.records import recall
from handfast.link.session import Bound, Offered, Send, Session, Taking
from handfast.link.switch import Phase, Spoken

Fault = Callable[[list[bytes], int], list[bytes]]


def lost(frames: list[bytes], at: int) -> list[bytes]:
    return frames[:at] + frames[at + 1 :]


def doubled(frames: list[bytes], at: int) -> list[bytes]:
    return [*frames[: at + 1], frames[at], *frames[at + 1 :]]


def late(frames: list[bytes], at: int) -> list[bytes]:
    return [*frames[:at], *frames[at + 1 :], frames[at]]


def flipped(frames: list[bytes], at: int) -> list[bytes]:
    hurt = bytearray(frames[at])
    hurt[len(hurt) * 2 // 3] ^= 16
    return [*frames[:at], bytes(hurt), *frames[at + 1 :]]


class Air:
    """A network that counts its frames, and does something to the at-th."""

    def __init__(self, sides: tuple[Side, Side], fault: Fault | None = None, at: int = -1) -> None:
        self.sides, self.fault, self.at = sides, fault, at
        self.heard: list[bytes] = []

    def deliver(self) -> None:
        """Deliver all that is under way, in order."""
        while any(side.out for side in self.sides):
            for here, there in (self.sides, self.sides[::-1]):
                frames, here.out = here.out, []
                at = self.at - len(self.heard)
                self.heard += frames
                if self.fault is not None and 0 <= at < len(frames):
                    frames = self.fault(frames, at)
                for frame in frames:
                    there.hear(frame)

    def settle(self) -> None:
        """Deliver, repeat and give up until nothing is said any more."""
        for _ in range(12):
            self.deliver()
            for side in self.sides:
                side.do(side.end.again())
                if side.end.draining:
                    side.do(side.end.give_up())
            if not any(side.out for side in self.sides):
                return
        raise RuntimeError("they never fall silent")


def life(fault: Fault | None = None, at: int = -1) -> tuple[Side, Side, int]:
    """A link's whole life, handshake, upgrade and rollback, with a fault at the at-th frame."""
    sides = Side(0), Side(1)
    air = Air(sides, fault, at)
    for side in sides:
        side.do(side.end.begin())
    air.settle()
    for to in (B, BACK):
        for side in sides:
            side.do(side.end.send(f"before {to.epoch}"))
            side.do(side.end.change(to))
        air.settle()
    return *sides, len(air.heard)


def agree(one: Side, other: Side) -> bool:
    """Whether both ends are open in one session, under one epoch, and know it."""
    states = [side.end.switch for side in (one, other)]
    if None in states or one.opened != other.opened:
        return False
    keys = one.end.session.keys == other.end.session.keys[::-1]
    return keys and states[0].now == states[1].now and not any(map(sw.unheard, states))


FRAMES = life()[2]


@pytest.mark.parametrize("fault", [lost, doubled, late, flipped])
def test_any_single_message_may_fail(fault: Fault) -> None:
    """Each frame of a handshake, an upgrade and a rollback: both come through, by repeating."""
    assert FRAMES > 15
    for at in range(FRAMES):
        one, other, _ = life(fault, at)
        assert agree(one, other), at
        assert one.end.switch is not None
        assert one.end.switch.now == BACK
        for side in (one, other):
            assert [epoch for epoch, _ in side.got] in (
                [A.epoch, B.epoch], [A.epoch], [B.epoch],
            )  # fmt: skip
            assert len(set(side.got)) == len(side.got)


def test_frames_of_another_session_are_refused() -> None:
    """Every frame that two other lives said, played to both ends at each moment of theirs."""
    old = Side(0), Side(1)
    air = Air(old)
    for side in old:
        side.do(side.end.begin())
    air.deliver()
    old[0].do(old[0].end.send("past"))
    heard = air.heard + old[0].out
    for moment in range(8):
        one, other = Side(0, life=2), Side(1, life=2)
        for side in (one, other):
            side.do(side.end.begin())
        for _ in range(moment):
            for here, there in ((one, other), (other, one)):
                there.hear(here.out.pop(0)) if here.out else None
        for frame in heard:
            one.hear(frame)
            other.hear(frame)
        pair(one, other)
        assert agree(one, other)
        assert one.opened != old[0].opened
        assert not one.got
        assert not other.got
        for side, peer in ((one, other), (other, one)):
            assert side.end.session.bound.theirs == peer.end.session.offer.node


def test_every_end_has_made_durable_what_it_says() -> None:
    """Offered before the offer, Bound before the proof, Taking before the word."""
    side = Side(0)
    (first,) = side.end.begin()
    assert not side.end.again()
    side.do([first])
    assert [whole(frame).kind for frame in side.out] == [Kind.OFFER]
    one, other = linked()
    for each in (one, other):
        assert [type(record) for record in each.disk] == [Offered, Bound]
    one.do(one.end.change(B))
    other.do(other.end.change(B))
    pair(one, other)
    session = one.end.session.bound.session
    assert one.disk[2:] == [Taking(session, (A, B)), Taking(session, (B,))]
    assert recall(one.disk) == ((B,), {KEYS[1].id: other.end.session.offer.node})
    assert recall([]) == ((), {})
    assert one.end.persisted(one.disk[0]) == []
    assert one.end.persisted(one.disk[2]) == []


def upgrade(one: Side, other: Side) -> None:
    """Shake hands under A, and change to B."""
    for side in (one, other):
        side.do(side.end.begin())
    pair(one, other)
    for side in (one, other):
        side.do(side.end.change(B))
    pair(one, other)


@pytest.mark.parametrize("writes_last", [False, True])
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("at", range(4))
def test_a_crash_at_each_record_is_survived(at: int, who: int, writes_last: bool) -> None:
    """Before and after the write: nothing false was said, and the next life talks again."""
    sides = [Side(0), Side(1)]
    sides[who].dies_at, sides[who].writes_last = at, writes_last
    with pytest.raises(Dead):
        upgrade(*sides)
    dead, peer = sides[who], sides[1 - who]
    if not peer.disk:
        peer.do(peer.end.begin())
    for frame in dead.out:
        peer.hear(frame)
    if peer.end.switch is not None and peer.end.switch.sending == B.epoch:
        assert B in recall(dead.disk)[0]
    spoken, known = recall(dead.disk)
    born = Side(who, spoken or (A,), life=2, known=known)
    born.do(born.end.begin())
    peer.hear(born.out[0])
    assert peer.end.refused[Reason.ANEW] == (peer.opened is not None)
    if peer.opened:
        spoken, known = recall(peer.disk)
        peer = Side(1 - who, spoken, life=2, known=known)
        peer.do(peer.end.begin())
    pair(*sorted((born, peer), key=lambda side: side.end.session.offer.node.key != KEYS[0].id))
    assert agree(born, peer)


def test_a_past_life_and_a_twin_are_refused() -> None:
    """Once a life of the peer was heard, no earlier one; nor two boots under one number."""
    for number, boot in ((1, "boot-1"), (2, "another")):
        old = Side(0, life=number)
        if boot == "another":
            node = Node(KEYS[0].id, boot, 2)
            old.end.session = Session(Keyed(KEYS[0]), node, (A,), peers={KEYS[1].id}, dialer=True)
        old.do(old.end.begin())
        new = Side(1, known={KEYS[0].id: Node(KEYS[0].id, "boot-2", 2)})
        with pytest.raises(LinkError, match="incarnation"):
            new.end.receive(old.out[0])
        assert new.end.refused == {Reason.INCARNATION: 1}


def test_a_stripped_or_forged_offer_is_refused() -> None:
    """The successor taken out on the way: no signature, so no downgrade. Nor another's key."""
    one, other = Side(0, (A, B)), Side(1, (A, B))
    one.do(one.end.begin())
    other.do(other.end.begin())
    raw, signature = msgspec.msgpack.decode(one.out[0][HEADER:])
    offer = msgspec.msgpack.decode(raw)
    for changes in (
        {"successor": None},
        {"nonce": bytes(32)},
        {"share": bytes(32)},
        {"realm": "x"},
    ):
        body = msgspec.msgpack.encode([msgspec.msgpack.encode(offer | changes), signature])
        for kind in (Kind.OFFER, Kind.PROOF):
            with pytest.raises(LinkError, match="realm" if "realm" in changes else "signature"):
                other.end.receive(seal(NO_KEY, kind, body))
    with pytest.raises(LinkError, match="peer"):
        other.end.receive(other.out[0])
    for bad in (b"", b"\xc1", msgspec.msgpack.encode([b"", b""]), msgspec.msgpack.encode(7)):
        with pytest.raises(LinkError, match="malformed"):
            other.end.receive(seal(NO_KEY, Kind.OFFER, bad))
    pair(one, other)
    assert one.opened is not None
    assert one.opened.spoken == B


def signed(who: int, over: bytes, offer: object) -> bytes:
    """A frame of the node's own hand, whatever it says."""
    raw = msgspec.msgpack.encode(offer)
    body = msgspec.msgpack.encode([raw, KEYS[who].sign(over + raw)])
    return seal(NO_KEY, Kind.OFFER, body)


def test_a_peer_that_signs_nonsense_is_refused() -> None:
    """Its signature is right, and what it offers can't be."""
    one, other = Side(0, (A, B)), Side(1)
    other.do(other.end.begin())
    offer = one.end.session.offer
    for changes in (
        {"nonce": b"short"}, {"share": b""}, {"successor": A}, {"share": bytes(32)},
    ):  # fmt: skip
        frame = signed(0, b"handfast.link.offer/1\n", msgspec.structs.replace(offer, **changes))
        with pytest.raises(LinkError, match="malformed"):
            other.end.receive(frame)
    one.do(one.end.begin())
    pair(one, other)
    assert agree(one, other)
    twin = Side(0, (A, B))
    twin.do(twin.end.begin())
    with pytest.raises(LinkError, match="another session with this life"):
        other.end.receive(twin.out[0])


def test_offers_and_proofs_may_come_before_this_end_is_durable() -> None:
    """An offer waits; a proof over what was never said is nobody's."""
    one, other = Side(0), Side(1)
    other.do(other.end.begin())
    (waits,) = one.end.begin()
    one.hear(other.out[0])
    assert not one.out
    one.do([waits])
    assert [whole(frame).kind for frame in one.out] == [Kind.OFFER, Kind.PROOF]
    pair(one, other)
    assert agree(one, other)
    proof = other.end.session.again()[0].frame  # it is a Send
    fresh = Side(0)
    fresh.hear(proof)
    assert fresh.end.refused == {Reason.SIGNATURE: 1}


def test_without_the_extra_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handshake takes a package that the core does not need."""
    name = "cryptography.hazmat.primitives.asymmetric.x25519"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(HandfastError, match=r"pip install 'handfast\[fleet\]'"):
        Side(0)


def test_a_word_that_cannot_be_read_is_refused() -> None:
    """With a right MAC: of a peer whose program is wrong."""
    one, other = linked()
    session = one.end.session
    frame = seal(session.keys[0], Kind.WORD, b"\xc1", session=session.bound.session, sequence=99)
    with pytest.raises(LinkError, match="malformed"):
        other.end.receive(frame)


def test_no_epoch_in_common_is_no_link() -> None:
    """Nor one number for two bundles; the reason is counted on both sides."""
    for theirs, reason in (((B,), Reason.EPOCH), ((Spoken(A.epoch, "x"), B), Reason.DIGEST)):
        one, other = Side(0, (A,)), Side(1, theirs)
        for side in (one, other):
            side.do(side.end.begin())
        deliver(one, other)
        assert one.opened is other.opened is None
        assert one.end.refused == other.end.refused == {reason: 1}


def test_what_is_offered_must_make_sense() -> None:
    """Epochs in order, at most two, a codec for each; the node must be the key's."""
    node = Node(KEYS[0].id, "boot", 1)
    for spoken in ((), (B, A), (A, A), (A, B, BACK)):
        with pytest.raises(ValueError, match="a base and at most one successor"):
            Session(Keyed(KEYS[0]), node, spoken, peers={KEYS[1].id}, dialer=True)
    with pytest.raises(ValueError, match="this key's node"):
        Session(Keyed(KEYS[1]), node, (A,), peers={KEYS[1].id}, dialer=True)
    with pytest.raises(ValueError, match="no codec for epoch 9/9"):
        Side(0, (Spoken(type(A.epoch)(9, 9), "z"),))
    with pytest.raises(RuntimeError, match="wait for Opened"):
        Side(0).end.send("early")
    with pytest.raises(RuntimeError, match="no offer"):
        _ = Side(0).end.session.bound


# An open link


def test_a_frame_goes_to_the_codec_of_its_epoch() -> None:
    """Old frames that come after the change was begun are read by the old codec."""
    one, other = linked()
    for value in ("first", "second"):
        one.do(one.end.send(value))
    slow, one.out = one.out, []
    for side in (one, other):
        side.do(side.end.change(B))
    deliver(one, other)
    assert one.end.switch is not None
    assert sw.phase(one.end.switch) is Phase.NEW
    assert other.end.switch is not None
    assert sw.phase(other.end.switch) is Phase.TURNED
    assert other.end.draining
    one.do(one.end.send("third"))
    one.out += slow
    pair(one, other)
    assert other.got == [(B.epoch, "third"), (A.epoch, "first"), (A.epoch, "second")]
    assert agree(one, other)


def test_what_was_given_up_is_not_read_later() -> None:
    """A change goes on without lost data; should it come after all, it is refused and counted."""
    one, other = linked()
    one.do(one.end.send("lost"))
    (slow,) = one.out
    one.out.clear()
    for side in (one, other):
        side.do(side.end.change(B))
    pair(one, other)
    assert other.end.give_up()
    pair(one, other)
    assert other.end.window.lost == 1
    other.hear(slow)
    assert other.got == []
    assert other.end.refused == {Reason.LATE: 1}


def test_a_frame_outside_the_pair_is_refused_and_counted() -> None:
    """Of the peer's own hand: a right MAC, and an epoch that nobody promised to take."""
    one, other = linked()
    assert one.end.switch is not None
    one.end.switch = sw.turn(sw.accepted(sw.ask(one.end.switch, B)), 0)
    one.do(one.end.send("too early"))
    other.hear(one.out.pop())
    assert other.end.refused == {Reason.EPOCH: 1}
    assert other.got == []


def test_data_that_its_codec_cannot_read_is_refused() -> None:
    """Counted by its reason, and the link goes on; a value is taken once."""
    one, other = linked()
    other.end.codecs = CODECS | {A.epoch: Words("other")}
    one.do(one.end.send("strange"))
    other.hear(one.out.pop())
    other.end.codecs = CODECS
    one.do(one.end.send("sound"))
    (frame,) = one.out
    for _ in range(2):
        other.hear(frame)
    assert other.got == [(A.epoch, "sound")]
    assert other.end.refused == {Reason.CODEC: 1, Reason.LATE: 1}


def test_a_single_stack_takes_the_link_down_between() -> None:
    """It refuses to change an open link; the next handshake is under the successor alone."""
    one, other = Side(0, single=True), Side(1)
    for side in (one, other):
        side.do(side.end.begin())
    pair(one, other)
    with pytest.raises(Refused, match=r"one epoch at a time.*take the link down"):
        one.end.change(B)
    again = Side(0, (B,), life=2, single=True), Side(1, (A, B), life=2)
    for side in again:
        side.do(side.end.begin())
    pair(*again)
    assert agree(*again)
    assert again[1].opened is not None
    assert again[1].opened.spoken == B


def test_bounds_hold_on_what_is_sent() -> None:
    """Values above the bound, and epochs without a codec."""
    one, _ = linked()
    with pytest.raises(ValueError, match="no codec for epoch 9/9"):
        one.end.change(Spoken(type(A.epoch)(9, 9), "z"))
    with pytest.raises(ValueError, match="this link's bound"):
        one.end.send("x" * (1 << 20))
    with pytest.raises(ValueError, match="at most"):
        seal(NO_KEY, Kind.DATA, bytes(MAX_BODY + 1))


def test_a_session_is_the_same_in_every_release() -> None:
    """Golden: keys, nonces and lives given, the transcript and what comes of it are these."""
    one, other = Side(0, (A, B), chance=chance(0)), Side(1, (A, B), chance=chance(128))
    for side in (one, other):
        side.do(side.end.begin())
    offer = one.out[0]
    pair(one, other)
    assert one.opened is not None
    assert hashlib.sha256(offer).hexdigest() == OFFERED
    assert one.opened.session.hex() == SESSION
    assert hashlib.sha256(b"".join(one.end.session.keys)).hexdigest() == FRAME_KEYS


OFFERED = "8656c3fcf627211c40aeaad109122c1a32681187d7a8a1cd111d689e93dd1cb7"
SESSION = "44300c39b7105787860d9af8d4d0bf63"
FRAME_KEYS = "9d188e4f7e1d62fe07b3cc114b0fea7fc854f3ab2f3c809dae04e253ee6919bf"


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_noise_changes_nothing(data: st.DataObject) -> None:
    """Bytes, and frames with bytes changed, to an open end: refused by reason, and it goes on."""
    one, other = _LINK
    frame = one.end.send("sound")[0].frame  # it is a Send
    hurt = bytearray(frame)
    for _ in range(data.draw(st.integers(1, 4))):
        hurt[data.draw(st.integers(0, len(hurt) - 1))] ^= data.draw(st.integers(1, 255))
    before, refused = other.end.switch, other.end.refused.total()
    for noise in (bytes(hurt), data.draw(st.binary(max_size=120))):
        if noise != frame:
            with pytest.raises(LinkError):
                other.end.receive(noise)
            refused += 1
    assert (other.end.switch, other.end.refused.total()) == (before, refused)
    other.hear(frame)
    assert other.got.pop() == (A.epoch, "sound")


_LINK = linked()


def test_a_later_life_that_was_bound_meanwhile_ends_an_older_ones_handshake() -> None:
    """Two connections at once: the successor's is through first, and is known from then on."""
    known: dict[str, Node] = {}
    old, new = Side(0, life=1), Side(0, life=2)
    sides = [Side(1, known=known), Side(1, known=known)]
    for side in (old, new, *sides):
        side.do(side.end.begin())
    (waits,) = sides[0].end.receive(old.out[0])  # its record is not durable yet
    pair(new, sides[1])
    assert sides[1].opened is not None
    known[KEYS[0].id] = new.end.session.offer.node
    with pytest.raises(LinkError, match="incarnation: life 1 of a peer whose life 2"):
        sides[0].end.persisted(waits.record)  # it is a Persist
    assert sides[0].end.refused == {Reason.INCARNATION: 1}
    assert not sides[0].end.session.open


def test_a_proof_that_comes_before_its_offer_is_bound_before_it_is_answered() -> None:
    """Over datagrams: nothing is open until the record of it is durable."""
    one, other = Side(0), Side(1)
    for side in (one, other):
        side.do(side.end.begin())
    one.hear(other.out[0])
    proof = one.out[-1]
    assert whole(proof).kind is Kind.PROOF
    effects = other.end.receive(proof)
    assert [type(effect).__name__ for effect in effects] == ["Persist"]
    assert other.end.switch is None
    other.do(effects)
    assert isinstance(other.disk[-1], Bound)
    assert other.opened is not None


def test_another_offer_before_a_proof_is_bound_anew() -> None:
    """The first one's record says nothing of the second: no proof goes out without its own."""
    trusts = (Keyed(KEYS[0]), Keyed(KEYS[1]))
    first, second, other = Side(0, trusts=trusts), Side(0, trusts=trusts), Side(1, trusts=trusts)
    for side in (first, second, other):
        side.do(side.end.begin())
    other.hear(first.out[0])
    assert len(other.disk) == 2
    effects = other.end.receive(second.out[0])
    assert [type(effect).__name__ for effect in effects] == ["Persist"]
    said = [whole(each.frame).kind for each in other.end.session.again() if isinstance(each, Send)]
    assert said == [Kind.OFFER]


def test_frames_of_another_session_have_their_reason() -> None:
    """With the right key even: the session is looked at before the MAC."""
    one, other = linked()
    frame = bytearray(one.end.send("x")[0].frame)  # it is a Send
    frame[24] ^= 1
    with pytest.raises(LinkError, match="session"):
        other.end.receive(bytes(frame))
    assert other.end.refused == {Reason.SESSION: 1}


def test_an_end_tells_how_much_it_reads_and_under_what_it_speaks() -> None:
    """Of a peer that has proved nothing yet, little."""
    one, _ = linked()
    fresh = Side(0, most=1 << 16)
    assert (fresh.end.bound, one.end.bound) == (4096, 1 << 20)
    assert one.end.sending == A.epoch
    with pytest.raises(RuntimeError, match="wait for Opened"):
        _ = fresh.end.sending
