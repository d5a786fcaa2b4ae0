"""Shows that a run can be read without an agent, and that what is said of it is what is so."""

from __future__ import annotations

import copy
import itertools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import xxhash
from safetensors.numpy import load_file
from small_jobs import FILES, Job, flip, meanwhile, spec, trained, values

import handfast
from handfast.checkpoint import location
from handfast.checkpoint.location import Location, choose
from handfast.checkpoint.reader import Run, open_run
from handfast.checkpoint.status import Mark, troubles
from handfast.core import events
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.messages import decode_record
from handfast.core.retain import Keep
from handfast.core.verdict import Verdict
from handfast.errors import Damaged, FormatError, HandfastError, NoRun, Refused
from handfast.store.journal import scan
from handfast.store.manifest import HASH_BYTES, chunk_hash
from handfast.store.shelf import Shelf
from handfast.testing.faults import FaultyFiles, Hasty


def tree(path: Path) -> dict[str, tuple[int, int]]:
    """All files and directories with their times and sizes."""
    return {
        str(found): (found.stat().st_mtime_ns, found.stat().st_size) for found in path.rglob("*")
    }


def verdicts(run: Run) -> dict[Epoch, Verdict | None]:
    """The verdict of each epoch."""
    return {row.epoch: row.verdict for row in run.epochs()}


# --- what is so ---------------------------------------------------------------------------------


def test_a_run_that_ended_is_shown_as_it_is(tmp_path: Path) -> None:
    """The line is what converged last; what is retained is complete; nobody is waited for."""
    job = trained(tmp_path)
    run = handfast.open(tmp_path)
    status = run.status()
    assert run.latest() == status.line == status.converged == Epoch(1, 4)
    assert status.sound
    assert status.certified
    assert (status.phase, status.blocked_by, status.agents) == ("converged", (), ())
    assert verdicts(run) == dict.fromkeys([Epoch(1, 4), Epoch(1, 3), Epoch(1, 2)], "complete")
    assert [(d.id, d.shard, d.verdict) for d in status.domains] == [
        (d.id, d.shard, Verdict.COMPLETE) for d in job.configuration.domains
    ]
    assert status.skew is not None
    assert status.skew.steps == 0
    assert status.nbytes >= sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors"))
    assert run.epochs(Verdict.TORN) == ()


def test_a_path_that_is_there_is_no_glob(tmp_path: Path) -> None:
    """Two runs of a sweep, `layers=2` and `layers=[2]`: the second was read as the first; and a
    template's brace stands twice for itself."""
    for name in ("layers=2", "layers=[2]", "x[1]/0", "{a}/run"):
        trained(tmp_path / name, 1)
    there = {name: str(tmp_path / name) for name in ("layers=2", "layers=[2]")}
    for path in there.values():
        assert Location([path], FILES).survey().found[0].root == path
    for path, found in {
        "x[1]/{rank}": "x[1]/0",
        "{{a}}/run": "{a}/run",
        "l*[2]": "layers=2",
    }.items():
        survey = Location([str(tmp_path / path)], FILES).survey()
        assert [item.root for item in survey.found] == [str(tmp_path / found)]


def test_looking_changes_nothing(tmp_path: Path) -> None:
    """Status, verify and inspect write nothing, so a snapshot or a read-only mount will do."""
    trained(tmp_path)
    before = tree(tmp_path)
    run = handfast.open(tmp_path)
    run.status()
    run.inspect()
    assert run.verify(everything=True).sound
    assert tree(tmp_path) == before


