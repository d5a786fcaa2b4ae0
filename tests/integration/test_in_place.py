"""Shows what a restore does that reads straight into the live state, before all is decided."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_calls import PATIENT, trained
from trainers import agents
from training import Training

from handfast import Keep
from handfast.errors import Poisoned, Refused
from handfast.torch import Checkpointer
from handfast.torch.values import Stored

MEBI = 1 << 20


def opened(run: str, training: Training, **options: Any) -> Checkpointer:
    return Checkpointer(run, training.state(), keep=Keep(newest=9), **PATIENT, **options)


def flip(run: str, step: int) -> None:
    """Damage an epoch's data."""
    (path,) = Path(run).glob(f"domains/*/*/chunks/1-{step}.safetensors")
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


def test_a_first_start_is_one(run: str) -> None:
    """Shows that there is nothing to read, and nothing is poisoned."""
    with opened(run, Training()) as ckpt:
        assert ckpt.restore(in_place=True) == 0
        assert ckpt.save(1)


def test_an_agent_that_dies_before_it_wrote_the_verdict_hears_it_again(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that a verdict is not lost with the agent that was told it."""
    saved = trained(run, 1).digest()
    preload = Stored.preload
    killed: list[int] = []

    def kill(self: Stored, *args: Any) -> None:
        preload(self, *args)
        if not killed:
            killed.extend(agents())
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(Stored, "preload", kill)
    after = Training()
    with opened(run, after) as ckpt:
        assert ckpt.restore(in_place=True) == 1
        assert killed
        assert after.digest() == saved
