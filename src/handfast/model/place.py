"""One domain of the searched protocol: its journal, its disk, its agent's member, and its rank.

What can happen to one domain alone is worked out here with the real ``boot`` and ``step``, and
nothing of the protocol is written a second time: which events there are, in which order effects
are carried out, and where among them a crash may fall. :mod:`handfast.model.protocol` puts such
domains together.

The world's side of it, and what it leaves out on purpose:

- A crash may cut a batch of effects anywhere: among the records (those before are durable, those
  behind are not), among the sends, among the applies. Whatever had not been done is never done.
- Whoever crashes boots at once, as the next incarnation. A domain that stays down does nothing
  that one which is up could not leave undone, what was sent to it waits, and all that a boot
  looks at is its own journal and disk; so the time in between hides no behaviour.
- Trainers never die: one that does nothing any more is as good as dead, and one of an old round
  that does is the one that woke up late. For the same reason every round is there from the
  start, and its ranks begin when they like.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from handfast.core import events as ev
from handfast.core import member as door
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.membership import Change, Roster, bits
from handfast.core.messages import Certificate, Lost, Record, RestoreCertificate, Skipped, Staged
from handfast.core.retain import Keep
from handfast.core.state import Member
from handfast.laws.truth import Turn

__all__ = ["FAULTS", "Bounds", "Deed", "Errand", "Image", "Place", "Round", "Rules", "Taken"]

_replace = msgspec.structs.replace

Deed = Certificate | RestoreCertificate
"""What was published, or resumed from."""


class Bounds(msgspec.Struct, frozen=True):
    """How often each thing may happen in one run; what has no bound here is free.

    ``epochs`` a rank saves in one round, in the last one beyond those that were lost on the way;
    ``lives`` each domain has. The others count over the whole run: ``crashes``; ``early`` ticks,
    while something else could still happen; ``losses``, ``overtakes`` and ``echoes`` of messages
    (see :mod:`handfast.model.protocol`); ``agains``, links that come up anew and trainers that
    begin once more; ``repeats``, ranks that save a step again, or the one that they were restored
    from; ``rots``, copies damaged or vanished; ``misreads``, sound copies that could not be read
    once, which is taken for a loss; ``skips`` and ``failures`` to save; ``declines`` by a rank
    (neither these nor misreads in the last round, which they would end); ``pins`` of readers;
    ``ghosts``, agents that were frozen and wake up behind their successors; ``changes`` of the
    configuration.
    """

    epochs: int = 1
    lives: int = 2
    crashes: int = 0
    early: int = 0
    losses: int = 0
    overtakes: int = 0
    echoes: int = 0
    agains: int = 0
    repeats: int = 0
    rots: int = 0
    misreads: int = 0
    skips: int = 0
    failures: int = 0
    declines: int = 0
    pins: int = 0
    ghosts: int = 0
    changes: int = 0


FAULTS: Final = tuple(name for name in Bounds.__struct_fields__ if name not in ("epochs", "lives"))
"""What is counted over a whole run."""


class Round(msgspec.Struct, frozen=True):
    """One start of the job; ``changes`` are those that its engine had recorded by then."""

    name: str
    generation: int
    roster: Roster
    founding: bool = True
    changes: tuple[Change, ...] = ()
    want: int | None = None


class Rules(msgspec.Struct, frozen=True):
    """What is the same in every state: the rounds, the last of them the calm one's, and bounds.

    ``alike``: digests say nothing of who wrote an image, as a symmetry of domains demands.
    ``apart``: whoever crashed stays down until it boots, in a move of its own.
    """

    rounds: tuple[Round, ...]
    bounds: Bounds
    keep: Keep = Keep(1)
    window: int = 2
    alike: bool = False
    apart: bool = False


class Image(msgspec.Struct, frozen=True, array_like=True):
    """One image on a domain's disk."""

    epoch: Epoch
    digest: str
    sound: bool = True


