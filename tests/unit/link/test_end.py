"""Shows that no codec is asked of a frame that is refused: no byte of its body is parsed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from linkkit import CODECS, A, B, Side, Words, linked

from handfast.link import switch as sw
from handfast.link.frame import Kind, LinkError, Reason, seal


class Counted(Words):
    """A codec that keeps what it was asked to read."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.asked: list[bytes] = []

    def decode(self, body: bytes) -> str:
        self.asked.append(body)
        return super().decode(body)


def counted() -> tuple[Side, Side, list[Counted]]:
    """An open link, and the codecs of its second end."""
    one, other = linked()
    codecs = {epoch: Counted(str(epoch)) for epoch in CODECS}
    other.end.codecs = codecs
    return one, other, list(codecs.values())


def test_no_codec_is_asked_of_a_frame_with_a_wrong_bit() -> None:
    """Any bit of the header or the body; then the sound frame is read, and that only once."""
    one, other, codecs = counted()
    one.do(one.end.send("sound"))
    (frame,) = one.out
    for at in range(len(frame) * 8):
        hurt = bytearray(frame)
        hurt[at // 8] ^= 1 << at % 8
        with pytest.raises(LinkError):
            other.end.receive(bytes(hurt))
    assert [codec.asked for codec in codecs] == [[], [], []]
    for _ in range(2):
        other.hear(frame)
    assert [codec.asked for codec in codecs] == [[b"1/1:sound"], [], []]
    assert other.end.refused[Reason.LATE] == 1


def early(one: Side) -> bytes:
    """An epoch that nobody has promised to take."""
    assert one.end.switch is not None
    one.end.switch = sw.turn(sw.accepted(sw.ask(one.end.switch, B)), 0)
    one.do(one.end.send("early"))
    return one.out.pop()


def strange(one: Side) -> bytes:
    """The session's key, and an epoch that there is no codec for."""
    session = one.end.session
    epoch = type(A.epoch)(9, 9)
    named = {"session": session.bound.session, "epoch": epoch, "sequence": 99}
    return seal(session.keys[0], Kind.DATA, b"9/9:x", **named)


@pytest.mark.parametrize("made", [early, strange])
def test_no_codec_is_asked_of_an_authentic_frame_of_another_epoch(
    made: Callable[[Side], bytes],
) -> None:
    """Its MAC is right: it is its epoch that is not taken."""
    one, other, codecs = counted()
    with pytest.raises(LinkError, match="epoch"):
        other.end.receive(made(one))
    assert [codec.asked for codec in codecs] == [[], [], []]
