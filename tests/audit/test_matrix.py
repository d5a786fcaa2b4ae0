"""Shows what an audit finds of every fault in every format, and that nothing sound alarms it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.audit.matrix import GOLDEN, cells
from tests.docs_audit import PAGE, page

from handfast.audit.finding import Strength
from handfast.audit.run import audit

RAW = {"ocdbt"}  # databases without a checkpoint in them
TORN = {"dcp/overwritten"}  # what the real library left of a save that was killed
SOUND = sorted(
    str(path.relative_to(GOLDEN))
    for path in GOLDEN.glob("*/*")
    if path.is_dir() and path.parent.name not in RAW
)


@pytest.mark.parametrize("variant", [each for each in SOUND if each not in TORN])
@pytest.mark.parametrize("deep", [False, True], ids=["as it is", "deep"])
def test_nothing_is_said_against_what_is_sound(variant: str, deep: bool) -> None:
    """Every run that a real library wrote, at different settings: no false alarm."""
    told = audit(GOLDEN / variant, deep=deep)
    assert [f for f in told.findings if f.strength is not Strength.HINT] == []
    assert told.sound


def test_every_format_has_three_sound_runs_at_least() -> None:
    """At different settings, so that no rule is one run's habit."""
    counts: dict[str, int] = {}
    for variant in SOUND:
        name = Path(variant).parent.name
        counts[name] = counts.get(name, 0) + (variant not in TORN)
    assert len(counts) >= 12
    assert {name: count for name, count in counts.items() if count < 3} == {}


def test_the_page_has_the_table_as_it_is() -> None:
    """Found or not found: each figure of docs/audit.md is made anew; no pickle is executed."""
    assert page(PAGE.read_text(), cells()) == PAGE.read_text()