def test_a_directory_that_was_put_back_older_than_the_others_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One rank's disk was restored from a backup: the others' journals prove what it had, and all
    was called sound while a restore would take an older epoch."""
    job = Job(tmp_path, 2, split=True, keep=Keep(newest=9))
    assert job.start() == GENESIS
    job.save(1)
    job.save(2)
    job.stop()
    shutil.copytree(tmp_path / "disk1", tmp_path / "backup")
    assert job.start() == Epoch(1, 2)
    job.save(3)
    job.stop()
    shutil.rmtree(tmp_path / "disk1")
    shutil.copytree(tmp_path / "backup", tmp_path / "disk1")
    run = handfast.open(tmp_path / "disk0", tmp_path / "disk1")
    status = run.status()
    assert (status.line, status.converged) == (Epoch(1, 2), Epoch(2, 3))
    assert not status.sound
    (trouble,) = status.troubles
    assert (trouble.domain, trouble.verdict, trouble.epoch) == (
        job.configuration.domains[1].id, Verdict.MISSING, Epoch(2, 3),
    )  # fmt: skip
    assert "it knows nothing of 2/3" in trouble.problem
    assert "a restore takes 1/2" in trouble.problem
    assert not run.verify().sound
    assert choose(run.location.survey(), None) == Epoch(1, 2)
    assert "1/2 is the newest that every shard has, BELOW the converged 2/3" in caplog.text
    assert job.start() == Epoch(1, 2)  # what came after it is an abandoned timeline from now on
    job.save(3)
    job.stop()
    assert run.status().sound


@pytest.mark.parametrize("seed", range(12))
def test_latest_is_what_a_restore_takes(tmp_path: Path, seed: int) -> None:
    """Whatever was killed, rolled back or never finished: the reader and the protocol agree."""
    chance = random.Random(seed)
    job = Job(tmp_path, 3, deltas=chance.random() < 0.5)
    for _ in range(chance.randint(1, 4)):
        line = handfast.open(tmp_path).status().line if job.generation else GENESIS
        held = [e.step for e in handfast.open(tmp_path).location.survey().candidates]
        roll = chance.choice(held) if held and chance.random() < 0.3 else None
        base = job.start(want=roll)
        if roll is None:
            assert base == line
        if base is None:
            continue
        for ahead in range(1, chance.randint(2, 5)):
            some = chance.sample(range(3), chance.randint(1, 3)) if chance.random() < 0.4 else None
            job.save(base.step + ahead, only=some)
        if chance.random() < 0.3:
            job.start(only=chance.sample(range(3), 2))
    job.stop()
    run = handfast.open(tmp_path)
    latest, line = run.latest(), run.status().line
    assert run.verify().line == line
    assert job.start() == line
    assert latest == (line if line != GENESIS else None)
    job.stop()


def test_an_abandoned_timeline_is_shown_as_such_and_never_chosen(tmp_path: Path) -> None:
    """After a rollback the newest directory is not the newest epoch (34 of 50 resumed it)."""
    job = trained(tmp_path)
    assert job.start(want=2) == Epoch(1, 2)
    job.stop()
    run = handfast.open(tmp_path)
    shown = {row.epoch: row.orphan for row in run.epochs()}
    assert shown == {Epoch(1, 4): True, Epoch(1, 3): True, Epoch(1, 2): False}
    assert run.latest() == run.status().converged == Epoch(1, 2)
    with pytest.raises(Refused, match="abandoned one, name it whole: 1/4"):
        run.inspect(4)
    assert run.inspect(Epoch(1, 4)).orphan
    assert job.start() == Epoch(1, 2)
    job.stop()


def test_an_epoch_that_some_ranks_lack_is_ahead_then_torn(tmp_path: Path) -> None:
    """Skew is normal while the job may go on; a later generation makes it a torn epoch."""
    job = trained(tmp_path)
    job.start()
    job.save(5, only=[0, 2])
    run = handfast.open(tmp_path)
    status = run.status()
    assert verdicts(run)[Epoch(2, 5)] == "ahead"
    assert status.blocked_by == (job.configuration.domains[1].id,)
    assert status.phase == "converging"
    assert run.latest() == Epoch(1, 4)
    assert [row.verdict for row in status.domains] == ["ahead", "complete", "ahead"]
    assert status.skew is not None
    assert (status.skew.generations, status.skew.steps) == (2, 1)  # of one timeline
    found = run.verify(5)
    assert [(f.verdict, f.shard) for f in found.findings] == [("ahead", 1)]
    job.start()
    job.stop()
    assert verdicts(run)[Epoch(2, 5)] == "torn"
    assert run.status().sound  # nothing was lost: it never counted
    assert [f.verdict for f in run.verify(Epoch(2, 5)).findings] == ["torn"]


def test_a_skipped_epoch_is_torn_and_says_why(tmp_path: Path) -> None:
    """A rank whose disk was full is named, with its reason."""
    job = trained(tmp_path)
    job.start()
    job.save(5, only=[0, 1])
    job.ranks[2].take(events.Forgone(Epoch(2, 5), "no space left"))
    run = handfast.open(tmp_path)
    (row,) = [row for row in run.epochs() if row.epoch == Epoch(2, 5)]
    assert row.verdict == "torn"
    cell = row.cells[job.configuration.domains[2].id]
    assert (cell.mark, cell.problem) == (Mark.SKIPPED, "no space left")
    job.stop()


def test_a_generation_that_is_cut_short_names_who_has_not_frozen(tmp_path: Path) -> None:
    """A launch that dies half-way through its restore changes no line."""
    job = trained(tmp_path)
    assert job.start(only=[0, 1]) is None
    status = handfast.open(tmp_path).status()
    assert (status.phase, status.blocked_by) == ("freezing", (job.configuration.domains[2].id,))
    assert status.line == Epoch(1, 4)
    assert status.sound
    job.stop()


def test_a_run_in_which_nothing_was_saved_is_sound(tmp_path: Path) -> None:
    """A first start that was killed is no damage; its line is the first state."""
    job = Job(tmp_path, 2)
    status = handfast.open(tmp_path).status()
    assert (status.line, status.sound, status.phase) == (None, True, "idle")
    job.start()
    job.stop()
    run = handfast.open(tmp_path)
    assert run.status().line == GENESIS
    assert run.status().sound
    assert run.latest() is None
    assert run.verify().line == GENESIS
    with pytest.raises(Refused, match="nothing was saved in this run yet"):
        run.inspect()


@pytest.mark.parametrize("gone", ["domains", "domains/*", "domains/*/*/"])
def test_a_run_of_which_only_certificates_are_left_is_missing(tmp_path: Path, gone: str) -> None:
    """`rm -r RUN/domains/*`: it is neither idle nor sound, whoever looks."""
    trained(tmp_path)
    published = tmp_path / "certificates"
    published.mkdir(exist_ok=True)
    (published / "rank-00000.json").write_text("{}")
    assert handfast.open(tmp_path).status().sound
    for path in tmp_path.glob(gone):
        shutil.rmtree(path)
    with pytest.raises(Refused, match=r"certificates of rank-00000.*, and no .* is left") as lost:
        handfast.open(tmp_path)
    assert lost.value.verdict == "missing"
    assert lost.value.shards == (str(tmp_path),)


# --- where it lies ------------------------------------------------------------------------------


@pytest.mark.parametrize("paths", ["*", "disk*", "disk{rank}", "each"])
def test_disks_of_their_own_are_joined(tmp_path: Path, paths: str) -> None:
    """Node-local directories are given as a glob, as the training's template, or one by one."""
    trained(tmp_path, split=True)
    given = [tmp_path / f"disk{n}" for n in range(3)] if paths == "each" else [tmp_path / paths]
    assert handfast.open(*given).latest() == Epoch(1, 4)


