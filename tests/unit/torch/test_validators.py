"""Shows what each validator refuses, and that no sound state is refused: real optimizers, stepped.

A false alarm costs an epoch, and three in a row the training; so most of this is about silence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from statekit import Snapshot, train
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, ReduceLROnPlateau

import handfast
from handfast.agent.examiner import Known
from handfast.core.lattice import Epoch
from handfast.store import objects
from handfast.torch.state import TorchState
from handfast.torch.validators import (
    Staged,
    Validator,
    _say,
    find,
    finite,
    loss,
    masters,
    moments,
    nonnegative,
)

ALL: Mapping[str, Validator] = {
    "finite": finite,
    "nonnegative": nonnegative,
    "moments": moments,
    "masters": masters,
}
BETAS = [(0.9, 0.999), (0.9, 0.95)]
INF = math.inf


def staged(
    state: Mapping[str, object],
    rates: dict[str, tuple[float, float]] | None = None,
    pickle: tuple[str, ...] = (),
    **options: Any,
) -> Staged:
    """A state as the examiner gets it: out of an image, with what its plan says is known."""
    held = TorchState(
        state, rng=False, replicated=(), pickle=pickle, verify="fsync", validators=("finite",)
    )
    extra, grads = options.get("extra"), options.get("grads", False)
    plan = held.capture(extra, grads, lambda _, digests: list(digests))
    assert plan.examined is not None
    shot = Snapshot(state, pickle, rng=False, **options)
    return Staged(Epoch(1, 5), shot.views, shot._objects, plan.examined.known, rates)


def silent(state: Mapping[str, object], **options: Any) -> bool:
    """Whether no validator has anything to say."""
    seen = staged(state, **options)
    found = {name: said for name, ask in ALL.items() if (said := ask(seen))}
    assert not found, found
    return True


OURS = Known(adams=("o",))
"""What is known of an optimizer of torch's that stands at ``o``."""


def bare(tensors: Mapping[str, Tensor], **parts: Any) -> Staged:
    """Tensors by path, without a training behind them."""
    return Staged(Epoch(1, 5), tensors, objects.encode({"": {}, **parts}), OURS)


def net(width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 4))


def trained(kind: type[Optimizer] = AdamW, steps: int = 5, **options: Any) -> dict[str, Any]:
    """A model and its optimizer after some steps."""
    model = net()
    optimizer = kind(model.parameters(), **{"lr": 1e-3, **options})
    train(model, optimizer, steps=steps)
    return {"model": model, "optimizer": optimizer}


def moment(state: Mapping[str, Any], key: str) -> Tensor:
    """A moment of the first weight."""
    weight = next(iter(state["model"].parameters()))
    found: Tensor = state["optimizer"].state[weight][key]
    return found


# --- finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_a_parameter_or_a_moment_that_is_no_number_is_refused(value: float) -> None:
    """By path, how many, and where the first one is."""
    state = trained()
    with torch.no_grad():
        state["model"][2].weight[1, 2] = value
    nans, others = (1, 0) if math.isnan(value) else (0, 1)
    what = f"{nans} NaN and {others} infinite of 16 values, the first at 6"
    assert finite(staged(state)) == f"model/2.weight: {what}"
    state = trained()
    moment(state, "exp_avg").fill_(value)
    assert "optimizer/state/0.weight/exp_avg: " in str(finite(staged(state)))


def test_a_gradient_that_is_saved_is_looked_at() -> None:
    state = trained()
    state["model"][0].weight.grad[0, 0] = math.nan
    assert finite(staged(state)) is None
    assert str(finite(staged(state, grads=True))).startswith("grads/model~10.weight: 1 NaN")


FLOATS = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype_is_looked_at(dtype: torch.dtype) -> None:
    """With NaN in the last of more elements than are looked at together."""
    values = torch.ones(5, dtype=torch.float32)
    for sound in (values, values * 0, values[:0], values[:1].reshape(())):
        assert finite(bare({"model/w": sound.to(dtype)})) is None
    values[4] = math.nan
    assert finite(bare({"model/w": values.to(dtype)})) == (
        "model/w: 1 NaN and 0 infinite of 5 values, the first at 4"
    )


def test_the_greatest_and_least_numbers_are_numbers() -> None:
    """In every dtype, of both signs, and what is below all normal ones."""
    for dtype in FLOATS:
        info = torch.finfo(dtype)
        numbers = [info.max, info.min, info.tiny, info.smallest_normal / 2, -0.0]
        ends = torch.tensor(numbers, dtype=torch.float64)
        assert finite(bare({"model/w": ends.to(dtype)})) is None, dtype


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.complex32], ids=str)
def test_complex_numbers_have_two_parts(
    dtype: torch.dtype, recwarn: pytest.WarningsRecorder
) -> None:
    """Torch warns that complex32 is experimental."""
    sound = torch.zeros(3, dtype=torch.complex64)
    assert finite(bare({"model/w": sound.to(dtype)})) is None
    sound[1] = complex(0.0, INF)
    said = finite(bare({"model/w": sound.to(dtype)}))
    assert said == "model/w: 0 NaN and 1 infinite of 3 values, the first at 1"
    sound[2] = complex(math.nan, math.nan)
    said = finite(bare({"model/w": sound.to(dtype)}))
    assert said == "model/w: 1 NaN and 1 infinite of 3 values, the first at 1"


def test_what_can_be_no_nan_is_passed_over() -> None:
    """Integers, booleans and quantised blocks have no NaN, whatever their bits."""
    for dtype in (torch.int64, torch.int8, torch.uint8, torch.bool, torch.int32):
        bits = torch.full((8,), 127, dtype=torch.uint8).to(dtype)
        assert all(ask(bare({"model/w": bits})) is None for ask in ALL.values())


