"""Why a recovery came to nothing, in the words of whoever waits for it."""

from __future__ import annotations

from collections.abc import Sequence

from handfast.agent.snapshot import Stuck
from handfast.checkpoint.survey import TOGETHER
from handfast.core.lattice import Epoch
from handfast.core.recover import APART
from handfast.core.verdict import Verdict
from handfast.errors import Refused

__all__ = ["refusal"]


def refusal(stuck: Stuck, retained: Sequence[Epoch], want: int | None) -> Refused:
    """Give the error of a stuck recovery; ``retained`` is what this rank's own domain holds."""
    if stuck.phase != "exhausted":
        return Refused(
            f"a rank can't take epoch {stuck.epoch}",
            verdict=Verdict.FOREIGN,
            shards=stuck.reasons,
            remedy="build the model and optimizer that the run was saved with",
        )
    if any(APART in reason for reason in stuck.reasons):
        return Refused(
            "the ranks' directories are of copies of one run that went on apart",
            verdict=Verdict.MIXED,
            shards=stuck.reasons,
            remedy=TOGETHER,
        )
    damaged = any("missing" not in reason for reason in stuck.reasons)
    what = "no epoch" if want is None else f"no epoch of step {want}"
    held = ", ".join(map(str, retained)) or "nothing"
    return Refused(
        f"{what} is left that every shard holds whole, on the timeline of this run; this rank "
        f"holds {held}",
        verdict=Verdict.CORRUPT if damaged else Verdict.MISSING,
        shards=stuck.reasons,
        remedy="`handfast verify` says what each directory holds; a lost run is never restarted "
        "from scratch in silence: give a fresh path for that",
    )