def test_a_disk_that_is_not_given_is_named(tmp_path: Path) -> None:
    """Half of the paths give no line, and say whose directory is missing and where it was."""
    job = trained(tmp_path, split=True)
    run = handfast.open(tmp_path / "disk0", tmp_path / "disk2")
    status = run.status()
    away = job.configuration.domains[1].id
    assert (run.latest(), status.sound, status.blocked_by) == (None, False, (away,))
    (trouble,) = status.troubles
    assert (trouble.domain, trouble.verdict) == (away, "missing")
    assert "it was on node1" in trouble.problem
    assert verdicts(run)[Epoch(1, 4)] == "missing"
    with pytest.raises(Refused, match="not all of its domains are here") as refused:
        run.inspect()
    assert refused.value.shards == (away,)
    assert [f.verdict for f in run.verify().findings] == ["missing"]


@pytest.mark.parametrize("what", ["nowhere", "empty", "a file", "no match"])
def test_what_is_no_run_is_said_to_be_none(tmp_path: Path, what: str) -> None:
    """The error names the path and says what to give."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").touch()
    path = tmp_path / ("no match*" if what == "no match" else what)
    with pytest.raises(NoRun, match="What to do: give the directory"):
        handfast.open(path)
    with pytest.raises(NoRun, match="no path was given"):
        handfast.open()


def test_a_directory_that_is_found_twice_counts_once(tmp_path: Path) -> None:
    """A link to a run is the run; a copy of it is refused, since it may differ."""
    trained(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert handfast.open(tmp_path / "run", tmp_path / "link").latest() == Epoch(1, 4)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with pytest.raises(Refused, match="found at two places"):
        handfast.open(tmp_path / "run", tmp_path / "copy")


def test_two_runs_are_not_read_as_one(tmp_path: Path) -> None:
    """A glob that catches another run is refused; a strange domain inside a run is named."""
    trained(tmp_path / "a")
    other = trained(tmp_path / "b")
    with pytest.raises(Refused, match="several runs"):
        handfast.open(tmp_path / "*")
    home = tmp_path / "a" / "domains" / "rank-00001"
    shutil.rmtree(home)
    shutil.copytree(other.path(1), home)
    found = {(f.verdict, f.shard) for f in handfast.open(tmp_path / "a").verify().findings}
    assert found == {("missing", 1), ("foreign", 1)}


def test_swapped_directories_are_found(tmp_path: Path) -> None:
    """Rank 0's directory under rank 1's name is no copy of rank 1's shard."""
    job = trained(tmp_path)
    one, two, aside = job.path(0), job.path(1), tmp_path / "aside"
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
    run = handfast.open(tmp_path)
    assert {f.verdict for f in run.verify().findings} >= {Verdict.FOREIGN}
    assert run.latest() is None


