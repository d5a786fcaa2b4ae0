"""Shows that the demo's storms are real, its peers are used well, and its witness is not fooled.

The jobs are small; what is forked, killed, saved and resumed is the demo's own.
"""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from handfast.demo.agents import agent_pids, end_agents
from handfast.demo.chaos import Strike
from handfast.demo.events import Event
from handfast.demo.job import Job
from handfast.demo.result import DemoResult, Kill, Resume, Tally
from handfast.demo.run import Options, run
from handfast.demo.show import PlainLines
from handfast.demo.storm import Storm
from handfast.demo.witness import Ledger, tally
from handfast.errors import HandfastError

pytestmark = pytest.mark.xdist_group("demo")

SMALL = Job(run="", steps=24, every=2, width=32, layers=1, heads=2, letters=20_000)


class Watcher:
    """Sees everything, and can act on it."""

    def __init__(self) -> None:
        self.kills: list[Kill] = []

    def event(self, event: Event) -> None:
        """Nothing to do."""

    def kill(self, kill: Kill) -> None:
        self.kills.append(kill)

    def resume(self, resume: Resume) -> None:
        """The ledger keeps them."""


def strike(target: str, *, aim: str = "moment", rank: int | None = None, gap: int = 3) -> Strike:
    return Strike(target, rank, aim, gap, 0.5)


SELDOM = msgspec.structs.replace(SMALL, steps=80, every=50)
"""Saves once, so that a kill well behind that save cuts none short."""


def uninterrupted(job: Job, folder: Path) -> Ledger:
    storm = Storm(msgspec.structs.replace(job, run=str(folder)), [], Watcher())
    storm.run()
    return storm.ledger


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """The uninterrupted run that all others are held against."""
    return uninterrupted(SMALL, tmp_path_factory.mktemp("truth"))


@pytest.fixture(scope="module")
def long_truth(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """The same of the job that saves seldom."""
    return uninterrupted(SELDOM, tmp_path_factory.mktemp("long"))


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Job]:
    """A job that handfast saves; its agents are gone after the test."""
    job = msgspec.structs.replace(SMALL, run=str(tmp_path), saver="handfast")
    yield job
    end_agents(agent_pids(job), signal.SIGKILL)


def test_under_handfast_a_killed_run_is_the_unkilled_one(kept: Job, truth: Ledger) -> None:
    """One rank, an agent, and ranks with their agents: every state and loss equal to the bit."""
    strikes = [
        strike("rank", rank=2, aim="persisting"),
        strike("agent"),
        strike("node", aim="attesting"),
    ]
    storm = Storm(kept, strikes, Watcher(), truth=truth)
    storm.run()
    assert [kill.target for kill in storm.kills] == ["rank", "agent", "node"]
    assert {resume.exact for resume in storm.ledger.resumes} == {True}
    found = tally(storm.ledger.resumes)
    assert found == Tally(newest=found.newest, older=found.older)
    assert storm.ledger.clashes == 0
    mine, true = storm.ledger.curve(), truth.curve()
    assert (mine.digest, mine.weights, mine.state) == (true.digest, true.weights, true.state)


@pytest.mark.parametrize("saver", ["torch.save", "dcp", "torch.save per step", "dcp per step"])
def test_a_peer_killed_between_saves_resumes_its_newest_bit_for_bit(
    saver: str, tmp_path: Path, long_truth: Ledger
) -> None:
    """No straw man: where no save is cut short, each of them does all that handfast does."""
    job = msgspec.structs.replace(SELDOM, run=str(tmp_path), saver=saver)
    # At step 52 every rank has left the save of step 50 behind: they step together.
    storm = Storm(job, [Strike("job", None, "moment", 52, 0.0)], Watcher(), truth=long_truth)
    storm.run()
    assert [kill.target for kill in storm.kills] == ["job"]
    found = [(r.outcome, r.step, r.exact) for r in storm.ledger.resumes]
    assert found == [("first", 0, True), ("newest", 50, True)]
    assert storm.ledger.curve().state == long_truth.curve().state


