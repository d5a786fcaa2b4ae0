"""Shows what a job does that has no memory for a second state: ``images=0``."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_calls import PATIENT, memories
from torch import Tensor
from trainers import agents

from handfast.errors import SaveFailed
from handfast.torch import Checkpointer
from handfast.torch.checkpointer import WINDOW
from handfast.torch.pieces import Pieces

MEBI = 1 << 20
LARGE = WINDOW // 4 // 2  # of three such tensors two fill the window


def state(seed: int) -> dict[str, Tensor]:
    """Half again as large as the window, and some small ones."""
    torch.manual_seed(seed)
    made = {f"large{n}": torch.rand(LARGE + n) for n in range(3)}
    return made | {f"small{n}": torch.rand(n, 3) for n in range(40)}


def begun(run: str, held: dict[str, Tensor], **options: Any) -> Checkpointer:
    """A Checkpointer of these tensors that has restored."""
    ckpt = Checkpointer(run, held, images=0, rng=False, **PATIENT, **options)
    ckpt.restore()
    return ckpt


def restored(run: str) -> dict[str, Tensor]:
    """What a new process would have."""
    found = {name: torch.zeros_like(tensor) for name, tensor in state(0).items()}
    begun(run, found).close()
    return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def written(run: str) -> dict[str, int]:
    """Bytes of each data file, by its name."""
    return {path.name: path.stat().st_size for path in Path(run).glob("domains/*/*/chunks/*")}


def test_a_state_passes_through_a_window(run: str) -> None:
    """Shows that saves take 64 MiB of memory, whatever the state; that an epoch is persisted when
    its save returns, and what changes from then on is not in it; that chunks which stayed the same
    are not written again; and that a restore finds all of it."""
    live = state(1)
    others = memories()
    with begun(run, live) as ckpt:
        first = ckpt.save(1)
        assert first.phase in ("persisted", "converged")
        taken = sum(many for image, many in memories().items() if image not in others)
        assert taken == WINDOW
        saved = {name: tensor.clone() for name, tensor in live.items()}
        live["large0"] += 1
        ckpt.wait_until_finished(30.0)
        assert equal(restored_at(run), saved)
        ckpt.save(2).converged(30.0)
        assert "1-2.delta" in written(run)
        assert written(run)["1-2.delta"] < 1.1 * live["large0"].nbytes
    assert equal(restored(run), live)


def restored_at(run: str) -> dict[str, Tensor]:
    """What is read beside the training."""
    from handfast.torch import load

    return load(run, component="")


def test_an_agent_that_dies_meanwhile_is_given_all_of_it_again(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that a save which hands over piece by piece outlives its agent: the next one has the
    same state, whole, for it has not changed yet."""
    live = state(2)
    killed: list[int] = []
    put = Pieces.put

    def kill_once(self: Pieces, start: int, end: int, into: memoryview) -> None:
        put(self, start, end, into)
        if start > 20 * MEBI and not killed:
            killed.extend(agents())
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(Pieces, "put", kill_once)
    with begun(run, live) as ckpt:
        ckpt.save(1).converged(30.0)
        assert killed
        assert killed[0] not in agents()
    assert equal(restored(run), live)


def test_an_interrupted_save_is_given_up_and_the_next_one_goes_on(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that what was handed over in part is never made whole out of another state: the epoch
    fails, nobody waits for it, and later ones are saved."""
    live = state(3)
    put = Pieces.put
    left = [3]

    def interrupted(self: Pieces, start: int, end: int, into: memoryview) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        put(self, start, end, into)

    with begun(run, live, on_error="warn") as ckpt:
        monkeypatch.setattr(Pieces, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ckpt.save(1)
        for tensor in live.values():
            tensor.add_(1)
        second = ckpt.save(2)
        second.converged(30.0)
        assert ckpt.all_steps() == [2]
    assert equal(restored(run), live)


def test_a_restore_after_an_interrupted_save_waits_for_nothing(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the agent does not drain what nobody hands over any more: it took as long as
    `drain_s`, and where that was longer than `patience_s`, no restore succeeded again."""
    live = state(5)

    def interrupted(self: Pieces, start: int, end: int, into: memoryview) -> None:
        raise KeyboardInterrupt

    with Checkpointer(run, live, images=0, rng=False, patience_s=8.0, drain_s=60.0) as ckpt:
        ckpt.restore()
        ckpt.save(1).converged(30.0)
        with monkeypatch.context() as patch:
            patch.setattr(Pieces, "put", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ckpt.save(2)
        assert ckpt.restore() == 1
        ckpt.save(3).converged(30.0)


def test_a_slow_disk_is_no_silent_agent(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that a save waits for the disk as long as that takes, while its agent is heard of."""
    monkeypatch.setenv("HANDFAST_WRITE_MBPS", "2")
    live = {"w": torch.rand(2 << 20)}
    with Checkpointer(run, live, images=0, rng=False, patience_s=1.5) as ckpt:
        ckpt.restore()
        ckpt.save(1).converged(30.0)
    found = {"w": torch.zeros(2 << 20)}
    begun(run, found).close()
    assert equal(found, live)


def test_an_interrupted_save_whose_agent_dies_is_given_up_too(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that no successor is offered what the trainer has not any more."""
    live = state(4)

    def interrupted(self: Pieces, start: int, end: int, into: memoryview) -> None:
        raise KeyboardInterrupt

    with begun(run, live, on_error="warn") as ckpt:
        with monkeypatch.context() as patch:
            patch.setattr(Pieces, "put", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ckpt.save(1)
        for tensor in live.values():
            tensor.add_(1)
        (agent,) = agents()
        os.kill(agent, signal.SIGKILL)
        ckpt.save(2).converged(30.0)
        assert ckpt.all_steps() == [2]
    assert equal(restored(run), live)


def test_a_write_that_fails_ends_the_save(run: str) -> None:
    """Shows that a writer which gives up keeps no trainer waiting, and that the cause is told."""
    live = state(5)
    with begun(run, live) as ckpt:
        home = next(Path(run).glob("domains/*/*/chunks"))
        home.rename(f"{home}.away")
        taken = ckpt.save(1)
        with pytest.raises(SaveFailed, match="write the image"):
            taken.persisted(30.0)
        Path(f"{home}.away").rename(home)
        ckpt.save(2).converged(30.0)
    assert equal(restored(run), live)
