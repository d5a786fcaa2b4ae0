"""What the ranks of a round tell each other, and why one came to nothing, in words."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import msgspec

from handfast.agent.joining import Opened
from handfast.agent.snapshot import Proposal, Stuck
from handfast.checkpoint.spelling import some
from handfast.checkpoint.survey import TOGETHER
from handfast.core.lattice import Epoch
from handfast.core.recover import APART
from handfast.core.verdict import Verdict
from handfast.errors import Blocked, HandfastError, Refused, Superseded
from handfast.store.provenance import NOTHING, Brought, ranks

__all__ = [
    "Hand", "Load", "agree", "apart", "below", "groups_apart", "lay", "read", "refusal", "suggest",
    "words",
]  # fmt: skip

logger = logging.getLogger("handfast")


class Hand(msgspec.Struct, frozen=True):
    """What each rank lays on the table once its domain is open, or could not be opened.

    A ``problem`` has a ``verdict`` if it is one of what is stored, and none if a disk is full, say.
    ``by`` names who kept it from answering; ``generation`` is rank 0's to say. ``known`` names a
    configuration that rank 0 lays down for all: each names every domain, and each rank has one.
    ``lineage`` is the one that is to begin here, if any; ``brought`` is what was loaded before.
    """

    opened: Opened | None = None
    generation: int = 0
    want: int | None = None
    problem: str = ""
    verdict: Verdict | None = None
    by: tuple[str, ...] = ()
    known: str = ""
    lineage: str = ""
    brought: Brought = NOTHING


def lay(hand: Hand, told: str) -> bytes:
    """Spell out a hand, without a configuration that is ``told`` already."""
    opened = hand.opened
    if opened is not None and opened.known is not None and opened.known.digest() == told:
        opened = msgspec.structs.replace(opened, known=None)
        hand = msgspec.structs.replace(hand, opened=opened, known=told)
    return msgspec.msgpack.encode(hand)


def read(laid: Sequence[bytes]) -> list[Hand]:
    """Read all hands; each has its configuration again."""
    hands = [msgspec.msgpack.decode(data, type=Hand) for data in laid]
    full = [h.opened.known for h in hands if h.opened is not None and h.opened.known is not None]
    known = {configuration.digest(): configuration for configuration in full}
    for n, hand in enumerate(hands):
        if hand.opened is not None and hand.known:
            opened = msgspec.structs.replace(hand.opened, known=known.get(hand.known))
            hands[n] = msgspec.structs.replace(hand, opened=opened)
    return hands


def agree(said: Sequence[Hand]) -> tuple[list[Opened], int, int | None]:
    """Give all that was opened, the generation and the step that is asked for.

    Raises, the same on every rank: Blocked where a rank was kept from answering, Refused where one
    can't take part, nodes have one name, or the ranks ask for different steps, Superseded.
    """
    opened = [hand.opened for hand in said if hand.opened is not None]
    if len(opened) < len(said):
        failed = [hand for hand in said if hand.problem]
        if by := [f"rank {rank}: {name}" for rank, hand in enumerate(said) for name in hand.by]:
            raise Blocked(f"a rank can't take part: {failed[0].problem}", by=by)
        raise Refused(
            "a rank can't take part",
            verdict=next((hand.verdict for hand in failed if hand.verdict), None),
            shards=[f"rank {r}: {hand.problem}" for r, hand in enumerate(said) if hand.problem],
            remedy="mend what these ranks say, and start again",
        )
    _refuse_namesakes(opened)
    wants = {hand.want for hand in said}
    if len(wants) > 1:
        asked = [f"rank {rank}: step {hand.want}" for rank, hand in enumerate(said)]
        raise Refused(
            "the ranks ask for different steps",
            verdict=Verdict.MIXED,
            shards=asked,
            remedy="give restore(step=) the same on every rank, or nothing on all",
        )
    if len({hand.lineage for hand in said}) > 1:
        named = [f"rank {rank}: {hand.lineage or 'none'}" for rank, hand in enumerate(said)]
        raise Refused(
            "the ranks begin different lineages",
            verdict=Verdict.MIXED,
            shards=named,
            remedy="give restore(lineage=) the same on every rank, or nothing on all",
        )
    generation = said[0].generation
    if any(o.generation >= generation for o in opened):
        raise Superseded("a later launch has begun on this run: this one must stop")
    return opened, generation, said[0].want


def _refuse_namesakes(opened: Sequence[Opened]) -> None:
    """Refuse ranks that name one node and reach different agents: these would never hear of each
    other, since each takes what is sent to that name for its own.
    """
    places: dict[str, set[str]] = {}
    for one in opened:
        places.setdefault(one.agent, set()).add(one.place)
    shared = [name for name, there in places.items() if len(there - {""}) > 1]
    if shared:
        raise Refused(
            f"different nodes have one name: {', '.join(shared)}",
            verdict=Verdict.MIXED,
            shards=[
                f"rank {rank}: on {one.agent}, agent at {one.address[0]}:{one.address[1]}"
                for rank, one in enumerate(opened)
                if one.agent in shared
            ],
            remedy="set HANDFAST_NODE to a name of its own on each node; or, where that is one "
            "node, give all of its ranks one path (it may hold {rank}) and one XDG_RUNTIME_DIR",
        )


def refusal(stuck: Stuck, retained: Sequence[Epoch], want: int | None) -> Refused:
    """Give the error of a stuck recovery; ``retained`` is what this rank's own domain holds."""
    if stuck.phase != "exhausted":
        return Refused(
            f"a rank can't take epoch {stuck.epoch}",
            verdict=_declared(stuck.reasons),
            shards=stuck.reasons,
            remedy="mend what those ranks name, and start again",
        )
    if any(APART in reason for reason in stuck.reasons):
        return Refused(
            "the ranks' directories are of copies of one run that went on apart",
            verdict=Verdict.MIXED,
            shards=stuck.reasons,
            remedy=TOGETHER,
        )
    damaged = any("missing" not in reason for reason in stuck.reasons)
    what = "no epoch" if want is None else f"no epoch of step {want}"
    held = ", ".join(map(str, retained)) or "nothing"
    return Refused(
        f"{what} is left that every shard holds whole, on the timeline of this run; this rank "
        f"holds {held}",
        verdict=Verdict.CORRUPT if damaged else Verdict.MISSING,
        shards=stuck.reasons,
        remedy="`handfast verify` says what each directory holds; a lost run is never restarted "
        "from scratch in silence: give a fresh path for that",
    )


