"""Shows that an optimizer goes on from a restore as if nothing had happened."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from statekit import Snapshot, same_bytes, train
from torch import Tensor, nn

from handfast.torch.apply import apply
from handfast.torch.tree import Kind, kind_of

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adamw": torch.optim.AdamW,
    "foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adagrad": torch.optim.Adagrad,
    "nadam": torch.optim.NAdam,
    "rprop": torch.optim.Rprop,
    "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
    "adafactor": torch.optim.Adafactor,
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=3),
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
}


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def go(model: nn.Module, opt: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        x = torch.linspace(-1, 1, 12).reshape(3, 4) + step

        def closure(x: Tensor = x) -> Tensor:
            opt.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            return loss

        opt.step(closure)


def flat(value: Any) -> list[Any]:
    """The leaves of optimizer state, tensors as bytes with their dtype and device."""
    if isinstance(value, Tensor):
        return [value.dtype, value.stride(), value.device, value.reshape(-1).tolist()]
    if isinstance(value, dict):
        return [leaf for key in sorted(value, key=str) for leaf in (key, *flat(value[key]))]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in flat(item)]
    return [value]


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "warm"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_trajectory_goes_on_bit_for_bit(name: str, warm: bool) -> None:
    """Into an optimizer without state, and into one that went another way."""
    one, other = net(0), net(1)
    opt, live = OPTIMIZERS[name](one.parameters()), OPTIMIZERS[name](other.parameters())
    go(one, opt, 3)
    saved = Snapshot({"model": one, "opt": opt})
    state = flat(opt.state_dict())
    if warm:
        go(other, live, 2)
    saved.restore({"model": other, "opt": live})
    assert flat(live.state_dict()) == state
    go(one, opt, 3)
    go(other, live, 3)
    assert flat(live.state_dict()) == flat(opt.state_dict())
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(same_bytes(a, b) for a, b in pairs)


def test_moments_of_another_dtype_are_kept() -> None:
    """Optimizer.load_state_dict casts fp32 moments of bf16 parameters to bf16 (torch, measured)."""
    model = nn.Linear(4, 4).bfloat16()
    opt = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 4).bfloat16()).sum().backward()
    opt.step()
    for state in opt.state.values():
        state["exp_avg"] = torch.randn(state["exp_avg"].shape)
    moments = opt.state[model.weight]["exp_avg"].clone()
    saved = Snapshot({"model": model, "opt": opt})

    theirs = torch.optim.AdamW(model.parameters())
    theirs.load_state_dict(opt.state_dict())
    assert theirs.state[model.weight]["exp_avg"].dtype == torch.bfloat16  # the trap
    ours = torch.optim.AdamW(model.parameters())
    saved.restore({"model": model, "opt": ours})
    assert same_bytes(ours.state[model.weight]["exp_avg"], moments)


def test_restored_state_is_nobody_elses() -> None:
    """Optimizer.load_state_dict aliases what it is given: a second restore would be poisoned."""
    model = nn.Linear(4, 4)
    opt = torch.optim.AdamW(model.parameters())
    train(model, opt)
    given = opt.state_dict()
    theirs = torch.optim.AdamW(model.parameters())
    theirs.load_state_dict(given)
    kept = given["state"][0]["exp_avg"]
    assert theirs.state[model.weight]["exp_avg"].data_ptr() == kept.data_ptr()  # the trap

    saved = Snapshot({"model": model, "opt": opt})
    image = bytes(saved.buffer)
    ours = torch.optim.AdamW(model.parameters())
    saved.restore({"model": model, "opt": ours})
    train(model, ours, steps=2)
    assert bytes(saved.buffer) == image
    assert same_bytes(opt.state[model.weight]["exp_avg"], kept)


def test_strides_of_moments_come_back() -> None:
    """channels_last moments beside channels_last weights: else each step pays for a copy."""
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, 3, 4, 4)).sum().backward()
    opt.step()
    fresh = torch.optim.AdamW(model.parameters())
    Snapshot({"model": model, "opt": opt}).restore({"model": model, "opt": fresh})
    moments = fresh.state[model.weight]["exp_avg"]
    assert moments.is_contiguous(memory_format=torch.channels_last)
    assert not moments.is_contiguous()


def test_live_state_that_fits_is_filled_in_place() -> None:
    """A captured CUDA graph holds the addresses of the state."""
    model = nn.Linear(4, 4)
    opt = torch.optim.AdamW(model.parameters())
    train(model, opt)
    saved = Snapshot({"model": model, "opt": opt})
    train(model, opt)
    before = {key: value.data_ptr() for key, value in opt.state[model.weight].items()}
    saved.restore({"model": model, "opt": opt})
    state = opt.state[model.weight]
    assert {key: value.data_ptr() for key, value in state.items()} == before
    assert state["step"] == 1


def test_a_save_before_the_first_step_takes_the_state_away_again() -> None:
    """Else a rollback to step 0 would keep the moments of the branch that was left."""
    model = nn.Linear(4, 4)
    opt = torch.optim.AdamW(model.parameters())
    saved = Snapshot({"model": model, "opt": opt})
    train(model, opt)
    saved.restore({"model": model, "opt": opt})
    assert not opt.state
    assert model.weight.grad is None


def test_groups_of_their_own_and_frozen_parameters() -> None:
    """Two groups with other hyperparameters, one added late, and one parameter that never moved."""

    def build(lr: float) -> tuple[nn.Sequential, torch.optim.Optimizer]:
        model = net(3)
        model[0].bias.requires_grad_(False)
        opt = torch.optim.AdamW([{"params": model[0].parameters(), "lr": lr, "tag": "slow"}])
        opt.add_param_group({"params": model[2].parameters(), "weight_decay": 0.3})
        return model, opt

    model, opt = build(0.1)
    train(model, opt, steps=2)
    other, live = build(0.1)
    Snapshot({"m": model, "o": opt}).restore({"m": other, "o": live})
    assert flat(live.state_dict()) == flat(opt.state_dict())
    assert other[0].bias not in live.state


def test_two_optimizers_over_one_model() -> None:
    """Muon for matrices and AdamW for the rest is one model with two optimizers."""
    model, other = net(0), net(1)

    def build(m: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        matrices = [p for p in m.parameters() if p.ndim == 2]
        rest = [p for p in m.parameters() if p.ndim != 2]
        return torch.optim.SGD(matrices, momentum=0.9), torch.optim.AdamW(rest)

    opts, live = build(model), build(other)
    train(model, *opts, steps=2)
    Snapshot({"m": model, "o": list(opts)}).restore({"m": other, "o": list(live)})
    assert [flat(o.state_dict()) for o in live] == [flat(o.state_dict()) for o in opts]


def test_saved_hyperparameters_win_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """As in torch, but not in silence: both values are shown."""
    model = nn.Linear(4, 4)
    saved = Snapshot({"m": model, "o": torch.optim.AdamW(model.parameters(), weight_decay=0.1)})
    live = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.2)
    with caplog.at_level(logging.WARNING, "handfast"):
        saved.restore({"m": model, "o": live})
    assert live.param_groups[0]["lr"] == 0.001
    (record,) = caplog.records
    assert "o/param_groups[0]/lr: saved 0.001, live was 0.5" in record.getMessage()
    assert "weight_decay: saved 0.1, live was 0.2" in record.getMessage()
    caplog.clear()
    saved.restore({"m": model, "o": live})
    assert not caplog.records


@pytest.mark.parametrize("keep", ["lr", "o/param_groups[0]/lr", "o/*/lr"])
def test_keep_live_reverses_it(keep: str) -> None:
    """A run that goes on with another learning rate, on purpose."""
    model = nn.Linear(4, 4)
    saved = Snapshot({"m": model, "o": torch.optim.AdamW(model.parameters(), weight_decay=0.1)})
    live = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.2)
    saved.restore({"m": model, "o": live}, keep_live=(keep,))
    assert live.param_groups[0]["lr"] == 0.5
    assert live.param_groups[0]["weight_decay"] == 0.1


def test_what_a_scheduler_moves_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    """A warning at each restart of a healthy run would be read by nobody; its base is compared."""
    model = nn.Linear(4, 4)

    def build(lr: float) -> dict[str, Any]:
        opt = torch.optim.AdamW(model.parameters())
        return {"o": opt, "s": torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=9)}

    state = build(0.1)
    for _ in range(3):
        train(model, state["o"])
        state["s"].step()
    saved = Snapshot(state)
    saved.restore(build(0.1))
    assert not caplog.records
    saved.restore(build(0.2))
    assert "initial_lr" in caplog.text


def test_a_tensor_learning_rate_is_written_in_place() -> None:
    """Capturable optimizers hold it by address."""
    model = nn.Linear(4, 4)
    opt = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.25), foreach=False)
    saved = Snapshot({"m": model, "o": opt})
    rate = opt.param_groups[0]["lr"]
    rate.fill_(0.5)
    saved.restore({"m": model, "o": opt})
    assert opt.param_groups[0]["lr"] is rate
    assert rate == 0.25


class Odd(torch.optim.SGD):
    """An optimizer that keeps numbers and lists beside tensors, and state of no parameter."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.state["calls"] = {"n": torch.ones(1), "k": 3}
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["trail"] = [*state.get("trail", []), p.detach().norm()]
                state[7] = torch.zeros(2)