def test_floats_of_four_bits_have_no_nan() -> None:
    """Two in a byte; torch has nothing that looks at them."""
    packed = torch.full((4,), 255, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    assert finite(bare({"model/w": packed, "o/state/w/exp_avg_sq": packed})) is None
    assert nonnegative(bare({"o/state/w/exp_avg_sq": packed})) is None


def test_more_than_one_block_is_looked_at() -> None:
    """Of 8-bit floats, which are looked at in blocks, and of others, where they are counted so."""
    for dtype in (torch.float8_e5m2, torch.float32):
        values = torch.zeros((1 << 22) + 9)
        values[-1], values[-3] = INF, math.nan
        said = finite(bare({"model/w": values.to(dtype)}))
        assert said == (
            f"model/w: 1 NaN and 1 infinite of {len(values)} values, the first at {(1 << 22) + 6}"
        )


class Masked(nn.Module):
    """A model with a mask, scales that are still unknown, and a parameter of its own name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        mask = torch.full((4, 4), -INF).triu(1)
        self.register_buffer("mask", mask)
        self.register_buffer("scale", torch.tensor(math.nan))
        self.register_buffer("unsaved", torch.tensor(math.nan), persistent=False)
        self.extra_state = torch.tensor([INF])

    def get_extra_state(self) -> Tensor:
        return self.extra_state

    def set_extra_state(self, state: Tensor) -> None:
        self.extra_state = state

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(x)
        return found


class Watcher:
    """A user's object: what is best as yet."""

    def __init__(self) -> None:
        self.state = {"best": torch.tensor(INF), "worst": torch.tensor(-INF)}

    def state_dict(self) -> dict[str, Tensor]:
        return self.state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.state = state


def test_what_may_hold_anything_is_no_alarm() -> None:
    """Masks, statistics that have seen nothing, schedulers and user objects whose best is inf,
    ``extra``; wrapped, nested and tied as well."""
    model = Masked()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer)
    schedule = ReduceLROnPlateau(optimizer)
    state = {
        "model": torch.compile(model, backend="eager"),
        "nested": {"others": [Masked(), nn.DataParallel(Masked())]},
        "optimizer": optimizer,
        "schedule": schedule,
        "watcher": Watcher(),
        "best": {"value": INF},
    }
    assert silent(state, extra={"best": torch.tensor(INF), "weight": model.linear.weight.detach()})
    assert silent(state, extra=torch.tensor(math.nan))
    with torch.no_grad():
        model.linear.weight[0, 0] = math.nan
    assert "model/linear.weight: 1 NaN" in str(finite(staged(state)))


class Renaming(nn.Linear):
    """A module that gives its state under names of its own."""

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        found = super().state_dict(*args, **options)
        return {f"own.{key}": value.detach() for key, value in found.items()}


class Halving(nn.Linear):
    """A layer that stores its weight in bfloat16, and its mask as it is."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight.detach().bfloat16()


def copying(model: nn.Module) -> nn.Module:
    """A model whose state is a copy of what it has."""

    def copied(module: nn.Module, state: dict[str, Any], prefix: str, about: Any) -> dict[str, Any]:
        return {key: value.clone() for key, value in state.items()}

    model._register_state_dict_hook(copied)
    return model


class Shadowed(nn.Linear):
    """A layer that stores its weight as a buffer only, and that as a copy where it is asked to."""

    copies = False

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("shadow", self.weight.detach())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        shadow = self.shadow.clone() if self.copies else self.shadow
        destination[prefix + "shadow"] = shadow


class Shadowing(Shadowed):
    """The same, with a copy."""

    copies = True


class Restating(nn.Linear):
    """A layer that gives its weight as extra state, and another thing beside it."""

    def get_extra_state(self) -> dict[str, Any]:
        return {"weight": self.weight.detach(), "best": torch.tensor(INF)}

    def set_extra_state(self, state: Any) -> None:
        pass

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "_extra_state"] = self.get_extra_state()


MASKED: Mapping[str, Any] = {
    "a hook that copies": lambda: copying(nn.Sequential(nn.Linear(3, 3))),
    "names of its own": lambda: Renaming(3, 3),
    "a copy of another dtype": lambda: nn.Sequential(Halving(3, 3)),
    "a buffer that is the weight": lambda: nn.Sequential(Shadowed(3, 3)),
    "a copy of a buffer that is the weight": lambda: nn.Sequential(Shadowing(3, 3)),
    "the weight as extra state": lambda: nn.Sequential(Restating(3, 3)),
}


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel], ids=["bare", "wrapped"])
def test_weights_are_looked_at_whatever_state_dict_makes_of_them(kind: str, wrap: Any) -> None:
    """By no name and no identity of theirs; and a mask of such a model is still no alarm."""
    model = MASKED[kind]()
    model.register_buffer("mask", torch.full((3, 3), -INF).triu(1))
    state = {"model": wrap(model)}
    assert silent(state)
    with torch.no_grad():
        next(model.parameters())[0, 0] = math.nan
    assert ": 1 NaN" in str(finite(staged(state)))


def test_weights_are_looked_at_where_an_object_gives_them_first() -> None:
    """What is tied is stored once, under the first of its paths: here that of a user's object."""
    weight, watcher = nn.Parameter(torch.ones(2)), Watcher()
    watcher.state["weight"] = weight.detach()
    state = {"watcher": watcher, "box": {"w": weight}}
    assert silent(state)
    with torch.no_grad():
        weight[0] = math.nan
    assert str(finite(staged(state))).startswith("watcher/weight: 1 NaN")


