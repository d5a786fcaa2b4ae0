"""Shows that a storm follows from its seed, and that its eyes know a phase when they see one."""

from pathlib import Path

import pytest

from handfast.demo.chaos import Eyes, plan, with_rollback
from handfast.demo.events import Event

SEEDS = range(20)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_seed_gives_the_same_storm(seed: int) -> None:
    """Or a result could not be looked at twice."""
    assert plan(seed, 16, steps=240, every=5) == plan(seed, 16, steps=240, every=5)
    assert plan(seed, 16, steps=240, every=5) != plan(seed + 1, 16, steps=240, every=5)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_storm_strikes_everything_in_every_phase_and_leaves_room_to_finish(seed: int) -> None:
    """All targets, all aims; the gaps sum up to less than the run, or kills would be left over."""
    strikes = plan(seed, 16, steps=240, every=5)
    assert {s.target for s in strikes} == {"job", "rank", "agent", "node"}
    assert {s.aim for s in strikes} >= {"staging", "persisting", "attesting", "releasing", "moment"}
    assert all((s.rank is not None) == (s.target == "rank") for s in strikes)
    assert all(s.gap > 5 for s in strikes)
    assert sum(s.gap for s in strikes) < 240


@pytest.mark.parametrize("seed", SEEDS)
def test_torchrun_runs_the_job_for_one_rank_kill_and_the_job_kill_after_it(seed: int) -> None:
    """It begins after a strike that ends the job: a running one can't be moved under torchrun."""
    strikes = plan(seed, 16, steps=240, every=5)
    under = [i for i, s in enumerate(strikes) if s.torchrun]
    assert under == [under[0], under[0] + 1]
    assert [strikes[i].target for i in under] == ["rank", "job"]
    assert strikes[under[0] - 1].target != "agent"


def test_savers_without_agents_are_struck_where_they_have_something_to_strike() -> None:
    """The same kind of storm: ranks and jobs, in the phases that a plain writer has."""
    strikes = plan(1, 8, steps=88, every=5, agents=False)
    assert {s.target for s in strikes} == {"job", "rank"}
    assert {s.aim for s in strikes} == {"persisting", "saving", "moment"}
    assert not any(s.torchrun for s in strikes)


def test_a_rollback_is_followed_by_a_kill_before_anything_new_is_saved() -> None:
    """Else the given-up checkpoint would not be the newest, and nothing would be shown."""
    before = plan(1, 8, steps=88, every=5, agents=False)
    strikes = with_rollback(before)
    (back,) = [i for i, s in enumerate(strikes) if s.rollback]
    assert len(strikes) == len(before)
    assert {strikes[back].target, strikes[back + 1].target} == {"job"}
    assert strikes[back + 1].gap < 5
    assert strikes[:back] + strikes[back + 2 :] == before[:back] + before[back + 2 :]


def test_eyes_see_a_save_by_its_events(tmp_path: Path) -> None:
    """Staging lasts while any rank is inside its save; the last length is the next one's guess."""
    eyes = Eyes(str(tmp_path))
    assert eyes.look() == set()
    assert eyes.window() is None
    for at, rank, kind in ((1.0, 0, "saving"), (1.25, 1, "saving"), (1.5, 0, "saved")):
        eyes.take(Event(at=at, rank=rank, launch=1, kind=kind, step=5))
    assert eyes.look() == {"staging"}
    window = eyes.window()
    assert window is not None
    assert window[0] == 1.0
    eyes.take(Event(at=3.0, rank=1, launch=1, kind="saved", step=5))
    assert eyes.look() == set()
    eyes.take(Event(at=4.0, rank=1, launch=1, kind="saving", step=10))
    assert eyes.window() == (4.0, 2.0)
    eyes.forget()
    assert eyes.window() is None


def test_eyes_see_files_come_change_and_go(tmp_path: Path) -> None:
    """A data file is persisting, a manifest is attesting, and what goes away is released."""
    home = tmp_path / "checkpoints" / "rank-0" / "domains" / "d" / "1"
    for name in ("chunks", "manifests"):
        (home / name).mkdir(parents=True)
    eyes = Eyes(str(tmp_path))
    eyes.look()
    (home / "journal").write_bytes(b"a record")
    assert eyes.look() == set()
    draft, image = home / "chunks" / "a.tmp", home / "chunks" / "a.safetensors"
    draft.write_bytes(b"x")
    assert eyes.look() == {"persisting"}
    draft.rename(image)
    assert eyes.look() == {"persisting"}  # the draft's going is no release
    manifest = home / "manifests" / "a"
    manifest.write_bytes(b"m")
    assert eyes.look() == {"attesting"}
    assert eyes.look() == set()
    manifest.unlink()
    image.unlink()
    assert eyes.look() == {"releasing"}


def test_eyes_see_a_file_renamed_over_another_of_the_same_length(tmp_path: Path) -> None:
    """That is how a peer persists: name and length stay, only the file behind them is new."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    file, draft = folder / "rank0.pt", folder / "rank0.pt.tmp"
    file.write_bytes(b"old")
    draft.write_bytes(b"new")
    eyes = Eyes(str(tmp_path))
    eyes.look()
    draft.rename(file)
    assert eyes.look() == {"persisting"}
