"""Shows that an operator's release keeps the protocol's rule, and what is kept is worth keeping."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from small_jobs import FILES, Job, flip, trained

import handfast
from handfast.checkpoint.location import Location
from handfast.checkpoint.release import DomainPlan, carry_out, free_pins
from handfast.checkpoint.release import plan_release as plan
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.messages import Released, Skipped
from handfast.core.retain import Keep
from handfast.errors import HandfastError, Refused, SaveFailed, Superseded
from handfast.store.pins import Holder, Pin, pin, pins
from handfast.testing.faults import FaultyFiles


def located(path: Path) -> Location:
    """The run at a path."""
    return Location([str(path)], FILES)


def released(path: Path, keep: Keep | None = None, step: int | None = None) -> list[DomainPlan]:
    """Plan and carry out."""
    location = located(path)
    return list(carry_out(location, plan(location, keep, step), keep, step))


def held(path: Path) -> list[list[Epoch]]:
    """What each domain retains."""
    return [list(row.retained) for row in handfast.open(path).status().domains]


def test_without_being_told_so_nothing_of_the_timeline_goes(tmp_path: Path) -> None:
    """The training's own keep= is not known here: its archive must not be guessed away."""
    trained(tmp_path)
    for domain in plan(located(tmp_path)):
        assert (domain.gone, domain.leftovers, domain.blocked) == ((), (), "")
        assert [stay.why for stay in domain.stays] == ["it is kept"] * 2 + [
            "it is the converged line"
        ]
    assert released(tmp_path) == []


def test_only_the_newest_are_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    """Files go with their epochs, the line stays, and the job resumes from it."""
    job = trained(tmp_path)
    done = released(tmp_path, Keep(newest=1))
    assert [domain.gone for domain in done] == [(Epoch(1, 2), Epoch(1, 3))] * 3
    assert held(tmp_path) == [[Epoch(1, 4)]] * 3
    assert sorted(f.name for f in tmp_path.rglob("*.safetensors")) == ["1-4.safetensors"] * 3
    assert handfast.open(tmp_path).verify(everything=True).sound
    assert job.start() == Epoch(1, 4)
    job.save(5)
    job.stop()
    assert handfast.open(tmp_path).latest() == Epoch(2, 5)


def test_who_sees_only_some_domains_releases_nothing_unless_told_to_trust(tmp_path: Path) -> None:
    """On node-local disks each node sees its own: the epoch that is kept may be damaged elsewhere,
    and the older ones be all that is left of the run."""
    job = trained(tmp_path, 2, split=True)
    here = Location([str(tmp_path / "disk0")], FILES)
    keep = Keep(newest=1)
    (blocked,) = plan(here, keep)
    assert (blocked.gone, blocked.leftovers) == ((), ())
    assert blocked.blocked.startswith("not at the paths given: rank-00001-")
    assert "give the paths of all domains; or --unseen" in blocked.blocked
    assert carry_out(here, [blocked], keep, None) == ()
    plans = plan(here, keep, unseen=True)
    (done,) = carry_out(here, plans, keep, None, unseen=True)
    assert done.gone == (Epoch(1, 2), Epoch(1, 3))
    assert job.start() == Epoch(1, 4)
    job.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_root_does_not_write_into_a_users_run(tmp_path: Path) -> None:
    """Under a umask of 077 the user could train no more on it."""
    job = trained(tmp_path, 1)
    os.chown(job.path(0), 65534, 65534)
    with pytest.raises(HandfastError, match=r"belongs to user 65534.*release as that user"):
        released(tmp_path, Keep(newest=1))
    assert held(tmp_path) == [[Epoch(1, 2), Epoch(1, 3), Epoch(1, 4)]]
    assert not (job.path(0) / "2").exists()


def test_a_release_is_journaled_before_a_file_goes(tmp_path: Path) -> None:
    """An operator's crash in the middle leaves no epoch that the journal retains without files."""
    trained(tmp_path, 1)
    keep = Keep(newest=1)
    files = FaultyFiles(FILES, 1, errno.EIO, kinds=("rename",), lasting=True)
    location = Location([str(tmp_path)], files)
    with pytest.raises(SaveFailed, match="Input/output error"):
        carry_out(location, plan(location, keep), keep, None)
    run = handfast.open(tmp_path)
    assert held(tmp_path) == [[Epoch(1, 4)]]
    assert run.status().sound
    (left,) = plan(located(tmp_path))
    assert left.leftovers == (Epoch(1, 2), Epoch(1, 3))
    assert released(tmp_path)[0].leftovers == left.leftovers
    assert len(list(tmp_path.rglob("*.manifest"))) == 1


