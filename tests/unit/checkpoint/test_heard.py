"""Shows when refused values and skips are said, when they are raised, and when they are forgotten.

A training that stays bad must not go on for days; one that got over a bad step must not be stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from agentkit import HASTY, roster

from handfast.agent.hearsay import Apart, Divergence
from handfast.agent.joining import Round
from handfast.agent.snapshot import FORGONE, INVALID, UNLIKE, Outcome, Skip, Snapshot
from handfast.checkpoint.collective import Solo
from handfast.checkpoint.heard import Compared, Heard, Observer
from handfast.checkpoint.session import Session
from handfast.core.lattice import Epoch
from handfast.core.messages import Certificate
from handfast.errors import SaveFailed
from handfast.store.provenance import Brought


class Ear:
    """A trainer's session and what it hears, without an agent: snapshots are put before it."""

    def __init__(self, home: Path, **options: Any) -> None:
        self.session = Session(Solo(), str(home), HASTY, connect=_no_agent)
        self.told: list[tuple[str, dict[str, Any]]] = []
        tell = Observer(lambda name, fields: self.told.append((name, fields)))
        self.heard = Heard(self.session, tell, **options)
        self.outcomes: list[Outcome] = []
        self.skipped: list[Skip] = []
        self.divergent: list[Divergence] = []
        self.apart: Apart | None = None
        self.latest: int | None = None
        self.begin(1)

    def begin(self, generation: int) -> None:
        """Be in a generation."""
        among = roster(["d0", "d1"]).configuration
        self.session._line._round = Round(generation, f"r{generation}", among, True, {}, {})

    def listen(self) -> None:
        """Hear what the agent has told by now."""
        line = None
        if self.latest is not None:
            epoch = Epoch(self.session.generation, self.latest)
            line = Certificate("run", "c", "dir", epoch, "root")
        self.session._line.snapshot = Snapshot(
            "d0", 1, line=line, outcomes=tuple(self.outcomes), skipped=tuple(self.skipped),
            divergent=tuple(self.divergent), apart=self.apart,
        )  # fmt: skip
        self.heard.listen(self.latest)

    def refuse(self, *steps: int, why: str = "finite: model/w: 1 NaN") -> None:
        """Let this rank's validators refuse epochs."""
        generation = self.session.generation
        self.outcomes += [Outcome(Epoch(generation, s), f"{INVALID}: {why}") for s in steps]

    @property
    def names(self) -> list[str]:
        """The events that an observer was told."""
        return [name for name, _ in self.told]


def _no_agent() -> Any:
    raise AssertionError("listening is no I/O")


@pytest.fixture
def ear(tmp_path: Path) -> Callable[..., Ear]:
    return lambda **options: Ear(tmp_path, **options)


def test_each_refusal_is_warned_of_and_the_third_in_a_row_is_raised(
    ear: Callable[..., Ear], caplog: pytest.LogCaptureFixture
) -> None:
    """With what a restart would resume from; and so is each that follows."""
    here = ear()
    here.latest = 3
    for step in (4, 5):
        here.refuse(step)
        here.listen()
        here.listen()
    assert [r.message.partition(":")[0] for r in caplog.records] == ["epoch 1/4", "epoch 1/5"]
    assert here.names == ["refused", "refused"]
    here.refuse(6, why="the last straw")
    with pytest.raises(SaveFailed, match="3 epochs in a row were refused") as caught:
        here.listen()
    assert "epoch 1/6: a validator refused it: the last straw" in str(caught.value)
    assert "a restart resumes from step 3" in str(caught.value)
    here.listen()  # nothing new, so nothing is raised: whoever caught it may go on
    here.refuse(7)
    with pytest.raises(SaveFailed, match="4 epochs in a row"):
        here.listen()


def test_refusals_that_are_heard_of_at_once_are_counted_each(ear: Callable[..., Ear]) -> None:
    """A trainer that saves seldom, or was busy elsewhere; nothing had converged before."""
    here = ear()
    here.refuse(1, 2, 3)
    with pytest.raises(SaveFailed, match=r"look into the training; a restart begins anew\. With"):
        here.listen()
    assert here.names == ["refused"] * 3


def test_they_are_only_warned_of_where_that_was_asked_for(
    ear: Callable[..., Ear], caplog: pytest.LogCaptureFixture
) -> None:
    here = ear(mild=True)
    for step in range(1, 9):
        here.refuse(step)
        here.listen()
    assert len(caplog.records) == 8


def test_an_epoch_that_converges_in_between_ends_the_row(ear: Callable[..., Ear]) -> None:
    """Two bad steps, a good one, two bad ones: that is a training that gets over it."""
    here = ear()
    for step in (1, 2):
        here.refuse(step)
        here.listen()
    here.latest = 3
    for step in (4, 5):
        here.refuse(step)
        here.listen()
    here.refuse(6)
    with pytest.raises(SaveFailed, match="3 epochs in a row"):
        here.listen()


def test_what_was_refused_before_the_one_that_converged_is_not_of_the_row(
    ear: Callable[..., Ear],
) -> None:
    """Both are often heard of together, since saves are waited for by nobody."""
    here = ear()
    here.refuse(1, 2)
    here.latest = 3
    here.listen()
    assert here.names == ["refused", "refused"]
    for step in (4, 5):
        here.refuse(step)
        here.listen()
    here.refuse(6)
    with pytest.raises(SaveFailed, match="3 epochs in a row"):
        here.listen()


