"""One round of the gate: each rank posts who it is, one judges, and all hear the same.

A rank posts 32 bytes for its stack, and if its node told nothing, why; only the first that has a
stack posts its facts, and does so before its own post, so that a digest which is there has its
facts or a holder who is missing. Rank 0 judges; if it does not, the first of the others that has
waited long enough. Whoever judges puts the verdict once, so two judges leave one verdict.

**A round is its own.** Its keys carry the restart count, the size of the job, and how often this
rank has arrived with these: torchrun keeps one store over its restarts, and does not count a
restart for a node that was replaced (torch/distributed/elastic/agent/server/api.py, 2.13). A rank
that died in a round before it arrived is one behind in the next with the same count and size, and
would be named as missing there, never judged by what it ran before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import StrEnum
from itertools import chain
from typing import Final, TypeVar

import msgspec

from handfast.errors import UNREADABLE, Blocked, FormatError, HandfastError
from handfast.fleet.compat.judge import Ruling, judge, natural
from handfast.fleet.compat.meaning import expanded, reads
from handfast.fleet.compat.rules import Level, Place, Probed, Rules, Scope
from handfast.fleet.compat.words import several
from handfast.fleet.gate.keys import Keys
from handfast.fleet.gate.stack import NODE, Stack, decode, digest, encode, held, lost
from handfast.store.files import describe

__all__ = ["WORLD", "Mode", "Seat", "Verdict", "arrive", "attend", "decide", "gather", "ranks_of"]

_T = TypeVar("_T")

WORLD: Final = "world"
UNTOLD: Final = "node-tells"  # the name of a finding, as "all-ranks" and "judged" are
GRACE_S: Final = 10.0  # how much longer the others wait for a verdict than the judge for them
NAMED: Final = 8  # ranks that are missing, by name; the others are counted
SHOWN: Final = 8  # findings that are said, and so all that travel


class Mode(StrEnum):
    """What a verdict leads to."""

    OBSERVE = "observe"  # the judge reports
    WARN = "warn"  # every rank reports what would be refused
    ENFORCE = "enforce"  # every rank reports it, and ends


class Seat(msgspec.Struct, frozen=True):
    """A rank's place in its round, as torchrun tells it; ``first`` is its node's first rank."""

    rank: int
    size: int
    host: str
    first: int
    local: int


class Posted(msgspec.Struct, frozen=True):
    """What a rank posts: its place, the digest of its stack, and why its node told nothing."""

    seat: Seat
    digest: str
    untold: str = ""


class Finding(msgspec.Struct, frozen=True):
    """What one rule says, without the names of all whom it is about: every rank reads this."""

    rule: str
    level: Level
    sentence: str


class Verdict(msgspec.Struct, frozen=True):
    """What every rank hears. ``mode`` is the judge's, so that no rank goes on alone.

    ``findings`` are the worst, and begin with the worst of them; of warnings, what is broken stands
    before why nodes told nothing, and that before what is unknown. There are so many ``more``. So
    many ``ranks`` came, with so many ``stacks``.
    """

    level: Level
    mode: Mode
    findings: tuple[Finding, ...]
    ranks: int
    stacks: int
    more: int = 0

    @property
    def refused(self) -> bool:
        """Whether no rank may go on."""
        return self.level is Level.REFUSE and self.mode is Mode.ENFORCE

    @property
    def line(self) -> str:
        """Say it in one line: what is worst, and how much more there is."""
        if not self.findings:
            return f"fine: {self.ranks} ranks, {self.stacks} stacks"
        left = len(self.findings) - 1 + self.more
        return f"{self._told(self.findings[0])}{f' (and {left} more)' if left else ''}"

    @property
    def lines(self) -> tuple[str, ...]:
        """Say what is worst, a line each, and then how much more there is."""
        said = [self._told(each) for each in self.findings] or [self.line]
        return (*said, f"and {self.more} more") if self.more else tuple(said)

    def _told(self, finding: Finding) -> str:
        word = "refused" if self.refused else "would be refused"
        bad = finding.level is Level.REFUSE
        return f"{word if bad else 'warning'}: {' '.join(finding.sentence.split())}"


def arrive(keys: Keys, base: str, seat: Seat, facts: Stack, untold: str = "") -> str:
    """Post a rank's stack, and why its node told nothing; gives the name of its round."""
    place = f"handfast.gate/{base}/{seat.size}"
    place += f"/{keys.claim(f'{place}/arrived/{seat.rank}')}"
    text = encode(facts)
    name = digest(text)
    if keys.claim(f"{place}/holders/{name}") == 1:
        keys.set(f"{place}/facts/{name}", text)
    post = Posted(seat, name, untold)
    keys.set(f"{place}/rank/{seat.rank}", msgspec.json.encode(post).decode())
    return place


