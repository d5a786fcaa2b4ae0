"""The paper's processes: training, domains, a checkpoint, crashes, and a boundary that is claimed.

From the paper (P. Borrill, arXiv 2603.02603), of which we had the abstract only: that a checkpoint
is an *asynchronous composition* of persistence domains with crash-recovery failures, and the claim
that then *no temporal instant can serve as an atomicity boundary*. Every term below, and what an
instant is, is our own construction.

    Train(s)      = step.s -> save.s -> Train(s+1)
    Persist(i, e) = begin.i.(e+1) -> durable.i.(e+1) -> attest.i.(e+1) -> Persist(i, e+1),
                    once save.(e+1) has come, which it takes up to two epochs ahead;
                    and at any point: crash -> Recover(i, what is durable)
    Recover(i, e) = scan.i.e -> STOP
    Ckpt          = the Persist(i) of all domains in parallel, sharing save and crash alone
    Boundary(k)   = any event, k times -> now -> crash

An instant that hangs on no schedule is a number k: "now, after k events". It is the paper's claim
at its weakest and fairest; a k is *torn* if some run of k events leaves the domains at different
epochs. If all domains became durable in one event that they shared, nothing would be torn: that
event is what an asynchronous system does not have.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

from handfast.model.explore import explore
from handfast.model.network import Network
from handfast.model.process import STOP, Interrupted, Named, Prefix, Process, choice, process

__all__ = ["checkpoint", "torn_at"]

CRASH: Final = "crash"
NOW: Final = "now"
WINDOW: Final = 2  # epochs that a domain may be behind before the training must wait for it


@process
def train(step: int, last: int) -> Process:
    """Step after step; the state of each is handed to all domains at its own boundary."""
    onward = train(step + 1, last) if step < last else STOP
    return Prefix(f"step.{step}", Prefix(f"save.{step}", onward))


@process
def persist(i: int, kept: int, phase: int, taken: int, last: int, together: bool) -> Process:
    """One domain: epoch ``kept`` is durable, those up to ``taken`` were handed to it.

    ``phase`` is how far it is with the next one: nothing yet, begun, durable.
    """
    e = kept + 1
    options = [Prefix(CRASH, recover(i, kept))]
    if taken < last and taken - kept < WINDOW:
        handed = persist(i, kept, phase, taken + 1, last, together)
        options.append(Prefix(f"save.{taken + 1}", handed))
    if phase == 2:
        options.append(Prefix(f"attest.{i}.{kept}", persist(i, kept, 0, taken, last, together)))
    elif phase == 1:
        durable = f"durable.{e}" if together else f"durable.{i}.{e}"
        options.append(Prefix(durable, persist(i, e, 2, taken, last, together)))
    elif kept < taken:
        options.append(Prefix(f"begin.{i}.{e}", persist(i, kept, 1, taken, last, together)))
    return choice(*options)


@process
def recover(i: int, kept: int) -> Process:
    """Look at what is durable."""
    return Prefix(f"scan.{i}.{kept}", STOP)


@process
def boundary(k: int, alphabet: tuple[Hashable, ...]) -> Process:
    """Count k events of any kind, and say: now."""
    if k == 0:
        return Prefix(NOW, Prefix(CRASH, STOP))
    return choice(*(Prefix(event, boundary(k - 1, alphabet)) for event in alphabet))


def checkpoint(domains: int, epochs: int, *, together: bool = False) -> dict[str, Process]:
    """Give a training and its domains; ``together`` lets all become durable in one event."""
    parts: dict[str, Process] = {"training": Interrupted(train(1, epochs), Prefix(CRASH, STOP))}
    return parts | {f"domain {i}": persist(i, 0, 0, 0, epochs, together) for i in range(domains)}


def torn_at(domains: int, k: int, *, together: bool = False) -> bool:
    """Search all runs: can a crash after exactly k events find the domains at different epochs?"""
    parts = checkpoint(domains, k + 1, together=together)
    inside = Network(parts, {})
    names = dict.fromkeys(
        event for part in inside.parts.values() for row in part.edges for event, _ in row
    )
    counted = tuple(e for e in names if e != CRASH and not str(e).startswith("scan"))
    network = Network({**parts, "boundary": boundary(k, counted)}, {"boundary": frozenset(counted)})
    scans = list(network.parts.values())[1:-1]

    def together_still(state: tuple[int, ...]) -> bool:
        found = set()
        for part, at in zip(scans, state[1:-1], strict=True):
            term = part.terms[at]
            if not (isinstance(term, Named) and term.body.__name__ == "recover"):
                return True
            found.add(term.arguments[1])
        return len(found) == 1

    return bool(explore(network, always={"one epoch": together_still}).breaches)
