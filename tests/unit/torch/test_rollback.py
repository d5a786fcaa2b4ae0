"""Shows that a restore into a live state leaves nothing behind of the moment that it was in.

A fresh process has no gradients, no half-taken step and no counters of an abandoned timeline; a
rollback in the same process must not have them either, and no `state_dict()` shows any of these.
"""

import logging
from typing import Any

import pytest
import torch
from statekit import Snapshot, train
from torch import Tensor, nn

from handfast.errors import Unstorable
from handfast.torch.apply import apply
from handfast.torch.capture import capture
from handfast.torch.compare import refuse
from handfast.torch.gradients import Watch, unclean_gradients, unowned
from handfast.torch.optimizers import given_to
from handfast.torch.state import TorchState

HALF = ["unscaled", "stepped"]


class Scaled:
    """A training with a scaler, one stage at a time."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 2)
        self.opt = torch.optim.SGD(self.model.parameters(), 0.01)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.state = {"model": self.model, "opt": self.opt, "scaler": self.scaler}
        self.batch = torch.Generator().manual_seed(1)

    def backward(self) -> float:
        self.opt.zero_grad()
        loss = self.model(torch.randn(6, 4, generator=self.batch)).square().mean()
        self.scaler.scale(loss).backward()
        return loss.item()

    def half(self, stage: str) -> None:
        self.backward()
        self.scaler.unscale_(self.opt)
        if stage == "stepped":
            self.scaler.step(self.opt)

    def step(self) -> float:
        loss = self.backward()
        self.scaler.unscale_(self.opt)  # raises where it was unscaled before
        self.scaler.step(self.opt)
        self.scaler.update()
        return loss


@pytest.mark.parametrize("only", [("**",), ("model", "opt")], ids=["all", "without the scaler"])
@pytest.mark.parametrize("stage", HALF)
def test_a_scaler_in_the_middle_of_a_step_begins_anew(stage: str, only: tuple[str, ...]) -> None:
    """A norm that looks bad, and a rollback: the next step took scaled gradients, or raised."""
    run = Scaled()
    run.step()
    saved, batch = Snapshot(run.state), run.batch.get_state()
    expected = [run.step() for _ in range(3)]
    run.half(stage)
    apply(run.state, saved.saved, saved.views, only=only)
    run.batch.set_state(batch)
    assert [run.step() for _ in range(3)] == expected


@pytest.mark.parametrize("stage", HALF)
def test_a_save_in_the_middle_of_a_scalers_step_is_refused(stage: str) -> None:
    """What it knows by then stands in no state: a resume would unscale twice, or miss an update."""
    run = Scaled()
    end = Watch(run.state).end
    run.step()
    assert unclean_gradients(run.state) == ()
    run.half(stage)
    due = {"unscaled": "scaler (its step() is still to come)"}.get(stage)
    assert (due or "scaler (its update() is still to come)") in unclean_gradients(
        run.state, stored=True
    )
    if stage == "unscaled":
        run.scaler.step(run.opt)
    run.scaler.update()
    assert unclean_gradients(run.state) == ()
    end()


class Accumulating(torch.optim.SGD):
    """As accelerate's: nothing is zeroed in the middle of an accumulation. An object: its own
    `state_dict`."""

    middle = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not self.middle:
            super().zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict()


def test_gradients_go_even_where_an_optimizer_keeps_them() -> None:
    model = nn.Linear(4, 2)
    opt = Accumulating(model.parameters(), 0.1)
    state = {"model": model, "opt": opt}
    saved = Snapshot(state)
    model(torch.randn(3, 4)).sum().backward()
    opt.middle = True
    saved.restore(state)
    assert [p.grad for p in model.parameters()] == [None, None]


def headed() -> tuple[nn.Sequential, dict[str, Any]]:
    """A base that was forgotten, not frozen, and a head that is trained."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    return model, {"model": model, "opt": torch.optim.SGD(model[1].parameters(), 0.1)}


