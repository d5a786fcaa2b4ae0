"""Hold the laws in every state and after every step, and work out each judgement once.

A law is a function of the truth, and most laws read only a part of it. So the laws are sorted by
what they can depend on, and a judgement is remembered under those parts alone:

- of one step (``OF_A_STEP``): the step, and the disk of who took it;
- of two members (``OF_A_PAIR``): what either holds of its recovery, and of its certificate, and
  where there is a tree of votes;
- all others: every journal and disk, the lines that members hold, and of the step what it
  released, what votes it told, and what it published or resumed.

Deeds are not kept from step to step: what was done once stood in the doer's journal (S7 is held
when it is done), so all that a journal allows its domain to do counts as done. A law that is in
none of the lists is held as one of "all others", so a new law is never overlooked.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Final, Generic, TypeVar

import msgspec

from handfast.core import events as ev
from handfast.core import messages as ms
from handfast.core.lattice import Epoch
from handfast.core.membership import Roster
from handfast.core.retain import Keep
from handfast.core.state import Member
from handfast.laws import invariants, steps
from handfast.laws.truth import Truth, Turn, Written
from handfast.model.place import Deed, Image, Place

__all__ = ["Judge", "Table"]

V = TypeVar("V", bound=Hashable)

OF_A_STEP: Final = (*steps.OF_A_STEP, invariants.s14_what_is_corrupt_never_counts)
OF_A_PAIR: Final = (invariants.s9_joins_agree,)
OF_ALL: Final = tuple(
    law
    for law in invariants.ALWAYS
    if law not in OF_A_PAIR and (law not in OF_A_STEP or law.__name__.startswith("s14_"))
)


class Table(Generic[V]):
    """Values by number: equal values have one number, in the order in which they came."""

    __slots__ = ("numbers", "values")

    def __init__(self) -> None:
        self.numbers: dict[V, int] = {}
        self.values: list[V] = []

    def number(self, value: V) -> int:
        """Give the number of a value."""
        number = self.numbers.setdefault(value, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number


class Part(msgspec.Struct, frozen=True):
    """What the laws of all domains can read of one: journal, disk, pins, and lines."""

    records: tuple[ms.Record, ...]
    images: tuple[Image, ...]
    spoilt: tuple[Epoch, ...]
    pins: tuple[Epoch, ...]
    lines: tuple[ms.Certificate | None, ...]


class Seen(msgspec.Struct, frozen=True):
    """What the laws of all domains can read of a step besides what it left behind."""

    who: int
    turn: Turn | None = None
    deeds: tuple[Deed, ...] = ()


class Judge:
    """The laws over the places of a model; ``rosters`` are its configurations, the latest last."""

    def __init__(self, ids: Sequence[str], rosters: Sequence[Roster], keep: Keep) -> None:
        self.ids = tuple(ids)
        self.rosters = tuple(rosters)
        self.keep = keep
        self.parts: Table[Part] = Table()
        self.members: list[Member | None] = []  # of each part, one member that shows it
        self.words: Table[tuple[object, ...]] = Table()
        self.speakers: list[Member | None] = []
        self.seen: Table[Seen] = Table()
        self.judged: dict[tuple[int, ...], str] = {}
        self.paired: dict[tuple[int, int], str] = {}

    def part(self, place: Place) -> int:
        """Number what of a place the laws of all domains can read."""
        member = place.member
        lines = tuple(tally.line for tally in member.tallies) if member is not None else ()
        part = Part(place.records, place.images, place.spoilt, place.pins, lines)
        number = self.parts.number(part)
        if number == len(self.members):
            self.members.append(member)
        return number

    def word(self, place: Place) -> int:
        """Number what of a place the laws of two members can read."""
        member = place.member
        word: tuple[object, ...] = ()
        if member is not None:
            held = member.recovery
            reports = (held.reports, held.accepted) if held is not None else ()
            tree = member.roster is not None and member.roster.tree is not None
            word = (
                member.id, member.generation, member.round, member.open, member.restored, reports,
                member.tallies if tree else (),
            )  # fmt: skip
        number = self.words.number(word)
        if number == len(self.speakers):
            self.speakers.append(member)
        return number

    def step(self, who: int, place: Place, turn: Turn) -> str:
        """Hold the laws of one step; ``place`` is what it left. Gives a breach, or nothing."""
        name = self.ids[who]
        sound = frozenset((name, i.epoch, i.digest) for i in place.images if i.sound)
        truth = Truth(self.rosters, (), sound, members=(turn.after,), turn=turn)
        return _first(invariants.breaches(truth, OF_A_STEP))

    def look(self, who: int, turns: Sequence[Turn], deeds: tuple[Deed, ...]) -> int:
        """Number what else of a step is to be judged together with all domains; 0: nothing."""
        if not self.seen.values:
            self.seen.number(Seen(-1))
        turn = None
        for taken in turns:
            votes = tuple(vote for send in taken.effects.send if (vote := _votes(send)) is not None)
            freed = tuple(r for r in taken.effects.persist if isinstance(r, ms.Released))
            if votes or freed:
                effects = ev.Effects(freed, votes)
                before = taken.before if freed else Member(taken.after.id, 0)
                after = taken.after if freed else before
                turn = Turn(before, ev.Tick(), after, effects, taken.first)
        return self.seen.number(Seen(who, turn, deeds)) if turn is not None or deeds else 0

    def pair(self, one: int, other: int) -> str:
        """Hold the laws of two members, by the numbers of their words."""
        key = (one, other) if one < other else (other, one)
        found = self.paired.get(key)
        if found is None:
            members = tuple(m for m in map(self.speakers.__getitem__, key) if m is not None)
            truth = Truth(self.rosters, (), members=members)
            found = self.paired[key] = _first(invariants.breaches(truth, OF_A_PAIR))
        return found

    def all(self, parts: tuple[int, ...], seen: int, rosters: int) -> str:
        """Hold the laws of all domains, by the numbers of their parts and of what was seen."""
        key = (rosters, seen, *parts)
        found = self.judged.get(key)
        if found is None:
            truth = self.truth(parts, self.ids, rosters)
            if seen:
                truth = self.witness(truth, self.seen.values[seen])
            found = self.judged[key] = _first(invariants.breaches(truth, OF_ALL))
        return found

    def witness(self, truth: Truth, seen: Seen) -> Truth:
        """Add a step to the truth."""
        mine = self.ids[seen.who]
        published = [(mine, deed) for deed in seen.deeds if isinstance(deed, ms.Certificate)]
        resumed = [(mine, deed) for deed in seen.deeds if isinstance(deed, ms.RestoreCertificate)]
        return msgspec.structs.replace(
            truth,
            turn=seen.turn,
            published=(*truth.published, *published),
            resumed=(*truth.resumed, *resumed),
        )

    def truth(self, parts: Sequence[int], ids: Sequence[str], rosters: int | None = None) -> Truth:
        """Put together what is true of places, by the numbers of their parts."""
        held = [(name, self.parts.values[part]) for name, part in zip(ids, parts, strict=True)]
        journal = [Written(name, 0, record) for name, part in held for record in part.records]
        return Truth(
            rosters=self.rosters[:rosters],
            journal=tuple(journal),
            sound=frozenset(
                (name, image.epoch, image.digest)
                for name, part in held
                for image in part.images
                if image.sound
            ),
            spoilt=frozenset((name, epoch) for name, part in held for epoch in part.spoilt),
            published=tuple(
                (w.domain, w.record.certificate) for w in journal
                if isinstance(w.record, ms.Converged)
            ),
            resumed=tuple(
                (w.domain, w.record.certificate) for w in journal
                if isinstance(w.record, ms.Restored)
            ),
            pinned=frozenset((name, epoch) for name, part in held for epoch in part.pins),
            keep=self.keep,
            members=tuple(m for part in parts if (m := self.members[part]) is not None),
        )  # fmt: skip


def _first(found: tuple[str, ...]) -> str:
    return found[0] if found else ""


def _votes(send: ev.Send) -> ev.Send | None:
    """Leave of a message what S1 reads: the votes, and the configuration that numbers them."""
    told = send.message
    staged = tuple(fact for fact in told.facts if isinstance(fact, ms.Staged))
    if not staged and not told.rolled:
        return None
    message = ms.Message(
        0, 0, 0, "", told.configuration, staged, ms.Knows(), rolled=told.rolled
    )  # fmt: skip
    return ev.Send(0, message)
