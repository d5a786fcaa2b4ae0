"""What a demo found, as plain values: the terminal, the report and the JSON all tell this."""

from typing import Literal

import msgspec

__all__ = [
    "Curve",
    "DemoResult",
    "Kill",
    "Mark",
    "MarkKind",
    "Outcome",
    "Peer",
    "Resume",
    "Tally",
    "Target",
]

Target = Literal["job", "rank", "agent", "node"]
Outcome = Literal["first", "newest", "older", "scratch", "abandoned", "error", "mixture", "unseen"]
MarkKind = Literal["staged", "persisted", "attested", "certified"]
Prints = dict[str, str]


class Kill(msgspec.Struct, frozen=True):
    """One strike. ``aim`` is what the schedule wanted to hit, ``phase`` what was under way."""

    at: float
    launch: int
    step: int
    target: Target
    rank: int | None
    aim: str
    phase: str
    torchrun: bool = False


class Resume(msgspec.Struct, frozen=True):
    """What a start resumed from, proved by the witness's digests.

    ``newest`` is the greatest step that every rank had saved before. ``exact`` says whether the
    state equalled, in every component of every rank, the uninterrupted run's at that step; None
    where that run kept no digest of it.
    """

    at: float
    launch: int
    step: int
    newest: int
    outcome: Outcome
    exact: bool | None = None
    detail: str = ""


class Mark(msgspec.Struct, frozen=True):
    """A fact about one epoch in one domain, with the time at which it was first seen.

    ``by`` is the domain whose rank saw it first, where that is another one: *attested* only.
    """

    at: float
    domain: str
    generation: int
    step: int
    kind: MarkKind
    by: str = ""


class Curve(msgspec.Struct, frozen=True):
    """The mean loss over the ranks of each step from 1, and digests of what a run ended with.

    ``digest`` covers the loss of every rank at every step, bit for bit; ``weights`` the final
    parameters of all ranks; ``state`` all final components of all ranks.
    """

    losses: list[float]
    digest: str
    weights: str
    state: str
    seconds: float


class Tally(msgspec.Struct):
    """Resumes by outcome."""

    newest: int = 0
    older: int = 0
    scratch: int = 0
    abandoned: int = 0
    error: int = 0
    mixture: int = 0


class Peer(msgspec.Struct, frozen=True):
    """How one usual way to save fared. ``usage`` says how it was used, for a reader to judge."""

    name: str
    usage: str
    kills: list[Kill]
    resumes: list[Resume]
    tally: Tally
    seconds: float


class DemoResult(msgspec.Struct, frozen=True, kw_only=True):
    """Everything. Times are seconds from the beginning of the storm."""

    machine: dict[str, str]
    settings: dict[str, int | float | str]
    reference: Curve
    storm: Curve
    kills: list[Kill]
    resumes: list[Resume]
    tally: Tally
    marks: list[Mark]
    lines: list[tuple[float, int, int]]
    """Converged epochs as first seen by any rank: (at, generation, step)."""

    progress: list[tuple[float, int]]
    """When rank 0 finished which step, all starts together: (at, step)."""

    repeated: int
    """Steps that were trained more than once, because a kill undid them."""

    clashes: int
    """Steps whose loss, on any rank, was ever another than the uninterrupted run's."""

    peers: list[Peer]
    seconds: float

    @property
    def equal(self) -> bool:
        """Whether the killed run is the uninterrupted one, bit for bit, all along."""
        same = (
            self.reference.digest == self.storm.digest
            and self.reference.weights == self.storm.weights
            and self.reference.state == self.storm.state
        )
        resumed = all(r.exact is not False for r in self.resumes)
        return same and resumed and not self.clashes and not self.tally.mixture