def test_a_directory_of_another_copy_of_the_run_is_a_mixture(tmp_path: Path) -> None:
    """A run is copied, both go on alike to 2/6, and one rank's directory comes from the copy:
    each epoch is certified in every journal, and is of no one run.
    """
    job = trained(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    other = copy.copy(job)
    other.roots = [str(tmp_path / "copy")] * 3
    other.big = 16
    for each in (job, other):
        assert each.start() == Epoch(1, 4)
        each.save(5, 6)
        each.stop()
        assert handfast.open(each.roots[0]).verify().sound
    shutil.rmtree(job.path(1))
    shutil.copytree(other.path(1), job.path(1))
    run = handfast.open(tmp_path / "run")
    status = run.status()
    assert (status.sound, status.line, run.latest()) == (False, None, None)
    one, stray = job.configuration.domains[:2]
    (trouble,) = status.troubles
    assert (trouble.domain, trouble.shard, trouble.verdict) == (stray.id, 1, "mixed")
    assert f"did not begin generation 2 in the round of {one.id}" in trouble.problem
    assert [row.verdict for row in status.domains] == ["complete", "mixed", "complete"]
    assert verdicts(run) == {Epoch(2, 6): "mixed", Epoch(2, 5): "mixed", Epoch(1, 4): "complete"}
    for found in (run.verify(), run.verify(everything=True), run.verify(6)):
        assert (found.line, [f.verdict for f in found.findings]) == (None, ["mixed"])
    for step in (None, 6):
        with pytest.raises(Refused, match="copies of one run that went on apart") as caught:
            run.export(tmp_path / "out", step=step)
        assert caught.value.shards == (stray.id,)
    assert job.start() is None
    job.stop()


# --- damage -------------------------------------------------------------------------------------


def test_a_domain_without_a_readable_identity_is_named_by_its_directory(tmp_path: Path) -> None:
    """A damaged domain.json is one finding, for the domain that it was."""
    job = trained(tmp_path)
    flip(job.path(1) / "domain.json", 40)
    run = handfast.open(tmp_path)
    (finding,) = run.verify().findings
    assert (finding.verdict, finding.domain) == ("corrupt", job.configuration.domains[1].id)
    assert "domain.json" in finding.problem
    assert run.status().troubles[0].verdict == "corrupt"
    assert run.latest() is None


def test_damage_within_a_journal_is_loud(tmp_path: Path) -> None:
    """A record that a later one proves durable can't be read: the domain is corrupt, not empty."""
    job = trained(tmp_path)
    flip(job.find(2, "*/journal"), 200)
    (finding,) = handfast.open(tmp_path).verify().findings
    assert finding.verdict == "corrupt"
    assert "damaged at byte" in finding.problem


@pytest.mark.parametrize("step", [None, 4])
@pytest.mark.parametrize("name", ["*/journal", "domain.json"])
def test_a_domain_that_can_not_be_read_is_not_called_missing(
    tmp_path: Path, name: str, step: int | None
) -> None:
    """Its directory is here: what is wrong with it is said, and what to do, by whoever needs it."""
    job = trained(tmp_path)
    path = job.find(1, name)
    flip(path, 100)
    with pytest.raises(Refused, match="not all of its domains can be read") as refused:
        handfast.open(tmp_path).export(tmp_path / "out", step)
    assert refused.value.verdict == "corrupt"
    (problem,) = refused.value.shards
    assert str(path) in problem
    assert "What to do: " in problem
    assert "give the paths" not in str(refused.value)


HARMS: dict[str, Callable[[Job], object]] = {
    "a record": lambda job: flip(job.find(1, "2/journal"), 200),
    "the journal": lambda job: job.find(1, "2/journal").write_bytes(b""),
    "another's journal": lambda job: shutil.copy(
        job.find(0, "2/journal"), job.find(1, "2/journal")
    ),
    "the identity": lambda job: flip(job.path(1) / "domain.json", 100),
    "no identity": lambda job: (job.path(1) / "domain.json").write_bytes(b"{}"),
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_what_is_said_of_a_lost_record_can_be_done(
    tmp_path: Path, harm: Callable[[Job], object]
) -> None:
    """A copy of the directory, older than the damage, or a fresh path; to move it away is no way
    out. What another rank stored can be read without handfast.
    """
    job = trained(tmp_path / "run")
    copied = Path(shutil.copytree(job.path(1), tmp_path / "copy"))
    job.start()
    job.save(5, 6)
    job.stop()
    harm(job)
    run = handfast.open(tmp_path / "run")
    (trouble,) = run.status().troubles
    assert "back from a copy; without a copy the run is lost: begin anew" in trouble.problem
    job.path(1).rename(tmp_path / "away")
    (trouble,) = run.status().troubles
    assert trouble.verdict == "missing"
    with pytest.raises(Refused, match="not all of its domains are here"):
        run.export(tmp_path / "out", 4)
    kept = load_file(job.find(0, "2/chunks/2-6.safetensors"))
    assert kept["model/b"].tobytes() == values(6, 0, 5)
    copied.rename(job.path(1))
    (trouble,) = run.status().troubles  # it is older than what the others prove
    assert "a restore takes 1/4" in trouble.problem
    assert job.start() == run.latest() == Epoch(1, 4)
    job.stop()
    assert run.status().sound
    trained(tmp_path / "fresh")


def test_a_journal_cut_at_every_byte_gives_an_earlier_line(tmp_path: Path) -> None:
    """A crash may cut the last bytes: what is left is a state that the run was in, or is refused
    where not even the journal's own beginning is left.
    """
    job = Job(tmp_path, 1)
    job.start()
    job.save(1, 2)
    job.stop()
    journal = job.find(0, "*/journal")
    whole = journal.read_bytes()
    lines, loud = [], []
    for length in range(len(whole) + 1):
        journal.write_bytes(whole[:length])
        survey = handfast.open(tmp_path).location.survey()
        loud += [length for found in survey.found if found.problem]
        lines.append(survey.line or GENESIS)
    assert lines == sorted(lines)
    assert set(lines) == {GENESIS, Epoch(1, 1), Epoch(1, 2)}
    assert loud == list(range(len(loud)))
    journal.write_bytes(whole[: len(loud)])
    assert len(scan(FILES, str(journal)).records) == 1  # its own seal


@pytest.mark.parametrize("name", ["domain.json", "*/manifests/1-4.*", "*/chunks/1-4.*"])
@pytest.mark.parametrize("how", ["empty", "gone", "cut"])
def test_a_file_that_is_not_whole_is_found(tmp_path: Path, name: str, how: str) -> None:
    """And the restore that verify foresees is the one that happens, or is refused."""
    job = trained(tmp_path, big=300_000)
    path = job.find(1, name)
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 0 if how == "empty" else -1])
    run = handfast.open(tmp_path)
    result = run.verify()
    assert not result.sound
    assert {f.verdict for f in result.findings} <= {Verdict.CORRUPT, Verdict.MISSING}
    assert all(f.domain == job.configuration.domains[1].id for f in result.findings)
    if name == "domain.json":
        assert result.line is None
    else:
        assert result.line == Epoch(1, 3)
        assert job.start() == Epoch(1, 3)
        job.stop()