def gather(keys: Keys, place: str, size: int, timeout_s: float) -> tuple[
    dict[int, Posted], dict[str, Stack]
]:  # fmt: skip
    """Collect who came within so many seconds, and the facts of each distinct stack."""
    end = time.monotonic() + timeout_s
    posted: dict[int, Posted] = {}
    for rank in range(size):
        text = keys.get(f"{place}/rank/{rank}", max(0.0, end - time.monotonic()))
        if text is not None:
            posted[rank] = _read(text, Posted)
    stacks = {}
    for name in sorted({each.digest for each in posted.values()}):
        text = keys.get(f"{place}/facts/{name}", max(0.0, end - time.monotonic()))
        if text is not None:  # else its first holder died on its way, and is missing
            stacks[name] = decode(text, name)
    return posted, stacks


def decide(
    rules: Rules,
    posted: Mapping[int, Posted],
    stacks: Mapping[str, Stack],
    *,
    size: int,
    mode: Mode,
    groups: Mapping[str, Iterable[int]],
    probed: Iterable[Probed] = (),
    whose: str = "",
    excuse: Callable[[Iterable[Ruling]], tuple[Ruling, ...]] = tuple,
) -> Verdict:
    """Judge the ranks that came, group by group; those that did not are a refusal of their own.

    ``groups`` are communicators, by name; each is judged by itself. ``probed`` are the results that
    rules of must-probe ask for. Raises ValueError for a group with a rank that the round has not.
    """
    if wrong := [f"{g}: {r}" for g, ranks in groups.items() for r in ranks if not 0 <= r < size]:
        raise ValueError(f"a group names a rank that this round of {size} has not: {wrong[0]}")
    within = [frozenset(ranks) for ranks in groups.values()]
    rules = expanded(rules, chain.from_iterable(stacks.values()))
    wanted = sorted({fact for rule in rules.rules for fact in chain(*reads(rule))})
    listed = set[str]().union(*stacks.values())
    known = {name: held(facts, wanted, listed) for name, facts in stacks.items()}
    blank: Stack = dict.fromkeys(wanted)
    names = {rank: f"rank {rank} ({each.seat.host})" for rank, each in posted.items()}
    nodes = {names[rank]: known.get(each.digest, blank) for rank, each in posted.items()}
    places = [
        Place(Scope.GROUP, name, tuple(names[rank] for rank in ranks if rank in names))
        for name, ranks in groups.items()
    ]
    found = judge(rules, nodes, places=places, probed=probed, whose=whose).rulings
    untold = {names[rank]: each.untold for rank, each in posted.items() if each.untold}
    rulings = (*excuse(found), *_blind(rules, found, untold), *_deaf(names, posted, stacks))
    if apart := [names[rank] for rank in sorted(names) if all(rank not in g for g in within)]:
        sentence = f"{several(apart)}: in no group, and so not judged"
        rulings = (*rulings, Ruling("all-groups", Level.WARN, sentence, tuple(apart)))
    missing = tuple(rank for rank in range(size) if rank not in posted)
    if missing:
        rulings = (_absent(missing, posted, size), *rulings)
    ordered = sorted(rulings, key=_weight)
    level = ordered[0].level if ordered else Level.FINE
    worst = tuple(Finding(each.rule, each.level, each.sentence) for each in ordered[:SHOWN])
    return Verdict(level, mode, worst, len(posted), len(stacks), len(ordered) - len(worst))


def attend(
    keys: Keys,
    place: str,
    seat: Seat,
    timeout_s: float,
    court: Callable[[Mapping[int, Posted], Mapping[str, Stack]], Verdict],
    mode: Mode,
) -> Verdict:
    """Judge, as rank 0, or hear the verdict. Raises Blocked where none comes.

    A court that fails is a verdict, too: the round could not be judged, and all hear why.
    """

    def preside(wait_s: float) -> None:
        try:
            found = court(*gather(keys, place, seat.size, wait_s))
        except (HandfastError, ValueError) as error:
            found = _failed(str(error), mode, seat.size)
        except OSError as error:
            what = f"{error.filename or 'the system'}: {describe(error)}"
            found = _failed(what, mode, seat.size)
        text = msgspec.json.encode(found).decode()
        keys.set(f"{place}/verdict", keys.once(f"{place}/first", text))

    if seat.rank == 0:
        preside(timeout_s)
    heard = keys.get(f"{place}/verdict", timeout_s + GRACE_S)
    if heard is None and keys.claim(f"{place}/seat") == 1:
        preside(0.0)
    heard = heard or keys.get(f"{place}/verdict", GRACE_S)
    if heard is None:
        raise Blocked(
            f"the gate had no verdict within {timeout_s + 2 * GRACE_S:g} s", by=["rank 0"]
        )
    verdict = _read(heard, Verdict)
    if keys.claim(f"{place}/heard") == verdict.ranks:
        keys.set(f"{place}/heard/all", "1")
    if seat.rank == 0:  # whose process may hold the store: the others read it first
        keys.get(f"{place}/heard/all", GRACE_S)
    return verdict