def test_going_back_begins_anew(ear: Callable[..., Ear]) -> None:
    """Whoever caught the error and restored, to leave out a batch, has three tries again; and
    refusals of the life before are not heard of twice."""
    here = ear()
    here.latest = 3
    here.refuse(4, 5, 6)
    with pytest.raises(SaveFailed):
        here.listen()
    here.begin(2)
    here.listen()
    here.refuse(4, 5)
    here.listen()
    here.refuse(6)
    with pytest.raises(SaveFailed, match="3 epochs in a row"):
        here.listen()


def test_another_ranks_refusal_counts_as_ones_own_and_once(ear: Callable[..., Ear]) -> None:
    """Where several ranks refuse one epoch, it is one; this rank's own reason is the one said."""
    here = ear()
    here.skipped.append(Skip(Epoch(1, 1), "d1", f"{INVALID}: theirs"))
    here.listen()
    here.skipped.append(Skip(Epoch(1, 2), "d1", f"{INVALID}: theirs"))
    here.refuse(2, why="ours")
    here.skipped.append(Skip(Epoch(1, 2), "d0", f"{INVALID}: ours"))
    here.listen()
    said = [fields["problem"] for _, fields in here.told]
    assert said == [
        f"epoch 1/1: d1: {INVALID}: theirs",
        f"epoch 1/2: {INVALID}: ours",
    ]


def test_other_failures_are_no_refusals(ear: Callable[..., Ear]) -> None:
    """A full disk, what a rank left out, what heals by itself; and a rank that differs."""
    here = ear()
    for step, why in enumerate(("no space", f"{FORGONE}: busy", f"{UNLIKE}: w"), 1):
        here.outcomes.append(Outcome(Epoch(1, step), why))
        here.skipped.append(Skip(Epoch(1, step), "d1", why))
    here.divergent.append(Divergence(Epoch(1, 4), ((0,), (1,))))
    here.listen()
    assert here.told == []
    assert here.session.new_problems() == ["epoch 1/1: no space", "epoch 1/1: d1: no space"]


@pytest.mark.parametrize("replicas", ["warn", "raise"])
def test_ranks_that_differ_are_said_once(
    replicas: Compared, ear: Callable[..., Ear], caplog: pytest.LogCaptureFixture
) -> None:
    """As a warning, or as an error where that was asked for."""
    here = ear(replicas=replicas)
    here.divergent.append(Divergence(Epoch(1, 4), ((0, 2), (1,))))
    if replicas == "raise":
        with pytest.raises(SaveFailed, match="ranks differ in what they hold alike"):
            here.listen()
    else:
        here.listen()
        assert "epoch 1/4: ranks differ" in caplog.records[0].message
    here.listen()
    assert here.names == ["divergent"]


def came(*steps: int, lineages: Sequence[str] = ("main", "main")) -> tuple[Brought, ...]:
    """Ranks that have loaded one model from these steps."""
    return tuple(
        Brought(lineage, {"model": f"main 1/{step} of run a"})
        for step, lineage in zip(steps, lineages, strict=True)
    )


@pytest.mark.parametrize("mild", [False, True])
def test_ranks_that_train_what_is_of_two_epochs_are_stopped(
    mild: bool, ear: Callable[..., Ear], caplog: pytest.LogCaptureFixture
) -> None:
    """At every call until they do not; the observer hears of it once. Mildly, it is a warning."""
    here = ear(mild=mild)
    here.apart = Apart(Epoch(1, 4), came(4, 2))
    for _ in range(2):
        if mild:
            here.listen()
        else:
            with pytest.raises(SaveFailed, match="a mixture: model: main 1/4 of run a on rank 0"):
                here.listen()
    assert here.names == ["apart"]
    assert len([line for line in caplog.messages if "do not have one history" in line]) == mild
    here.apart = None
    here.listen()
    here.apart = Apart(Epoch(2, 4), came(4, 2))  # of a generation that has ended
    here.listen()
    assert here.names == ["apart"]


def test_ranks_that_go_on_as_different_lineages_are_warned_of_once(
    ear: Callable[..., Ear], caplog: pytest.LogCaptureFixture
) -> None:
    """One has loaded for all, perhaps: that is no mixture, and the stamps of the others lack it."""
    here = ear()
    for step in (4, 5):
        here.apart = Apart(Epoch(1, step), came(4, 4, lineages=("sft", "main")))
        here.listen()
    assert here.names == ["apart"]
    assert len([line for line in caplog.messages if "do not have one history" in line]) == 1


def test_skips_are_warned_of_more_and_more_rarely(
    ear: Callable[..., Ear], caplog: pytest.LogCaptureFixture
) -> None:
    """At 8, 64, 512; from the start again after an epoch that converged."""
    here = ear()
    for _ in range(100):
        here.heard.skipped(None)
    assert [r.message.split()[0] for r in caplog.records] == ["8", "64"]
    for _ in range(8):
        here.heard.skipped(5)
    assert caplog.records[-1].message.startswith("8 saves were skipped and nothing has converged")


def test_an_observer_that_fails_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """It is a user's dashboard; the training and its saves go on."""

    def fail(name: str, fields: dict[str, Any]) -> None:
        raise OSError("the dashboard is down")

    with caplog.at_level(logging.ERROR):
        Observer(fail)("refused", problem="x")
    assert caplog.records[0].message == "on_event failed for refused"
    Observer(None)("refused")
