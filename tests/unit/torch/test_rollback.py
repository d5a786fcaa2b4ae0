"""Shows that a restore into a live state leaves nothing behind of the moment that it was in.

A fresh process has no gradients, no half-taken step and no counters of an abandoned timeline; a
rollback in the same process must not have them either, and no `state_dict()` shows any of these.
"""

import logging
from collections import deque
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from statekit import Snapshot, train, unclean_gradients
from torch import Tensor, nn

from handfast.errors import Unstorable
from handfast.torch import memory
from handfast.torch.apply import apply
from handfast.torch.capture import capture
from handfast.torch.compare import refuse
from handfast.torch.gradients import Watch, unowned
from handfast.torch.optimizers import given_to
from handfast.torch.state import TorchState
from handfast.torch.tree import nodes

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
    apply(run.state, saved.saved, saved.values, only=only)
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
        assert unowned(nodes(live)) == ("model/0.weight", "model/0.bias")
        state.pending(True)  # then they are saved
        assert caplog.messages == []
        for _ in range(2):
            state.pending(False)
    (said,) = caplog.messages
    assert "model/0.weight" in said
    assert "requires_grad_(False)" in said
    model.zero_grad(set_to_none=False)
    assert unowned(nodes(live)) == ()


def test_gradients_that_nobody_consumes_go_at_a_restore() -> None:
    """As a fresh process has none; those of what is not restored stay."""
    model, live = headed()
    saved = Snapshot(live)
    model(torch.randn(3, 4)).sum().backward()
    apply(live, saved.saved, saved.values, only=("model/0.weight",))
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
    first = {opt: given_to(opt)}
    train(model, opt, steps=3)
    schedule = torch.optim.swa_utils.SWALR(opt, swa_lr=0.05)
    with caplog.at_level(logging.WARNING, "handfast"):
        apply(state, saved.saved, saved.values, keep_live=("step",), given=first)
        assert opt.param_groups[0]["step"] == 3
        apply(state, saved.saved, saved.values)
        assert opt.param_groups[0]["step"] == 3
        assert "live was 3: left as it is" in caplog.messages[-1]
        apply(state, saved.saved, saved.values, given=first)
    assert "opt/param_groups[0]/step: nothing was saved, live was 3: dropped" in caplog.messages[-1]
    assert "step" not in opt.param_groups[0]
    assert opt.param_groups[0]["label"] == "all"
    assert schedule.get_last_lr()
    assert {"swa_lr", "initial_lr"} <= opt.param_groups[0].keys()  # or its next step would fail


def test_a_state_that_is_wrong_is_said_where_the_others_hear_of_it() -> None:
    """Raised before the ranks have met, it let all others wait for this one."""
    state = TorchState({"n": 5}, rng=False, replicated=(), pickle=(), verify="none")
    state.shares(0, (0, 1))
    with pytest.raises(TypeError, match="n is a"):
        state.pending(False)


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
    own = type("Own", (torch.optim.LBFGS,), {})
    saved_own = Snapshot({"model": model, "opt": own(model.parameters())})
    found_own = saved_own.differences({"model": other, "opt": own(list(other.parameters())[::-1])})
    assert [found.what for found in found_own] == ["order"]
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
    apply(live, saved.saved, saved.values, only=("box/note",))
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
    with pytest.raises(Exception, match="in the place of None it would be made anew"):
        refuse(found, "shard 0")
    fresh: dict[str, Any] = {"box": {"losses": None}}
    saved.restore(fresh)
    assert torch.equal(fresh["box"]["losses"], torch.ones(4))