def test_gradients_that_nobody_consumes_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """A loop that clips by the norm of all of them goes on otherwise after a resume."""
    model, live = headed()
    state = TorchState(live, rng=False, replicated=(), pickle=(), verify="none")
    with caplog.at_level(logging.WARNING, "handfast"):
        state.pending(False)
        assert caplog.messages == []
        model(torch.randn(3, 4)).sum().backward()
        assert unowned(live) == ("model/0.weight", "model/0.bias")
        state.pending(True)  # then they are saved
        assert caplog.messages == []
        for _ in range(2):
            state.pending(False)
    (said,) = caplog.messages
    assert "model/0.weight" in said
    assert "requires_grad_(False)" in said
    model.zero_grad(set_to_none=False)
    assert unowned(live) == ()


def test_gradients_that_nobody_consumes_go_at_a_restore() -> None:
    """As a fresh process has none; those of what is not restored stay."""
    model, live = headed()
    saved = Snapshot(live)
    model(torch.randn(3, 4)).sum().backward()
    apply(live, saved.saved, saved.views, only=("model/0.weight",))
    assert model[0].weight.grad is None
    assert model[0].bias.grad is not None
    assert model[1].weight.grad is not None
    saved.restore(live)
    assert all(parameter.grad is None for parameter in model.parameters())


class Counting(torch.optim.Optimizer):
    """Makes a counter in each group with its first step, as apex's optimizers do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"] / group["step"])


def test_a_counter_that_came_since_goes(caplog: pytest.LogCaptureFixture) -> None:
    """It is of the abandoned timeline. What the group was made with stays."""
    model = nn.Linear(4, 2)
    opt = Counting([{"params": model.parameters(), "label": "all"}])
    state: dict[str, Any] = {"model": model, "opt": opt}
    saved = Snapshot(state)
    del saved.saved.objects["opt"]["param_groups"][0]["label"]  # of code before it had one
    given = {opt: given_to(opt)}
    train(model, opt, steps=3)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1)
    with caplog.at_level(logging.WARNING, "handfast"):
        apply(state, saved.saved, saved.views, keep_live=("step",), given=given)
        assert opt.param_groups[0]["step"] == 3
        apply(state, saved.saved, saved.views)
        assert opt.param_groups[0]["step"] == 3
        assert "live was 3: left as it is" in caplog.messages[-1]
        apply(state, saved.saved, saved.views, given=given)
    assert "opt/param_groups[0]/step: nothing was saved, live was 3: dropped" in caplog.messages[-1]
    assert "step" not in opt.param_groups[0]
    assert opt.param_groups[0]["label"] == "all"
    assert opt.param_groups[0]["initial_lr"] == schedule.base_lrs[0]


def test_the_names_of_parameters_stay_with_them() -> None:
    """Into another order: the values go by name, and so do the labels."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    opt = torch.optim.AdamW(model.named_parameters())
    train(model, opt)
    saved = Snapshot({"model": model, "opt": opt})
    other = nn.Linear(4, 2)
    live = torch.optim.AdamW(list(other.named_parameters())[::-1])
    saved.restore({"model": other, "opt": live})
    assert live.param_groups[0]["param_names"] == ["bias", "weight"]
    assert torch.equal(live.state[other.bias]["exp_avg"], opt.state[model.bias]["exp_avg"])


def test_a_history_in_one_vector_is_not_given_to_another_order() -> None:
    """LBFGS has one state for all, in their order; by name it would begin anew in silence."""
    model, other = nn.Linear(4, 2), nn.Linear(4, 2)
    opt = torch.optim.LBFGS(model.parameters())
    live = torch.optim.LBFGS(list(other.parameters())[::-1])
    saved = Snapshot({"model": model, "opt": opt})
    (found,) = saved.differences({"model": other, "opt": live})
    assert str(found) == "opt/param_groups[0]: order: saved weight, live bias"
    same = torch.optim.LBFGS(other.parameters())
    assert saved.differences({"model": other, "opt": same}) == []


