"""The truth about a world, kept as it grows, and the laws that each step could have broken.

To hold all laws against everything after every step costs more than the steps. But a law can only
be broken by what it speaks of: a vote by the laws on votes, a tick by the law on ticks. And most of
what a law says of the past stays said: what a certificate needed when it was written it has for
ever. So each kind of record and deed calls for its own laws (``OF_RECORD``, ``OF_DEED``), which see
only what is new where that is enough. A breach in such a narrow view is looked at again in the full
one before it counts; that none is overlooked is shown by planted faults, which must be caught in
both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from handfast.core import events, messages
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.membership import Roster
from handfast.core.retain import Keep
from handfast.core.state import Member
from handfast.laws import invariants as laws
from handfast.laws import steps
from handfast.laws.truth import Truth, Turn, Written

__all__ = ["Breach", "Ledger"]

R = TypeVar("R", bound=messages.Record)
Law = laws.Law

_VOTED: Final = (laws.s5_votes_are_write_once, laws.s10_stale_is_not_written)

OF_RECORD: Final[Mapping[type, tuple[Law, ...]]] = {
    messages.Configured: (laws.s3_something_is_retained_by_all, laws.s10_stale_is_not_written),
    messages.Frozen: (*_VOTED, laws.s14_what_is_corrupt_never_counts),
    messages.Staged: (laws.s1_attested_is_durable, *_VOTED),
    messages.Skipped: _VOTED,
    messages.Valid: (*_VOTED, laws.s14_what_is_corrupt_never_counts),
    messages.Bad: (
        *_VOTED, laws.s12_recovery_is_a_function, laws.s14_what_is_corrupt_never_counts,
    ),
    messages.Accepted: _VOTED,
    messages.Restored: (
        laws.s6_certificates_are_of_one_whole, laws.s2_knowledge_is_sound,
        laws.s3_something_is_retained_by_all, laws.s4_certified_is_not_lost,
        laws.s12_recovery_is_a_function, laws.s14_what_is_corrupt_never_counts,
    ),
    messages.Converged: (laws.s2_knowledge_is_sound, laws.s4_certified_is_not_lost),
    messages.Released: (
        laws.s3_something_is_retained_by_all, laws.s4_certified_is_not_lost,
        laws.s8_release_follows_knowledge,
    ),
}  # fmt: skip
"""The laws that a durable record could break."""

OF_DEED: Final[Mapping[type, tuple[Law, ...]]] = {
    events.Publish: (
        laws.s6_certificates_are_of_one_whole, laws.s7_nothing_acts_without_a_certificate,
    ),
    events.Resume: (
        laws.s7_nothing_acts_without_a_certificate, laws.s11_nothing_is_mutated_unvalidated,
        laws.s13_no_interaction_across_epochs,
    ),
}  # fmt: skip
"""The laws that a deed could break."""

OF_EVENT: Final[Mapping[type, tuple[Law, ...]]] = {
    events.Received: (steps.s10_stale_is_refused, steps.l4_whoever_is_overtaken_is_told),
    events.Tick: (steps.s15_time_changes_nothing,),
    events.Begin: (steps.l4_whoever_begins_is_told, steps.l4_whoever_is_overtaken_is_told),
}
"""The laws that taking an event could break, whatever came of it."""

OF_EFFECT: Final[Mapping[type, tuple[Law, ...]]] = {
    messages.Skipped: (steps.s5_skips_are_ones_own,),
    messages.Converged: (steps.l6_a_certificate_is_learnt_once,),
    events.Persist: (
        steps.s5_nothing_is_saved_twice, steps.l6_no_more_is_saved_than_the_window,
    ),
    events.Refuse: (steps.l4_refusals_are_true,),
}  # fmt: skip
"""The laws of one step that what it did could break."""

OF_DAMAGE: Final = (laws.s3_something_is_retained_by_all, laws.s4_certified_is_not_lost)
"""The laws that a loss, or a change of the configuration, could break."""

_BEGINNINGS: Final = (messages.Frozen, messages.Configured)
_SUMS: Final = (messages.Converged, messages.Restored, messages.Released)
_ONCE: Final = (messages.Restored, messages.Converged)
"""Whoever writes the same certificate again says nothing new, but that it is in its journal."""


class Breach(Exception):
    """Laws are broken; ``laws`` names which, ``found`` says how."""

    def __init__(self, found: tuple[str, ...]) -> None:
        self.found = found
        self.laws = tuple(sorted({words.split("_")[0].upper() for words in found}))
        super().__init__("; ".join(found))


class _View(Truth, frozen=True, dict=True, kw_only=True):
    """A truth that looks things up in a ledger, and shows less where a law needs no more.

    ``votes`` and ``fresh`` are the votes and certificates that are shown, None: all; ``holding``:
    what is retained is shown.
    """

    ledger: Ledger
    votes: Sequence[tuple[str, messages.Record]] | None = None
    fresh: Sequence[tuple[str, messages.Converged]] | None = None
    holding: bool = True

    def records(self, kind: type[R]) -> Sequence[tuple[str, R]]:
        """List the durable records of one kind that this view shows."""
        held: Any = self.ledger.kinds.get(kind, ())
        if kind is messages.Staged and self.votes is not None:
            held = self.votes
        elif kind is messages.Converged and self.fresh is not None:
            held = self.fresh
        return held  # type: ignore[no-any-return]  # - the dictionary's keys say what it holds

    @property
    def retained(self) -> frozenset[tuple[str, Epoch]]:
        """Give what is retained."""
        return frozenset(self.ledger.retained) if self.holding else frozenset()

    @property
    def bases(self) -> dict[int, messages.RestoreCertificate]:
        """Give the restore certificate of each generation."""
        return self.ledger.bases

    @property
    def bad(self) -> frozenset[tuple[str, Epoch]]:
        """Give the copies that were BAD when they were last judged."""
        return frozenset(self.ledger.bad)

    def frozen(self, generation: int, round_: str) -> dict[str, messages.Frozen]:
        """Find what each member reported when it froze in a round."""
        return self.ledger.reports.get((generation, round_), {})


def _offers(sends: tuple[events.Send, ...]) -> bool:
    return any(
        send.message.rolled or any(type(fact) is messages.Staged for fact in send.message.facts)
        for send in sends
    )


class Ledger:
    """What really is, and was.

    Whoever changes the world says so here: ``write`` for what became durable, ``did`` for deeds,
    ``spoil`` for damage. Each raises :class:`Breach` where a law does not hold.
    """

    def __init__(self, roster: Roster, keep: Keep) -> None:
        self.rosters = [roster]
        self.keep = keep
        self.journal: list[Written] = []
        self.own: dict[str, list[Written]] = {}
        self.kinds: dict[type, list[tuple[str, messages.Record]]] = {}
        self.votes: dict[int, list[tuple[str, messages.Record]]] = {}
        self.reports: dict[tuple[int, str], dict[str, messages.Frozen]] = {}
        self.retained: set[tuple[str, Epoch]] = set()
        self.bad: set[tuple[str, Epoch]] = set()
        self.bases: dict[int, messages.RestoreCertificate] = {}
        self.known: set[messages.Record] = set()
        self.published: list[tuple[str, messages.Certificate]] = []
        self.resumed: list[tuple[str, messages.RestoreCertificate]] = []
        self.spoilt: frozenset[tuple[str, Epoch]] = frozenset()
        self.pinned: dict[str, tuple[int, tuple[Epoch, ...]]] = {}
        self.images: dict[str, Mapping[Epoch, Any]] = {}
        self.shown: dict[str, Member] = {}
        self.thorough = False

    # --- what happens

    def turn(self, id_: str, incarnation: int, turn: Turn) -> None:
        """Take a step whose records are durable now, and hold the laws that it could break."""
        if type(turn.event) is events.Pinned and incarnation >= self.pinned.get(id_, (0,))[0]:
            # An owner that wakes up late may have looked long ago, and releases nothing any more.
            self.pinned[id_] = (incarnation, turn.event.epochs)
        due, fresh = self._write(id_, incarnation, turn.effects.persist)
        if self.thorough:
            self._hold(laws.ALWAYS, self.truth(turn))
            return
        before, after = turn.before, turn.after
        tree = after.roster is not None and after.roster.tree is not None
        if (
            before.recovery is not after.recovery
            or before.restored is not after.restored
            or (tree and before.tallies is not after.tallies)
        ):
            due[laws.s9_joins_agree] = None
        if due:
            self._look(tuple(due), id_, turn, fresh)
        light = list(OF_EVENT.get(type(turn.event), ()))
        for effect in (*turn.effects.persist, *turn.effects.apply):
            light += OF_EFFECT.get(type(effect), ())
        if light:
            self._hold(tuple(light), Truth(rosters=(), journal=(), turn=turn))
        if laws.s1_attested_is_durable not in due and _offers(turn.effects.send):
            votes = self.votes.get(after.generation, ())
            view = self._view(turn=turn, votes=votes, holding=False)
            self._confirm(laws.s1_attested_is_durable, view, turn)

    def _write(
        self, id_: str, incarnation: int, records: tuple[messages.Record, ...]
    ) -> tuple[dict[Law, None], list[tuple[str, messages.Converged]]]:
        """Take records; say which laws they could break, and which certificates are new."""
        due: dict[Law, None] = {}
        fresh: list[tuple[str, messages.Converged]] = []
        for record in records:
            self._append(Written(id_, incarnation, record))
            if isinstance(record, _ONCE):
                if record in self.known:
                    continue
                self.known.add(record)
                if isinstance(record, messages.Converged):
                    fresh.append((id_, record))
            due |= dict.fromkeys(OF_RECORD[type(record)])
        return due, fresh

    def _append(self, written: Written) -> None:
        id_, record = written.domain, written.record
        self.journal.append(written)
        self.kinds.setdefault(type(record), []).append((id_, record))
        own = self.own.setdefault(id_, [])
        if isinstance(record, _BEGINNINGS):
            # What was said in an earlier generation can't be said again, or S10 is broken first.
            own[:] = [past for past in own if isinstance(past.record, _BEGINNINGS)]
        if not isinstance(record, _SUMS):
            own.append(written)
        match record:
            case messages.Frozen(generation=generation, round=round_):
                self.reports.setdefault((generation, round_), {})[id_] = record
            case messages.Staged(epoch=epoch):
                self.retained.add((id_, epoch))
                self.votes.setdefault(epoch.generation, []).append((id_, record))
            case messages.Configured(founding=True):
                self.retained.add((id_, GENESIS))
            case messages.Released(epochs=epochs):
                self.retained.difference_update((id_, epoch) for epoch in epochs)
            case messages.Restored(certificate=certificate):
                self.bases[certificate.generation] = certificate
            case messages.Valid(epoch=epoch):
                self.bad.discard((id_, epoch))
            case messages.Bad(epoch=epoch):
                self.bad.add((id_, epoch))
            case _:
                pass

    def did(self, id_: str, action: events.Publish | events.Resume) -> None:
        """Take a deed, and hold the laws that it could break."""
        published: tuple[tuple[str, messages.Certificate], ...] = ()
        resumed: tuple[tuple[str, messages.RestoreCertificate], ...] = ()
        if isinstance(action, events.Publish):
            published = ((id_, action.certificate),)
            self.published += published
        else:
            self.resumed.append((id_, action.certificate))
            resumed = tuple(self.resumed)
        if self.thorough:
            self._hold(laws.ALWAYS, self.truth())
        else:
            view = self._view(published=published, resumed=resumed)
            self._hold(OF_DEED[type(action)], view)

    def spoil(self, id_: str, *epochs: Epoch) -> None:
        """Take that copies are damaged, lost or fenced."""
        self.spoilt |= frozenset((id_, epoch) for epoch in epochs)
        self._hold(OF_DAMAGE, self._view(sound=self.sound(), members=self.members()))

    # --- looking

    def _look(
        self, due: tuple[Law, ...], id_: str, turn: Turn,
        fresh: Sequence[tuple[str, messages.Converged]],
    ) -> None:  # fmt: skip
        seen = {
            "turn": turn,
            "journal": self.own.get(id_, ()),
            "sound": self.sound(),
            "members": self.members(),
        }
        view = self._view(**seen)
        for law in due:
            if law is laws.s2_knowledge_is_sound:
                self._confirm(law, self._view(**seen, fresh=fresh), turn)
            elif law is laws.s1_attested_is_durable:
                votes = self.votes.get(turn.after.generation, ())
                self._confirm(law, self._view(**seen, votes=votes), turn)
            else:
                self._confirm(law, view, turn)

    def _confirm(self, law: Law, view: Truth, turn: Turn) -> None:
        """Hold a law against a view; where it is broken there, it counts if it is in truth."""
        for _ in law(view):
            self._hold((law,), self.truth(turn))
            return

    def _view(self, **seen: Any) -> _View:
        return _View(
            rosters=tuple(self.rosters), journal=seen.pop("journal", ()), ledger=self,
            spoilt=self.spoilt, keep=self.keep, pinned=self.holds(), **seen,
        )  # fmt: skip

    @staticmethod
    def _hold(due: tuple[Law, ...], truth: Truth) -> None:
        if found := laws.breaches(truth, due):
            raise Breach(found)

    def holds(self) -> frozenset[tuple[str, Epoch]]:
        """List what readers hold."""
        return frozenset((id_, epoch) for id_, (_, held) in self.pinned.items() for epoch in held)

    def sound(self) -> frozenset[tuple[str, Epoch, str]]:
        """List the images that are as they were written."""
        return frozenset(
            (id_, epoch, image.digest)
            for id_, images in self.images.items()
            for epoch, image in images.items()
            if image.sound
        )

    def members(self) -> tuple[Member, ...]:
        """List the members that are up, as their disks have them."""
        return tuple(self.shown.values())

    def truth(self, turn: Turn | None = None, exchanges: int = 0) -> Truth:
        """Give the whole, by nothing but what happened: none of the sums that are kept here."""
        return Truth(
            rosters=tuple(self.rosters), journal=tuple(self.journal), sound=self.sound(),
            spoilt=self.spoilt, published=tuple(self.published),
            resumed=tuple(self.resumed), pinned=self.holds(), keep=self.keep,
            members=self.members(), turn=turn, exchanges=exchanges,
        )  # fmt: skip

    def judge(self, due: tuple[Law, ...] = laws.ALWAYS, exchanges: int = 0) -> None:
        """Hold laws against the whole truth."""
        self._hold(due, self.truth(exchanges=exchanges))
