"""What happened, in words: a line for each thing that was taken, done or suffered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from handfast.core import events as ev
from handfast.core import messages as ms
from handfast.core.membership import Roster
from handfast.sim.agenda import SECOND
from handfast.sim.world import Entry

__all__ = ["Teller"]


class Teller:
    """Tells a log in order; members go by their names in the configuration of whoever speaks.

    ``rosters`` are those of the world, the latest last.
    """

    def __init__(self, rosters: Sequence[Roster]) -> None:
        self._rosters = rosters
        self._of: dict[str, Roster] = {}
        self._ids: tuple[str, ...] = ()

    def lines(self, log: Iterable[Entry]) -> list[str]:
        """Tell a log, with its times."""
        return [f"{entry[0] / SECOND:9.4f} {self.line(*entry[1:])}" for entry in log]

    def line(self, who: str, event: ev.Event | str, effects: ev.Effects) -> str:
        """Tell one entry."""
        if isinstance(event, str):
            return f"{who:<6} {event}"
        domain = who.partition(".")[0]
        for record in effects.persist:
            if isinstance(record, ms.Configured):
                self._of[domain] = Roster(record.configuration)
        self._ids = self._of.get(domain, self._rosters[-1]).ids
        done = []
        if effects.persist:
            done.append(f"writes {_join(map(self.fact, effects.persist))}")
        if effects.send:
            done.append(f"tells {' '.join(dict.fromkeys(self._ids[s.to] for s in effects.send))}")
        done += [deed(action) for action in effects.apply]
        came = f" -> {'; '.join(done)}" if done else ""
        return f"{who:<6} {self.took(event)}{came}"

    def took(self, event: ev.Event) -> str:
        """Say what a member took."""
        match event:
            case ev.Begin(generation=generation, round=round_, want=want):
                asked = "" if want is None else f", for step {want}"
                return f"begins generation {generation} ({round_}{asked})"
            case ev.Captured(epoch=epoch):
                return f"is given {epoch}"
            case ev.Persisted(epoch=epoch):
                return f"has {epoch} on its disk"
            case ev.Failed(epoch=epoch, reason=reason):
                return f"could not persist {epoch}: {reason}"
            case ev.Forgone(epoch=epoch, reason=reason):
                return f"is not given {epoch}: {reason}"
            case ev.Checked(epoch=epoch, reason=reason):
                return f"has read {epoch}: {reason or 'sound'}"
            case ev.Accept(epoch=epoch, copy=copy):
                return f"hears its rank accept {epoch} of {self._ids[copy]}"
            case ev.Decline(epoch=epoch, reason=reason):
                return f"hears its rank decline {epoch}: {reason}"
            case ev.Pinned(epochs=epochs):
                return f"sees pins on {_join(map(str, epochs)) or 'nothing'}"
            case ev.Received(message=message):
                return f"hears {self.message(message)}"
            case ev.Greet(peer=peer):
                return f"greets {self._ids[peer]}"
            case _:
                return "ticks"

    def message(self, message: ms.Message) -> str:
        """Say who speaks, in which life, and what."""
        sender = f"{self._ids[message.sender]}.{message.incarnation}"
        said = (*map(self.fact, message.facts), *map(self._rolled, message.rolled))
        return f"{sender}: {_join(said) or 'what it holds'}"

    def _rolled(self, roll: ms.Rolled) -> str:
        first, last = self._ids[roll.first], self._ids[roll.first + roll.size - 1]
        return f"STAGED({first} to {last}, {roll.epoch})"

    def fact(self, fact: ms.Record | ms.Fact) -> str:
        """Say a fact."""
        match fact:
            case ms.Configured(configuration=configuration):
                return f"CONFIGURED({' '.join(d.id for d in configuration.domains)})"
            case ms.Frozen(domain=domain, generation=generation, report=report):
                held = " ".join(str(copy.epoch) for copy in report.retained)
                return f"FROZEN({self._ids[domain]}, generation {generation}: {held or 'empty'})"
            case ms.Staged(domain=domain, epoch=epoch):
                return f"STAGED({self._ids[domain]}, {epoch})"
            case ms.Skipped(domain=domain, epoch=epoch, reason=reason):
                return f"SKIPPED({self._ids[domain]}, {epoch}: {reason})"
            case ms.Valid(domain=domain, epoch=epoch):
                return f"VALID({self._ids[domain]}, {epoch})"
            case ms.Bad(domain=domain, epoch=epoch, reason=reason):
                return f"BAD({self._ids[domain]}, {epoch}: {reason})"
            case ms.Accepted(shard=shard, epoch=epoch, copy=copy):
                return f"ACCEPTED(rank {shard}, {epoch} of {self._ids[copy]})"
            case ms.Declined(shard=shard, epoch=epoch):
                return f"declined(rank {shard}, {epoch})"
            case ms.Restored(certificate=certificate):
                return f"RESTORED(generation {certificate.generation} from {certificate.base})"
            case ms.Converged(certificate=certificate):
                return f"CONVERGED({certificate.epoch} in {certificate.tier})"
            case ms.Released(epochs=epochs):
                return f"RELEASED({_join(map(str, epochs))})"


def _join(words: Iterable[str]) -> str:
    return ", ".join(words)


def deed(action: ev.Action) -> str:
    """Say what a member asks for."""
    match action:
        case ev.Persist(epoch=epoch):
            return f"persists {epoch}"
        case ev.Refuse(epoch=epoch, reason=reason, by=by):
            return f"refuses {epoch}: {reason}{f' (waits for {_join(by)})' if by else ''}"
        case ev.Check(epoch=epoch):
            return f"reads its copy of {epoch}"
        case ev.Propose(epoch=epoch):
            return f"proposes {epoch} to its rank"
        case ev.Stuck(phase=phase, reasons=reasons):
            return f"is stuck, {phase.value}{f': {_join(reasons)}' if reasons else ''}"
        case ev.Resume(certificate=certificate):
            return f"lets its rank resume {certificate.base}"
        case ev.Publish(certificate=certificate):
            return f"publishes {certificate.epoch}"
        case ev.Release(epochs=epochs):
            return f"removes {_join(map(str, epochs))}"
        case ev.Overtaken(generation=generation):
            return f"is overtaken by generation {generation}"
        case ev.Reject(reason=reason):
            return f"rejects it: {reason}"
