"""What agents say to each other, by the epochs of their protocol.

====  ==============================================================  ======================
1/1   messages of the protocol: what a rollout of agents begins from  ``[domain, message]``
1/2   and words beside it (:mod:`~handfast.agent.hearsay`)            ``[kind, domain, body]``
====  ==============================================================  ======================

An agent offers two adjacent epochs, so that a fleet's agents can be replaced one by one: each link
speaks the highest that both ends have, and a frame is read by the codec of its own epoch alone. To
an agent that speaks the first alone no word is said. The next epoch takes the place of the first.
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import Final, NamedTuple, TypeVar

import msgspec

from handfast.core.lattice import Epoch
from handfast.errors import UNREADABLE, HandfastError
from handfast.link.end import Codec
from handfast.link.frame import MAX_BODY
from handfast.link.switch import Spoken

__all__ = ["CODECS", "MAX_SAID", "SPOKEN", "Said", "told", "words_at"]

T = TypeVar("T")

MAX_SAID: Final = MAX_BODY - (1 << 12)
"""The most bytes of what is said at once: a frame's, less room for the name of a domain."""


class Said(NamedTuple):
    """What is said to a domain: a message of the protocol, or a word beside it."""

    domain: str
    body: bytes
    word: bool = False


_FIRST: Final = msgspec.msgpack.Decoder(tuple[str, bytes])
_SECOND: Final = msgspec.msgpack.Decoder(tuple[int, str, bytes])


class _Messages:
    """Epoch 1/1."""

    def encode(self, value: Said) -> bytes:
        return msgspec.msgpack.encode((value.domain, value.body))

    def decode(self, body: bytes) -> Said:
        return Said(*_read(body, _FIRST))


class _Words:
    """Epoch 1/2: kind 0 is a message, 1 a word."""

    def encode(self, value: Said) -> bytes:
        return msgspec.msgpack.encode((int(value.word), value.domain, value.body))

    def decode(self, body: bytes) -> Said:
        kind, domain, said = _read(body, _SECOND)
        if kind not in (0, 1):
            raise ValueError(f"kind {kind} is said by no agent of this epoch")
        return Said(domain, said, bool(kind))


def _read(body: bytes, form: msgspec.msgpack.Decoder[T]) -> T:
    try:
        return form.decode(body)
    except UNREADABLE as error:
        raise ValueError(f"nothing that an agent says: {error}") from None


def _spoken(step: int, form: str) -> Spoken:
    """Name an epoch by the form of what is said under it: another form is another bundle."""
    return Spoken(Epoch(1, step), hashlib.sha256(f"handfast.agent {form}".encode()).hexdigest())


SPOKEN: Final = (
    _spoken(1, "[domain, message]"),
    _spoken(2, "[kind, domain, body]: 0 message, 1 word"),
)
"""The epochs that this build of an agent speaks, the base first."""

CODECS: Final[dict[Epoch, Codec]] = dict(
    zip((each.epoch for each in SPOKEN), (_Messages(), _Words()), strict=True)
)


def words_at(epoch: Epoch) -> bool:
    """Say whether an epoch has words, beside the protocol's messages."""
    return epoch > SPOKEN[0].epoch


def told() -> tuple[Spoken, ...]:
    """Read from HANDFAST_SPEAKS which epochs an agent offers: "1", "2", or "1-2", the default.

    To hold a fleet's agents at the first until all are replaced, or to be sure that none is left.
    Raises HandfastError, naming the variable, for what means nothing.
    """
    text = os.environ.get("HANDFAST_SPEAKS") or f"1-{len(SPOKEN)}"
    low, _, high = text.partition("-")
    if re.fullmatch(r"\d(-\d)?", text) and 1 <= int(low) <= int(high or low) <= len(SPOKEN):
        return SPOKEN[int(low) - 1 : int(high or low)]
    raise HandfastError(
        f"HANDFAST_SPEAKS={text!r} names no epochs of the agents' protocol. What to do: set 1, 2 "
        "or 1-2, or leave it unset (1-2)"
    )