def test_state_that_is_no_tensor() -> None:
    """Third-party optimizers keep ints, lists of tensors, and state under keys of their own."""
    model, other = net(0), net(1)
    opt, live = Odd(model.parameters()), Odd(other.parameters())
    train(model, opt, steps=2)
    state = copy.deepcopy(opt.state)
    Snapshot({"m": model, "o": opt}).restore({"m": other, "o": live})
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert flat(live.state[mine]) == flat(opt.state[theirs])
    assert flat(live.state["calls"]) == flat(state["calls"])


class OwnDict(torch.optim.SGD):
    """An optimizer with a state_dict of its own."""

    extra = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "extra": self.extra}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.extra = state_dict.pop("extra")
        super().load_state_dict(state_dict)


def test_an_optimizer_with_a_state_dict_of_its_own_is_asked() -> None:
    """It knows more than torch's; leaving that out would lose it in silence."""
    model = nn.Linear(4, 4)
    opt, live = (OwnDict(model.parameters(), momentum=0.9) for _ in range(2))
    train(model, opt)
    opt.extra = 5
    Snapshot({"m": model, "o": opt}).restore({"m": model, "o": live})
    assert live.extra == 5
    assert flat(live.state_dict()) == flat(opt.state_dict())


def hooked(seed: int) -> tuple[nn.Module, Any]:
    """An optimizer that keeps a scale of its own beside what torch's keep."""
    torch.manual_seed(seed)
    model = nn.Linear(4, 4)
    opt: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    opt.scale = 1.0 + seed
    opt.register_state_dict_post_hook(lambda o, tree: {**tree, "scale": o.scale})
    opt.register_load_state_dict_pre_hook(lambda o, tree: setattr(o, "scale", tree["scale"]))
    return model, opt