def test_each_damaged_chunk_is_named_with_its_file_and_offset(tmp_path: Path) -> None:
    """Two flips in two chunks of three are two findings; a restore takes the older epoch."""
    job = trained(tmp_path, big=600_000)
    path = job.find(2, "*/chunks/1-4.*")
    for at in (5, (1 << 20) + 17):
        flip(path, at)
    result = handfast.open(tmp_path).verify()
    assert [(f.verdict, f.chunk, f.offset, f.path) for f in result.findings] == [
        (Verdict.CORRUPT, 0, 0, str(path)),
        (Verdict.CORRUPT, 1, 1 << 20, str(path)),
    ]
    assert result.checked == (Epoch(1, 4), Epoch(1, 3))
    assert result.line == Epoch(1, 3)
    assert job.start() == Epoch(1, 3)
    job.stop()


@pytest.mark.parametrize("deltas", [False, True])
def test_a_data_file_that_goes_on_behind_its_end_is_found(tmp_path: Path, deltas: bool) -> None:
    """What a restore takes is right to the last byte, but the file is not what was written."""
    job = Job(tmp_path, 2, deltas=deltas)
    frozen = (8 << 18,)
    job.own[1] = {spec("own/frozen", frozen, frozen, (0,)): bytes(8 << 20)}
    job.start()
    job.save(3, 4)
    job.stop()
    assert handfast.open(tmp_path).verify(everything=True).sound
    file = job.find(1, "1/chunks/1-4.*")
    assert (file.suffix == ".delta") == deltas
    end = file.stat().st_size
    with file.open("ab") as opened:
        opened.write(b"more")
    result = handfast.open(tmp_path).verify()
    (found,) = result.findings
    assert (found.path, found.chunk, found.offset) == (str(file), -1, end)
    assert f"{end + 4} bytes long, 4 more than were written" in found.problem
    assert result.line == Epoch(1, 4)
    assert job.start() == Epoch(1, 4)
    job.stop()
    os.truncate(file, end)
    assert handfast.open(tmp_path).verify().sound


def test_bytes_of_another_epoch_are_called_a_mixture(tmp_path: Path) -> None:
    """A data file put in the place of another epoch's is whole, and is not that epoch's."""
    job = trained(tmp_path, big=300_000)
    shutil.copy(job.find(0, "*/chunks/1-3.*"), job.find(0, "*/chunks/1-4.*"))
    findings = handfast.open(tmp_path).verify().findings
    assert {f.verdict for f in findings} == {Verdict.MIXED}
    assert "These are the bytes of chunk 0 of epoch 1/3" in findings[0].problem