def test_a_buffer_excuses_nobody_elses_tensor() -> None:
    """A moment and an average in a box that are buffers, too, stored under any of their names; and
    a mask that several modules have stays what it is."""
    state = trained()
    average = {"w": torch.ones(3)}
    state |= {"box": average, "others": [nn.Module(), nn.Module()]}
    state["model"].register_buffer("seen", moment(state, "exp_avg"))
    for other in state["others"]:
        other.register_buffer("average", average["w"])
        other.register_buffer("mask", torch.full((2,), -INF))
    state["others"][1].mask = state["others"][0].mask
    assert silent(state)
    average["w"][0] = math.nan
    assert str(finite(staged(state))).startswith("others[0]/average: 1 NaN")
    average["w"][0] = 1.0
    moment(state, "exp_avg")[0, 0] = math.nan
    assert str(finite(staged(state))).startswith("model/seen: 1 NaN")


@pytest.mark.parametrize("held", ["tensor", "box", "module"])
def test_a_component_that_is_called_like_an_entry_of_another_is_looked_at(held: str) -> None:
    """``best[0]`` is no part of ``best``, which may hold anything."""
    weight = nn.Parameter(torch.ones(3))
    values = {"tensor": weight, "box": {"a": weight}, "module": nn.ParameterList([weight])}
    state = {"best": Watcher(), "best[0]": values[held]}
    assert silent(state)
    with torch.no_grad():
        weight.fill_(math.nan)
    assert str(finite(staged(state))).startswith("best[0]")


