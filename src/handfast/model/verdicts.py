"""What the adversary has to say of a pipeline: as values, as schedules to read, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from handfast.model.boundary import Fault, Finding, Tear, attack, instants, unread, waits
from handfast.model.pipeline import Pipeline

__all__ = ["HEAD", "Verdict", "examine", "rows", "story", "values"]


class Verdict(msgspec.Struct, frozen=True):
    """All findings of one pipeline, one for each claim, the clock's last.

    ``waits`` says for each actor who may have to wait for ever if that one stops for ever, and
    ``unread`` which places the restart never reads.
    """

    pipeline: str
    about: str
    assumes: str
    source: str
    findings: tuple[Finding, ...]
    waits: dict[str, tuple[str, ...]]
    unread: tuple[str, ...]

    @property
    def sound(self) -> tuple[str, ...]:
        """The claims that nothing within the bounds breaks."""
        return tuple(finding.claim for finding in self.findings if finding.sound)

    @property
    def blocks(self) -> str:
        """Who may wait for one that never comes back: the training, others only, or nobody."""
        waiting = {name for names in self.waits.values() for name in names}
        if any(name.startswith("rank ") for name in waiting):
            return "training"
        return "claim only" if waiting else "nobody"


def examine(pipeline: Pipeline) -> Verdict:
    """Attack every claim of a pipeline, and the clock's.

    Raises ValueError where the pipeline does not fit together.
    """
    return Verdict(
        pipeline=pipeline.name,
        about=pipeline.about,
        assumes=pipeline.assumes,
        source=pipeline.source,
        findings=tuple(attack(pipeline, claim) for claim in instants(pipeline)),
        waits=waits(pipeline),
        unread=unread(pipeline),
    )


def cell(finding: Finding, fault: Fault) -> str:
    """How a claim ends under one fault: the kinds, with how many moves each takes."""
    if not finding.reached:
        return "never comes"
    found = [tear for tear in finding.tears if tear.fault == fault]
    return ", ".join(f"{t.kind} in {t.moves}" for t in sorted(found, key=_moves)) or "holds"


def _moves(tear: Tear) -> tuple[int, str]:
    return tear.moves, tear.kind


def values(verdict: Verdict) -> dict[str, Any]:
    """Give a verdict as plain values, with each event in words."""
    claims = [
        {
            "claim": finding.claim,
            "sound": finding.sound,
            "reached": finding.reached,
            "states": finding.states,
            "tears": [
                {
                    "fault": tear.fault,
                    "kind": tear.kind,
                    "claimed": tear.claimed,
                    "moves": tear.moves,
                    "schedule": [str(event) for event in tear.events],
                }
                for tear in finding.tears
            ],
        }
        for finding in verdict.findings
    ]
    named = {name: getattr(verdict, name) for name in ("pipeline", "about", "assumes", "source")}
    return {**named, "claims": claims, "waits": verdict.waits, "unread": verdict.unread}


HEAD: Final = (
    "pipeline",
    "said to be saved",
    "job killed",
    "power lost",
    "states",
    "who may block",
)


def rows(verdicts: Sequence[Verdict]) -> Iterator[tuple[str, ...]]:
    """Give a table's rows, after ``HEAD``: one a claim."""
    for verdict in verdicts:
        for i, finding in enumerate(verdict.findings):
            first = (verdict.about, verdict.blocks) if i == 0 else ("", "")
            yield (
                first[0],
                finding.claim,
                cell(finding, "killed"),
                cell(finding, "power"),
                f"{finding.states:,}",
                first[1],
            )


def story(finding: Finding) -> Iterator[str]:
    """Tell each shortest schedule of a finding, a line an event."""
    yield f"{finding.pipeline}: saved {finding.claim}?"
    if not finding.reached:
        yield "  that instant never comes: nothing was shown"
    for tear in sorted(finding.tears, key=lambda each: (each.fault, _moves(each))):
        yield f"  {tear.kind}, {'the job killed' if tear.fault == 'killed' else 'power lost'}:"
        yield from (f"    {i:2}  {event}" for i, event in enumerate(tear.events, 1))
        why = f"epoch {tear.claimed} was claimed"
        yield f"        {tear.kind.upper()}: {why}, after {tear.moves} moves a crash is enough"
    if finding.sound:
        yield f"  nothing breaks it in any of {finding.states:,} states"