@pytest.mark.parametrize("cut", [False, True])
def test_a_full_disk_is_told_what_the_release_needs(tmp_path: Path, cut: bool) -> None:
    """Not to free space, which it was to do; and a try leaves nothing that takes more of it."""
    job = trained(tmp_path, 1)
    half = job.find(0, "1/chunks") / "1-5.safetensors.tmp"
    if cut:
        half.write_bytes(b"half")
    before = sorted(job.path(0).rglob("*"))
    files = FaultyFiles(FILES, 1, errno.ENOSPC, kinds=("pwrite",), path="/2/journal")
    location = Location([str(tmp_path)], files)
    plans, allowed = plan(location, Keep(newest=1)), "nothing may be deleted by hand"
    if cut:
        allowed = "only this may be deleted by hand: 1/chunks/1-5.safetensors.tmp"
    with pytest.raises(SaveFailed, match=rf"ENOSPC.*free 64 KiB.*{allowed}"):
        carry_out(location, plans, Keep(newest=1), None)
    assert sorted(job.path(0).rglob("*")) == before
    released(tmp_path, Keep(newest=1))
    assert held(tmp_path) == [[Epoch(1, 4)]]


def test_one_step_can_be_released(tmp_path: Path) -> None:
    """Of all that may go only that one does; above and at the line nothing may."""
    trained(tmp_path)
    released(tmp_path, Keep(newest=1), 2)
    assert held(tmp_path) == [[Epoch(1, 3), Epoch(1, 4)]] * 3
    assert released(tmp_path, Keep(newest=1), 4) == []


def test_every_nth_can_be_kept(tmp_path: Path) -> None:
    """The archive that the training kept by Keep(every=)."""
    trained(tmp_path)
    released(tmp_path, Keep(newest=1, every=2))
    assert held(tmp_path) == [[Epoch(1, 2), Epoch(1, 4)]] * 3


def test_orphans_go_when_the_new_timeline_has_converged_above_them(tmp_path: Path) -> None:
    """Not before: until then the line is the base, and the orphans lie above it."""
    job = trained(tmp_path)
    job.start(want=2)
    job.stop()
    (domain, *_) = plan(located(tmp_path))
    assert {stay.epoch: stay.why for stay in domain.stays} == {
        Epoch(1, 2): "it is the converged line",
        Epoch(1, 3): "it is above the converged line",
        Epoch(1, 4): "it is above the converged line",
    }


@pytest.mark.parametrize("lost", ["freeze", "behind"])
def test_nothing_goes_between_a_freeze_and_its_certificate(tmp_path: Path, lost: str) -> None:
    """A launch that was cut short may have told others of what it retains."""
    job = trained(tmp_path)
    job.start(only=[0, 1])
    job.stop()
    plans = plan(located(tmp_path), Keep(newest=1))
    place = 0 if lost == "freeze" else 2
    why = "no restore certificate yet" if lost == "freeze" else "in generation 2: start the job"
    assert plans[place].gone == ()
    assert why in plans[place].blocked
    assert released(tmp_path, Keep(newest=1)) == []


def test_an_epoch_that_some_rank_has_not_attested_is_no_reason_to_release(tmp_path: Path) -> None:
    """Independent keep-last-k leaves no epoch in common (the protocol never counts alone)."""
    job = trained(tmp_path, keep=Keep(newest=9))
    job.start()
    job.save(5, only=[0, 1])
    job.stop()
    released(tmp_path, Keep(newest=1))
    assert held(tmp_path) == [[Epoch(1, 4), Epoch(2, 5)]] * 2 + [[Epoch(1, 4)]]
    assert handfast.open(tmp_path).latest() == Epoch(1, 4)


def test_a_damaged_line_keeps_all_that_is_below_it(tmp_path: Path) -> None:
    """What a restore would fall back to is not taken away by a command that frees space."""
    job = trained(tmp_path)
    flip(job.find(2, "*/chunks/1-4.*"), 4100)
    with pytest.raises(Refused, match="the epoch that would be kept is damaged") as refused:
        released(tmp_path, Keep(newest=1))
    assert "rank-00002" in refused.value.shards[0]
    assert held(tmp_path) == [[Epoch(1, 2), Epoch(1, 3), Epoch(1, 4)]] * 3
    assert job.start() == Epoch(1, 3)
    job.stop()