def test_casts_of_the_old_weights_are_not_used_again() -> None:
    """A rollback inside of an autocast region that has used them."""
    model = nn.Linear(4, 2)
    saved = Snapshot({"model": model})
    batch = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        first = model(batch)
    with torch.no_grad():
        model.weight.add_(1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(model(batch), first)
        saved.restore({"model": model})
        assert torch.equal(model(batch), first)


# --- boxes that grow as the training goes


def boxed() -> dict[str, Any]:
    return {"box": {"best": None, "losses": [torch.zeros(1)], "note": 0.5, "pair": (None, 1)}}


def test_a_box_that_has_grown_since_is_as_it_was() -> None:
    """No best one yet, fewer losses, a number where a tensor came: none was to be had before."""
    live = boxed()
    box = live["box"]
    saved = Snapshot(live)
    box["best"], box["note"] = torch.ones(2), torch.ones(3)
    box["losses"] += [torch.ones(1), [torch.ones(1)]]
    box["pair"] = (torch.ones(1), 2)
    held = box["losses"]
    saved.restore(live)
    assert live["box"] is box
    assert (box["best"], box["note"], box["pair"]) == (None, 0.5, (None, 1))
    assert box["losses"] is held
    assert held == [torch.zeros(1)]


def test_a_box_that_has_grown_is_left_where_it_is_not_asked_for() -> None:
    live = boxed()
    saved = Snapshot(live)
    live["box"]["best"] = torch.ones(2)
    live["box"]["losses"] += [torch.ones(1)]
    apply(live, saved.saved, saved.views, only=("box/note",))
    assert torch.equal(live["box"]["best"], torch.ones(2))
    assert len(live["box"]["losses"]) == 2


def test_what_can_not_give_way_is_refused() -> None:
    """A key that only the live dict has, and a module at the end of a list."""
    saved = Snapshot({"box": {"t": torch.ones(1)}, "list": [1]})
    live = {
        "box": {"t": torch.ones(1), "other": torch.ones(2)},
        "list": [1, nn.Linear(1, 1)],
    }
    found = {(d.path, d.what) for d in saved.differences(live)}
    assert {("box/other", "tensor"), ("list[1]", "kind")} <= found


def test_a_tensor_of_a_box_that_grows_is_told_how_to_begin() -> None:
    saved = Snapshot({"box": {"losses": torch.ones(4)}})
    found = saved.differences({"box": {"losses": torch.zeros(0)}})
    with pytest.raises(Exception, match="can be None, or missing, before restore"):
        refuse(found, "shard 0")
    fresh: dict[str, Any] = {"box": {"losses": None}}
    saved.restore(fresh)
    assert torch.equal(fresh["box"]["losses"], torch.ones(4))


# --- what can't be read, and what it costs


def test_what_a_state_dict_raises_says_whose_it_is() -> None:
    class Broken:
        def state_dict(self) -> dict[str, Any]:
            raise RuntimeError("consolidate first")

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise NotImplementedError

    with pytest.raises(RuntimeError, match="consolidate first") as caught:
        capture({"thing": Broken()})
    (note,) = caught.value.__notes__
    assert "'thing'" in note


def test_moments_in_a_buffer_of_another_cost_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each was held against the whole buffer: with n of them n times as much."""
    seen = 0
    clone = Tensor.clone

    def counted(tensor: Tensor, **options: Any) -> Tensor:
        nonlocal seen
        seen += tensor.numel() * tensor.element_size()
        return clone(tensor, **options)

    model = nn.Module()
    model.weights = nn.ParameterList([torch.zeros(100) for _ in range(50)])
    model.register_buffer("flat", torch.zeros(5000), persistent=False)
    opt = torch.optim.SGD(model.parameters(), momentum=0.9)
    for at, parameter in enumerate(model.parameters()):
        opt.state[parameter]["momentum_buffer"] = model.flat[100 * at : 100 * at + 100]
    state = {"model": model, "opt": opt}
    saved = Snapshot(state)
    monkeypatch.setattr(Tensor, "clone", counted)
    saved.restore(state)
    assert 0 < seen <= 8 * 4 * 5000


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own import
def test_zero_redundancy_is_refused_with_its_successor(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        model = nn.Linear(2, 2)
        opt = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        with pytest.raises(Unstorable, match=r"opt: .*fully_shard"):
            capture({"model": model, "opt": opt})
    finally:
        torch.distributed.destroy_process_group()