def test_what_only_looks_like_extra_state_is_looked_at() -> None:
    """A module that has none, and calls something so."""

    class Odd(nn.Linear):
        def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
            return {"_extra_state": self.weight.detach().clone()}

    model = Odd(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = math.nan
    assert str(finite(staged({"model": model}))).startswith("model/_extra_state: 1 NaN")


def test_modules_of_parts_without_memory_are_captured() -> None:
    """A sparse parameter that the state leaves out lies nowhere."""

    class Leaving(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.sparse = nn.Parameter(torch.eye(2).to_sparse())

        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            destination[prefix + "weight"] = self.weight

    assert silent({"model": Leaving()})


def test_boxes_of_tensors_are_looked_at() -> None:
    """Parameters that stand by themselves, and masters in a dict."""
    assert "box/w: 1 NaN" in str(finite(staged({"box": {"w": torch.tensor(math.nan)}})))
    parameter = nn.Parameter(torch.tensor([INF]))
    assert str(finite(staged({"free": [parameter]}))).startswith("free[0]: 0 NaN and 1")


FLAT = [np.float16, np.float32, ">f4", np.float64, np.complex64]


@pytest.mark.parametrize("dtype", FLAT, ids=str)
def test_numpy_arrays_in_boxes_are_looked_at(dtype: Any) -> None:
    """As tensors are, in every order of bytes and of elements; what can be no NaN is passed over,
    and so is a number, such as the best as yet."""
    whole = np.ones((3, 2), dtype=dtype)
    box = {"w": [whole.T, np.zeros((0, 2), dtype), np.ones((), dtype)], "best": np.float64(INF)}
    box |= {"n": np.arange(3), "s": np.array(["x"]), "t": np.array("NaT", "M8[s]")}
    state: dict[str, Any] = {"box": box, "watcher": Watcher()}
    assert silent(state, extra={"at": np.array([math.nan])})
    whole[1, 1] = math.nan
    assert finite(staged(state)) == ("box/w[0]: 1 NaN and 0 infinite of 6 values, the first at 4")
    state["watcher"].state["seen"] = np.array([math.nan])
    whole[1, 1] = 1
    assert silent(state)


def test_records_of_numpy_are_looked_at_field_by_field() -> None:
    """Those in fields, too, and a table in a field."""
    inner = np.dtype([("x", ">f8"), ("t", "M8[s]")])
    table = np.zeros(3, dtype=[("n", "i4"), ("w", "f2", (2,)), ("in", inner), ("s", "U3")])
    state = {"box": {"all": table}}
    assert silent(state)
    table["in"]["x"][1] = math.nan
    assert finite(staged(state)) == "box/all/in/x: 1 NaN and 0 infinite of 3 values, the first at 1"
    table["in"]["x"][1] = 0
    table["w"][2, 1] = INF
    assert finite(staged(state)) == "box/all/w: 0 NaN and 1 infinite of 6 values, the first at 5"


@pytest.mark.parametrize("kind", [AdamW, lambda p, lr: Ordered(p, lr=lr)], ids=["named", "ordered"])
def test_a_hyperparameter_that_is_nan_is_refused(kind: Any) -> None:
    """It makes all of the weights NaN at the next step; one that is infinite is a bound."""
    state = trained(kind)
    group = state["optimizer"].param_groups[0]
    group["bound"], group["scale"] = INF, np.float32(-INF)
    assert silent(state)
    group["scale"] = np.float32(math.nan)
    assert finite(staged(state)) == "optimizer/param_groups[0]/scale: it is nan"
    group["scale"], group["betas"] = 1.0, (0.9, math.nan)
    assert finite(staged(state)) == "optimizer/param_groups[0]/betas[1]: it is nan"


def test_zeros_are_sound() -> None:
    """LoRA's B, padding, embeddings that were never looked up, moments of unused parameters."""
    model = nn.Sequential(nn.Embedding(8, 4, padding_idx=0), nn.Linear(4, 4))
    nn.init.zeros_(model[1].weight)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    model[0](torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert silent({"model": model, "optimizer": optimizer})


def test_shapes_without_elements_are_sound() -> None:
    """Empty shards of FSDP, scalars, and a fresh optimizer."""
    model = nn.ParameterDict({"none": nn.Parameter(torch.zeros(0, 3)), "one": torch.tensor(1.0)})
    optimizer = AdamW(model.parameters(), lr=1e-3)
    assert silent({"model": model, "optimizer": optimizer})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert silent({"model": model, "optimizer": optimizer})
    assert silent({"nothing": {}})


# --- nonnegative --------------------------------------------------------------------------------


def test_a_second_moment_below_zero_is_refused() -> None:
    state = trained(AdamW, amsgrad=True)
    assert silent(state)
    moment(state, "exp_avg_sq")[0, 0] = -1e-30
    assert nonnegative(staged(state)) == (
        "optimizer/state/0.weight/exp_avg_sq: its least value is -1e-30, and it is made of squares"
    )
    state = trained(AdamW, amsgrad=True)
    moment(state, "max_exp_avg_sq")[0, 0] = -1.0
    assert "max_exp_avg_sq" in str(nonnegative(staged(state)))


class Ordered(Adam):
    """An optimizer with a state_dict of its own: its state goes by the order of parameters."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict()


@pytest.mark.parametrize(
    ("kind", "key", "where"),
    [
        (torch.optim.RMSprop, "square_avg", "state/0.weight"),
        (torch.optim.Adadelta, "square_avg", "state/0.weight"),
        (torch.optim.Adagrad, "sum", "state/0.weight"),
        (torch.optim.Adafactor, "row_var", "state/0.weight"),
        (torch.optim.Adafactor, "col_var", "state/0.weight"),
        (Ordered, "exp_avg_sq", "state[0]"),
    ],
)
def test_squares_of_other_optimizers_are_not_below_zero(
    kind: type[Optimizer], key: str, where: str
) -> None:
    """By torch's own names for them, and by order where an optimizer has its own state_dict."""
    state = trained(kind)
    assert silent(state)
    moment(state, key).view(-1)[0] = -1.0
    assert str(nonnegative(staged(state))).startswith(f"optimizer/{where}/{key}: its least")


def test_adafactors_variance_is_not_below_zero() -> None:
    """What it keeps of a bias, which has no rows."""
    state = trained(torch.optim.Adafactor)
    bias = state["model"][0].bias
    state["optimizer"].state[bias]["variance"][0] = -1.0
    assert "0.bias/variance" in str(nonnegative(staged(state)))


class Dual(Optimizer):
    """Dual averaging, and what else may bear such names: signed sums and a velocity."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            for key in ("sum", "variance", "row_var", "col_var", "v_buffer"):
                self.state[parameter][key] = -torch.ones_like(parameter)


def test_a_sum_that_is_not_adagrads_may_be_below_zero() -> None:
    """What a key means its optimizer says: that is known by the hyperparameters of its group."""
    assert silent(trained(Dual))


def test_squares_are_found_where_they_go_by_order() -> None:
    """Adagrad with a state_dict of its own, in its second group, too."""

    class Own(torch.optim.Adagrad):
        def state_dict(self) -> dict[str, Any]:
            return super().state_dict()

    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = Own([{"params": [weight]} for weight in weights])
    state = {"w": weights, "optimizer": optimizer}
    assert silent(state)
    optimizer.state[weights[1]]["sum"][0] = -1.0
    assert str(nonnegative(staged(state))).startswith("optimizer/state[1]/sum: its least")


def test_a_sum_that_is_no_optimizers_may_be_below_zero() -> None:
    """A box may have any names."""
    held = {"state": {"w": {"sum": -torch.ones(2), "variance": -torch.ones(2)}}}
    assert nonnegative(staged({"box": held} | trained())) is None


def test_first_moments_and_weights_may_be_below_zero() -> None:
    """Also a user's own parameter of that name; and -0.0 is not below 0."""
    state = trained()
    moment(state, "exp_avg").fill_(-1.0)
    moment(state, "exp_avg_sq").fill_(1.0)[0, 0] = -0.0
    assert nonnegative(staged(state)) is None
    model = nn.ParameterDict({"exp_avg_sq": nn.Parameter(-torch.ones(2))})
    assert nonnegative(staged({"model": {"learned": model}})) is None


# --- moments: what it finds ---------------------------------------------------------------------


@pytest.mark.parametrize("betas", BETAS)
def test_moments_that_no_gradients_give_are_refused(betas: tuple[float, float]) -> None:
    """Half of v lost, v of a parameter with much smaller gradients, one element alone."""
    state = trained(betas=betas)
    assert silent(state)
    second = moment(state, "exp_avg_sq")
    kept = second.clone()
    second[:2] = 0
    said = str(moments(staged(state)))
    assert said.startswith("optimizer/state/0.weight/: 8 of 16 first moments are too large")
    second.copy_(kept).mul_(1e-6)
    assert "16 of 16" in str(moments(staged(state)))
    second.copy_(kept)[3, 3] *= 1e-6
    assert "1 of 16" in str(moments(staged(state)))
    second.copy_(kept)
    assert silent(state)


def test_a_second_moment_below_zero_is_as_good_as_none() -> None:
    state = trained()
    moment(state, "exp_avg_sq").neg_()
    assert "16 of 16" in str(moments(staged(state)))


def steepest(betas: tuple[float, float], steps: int = 300) -> tuple[nn.Parameter, AdamW]:
    """A training whose gradients were (b1/b2)^k, k steps back: none has a larger |m|/sqrt(v)."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = AdamW([weight], lr=1e-3, betas=betas)
    for k in reversed(range(steps)):
        weight.grad = torch.full((2,), (betas[0] / betas[1]) ** k)
        optimizer.step()
    return weight, optimizer


def test_a_counter_that_is_too_small_is_found() -> None:
    """After one step |m| is K_1 sqrt(v) at most, and K_1 = 3.2 at the default betas."""
    weight, optimizer = steepest((0.9, 0.999))
    state = {"w": [weight], "optimizer": optimizer}
    assert silent(state)
    optimizer.state[weight]["step"].fill_(1.0)
    assert "2 of 2" in str(moments(staged(state)))


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.9999), (0.95, 0.999)])
def test_the_bound_is_reached_and_not_passed(betas: tuple[float, float]) -> None:
    """The gradients that are worst come as near as rounding; more is found, where the bound is
    not below that of torch's defaults."""
    weight, optimizer = steepest(betas)
    state = {"w": [weight], "optimizer": optimizer}
    assert silent(state)
    optimizer.state[weight]["exp_avg"].mul_(1.0001)
    assert ("2 of 2" in str(moments(staged(state)))) == (betas != (0.95, 0.999))


def test_what_is_between_the_two_bounds_is_missed() -> None:
    """At (0.9, 0.95) no training gives more than 1.2 sqrt(v); 7.2 sqrt(v) is passed all the same,
    for it may have been at (0.9, 0.999) before."""
    weight, optimizer = steepest((0.9, 0.95))
    state = {"w": [weight], "optimizer": optimizer}
    first, second = (optimizer.state[weight][key] for key in ("exp_avg", "exp_avg_sq"))
    first.copy_(second.sqrt() * 7.2)
    assert silent(state)
    first.copy_(second.sqrt() * 7.3)
    assert "2 of 2" in str(moments(staged(state)))


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.98), (0.8, 0.9), (0.95, 0.98), (0.0, 0.9)])
@pytest.mark.parametrize("steps", [1, 5, 50, 300])
def test_a_restart_with_other_betas_is_not_refused(betas: tuple[float, float], steps: int) -> None:
    """As restore(keep_live=("betas",)) makes one after torch's defaults: a process that knows
    nothing of before sees all that comes."""
    weight, optimizer = steepest((0.9, 0.999), steps)
    state = {"w": [weight], "optimizer": optimizer}
    optimizer.param_groups[0]["betas"] = betas
    assert silent(state)
    for gradient in (0.0, 0.0, 1.0, -1e-3, *[0.0] * 20):
        weight.grad = torch.full((2,), gradient)
        optimizer.step()
        assert silent(state)


