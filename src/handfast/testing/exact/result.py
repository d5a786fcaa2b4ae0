"""What came of it, in numbers and in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import msgspec

__all__ = ["COUNTED", "TRAINED", "Difference", "ExactResume"]

TRAINED: Final = "parameter"
COUNTED: Final = "/_step_count"
"""What torch's schedulers count for a warning alone (``torch/optim/lr_scheduler.py``, 2.13)."""

SHOWN: Final = 6
NUMBERED: Final = re.compile(r"(.*) \(\d+\)")
"""The name of what is trained, and is called as another thing is."""
DETERMINISTIC: Final = (
    "seed what draws, ask for deterministic kernels (torch.use_deterministic_algorithms), fix the "
    "number of threads; or name in ignore= what may differ, such as a time"
)
MATTERS: Final = "what of it matters belongs into the state, or into extra="


class Difference(msgspec.Struct, frozen=True):
    """One leaf of the state that two runs had otherwise after the same step.

    ``kind`` is "parameter", "buffer", "moment", "hyperparameter", "scheduler", "scaler", "random
    stream", "loader position", "extra" and so on. ``stored``: it is in the state that is saved; if
    not, ``path`` is what the training's code calls it. ``restored``: it was so once ``restore()``
    had given ``step``, before anything was trained; else it was seen at ``save(step)``.
    ``expected`` and ``found`` are both sides in words. ``largest`` is the largest difference among
    ``sampled`` of a tensor's ``size`` elements, None where they can't be compared. ``loadable``: it
    is not in the state, and is of a thing that has both ``state_dict`` and ``load_state_dict``.
    """

    path: str
    kind: str
    stored: bool
    rank: int
    step: int
    restored: bool
    expected: str
    found: str
    largest: float | None = None
    sampled: int = 0
    size: int = 0
    loadable: bool = False

    @property
    def belongs(self) -> bool:
        """Whether it is not in the state, and of something that belongs there as a whole."""
        whole = self.loadable or self.kind == TRAINED
        return whole and not self.stored and not self.path.endswith(COUNTED)

    def __str__(self) -> str:
        return self.told("uninterrupted", "after the resume")

    def told(self, one: str, other: str) -> str:
        """Tell it in one line, with a word for each side."""
        kind = self.kind if self.stored else f"{self.kind}, not in the state"
        if self.expected != self.found or self.largest is None:
            return f"{self.path} ({kind}): {self.expected} {one}, {self.found} {other}"
        some = f" of {self.size} elements looked at" if self.size > self.sampled else ""
        about = f"{self.path} ({kind}, {self.expected})"
        if self.largest == 0:
            return f"{about}: differs in none of {self.sampled}{some}, but in others"
        among = f" among {self.sampled}{some}" if some else ""
        return f"{about}: differs by up to {self.largest:.3g}{among}"