def test_a_pinned_epoch_stays_until_its_reader_is_done(tmp_path: Path) -> None:
    """An evaluation that takes a week is not told a date."""
    trained(tmp_path, 2)
    with pin(FILES, str(tmp_path), "rank-00001", Epoch(1, 2), "evaluation"):
        one, two = plan(located(tmp_path), Keep(newest=1))
        assert one.gone == (Epoch(1, 2), Epoch(1, 3))
        assert two.gone == (Epoch(1, 3),)
        assert two.stays[0].why == "a reader has pinned it"
        released(tmp_path, Keep(newest=1))
        assert held(tmp_path) == [[Epoch(1, 4)], [Epoch(1, 2), Epoch(1, 4)]]


def test_what_was_never_attested_is_a_left_over(tmp_path: Path) -> None:
    """A manifest whose vote never came only takes space."""
    job = trained(tmp_path, 1)
    job.start()
    job.ranks[0].write(Epoch(2, 5))
    job.stop()
    assert next(row.verdict for row in handfast.open(tmp_path).epochs()) == "ahead"
    (done,) = released(tmp_path)
    assert (done.gone, done.leftovers) == ((), (Epoch(2, 5),))
    assert done.nbytes > 0
    assert next(row.epoch for row in handfast.open(tmp_path).epochs()) == Epoch(1, 4)


def test_what_was_cut_short_is_swept_where_nobody_trains(tmp_path: Path) -> None:
    """Half a save, data without a manifest, half a release; a save that was never cut stays."""
    job = trained(tmp_path, 2)
    chunks = job.find(0, "1/chunks")
    cut = [chunks / "1-5.safetensors.tmp", chunks / "1-5.r1.safetensors"]
    cut.append(job.find(0, "1/manifests") / "1-1.manifest.released")
    for file in cut:
        file.write_bytes(b"half")
    one, two = plan(located(tmp_path))
    assert sorted(one.litter) == sorted(str(file.relative_to(job.path(0))) for file in cut)
    assert (one.gone, one.leftovers, two.anything) == ((), (), False)
    (only,) = plan(located(tmp_path), Keep(newest=1), 2)[:1]
    assert only.litter == ()  # of all that may go, only that step
    (done,) = released(tmp_path)
    assert done.litter == one.litter
    assert not any(file.exists() for file in cut)
    assert handfast.open(tmp_path).verify(everything=True).sound
    assert released(tmp_path) == []
    assert held(tmp_path) == [[Epoch(1, 2), Epoch(1, 3), Epoch(1, 4)]] * 2


def test_a_pinned_manifest_that_a_release_had_taken_is_no_litter(tmp_path: Path) -> None:
    """Whoever sweeps gives it back to its reader."""
    job = trained(tmp_path, 1)
    with pin(FILES, str(tmp_path), "rank-00000", Epoch(1, 2), "evaluation"):
        file = job.find(0, "1/manifests/1-2.manifest")
        file.rename(f"{file}.released")
        assert plan(located(tmp_path))[0].litter == ()


def test_the_first_state_is_no_epoch_to_be_listed(tmp_path: Path) -> None:
    """It has no files; a journal that was cut before it was let go makes no difference."""
    job = Job(tmp_path, 1)
    job.start()
    job.save(1)
    job.stop()
    journal = job.find(0, "*/journal")
    journal.write_bytes(journal.read_bytes()[:-1])
    assert GENESIS in located(tmp_path).survey().places[0].retained
    (domain,) = plan(located(tmp_path), Keep(newest=1))
    assert (domain.gone, [stay.epoch for stay in domain.stays]) == ((), [Epoch(1, 1)])


@pytest.mark.parametrize("what", ["*/manifests/1-4.*", "*/journal", "domain.json"])
def test_nothing_goes_where_another_rank_has_lost_what_it_attested(
    tmp_path: Path, what: str
) -> None:
    """Each rank's own rule would let go the only epoch that all still have in common."""
    job = trained(tmp_path, 2)
    flip(job.find(1, what), 200 if what == "*/journal" else 60)
    for domain in plan(located(tmp_path), Keep(newest=1)):
        assert domain.gone == ()
        assert domain.blocked
    assert released(tmp_path, Keep(newest=1)) == []
    assert len(list(job.path(0).rglob("*.safetensors"))) == 3


def test_a_domain_that_breaks_after_the_plan_stops_the_release(tmp_path: Path) -> None:
    """What was planned is looked at again before it is done."""
    job = trained(tmp_path, 2)
    location = located(tmp_path)
    plans = plan(location, Keep(newest=1))
    flip(job.find(1, "*/journal"), 200)
    with pytest.raises(Refused, match="nothing is released"):
        carry_out(location, plans, Keep(newest=1), None)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 6