def leaves(count: int) -> list[Tensor]:
    return [torch.zeros(2).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize(
    "parts",
    [
        lambda count: {"params": leaves(count)},
        lambda count: {"net": [{"w": leaf} for leaf in leaves(count)]},
        lambda count: {"box": {"t": leaves(1)[0] if count == 3 else None}},
        lambda count: {"box": {"t": {"w": leaves(1)[0]} if count == 3 else None}},
    ],
    ids=["list", "layers", "leaf", "box"],
)
def test_what_is_trained_gives_way_to_nothing(parts: Any) -> None:
    """A third layer that the code has by now: it would be stepped, and never saved again."""
    saved = Snapshot(parts(2))
    live = parts(3)
    assert saved.differences(live) != []
    held = str(live)
    apply(live, saved.saved, saved.values)  # as strict=False does
    assert str(live) == held


def test_what_an_optimizer_steps_gives_way_to_nothing() -> None:
    """Without a gradient at the moment, too."""
    weights = [torch.zeros(2), torch.zeros(2)]
    saved = Snapshot({"params": weights[:1], "opt": torch.optim.SGD(weights[:1])})
    live = {"params": list(weights), "opt": torch.optim.SGD(weights[:1] + weights[1:])}
    assert "params[1]" in {d.path for d in saved.differences(live)}


def test_a_best_state_dict_gives_way() -> None:
    """Whole, as one tensor does; and comes back whole."""
    model = nn.Linear(2, 2)

    def best() -> dict[str, Any]:
        return {key: value.clone() for key, value in model.state_dict().items()}

    box: dict[str, Any] = {"best": None, "all": None}
    live = {"model": model, "box": box}
    saved = Snapshot(live)
    box["best"], box["all"] = best(), [best()]
    later = Snapshot(live)
    saved.restore(live)
    assert box == {"best": None, "all": None}
    later.restore(live)
    assert torch.equal(box["all"][0]["weight"], model.weight)


def test_a_view_of_the_weights_gives_way() -> None:
    """It shares their memory, and is gone by then."""
    model = nn.Linear(2, 2)
    live: dict[str, Any] = {"model": model, "box": {"last": None}}
    saved = Snapshot(live)
    live["box"]["last"] = model.weight.detach()[0]
    saved.restore(live)
    assert live["box"]["last"] is None
    live["box"]["last"] = model.weight.clone()  # with its graph: nothing trains it
    saved.restore(live)
    assert live["box"]["last"] is None


def test_a_reference_to_weights_of_a_module_gives_way() -> None:
    """They are restored with the module, and nothing is lost."""
    model = nn.Linear(2, 2)
    box: dict[str, Any] = {"watch": None, "all": []}
    live = {"model": model, "box": box}
    saved = Snapshot(live)
    box["watch"] = model.weight
    box["all"].append(model.bias)
    saved.restore(live)
    assert box == {"watch": None, "all": []}


def test_tensors_on_both_sides_are_in_the_way_of_another_box() -> None:
    """A view in the list that goes would become a part of the tuple that comes."""
    model = nn.Linear(2, 2)
    saved = Snapshot({"model": model, "box": {"x": (model.weight.detach()[0].clone(),)}})
    live = {"model": model, "box": {"x": [model.weight.detach()[0]]}}
    assert [(d.path, d.what) for d in saved.differences(live)] == [("box/x", "box")]


def test_nothing_gives_way_to_what_can_not_be_made() -> None:
    saved = Snapshot({"box": {"x": {"m": nn.Linear(1, 1)}}})
    live = {"box": {"x": torch.zeros(2)}}
    assert saved.differences(live) != []
    apply(live, saved.saved, saved.values)
    assert torch.equal(live["box"]["x"], torch.zeros(2))


def test_what_was_one_tensor_is_one_again_in_a_box() -> None:
    """With the weights that it is a reference to, and with another place."""
    model, shared = nn.Linear(2, 2), torch.ones(2)
    saved = Snapshot({"model": model, "box": {"ref": model.weight, "a": shared, "b": shared}})
    other = nn.Linear(2, 2)
    live: dict[str, Any] = {"model": other, "box": {"ref": None, "a": None, "b": None}}
    saved.restore(live)
    box = live["box"]
    assert box["a"] is box["b"]
    assert box["ref"].data_ptr() == other.weight.data_ptr()
    assert torch.equal(other.weight, model.weight)


def test_ties_come_back_on_the_device_of_what_is_tied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights on another device than that on which plain values are made."""
    model = nn.Linear(2, 2)
    saved = Snapshot({"model": model, "box": {"ref": model.weight}})
    other = nn.Linear(2, 2)
    live: dict[str, Any] = {"model": other, "box": {"ref": None}}
    place = memory.place_of
    elsewhere = torch.device("meta")
    monkeypatch.setattr(memory, "place_of", lambda t: place(t)._replace(device=elsewhere))
    apply(live, saved.saved, saved.values)
    assert live["box"]["ref"].data_ptr() == other.weight.data_ptr()


def test_what_is_one_now_and_was_apart_is_apart_again() -> None:
    """Though the values are the same at that moment: training moves one of them."""
    model = nn.Linear(2, 2)
    opt = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, opt, width=2)
    buffer = opt.state[model.weight]["momentum_buffer"]
    box: dict[str, Any] = {"m": buffer.clone()}
    state = {"model": model, "opt": opt, "box": box}
    saved = Snapshot(state)
    box["m"] = buffer
    saved.restore(state)
    assert torch.equal(box["m"], opt.state[model.weight]["momentum_buffer"])
    train(model, opt, width=2)
    assert not torch.equal(box["m"], opt.state[model.weight]["momentum_buffer"])


def test_a_deque_that_is_too_short_says_so(caplog: pytest.LogCaptureFixture) -> None:
    saved = Snapshot({"h": [torch.ones(1) * i for i in range(4)]})
    live = {"h": deque([torch.zeros(1)], maxlen=2)}
    with caplog.at_level(logging.WARNING, "handfast"):
        saved.restore(live)
    assert [t.item() for t in live["h"]] == [2.0, 3.0]
    assert "h takes the last 2 only" in caplog.text


def test_what_has_no_place_is_refused() -> None:
    """In a tuple that nothing can replace, and below what only= leaves as it is."""
    saved = Snapshot({"pair": (torch.ones(2), {"n": 1})})
    assert "pair[0]" in {d.path for d in saved.differences({"pair": ({}, {"n": 0})})}
    saved = Snapshot({"box": {"best": {"w": torch.ones(2)}}})
    for box in ({"best": None}, {}, {"best": torch.zeros(1)}):
        assert saved.differences({"box": box}, only=("box/best/w",)) != [], box
    live: dict[str, Any] = {"box": {"best": {}}}
    assert saved.differences(live, only=("box/best/w",)) == []
    apply(live, saved.saved, saved.values, only=("box/best/w",))
    assert torch.equal(live["box"]["best"]["w"], torch.ones(2))


@pytest.mark.parametrize("kind", ["scheduler", "optimizer", "generator", "scaler"])
def test_a_thing_in_the_place_of_none_stays_as_it_is(kind: str) -> None:
    """Where strict=False lets it be; it was asked to load None."""
    opt = torch.optim.SGD(leaves(1))
    thing: Any = {
        "scheduler": torch.optim.lr_scheduler.StepLR(opt, 1),
        "optimizer": opt,
        "generator": torch.Generator(),
        "scaler": torch.amp.GradScaler("cpu"),
    }[kind]
    saved = Snapshot({"box": {"s": None}})
    live = {"box": {"s": thing}}
    assert saved.differences(live) != []
    apply(live, saved.saved, saved.values)
    assert live["box"]["s"] is thing


leaf = st.one_of(st.none(), st.integers(0, 2), st.integers(0, 2).map(lambda n: torch.full((2,), n)))
tree = st.recursive(
    leaf,
    lambda inside: st.one_of(
        st.lists(inside, max_size=3),
        st.lists(inside, max_size=3).map(tuple),
        st.lists(inside, max_size=3).map(deque),
        st.dictionaries(st.sampled_from("abc"), inside, max_size=3),
    ),
    max_leaves=6,
)
top = st.one_of(
    st.dictionaries(st.sampled_from("abc"), tree, max_size=3), st.lists(tree, max_size=3)
)


def plain(value: Any) -> Any:
    """A value that can be compared: tensors as their numbers, and a deque may fill a list's place.

    It does where tensors are in it, which are filled in place.
    """
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.tolist()))
    if isinstance(value, dict):
        return ("dict", {key: plain(item) for key, item in value.items()})
    if isinstance(value, list | tuple | deque):
        return ("tuple" if type(value) is tuple else "list", [plain(item) for item in value])
    return value


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(top, top, st.booleans())
def test_what_is_let_through_is_restored_to_the_letter(was: Any, now: Any, tied: bool) -> None:
    """Any boxes, into any others: refused before anything is changed, or exactly as they were."""
    if tied and isinstance(was, dict) and isinstance(now, dict):
        was |= {"d": (shared := torch.full((2,), 7)), "e": [shared]}
        now |= {"d": None, "e": []}
    saved, expected = Snapshot({"box": was}), plain(was)
    live = {"box": now}
    if saved.differences(live):
        return
    apply(live, saved.saved, saved.values)
    if type(was) is type(now):  # else it was empty, and nothing holds it that could take another
        assert plain(live["box"]) == expected
    assert live["box"] is now
    if tied and isinstance(was, dict) and isinstance(now, dict):
        assert now["d"] is now["e"][0]


# --- what can't be read, and what it costs


class Column:
    """Shows one element by a stride that is not 1."""

    def __init__(self) -> None:
        self.table = torch.zeros(1, 4)

    def state_dict(self) -> dict[str, Any]:
        return {"column": self.table[:, 0]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.table[:, 0] = state["column"]


def test_one_element_by_any_stride_is_compared() -> None:
    model = nn.Linear(4, 1)
    state = {"o": Column(), "model": model, "column": model.weight.detach()[:, 0]}
    saved = Snapshot(state)
    with torch.no_grad():
        state["o"].table.add_(1.0)
        model.weight.add_(1.0)
    saved.restore(state)
    assert state["o"].table[:, 0] == 0.0
    assert torch.equal(state["column"], model.weight[:, 0])


def test_what_a_state_dict_raises_says_whose_it_is() -> None:
    class Broken:
        def state_dict(self) -> dict[str, Any]:
            raise RuntimeError("consolidate first")

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError("what could not be read is loaded")

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
