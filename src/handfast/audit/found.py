"""What lies on a disk, in one vocabulary for all formats: steps, parts, tensors, counters.

A format (:mod:`handfast.audit.formats`) reads names and metadata and says what they are; the checks
(:mod:`handfast.audit.checks`) know no format. No tensor is in memory until a check asks for some of
its values, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, Protocol

import msgspec

from handfast.audit.finding import Finding, Strength

__all__ = [
    "Clock",
    "Counter",
    "Found",
    "Part",
    "Resume",
    "Role",
    "Step",
    "Tensor",
    "Values",
]


class Values(Protocol):
    """The values of one tensor where they lie. Nothing is read before :meth:`blocks` is."""

    @property
    def dtype(self) -> str:
        """As torch names it: "float32", "bfloat16" ... ("U8" and the like are translated)."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements in each dimension."""
        ...

    def blocks(self, most: int) -> Iterator[memoryview]:
        """The bytes, row-major and little-endian, in blocks of at most ``most`` whole elements.

        Raises :class:`handfast.errors.Damaged`, naming file and offset, where they can't be read.
        """
        ...


class Role(StrEnum):
    """What a tensor is to a training; a record: what was cut in pieces, once more whole, for its
    checksum.
    """

    PARAMETER = "parameter"
    BUFFER = "buffer"
    MASTER = "master"
    FIRST = "first moment"
    SECOND = "second moment"
    MOMENTUM = "momentum"
    RECORD = "record"
    OTHER = "other"


class Tensor(msgspec.Struct, frozen=True):
    """One tensor of a part, or the piece of one.

    ``of`` names the parameter that it belongs to, alike for a parameter, its master and its moments
    (empty: unknown); ``group`` which optimizer's parameter group its moments are in. ``shape`` and
    ``offset`` say where a piece sits in the whole (None: it is whole, or that is unknown).
    ``replica``: what carries the same key in the parts of one step holds the same bits, as the
    format promises; ``promise`` says who promises that.
    """

    path: str
    role: Role
    values: Values
    of: str = ""
    group: str = ""
    whole: tuple[int, ...] | None = None
    offset: tuple[int, ...] | None = None
    replica: str = ""
    promise: str = ""


class Clock(StrEnum):
    """What counts updates, or something that goes with them."""

    DIRECTORY = "directory name"
    TRACKER = "tracker"
    TRAINER = "trainer"
    OPTIMIZER = "optimizer"
    PARAMETER = "optimizer state of a parameter"
    SCHEDULER = "scheduler"
    LOADER = "loader"


class Counter(msgspec.Struct, frozen=True):
    """One count that a part holds: ``value`` at ``path``, read by the ``clock``.

    ``updates`` says whether it counts optimizer updates, so that it may be held against others that
    do; otherwise only counters of one clock and one path are held against each other. ``skips``:
    it does not count updates that a loss scaler skipped, so it may lag.
    """

    clock: Clock
    value: int
    path: str
    updates: bool = True
    skips: bool = False


class Part(msgspec.Struct):
    """What one rank wrote to one file (or one rank's share of a file that ranks share).

    ``path`` is relative to what was audited, ``rank`` where its writer stood on each axis, such as
    {"dp": 3}. ``problem`` says why it could not be read; all else is what could be by then.
    ``betas`` are of each optimizer group, by its name, where constant; ``run`` is what names the
    run that wrote this, if anything does; ``facts`` are what all parts must say alike, such as the
    world's size. ``valueless`` are the paths of what holds values that can't be read here, or not
    as plain ones (sparse tensors, conjugated ones, those of the meta device, texts, items of a
    handler that is not known); ``untold`` those of tensors of which the format makes nothing;
    ``aside`` those of entries without any tensor, such as a scheduler's state, and of a file that
    has none at all. No check looks at these. ``harmful`` is what its pickle names that runs code
    where it is loaded.
    """

    path: str
    rank: Mapping[str, int] = {}
    nbytes: int = 0
    saved: float = 0.0
    tensors: Sequence[Tensor] = ()
    counters: Sequence[Counter] = ()
    betas: Mapping[str, tuple[float, float]] = {}
    run: str = ""
    facts: Mapping[str, Any] = {}
    problem: str = ""
    valueless: Sequence[str] = ()
    untold: Sequence[str] = ()
    aside: Sequence[str] = ()
    harmful: Sequence[str] = ()


class Step(msgspec.Struct):
    """One checkpoint: what was to be one epoch.

    ``number`` is what its name says. ``missing`` are the parts that have to be there, with who says
    so; ``extra`` the ones that nobody expects. ``commit`` says what makes the format take it as
    whole ("" where nothing does), ``committed`` whether that is there. ``scaled``: a loss scaler is
    in use, which skips updates. ``guessed``: which parts belong together, and what is in them, was
    read from names and keys that anybody may choose, so that what rests on these alone is a hint.
    ``free``: what it is called is for whoever saved it to choose, and no format promises that the
    number in it goes with what its files count.
    """

    path: str
    number: int | None = None
    parts: Sequence[Part] = ()
    missing: Sequence[tuple[str, str]] = ()
    extra: Sequence[tuple[str, str]] = ()
    commit: str = ""
    committed: bool = True
    scaled: bool = False
    findings: Sequence[Finding] = ()
    guessed: bool = False
    free: bool = False

    def strength(self, otherwise: Strength) -> Strength:
        """How sure a finding is that rests on what a format makes of names and keys."""
        return Strength.HINT if self.guessed else otherwise


class Resume(msgspec.Struct, frozen=True):
    """What a normal resume would take: for which ranks, which step's path, and by which rule."""

    ranks: str
    step: str
    rule: str


class Found(msgspec.Struct):
    """All that one format has at a path; ``steps`` oldest first.

    ``files`` are those that it knows what to make of, by their paths; ``findings`` what is wrong
    around the steps: left-overs, and trackers that point to nothing.
    """

    format: str
    root: str
    steps: Sequence[Step] = ()
    resume: Sequence[Resume] = ()
    files: frozenset[str] = frozenset()
    findings: Sequence[Finding] = ()