class Place(msgspec.Struct, frozen=True):
    """One domain. Without a member it is not there yet, or was fenced and never acts again.

    ``spoilt`` are its attested copies that were damaged or lost, ``trainers[r]`` is the base and
    the last step of its rank in round r, once that resumed; ``fresh`` until the first step of a
    life; ``ghost`` is the member of a past incarnation that may still wake up; ``down``: it crashed
    and has not booted.
    """

    id: str
    incarnation: int = 0
    member: Member | None = None
    records: tuple[Record, ...] = ()
    images: tuple[Image, ...] = ()
    spoilt: tuple[Epoch, ...] = ()
    todo: tuple[ev.Action, ...] = ()
    trainers: tuple[tuple[int, int] | None, ...] = ()
    pins: tuple[Epoch, ...] = ()
    fresh: bool = True
    ghost: Member | None = None
    down: bool = False

    def image(self, epoch: Epoch) -> Image | None:
        """Find the image of an epoch on the disk."""
        return next((image for image in self.images if image.epoch == epoch), None)

    def attested(self, epoch: Epoch) -> bool:
        """Say whether the journal holds the vote STAGED on an epoch."""
        return any(isinstance(r, Staged) and r.epoch == epoch for r in self.records)

    def handed(self, epoch: Epoch) -> bool:
        """Say whether an epoch was voted on, or is being persisted."""
        voted = any(isinstance(r, Staged | Skipped) and r.epoch == epoch for r in self.records)
        return voted or ev.Persist(epoch) in self.todo


class Errand(msgspec.Struct, frozen=True):
    """Something that can happen to a place: what its disk and rank are by then, and the event.

    ``faults`` are what it spends; ``what`` is said in a trace where there is no event; ``step``
    is how many steps a rank of the last round has gone beyond its base, if that is what it does.
    """

    place: Place
    event: ev.Event | None = None
    faults: tuple[str, ...] = ()
    what: str = ""
    step: int = 0
    calm: bool = True
    ghost: bool = False


class Taken(msgspec.Struct, frozen=True):
    """A place after an errand, what it sent, its turns, and what was done; ``cut``: a crash."""

    place: Place
    sends: tuple[ev.Send, ...] = ()
    turns: tuple[Turn, ...] = ()
    deeds: tuple[Deed, ...] = ()
    cut: int | None = None


def boot(rules: Rules, place: Place) -> Taken:
    """Boot the next incarnation from journal and disk; readers' pins are read at once, unless
    pins are part of what is searched."""
    number = place.incarnation + 1
    held = door.boot(place.id, number, place.records).retained
    lost = tuple(
        Lost(copy.epoch, "missing")
        for copy in held
        if copy.epoch != GENESIS and place.image(copy.epoch) is None
    )
    member = door.boot(place.id, number, place.records, lost)
    up = _replace(place, incarnation=number, member=member, todo=(), fresh=True, down=False)
    return Taken(up) if rules.bounds.pins else take(rules, up, ev.Pinned(up.pins))


def crash(rules: Rules, place: Place) -> Taken:
    """Crash, and boot at once, but where a scenario takes these apart."""
    if rules.apart:
        return Taken(_replace(place, member=None, todo=(), fresh=True, down=True))
    return boot(rules, place)


def take(rules: Rules, place: Place, event: ev.Event) -> Taken:
    """Take one event, and carry out all of its effects."""
    if place.member is None:
        raise ValueError(f"{place.id} is not up")
    after, effects = door.step(place.member, event)
    return _carry(rules, place, event, after, effects)


def cuts(rules: Rules, place: Place, event: ev.Event, whole: Taken) -> Iterator[Taken]:
    """List how a crash may cut the effects of an event: after some of them, before all.

    ``whole`` is what :func:`take` gives. A crash before the first effect is one of an idle place,
    but where an image had been written, or a rank had gone on, before the event.
    """
    turn = whole.turns[0]
    todo = [*turn.effects.persist, *turn.effects.send, *turn.effects.apply]
    prepared = isinstance(event, ev.Persisted | ev.Captured | ev.Pinned)
    if isinstance(event, ev.Received) and not (turn.effects.persist or turn.effects.send):
        return
    for cut in range(0 if prepared else 1, len(todo)):
        at = cut - len(turn.effects.persist)
        done = ev.Effects(
            turn.effects.persist[:cut],
            turn.effects.send[: max(0, at)],
            turn.effects.apply[: max(0, at - len(turn.effects.send))],
        )
        down = _carry(rules, place, event, turn.after, done, cut=True)
        up = crash(rules, down.place)
        yield Taken(
            up.place, down.sends + up.sends, down.turns + up.turns, down.deeds + up.deeds, cut
        )