def test_what_has_no_known_bound_is_left_alone() -> None:
    """Low precision, betas with b1^2 >= b2, decay rates in tensors, other optimizers."""
    for options in ({"betas": (0.99, 0.98)}, {"betas": (0.95, 0.9025)}, {"betas": (0.5, 0.0)}):
        assert silent(trained(AdamW, **options))
    betas = torch.tensor(0.9), torch.tensor(0.999)
    assert silent(trained(AdamW, betas=betas, capturable=False, foreach=False))
    for kind in (SGD, torch.optim.Adamax, torch.optim.Adagrad, torch.optim.Adafactor):
        assert silent(trained(kind))


@pytest.mark.parametrize("kind", [Adam, AdamW, NAdam, RAdam])
def test_all_that_keep_adams_moments_are_looked_at(kind: type[Optimizer]) -> None:
    """Torch's own, wherever they stand."""
    state = {"opts": [trained(kind)]}
    assert silent(state)
    moment(state["opts"][0], "exp_avg_sq").zero_()
    said = str(moments(staged(state)))
    assert said.startswith("opts[0]/optimizer/state/0.weight/: 16 of 16")


class Own(Optimizer):
    """Moments under Adam's keys that mean something else: of what was divided already."""

    def __init__(self, parameters: Any, lr: float, betas: Any = (0.9, 0.9999)) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas})

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {
                "step": torch.tensor(1.0),
                "exp_avg": torch.ones_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


class Derived(AdamW):
    """As much AdamW as can be, with another step."""

    step = Own.step


@pytest.mark.parametrize("kind", [Own, Derived, Ordered])
def test_moments_of_optimizers_that_are_not_known_are_left_alone_and_that_is_said(
    kind: type[Optimizer], caplog: pytest.LogCaptureFixture
) -> None:
    """Once, whatever is called AdamW beside them; theirs may be anything but below zero."""
    sound = trained()
    state = {"its": sound["optimizer"], "net": sound["model"]} | trained(kind)
    _say.cache_clear()
    for _ in range(3):
        assert silent(state)
    assert [record.getMessage() for record in caplog.records] == [
        "moments: optimizer is left alone: what its exp_avg and exp_avg_sq mean is not known"
    ]
    sound["optimizer"].state[sound["model"][0].weight]["exp_avg_sq"].zero_()
    assert str(moments(staged(state))).startswith("its/state/0.weight/: 16 of 16")


# --- moments: silence ---------------------------------------------------------------------------


def gradients(count: int) -> Iterator[Tensor]:
    """Each column is one way in which gradients come: steady, sparse, adverse, huge, vanishing."""
    draw = torch.Generator().manual_seed(1)
    for step in range(count):
        noise = torch.randn(3, generator=draw).tolist()
        rare = 1.0 if step % 97 == 0 else 0.0
        yield torch.tensor([
            1.0, 0.0, rare, -rare, noise[0], 1e-3 * noise[1], (0.9 / 0.999) ** (count - step),
            (0.9 / 0.95) ** (count - step), 1e18 * rare, 1e25 * noise[2], 10.0 ** -(step % 60),
            rare * 10.0 ** -(step % 46), 1e-18, 3e-18, 1e-19 * noise[0], 1e-20, 3e-22, 1e-23, 1e-30,
            1e-38, 1e-42, 1.5e-45, math.sin(step / 7), 1.01 ** step * 1e-20, float(step == 3),
        ])  # fmt: skip


@pytest.fixture(params=[False, True], ids=["denormals", "flushed"])
def flushed(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Numbers below the normal ones as IEEE has them, and as set_flush_denormal(True) has."""
    if not torch.set_flush_denormal(request.param):
        pytest.skip("this processor knows no such mode")
    yield request.param
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("betas", [*BETAS, (0.9, 0.99999), (0.0, 0.9), (0.99, 0.999)])
@pytest.mark.parametrize(
    "options",
    [
        {"foreach": True},
        {"foreach": False, "amsgrad": True},
        {"fused": True, "weight_decay": 0.1},
        {"foreach": False, "maximize": True},
    ],
    ids=str,
)
def test_no_training_is_refused(
    betas: tuple[float, float], options: dict[str, Any], flushed: bool
) -> None:
    """400 steps of AdamW, held against its own bound after every one of them."""
    weight = nn.Parameter(torch.ones(25))
    optimizer = AdamW([weight], lr=1e-3, betas=betas, **options)
    group = optimizer.param_groups[0]
    plain = {"": {"o": "optimizer"}, "o": {"param_groups": [{"betas": betas, "params": ["w"]}]}}
    encoded = objects.encode(plain)
    assert group["betas"] == betas
    for gradient in gradients(400):
        weight.grad = gradient
        optimizer.step()
        held = {f"o/state/w/{key}": value for key, value in optimizer.state[weight].items()}
        seen = Staged(Epoch(1, 1), held, encoded, OURS)
        assert len(list(seen.moments())) == 1
        assert moments(seen) is None
        assert nonnegative(seen) is None


@pytest.mark.parametrize("kind", [Adam, NAdam, RAdam])
@pytest.mark.parametrize("betas", BETAS)
def test_kin_of_adam_is_not_refused(kind: type[Optimizer], betas: tuple[float, float]) -> None:
    """They have Adam's moments, and so its bound."""
    weight = nn.Parameter(torch.ones(25))
    optimizer = kind([weight], lr=1e-3, betas=betas)  # each has betas
    for number, gradient in enumerate(gradients(200)):
        weight.grad = gradient
        optimizer.step()
        if number % 20 == 0:
            assert moments(staged({"w": [weight], "optimizer": optimizer})) is None


def test_sparse_gradients_are_not_refused() -> None:
    """SparseAdam leaves rows alone that a batch does not use, and counts for all."""
    table = nn.Embedding(16, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=1e-2)
    state = {"model": table, "optimizer": optimizer}
    for step in range(200):
        optimizer.zero_grad()
        (table(torch.tensor([step % 16 if step % 5 else 3])) * (1 + step % 7)).sum().backward()
        optimizer.step()
        if step % 10 == 0:
            assert silent(state)
    optimizer.state[table.weight]["exp_avg_sq"].zero_()
    assert "first moments are too large" in str(moments(staged(state)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("betas", BETAS)
def test_other_dtypes_are_not_refused(dtype: torch.dtype, betas: tuple[float, float]) -> None:
    """A bfloat16 v stands still, or falls to 0, long before its m does."""
    weight = nn.Parameter(torch.ones(25, dtype=dtype))
    optimizer = AdamW([weight], lr=1e-3, betas=betas)
    for number, gradient in enumerate(gradients(300)):
        weight.grad = gradient.to(dtype).nan_to_num(posinf=1.0, neginf=-1.0)
        optimizer.step()
        if number % 20 == 0:
            assert moments(staged({"w": [weight], "optimizer": optimizer})) is None


def test_moments_of_eight_bits_are_not_refused() -> None:
    """As torchao and bitsandbytes have them: codes, or 8-bit floats, beside their scales."""
    for dtype in (torch.uint8, torch.float8_e4m3fn, torch.int8):
        held = {
            "o/state/w/exp_avg": torch.ones(4).to(dtype),
            "o/state/w/exp_avg_sq": torch.zeros(4).to(dtype),
            "o/state/w/step": torch.tensor(5.0),
        }
        plain = {"param_groups": [{"betas": (0.9, 0.999), "params": ["w"]}]}
        seen = bare(held, o=plain)
        seen.objects[""]["o"] = "optimizer"
        assert len(list(seen.moments())) == 1
        assert all(ask(seen) is None for ask in ALL.values())


@pytest.mark.parametrize("schedule", [OneCycleLR, CyclicLR])
def test_betas_that_cycle_are_not_refused(schedule: type[Any]) -> None:
    """Both schedulers move beta1 at every step."""
    weight = nn.Parameter(torch.ones(25))
    optimizer = AdamW([weight], lr=1e-3, betas=(0.9, 0.95))
    options: dict[str, Any] = {"max_lr": 1e-2}
    if schedule is OneCycleLR:
        options |= {"total_steps": 200}
    else:
        options |= {"base_lr": 1e-3, "step_size_up": 10, "base_momentum": 0.1}
    cycle = schedule(optimizer, **options)
    rates: dict[str, tuple[float, float]] = {}
    for gradient in gradients(200):
        weight.grad = gradient
        optimizer.step()
        cycle.step()
        assert moments(staged({"w": [weight], "optimizer": optimizer}, rates)) is None


def test_betas_that_are_changed_by_hand_are_not_refused() -> None:
    """From 0.9999 to 0.95, just after a gradient that came alone: no bound is known for a while."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = AdamW([weight], lr=1e-3, betas=(0.9, 0.9999))
    state = {"w": [weight], "optimizer": optimizer}
    rates: dict[str, tuple[float, float]] = {}

    def step(gradient: float) -> str | None:
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        return moments(staged(state, rates))

    assert step(0.0) is None
    assert step(1.0) is None
    optimizer.param_groups[0]["betas"] = (0.9, 0.95)
    assert moments(staged(state)) is not None, "it would be refused, if it were not remembered"
    assert moments(staged(state, rates)) is None
    for _ in range(20):
        assert step(0.0) is None
    optimizer.state[weight]["exp_avg_sq"].zero_()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert moments(staged(state, rates)) is None, "what became of that group is not known"


ANY = st.floats(width=32, allow_nan=False, allow_infinity=False)
TINY = st.floats(-(2.0**-50), 2.0**-50, width=32)


@given(
    st.lists(ANY | TINY | st.just(0.0), min_size=1, max_size=40),
    st.sampled_from([*BETAS, (0.99, 0.999), (0.8, 0.7)]),
    st.booleans(),
)
def test_no_gradients_break_the_bound(
    values: list[float], betas: tuple[float, float], foreach: bool
) -> None:
    """A law over gradients of all float32 numbers that torch's own AdamW takes."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = AdamW([weight], lr=1e-3, betas=betas, foreach=foreach)
    for value in values:
        weight.grad = torch.tensor([value])
        optimizer.step()
    held = {f"o/state/w/{key}": value for key, value in optimizer.state[weight].items()}
    seen = bare(held, o={"param_groups": [{"betas": betas, "params": ["w"]}]})
    seen.objects[""]["o"] = "optimizer"
    assert moments(seen) is None


# --- masters ------------------------------------------------------------------------------------


def mastered(
    dtype: torch.dtype = torch.bfloat16, end: str = "master"
) -> tuple[nn.ParameterDict, Optimizer, Tensor]:
    """A model of low precision, its optimizer, and the master that this one keeps."""
    info = torch.finfo(dtype)
    master = torch.tensor([1.0, 1 + info.eps / 2, -1e-30, info.max * 4, -0.0, info.tiny / 3])
    model = nn.ParameterDict({"w": nn.Parameter(master.to(dtype))})
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.state[model["w"]][end] = master
    return model, optimizer, master


@torch.no_grad()
def spoilt(weight: Tensor) -> None:
    """By as little as there is."""
    weight[0] += torch.finfo(weight.dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("end", ["master", "master_param", "master_weights"])
@pytest.mark.parametrize("place", ["optimizer", "opts", "box", "module"])
def test_weights_that_are_not_their_masters_rounding_are_refused(
    dtype: torch.dtype, end: str, place: str
) -> None:
    """Wherever masters are kept; the very rounding is taken, with infinities and ties."""
    model, optimizer, master = mastered(dtype, end)
    held: Mapping[str, Mapping[str, Any]] = {
        "optimizer": {"optimizer": optimizer},
        "opts": {"opts": {"all": [optimizer]}},
        "box": {end: {"w": master}},
        "module": {end: nn.ParameterDict({"w": nn.Parameter(master)})},
    }
    state = {"model": model} | held[place]
    assert masters(staged(state)) is None
    spoilt(model["w"])
    assert masters(staged(state)) == "model/w: 1 of 6 values are not their master's rounding"


@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
@pytest.mark.parametrize("trained", [True, False])
def test_a_module_of_the_same_names_has_no_part_in_anothers_masters(
    first: bool, trained: bool
) -> None:
    """An average, a reference, a discriminator with masters of its own: only of what an optimizer
    steps are its masters the masters."""
    model, optimizer, _ = mastered()
    other, of_other, _ = mastered()
    with torch.no_grad():
        for tensor in (other["w"], of_other.state[other["w"]]["master"]):
            tensor.copy_(torch.arange(6.0))
    others: dict[str, Any] = {"other": other} | ({"of_other": of_other} if trained else {})
    own = {"model": model, "optimizer": optimizer}
    state = others | own if first else own | others
    assert masters(staged(state)) is None
    spoilt(model["w"])
    assert str(masters(staged(state))).startswith("model/w: 1 of 6")
    with torch.no_grad():
        model["w"].copy_(optimizer.state[model["w"]]["master"])
    spoilt(other["w"])
    assert (masters(staged(state)) is None) == (not trained)


def test_one_optimizer_of_several_modules_has_masters_of_each() -> None:
    """Which have one name in both; where a weight stands by itself, and where a weight or a master
    is stored as somebody else's."""
    models = [mastered()[0] for _ in range(2)]
    alone = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    weights = [model["w"] for model in models] + [alone]
    optimizer = SGD(weights, lr=0.1)
    for weight in weights:
        optimizer.state[weight]["master"] = weight.detach().float()
    watcher = Watcher()
    watcher.state["weight"] = alone.detach()
    models[0].register_buffer("seen", optimizer.state[models[1]["w"]]["master"])
    state = {"watcher": watcher, "models": models, "alone": {"w": alone}, "sgd": optimizer}
    assert masters(staged(state)) is None
    for weight, path in zip(weights, ("models[0]/w", "models[1]/w", "watcher/weight"), strict=True):
        kept = weight.detach().clone()
        spoilt(weight)
        assert str(masters(staged(state))).startswith(f"{path}: 1 of")
        with torch.no_grad():
            weight.copy_(kept)


def test_masters_in_a_box_are_those_of_one_of_that_name() -> None:
    """A box does not say whose they are, so one rounding is enough, and one that is not here."""
    model, _, master = mastered()
    copy = nn.ParameterDict({"w": nn.Parameter(torch.ones(6, dtype=torch.bfloat16))})
    state = {"copy": copy, "model": model, "master": {"w": master}}
    assert masters(staged(state)) is None
    spoilt(model["w"])
    seen = staged(state)
    assert str(masters(seen)).startswith("copy/w: ")
    for path in ("model/w", "master/w"):
        rest = {key: value for key, value in seen.tensors.items() if key != path}
        assert masters(Staged(Epoch(1, 5), rest, seen._encoded, seen.known)) is None


def test_what_is_no_master_is_no_alarm() -> None:
    """Of another shape or dtype, of another name, or none at all; and float32 has none."""
    low = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    for dtype, key, size in (
        (torch.float32, "master", 2),
        (torch.float64, "master", 3),
        (torch.float32, "masters", 3),
        (torch.float32, "exp_avg", 3),
    ):
        optimizer = SGD([low], lr=0.1)
        optimizer.state[low][key] = torch.zeros(size, dtype=dtype)
        model = nn.ParameterDict({"w": low})
        assert masters(staged({"model": model, "optimizer": optimizer})) is None
        box = {key: {"w": torch.zeros(size, dtype=dtype)}}
        assert masters(staged({"model": model} | box)) is None
    assert masters(staged({"model": model, "master": {"v": torch.zeros(3)}})) is None
    model["w"] = nn.Parameter(torch.ones(3))
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.state[model["w"]]["master"] = torch.zeros(3)
    state = {"model": model, "master": {"w": torch.zeros(3)}, "optimizer": optimizer}
    assert masters(staged(state)) is None


# --- loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given_",
    [
        {"loss": 1.5},
        {"loss": 0},
        {"loss": np.float32(2.0)},
        {"loss": torch.tensor(0.5)},
        {"loss": torch.tensor([0.5], dtype=torch.bfloat16), "else": torch.ones(3)},
    ],
    ids=str,
)
def test_a_loss_that_is_a_number_is_sound(given_: dict[str, Any]) -> None:
    """As trainings have it: a float, NumPy's, or a tensor that nobody called item() of."""
    assert loss(staged({"box": {"n": 1}}, extra=given_)) is None


@pytest.mark.parametrize(
    ("given_", "why"),
    [
        (None, "gives no loss, but None"),
        ({}, "gives no loss, but None"),
        (3.0, "gives no loss, but None"),
        ({"loss": None}, "gives no loss, but None"),
        ({"loss": "low"}, "gives no loss, but 'low'"),
        ({"loss": torch.ones(2)}, "gives no loss, but tensor"),
        ({"loss": math.nan}, "the loss is nan"),
        ({"loss": -INF}, "the loss is -inf"),
        ({"loss": torch.tensor(math.nan)}, "the loss is nan"),
    ],
    ids=str,
)
def test_a_loss_that_is_none_is_refused(given_: Any, why: str) -> None:
    assert why in str(loss(staged({"box": {"n": 1}}, extra=given_)))


# --- what a validator is given ------------------------------------------------------------------


class Private:
    """A type that only the trainer knows how to read."""


def test_what_only_the_trainer_can_read_hides_nothing_else() -> None:
    """Pickles are not read, and types that were registered there are not known here: moments and
    loss are looked at all the same, and nothing is refused for it."""
    handfast.register(Private, lambda _: {"n": 1}, lambda _: Private())
    state = trained() | {"own": {"held": Private(), "all": {1, 2}}, "odd": {"code": print}}
    options: dict[str, Any] = {"extra": {"loss": 1.0, "own": Private()}, "pickle": ("odd/code",)}
    sound = staged(state, **options)
    moment(state, "exp_avg_sq").zero_()
    wrong = staged(state, **options)
    del objects._BY_NAME[objects._REGISTRY.pop(Private).name]
    assert not [name for name, ask in ALL.items() if ask(sound)]
    assert loss(sound) is None
    assert sound.objects["odd"]["code"].startswith("<odd/code ")
    assert sound.objects["own"]["all"] == {1, 2}
    assert "16 of 16" in str(moments(wrong))


def test_a_users_validator_sees_all_that_the_training_gave() -> None:
    """By path, in its dtypes and shapes; the objects as plain values."""
    state = trained() | {"counts": {"tokens": 7}}
    seen = staged(state, extra={"best": torch.ones(2), "name": "x"})
    assert (seen.generation, seen.step) == (1, 5)
    assert torch.equal(seen.tensors["model/0.weight"], state["model"][0].weight)
    assert seen.objects["counts"] == {"tokens": 7}
    assert torch.equal(seen.extra["best"], torch.ones(2))
    assert seen.extra["name"] == "x"
    assert set(seen.values()) >= {"model/0.weight", "optimizer/state/0.weight/exp_avg"}
    assert "model/1.running_mean" in seen.apart
    assert seen.ends("model/1.num_batches_tracked") == (5.0, 5.0)


# --- names --------------------------------------------------------------------------------------


def test_a_validator_is_found_by_its_name() -> None:
    """Short names, functions, and what hangs on a class."""
    assert [find(name) for name in ("finite", "nonnegative", "moments", "masters", "loss")] == [
        finite, nonnegative, moments, masters, loss,
    ]  # fmt: skip
    assert find("math:isnan") is math.isnan
    assert find("collections:OrderedDict.fromkeys")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("finit", "one of 'finite', 'nonnegative'"),
        ("", "one of 'finite'"),
        ("__main__:check", "another process"),
        ("no.such.module:check", "ModuleNotFoundError"),
        ("math:no_such", "AttributeError"),
        ("math:", "AttributeError"),
        (":isnan", "Empty module name"),
        ("math:pi", "is a float, and no function"),
        (".relative:check", "TypeError"),
        ("broken_on_import:check", "ZeroDivisionError"),
    ],
)
def test_a_name_that_leads_nowhere_is_a_value_error(
    name: str, why: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At construction, in the trainer, where somebody reads it."""
    (tmp_path / "broken_on_import.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="validator") as caught:
        find(name)
    assert why in str(caught.value)
