"""Whole parts: unreadable, of other jobs, copies of each other, or of another step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Final

import xxhash

from handfast.audit.checks.seen import READS, Look
from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.found import Clock, Part, Role, Step, Tensor
from handfast.audit.room import BEYOND

__all__ = ["identical", "jobs", "repeated", "replicas", "spared", "structure", "times"]

SHOWN: Final = 6
LEAST: Final = 64
"""Bytes below which tensors that are alike say nothing: counters, scales, empty shards."""

CHECKED: Final = ("CRC-32", "checksum", "hash")
"""How a problem says that bytes were held against what was written down of them."""

TRAINED: Final = frozenset({Role.PARAMETER, Role.MASTER, Role.FIRST, Role.SECOND, Role.MOMENTUM})


def structure(step: Step, look: Look) -> Iterator[Finding]:
    """Say what is missing, too much, cut or unreadable, by the format's own rules."""
    if not step.committed:
        says = f"the step was never committed: {step.commit or 'what commits it'} is not there"
        yield Finding(Code.UNCOMMITTED, Strength.CERTAIN, step.path, says)
    for code, strength, found, what in (
        (Code.MISSING, Strength.CERTAIN, step.missing, "is missing"),
        (Code.EXTRA, Strength.STRONG, step.extra, "belongs to nothing here"),
    ):
        for path, why in step_of(found):
            says = f"{path} {what}: {why}"
            yield Finding(code, step.strength(strength), step.path, says, (path,))
    for part in step.parts:
        if part.harmful:
            named = ", ".join(part.harmful[:3])
            says = (
                f"{part.path} names {named}, which runs code of whoever wrote it where "
                "torch.load(weights_only=False) or pickle loads it; nothing was run here"
            )
            yield Finding(Code.HARMFUL, Strength.STRONG, step.path, says, (part.path,))
        if part.problem:
            code = Code.TRUNCATED if "ends there" in part.problem else Code.UNREADABLE
            strength = Strength.STRONG if BEYOND in part.problem else Strength.CERTAIN
            says = f"{part.path} can't be read: {part.problem}"
            yield Finding(code, strength, step.path, says, (part.path,))
        bad: dict[Code, int] = defaultdict(int)
        first: dict[Code, list[str]] = defaultdict(list)
        for tensor in part.tensors:
            if problem := look.at(tensor).problem:
                code = Code.CORRUPT if any(w in problem for w in CHECKED) else Code.TRUNCATED
                bad[code] += 1
                if len(first[code]) < SHOWN:
                    first[code].append(f"{tensor.path}: {problem}")
        for code, count in bad.items():
            says = f"{count} tensors of {part.path} can't be read"
            if code is Code.CORRUPT:
                says = f"{count} tensors of {part.path} are not the bytes that were written"
            told = tuple(first[code])
            yield Finding(code, Strength.CERTAIN, step.path, says, (part.path,), told)


def spared(step: Step, look: Look) -> Iterator[Finding]:
    """Say of which tensors nothing is known, as others had their storages read often enough."""
    for part in step.parts:
        count = sum(look.at(tensor).spared for tensor in part.tensors)
        if count:
            says = (
                f"{count} tensors of {part.path} were not looked at: what they lie in was read "
                f"{READS} times, through others that lie there"
            )
            yield Finding(Code.UNREAD, Strength.HINT, step.path, says, (part.path,))


