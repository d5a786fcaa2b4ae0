"""Who resumed what: proved by digests that no saver sees, never guessed from a step number.

At every save each rank tells the log a digest of each component of its state, and so it does right
after a restore. A resume is of one epoch if there was a moment of saving at which all components
of all ranks had just these digests. If there was none, the state that training goes on from never
existed: a mixture.
"""

from collections import defaultdict
from collections.abc import Mapping

import xxhash

from handfast.demo.events import Event
from handfast.demo.result import Curve, Outcome, Prints, Resume, Tally

__all__ = ["Ledger", "tally"]

Moment = tuple[int, int]
"""A save as the witness counts it: (launch, step)."""


class Ledger:
    """Takes a run's events in order and knows, of each start, what it resumed.

    ``truth`` is another run's ledger, the uninterrupted one's: resumed states and losses are then
    held against it.
    """

    def __init__(self, world: int, truth: "Ledger | None" = None) -> None:
        self._world = world
        self._truth = truth
        self._seen: dict[tuple[int, str, str], set[Moment]] = defaultdict(set)
        self._prints: dict[tuple[int, int], Prints] = {}
        self._saved: dict[Moment, set[int]] = defaultdict(set)
        self._losses: dict[tuple[int, int], float | None] = {}
        self._runs: dict[tuple[int, int], int] = defaultdict(int)
        self._resumed: dict[int, dict[int, Event]] = defaultdict(dict)
        self._errors: dict[int, list[Event]] = defaultdict(list)
        self._clashed: set[int] = set()
        self._final: dict[int, Prints] = {}
        self._given_up: set[Moment] = set()
        self.newest = 0
        """The greatest step that every rank has saved on the timeline that is now trained."""

        self.began = 0.0
        self.ended = 0.0
        self.resumes: list[Resume] = []

    def take(self, event: Event) -> None:
        """Count one event."""
        self.began = self.began or event.at
        self.ended = event.at
        if event.kind == "step":
            self._take_loss(event)
        elif event.kind == "saving":
            self._witness(event)
        elif event.kind == "saved":
            self._take_saved(event)
        elif event.kind == "resumed":
            self._resumed[event.launch][event.rank] = event
            if len(self._resumed[event.launch]) == self._world:
                self._conclude(event.launch, event.at)
        elif event.kind == "error":
            self._errors[event.launch].append(event)
        elif event.kind == "final":
            self._final[event.rank] = event.prints

    def ready(self, launch: int) -> bool:
        """Whether every rank of this start has resumed."""
        return len(self._resumed[launch]) == self._world

    def failed(self, launch: int) -> bool:
        """Whether a rank of this start raised before all had resumed."""
        return not self.ready(launch) and bool(self._errors[launch])

    def trouble(self, launch: int) -> str:
        """What the ranks of this start raised, cut to a readable length."""
        return "; ".join(sorted({event.text for event in self._errors[launch]}))[:300]

    def over(self, launch: int, at: float) -> None:
        """This start has ended; say what became of its resume if that is still open."""
        if self.ready(launch):
            return
        outcome: Outcome = "error" if self._errors[launch] else "unseen"
        why = self.trouble(launch)
        self.resumes.append(Resume(at, launch, 0, self.newest, outcome, None, why))

    def lost(self) -> None:
        """All that was saved has been thrown away, so the next start is a first one."""
        self.newest = 0

    def rolled_back(self, step: int) -> None:
        """An operator goes back to ``step``: all that was saved above it is given up for ever.

        What was asked for counts as the newest from then on.
        """
        self.newest = step
        self._given_up |= {moment for found in self._seen.values() for moment in found}
        self._given_up = {moment for moment in self._given_up if moment[1] > step}

    def curve(self) -> Curve:
        """Losses and digests of a run that reached its end. Raises KeyError if it did not."""
        steps = range(1, 1 + max((step for step, _ in self._losses), default=0))
        means: list[float] = []
        hashed = xxhash.xxh3_128()
        for step in steps:
            row = [self._losses[step, rank] for rank in range(self._world)]
            hashed.update(repr(row).encode())
            means.append(sum(loss if loss is not None else float("nan") for loss in row) / len(row))
        finals = [self._final[rank] for rank in range(self._world)]
        weights = xxhash.xxh3_128_hexdigest("".join(f["model"] for f in finals).encode())
        state = xxhash.xxh3_128_hexdigest(repr([sorted(f.items()) for f in finals]).encode())
        return Curve(means, hashed.hexdigest(), weights, state, self.ended - self.began)

    @property
    def repeated(self) -> int:
        """How many steps were trained more than once on some rank."""
        return len({step for (step, _), times in self._runs.items() if times > 1})

    @property
    def clashes(self) -> int:
        """How many steps had, on some rank, a loss other than before or than the truth's."""
        return len(self._clashed)

    def loss(self, step: int, rank: int) -> float | None:
        """What a rank's loss was when it last trained ``step``; None if it never did."""
        return self._losses.get((step, rank))

    def at(self, step: int, rank: int) -> Prints | None:
        """The digests that a rank gave when it last saved ``step``."""
        return self._prints.get((step, rank))

    def _take_loss(self, event: Event) -> None:
        key = (event.step, event.rank)
        known = self._losses.get(key, event.loss)
        true = self._truth.loss(*key) if self._truth else None
        if known != event.loss or (true is not None and true != event.loss):
            self._clashed.add(event.step)
        self._losses[key] = event.loss
        self._runs[key] += 1

    def _witness(self, event: Event) -> None:
        self._prints[event.step, event.rank] = event.prints
        for component, digest in event.prints.items():
            self._seen[event.rank, component, digest].add((event.launch, event.step))

    def _take_saved(self, event: Event) -> None:
        ranks = self._saved[event.launch, event.step]
        ranks.add(event.rank)
        if len(ranks) == self._world:
            self.newest = max(self.newest, event.step)

    def _conclude(self, launch: int, at: float) -> None:
        events = self._resumed[launch]
        claimed = events[0].step
        if not self.newest and not any(event.step for event in events.values()):
            self.resumes.append(Resume(at, launch, 0, 0, "first", self._exact(0, events)))
            for event in events.values():
                self._witness(event)
            return
        moments = self._moments(events)
        common = set.intersection(*moments.values())
        steps = sorted({step for _, step in common})
        outcome: Outcome
        if not steps:
            outcome, detail = "mixture", _describe(moments)
        elif claimed not in steps or len({event.step for event in events.values()}) > 1:
            outcome, detail = "mixture", f"called step {claimed}, but holds step {steps[-1]}"
        elif common <= self._given_up:
            outcome, detail = "abandoned", f"step {claimed} is of the timeline that was given up"
        elif not claimed:
            outcome, detail = "scratch", f"step {self.newest} had been saved by every rank"
        else:
            outcome, detail = ("older" if claimed < self.newest else "newest"), ""
        exact = self._exact(claimed, events)
        self.resumes.append(Resume(at, launch, claimed, self.newest, outcome, exact, detail))
        self.newest = claimed

    def _moments(self, events: Mapping[int, Event]) -> dict[tuple[int, str], set[Moment]]:
        return {
            (rank, component): self._seen.get((rank, component, digest), set())
            for rank, event in sorted(events.items())
            for component, digest in sorted(event.prints.items())
        }

    def _exact(self, step: int, events: Mapping[int, Event]) -> bool | None:
        if self._truth is None:
            return None
        true = {rank: self._truth.at(step, rank) for rank in events}
        if any(prints is None for prints in true.values()):
            return None
        return all(event.prints == true[rank] for rank, event in events.items())


def _describe(moments: Mapping[tuple[int, str], set[Moment]]) -> str:
    """Which steps each rank holds, with components named where a rank disagrees with itself."""
    parts: list[str] = []
    for rank in sorted({rank for rank, _ in moments}):
        steps = {
            component: max((step for _, step in found), default=None)
            for (owner, component), found in moments.items()
            if owner == rank
        }
        if len(set(steps.values())) == 1:
            step = next(iter(steps.values()))
            parts.append(f"rank {rank}: {'no step that ever was' if step is None else step}")
        else:
            inside = ", ".join(f"{c} {'?' if s is None else s}" for c, s in steps.items())
            parts.append(f"rank {rank}: {inside}")
    return "; ".join(parts)


def tally(resumes: list[Resume]) -> Tally:
    """Count resumes by outcome; first starts and resumes that a kill cut short are not counted."""
    counted = Tally()
    for resume in resumes:
        if resume.outcome not in ("first", "unseen"):
            setattr(counted, resume.outcome, getattr(counted, resume.outcome) + 1)
    return counted
