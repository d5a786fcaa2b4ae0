"""Tell in words what happened: one line a move, for people to read."""

from __future__ import annotations

from handfast.core import events as ev
from handfast.core import member as door
from handfast.core.messages import Message
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
        _line(model, state, move)
        for state, move in zip(trace.states[:-1], trace.labels, strict=True)
    )


def _line(model: Protocol, state: State, move: Move) -> str:
    place = model.places.values[state[1 + move.who]]
    name = f"{place.id}.{place.incarnation}"
    if move.event is None or move.what:
        event = f"{brief(move.event)} " if move.event is not None else ""
        return f"{name} {event}{move.what}"
    member = place.member
    if member is None:
        return f"{name} {brief(move.event)}"
    _, effects = door.step(member, move.event)
    asked = [*effects.persist, *effects.send, *effects.apply]
    cut = f", cut after {move.cut} of {len(asked)}" if move.cut is not None else ""
    return f"{name} {brief(move.event)} -> {', '.join(map(brief, asked)) or 'nothing'}{cut}"