def _carry(
    rules: Rules,
    place: Place,
    event: ev.Event,
    after: Member,
    effects: ev.Effects,
    *,
    cut: bool = False,
) -> Taken:
    images, todo, trainers = place.images, place.todo, place.trainers
    deeds: list[Deed] = []
    for action in effects.apply:
        match action:
            case ev.Persist() | ev.Check():
                todo = _join(todo, action)
            case ev.Propose() if _home(after):
                todo = _join(todo, action)
            case ev.Publish():
                deeds.append(action.certificate)
            case ev.Resume():
                deeds.append(action.certificate)
                trainers = _resumed(rules, trainers, action.certificate)
            case ev.Refuse() if not place.handed(action.epoch):
                trainers = _waiting(rules, trainers, action.epoch)
            case ev.Release():
                images = tuple(image for image in images if image.epoch not in action.epochs)
            case _:
                pass
    turn = Turn(place.member or after, event, after, effects, place.fresh, cut)
    now = _replace(
        place, member=after, records=place.records + effects.persist, images=images, todo=todo,
        trainers=trainers, fresh=False,
    )  # fmt: skip
    return Taken(now, effects.send, (turn,), tuple(deeds))


def _join(todo: tuple[ev.Action, ...], action: ev.Action) -> tuple[ev.Action, ...]:
    return todo if action in todo else (*todo, action)


def _home(member: Member) -> bool:
    """Only the first domain of its shard speaks for the rank."""
    roster = member.roster
    return roster is not None and member.me in roster.homes


def _resumed(
    rules: Rules, trainers: tuple[tuple[int, int] | None, ...], c: RestoreCertificate
) -> tuple[tuple[int, int] | None, ...]:
    return tuple(
        (c.base.step, c.base.step) if was is None and round_.name == c.round else was
        for was, round_ in zip(trainers, rules.rounds, strict=True)
    )


def _waiting(
    rules: Rules, trainers: tuple[tuple[int, int] | None, ...], epoch: Epoch
) -> tuple[tuple[int, int] | None, ...]:
    """Let a rank that was refused a save stay where it was: it tries again, or is never seen."""
    return tuple(
        (was[0], was[1] - 1)
        if was is not None and was[0] < was[1] and Epoch(round_.generation, was[1]) == epoch
        else was
        for was, round_ in zip(trainers, rules.rounds, strict=True)
    )


def haunt(place: Place, event: ev.Event) -> Taken:
    """Let the ghost take an event. What it writes is behind the seal of its successor, which it
    sees before it sends: so it ends there, and nothing of it is left."""
    if place.ghost is None:
        raise ValueError(f"{place.id} has no ghost")
    after, effects = door.step(place.ghost, event)
    if effects.persist:
        return Taken(_replace(place, ghost=None))
    deeds = tuple(
        action.certificate for action in effects.apply if isinstance(action, ev.Publish | ev.Resume)
    )
    turn = Turn(place.ghost, event, after, effects)
    return Taken(_replace(place, ghost=after), effects.send, (turn,), deeds)


# --- what can happen to a place, besides a message ------------------------------------------------


def errands(rules: Rules, place: Place, changed: bool) -> Iterator[Errand]:
    """List what can happen to a place that is up, but for messages and ticks."""
    member = place.member
    if member is None:
        if place.down:
            yield Errand(place, None, what="boots")
        return
    for at, action in enumerate(place.todo):
        rest = _replace(place, todo=place.todo[:at] + place.todo[at + 1 :])
        yield from _work(rules, rest, action)
    for number, round_ in enumerate(rules.rounds):
        yield from _begin(rules, place, member, round_, changed)
        yield from _save(rules, place, number, round_)
    if member.pinned is None:
        yield Errand(place, ev.Pinned(place.pins))
    yield from _read(place, member)
    yield from _suffer(rules, place, member)
    if place.ghost is not None:
        yield Errand(place, ev.Tick(), calm=False, ghost=True)


def _work(rules: Rules, place: Place, action: ev.Action) -> Iterator[Errand]:
    """Do, well or badly, what the agent was asked for."""
    match action:
        case ev.Persist(epoch=epoch):
            digest = f"{epoch}" if rules.alike else f"{place.incarnation}:{epoch}"
            written = place
            if not place.attested(epoch):
                others = [image for image in place.images if image.epoch != epoch]
                images = sorted([*others, Image(epoch, digest)], key=lambda image: image.epoch)
                written = _replace(place, images=tuple(images))
            yield Errand(written, ev.Persisted(epoch, digest))
            yield Errand(place, ev.Failed(epoch, "no space"), ("failures",), calm=False)
        case ev.Check(generation=generation, epoch=epoch):
            image = place.image(epoch)
            reason = "missing" if image is None else "" if image.sound else "damaged"
            yield Errand(place, ev.Checked(generation, epoch, reason))
            if not reason and generation != rules.rounds[-1].generation:
                # An error of reading is taken for a loss, so that is what it counts as.
                spoilt = tuple(sorted({*place.spoilt, epoch}))
                without = _replace(place, spoilt=spoilt)
                again = ev.Checked(generation, epoch, "unreadable")
                yield Errand(without, again, ("misreads",), calm=False)
        case ev.Propose(generation=generation, epoch=epoch, copies=copies):
            roster = place.member.roster if place.member is not None else None
            shard = roster.homes.index(place.member.me) if roster and place.member else 0
            for copy in bits(copies[shard]):
                yield Errand(place, ev.Accept(generation, epoch, copy))
            if generation != rules.rounds[-1].generation:
                why = ev.Decline(generation, epoch, "other structure")
                yield Errand(place, why, ("declines",), calm=False)
        case _:
            raise TypeError(f"{action} is no work")