def step_of(found: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Paths with their reasons; the many of one reason as one."""
    by_why: dict[str, list[str]] = defaultdict(list)
    for path, why in found:
        by_why[why].append(path)
    for why, paths in by_why.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        yield f"{paths[0]}{more}", why


def jobs(step: Step) -> Iterator[Finding]:
    """Find parts of another run, and parts that disagree on what they all must know."""
    runs: dict[str, list[Part]] = defaultdict(list)
    for part in step.parts:
        if part.run:
            runs[part.run].append(part)
    if len(runs) > 1:
        yield _apart(step, Code.EXTRA, f"its parts are of {len(runs)} runs", runs)
    facts = dict.fromkeys(name for part in step.parts for name in part.facts)
    for name in facts:
        said: dict[str, list[Part]] = defaultdict(list)
        for part in step.parts:
            if name in part.facts:
                said[_fact(part.facts[name])].append(part)
        if len(said) > 1:
            yield _apart(step, Code.WORLD, f"its parts disagree on {name}", said)


def _fact(value: Any) -> str:
    """A fact in words: Python refuses to write the longest integers out, and files hold any."""
    return hex(value) if type(value) is int and value.bit_length() > 64 else str(value)


def _apart(step: Step, code: Code, says: str, groups: dict[str, list[Part]]) -> Finding:
    told = tuple(
        f"{value}: {_named([part.path for part in parts])}" for value, parts in groups.items()
    )
    fewest = min(groups.values(), key=len)
    strength = step.strength(Strength.CERTAIN)
    return Finding(code, strength, step.path, says, tuple(p.path for p in fewest), told[:SHOWN])


def replicas(step: Step, look: Look) -> Iterator[Finding]:
    """Find what the format keeps alike in several parts, and is not: bits, by groups of parts."""
    by_key: dict[str, list[tuple[Part, Tensor]]] = defaultdict(list)
    for part in step.parts:
        for tensor in part.tensors:
            if tensor.replica:
                by_key[tensor.replica].append((part, tensor))
    told: dict[tuple[tuple[str, ...], ...], list[tuple[Part, Tensor]]] = defaultdict(list)
    for copies in by_key.values():
        groups: dict[bytes, list[str]] = defaultdict(list)
        for part, tensor in copies:
            if not look.at(tensor).lost:
                groups[look.at(tensor).digest].append(part.path)
        if len(groups) > 1:
            told[tuple(map(tuple, groups.values()))].append(copies[0])
    for apart, found in told.items():
        tensor = found[0][1]
        names = ", ".join(t.path for _, t in found[:3]) + (" ..." if len(found) > 3 else "")
        yield Finding(
            Code.REPLICAS,
            Strength.CERTAIN,
            step.path,
            f"{len(found)} tensors that are alike in all parts, {tensor.promise or 'by the format'}"
            f", are not ({names})",
            min(apart, key=len),
            tuple(f"alike in {_named(group)}" for group in apart[:SHOWN]),
        )


def _named(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def identical(step: Step, look: Look) -> Iterator[Finding]:
    """Find parts of different ranks whose trained values are the same, or all zero.

    Only pieces of known places count, that is shards: files of ranks that hold the whole are copies
    by design, for all one knows. Nor do a few bytes. All zero is strong where other parts have
    numbers there; a part with nothing but zeros is no fault by itself.
    """
    prints: dict[bytes, list[Part]] = defaultdict(list)
    zero, full = [], []
    for part in step.parts:
        own = _own(part, look)
        if not own:
            continue
        if all(look.at(tensor).zero for tensor in own):
            zero.append(part)
        else:
            full.append(part)
            if all(tensor.offset is not None for tensor in own):
                prints[_print(own, look)].append(part)
    for same in prints.values():
        if len(same) > 1 and len({tuple(sorted(part.rank.items())) for part in same}) > 1:
            paths = tuple(part.path for part in same)
            says = f"{len(same)} shards of different ranks hold the same bits, moments and all"
            yield Finding(Code.IDENTICAL, step.strength(Strength.STRONG), step.path, says, paths)
    if zero and full:
        paths = tuple(part.path for part in zero)
        says = f"{_named(paths)}: everything that is trained is zero there, and not in other shards"
        yield Finding(Code.ZERO, step.strength(Strength.STRONG), step.path, says, paths)


def _own(part: Part, look: Look) -> list[Tensor]:
    """What a part has for itself of what is trained; nothing where it is little, or unreadable."""
    own = [t for t in part.tensors if t.role in TRAINED and not t.replica]
    if any(look.at(tensor).lost for tensor in own):
        return []
    return own if sum(look.at(tensor).nbytes for tensor in own) >= LEAST else []


def _print(tensors: Sequence[Tensor], look: Look) -> bytes:
    found = xxhash.xxh3_128()
    for tensor in sorted(tensors, key=lambda tensor: tensor.path):
        found.update(look.at(tensor).digest)
    return found.digest()


def repeated(steps: Sequence[Step], look: Look) -> Iterator[Finding]:
    """Find steps whose values are those of another one: what was saved again is stale.

    Moments change in every update, so it is strong where what counts updates has risen and they
    have not. Else there may have been none: gradients were accumulated, a loss scaler skipped it,
    the best one was saved again. Weights alone may be frozen, or of a training that has ended. Two
    of one number are copies by design (the best one, the last one), and so may be two without.
    """
    before: dict[bytes, Step] = {}
    for step in steps:
        own = [t for part in step.parts for t in part.tensors if t.role in TRAINED]
        moving = [t for t in own if t.role in (Role.FIRST, Role.SECOND, Role.MOMENTUM)]
        chosen = moving or own
        if any(look.at(t).lost for t in chosen) or all(look.at(t).zero for t in chosen):
            continue
        if sum(look.at(tensor).nbytes for tensor in chosen) < LEAST:
            continue
        other = before.setdefault(_print(chosen, look), step)
        if other is not step and (other.number != step.number or step.number is None):
            what = "moments" if moving else "weights"
            says = f"its {what} are, bit for bit, those of {other.path}: a stale state saved again"
            rose = _updates(step) > _updates(other)
            known = moving and step.number is not None and rose
            strength = step.strength(Strength.STRONG) if known else Strength.HINT
            if not known:
                says += ", if there was an update between them"
            yield Finding(Code.STALE, strength, step.path, says, (), (other.path,))


def _updates(step: Step) -> int:
    """The most updates that anything in a step's files has counted; -1 where nothing did.

    With a loss scaler, only of what doesn't count those that it skipped.
    """
    counters = (
        counter.value
        for part in step.parts
        for counter in part.counters
        if counter.updates
        and counter.clock not in (Clock.DIRECTORY, Clock.TRACKER)
        and (counter.skips or not step.scaled)
    )
    return max(counters, default=-1)


def times(steps: Sequence[Step]) -> Iterator[Finding]:
    """Find parts that were written when another step was: a hint, since copies have new times."""
    for step, later in pairwise(steps):
        starts = [part.saved for part in later.parts if part.saved]
        if not starts:
            continue
        late = [part.path for part in step.parts if part.saved > min(starts)]
        if 0 < len(late) < len(step.parts):
            says = f"{len(late)} of its parts were written after {later.path} was begun"
            yield Finding(Code.TIMES, Strength.HINT, step.path, says, tuple(late[:SHOWN]))