def test_a_plan_that_a_rollback_has_overtaken_releases_nothing(tmp_path: Path) -> None:
    """What the journals say at the claim counts: between plan and yes, the user went back to a step
    that was to go."""
    job = trained(tmp_path, 2)
    location, keep = located(tmp_path), Keep(newest=1)
    plans = plan(location, keep)
    assert [domain.gone for domain in plans] == [(Epoch(1, 2), Epoch(1, 3))] * 2
    assert job.start(want=2) == Epoch(1, 2)
    job.stop()
    done = carry_out(location, plans, keep, None)
    assert [(domain.gone, domain.leftovers) for domain in done] == [((), ())] * 2
    assert held(tmp_path) == [[Epoch(1, 2), Epoch(1, 3), Epoch(1, 4)]] * 2
    assert job.start() == Epoch(1, 2)
    job.stop()


def test_whoever_owned_the_domain_before_is_superseded(tmp_path: Path) -> None:
    """An agent that nobody knew of finds itself overtaken; what it writes then never counts."""
    job = Job(tmp_path, 1)
    job.start()
    job.save(1, 2, 3)
    released(tmp_path, Keep(newest=1))
    skip = Skipped(0, Epoch(1, 4), "late")
    with pytest.raises(Superseded):
        job.ranks[0].keeper.commit([skip])
    job.stop()
    (found,) = located(tmp_path).survey().found
    assert skip not in found.records
    assert found.records[-1] == Released((Epoch(1, 1), Epoch(1, 2)))
    assert held(tmp_path) == [[Epoch(1, 3)]]


# --- pins ---------------------------------------------------------------------------------------


def pins_of(root: str, *holders: object) -> list[Pin]:
    """Pins of one epoch, made by a run's readers, with these in their files."""
    made = [pin(FILES, root, "rank-00000", Epoch(1, 2), "eval") for _ in holders]
    for one, holder in zip(made, holders, strict=True):
        Path(one.path).write_bytes(msgspec.json.encode(holder))
    found = {held.path: held for held in pins(FILES, root, "rank-00000")}
    return [found[one.path] for one in made]


def test_a_reader_has_ended_where_that_is_proved_and_nowhere_else(tmp_path: Path) -> None:
    """The same host name proves nothing: a number means something within a boot and a namespace."""
    trained(tmp_path, 1)
    ended = subprocess.Popen(["true"])
    ended.wait()
    here = Holder.here("eval")
    gone = msgspec.structs.replace(here, pid=ended.pid)
    holders = {
        here: False,
        gone: True,
        msgspec.structs.replace(here, started="7"): True,  # the number is another process's by now
        msgspec.structs.replace(here, started=""): False,
        msgspec.structs.replace(gone, host="another name of this one"): True,
        msgspec.structs.replace(gone, boot="before"): None,
        msgspec.structs.replace(gone, namespaces="pid:[7] time:[7]"): None,
        msgspec.structs.replace(gone, boot="", namespaces="", started=""): None,
    }
    found = pins_of(str(tmp_path), *holders)
    assert [one.holder for one in found] == list(holders)
    assert [one.ended() for one in found] == list(holders.values())
    assert free_pins(found[1:2]) == 1
    left = len(holders) - 1
    assert len(handfast.open(tmp_path).status().domains[0].pins) == left


def test_pins_of_older_releases_and_broken_ones_hold(tmp_path: Path) -> None:
    """What they say is shown as far as it can be read, and proves nothing."""
    trained(tmp_path, 1)
    old = {"pid": 2**22 + 1, "host": socket.gethostname(), "purpose": "eval"}
    beyond = [{**old, "pid": pid} for pid in (2**31, 10**30, 0, -1)]
    one, *others = pins_of(str(tmp_path), old, *beyond, None)
    assert one.holder == Holder(2**22 + 1, socket.gethostname(), "eval")
    assert [other.holder for other in others] == [None] * 5
    assert [pin.ended() for pin in (one, *others)] == [None] * 6


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare"), reason="it takes root to make a namespace"
)
def test_a_reader_in_another_container_is_not_called_dead(tmp_path: Path) -> None:
    """Of the same host name, where its number is nobody's: its pin stays, and it is said why."""
    trained(tmp_path, 1)
    held = pin(FILES, str(tmp_path), "rank-00000", Epoch(1, 2), "eval")
    command = [sys.executable, "-m", "handfast", "release", str(tmp_path), "--unpin", "dead"]
    inside = ["unshare", "--pid", "--fork", "--mount-proc", *command, "--yes"]
    seen = subprocess.run(inside, check=False, capture_output=True, text=True)
    if "unshare:" in seen.stderr:
        pytest.skip(seen.stderr)
    assert Path(held.path).exists()
    assert "can't be told from here" in seen.stdout
    assert "--unpin PIN" in seen.stdout
