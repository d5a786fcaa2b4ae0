"""Two ends and a network of lists: frames are held until a test delivers them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from handfast.core.lattice import Epoch
from handfast.fleet.identity import Key
from handfast.fleet.link.keyed import Keyed
from handfast.link.end import Effect, End, Opened, Taken
from handfast.link.frame import LinkError
from handfast.link.life import Node
from handfast.link.session import Persist, Record, Send, Session
from handfast.link.switch import Spoken
from handfast.link.trust import Trust

ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")

A = Spoken(Epoch(1, 1), "bundle a")
B = Spoken(Epoch(1, 2), "bundle b")
BACK = Spoken(Epoch(2, 3), "bundle a")


class Words:
    """A codec that writes its epoch's name before each value, and reads no other's."""

    def __init__(self, name: str) -> None:
        self.name = name.encode()

    def encode(self, value: str) -> bytes:
        return self.name + b":" + value.encode()

    def decode(self, body: bytes) -> str:
        name, _, value = body.partition(b":")
        if name != self.name:
            raise ValueError(f"a body of {name!r}")
        return value.decode()


CODECS = {each.epoch: Words(str(each.epoch)) for each in (A, B, BACK)}


def key(number: int) -> Key:
    """A key that is the same in each run."""
    return Key(ed25519.Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


KEYS = (key(1), key(2))
KEYED = tuple(map(Keyed, KEYS))


def chance(number: int) -> Callable[[int], bytes]:
    """No chance at all: for golden vectors."""
    count = [number]

    def bytes_of(length: int) -> bytes:
        count[0] += 16
        return bytes([count[0]]) * length

    return bytes_of


class Side:
    """One end, what it made durable, what it sent and took."""

    def __init__(
        self,
        who: int,
        spoken: tuple[Spoken, ...] = (A,),
        life: int = 1,
        trusts: Sequence[Trust] = KEYED,
        **more: Any,
    ) -> None:
        node = Node(trusts[who].id, f"boot-{life}", life)
        options = {name: more.pop(name) for name in ("known", "chance", "realm") if name in more}
        peers = more.pop("peers", {trusts[1 - who].id})
        session = Session(trusts[who], node, spoken, peers=peers, dialer=who == 0, **options)
        self.end = End(session, CODECS, **more)
        self.disk: list[Record] = []
        self.out: list[bytes] = []
        self.got: list[tuple[Epoch, str]] = []
        self.opened: Opened | None = None
        self.dies_at = -1  # the number of the record that it dies before, or after, writing
        self.writes_last = False

    def do(self, effects: list[Effect]) -> None:
        """Do them in order; one that is dead does nothing more."""
        for effect in effects:
            if isinstance(effect, Persist):
                if len(self.disk) == self.dies_at:
                    if self.writes_last:
                        self.disk.append(effect.record)
                    raise Dead
                self.disk.append(effect.record)
                self.do(self.end.persisted(effect.record))
            elif isinstance(effect, Send):
                self.out.append(effect.frame)
            elif isinstance(effect, Taken):
                self.got.append((effect.epoch, effect.value))
            else:
                self.opened = effect

    def hear(self, frame: bytes) -> None:
        """Receive; what is refused is counted."""
        try:
            effects = self.end.receive(frame)
        except LinkError:
            return
        self.do(effects)


class Dead(Exception):
    """A power cut."""


def pair(one: Side, other: Side, rounds: int = 12) -> None:
    """Deliver and repeat until nothing is said any more."""
    for _ in range(rounds):
        deliver(one, other)
        for side in (one, other):
            side.do(side.end.again())
        if not one.out and not other.out:
            return
    raise RuntimeError("they never fall silent")


def deliver(one: Side, other: Side) -> None:
    """Deliver all that is under way, in order, without repeating anything."""
    while one.out or other.out:
        for here, there in ((one, other), (other, one)):
            frames, here.out = here.out, []
            for frame in frames:
                there.hear(frame)


def linked(spoken: tuple[Spoken, ...] = (A,)) -> tuple[Side, Side]:
    """Two ends of an open link, with nothing under way."""
    sides = Side(0, spoken), Side(1, spoken)
    for side in sides:
        side.do(side.end.begin())
    pair(*sides)
    return sides
