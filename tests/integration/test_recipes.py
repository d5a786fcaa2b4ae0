"""Shows that the guide's recipes run as they stand there, and do what it says of them."""

from __future__ import annotations

import logging
import re
import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import save
from torch.optim import AdamW, Optimizer
from trainers import end_agents

import handfast
from handfast.torch import Checkpointer
from handfast.torch.adopt import adopt

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
BLOCKS = re.compile(r"<!-- recipe: (\w+) -->\n```python\n(.*?)```\n", re.DOTALL)
RECIPES: dict[str, str] = dict(BLOCKS.findall(GUIDE.read_text(encoding="utf-8")))


class Net(nn.Module):
    """A body and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (batch, 8) to (batch, what the head gives)."""
        found: torch.Tensor = self.head(torch.tanh(self.body(x)))
        return found


def train_step(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """One update, by data that the step decides."""
    data = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    model(data).square().mean().backward()
    optimizer.step()


def run(name: str, steps: int) -> dict[str, Any]:
    """Run a recipe beside what is the user's own alone; gives what it has left there."""
    scope: dict[str, Any] = {"build": Net, "steps": steps, "train_step": train_step}
    script = Path(f"{name}.py")
    script.write_text(RECIPES[name], encoding="utf-8")
    return runpy.run_path(str(script), init_globals=scope)


def weights(scope: dict[str, Any]) -> list[torch.Tensor]:
    """What a model holds."""
    return [parameter.detach().clone() for parameter in scope["model"].parameters()]


def in_a_file(state: dict[str, Any]) -> None:
    """All in one."""
    torch.save(state, "checkpoints/ckpt_step_3.pt")


def in_files(state: dict[str, Any]) -> None:
    """A directory of a file each."""
    Path("checkpoints/step_3").mkdir()
    for name in ("model", "optimizer"):
        torch.save(state[name], f"checkpoints/step_3/{name}.pt")


def distributed(state: dict[str, Any]) -> None:
    """By torch's distributed checkpoint, whose directory counts something else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process
        save(state, checkpoint_id="checkpoints/epoch_1", no_dist=True)


@pytest.fixture(params=[in_a_file, in_files, distributed])
def trained(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[list[torch.Tensor]]]:
    """A plain checkpoint of step 3, adopted, and what its training went on to, step by step."""
    monkeypatch.chdir(tmp_path)
    model = Net()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    held = []
    for step in range(8):
        if step:
            train_step(model, optimizer, step)
        if step == 3:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
            (tmp_path / "checkpoints").mkdir()
            request.param(state)
        held.append(weights({"model": model}))
    adopt("checkpoints", "runs/adopted")
    yield held
    end_agents()


def alike(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Whether all is so to the bit."""
    return all(map(torch.equal, found, expected))


def test_all_recipes_are_tried() -> None:
    """Shows that none of the guide's is left out here."""
    assert set(RECIPES) == {"tune", "continue", "sampler"}


def test_an_adopted_training_is_gone_on_with(
    trained: list[list[torch.Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    """Shows that it goes the other library's way to the bit, ended and started again, too."""
    caplog.set_level(logging.WARNING, "handfast")
    assert alike(weights(run("continue", 5)), trained[5])
    said = [record.getMessage() for record in caplog.records]
    assert ["moments of no known epoch" in line for line in said] == [True]
    caplog.clear()
    assert alike(weights(run("continue", 7)), trained[7])
    assert [record.getMessage() for record in caplog.records if "epoch" in record.msg] == []
    (shard,) = handfast.open("runs/gpt").inspect().shards
    assert [fork.lineage for fork in shard.stamp.forks] == ["adopted", "continued"]


def test_moments_of_nobody_end_it_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that of an optimizer of two groups, which may be in any order, nothing is guessed."""
    monkeypatch.chdir(tmp_path)
    model = Net()
    groups = [{"params": part.parameters()} for part in (model.head, model.body)]
    optimizer = AdamW(groups, lr=1e-3)
    train_step(model, optimizer, 1)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, "checkpoints/ckpt_step_1.pt")
    adopt("checkpoints", "runs/adopted")
    with pytest.raises(SystemExit, match=r"whose moments these are is not known: .*optimizer\[0\]"):
        run("continue", 2)
    assert list(handfast.open("runs/gpt").epochs()) == []
    end_agents()


def test_adopted_weights_are_fine_tuned(trained: list[list[torch.Tensor]]) -> None:
    """Shows that it begins at the weights of the checkpoint, and resumes where it was."""
    begun = weights(run("tune", 0))
    assert alike(begun[:2], trained[3][:2])
    assert begun[2].shape == (2, 16)
    straight = weights(run("tune", 2))
    assert not alike(straight[:2], begun[:2])
    resumed = run("tune", 2)
    assert alike(weights(resumed), straight)
    assert resumed["ckpt"].restored.step == 2
    (shard,) = handfast.open("runs/sft").inspect().shards
    assert [fork.lineage for fork in shard.stamp.forks] == ["adopted", "sft"]


def batches(path: str, sampler: Any, upto: int) -> list[list[float]]:
    """The guide's loop over a loader, resumed at a path and ended at a step: what it was given."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StatefulDataLoader([float(n) for n in range(12)], batch_size=2, sampler=sampler)
    seen = []
    with Checkpointer(path, {"loader": loader}, rng=False) as ckpt:
        ahead = len(loader)
        step = ckpt.restore()
        while step < upto:
            sampler.generator.manual_seed(5 + step // ahead)
            for batch in loader:
                seen.append(batch.tolist())
                step += 1
                ckpt.save(step).converged(60)
                if step == upto:
                    break
    return seen


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11
@pytest.mark.parametrize("at", [4, 6, 9])
def test_a_sampler_of_ones_own_goes_on_where_it_was(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the guide's gives the rest of its order, in a pass and between two, each of which
    has another; and that one which draws at once does not, as the guide says."""
    monkeypatch.chdir(tmp_path)
    lazy = run("sampler", 0)["Shuffled"]

    class Eager(lazy):  # it stands in the guide
        def __iter__(self) -> Iterator[int]:
            return iter(list(super().__iter__()))

    data = range(12)
    straight = batches("straight", lazy(data), 12)
    assert sorted(straight[:6]) != straight[:6] != straight[6:]
    for kind, exact in ((lazy, True), (Eager, at == 6)):
        path = f"{kind.__name__}-{at}"
        begun = batches(path, kind(data), at)
        assert begun == straight[:at]
        assert (batches(path, kind(data), 12) == straight[at:]) is exact
    end_agents()
