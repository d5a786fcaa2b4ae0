"""Where live parts came from: a component of an epoch of a run, and what of it has moved since."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Final

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from handfast.core.verdict import Verdict
from handfast.errors import Refused
from handfast.model.optimizer import Index
from handfast.torch.lineage import History
from handfast.torch.tensors import local

__all__ = ["HERE", "Origin", "alone", "number", "numbers", "place", "refuse_apart"]

HERE: Final = "begun here"
"""The run of what has come from none."""

_numbers: Any = WeakIdKeyDictionary()
_counted = count()


@dataclass(frozen=True)
class Origin:
    """Where a live part came from: a component ``path`` of the epoch of a run.

    ``history`` is what it goes on as. Parameters stand by their :func:`number`: ``known`` are those
    that have come with it and that the epoch has both weights and moments of, be it the one or the
    other that this part holds; ``moved`` those that were stepped since. What began here is to be
    saved ``into`` a run. What ``follows`` is no component: it came as a part of one, or in several.
    ``loaded`` is the index that it really came from where that is another, on purpose.
    """

    run: str
    index: Index
    path: str
    history: History = field(default_factory=History)
    known: frozenset[int] = frozenset()
    moved: frozenset[int] = frozenset()
    into: str = ""
    follows: bool = False
    loaded: Index | None = None

    def within(self, own: frozenset[int]) -> Origin:
        """The origin of a part of it, or of what it is a part of, with ``own`` parameters."""
        return replace(self, known=self.known & own, moved=self.moved & own, follows=True)

    @property
    def fresh(self) -> bool:
        """Whether it began here, and has not moved: it may still be anything."""
        return self.run == HERE and not self.moved

    @property
    def plain(self) -> bool:
        """Whether it goes on as what it was in a run: it did not begin here, nor did a lineage."""
        return self.run != HERE and self.history.lineage == self.index.lineage

    @property
    def waiting(self) -> frozenset[int]:
        """Of which parameters weights and moments are still as they came, each for the other."""
        return self.known - self.moved if self.plain else frozenset()

    def __str__(self) -> str:
        onward = self.history.lineage
        gone = f", going on as {onward}" if onward != self.index.lineage else ""
        since = ", trained on since" if self.moved else ""
        return f"{self.path} of {self.index} of run {self.run}{gone}{since}"


def number(parameter: object) -> int:
    """Give a parameter's own number: an id is given to another when it is gone."""
    found: int | None = _numbers.get(parameter)
    if found is None:
        found = _numbers[parameter] = next(_counted)
    return found


def numbers(parameters: Iterable[object]) -> frozenset[int]:
    """The numbers of some parameters."""
    return frozenset(map(number, parameters))


def place(parameter: Any) -> int:
    """Where a parameter's values lie, which another may share; its id where that has no address."""
    try:
        if type(parameter) is nn.Parameter:  # nothing else: each optimizer asks it of each
            return parameter.data_ptr() or id(parameter)
        with torch.no_grad():
            return local(parameter).data_ptr() or id(parameter)
    except (RuntimeError, NotImplementedError, ValueError):  # the last of what is lazy
        return id(parameter)


def refuse_apart(parts: Sequence[Origin], what: str) -> None:
    """Raise Refused, MIXED, unless all are of one index of one run, go on as one lineage, and have
    moved together.
    """
    kinds = {(part.run, part.index, part.history.lineage, bool(part.moved)) for part in parts}
    if len(kinds) > 1:
        raise Refused(
            f"{what} would be a mixture",
            verdict=Verdict.MIXED,
            shards=[str(part) for part in parts],
            remedy="load all of it from one epoch (Checkpointer.restore, or one guard.load); to "
            "mix on purpose, give guard.load a correction= and a lineage= of its own",
        )


def alone(what: str, parts: Sequence[Origin]) -> Refused:
    """What is raised, MIXED, where weights or moments would go on without what they came with."""
    return Refused(
        what,
        verdict=Verdict.MIXED,
        shards=[str(came) for came in parts],
        remedy="load both; where this is fine-tuning say so by a lineage of its own, "
        "restore(only=..., lineage='sft') or guard.load(..., lineage='sft'); where moments are to "
        "be begun anew, by guard.Reset(warmup=...).apply(optimizer)",
    )
