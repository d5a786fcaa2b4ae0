"""Claims about knowledge and optimizers, each worked out on the spot, with what it hangs on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, Final

import msgspec

from handfast.core.lattice import Epoch
from handfast.model.knowledge import (
    Convergence,
    Cuts,
    Handshake,
    Rules,
    Structure,
    followers,
    reachable,
)
from handfast.model.optimizer import AdamW, Values, moment_bound, moments_zeroed, step_reset
from handfast.model.wide import Wide

__all__ = ["Exhibit", "exhibits"]

MESSAGES: Final = 4
MANY: Final = 131_072  # domains
LONG: Final = 400  # steps, after which earlier ones no longer count


class Exhibit(msgspec.Struct, frozen=True):
    """A claim, whether it was found to hold, the figures that show it, and what it hangs on."""

    claim: str
    holds: bool
    figures: dict[str, Any]
    conditions: str


def exhibits() -> Iterator[Exhibit]:
    """Work out every exhibit that needs no framework; below a second."""
    yield handshake(MESSAGES)
    yield from switching(MESSAGES)
    yield certificate(2)
    yield certificate(3, ((0, 1), (0, 2)))
    yield lattice(3, 4)
    yield bounds()


def handshake(messages: int) -> Exhibit:
    """Find how deep "everyone knows" goes, at every point of the handshake of two."""
    model = Handshake(messages)
    talk = Structure(reachable(model), model.views)
    staged = talk.where(lambda point: point.staged)
    depths: dict[int, set[int]] = {}
    for i, point in enumerate(talk.points):
        if point.staged and point.delivered:
            depths.setdefault(point.delivered, set()).add(talk.depth(i, staged))
    return Exhibit(
        "m delivered messages give E^(m-1) of the fact that both have staged, and never C",
        depths == {m: {m - 1} for m in range(1, messages + 1)} and not talk.common(staged),
        {
            "points": len(talk.points),
            "depth by messages delivered": {m: sorted(deep) for m, deep in depths.items()},
            "points of common knowledge": talk.common(staged).bit_count(),
        },
        "each message answers the one before; any may be lost, late, doubled; no clocks; a view "
        "is a whole local history",
    )


def switching(messages: int) -> Iterator[Exhibit]:
    """Try every pair of rules on views: which switch together, and what a gate changes."""
    model = Handshake(messages)
    talk = Structure(reachable(model), model.views)
    rules = Rules(talk, followers(model, talk.points))
    pairs = list(rules.every())
    together = [pair for pair in pairs if rules.simultaneous(pair)]
    trivial = [(0, 0), (talk.everywhere, talk.everywhere)]
    yield Exhibit(
        "no rule on views switches both at once in all runs, but for never and always: what "
        "switches both at once is common knowledge",
        together == trivial and all(talk.common(one) == one for one, _ in together),
        {"pairs of rules": len(pairs), "simultaneous": len(together)},
        "the handshake's system: unreliable messages, no clocks. With a shared clock and a bound "
        "on delays there are such rules",
    )
    bare = sum(rules.mixes(pair, gated=False) for pair in pairs)
    gated = sum(rules.mixes(pair, gated=True) for pair in pairs)
    staged = talk.where(lambda point: point.staged)
    known = (talk.knows(0, staged), talk.knows(1, staged))
    yield Exhibit(
        "to switch once one knows that all have staged mixes interactions all the same; a gate "
        "that refuses frames of another epoch lets none through, under any rule",
        rules.mixes(known, gated=False) and rules.meets(known, gated=True) and gated == 0,
        {"pairs of rules": len(pairs), "that mix without a gate": bare, "with it": gated},
        "frames carry their sender's epoch, and the receiver looks before it interprets: so it "
        "holds by construction. The price is that nothing is interpreted while the two differ",
    )


def certificate(domains: int, edges: tuple[tuple[int, int], ...] | None = None) -> Exhibit:
    """Find where the certificate gives concurrent common knowledge, with and without fairness."""
    model = Convergence(domains, edges)
    found: dict[bool, tuple[int, int, int, int]] = {}
    for fair in (True, False):
        cuts = Cuts(model, fair=fair)
        fact = cuts.where(model.converged)
        certain = cuts.where(lambda cut: all(map(model.certain, cut.histories)))
        concurrent = cuts.concurrent_common(fact)
        same = certain if fair else 0
        found[fair] = (
            len(cuts.points),
            concurrent.bit_count(),
            cuts.common(fact).bit_count(),
            concurrent == same,
        )
    return Exhibit(
        "that all have staged is concurrent common knowledge exactly at the consistent cuts at "
        "which every domain holds the certificate, and common knowledge nowhere",
        all(same and not common for _, _, common, same in found.values()),
        {
            "domains": domains,
            "cuts, fair runs": found[True][0],
            "of concurrent common knowledge": found[True][1],
            "of common knowledge": found[True][2],
            "cuts, runs that may just stop": found[False][0],
            "of concurrent common knowledge there": found[False][1],
        },
        "in fair runs, where every message comes in the end. Where a run may just stop, who holds "
        "the certificate knows the fact, but not that others ever will",
    )


def lattice(epochs: int, domains: int) -> Exhibit:
    """Compare each vector of epochs with each other one, as sets of those at or above an epoch."""
    steps = [Epoch(1, step) for step in range(epochs)]
    vectors = list(product(steps, repeat=domains))
    pairs = same = 0
    for one, other in product(vectors, repeat=2):
        wide, beside = Wide.of(one), Wide.of(other)
        pairs += 1
        same += wide.meet(beside).vector() == tuple(map(min, one, other)) and wide.join(
            beside
        ).vector() == tuple(map(max, one, other))
    many = Wide.of([steps[at % epochs] for at in range(MANY)])
    return Exhibit(
        "a vector of one epoch a domain is the chain of the sets that are at or above each epoch: "
        "to meet is AND, to join is OR",
        same == pairs,
        {"pairs of vectors": pairs, "domains of the largest": MANY, "its sets": len(many.cuts)},
        "a finite distributive lattice (Birkhoff); few epochs are about at one time",
    )


def bounds() -> Exhibit:
    """Reach AdamW's bound on its moments, and step with a wrong counter, by its arithmetic."""
    figures, reached = {}, []
    for beta1, beta2 in ((0.9, 0.999), (0.9, 0.95)):
        rule = AdamW(beta1=beta1, beta2=beta2, eps=0.0)
        m: Values = (0.0,)
        v: Values = (0.0,)
        for back in reversed(range(LONG)):
            m, v = rule.moments(m, v, ((beta1 / beta2) ** back,))
        zeroed = rule.moments((0.0,), (0.0,), (1.0,))
        seen = {
            "|m| / sqrt(v), the most": m[0] / math.sqrt(v[0]),
            "counter reset, times the step": rule.direction((1.0,), (1.0,), 1)[0],
            "moments zeroed, the first step in lr": rule.direction(*zeroed, 10**6)[0],
        }
        formulas = (
            moment_bound(beta1, beta2),
            step_reset(beta1, beta2),
            moments_zeroed(beta1, beta2),
        )
        reached += [math.isclose(*both) for both in zip(seen.values(), formulas, strict=True)]
        figures[f"betas ({beta1}, {beta2})"] = {k: float(f"{x:.4g}") for k, x in seen.items()}
    return Exhibit(
        "|m| <= K sqrt(v) on every trajectory, and K is reached; a counter reset to 1 scales the "
        "step, and moments set to 0 under an old counter give a first step of so many lr",
        all(reached),
        figures,
        "moments began at 0; the factors are for an old counter (t -> infinity) and eps = 0; that "
        "no gradients give more than K is Cauchy and Schwarz's (docs/optimizer.md)",
    )
