"""Tell in words what happened: one line a move, for people to read."""

from __future__ import annotations

from collections.abc import Iterator

from handfast.core import events as ev
from handfast.core import member as door
from handfast.core.messages import Message
from handfast.core.state import Member
from handfast.model.explore import Trace
from handfast.model.protocol import Move, Protocol, State

__all__ = ["brief", "story"]

_NAMES = (
    "domain", "first", "size", "shard", "epoch", "epochs", "round", "generation", "reason", "copy",
)  # fmt: skip


def brief(value: object) -> str:
    """Shorten an event, a record, a message or an action to a few words."""
    match value:
        case ev.Received(message=m):
            return f"hears {brief(m)}"
        case ev.Send(to=to, message=m):
            return f"to {to}: {brief(m)}"
        case Message():
            facts = ",".join(map(brief, (*value.facts, *value.rolled)))
            return f"<{value.sender}.{value.incarnation} g{value.generation} {facts}>"
    said = [getattr(value, name, None) for name in _NAMES]
    words = [type(value).__name__]
    words += ["+".join(map(str, x)) if isinstance(x, tuple) else str(x)
              for x in said if x not in (None, "")]  # fmt: skip
    if (certificate := getattr(value, "certificate", None)) is not None:
        words.append(str(getattr(certificate, "base", getattr(certificate, "epoch", ""))))
    return " ".join(words)


def story(model: Protocol, trace: Trace[State, Move]) -> tuple[str, ...]:
    """Tell a trace: who took what, what that asked for, and where a crash cut it."""
    return tuple(
        line
        for state, move in zip(trace.states[:-1], trace.labels, strict=True)
        for line in _lines(model, state, move)
    )


def _lines(model: Protocol, state: State, move: Move) -> Iterator[str]:
    place = model.places.values[state[1 + move.who]]
    name, member = f"{place.id}.{place.incarnation}", place.member
    for event in move.heard:
        yield f"{name} {brief(event)}"
        member = door.step(member, event)[0] if member is not None else None
    yield f"{name} {_did(member, move)}"


def _did(member: Member | None, move: Move) -> str:
    if move.event is None or move.what:
        event = f"{brief(move.event)} " if move.event is not None else ""
        return f"{event}{move.what}"
    if member is None:
        return brief(move.event)
    _, effects = door.step(member, move.event)
    asked = [*effects.persist, *effects.send, *effects.apply]
    cut = f", cut after {move.cut} of {len(asked)}" if move.cut is not None else ""
    return f"{brief(move.event)} -> {', '.join(map(brief, asked)) or 'nothing'}{cut}"
