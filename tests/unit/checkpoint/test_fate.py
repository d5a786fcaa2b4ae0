"""Shows what a handle says of its epoch, also once the job has gone back and on."""

from __future__ import annotations

from typing import Any

import pytest

from handfast.agent.snapshot import FORGONE, INVALID, UNLIKE, Outcome, Skip, Snapshot
from handfast.checkpoint import fate
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.messages import Branch, Certificate, RestoreCertificate


def line(epoch: Epoch) -> Certificate:
    return Certificate("run", "c", "dir", epoch, "root")


def resumed(*branches: tuple[int, Epoch]) -> RestoreCertificate:
    """The certificate of the newest of these generations, each with its base."""
    timeline = tuple(Branch(generation, base, f"r{generation}") for generation, base in branches)
    (generation, base), *_ = branches
    return RestoreCertificate("run", "c", generation, f"r{generation}", base, timeline, (0,), "r")


def snapshot(**fields: Any) -> Snapshot:
    return Snapshot("d0", 1, **fields)


BASE = Epoch(1, 4)
FIRST = resumed((1, GENESIS))
BACK = resumed((2, Epoch(1, 1)), (1, GENESIS))


def test_an_epoch_goes_from_staged_to_converged() -> None:
    epoch = Epoch(1, 5)
    for now, phase in (
        (snapshot(resumed=FIRST, persisting=(epoch,)), "staged"),
        (snapshot(resumed=FIRST, retained=(epoch,)), "persisted"),
        (snapshot(resumed=FIRST, outcomes=(Outcome(epoch),)), "persisted"),
        (snapshot(resumed=FIRST, line=line(Epoch(1, 4)), retained=(epoch,)), "persisted"),
        (snapshot(resumed=FIRST, line=line(epoch)), "converged"),
        (snapshot(resumed=FIRST, line=line(Epoch(1, 6))), "converged"),
    ):
        assert fate.phase(now, epoch) == phase
        assert fate.settled(now, epoch) == (phase != "staged")


def test_a_later_epoch_says_nothing_of_one_that_was_skipped() -> None:
    """Whoever asks for a refused save once training went on is told that it was refused; with a
    spare copy an epoch that one domain skipped may be the very one that has converged."""
    epoch, later = Epoch(1, 5), line(Epoch(1, 6))
    for lost in (
        {"outcomes": (Outcome(epoch, f"{INVALID}: NaN"),)},
        {"skipped": (Skip(epoch, "d1", f"{INVALID}: NaN"),), "retained": (epoch,)},
    ):
        now = snapshot(resumed=FIRST, line=later, **lost)
        assert fate.phase(now, epoch) == "failed"
        assert fate.persisted(now, epoch) == ("retained" in lost)
        assert fate.settled(now, epoch)
        assert fate.phase(snapshot(resumed=FIRST, line=line(epoch), **lost), epoch) == "converged"


def test_a_failure_is_named_where_it_happened() -> None:
    epoch = Epoch(1, 5)
    own = snapshot(resumed=FIRST, outcomes=(Outcome(epoch, "no space"),))
    assert fate.phase(own, epoch) == "failed"
    assert fate.problems(own, epoch) == ["no space"]
    assert fate.settled(own, epoch)
    other = snapshot(resumed=FIRST, skipped=(Skip(epoch, "d1", "no space"),))
    assert fate.phase(other, epoch) == "failed"
    assert fate.problems(other, epoch) == ["d1: no space"]


def test_another_domains_skip_frees_no_image() -> None:
    """It may still be read here: only an outcome or a vote of this domain's own ends that, also
    where the agent died between the two."""
    epoch = Epoch(1, 5)
    now = snapshot(resumed=FIRST, persisting=(epoch,), skipped=(Skip(epoch, "d1", "no space"),))
    assert not fate.settled(now, epoch)
    now = snapshot(resumed=FIRST, skipped=(Skip(epoch, "d0", "no space"),))
    assert fate.settled(now, epoch)
    assert fate.phase(now, epoch) == "failed"


@pytest.mark.parametrize("kept", [True, False])
def test_what_a_restore_left_behind_never_becomes_converged(kept: bool) -> None:
    """Generation 2 resumed 1/1 and converged on 2/2, which is above 1/5, and not of its line."""
    epoch = Epoch(1, 5)
    now = snapshot(resumed=BACK, line=line(Epoch(2, 2)), retained=(epoch,) if kept else ())
    assert fate.phase(now, epoch) == "failed"
    assert fate.problems(now, epoch) == ["abandoned: generation 2 resumed from 1/1"]
    assert fate.persisted(now, epoch) == kept
    assert fate.settled(now, epoch)
    assert fate.phase(now, Epoch(1, 1)) == "converged"


def test_what_a_validator_refused_is_no_failure_of_a_save() -> None:
    """Its bytes were fine: it is told apart from a full disk, and counted otherwise."""
    refused, full = Epoch(1, 5), Epoch(1, 6)
    now = snapshot(
        resumed=FIRST,
        outcomes=(Outcome(refused, f"{INVALID}: NaN"), Outcome(full, "no space"), Outcome(BASE)),
        skipped=(
            Skip(refused, "d0", f"{INVALID}: NaN"),
            Skip(refused, "d1", f"{INVALID}: inf"),
            Skip(full, "d1", f"{FORGONE}: busy"),
            Skip(Epoch(1, 7), "d1", f"{UNLIKE}: w"),
            Skip(Epoch(1, 8), "d1", f"{INVALID}: NaN"),
            Skip(Epoch(1, 9), "d2", "no space"),
        ),
    )
    assert fate.failures(now) == [(full, "no space"), (Epoch(1, 9), "d2: no space")]
    assert fate.refusals(now) == [
        (refused, f"{INVALID}: NaN"),
        (refused, f"d1: {INVALID}: inf"),
        (Epoch(1, 8), f"d1: {INVALID}: NaN"),
    ]


def test_a_refused_epoch_has_failed() -> None:
    """It is waited for by nobody, and the reason is the validator's; here, elsewhere, and where
    the agent died before it could tell more than its vote."""
    epoch = Epoch(1, 5)
    for now, why in (
        (snapshot(resumed=FIRST, outcomes=(Outcome(epoch, f"{INVALID}: NaN"),)), INVALID),
        (
            snapshot(resumed=FIRST, skipped=(Skip(epoch, "d0", f"{INVALID}: NaN"),)),
            f"d0: {INVALID}",
        ),
        (
            snapshot(resumed=FIRST, skipped=(Skip(epoch, "d1", f"{INVALID}: NaN"),)),
            f"d1: {INVALID}",
        ),
    ):
        assert fate.phase(now, epoch) == "failed"
        assert fate.problems(now, epoch) == [f"{why}: NaN"]
        assert [e for e, _ in fate.refusals(now)] == [epoch]
        assert fate.failures(now) == []