def test_an_optimizer_with_hooks_on_its_state_is_asked_itself() -> None:
    """Such hooks were passed by, and what they keep was lost without a word."""
    (one, opt), (other, live) = hooked(0), hooked(1)
    train(one, opt)
    train(other, live)
    saved = Snapshot({"model": one, "opt": opt})
    assert saved.saved.kinds["opt"].startswith("object:SGD(parameters ")
    saved.restore({"model": other, "opt": live})
    assert live.scale == 1.0
    assert other.weight.grad is None
    for mine, theirs in zip(other.parameters(), one.parameters(), strict=True):
        assert same_bytes(live.state[mine]["momentum_buffer"], opt.state[theirs]["momentum_buffer"])


@pytest.mark.parametrize("when", ["pre", "post"])
@pytest.mark.parametrize("call", ["state_dict", "load_state_dict"])
def test_each_kind_of_hook_makes_an_object_of_an_optimizer(call: str, when: str) -> None:
    """And only as long as it is there."""
    opt = torch.optim.SGD(nn.Linear(1, 1).parameters())
    assert kind_of(opt) is Kind.OPTIMIZER
    hook = getattr(opt, f"register_{call}_{when}_hook")(lambda *_: None)
    assert kind_of(opt) is Kind.OBJECT
    hook.remove()
    assert kind_of(opt) is Kind.OPTIMIZER


class Derived(torch.optim.SGD):
    """Makes something of what it loads."""

    def load_state_dict(self, tree: Any) -> None:
        super().load_state_dict(tree)
        self.seen = [len(self.state)]


class Revived(torch.optim.SGD):
    """The same, at the door that torch's own loading goes through; as timm's optimizers have."""

    def __setstate__(self, tree: Any) -> None:
        super().__setstate__(tree)
        self.seen = [len(self.state)]


@pytest.mark.parametrize("kind", [Derived, Revived])
def test_what_an_optimizer_makes_of_its_state_is_made(kind: type[Any]) -> None:
    """Its own loading was passed by, and what it derives stayed as it had been."""
    (one, other) = (nn.Linear(4, 4) for _ in range(2))
    opt, live = (kind(m.parameters(), lr=0.1, momentum=0.9) for m in (one, other))
    train(one, opt)
    Snapshot({"model": one, "opt": opt}).restore({"model": other, "opt": live})
    assert live.seen == [2]
    assert same_bytes(live.state[other.bias]["momentum_buffer"],
                      opt.state[one.bias]["momentum_buffer"])  # fmt: skip


