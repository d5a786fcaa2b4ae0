"""What happened, in words: a line for each thing that was taken, done or suffered."""

from __future__ import annotations

from collections.abc import Iterable

from handfast.core import events as ev
from handfast.core import messages as ms
from handfast.sim.agenda import SECOND
from handfast.sim.world import Entry

__all__ = ["line", "lines"]


def lines(log: Iterable[Entry], *, quiet: bool = False) -> list[str]:
    """Tell a log; ``quiet`` leaves out what was heard, or ticked, and led to nothing."""
    return [line(entry) for entry in log if not (quiet and _idle(entry))]


def _idle(entry: Entry) -> bool:
    _, _, event, effects = entry
    return isinstance(event, ev.Received | ev.Tick) and not (effects.persist or effects.apply)


def line(entry: Entry) -> str:
    """Tell one entry: when, who, what it took, and what came of it."""
    now, who, event, effects = entry
    said = event if isinstance(event, str) else took(event)
    done = [f"writes {_join(record(r) for r in effects.persist)}"] if effects.persist else []
    if effects.send:
        targets = dict.fromkeys(str(send.to) for send in effects.send)
        done.append(f"tells {','.join(targets)}")
    done += [deed(action) for action in effects.apply]
    came = f" -> {'; '.join(done)}" if done else ""
    return f"{now / SECOND:9.4f} {who:<10} {said}{came}"


def _join(words: Iterable[str]) -> str:
    return ", ".join(words)


def took(event: ev.Event) -> str:
    """Say what a member took."""
    match event:
        case ev.Begin(generation=generation, round=round_, want=want):
            asked = "" if want is None else f", asked for step {want}"
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
            return f"rank accepts {epoch}, copy {copy}"
        case ev.Decline(epoch=epoch, reason=reason):
            return f"rank declines {epoch}: {reason}"
        case ev.Pinned(epochs=epochs):
            return f"sees pins: {_join(map(str, epochs)) or 'none'}"
        case ev.Received(message=message):
            return f"hears {heard(message)}"
        case ev.Greet(peer=peer):
            return f"greets {peer}"
        case _:
            return "ticks"


def heard(message: ms.Message) -> str:
    """Say who speaks, in which life and generation, and what it says."""
    facts = _join(map(record, message.facts)) or "what it holds"
    return f"{message.sender}.{message.incarnation} (generation {message.generation}): {facts}"


def record(fact: ms.Record | ms.Fact) -> str:
    """Say a fact."""
    match fact:
        case ms.Configured(configuration=configuration):
            return f"CONFIGURED({configuration.digest()[:6]})"
        case ms.Frozen(domain=domain, generation=generation, report=report):
            held = " ".join(str(copy.epoch) for copy in report.retained)
            return f"FROZEN({domain}, generation {generation}, holds {held or 'nothing'})"
        case ms.Staged(domain=domain, epoch=epoch):
            return f"STAGED({domain}, {epoch})"
        case ms.Skipped(domain=domain, epoch=epoch, reason=reason):
            return f"SKIPPED({domain}, {epoch}, {reason})"
        case ms.Valid(domain=domain, epoch=epoch):
            return f"VALID({domain}, {epoch})"
        case ms.Bad(domain=domain, epoch=epoch, reason=reason):
            return f"BAD({domain}, {epoch}, {reason})"
        case ms.Accepted(shard=shard, epoch=epoch, copy=copy):
            return f"ACCEPTED({shard}, {epoch}, copy {copy})"
        case ms.Declined(shard=shard, epoch=epoch):
            return f"declined({shard}, {epoch})"
        case ms.Restored(certificate=certificate):
            return f"RESTORED(generation {certificate.generation} from {certificate.base})"
        case ms.Converged(certificate=certificate):
            return f"CONVERGED({certificate.epoch}, {certificate.tier})"
        case ms.Released(epochs=epochs):
            return f"RELEASED({_join(map(str, epochs))})"


def deed(action: ev.Action) -> str:
    """Say what a member asks for."""
    match action:
        case ev.Persist(epoch=epoch):
            return f"persists {epoch}"
        case ev.Refuse(epoch=epoch, reason=reason, by=by):
            return f"refuses {epoch}: {reason}{f' ({_join(by)})' if by else ''}"
        case ev.Check(epoch=epoch):
            return f"reads its copy of {epoch}"
        case ev.Propose(epoch=epoch):
            return f"proposes {epoch}"
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
