"""Shows what a restore does that reads straight into the live state, before all is decided."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deeds
import pytest
import torch
from test_calls import PATIENT, trained
from trainers import Job, agents, end_agents
from training import Training

from handfast import Keep
from handfast.checkpoint.session import Session
from handfast.core.messages import Staged, decode_record
from handfast.errors import FormatError, Poisoned, Refused
from handfast.store.files import Posix
from handfast.store.journal import FRAME, HEADER, scan
from handfast.torch import Checkpointer
from handfast.torch.values import Stored

MEBI = 1 << 20


def opened(run: str, training: Training, **options: Any) -> Checkpointer:
    return Checkpointer(run, training.state(), keep=Keep(newest=9), **PATIENT, **options)


def flip(run: str, step: int, domain: str = "*") -> None:
    """Damage an epoch's data."""
    (path,) = Path(run).glob(f"domains/{domain}/*/chunks/1-{step}.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_restore_in_place_is_a_restore(run: str) -> None:
    """Shows that a fresh job which restores so goes on, step by step, as the one that was saved:
    weights, moments that did not exist before, schedules and random streams."""
    expected = trained(f"{run}-whole", 4).digest()
    saved = trained(run, 3).digest()
    after = Training()
    ckpt = opened(run, after)
    assert ckpt.restore(in_place=True) == 3
    assert after.digest() == saved
    after.step()
    assert after.digest() == expected
    assert ckpt.save(4)
    ckpt.close(30.0)


def test_all_bytes_are_read_once(run: str) -> None:
    """Shows that the agent leaves the reading to the trainer, which loads what it has judged."""
    state = {"w": torch.rand(5 * MEBI)}
    with Checkpointer(run, state, rng=False, **PATIENT) as ckpt:
        ckpt.restore()
        ckpt.save(1)
    live = {"w": torch.zeros(5 * MEBI)}
    again = Checkpointer(run, live, rng=False, **PATIENT)
    assert again.restore(in_place=True) == 1
    assert torch.equal(live["w"], state["w"])
    (agent,) = agents()
    (read,) = [
        int(line.split()[1])
        for line in Path(f"/proc/{agent}/io").read_text().splitlines()
        if line.startswith("rchar")
    ]
    assert read < 20 * MEBI  # its own modules, and no image
    again.close(30.0)


def test_damage_is_found_in_place_and_an_older_epoch_is_read_over_it(run: str) -> None:
    """Shows that the job takes the epoch before, as it does where the agent judges."""
    expected = trained(f"{run}-whole", 2).digest()
    trained(run, 2, 3)
    flip(run, 3)
    after = Training()
    with opened(run, after) as ckpt:
        assert ckpt.restore(in_place=True) == 2
        assert after.digest() == expected
        assert ckpt.save(3)


def test_where_nothing_can_be_restored_the_live_state_is_poisoned(run: str) -> None:
    """Shows that a state into which damaged bytes were read is never saved."""
    trained(run, 1)
    flip(run, 1)
    ckpt = opened(run, Training())
    with pytest.raises(Refused, match="differs from its hash"):
        ckpt.restore(in_place=True)
    with pytest.raises(Poisoned):
        ckpt.save(2)
    ckpt.close(30.0)


def test_a_part_mends_no_state_that_was_read_over(run: str) -> None:
    """Shows that what the rest holds by then, of an epoch that was BAD, is never saved: neither a
    restore of a part nor one that leaves alone what the older epoch lacks makes it good."""
    state = {"w": torch.ones(MEBI)}
    with Checkpointer(run, state, rng=False, keep=Keep(newest=9), **PATIENT) as ckpt:
        ckpt.restore()
        ckpt.save(1).converged(30.0)
        state |= {"ema": torch.ones(MEBI)}
        for tensor in state.values():
            tensor.fill_(2.0)
        ckpt.save(2).converged(30.0)
    flip(run, 2)
    live = {name: torch.zeros(MEBI) for name in state}
    again = Checkpointer(run, live, rng=False, keep=Keep(newest=9), **PATIENT)
    with pytest.raises(Poisoned, match=r"only a restore without only= and strict=False mends it"):
        again.restore(in_place=True, strict=False)
    assert live["ema"].any()
    with pytest.raises(Poisoned, match=r"only a restore without only="):
        again.restore(step=1, only=("w",))
    with pytest.raises(Poisoned, match="nothing can be saved until a restore succeeds"):
        again.save(3)
    del live["ema"]
    assert again.restore() == 1
    assert live["w"].eq(1.0).all()
    assert again.save(3)
    again.close(30.0)


def test_another_structure_is_refused_before_anything_is_read(run: str) -> None:
    """Shows that what could not be loaded leaves the live state as it was, and says why."""
    trained(run, 1)
    model = torch.nn.Linear(3, 3)
    before = model.weight.clone()
    ckpt = Checkpointer(run, {"model": model}, **PATIENT)
    with pytest.raises(Refused, match="another structure"):
        ckpt.restore(in_place=True)
    assert torch.equal(model.weight, before)
    ckpt.close(30.0)
    with pytest.raises(ValueError, match="not with dry_run"):
        opened(run, Training()).restore(in_place=True, dry_run=True)


class Odd:
    """Nothing that is stored but by pickle."""

    def __init__(self, value: int) -> None:
        self.value = value


def test_what_this_rank_can_not_load_is_no_damage(run: str) -> None:
    """Shows that an epoch whose objects can't be read here, for want of `pickle=`, is refused for
    that reason, and not called BAD: an older one would be taken in its place."""
    box = {"odd": Odd(0)}
    with Checkpointer(run, {"box": box}, pickle=("box/odd",), **PATIENT) as ckpt:
        ckpt.restore()
        for step in (1, 2):
            box["odd"] = Odd(step)
            ckpt.save(step).converged(30.0)
    ckpt = Checkpointer(run, {"box": {"odd": 0}}, **PATIENT)
    with pytest.raises(FormatError, match="pickle"):
        ckpt.restore(in_place=True)
    ckpt.close(30.0)


def test_a_part_is_judged_with_the_whole(run: str) -> None:
    """Shows that an epoch whose damage lies where nobody reads to is called BAD all the same: what
    one rank has no use for another may need."""
    state = {"a": torch.rand(MEBI), "b": torch.rand(MEBI)}
    with Checkpointer(run, state, rng=False, **PATIENT) as ckpt:
        ckpt.restore()
        ckpt.save(1).converged(30.0)
    flip(run, 1)
    live = {name: torch.zeros(MEBI) for name in state}
    again = Checkpointer(run, live, rng=False, **PATIENT)
    with pytest.raises((Refused, Poisoned), match="1/1"):
        again.restore(in_place=True, only=("a",))
    again.close(30.0)


def test_what_fails_for_want_of_memory_is_left_to_the_agent(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that an error of any kind, amid the reading, is this rank's alone: nobody waits for its
    verdict, which its agent gives."""
    saved = trained(run, 2).digest()

    def fails(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    after = Training()
    ckpt = opened(run, after)
    with monkeypatch.context() as patch:
        patch.setattr(Stored, "preload", fails)
        assert ckpt.restore(in_place=True) == 2
    assert after.digest() == saved
    assert ckpt.save(3)
    ckpt.close(30.0)


def test_a_state_that_was_read_over_is_no_first_start(
    launch: Callable[..., Job], tmp_path: Path
) -> None:
    """Shows that where only the beginning is left, since an epoch of which nobody knew that it had
    converged is damaged, a live state into which bytes were read by then does not pass for the one
    that it was built as: neither on the rank whose copy is damaged nor on the other one."""
    run = tmp_path / "run"
    job = launch(2)
    job.all(deeds.resume, str(run))
    job.all(deeds.train, 1)
    job.all(deeds.converged)
    job.kill()
    end_agents()
    for journal in run.glob("domains/*/1/journal"):
        os.truncate(journal, behind_the_vote(journal))  # as if the power had failed there
    flip(str(run), 1, "rank-00000")
    job = launch(2)
    job.all(deeds.begin, str(run))
    for error in job.each_raises(deeds.restore, in_place=True):
        assert isinstance(error, Poisoned | Refused)
        assert "this would be a first start" in str(error)
    for error in job.each_raises(deeds.save, 1):
        assert isinstance(error, Poisoned)


@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp"])
def test_every_rank_reads_its_own_and_what_it_left_to_another(
    kind: str, launch: Callable[..., Job], tmp_path: Path
) -> None:
    """Shows it of ranks that share nothing, that store what they have alike once a node, and of
    those that hold shards."""
    run = str(tmp_path / "run")
    job = launch(2)
    job.all(deeds.resume, run, kind)
    saved = [digests[-1] for digests in job.all(deeds.train, 3)]
    job.all(deeds.converged)
    job.kill()
    job = launch(2)
    job.all(deeds.begin, run, kind)
    assert job.all(deeds.restore, in_place=True) == [3, 3]
    assert job.all(deeds.digest) == saved
    job.all(deeds.train, 4)
    job.all(deeds.converged)


def behind_the_vote(journal: Path) -> int:
    """Where the first vote STAGED ends in a journal."""
    end = HEADER
    for number, data in enumerate(scan(Posix(), str(journal)).records):
        end += FRAME + len(data)
        if number and isinstance(decode_record(data), Staged):
            return end
    raise AssertionError(f"no vote in {journal}")


def test_a_first_start_is_one(run: str) -> None:
    """Shows that there is nothing to read, and nothing is poisoned."""
    with opened(run, Training()) as ckpt:
        assert ckpt.restore(in_place=True) == 0
        assert ckpt.save(1)


@pytest.mark.parametrize("when", ["before it is told", "when it was told"])
def test_an_agent_that_dies_over_the_verdict_hears_it_again(
    when: str, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that a verdict is not lost with the agent that was to write it down."""
    saved = trained(run, 1).digest()
    killed: list[int] = []
    home, name = (Stored, "preload") if when.startswith("before") else (Session, "judge")
    deed = getattr(home, name)

    def kill(*args: Any) -> None:
        deed(*args)
        if not killed:
            killed.extend(agents())
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(home, name, kill)
    after = Training()
    with opened(run, after) as ckpt:
        assert ckpt.restore(in_place=True) == 1
        assert killed
        assert after.digest() == saved