@pytest.mark.parametrize(
    ("saver", "outcome"), [("torch.save per step", "abandoned"), ("handfast", "newest")]
)
def test_after_a_rollback_only_a_lineage_keeps_to_the_new_timeline(
    saver: str, outcome: str, kept: Job
) -> None:
    """The newest complete directory is of the timeline that the operator gave up."""
    job = msgspec.structs.replace(kept, saver=saver, every=4, steps=40)
    back = Strike("job", None, "moment", 9, 0.0, rollback=True)
    soon = Strike("job", None, "moment", 1, 0.0)
    storm = Storm(job, [back, soon], Watcher(), finish=False)
    storm.run()
    assert [r.outcome for r in storm.ledger.resumes] == ["first", "newest", outcome]


class Before(Watcher):
    """Keeps a copy of rank 1's file as it was when all had saved ``step``."""

    def __init__(self, step: int, run: Path) -> None:
        super().__init__()
        self._step = step
        self._file = run / "checkpoints" / "rank1.pt"
        self.copy = run / "kept.pt"
        self._done: set[int] = set()

    def event(self, event: Event) -> None:
        if event.kind == "saved" and event.step == self._step:
            self._done.add(event.rank)
            if len(self._done) == SMALL.world and self._file.exists():
                shutil.copy(self._file, self.copy)


def test_one_rank_with_an_older_file_is_resumed_in_silence_and_proved_a_mixture(
    tmp_path: Path, truth: Ledger
) -> None:
    """mosaicml/composer#2146: a rank resumes older state. Nothing raises; the witness sees it."""
    job = msgspec.structs.replace(SMALL, run=str(tmp_path), saver="torch.save")
    watcher = Before(2, tmp_path)
    Storm(job, [], watcher, truth=truth).run()
    shutil.copy(watcher.copy, tmp_path / "checkpoints" / "rank1.pt")
    again = Storm(msgspec.structs.replace(job, launch=2), [], Watcher(), truth=truth, finish=False)
    again.run()
    resume = again.ledger.resumes[-1]
    assert (resume.outcome, resume.exact) == ("mixture", False)
    assert "rank 1: 2; rank 2: 24" in resume.detail


def test_a_job_that_fails_by_itself_is_told_not_started_for_ever(tmp_path: Path) -> None:
    """A storm must not hide a failure that it did not make behind its own kills."""
    (tmp_path / "checkpoints" / "latest.tmp").mkdir(parents=True)
    job = msgspec.structs.replace(SMALL, run=str(tmp_path), saver="torch.save")
    with pytest.raises(HandfastError, match=r"without having been struck.*IsADirectoryError"):
        Storm(job, [], Watcher()).run()


def test_a_saver_that_cannot_resume_is_counted_and_begun_anew(
    tmp_path: Path, truth: Ledger
) -> None:
    """As an operator would: the broken checkpoint is removed, and all that it held is lost."""
    job = msgspec.structs.replace(SMALL, run=str(tmp_path), saver="torch.save")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "latest").write_text("2")
    storm = Storm(job, [], Watcher(), truth=truth)
    storm.run()
    assert [r.outcome for r in storm.ledger.resumes] == ["error", "first"]
    assert "rank" in storm.ledger.resumes[0].detail
    assert storm.ledger.curve().state == truth.curve().state


@pytest.mark.heavy
def test_the_whole_demo_in_small(tmp_path: Path) -> None:
    """Both runs, torchrun's own restart, two peers, the page and the JSON; no agent is left."""
    options = Options(out=tmp_path / "demo", seed=3, kills=4, peer_kills=2, steps=60)
    with PlainLines(Console()) as stage:
        result = run(options, stage)
    assert result.equal
    assert len(result.kills) == 4
    assert [kill.torchrun for kill in result.kills].count(True) == 2
    assert [len(peer.kills) for peer in result.peers] == [2, 2]
    told = msgspec.json.decode((options.out / "result.json").read_bytes(), type=DemoResult)
    assert told.storm == result.storm
    assert "Equal to the last bit." in (options.out / "report.html").read_text()
    assert agent_pids(Job(run=str(options.out / "storm"), saver="handfast")) == []