def test_another_ranks_bytes_are_called_a_mixture(tmp_path: Path) -> None:
    """Shards of two ranks have one layout and other values: only the hashes tell."""
    job = trained(tmp_path, big=300_000)
    shutil.copy(job.find(2, "*/chunks/1-4.*"), job.find(1, "*/chunks/1-4.*"))
    findings = handfast.open(tmp_path).verify().findings
    assert Verdict.MIXED in {f.verdict for f in findings}
    assert job.configuration.domains[2].id in findings[-1].problem


def test_a_manifest_of_another_epoch_is_found(tmp_path: Path) -> None:
    """A manifest that reads well under another epoch's name is not what was attested."""
    job = trained(tmp_path)
    shutil.copy(job.find(0, "*/manifests/1-3.*"), job.find(0, "*/manifests/1-4.*"))
    (finding,) = handfast.open(tmp_path).verify().findings
    assert (finding.verdict, finding.epoch) == ("mixed", Epoch(1, 4))


def test_damage_to_older_epochs_is_found_by_all(tmp_path: Path) -> None:
    """The default reads what a restore would; --all reads what is kept besides."""
    job = trained(tmp_path)
    flip(job.find(1, "*/chunks/1-2.*"), 4100)
    run = handfast.open(tmp_path)
    assert run.verify().sound
    result = run.verify(everything=True)
    assert [(f.epoch, f.verdict) for f in result.findings] == [(Epoch(1, 2), "corrupt")]
    assert result.line == Epoch(1, 4)
    assert not run.verify(2).sound


