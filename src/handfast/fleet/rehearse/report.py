"""What a rehearsal has shown: matrices of nodes and of pairs, and the moves that broke it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, permutations, product

import msgspec

from handfast.fleet.compat.rules import Probed
from handfast.fleet.rehearse.fleet import Found, Outcome, worst
from handfast.fleet.rehearse.reading import Rehearsal
from handfast.fleet.rehearse.rehearsing import Did, Kind, Rehearsed, Trail

__all__ = ["Break", "Pair", "Report", "Row", "recorded", "report"]


class Row(msgspec.Struct, frozen=True):
    """What the nodes ran, how often a move led there, and the worst that came of one.

    ``by`` has the worst of each kind of move: a fleet that came down to these versions may differ
    from one that came up to them.
    """

    versions: tuple[str, ...]
    met: int
    worst: Outcome
    by: dict[Kind, Outcome]
    sentence: str


class Pair(msgspec.Struct, frozen=True):
    """What came of the probes of a client and a server of these versions, in whichever fleets.

    It worked ``worked`` of the ``met`` times that it was asked; the sentence is of the worst.
    """

    client: str
    server: str
    met: int
    worked: int
    worst: Outcome
    sentence: str


class Break(msgspec.Struct, frozen=True):
    """A move after which a fleet did not work: ``times`` of the ``of`` times that it was made.

    ``walk`` is the shortest that led there, in words, that move included. ``kept`` are the
    directories of the fleets that it broke, where they were to be kept.
    """

    kind: Kind
    node: str
    versions: tuple[str, ...]
    outcome: Outcome
    sentence: str
    said: tuple[str, ...]
    times: int
    of: int
    walk: tuple[str, ...]
    kept: tuple[str, ...]


class Report(msgspec.Struct, frozen=True):
    """A rehearsal's result; see :class:`Rehearsed` for ``judged``, ``cut``, ``unmade``, ``untidy``.

    ``pairs`` has those of all versions that were probed, ``tally`` how many moves of each kind came
    to what.
    """

    rehearsal: str
    nodes: tuple[str, ...]
    judged: bool
    cut: bool
    tally: dict[Kind, dict[Outcome, int]]
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    breaks: tuple[Break, ...]
    fleets: int
    moves: int
    unmade: int
    untidy: tuple[str, ...]
    seconds: float

    @property
    def refused(self) -> int:
        """How many rows are at worst refused in words."""
        return sum(row.worst is Outcome.REFUSES for row in self.rows)

    @property
    def bad(self) -> int:
        """How many rows fail, hang or die."""
        return len(self.rows) - self.refused - sum(r.worst is Outcome.WORKS for r in self.rows)


def report(rehearsal: Rehearsal, came: Rehearsed) -> Report:
    """Put what came of a rehearsal together."""
    return Report(
        rehearsal=rehearsal.name,
        nodes=rehearsal.nodes,
        judged=came.judged,
        cut=came.cut,
        tally=_tally(came.trails),
        rows=_rows(rehearsal, came.trails),
        pairs=_pairs(rehearsal, came.trails),
        breaks=_breaks(rehearsal.nodes, came.trails),
        fleets=len(came.trails),
        moves=sum(map(len, came.trails)),
        unmade=came.unmade,
        untidy=came.untidy,
        seconds=came.seconds,
    )


def recorded(rehearsal: Rehearsal, came: Rehearsed) -> tuple[Probed, ...]:
    """The results for rules of must-probe.

    A pair passed if it worked each time, and no fleet in which the two met failed otherwise.
    """
    if rehearsal.record is None:
        return ()
    facts = {version: rehearsal.facts(version) for version in rehearsal.versions}
    passed: dict[tuple[tuple[str, ...], tuple[str, ...]], bool] = {}
    for did in chain(*came.trails):
        for each in did.pairs:
            key = facts[each.client], facts[each.server]
            passed[key] = passed.get(key, True) and each.found.outcome is Outcome.WORKS
        if not did.works and not did.pairs:  # it died before it could be probed
            for client, server in permutations(did.versions, 2):
                passed[facts[client], facts[server]] = False
    return tuple(Probed(rehearsal.record.probe, *key, ok) for key, ok in passed.items())


def _rows(rehearsal: Rehearsal, trails: Iterable[Trail]) -> tuple[Row, ...]:
    met: dict[tuple[str, ...], list[Did]] = {}
    for did in chain(*trails):
        met.setdefault(did.versions, []).append(did)
    place = {version: at for at, version in enumerate(rehearsal.versions)}
    rows = []
    for versions in sorted(met, key=lambda versions: [place[each] for each in versions]):
        by: dict[Kind, list[Found]] = {}
        for did in met[versions]:
            by.setdefault(did.kind, []).append(did.found)
        found = worst(chain(*by.values()))
        outcomes = {kind: worst(by[kind]).outcome for kind in Kind if kind in by}
        rows.append(Row(versions, len(met[versions]), found.outcome, outcomes, found.sentence))
    return tuple(rows)


def _pairs(rehearsal: Rehearsal, trails: Iterable[Trail]) -> tuple[Pair, ...]:
    met: dict[tuple[str, str], list[Found]] = {}
    for asked in chain.from_iterable(did.pairs for did in chain(*trails)):
        met.setdefault((asked.client, asked.server), []).append(asked.found)
    pairs = []
    for client, server in product(rehearsal.versions, rehearsal.versions):
        if found := met.get((client, server)):
            worked = sum(each.outcome is Outcome.WORKS for each in found)
            bad = worst(found)
            what = (len(found), worked, bad.outcome, bad.sentence)
            pairs.append(Pair(client, server, *what))
    return tuple(pairs)


def _tally(trails: Iterable[Trail]) -> dict[Kind, dict[Outcome, int]]:
    count = Counter((did.kind, did.found.outcome) for did in chain(*trails))
    tally = {kind: {o: count[kind, o] for o in Outcome if count[kind, o]} for kind in Kind}
    return {kind: outcomes for kind, outcomes in tally.items() if outcomes}


def _breaks(nodes: Sequence[str], trails: Iterable[Trail]) -> tuple[Break, ...]:
    """Each move that broke something, by the shortest of its walks; the shortest comes first."""
    made: dict[tuple[Kind, str, tuple[str, ...]], list[Trail]] = {}
    for trail in trails:
        for at, did in enumerate(trail, 1):
            made.setdefault((did.kind, did.node, did.versions), []).append(trail[:at])
    found = []
    for (kind, node, versions), all_of in made.items():
        if broke := [trail for trail in all_of if not trail[-1].works]:
            trail = min(broke, key=len)
            last = trail[-1].found
            what = (last.outcome, last.sentence, last.said, len(broke), len(all_of))
            walk = tuple(_spell(nodes, did) for did in trail)
            kept = tuple(each[-1].kept for each in broke if each[-1].kept)
            found.append(Break(kind, node, versions, *what, walk, kept))
    return tuple(sorted(found, key=lambda each: len(each.walk)))


def _spell(nodes: Sequence[str], did: Did) -> str:
    """A move in words."""
    if did.kind is Kind.START:
        pairs = zip(nodes, did.versions, strict=True)
        return f"start {', '.join(f'{node} {version}' for node, version in pairs)}"
    version = did.versions[nodes.index(did.node)]
    return f"{did.kind} {did.node}" + (f" to {version}" if did.kind is not Kind.RESTART else "")