def test_torchs_own_optimizers_are_read_by_name() -> None:
    """However many of them have a `__setstate__` for what older releases wrote."""
    for name in ("Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop"):
        opt = getattr(torch.optim, name)(nn.Linear(1, 1).parameters())
        assert kind_of(opt) is Kind.OPTIMIZER


def test_an_optimizer_that_goes_by_order_is_refused_in_another_one() -> None:
    """One with hooks loads by position: moments would go to other parameters."""

    def parts(*order: int) -> dict[str, Any]:
        layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
        opt = torch.optim.SGD([layers[i].weight for i in order], lr=0.1, momentum=0.9)
        opt.register_state_dict_post_hook(lambda o, tree: tree)
        return {"a": layers[0], "b": layers[1], "opt": opt}

    saved = Snapshot(parts(0, 1))
    saved.restore(parts(0, 1))
    (found,) = saved.differences(parts(1, 0))
    assert (found.path, found.what) == ("opt", "kind")
    assert "parameters" in found.saved


def test_tensors_of_the_state_go_by_their_paths() -> None:
    """Parameters that no module has went by position; and those that are nowhere still do."""

    def parts(*order: str) -> dict[str, Any]:
        box = {key: torch.zeros(2, requires_grad=True) for key in ("a", "b")}
        nowhere = torch.zeros(2, requires_grad=True)
        opt = torch.optim.SGD([*(box[key] for key in order), nowhere], lr=0.1, momentum=0.9)
        return {"box": box, "opt": opt, "model": nn.Linear(1, 1)}

    one = parts("a", "b")
    for value, parameter in enumerate(one["opt"].param_groups[0]["params"]):
        one["opt"].state[parameter]["momentum_buffer"] = torch.full((2,), float(value))
    saved = Snapshot(one)
    assert "opt/state//box/a/momentum_buffer" in saved.paths()
    assert "opt/state/0/2/momentum_buffer" in saved.paths()
    other = parts("b", "a")
    saved.restore(other)
    held = {k: other["opt"].state[other["box"][k]]["momentum_buffer"][0].item() for k in ("a", "b")}
    assert held == {"a": 0.0, "b": 1.0}


def test_two_parameters_of_one_name_are_refused() -> None:
    """The child `b` of the component `a`, and the component `a.b`."""
    a = nn.Module()
    a.b = nn.Linear(1, 1)
    state = {"a": a, "a.b": nn.Linear(1, 1), "c": nn.Linear(1, 1)}
    opt = torch.optim.SGD([p for m in state.values() for p in m.parameters()])
    with pytest.raises(ValueError, match=r"two parameters of opt have the name a.b.weight"):
        Snapshot({**state, "opt": opt})


def test_what_was_not_saved_keeps_its_state_where_that_is_allowed() -> None:
    """A new layer's moments were dropped by a restore that is not strict."""
    one, other = nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    opt, live = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (one, other))
    for part, optimizer, value in ((one, opt, 1.0), (other, live, 2.0)):
        for parameter in part.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, value)
    saved, state = Snapshot({"m": one, "o": opt}), {"m": other, "o": live}
    assert saved.differences(state)
    assert saved.differences(state, strict=False) == []
    apply(state, saved.saved, saved.values)
    held = [live.state[p]["momentum_buffer"].flatten()[0].item() for p in other.parameters()]
    assert held == [1.0, 1.0, 2.0, 2.0]


def test_an_optimizer_with_a_door_of_its_own_goes_by_name_all_the_same() -> None:
    """Exact moments of bf16 parameters, the live rate where it is to be kept, and its door."""
    one, other = (nn.Linear(2, 2).bfloat16() for _ in range(2))
    opt, live = (Revived(m.parameters(), lr=v, momentum=0.9) for m, v in ((one, 0.1), (other, 0.2)))
    for parameter in one.parameters():
        opt.state[parameter]["momentum_buffer"] = torch.rand(parameter.shape)
    saved = Snapshot({"m": one, "o": opt})
    assert saved.saved.kinds["o"] == Kind.OPTIMIZER
    saved.restore({"m": other, "o": live}, keep_live=("lr",))
    assert live.param_groups[0]["lr"] == 0.2
    assert live.seen == [2]
    assert same_bytes(live.state[other.bias]["momentum_buffer"],
                      opt.state[one.bias]["momentum_buffer"])  # fmt: skip
