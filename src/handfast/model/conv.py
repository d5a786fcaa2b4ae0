"""Snap and Conv as types that have nothing to do with each other, and the one lemma between them.

The paper (P. Borrill, arXiv 2603.02603, abstract) calls it a type error to take the one for the
other. What the types are, and the lemma, is our own construction:

- :class:`Snap` says that *at an instant* every domain stood at one epoch. It is made from a
  recorded trace alone, so only afterwards: no process can have it while it runs.
- :class:`Conv` says that the protocol *has converged* on an epoch in a tier. It is made from a
  certificate alone, and speaks of no instant.

Neither can be made from the other, compared with it, or used in its place: a type checker says so,
and so does Python where it is not asked. The way from an instant to convergence does not exist; one
direction of it does, and is :func:`retained_from`.
"""

from __future__ import annotations

from typing import NoReturn, final

from handfast.core.lattice import GENESIS, Epoch
from handfast.core.messages import Certificate, Configured, Converged, Released, Staged
from handfast.laws.truth import Truth

__all__ = ["Conv", "Snap", "retained_from"]


@final
class Snap:
    """At instant ``at``, a number of records synced, every domain stood at ``epoch``."""

    __slots__ = ("at", "epoch")

    def __init__(self, trace: Truth, at: int) -> None:
        """Look it up in a recorded trace. A domain stands at the greatest epoch that it retains.

        Raises ValueError where the trace has no such instant, or domains stood apart at it.
        """
        if not isinstance(trace, Truth):
            raise TypeError(f"a Snap is made from a recorded trace, not from {trace!r}")
        if not 0 <= at <= len(trace.journal):
            raise ValueError(f"the trace has the instants 0 to {len(trace.journal)}, not {at}")
        held: dict[str, set[Epoch]] = {d.id: set() for d in trace.rosters[-1].configuration.domains}
        for written in trace.journal[:at]:
            _follow(held, written.domain, written.record)
        tops = {domain: max(epochs, default=None) for domain, epochs in held.items()}
        (epoch, *others) = dict.fromkeys(tops.values())
        if others or epoch is None:
            apart = ", ".join(f"{domain} at {top or 'nothing'}" for domain, top in tops.items())
            raise ValueError(f"at instant {at} the domains stood apart: {apart}")
        self.at = at
        self.epoch = epoch

    def __repr__(self) -> str:
        return f"Snap({self.at}, {self.epoch})"

    def __bool__(self) -> NoReturn:
        raise TypeError("a Snap is no condition: it has been so, or there is none")


@final
class Conv:
    """The protocol has converged on ``epoch`` in ``tier``, as a certificate proves."""

    __slots__ = ("certificate",)

    def __init__(self, certificate: Certificate) -> None:
        if not isinstance(certificate, Certificate):
            raise TypeError(f"a Conv is made from a certificate, not from {certificate!r}")
        self.certificate = certificate

    @property
    def epoch(self) -> Epoch:
        """The epoch that converged."""
        return self.certificate.epoch

    @property
    def tier(self) -> str:
        """The tier in which it did."""
        return self.certificate.tier

    def __repr__(self) -> str:
        return f"Conv({self.epoch}, {self.tier!r})"

    def __bool__(self) -> NoReturn:
        raise TypeError("a Conv is no condition: there is a certificate, or there is no Conv")


def retained_from(conv: Conv, trace: Truth) -> int | None:
    """Hold the lemma against a trace: from some instant on, e is retained until superseded.

    That is: there is a T such that at every instant of the trace from T on, until a certificate of
    a higher epoch of the tier is written, every shard has at least k_T domains of the certificate's
    configuration that retain e. Gives the least such T, in records synced (that of the higher
    certificate, where it came first: members may converge late on what is superseded), or None
    where there is none: then the certificate lies, or its promise was broken.
    """
    roster = trace.roster(conv.certificate.configuration)
    tier = roster.tiers.index(conv.tier)
    groups = [roster.names(mask) for mask in roster.holders[tier]]
    held: dict[str, set[Epoch]] = {d.id: set() for d in roster.configuration.domains}
    since: int | None = None
    for at, written in enumerate(trace.journal, 1):
        record = written.record
        if isinstance(record, Converged) and _supersedes(record.certificate, conv):
            return at if since is None else since
        _follow(held, written.domain, record)
        kept = all(
            sum(conv.epoch in held[domain] for domain in group) >= roster.needs[tier]
            for group in groups
        )
        since = (at if since is None else since) if kept else None
    return since


def _supersedes(certificate: Certificate, conv: Conv) -> bool:
    return certificate.tier == conv.tier and certificate.epoch > conv.epoch


def _follow(held: dict[str, set[Epoch]], domain: str, record: object) -> None:
    """Join one durable record to what each domain retains."""
    if domain in held:
        if isinstance(record, Configured) and record.founding:
            held[domain].add(GENESIS)
        elif isinstance(record, Staged):
            held[domain].add(record.epoch)
        elif isinstance(record, Released):
            held[domain].difference_update(record.epochs)