def ranks_of(text: str, size: int) -> dict[str, tuple[int, ...]]:
    """Read groups: "prefill=0-3 decode=4-7,9"; an empty text is the whole world.

    Raises ValueError for any other text.
    """
    if not text.strip():
        return {WORLD: tuple(range(size))}
    found: dict[str, tuple[int, ...]] = {}
    for part in text.split():
        name, _, spans = part.partition("=")
        if not name or not spans or name in found:
            raise ValueError(f"{part}: no group. What to do: write prefill=0-3 decode=4-7,9")
        ranks: list[int] = []
        for span in spans.split(","):
            low, _, high = span.partition("-")
            whole = low.isdecimal() and (high or low).isdecimal()
            if not (whole and int(low) <= int(high or low) < size):
                raise ValueError(f"{part}: no ranks of this round of {size}: {span}")
            ranks += range(int(low), int(high or low) + 1)
        found[name] = tuple(ranks)
    return found


def _absent(missing: tuple[int, ...], posted: Mapping[int, Posted], size: int) -> Ruling:
    """Say who did not come, and its node, where another rank of it came and ranks lie in blocks.

    So torchrun gives them out; other launchers may deal them out like cards.
    """
    hosts: dict[int, str] = {}
    for seat in (each.seat for each in posted.values()):
        node = range(seat.first, seat.first + seat.local)
        if any(posted[rank].seat.host != seat.host for rank in node if rank in posted):
            hosts = {}
            break
        hosts |= dict.fromkeys(node, seat.host)
    names = [f"{rank} ({hosts[rank]})" if rank in hosts else str(rank) for rank in missing]
    more = f" and {len(names) - NAMED} others" if len(names) > NAMED else ""
    told = f"rank{'s' * (len(names) > 1)} {', '.join(names[:NAMED])}{more}"
    sentence = f"{told} of {size} did not come to the gate in time"
    return Ruling("all-ranks", Level.REFUSE, sentence, tuple(names))


def _weight(ruling: Ruling) -> tuple[bool, bool, bool]:
    """Sort what is worst first; of one level what is broken, then why nodes told nothing."""
    return ruling.level is not Level.REFUSE, ruling.unknown, ruling.rule != UNTOLD


def _blind(rules: Rules, found: Iterable[Ruling], untold: Mapping[str, str]) -> Iterator[Ruling]:
    """Say why nodes told nothing, where a rule could not be told for the want of it."""
    of_nodes = {
        rule.name
        for rule in rules.rules
        if any(fact.partition(".")[0] in NODE for fact in chain(*reads(rule)))
    }
    dark = {name for each in found if each.unknown and each.rule in of_nodes for name in each.nodes}
    for why in dict.fromkeys(untold.values()):
        who = tuple(name for name in natural(dark & untold.keys()) if untold[name] == why)
        if who:
            sentence = f"{several(who)}: what the node runs is unknown: {why}"
            yield Ruling(UNTOLD, Level.WARN, sentence, who, unknown=True)


def _deaf(
    names: Mapping[int, str], posted: Mapping[int, Posted], stacks: Mapping[str, Stack]
) -> Iterator[Ruling]:
    """Say whose collectors told nothing, so that nobody knows what they would have."""
    for name, facts in stacks.items():
        if gone := lost(facts):
            who = tuple(names[rank] for rank in sorted(posted) if posted[rank].digest == name)
            sentence = f"{several(who)}: nothing was heard of the collectors {several(gone)}"
            yield Ruling("collectors", Level.WARN, sentence, who, unknown=True)


def _failed(what: str, mode: Mode, size: int) -> Verdict:
    finding = Finding("judged", Level.REFUSE, f"this round could not be judged: {what}")
    return Verdict(Level.REFUSE, mode, (finding,), size, 0)


def _read(text: str, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(text.encode(), type=kind)
    except UNREADABLE as error:
        raise FormatError(
            f"what a rank posted can't be read: {error}. What to do: run the same release of "
            "handfast on all nodes"
        ) from error