def _begin(
    rules: Rules, place: Place, member: Member, round_: Round, changed: bool
) -> Iterator[Errand]:
    if round_.roster.index(place.id) is None or (round_.changes and not changed):
        return
    event = ev.Begin(
        round_.generation, round_.name, round_.roster, round_.founding, round_.changes,
        round_.want, rules.keep, rules.window,
    )  # fmt: skip
    begun = (member.generation, member.round) == (round_.generation, round_.name)
    faults = ("agains",) if begun and member.keep is not None else ()
    yield Errand(place, event, faults, calm=not faults and round_ is rules.rounds[-1])


def _save(rules: Rules, place: Place, number: int, round_: Round) -> Iterator[Errand]:
    """Let the rank reach its next step; in the last round as many more as steps were lost."""
    position = place.trainers[number]
    if position is None:
        return
    last = number == len(rules.rounds) - 1
    base, at = position
    if at:
        again = ev.Captured(Epoch(round_.generation, at))
        yield Errand(place, again, ("repeats",), calm=False)
    if at >= base + rules.bounds.epochs and not last:
        return
    trainers = (*place.trainers[:number], (base, at + 1), *place.trainers[number + 1 :])
    ahead = _replace(place, trainers=trainers)
    epoch, step = Epoch(round_.generation, at + 1), at + 1 - base if last else 0
    yield Errand(ahead, ev.Captured(epoch), step=step, calm=last)
    yield Errand(ahead, ev.Forgone(epoch, "skipped"), ("skips",), step=step, calm=False)


def _read(place: Place, member: Member) -> Iterator[Errand]:
    """Let a reader pin one more of the epochs that are retained, or let go of what it has."""
    if member.pinned is None:
        return
    for copy in member.retained:
        if copy.epoch not in place.pins:
            pins = (*place.pins, copy.epoch)
            yield Errand(_replace(place, pins=pins), ev.Pinned(pins), ("pins",), calm=False)
    if place.pins:
        yield Errand(_replace(place, pins=()), ev.Pinned(()))


def _suffer(rules: Rules, place: Place, member: Member) -> Iterator[Errand]:
    """Damage copies, raise links anew, crash an idle agent, or freeze it until it has an heir."""
    for image in place.images:
        if image.sound and place.attested(image.epoch):
            spoilt = tuple(sorted({*place.spoilt, image.epoch}))
            others = tuple(other for other in place.images if other is not image)
            hurt = tuple(
                _replace(other, sound=False) if other is image else other for other in place.images
            )
            for images, what in ((others, "vanishes"), (hurt, "rots")):
                after = _replace(place, images=images, spoilt=spoilt)
                yield Errand(after, None, ("rots",), f"{image.epoch} {what}", calm=False)
    roster = member.roster
    if roster is not None and member.generation:
        for peer in roster.neighbours[member.me]:
            yield Errand(place, ev.Greet(peer), ("agains",), calm=False)
    if place.incarnation < rules.bounds.lives:
        yield Errand(place, None, ("crashes",), "crashes", calm=False)
        if place.ghost is None and member.generation:
            frozen = _replace(place, ghost=member)
            yield Errand(frozen, None, ("crashes", "ghosts"), "is frozen", calm=False)


def lost_steps(rules: Rules, place: Place) -> int:
    """Mask the steps of the last round, counted from its base, that will not be staged here."""
    position = place.trainers[-1] if place.trainers else None
    if position is None or place.member is None:
        return 0
    base, at = position
    generation = rules.rounds[-1].generation
    mask = 0
    for step in range(base + 1, at + 1):
        epoch = Epoch(generation, step)
        if not (place.attested(epoch) or ev.Persist(epoch) in place.todo):
            mask |= 1 << step - base
    return mask