def test_deltas_are_read_through_to_the_files_that_they_refer_to(tmp_path: Path) -> None:
    """A byte of the first full image may be a byte of the newest epoch."""
    job = Job(tmp_path, 1, deltas=True, big=600_000)
    job.start()
    job.save(1, 2)
    job.stop()
    run = handfast.open(tmp_path)
    assert run.verify().sound
    sources = run.inspect().shards[0].sources
    assert sum(source.chunks for source in sources) == -(-run.inspect().shards[0].image_bytes >> 20)


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    """It ends where it said it would, so a bar reaches its end."""
    trained(tmp_path, big=300_000)
    told: list[tuple[int, int]] = []
    result = handfast.open(tmp_path).verify(progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (result.nbytes, result.nbytes)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


# --- other formats, other systems ---------------------------------------------------------------


def test_a_run_of_another_format_is_refused_by_its_version(tmp_path: Path) -> None:
    """A newer handfast wrote it: say so, and look no further."""
    job = trained(tmp_path)
    for rank in range(3):
        path = job.path(rank) / "domain.json"
        raw = path.read_bytes()
        identity = msgspec.json.decode(raw)["identity"] | {"format": 2}
        inner = msgspec.json.encode(identity)
        check = xxhash.xxh3_128_hexdigest(inner)
        path.write_bytes(msgspec.json.encode({"check": check, "identity": msgspec.Raw(inner)}))
    with pytest.raises(FormatError, match="format 2; this handfast reads format 1"):
        handfast.open(tmp_path)


def test_a_manifest_of_another_format_is_foreign(tmp_path: Path) -> None:
    """One domain whose agent was newer does not hide the others."""
    job = trained(tmp_path)
    path = job.find(0, "*/manifests/1-4.*")
    data = bytearray(path.read_bytes())
    data[8] = 2
    data[-HASH_BYTES:] = chunk_hash(data[:-HASH_BYTES])
    path.write_bytes(data)
    (finding,) = handfast.open(tmp_path).verify().findings
    assert finding.verdict == "foreign"
    assert "a manifest of format 2" in finding.problem


def test_an_unknown_record_in_a_journal_is_foreign_not_damage(tmp_path: Path) -> None:
    """A newer agent's record is nobody's mistake; the domain is named and its problem said."""
    job = trained(tmp_path)
    job.start()
    journal = job.ranks[0].keeper.directory.journal
    journal.append(msgspec.msgpack.encode(["rebased", 1]))
    journal.sync()
    job.stop()
    (trouble,) = handfast.open(tmp_path).status().troubles
    assert trouble.verdict == "foreign"
    assert "not known to this handfast" in trouble.problem


def test_a_journal_that_contradicts_itself_is_corrupt(tmp_path: Path) -> None:
    """Two votes on one epoch can't both be a member's word."""
    job = trained(tmp_path)
    job.start()
    directory = job.ranks[0].keeper.directory
    job.save(5, only=[0])
    votes = [r for r in Shelf(FILES, job.roots[0], "rank-00000").records() if b"staged" in r]
    vote = msgspec.structs.replace(decode_record(votes[-1]), digest="0" * 32)
    directory.journal.append(msgspec.msgpack.encode(vote))
    directory.journal.sync()
    job.stop()
    (trouble,) = handfast.open(tmp_path).status().troubles
    assert trouble.verdict == "corrupt"
    assert "contradicts itself" in trouble.problem


class Closed(Hasty):
    """A system that lets nobody read journals."""

    def open(self, path: str) -> int:
        if path.endswith("/journal"):
            raise PermissionError(13, "Permission denied", path)
        return super().open(path)


def test_what_can_not_be_looked_at_is_no_damage(tmp_path: Path) -> None:
    """A directory of another user is an error of its own kind, with what to do."""
    trained(tmp_path)
    with pytest.raises(HandfastError, match=r"can't be read: Permission denied") as closed:
        open_run(tmp_path, files=Closed())
    assert not isinstance(closed.value, Damaged)


# --- beside a live training ---------------------------------------------------------------------


def test_a_release_between_journal_and_manifests_is_no_loss(tmp_path: Path) -> None:
    """The journal is read again where a manifest is missing: it was released, not lost."""
    job = Job(tmp_path, 2, keep=Keep(newest=1))
    job.start()
    job.save(1, 2)
    busy = meanwhile("rank-00000/1/manifests", lambda: job.save(3, 4, 5))
    survey = Location([str(tmp_path)], busy).survey()
    assert busy.fired
    assert troubles(survey) == ()
    job.stop()


def test_an_epoch_released_while_it_is_verified_is_left_for_the_new_line(tmp_path: Path) -> None:
    """Never a false alarm beside a training: the new line is read instead."""
    job = Job(tmp_path, 2, keep=Keep(newest=1))
    job.start()
    job.save(1, 2)
    busy = meanwhile("rank-00001/1/chunks/1-2", lambda: job.save(3, 4, 5), at=2)
    result = open_run(tmp_path, files=busy).verify()
    assert busy.fired
    assert result.sound
    assert result.line == Epoch(1, 5)
    busy = meanwhile("rank-00001/1/chunks/1-5", lambda: job.save(6, 7), at=2)
    with pytest.raises(Refused, match="no domain holds step 5"):
        open_run(tmp_path, files=busy).verify(5)
    job.stop()


class Running(Hasty):
    """A system on which the training has gone on, whenever an image is opened."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.steps = itertools.count(10)

    def open(self, path: str) -> int:
        if "/chunks/" in path:
            self.job.save(next(self.steps), next(self.steps))
        return super().open(path)


def test_a_run_that_always_runs_away_is_refused_in_the_end(tmp_path: Path) -> None:
    """After so many tries the reader says what to do instead of looking for ever."""
    job = Job(tmp_path, 1, keep=Keep(newest=1))
    job.start()
    job.save(1)
    with pytest.raises(HandfastError, match=r"released by .* 10 times.*keep more") as caught:
        open_run(tmp_path, files=Running(job)).verify()
    assert not isinstance(caught.value, Refused)  # which would be a verdict
    job.stop()


def newest_whole(run: Run, reader: str, dest: Path) -> Epoch | None:
    """The newest whole epoch, as one of the ways to read a run finds it; None where it is torn."""
    match reader:
        case "latest":
            return run.latest()
        case "epochs":
            return next((row.epoch for row in run.epochs(Verdict.COMPLETE)), None)
        case "status":
            status = run.status()
            return status.line if status.sound else None
        case "verify" | "verify all":
            result = run.verify(everything=reader == "verify all")
            return result.checked[0] if result.sound else None
        case "inspect":
            return run.inspect().epoch
        case _:
            return run.export(dest).epoch


READERS = ("latest", "epochs", "status", "verify", "verify all", "inspect", "export")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("part", ["rank-00001/1/journal", "rank-00000/1/manifests"])
def test_a_run_is_read_as_it_was_at_one_moment(tmp_path: Path, reader: str, part: str) -> None:
    """Between a look at one domain and at the next, epochs converge and others are released: the
    two have no epoch in common then, and yet the run was whole at any moment.
    """
    job = Job(tmp_path / "run", 2, keep=Keep(newest=1))
    job.start()
    job.save(1, 2)
    run = open_run(tmp_path / "run")
    run.location.files = busy = meanwhile(part, lambda: job.save(3, 4, 5))
    found = newest_whole(run, reader, tmp_path / "out")
    assert busy.fired
    then = reader in ("latest", "epochs", "status") and part.endswith("manifests")
    assert found == Epoch(1, 2 if then else 5)
    job.stop()


@pytest.mark.parametrize("reader", READERS)
def test_a_loss_is_found_beside_a_training_that_goes_on(tmp_path: Path, reader: str) -> None:
    """Of the last epoch one shard's manifest is gone, and no journal says that it was released."""
    job = Job(tmp_path / "run", 2, keep=Keep(newest=1))
    job.start()
    job.save(1, 2)
    run = open_run(tmp_path / "run")

    def lose() -> None:
        job.save(3, 4, 5)
        job.find(1, "*/manifests/1-5.*").unlink()

    run.location.files = meanwhile("rank-00001/1/journal", lose)
    assert verdicts(run)[Epoch(1, 5)] == "missing"
    if reader in ("inspect", "export"):
        with pytest.raises(Refused, match="no epoch is left that every shard has"):
            newest_whole(run, reader, tmp_path / "out")
    else:
        assert newest_whole(run, reader, tmp_path / "out") is None
    job.stop()


def test_a_run_that_is_never_still_is_no_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what was done, and is none that condemns anybody's epochs."""
    job = Job(tmp_path, 2, keep=Keep(newest=1))
    job.start()
    steps = itertools.count(1)
    monkeypatch.setattr(location, "LOOKS", 5)
    busy = FaultyFiles(
        FILES, 1, lambda: (job.save(next(steps)), None)[1], path="journal", lasting=True
    )
    with pytest.raises(HandfastError, match="being written: it was looked at 5 times") as caught:
        Location([str(tmp_path)], busy).survey()
    assert not isinstance(caught.value, Refused | FormatError)
    job.stop()


def test_a_first_start_is_sound_while_its_ranks_begin(tmp_path: Path) -> None:
    """One domain has journaled who takes part and another has not yet: that loses nothing."""
    job = Job(tmp_path, 3)
    assert job.start(only=[0, 1]) is None
    status = handfast.open(tmp_path).status()
    assert (status.sound, status.line, status.troubles) == (True, GENESIS, ())
    assert job.start() == GENESIS
    job.stop()


def test_verify_of_everything_leaves_out_what_is_released_meanwhile(tmp_path: Path) -> None:
    """Nobody holds that any more; and an epoch that a rank has not finished is no damage."""
    job = Job(tmp_path, 2)
    job.start()
    job.save(1, 2, 3)
    busy = meanwhile("rank-00000/1/chunks/1-1", lambda: job.save(4, 5), calls=("pread",))
    result = open_run(tmp_path, files=busy).verify(everything=True)
    assert busy.fired
    assert (result.sound, result.checked) == (True, (Epoch(1, 3), Epoch(1, 2)))
    job.save(6, only=[0])
    result = handfast.open(tmp_path).verify(everything=True)
    assert (result.sound, result.checked[0]) == (True, Epoch(1, 6))
    with pytest.raises(Refused, match="1 of 2 shards lack it as yet") as caught:
        handfast.open(tmp_path).export(tmp_path / "out", step=6)
    assert caught.value.verdict == "ahead"
    job.stop()


def test_an_epoch_that_is_being_released_is_not_called_torn(tmp_path: Path) -> None:
    """One rank has let it go, and another learns only later that it may."""
    job = Job(tmp_path, 2, keep=Keep(newest=1))
    job.start()
    job.save(1, 2)
    one, other = job.ranks
    for rank in job.ranks:
        rank.take(events.Captured(Epoch(1, 3)))
    _, to, message = job.mail.popleft()
    job.ranks[to].take(events.Received(message))
    assert {c.epoch for c in one.member.retained} != {c.epoch for c in other.member.retained}
    run = handfast.open(tmp_path)
    assert run.status().sound
    assert run.latest() == Epoch(1, 3)
    with pytest.raises(Refused, match="1/2 is being released") as caught:
        run.export(tmp_path / "out", step=2)
    assert caught.value.verdict == "missing"
    job.stop()


def test_names_that_are_no_domains_are_left_alone(tmp_path: Path) -> None:
    """An editor's file, or a domain whose launch died before it had an identity."""
    trained(tmp_path)
    os.mkdir(tmp_path / "domains" / "rank-00007")
    (tmp_path / "domains" / "notes.txt").touch()
    assert handfast.open(tmp_path).status().sound


@pytest.mark.parametrize(
    "name", ["rank-00000 copy", "rank-00000~", ".rank-00000.swp", os.fsdecode(b"rank-\xff")]
)
def test_a_copy_under_a_name_that_no_domain_can_have_is_left_alone(
    tmp_path: Path, name: str
) -> None:
    """What a file manager or an editor leaves beside a domain: the format says to ignore it."""
    job = trained(tmp_path)
    shutil.copytree(job.path(0), tmp_path / "domains" / name)
    run = handfast.open(tmp_path)
    assert run.verify(everything=True).sound
    assert run.export(tmp_path / "out").epoch == run.latest() == Epoch(1, 4)


def test_a_copy_beside_its_domain_is_named_and_can_be_moved_away(tmp_path: Path) -> None:
    """Its old name is taken; so it belongs out of domains/, and the domain itself is sound."""
    job = trained(tmp_path)
    copied = tmp_path / "domains" / "rank-00000.bak"
    shutil.copytree(job.path(0), copied)
    run = handfast.open(tmp_path)
    (trouble,) = run.status().troubles
    assert trouble.verdict == "foreign"
    assert str(copied) in trouble.problem
    assert "move the copy out of domains/" in trouble.problem
    assert run.latest() == Epoch(1, 4)
    copied.rename(tmp_path / "rank-00000.bak")
    assert run.status().sound