def _declared(reasons: Sequence[str]) -> Verdict:
    """The verdict of who declined, which opens its words behind its name; else FOREIGN.

    Of a mixture all may find out, and who is told by another first says no less.
    """
    said = {reason.partition(": ")[2].partition(":")[0] for reason in reasons}
    return next((verdict for verdict in Verdict if verdict in said), Verdict.FOREIGN)


def groups_apart(groups: Sequence[Sequence[int]]) -> str:
    """Name groups of ranks that hold the same."""
    return " against ".join(map(ranks, groups))


def apart(epoch: Epoch, groups: Sequence[Sequence[int]]) -> str:
    """Tell of the groups of ranks that hold the same of what all should."""
    return (
        f"epoch {epoch}: ranks differ in what they hold alike by design: {groups_apart(groups)}. "
        "Which is right can't be told from here. What to do: `handfast inspect RUN "
        f"--step {epoch.step}` names the tensors; restore an epoch before it; look at the memory "
        "and the device of the rank that stands alone, and for operations that are not "
        "deterministic"
    )


def below(proposal: Proposal) -> Refused:
    """Give the error of a restore that may not go below what had converged."""
    return Refused(
        f"epoch {proposal.epoch} is the newest that can be had, and is BELOW what had converged",
        verdict=Verdict.MISSING,
        shards=proposal.left_behind,
        remedy="bring back what is missing there; or go back to that epoch: policy='rollback'",
    )


class Load(msgspec.Struct, frozen=True):
    """What one rank says once it has loaded: what went wrong, or digests of what it stores."""

    problem: str = ""
    replicas: dict[str, bytes] = {}


def words(error: Exception) -> str:
    """Say what went wrong, in what a journal and a message can hold."""
    known = isinstance(error, HandfastError)
    return (str(error) if known else f"{type(error).__name__}: {error}")[:2000]


def suggest(replicas: Sequence[dict[str, bytes]]) -> None:
    """Warn, once, of tensors that all ranks store and that are the same on all."""
    first, others = replicas[0], replicas[1:]
    same = [p for p, d in sorted(first.items()) if others and all(o.get(p) == d for o in others)]
    if same:
        logger.warning(
            "all ranks stored the same values of %s; if they are alike by design, say so by "
            "replicated=(%r,) and they are stored once a node",
            some(same, 3),
            same[0],
        )