class ExactResume(msgspec.Struct, frozen=True):
    """Whether a job that is killed goes on bit for bit as one that is not.

    ``steps`` is where it ends, ``killed`` after which steps it was killed, ``resumed`` where each
    start after a kill went on. ``leaves`` is how many leaves of the state, and of what lives beside
    it, were compared in all. ``noise`` is what differs first between two runs that nobody
    interrupted. ``differences`` are those that came first after a resume, beyond the noise: at
    ``step``, the first save where what is stored or trained differs, or what could have been stored
    by a ``state_dict`` of its own, or before it; ``then`` is what else differs there. ``beside``
    is, for a resume that is exact, what moves beside the state and was another one at the end of a
    start: that may be a best loss that was forgotten, and may be nothing. ``folder`` is where all
    that was run is kept, if it is.
    """

    steps: int
    ranks: int
    killed: tuple[int, ...]
    resumed: tuple[int, ...]
    leaves: int
    noise: tuple[Difference, ...] = ()
    differences: tuple[Difference, ...] = ()
    then: tuple[Difference, ...] = ()
    step: int | None = None
    beside: tuple[Difference, ...] = ()
    folder: str = ""

    @property
    def exact(self) -> bool:
        """Whether nothing differs at all: neither after a resume, nor between undisturbed runs."""
        return not self.noise and not self.differences

    @property
    def first_difference(self) -> Difference | None:
        """The one that the others most likely follow from; None where a resume changes nothing."""
        return self.differences[0] if self.differences else None

    def __str__(self) -> str:
        kills = " and ".join(map(str, self.killed))
        resumed = " and ".join(map(str, self.resumed))
        told = f"{self.steps} steps, killed after step {kills}, resumed at step {resumed}"
        lines = [f"exact: {told}; {self.leaves} leaves compared"] if self.exact else []
        lines += self._told_of_noise() + self._told_of_differences(told) + self._told_of_beside()
        return "\n".join(lines + ([f"kept in {self.folder}"] if self.folder else []))

    def _told_of_noise(self) -> list[str]:
        if not self.noise:
            return []
        when = _when(self.noise[0])
        lines = [
            "the job is not deterministic by itself: no resume of it can be told exact",
            f"two runs that nobody interrupted already differ {when}:",
            *self._list(self.noise, "in one run", "in the other"),
            f"What to do: {DETERMINISTIC}",
        ]
        if not self.differences:
            lines.append("The interrupted run differs in nothing else than these two do.")
        return lines

    def _told_of_differences(self, told: str) -> list[str]:
        if not self.differences:
            return []
        first = self.differences[0]
        alone = not any(d.stored for d in (*self.differences, *self.then))
        lost = "what is beside its state" if alone else "its state"
        lines = [
            f"not exact: {told}; from step {self.step} on {lost} is another one",
            f"first to differ, {_when(first)}:",
            *self._list(self.differences, "uninterrupted", "after the resume"),
        ]
        if self.then:
            lines.append(f"then, at step {self.step}:")
            lines += self._list(self.then, "uninterrupted", "after the resume")
        missing = (d for d in (*self.differences, *self.then) if d.belongs)
        lines.append(f"What to do: {_remedy(next(missing, first))}")
        if alone and first.loadable:
            name = first.path.partition("/")[0].partition("[")[0]
            lines.append(f"If it may differ, leave it out: ignore=({name!r},)")
        return lines

    def _told_of_beside(self) -> list[str]:
        if not self.beside:
            return []
        return [
            f"not in the state, and other after the resume; {MATTERS}:",
            *self._list(self.beside, "uninterrupted", "after the resume"),
        ]

    def _list(self, found: Sequence[Difference], one: str, other: str) -> list[str]:
        lines = [
            f"  {f'rank {d.rank}: ' if self.ranks > 1 else ''}{d.told(one, other)}"
            for d in found[:SHOWN]
        ]
        more = len(found) - SHOWN
        return lines + ([f"  and {more} more"] if more > 0 else [])


def _when(difference: Difference) -> str:
    if difference.restored:
        return f"when step {difference.step} was restored" if difference.step else "at the start"
    return f"at the save of step {difference.step}"


def _remedy(first: Difference) -> str:
    if not first.stored:
        return _remedy_beside(first)
    if not first.restored:
        if first.kind == "extra":
            return "begin with what ckpt.extra has once restore() has returned, not anew"
        return (
            "this is the first that differs, so what it follows from is not in the state, nor "
            "within reach of the loop: the order of the data (is the loader in the state?), a "
            "generator of your own, a buffer that is computed on the way"
        )
    if first.kind == "loader position":
        return "make iter(loader) after restore(), and see what its load_state_dict() brings back"
    name = first.path.partition("/")[0]
    return f"see what load_state_dict() of {name!r} in the state brings back, and what after it"


def _remedy_beside(first: Difference) -> str:
    name = first.path.partition("/")[0]
    if numbered := NUMBERED.fullmatch(name):
        return (
            f"several things are called {numbered[1]!r}: put the one that is trained into the "
            "state, in the place of what is not"
        )
    if first.kind == "parameter" and first.path.startswith(f"{name}/params["):
        return f"put the module whose parameters {name} steps into the state, whatever holds it"
    if first.path.startswith("rng/"):
        return "leave rng=True: the random streams of the process are part of the state"
    if first.kind == "loader position":
        return f"put the loader into the state, and make {name} of it by iter() after restore()"
    if first.kind == "buffer" and not first.loadable:
        return "register it as persistent (register_buffer), or put it into the state by itself"
    if first.kind == "tensor" and first.loadable:
        name = name.rpartition("[")[0]  # the box that it is in
    elif first.kind in ("tensor", "value") and not first.restored:
        return (
            f"look where {name} comes from in this step: what gave it is not in the state, such as "
            "the order of the data, or a generator"
        )
    if first.kind == "value":
        return (
            f"keep {name} in a dict of the state that the loop reads it from, or pass it to save() "
            "as extra= and begin with ckpt.extra after restore()"
        )
    return f"put it into the state: Checkpointer(path, {{..., {name.split('.')[-1]!r}: {name}}})"
