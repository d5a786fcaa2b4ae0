"""Shows what a restore leaves behind: every part of one epoch, in the order that makes it exact."""

import contextlib
import logging
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from statekit import Snapshot, same_bytes, train
from torch import nn

from handfast.errors import Poisoned, Refused
from handfast.torch.apply import apply
from handfast.torch.capture import capture
from handfast.torch.compare import refuse
from handfast.torch.group import Group
from handfast.torch.prime import prime
from handfast.torch.stage import stage

L = torch.optim.lr_scheduler


class Decay:
    """A callable with a state of its own, which LambdaLR saves."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, epoch: int) -> float:
        return float(self.rate**epoch)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: L.LambdaLR(o, lambda epoch: 0.9**epoch),
    "callable": lambda o: L.LambdaLR(o, Decay(0.5)),
    "multi step": lambda o: L.MultiStepLR(o, [2, 4, 4]),
    "one cycle": lambda o: L.OneCycleLR(o, 0.1, total_steps=20),
    "cyclic": lambda o: L.CyclicLR(o, 0.1, 0.2, step_size_up=3),
    "plateau": lambda o: L.ReduceLROnPlateau(o, patience=1),
    "sequential": lambda o: L.SequentialLR(o, [L.LinearLR(o), L.CosineAnnealingLR(o, 9)], [3]),
    "restarts": lambda o: L.CosineAnnealingWarmRestarts(o, 3),
    "chained": lambda o: L.ChainedScheduler([L.ExponentialLR(o, 0.9), L.ConstantLR(o)]),
}


def scheduled(name: str, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(4, 4)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return {"scheduler": SCHEDULERS[name](opt), "model": model, "opt": opt}


def rates(state: dict[str, Any], steps: int) -> list[float]:
    """The learning rates of some more steps."""
    found = []
    for step in range(steps):
        train(state["model"], state["opt"])
        args = (1.0 + step,) if isinstance(state["scheduler"], L.ReduceLROnPlateau) else ()
        state["scheduler"].step(*args)
        found.append(state["opt"].param_groups[0]["lr"])
    return found


@pytest.mark.filterwarnings("ignore:Please also save or load the state")  # which is done
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on_where_they_were(name: str) -> None:
    """Int keys of milestones, inf of plateaus, lambdas that no file can hold."""
    one, other = scheduled(name, 0), scheduled(name, 1)
    rates(one, 5)
    Snapshot(one).restore(other)
    assert rates(other, 6) == rates(one, 6)


def test_keep_live_reaches_into_a_scheduler() -> None:
    """The rate that a scheduler starts from is its own: keeping lr alone would last one step."""
    one, other = scheduled("lambda", 0), scheduled("lambda", 1)
    rates(one, 2)
    other["opt"].param_groups[0].update(lr=0.5, initial_lr=0.5)
    other["scheduler"].base_lrs = [0.5]
    Snapshot(one).restore(other, keep_live=("lr", "initial_lr", "scheduler/base_lrs"))
    assert other["scheduler"].last_epoch == 2
    assert rates(other, 1) == [0.5 * 0.9**3]


def test_grad_scaler_and_ema_copy() -> None:
    """Loss scale, growth tracker and averaged weights are of the same epoch as the model."""

    def build(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Linear(4, 4)
        ema = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
        return {
            "scaler": torch.amp.GradScaler("cpu", growth_interval=3),
            "model": model,
            "ema": ema,
        }

    one, other = build(0), build(1)
    opt = torch.optim.SGD(one["model"].parameters())
    for _ in range(4):
        opt.zero_grad()
        one["scaler"].scale(one["model"](torch.ones(2, 4)).sum()).backward()
        one["scaler"].step(opt)
        one["scaler"].update()
        one["ema"].update_parameters(one["model"])
    Snapshot(one).restore(other)
    assert other["scaler"].state_dict() == one["scaler"].state_dict()
    assert other["scaler"].get_scale() == 2 * 65536
    assert other["ema"].n_averaged == 4
    assert same_bytes(other["ema"].module.weight, one["ema"].module.weight)


class Loader:
    """Behaves as torchdata's: making its iterator draws a seed, and so does reading it back."""

    def __init__(self, size: int = 20, *, lost: int = 0) -> None:
        self.size, self.lost = size, lost
        self.at: Iterator[int] | None = None
        self.done = 0

    def __iter__(self) -> Iterator[int]:
        self._start()
        while self.done < self.size:
            self.done += 1
            yield self.order[self.done - 1]

    def _start(self) -> None:
        if self.at is None:
            torch.randint(2**31, ())  # the seed of its workers
            self.at = iter(())

    def state_dict(self) -> dict[str, Any]:
        self._start()
        return {"done": self.done, "order": self.__dict__.setdefault("order", [*range(self.size)])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = None
        self.done, self.order = state["done"] - self.lost, list(state["order"])


def test_reading_a_loader_back_shifts_no_later_dropout_mask() -> None:
    """The random streams come last: else the first mask after a resume is another one."""
    loader = Loader()
    state = {"loader": loader, "model": nn.Dropout()}
    loader.state_dict()
    batches = iter(loader)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    saved = Snapshot(state)
    masks = [torch.rand(4) for _ in range(2)]
    fresh = {"loader": Loader(), "model": nn.Dropout()}
    torch.manual_seed(99)
    saved.restore(fresh)
    rest = iter(fresh["loader"])
    assert next(rest) == 3  # the batch after the last one that was consumed
    assert all(torch.equal(mask, torch.rand(4)) for mask in masks)


def test_a_loader_that_takes_up_elsewhere_is_found() -> None:
    """torchtitan#4686: the model at step 500, the loader at 501."""
    loader = Loader()
    loader.state_dict()
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    saved = Snapshot({"loader": loader})
    with pytest.raises(Poisoned, match="loader/done reads back as another value"):
        saved.restore({"loader": Loader(lost=1)})


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_iterator_from_before_the_restore_is_told_of(
    when: str, caplog: pytest.LogCaptureFixture
) -> None:
    """torchdata's goes on where it is, and the data of the first run come again, in silence."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    one, other = (StatefulDataLoader(range(9), batch_size=None) for _ in range(2))
    batches = iter(one)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    other.state_dict()  # as the Checkpointer does when it is made: nobody has that iterator
    made = iter(other) if when == "before" else iter(())
    Snapshot({"loader": one}).restore({"loader": other})
    told = "loader has an iterator that was made before" in caplog.text
    assert told == (when == "before")
    assert ("call iter(loader) after restore()" in caplog.text) == told
    if told:
        assert next(made) == 0
    assert next(iter(other)) == 3


class Counter:
    """A user's object with a state of its own; `fails` makes its load raise."""

    def __init__(self, fails: bool = False, forgets: bool = False) -> None:
        self.fails, self.forgets = fails, forgets
        self.n, self.seen = 0, torch.zeros(2, dtype=torch.bfloat16)

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n, "seen": self.seen, "nan": float("nan"), "deep": [(1, {"k": b"x"})]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.fails:
            raise RuntimeError("no room")
        self.n, self.seen = (0 if self.forgets else state["n"]), state["seen"]


def test_a_users_object_comes_back_with_tensors_of_its_own() -> None:
    """What it is given aliases neither the image nor the next restore."""
    counter, fresh = Counter(), Counter()
    counter.n, counter.seen = 2**80, torch.tensor([1.5, float("nan")], dtype=torch.bfloat16)
    saved = Snapshot({"counter": counter})
    image = bytes(saved.buffer)
    saved.restore({"counter": fresh})
    assert fresh.n == 2**80
    assert same_bytes(fresh.seen, counter.seen)
    fresh.seen.fill_(0)
    assert bytes(saved.buffer) == image


def test_a_load_that_raises_poisons_and_names_its_part() -> None:
    """The live state is of no epoch then; going on would train a mixture."""
    model = nn.Linear(2, 2)
    saved = Snapshot({"model": model, "counter": Counter()})
    with pytest.raises(Poisoned, match=r"stopped at counter: RuntimeError\('no room'\)"):
        saved.restore({"model": model, "counter": Counter(fails=True)})


def test_an_object_that_forgets_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """Its load took nothing, which may be meant: a warning, with the path."""
    counter = Counter()
    counter.n = 3
    with caplog.at_level(logging.WARNING, "handfast"):
        Snapshot({"counter": counter}).restore({"counter": Counter(forgets=True)})
    assert "counter/n reads back as another value" in caplog.text


def test_all_streams_and_generators_go_on() -> None:
    """Python, NumPy, torch, and the generators that the user holds."""

    def held() -> dict[str, Any]:
        return {
            "torch": torch.Generator(),
            "python": random.Random(3),
            "numpy": [np.random.default_rng(5), np.random.RandomState(7)],
        }

    def draw(g: dict[str, Any]) -> list[Any]:
        return [
            random.random(),
            np.random.rand(3).tolist(),
            torch.rand(3).tolist(),
            torch.rand(3, generator=g["torch"]).tolist(),
            g["python"].gauss(0, 1),
            g["numpy"][0].standard_normal(3).tolist(),
            g["numpy"][1].standard_normal(3).tolist(),
        ]

    one, other = held(), held()
    draw(one)
    saved = Snapshot({"held": one})
    expected = draw(one)
    draw(other)
    saved.restore({"held": other})
    assert draw(other) == expected


def test_without_rng_the_streams_are_left_alone() -> None:
    """An evaluation that restores weights must not disturb the run around it."""
    model = nn.Linear(2, 2)
    for saved, options in (
        (Snapshot({"model": model}, rng=False), {}),
        (Snapshot({"model": model}), {"only": ("model",)}),
    ):
        before = torch.get_rng_state()
        torch.rand(3)
        moved = torch.get_rng_state()
        saved.restore({"model": model}, **options)
        assert not torch.equal(before, moved)
        assert torch.equal(torch.get_rng_state(), moved)


def test_boxes_are_updated_in_place() -> None:
    """Whoever holds the dict, its inner list or its tensor sees the restored values."""
    box = {
        "step": 5,
        "log": [1.5, {"a": 1}],
        "w": torch.ones(2),
        "pair": (torch.full((1,), 2.0), 7),
        "new": {"t": torch.ones(3)},
        "q": deque([1, 2], 3),
        "d": defaultdict(list, {1: [2]}),
        "o": OrderedDict(b=1, a=2),
    }
    saved = Snapshot({"box": box})
    log, pair, w = [0.5, {"a": 9}, 3], (torch.zeros(1), 1), torch.zeros(2)
    inner = log[1]
    queue: deque[int] = deque(maxlen=3)
    live = {"w": w, "log": log, "pair": pair, "gone": 1, "q": queue, "d": 3, "step": 0}
    saved.restore({"box": live})
    assert list(live) == list(box)
    assert live["log"] is log
    assert log == [1.5, {"a": 1}]
    assert log[1] is inner
    assert live["w"] is w
    assert w.tolist() == [1, 1]
    assert live["pair"][0] is pair[0]
    assert pair[0].item() == 2.0
    assert live["pair"][1] == 7
    assert live["q"] is queue
    assert queue == deque([1, 2], 3)
    assert live["d"] == {1: [2]}
    assert live["d"].default_factory is list
    assert live["new"]["t"].tolist() == [1, 1, 1]
    assert live["o"] == OrderedDict(b=1, a=2)


def test_live_things_inside_of_boxes_are_restored_where_they_are() -> None:
    """Models by name in a dict, with the counters beside them."""
    one = {"gen": nn.Linear(2, 2), "all": [nn.Linear(1, 1), 4], "n": 3}
    other = {"gen": nn.Linear(2, 2), "all": [nn.Linear(1, 1), 0], "n": 0}
    kept = other["gen"]
    Snapshot({"nets": one}).restore({"nets": other})
    assert other["gen"] is kept
    assert same_bytes(kept.weight, one["gen"].weight)
    assert same_bytes(other["all"][0].weight, one["all"][0].weight)
    assert (other["all"][1], other["n"]) == (4, 3)


def test_extra_goes_along() -> None:
    """What a save was given beside the state comes back as it was."""
    extra = {"loss": 0.5, "best": torch.ones(2), "at": (1, 2)}
    back: Any = Snapshot({"model": nn.Linear(1, 1)}, extra=extra).restore(
        {"model": nn.Linear(1, 1)}
    )
    assert back["loss"] == 0.5
    assert same_bytes(back["best"], extra["best"])
    assert back["at"] == (1, 2)


class WithExtra(nn.Linear):
    """A module with state that is no tensor, and one that a hook computes."""

    count = 0

    def get_extra_state(self) -> dict[str, Any]:
        return {"count": self.count, "t": torch.full((2,), float(self.count))}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        assert state["t"].tolist() == [state["count"]] * 2
        self.count = state["count"]


def test_extra_state_of_modules() -> None:
    """get_extra_state (transformer-engine's scales, say) is part of the model."""
    one, other = nn.Sequential(WithExtra(2, 2)), nn.Sequential(WithExtra(2, 2))
    one[0].count = 3
    Snapshot({"model": one}).restore({"model": other})
    assert other[0].count == 3
    assert same_bytes(other[0].weight, one[0].weight)


def test_a_tensor_that_a_hook_computes_goes_through_load_state_dict() -> None:
    """It is no live tensor, so only the module knows what to do with it."""

    class Packed(nn.Linear):
        def _save_to_state_dict(self, into: dict[str, Any], prefix: str, keep: bool) -> None:
            into[prefix + "packed"] = self.weight.detach() * 2

        def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
            self.weight.data.copy_(state[prefix + "packed"] / 2)

    one, other = Packed(2, 2), Packed(2, 2)
    Snapshot({"model": one}).restore({"model": other})
    assert same_bytes(other.weight, one.weight)


class Halved(nn.Linear):
    """Keeps a copy of its weights in another precision, made anew after each load."""

    def __init__(self, loads: list[object]) -> None:
        super().__init__(2, 2)
        self.loads = loads
        self.register_buffer("packed", self.weight.detach().half(), persistent=False)
        self.register_load_state_dict_post_hook(self.refresh)

    def refresh(self, _module: nn.Module, found: Any) -> None:
        assert not found.missing_keys
        self.loads.append(self)
        self.packed = self.weight.detach().half()


def test_what_a_hook_makes_of_loaded_weights_is_made_anew() -> None:
    """Restored in place alone, a quantized copy stays that of the first initialization."""
    loads: list[object] = []
    one, other = nn.Sequential(Halved([])), nn.Sequential(Halved(loads))
    saved = Snapshot({"model": one, "t": torch.ones(1)})
    apply({"model": other, "t": torch.ones(1)}, saved.saved, saved.values, only=("t",))
    assert loads == []
    at = other[0].weight.data_ptr()
    saved.restore({"model": other, "t": torch.ones(1)})
    assert same_bytes(other[0].packed, one[0].weight.detach().half())
    assert other[0].weight.data_ptr() == at
    assert loads == [other[0]]


def test_tied_parameters_stay_tied() -> None:
    """And take one value, in whichever order they are named."""

    def build() -> nn.ModuleDict:
        model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False)})
        model["out"].weight = model["embed"].weight
        return model

    one, other = build(), build()
    Snapshot({"model": one, "head": one["out"]}).restore({"head": other["out"], "model": other})
    assert other["out"].weight is other["embed"].weight
    assert same_bytes(other["out"].weight, one["embed"].weight)


def test_live_tensors_keep_their_memory() -> None:
    """DDP's buckets, captured graphs and the optimizer point at it."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    saved = Snapshot({"model": model})
    held = {key: (id(t), t.data_ptr()) for key, t in model.state_dict(keep_vars=True).items()}
    saved.restore({"model": model})
    after = {key: (id(t), t.data_ptr()) for key, t in model.state_dict(keep_vars=True).items()}
    assert after == held
    assert model[0].weight.requires_grad


def test_the_same_run_with_and_without_a_break() -> None:
    """Model with dropout and batch norm, optimizer, schedule, loader and streams, bit for bit."""

    def build(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        random.seed(seed)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
        opt = torch.optim.AdamW(model.parameters(), lr=0.01)
        return {
            "loader": Loader(40),
            "model": model,
            "opt": opt,
            "scheduler": L.OneCycleLR(opt, 0.1, total_steps=40),
            "book": {"losses": []},
        }

    def go(state: dict[str, Any], steps: int) -> list[float]:
        state["loader"].state_dict()
        batches = iter(state["loader"])
        for _ in range(steps):
            x = torch.randn(6, 4) * random.random() + next(batches)
            state["opt"].zero_grad()
            loss = state["model"](x).square().mean()
            loss.backward()
            state["opt"].step()
            state["scheduler"].step()
            state["book"]["losses"].append(loss.item())
        return list(state["book"]["losses"])

    one = build(0)
    go(one, 5)
    saved = Snapshot(one)
    expected = go(one, 7)
    other = build(1)
    saved.restore(other)
    assert go(other, 7) == expected
    pairs = zip(
        one["model"].state_dict().values(), other["model"].state_dict().values(), strict=True
    )
    assert all(same_bytes(a, b) for a, b in pairs)


def test_lazily_conjugated_and_negated_tensors_take_their_values() -> None:
    """torch._foreach_copy_ refuses them; and x and x.conj() share memory without being tied."""

    def build(values: list[complex]) -> dict[str, Any]:
        base = torch.tensor(values)
        other = base.clone()
        return {"base": base, "its": base.conj(), "conj": other.conj(), "neg": other.conj().imag}

    one, two = build([1 + 2j, 3 - 4j]), build([0j, 0j])
    assert two["conj"].is_conj()
    assert two["neg"].is_neg()
    saved = Snapshot(one)
    assert saved.saved.aliases == {}
    saved.restore(two)
    for name, tensor in one.items():
        assert torch.equal(two[name], tensor), name


# Differences, found dry


def layers(*sizes: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, size, dtype=dtype) for size in sizes))


def tied(*, tie: bool) -> nn.Sequential:
    model = layers(4, 4)
    if tie:
        model[1].weight = model[0].weight
    return model


def grouped(*sizes: int) -> dict[str, Any]:
    model = layers(4, 4)
    parts = iter(model.parameters())
    groups = [{"params": [next(parts) for _ in range(size)]} for size in sizes]
    return {"model": model, "opt": torch.optim.SGD(groups, lr=0.1)}


def one_scheduler(make: Any, *args: Any, **options: Any) -> dict[str, Any]:
    return {"s": make(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), *args, **options)}


def chained(opt: torch.optim.Optimizer, names: list[str]) -> Any:
    schedulers = torch.optim.lr_scheduler
    made = {
        "StepLR": lambda: schedulers.StepLR(opt, 3),
        "ExponentialLR": lambda: schedulers.ExponentialLR(opt, 0.9),
    }
    first, second = (made[name]() for name in names)
    return schedulers.SequentialLR(opt, [first, schedulers.ChainedScheduler([second])], [5])


SEQUENCE = "scheduler:SequentialLR({}, ChainedScheduler({}))"

DIFFERENCES: dict[str, tuple[Any, Any, list[str]]] = {
    "missing": (
        {"m": layers(2, 3)},
        {"m": layers(2)},
        [
            "m/1.bias: tensor: saved float32[3], live nothing",
            "m/1.weight: tensor: saved float32[3, 4], live nothing",
        ],
    ),
    "unexpected": ({}, {"t": torch.ones(2)}, ["t: tensor: saved nothing, live float32[2]"]),
    "component": (
        {"m": nn.Sequential()},
        {"n": nn.Sequential()},
        ["m: kind: saved module, live nothing", "n: kind: saved nothing, live module"],
    ),
    "shape": ({"t": torch.ones(2)}, {"t": torch.ones(3)}, ["t: shape: saved (2,), live (3,)"]),
    "dtype": (
        {"t": torch.ones(2)},
        {"t": torch.ones(2).half()},
        ["t: dtype: saved float32, live float16"],
    ),
    "kind": (
        {"x": nn.Sequential()},
        {"x": torch.Generator()},
        ["x: kind: saved module, live generator:torch.Generator(cpu)"],
    ),
    "scheduler": (  # load_state_dict() would give one the attributes of the other
        one_scheduler(torch.optim.lr_scheduler.StepLR, step_size=3),
        one_scheduler(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=3),
        ["s: kind: saved scheduler:StepLR, live scheduler:CosineAnnealingLR"],
    ),
    "chained scheduler": (  # which passes on to each what the other had
        one_scheduler(chained, ["StepLR", "ExponentialLR"]),
        one_scheduler(chained, ["ExponentialLR", "StepLR"]),
        [
            "s: kind: saved {}, live {}".format(
                SEQUENCE.format("StepLR", "ExponentialLR"),
                SEQUENCE.format("ExponentialLR", "StepLR"),
            )
        ],
    ),
    "scaler on": (  # load_state_dict() would raise half-way, once the tensors are other ones
        {"s": torch.amp.GradScaler("cpu", enabled=False)},
        {"s": torch.amp.GradScaler("cpu", init_scale=8.0)},
        ["s: enabled scaler's scale: saved nothing, live 8.0"],
    ),
    "scaler off": (  # which would take nothing, without a word
        {"s": torch.amp.GradScaler("cpu", init_scale=8.0)},
        {"s": torch.amp.GradScaler("cpu", enabled=False)},
        ["s: enabled scaler's scale: saved 8.0, live nothing"],
    ),
    "tie gone": (
        {"m": tied(tie=True)},
        {"m": tied(tie=False)},
        ["m/1.weight: tie: saved tied to m/0.weight, live apart"],
    ),
    "tie new": (
        {"m": tied(tie=False)},
        {"m": tied(tie=True)},
        ["m/1.weight: tie: saved apart, live tied to m/0.weight"],
    ),
    "repeats": (
        {"t": torch.ones(2, 3)},
        {"t": torch.ones(2, 1).expand(2, 3)},
        ["t: stride: saved (3, 1), live (1, 0), which repeats elements"],
    ),
    "groups": (grouped(2, 2), grouped(4), ["opt: groups: saved 2 groups, live 1 groups"]),
    "parameters": (
        grouped(2),
        grouped(1),
        ["opt/param_groups[0]: parameter: saved 0.bias, live nothing"],
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences_are_found_before_anything_changes(name: str) -> None:
    """Each one by path, with both sides."""
    saved, live, expected = DIFFERENCES[name]
    assert list(map(str, Snapshot(saved).differences(live))) == expected


def test_an_older_image_says_nothing_of_the_schedulers_inside() -> None:
    """It is taken, as it was when it was written."""
    state = one_scheduler(chained, ["StepLR", "ExponentialLR"])
    saved = Snapshot(state)
    saved.saved.kinds["s"] = "scheduler:SequentialLR"
    assert saved.differences(state) == []
    saved.saved.kinds["s"] = "scheduler:ChainedScheduler"
    assert len(saved.differences(state)) == 1


def test_a_refusal_lists_ten_and_counts_all() -> None:
    """A wrong model differs everywhere; a thousand lines would hide what it is."""
    saved = Snapshot({"m": layers(*[2] * 20)})
    live = {"m": layers(*[3] * 20)}
    before = {key: value.clone() for key, value in live["m"].state_dict().items()}
    found = saved.differences(live)
    with pytest.raises(Refused, match=r"foreign: .*40 differences \(40 of shape\)") as caught:
        refuse(found, "rank 3")
    assert str(caught.value).count("saved (") == 10
    assert "and 30 more" in str(caught.value)
    assert caught.value.shards == ("rank 3",)
    assert all(torch.equal(value, before[key]) for key, value in live["m"].state_dict().items())
    refuse([], "rank 3")


def test_only_a_part_is_compared_and_restored() -> None:
    """Weights for a new head, or an evaluation without the optimizer."""
    one, other = layers(4, 2), layers(4, 3)
    train(one[0], opt := torch.optim.SGD(one.parameters(), momentum=0.9))
    saved = Snapshot({"m": one, "o": opt, "b": {"n": 1, "k": 2}})
    fresh = torch.optim.SGD(other.parameters(), momentum=0.9)
    live: dict[str, Any] = {"m": other, "o": fresh, "b": {"n": 0, "k": 0, "z": 5}}
    head = other[1].weight.clone()
    only = ("m/0*", "b/n")
    assert saved.differences(live, only=only) == []
    apply(live, saved.saved, saved.values, only=only)
    assert same_bytes(other[0].weight, one[0].weight)
    assert same_bytes(other[1].weight, head)
    assert not fresh.state
    assert live["b"] == {"n": 1, "k": 0, "z": 5}


@pytest.mark.parametrize("tail", ["", "/*", "/**"])
def test_everything_below_a_thing_is_the_thing_too(tail: str) -> None:
    """`optimizer/**` gave the model of one epoch, and the optimizer of a fresh start."""
    one, other = scheduled("lambda", 0), scheduled("lambda", 1)
    rates(one, 3)
    torch.manual_seed(5)
    saved = Snapshot(one)
    drawn = torch.rand(1)
    only = tuple(f"{name}{tail}" for name in ("model", "opt", "scheduler", "rng"))
    saved.restore(other, only=only)
    assert torch.equal(torch.rand(1), drawn)
    assert rates(other, 2) == rates(one, 2)


def test_not_strict_leaves_what_only_one_side_has() -> None:
    """A model with a new layer starts from what is there; shapes that differ are still refused."""
    one, other = layers(4, 2), layers(4, 2, 3)
    opt = torch.optim.SGD(one.parameters(), momentum=0.9)
    train(one[0], opt)
    fresh = torch.optim.SGD(other.parameters(), momentum=0.9)
    saved = Snapshot({"m": one, "o": opt, "old": nn.Linear(1, 1), "g": torch.Generator()})
    live: dict[str, Any] = {"m": other, "o": fresh, "new": [torch.ones(1)]}
    assert len(saved.differences(live)) == 9
    assert saved.differences(live, strict=False) == []
    apply(live, saved.saved, saved.values)
    assert same_bytes(other[1].weight, one[1].weight)
    assert live["new"][0] == 1
    assert set(map(id, fresh.state)) == {id(other[0].weight), id(other[0].bias)}
    assert saved.differences({"m": layers(4, 3)}, strict=False)


@pytest.mark.parametrize("on", [True, False])
def test_not_strict_leaves_a_scaler_that_only_one_side_has_enabled(on: bool) -> None:
    """An enabled one goes on with its own scale; one that is disabled has none."""
    saved = {"s": torch.amp.GradScaler("cpu", enabled=not on), "t": torch.ones(1)}
    live = {"s": torch.amp.GradScaler("cpu", init_scale=8.0, enabled=on), "t": torch.zeros(1)}
    snapshot = Snapshot(saved)
    assert snapshot.differences(live, strict=False) == []
    apply(live, snapshot.saved, snapshot.values)
    assert live["t"].tolist() == [1.0]
    assert live["s"].get_scale() == (8.0 if on else 1.0)


def test_a_component_may_be_called_anything() -> None:
    """Names with the separator, and things inside of boxes under such names."""
    one = {"a/b": {"x/y": nn.Linear(1, 1), "n": 1}, "a": {"b": torch.ones(1)}, "c/d": Counter()}
    other = {"a/b": {"x/y": nn.Linear(1, 1), "n": 0}, "a": {"b": torch.zeros(1)}, "c/d": Counter()}
    one["c/d"].n = 4
    Snapshot(one).restore(other)
    assert same_bytes(other["a/b"]["x/y"].weight, one["a/b"]["x/y"].weight)
    assert (other["a/b"]["n"], other["a"]["b"].item(), other["c/d"].n) == (1, 1.0, 4)


def test_an_object_that_became_iterable_is_still_itself() -> None:
    """A method more is no other structure."""

    class Iterable(Counter):
        def __iter__(self) -> Iterator[int]:
            return iter(())

    counter, fresh = Counter(), Iterable()
    counter.n = 2
    Snapshot({"counter": counter}).restore({"counter": fresh})
    assert fresh.n == 2


@pytest.mark.parametrize(
    ("loaded", "read", "where"),
    [
        ({"a": 1}, {"a": 1.0}, "a"),
        ({"a": 1}, {"a": 1, "b": 2}, ""),
        ({"a": torch.ones(2)}, {"a": torch.ones(3)}, "a"),
        ({"a": torch.ones(2)}, {"a": [1, 1]}, "a"),
        ({"a": [0, (1, 2.0)]}, {"a": [0, (1, 3.0)]}, r"a\[1\]\[1\]"),
    ],
    ids=["type", "keys", "shape", "kind", "deep"],
)
def test_a_loader_that_reads_back_otherwise_is_named(loaded: Any, read: Any, where: str) -> None:
    """At the first place that differs, by type, keys, shape or value."""

    class Fixed(Loader):
        def __init__(self, state: Any) -> None:
            self.state = state

        def state_dict(self) -> Any:
            return self.state

        def load_state_dict(self, state: Any) -> None:
            pass

    saved = Snapshot({"l": Fixed(loaded)})
    with pytest.raises(Poisoned, match=f"l/?{where} reads back"):
        saved.restore({"l": Fixed(read)})
    saved.restore({"l": Fixed(loaded)})


class Opaque:
    """Only pickle can store it, and it knows no equality."""


def test_what_was_pickled_by_wish_comes_back() -> None:
    """And is not held against its copy, which it could not be equal to."""

    class Holder(Counter):
        def state_dict(self) -> dict[str, Any]:
            return {"n": Opaque()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.n = state["n"]

    saved = Snapshot({"h": Holder()}, pickle=("h/n",))
    live = Holder()
    saved.restore({"h": live})
    assert type(live.n).__name__ == "Opaque"


def test_a_stream_that_could_not_be_put_back_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """The restore goes on; exactness is the caller's to judge."""
    saved = Snapshot({"t": torch.ones(1)})
    saved.saved.objects["rng"]["cuda"] = [bytes(16)]
    saved.restore({"t": torch.ones(1)})
    assert "1 CUDA streams were saved" in caplog.text


def test_a_broken_image_poisons() -> None:
    """Whatever goes wrong after the first change is said in one way."""
    saved = Snapshot({"t": torch.ones(2)})
    with pytest.raises(Poisoned, match="the tensors"):
        apply({"t": torch.ones(2)}, saved.saved, Snapshot({"other": torch.ones(2)}).values)


# Modes that the caller may be in


def test_a_first_save_in_inference_mode_spoils_no_later_one() -> None:
    """The image was mapped in that mode, and no save outside of it could write to it any more."""
    live = {"t": torch.ones(2)}
    with torch.inference_mode():
        saved = Snapshot(live)
    live["t"].add_(1)
    stage(capture(live), saved.canvas)
    saved.restore(other := {"t": torch.zeros(2)})
    assert other["t"].tolist() == [2, 2]


def test_a_restore_in_inference_mode_leaves_a_state_that_can_be_trained() -> None:
    """Moments, gradients and rates that were made in that mode could never be stepped again."""

    def build() -> dict[str, Any]:
        model = layers(4, 4)
        opt = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
        return {"model": model, "opt": opt, "scheduler": scheduler, "count": Counter()}

    one, other = build(), build()
    train(one["model"], one["opt"])
    one["opt"].zero_grad(set_to_none=False)
    saved = Snapshot(one, extra=[torch.ones(2)])
    train(other["model"], other["opt"])
    with torch.inference_mode():
        for state in other["opt"].state.values():  # as a restore of before left them
            state["exp_avg"] = torch.zeros_like(state["exp_avg"])
        (extra,) = saved.restore(other)
    made = [extra, *(v for state in other["opt"].state.values() for v in state.values())]
    made += [p.grad for p in other["model"].parameters()]
    assert not any(map(torch.is_inference, made))
    for state in one, other:
        torch.manual_seed(1)
        train(state["model"], state["opt"])
        state["scheduler"].step()
    pairs = zip(one["model"].parameters(), other["model"].parameters(), strict=True)
    assert all(same_bytes(*pair) for pair in pairs)


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 2), lambda: Halved([])], ids=["", "hook"])
def test_a_module_that_was_made_in_inference_mode_is_filled(make: Any, mode: bool) -> None:
    """An average of the weights, kept for evaluation: it can be written to in that mode only."""
    with torch.inference_mode():
        one, other = make(), make()
        tensors = [torch.ones(2), torch.zeros(2)]
        plain = torch.ones(2)
    saved = Snapshot({"ema": one, "t": tensors[0]})
    with torch.inference_mode(mode):
        saved.restore({"ema": other, "t": tensors[1]})
    assert same_bytes(other.weight, one.weight)
    assert tensors[1].tolist() == [1, 1]
    model = nn.Linear(2, 2)
    prime({"t": plain, "model": model}, lambda: model(torch.ones(2)).sum().backward())


@pytest.mark.parametrize(
    "mode",
    [lambda: torch.device("meta"), lambda: default_dtype(torch.float64)],
    ids=["device", "dtype"],
)
def test_what_torch_makes_by_default_changes_nothing(mode: Any) -> None:
    """set_default_device() and set_default_dtype() are for what the user makes."""
    one, other = (
        {"model": layers(2), "opt": None, "g": torch.Generator(), "box": [torch.ones(2)]}
        for _ in range(2)
    )
    for state in one, other:
        state["opt"] = [torch.optim.AdamW(state["model"].parameters())]
    train(one["model"], one["opt"][0])
    with mode():
        saved = Snapshot(one, extra=torch.ones(2, device="cpu", dtype=torch.float16))
        extra = saved.restore(other)
        prime(other, lambda: sum(p.sum() for p in other["model"].parameters()).backward())
    assert (extra.device.type, extra.dtype) == ("cpu", torch.float16)
    pairs = zip(Snapshot(one).captured.tensors, Snapshot(other).captured.tensors, strict=True)
    assert all(same_bytes(*pair) for pair in pairs)


def test_priming_puts_back_buffers_that_are_not_saved() -> None:
    """Those that fn writes to, and those in whose place it puts another."""

    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            for name, persistent in (("kept", True), ("added", False), ("replaced", False)):
                self.register_buffer(name, torch.zeros(2), persistent=persistent)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.added.add_(1)
            self.replaced = self.replaced + 1
            self.kept = self.kept + 1
            return super().forward(x)

    model = Counting()
    before = dict(model.named_buffers())
    prime({"model": model}, lambda: model(torch.ones(2)).sum().backward())
    for name, buffer in model.named_buffers():
        assert buffer is before[name]
        assert buffer.tolist() == [0, 0]


@pytest.mark.parametrize("steps", [True, False])
def test_priming_with_something_else_is_refused_and_taken_back(steps: bool) -> None:
    """A whole training step by mistake would be one more; no backward at all primes nothing."""
    model = layers(2)
    state = {"model": model, "opt": torch.optim.AdamW(model.parameters())}
    before = Snapshot(state).captured.tensors
    before = [tensor.detach().clone() for tensor in before]
    said = r"fn stepped an optimizer \(AdamW\)" if steps else "no parameter of the state has a grad"
    with pytest.raises(ValueError, match=f"{said}.*give one forward and backward"):
        prime(state, lambda: train(model, state["opt"]) if steps else model(torch.ones(2, 4)))
    after = Snapshot(state).captured.tensors
    assert all(same_bytes(*pair) for pair in zip(before, after, strict=True))
    assert not state["opt"].state


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def test_two_things_of_one_path_are_refused() -> None:
    """Each would be given the state of the last one, in silence."""
    for state in (
        {"x": [Counter()], "x[0]": Counter()},
        {"g": [torch.Generator()], "g[0]": torch.Generator()},
    ):
        with pytest.raises(ValueError, match=r"two things have the path [xg]\[0\]"):
            capture(state)


class Caching(nn.Linear):
    """Keeps something that is made of its weight, and of nothing that is saved."""

    sums = 0.0

    def renew(self, *_: Any) -> None:
        self.sums = float(self.weight.detach().sum())


class CachingByHand(Caching):
    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.renew()


class CachingWhole(Caching):
    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        done = super().load_state_dict(state, strict, assign)
        self.renew()
        return done


def cached(way: str) -> Caching:
    if way == "pre-hook":
        module = Caching(3, 2)
        module.register_load_state_dict_pre_hook(lambda m, state, *_: setattr(
            m, "sums", float(next(iter(state.values())).sum())
        ))  # fmt: skip
        return module
    return {"part": CachingByHand, "whole": CachingWhole}[way](3, 2)


@pytest.mark.parametrize("way", ["pre-hook", "part", "whole"])
def test_whoever_makes_something_of_what_is_loaded_is_told(way: str) -> None:
    """As torch's own load_state_dict() tells: else it is of the state before the restore."""
    one, other = cached(way), cached(way)
    one.renew()
    Snapshot({"model": one}).restore({"model": other})
    assert other.sums == one.sums
    assert same_bytes(other.weight, one.weight)


class Sharing(torch.optim.Optimizer):
    """All parameters count in one tensor, as some optimizers of users do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.count = torch.zeros(())
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["step"] = self.count


@pytest.mark.parametrize("shared", [True, False])
def test_what_was_one_tensor_in_an_optimizer_is_one_again(shared: bool) -> None:
    """Apart, each would count for itself; and what was apart does not become one."""
    one, other = (nn.Linear(2, 2) for _ in range(2))
    here, there = (Sharing(m.parameters()) for m in (one, other))
    if not shared:
        for number, parameter in enumerate(one.parameters()):
            here.state[parameter]["step"] = torch.tensor(float(number))
    here.count += 3
    Snapshot({"m": one, "o": here}).restore({"m": other, "o": there})
    steps = [there.state[p]["step"] for p in other.parameters()]
    assert (steps[0] is steps[1]) == shared
    assert [float(step) for step in steps] == ([3.0, 3.0] if shared else [0.0, 1.0])


def test_what_was_one_tensor_in_an_object_is_one_again() -> None:
    """As `torch.save` keeps it."""
    held: dict[str, Any] = {}

    class Pair:
        def state_dict(self) -> dict[str, Any]:
            both = torch.ones(2)
            return {"a": both, "b": both, "c": torch.ones(2)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            held.update(state)

    Snapshot({"p": Pair()}).restore({"p": Pair()})
    assert held["a"] is held["b"]
    assert held["c"] is not held["a"]


def test_a_rank_that_is_not_in_the_group_is_told_so() -> None:
    """new_group() gives such a rank a number in the group's place."""
    outside: Any = torch.distributed.GroupMember.NON_GROUP_MEMBER
    with pytest.raises(ValueError, match=r"group=: this rank is not in it"):
        Group(outside, "run")


BOXES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "type": ({"a": {"x": 1}}, {"a": [1]}, ["a: box: saved dict, live list"]),
    "in a tuple": (
        {"a": ([1], {})},
        {"a": ({}, {})},
        ["a[0]: box: saved list, live dict"],
    ),
    "length": ({"a": ([1], [2])}, {"a": ([1],)}, ["a: length: saved 2, live 1"]),
    "gone": ({"a": {"x": 1}, "m": nn.Linear(1, 1)}, {"m": nn.Linear(1, 1)},
             ["a: component: saved dict, live nothing"]),
    "new": ({"m": nn.Linear(1, 1)}, {"a": [1], "m": nn.Linear(1, 1)},
            ["a: component: saved nothing, live list"]),
    "holds things": (
        {"a": {"b": (torch.Generator(),)}},
        {"a": {"b": [torch.Generator()]}},
        ["a/b: box: saved tuple, live list"],
    ),
    "generators": (
        {"a": [torch.Generator()]},
        {"a": [random.Random(1)]},
        ["a[0]: kind: saved generator:torch.Generator(cpu), live generator:random.Random"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOXES)
def test_boxes_that_can_t_become_what_was_saved_are_refused(name: str) -> None:
    """They kept their live values in silence, or got plain values for the things in them."""
    saved, live, expected = BOXES[name]
    assert list(map(str, Snapshot(saved).differences(live))) == expected


def test_boxes_that_can_be_filled_in_place_keep_their_type() -> None:
    """An OrderedDict of modules that became a dict, a list that became a deque."""
    model = nn.Linear(1, 1)
    inner = {"d": OrderedDict(m=model)}
    saved = Snapshot({"a": OrderedDict(m=model, x=1), "b": [[1, 2]], "c": inner})
    other = nn.Linear(1, 1)
    live: dict[str, Any] = {"a": {"m": other}, "b": deque([3]), "c": {"d": {"m": other}}}
    saved.restore(live)
    assert live == {"a": {"m": other, "x": 1}, "b": deque([[1, 2]]), "c": {"d": {"m": other}}}
    assert same_bytes(other.weight, model.weight)


def test_boxes_inside_of_boxes_are_replaced() -> None:
    """Whatever they were before: what holds them can take another one."""
    live: dict[str, Any] = {"a": {"x": None, "y": [1], "z": ({},)}, "b": [1]}
    saved = Snapshot({"a": {"x": [1], "y": OrderedDict(q=2), "z": ([5], 6)}, "b": [{"c": 1}, 2]})
    saved.restore(live)
    assert live == {"a": {"x": [1], "y": OrderedDict(q=2), "z": ([5], 6)}, "b": [{"c": 1}, 2]}


def hide_bias(_: nn.Module, tree: dict[str, Any], *__: Any) -> None:
    """A hook that leaves something out."""
    del tree["bias"]


class Extra(nn.Linear):
    """Has a state beside its tensors, and hides its bias from its own state."""

    def __init__(self, seen: int, *, hides: bool = False) -> None:
        super().__init__(2, 2)
        self.seen = seen
        if hides:
            self.register_state_dict_post_hook(hide_bias)

    def get_extra_state(self) -> Any:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


def test_extra_state_of_one_side_is_refused() -> None:
    """It was dropped, or stayed as it was."""
    plain, extra = {"m": nn.Linear(2, 2)}, {"m": Extra(1)}
    there = "m/_extra_state: extra state: saved there, live nothing"
    assert list(map(str, Snapshot(extra).differences(plain))) == [there]
    there = "m/_extra_state: extra state: saved nothing, live there"
    assert list(map(str, Snapshot(plain).differences(extra))) == [there]
    assert Snapshot(plain).differences(extra, strict=False) == []


def test_a_module_that_leaves_something_out_takes_its_extra_state() -> None:
    """What its own state leaves out was missed in the load, after all else had been restored."""
    one, other = Extra(5, hides=True), Extra(6, hides=True)
    Snapshot({"m": one}).restore({"m": other})
    assert other.seen == 5
    assert same_bytes(other.weight, one.weight)


class Own(Extra):
    """Loads by a method of its own, which knows no `strict`."""

    def load_state_dict(self, tree: Any) -> None:  # as users write it
        super().load_state_dict(tree)


def test_a_module_that_loads_in_its_own_way_is_given_what_it_asks_for() -> None:
    """Its method gets the state, and nothing that it does not know."""
    one, other = Own(5), Own(6)
    Snapshot({"m": one}).restore({"m": other})
    assert other.seen == 5


class Refusing(Extra):
    """Takes no extra state any more, though it gives one."""

    def _load_from_state_dict(self, tree: Any, prefix: str, *args: Any) -> None:
        extra = tree.pop(f"{prefix}_extra_state")
        super()._load_from_state_dict(tree | {}, prefix, *args)
        args[3].append(f"{prefix}_extra_state")
        tree[f"{prefix}_extra_state"] = extra


def test_what_a_module_does_not_take_is_an_error() -> None:
    """It would be lost without a word."""
    with pytest.raises(Poisoned, match="did not take _extra_state"):
        Snapshot({"m": Refusing(5)}).restore({"m": Refusing(6)})


def test_things_that_are_not_there_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Not strict: a box never gets the plain tree of a module or a generator; tensors it does."""
    saved = Snapshot({
        "box": {"m": nn.Linear(1, 1), "g": torch.Generator(), "deep": {"g": torch.Generator()},
                "t": torch.ones(1), "n": 5},
    })  # fmt: skip
    live: dict[str, Any] = {"box": {}}
    assert saved.differences(live, strict=False) == []
    apply(live, saved.saved, saved.values)
    assert live["box"] == {"t": torch.ones(1), "n": 5}
    assert caplog.text.count("has no place in the live state") == 3


def test_a_later_item_of_a_list_is_not_moved_to_its_beginning() -> None:
    """`only=` names the third of three; there is no second to stand behind."""
    saved, live = Snapshot({"h": [10, 20, 30]}), {"h": list[int]()}
    apply(live, saved.saved, saved.values, only=("h[2]",))
    assert live == {"h": []}
    apply(live, saved.saved, saved.values, only=("h[0]", "h[1]"))
    assert live == {"h": [10, 20]}


@pytest.mark.parametrize(
    "box",
    [
        {"g": [torch.Generator()], "g[0]": 5},
        {"g[0]": [torch.Generator()], "g": [[7]]},
    ],
    ids=["value", "box"],
)
def test_a_plain_value_with_the_path_of_a_thing_is_refused(box: dict[str, Any]) -> None:
    """It was saved as that thing's state."""
    with pytest.raises(ValueError, match=r"two things have the path box/g\[0\]"):
        Snapshot({"box": box})


def test_many_boxes_cost_no_more_than_their_number() -> None:
    """Shows that paths are looked up, and not searched: 4,000 things and as many plain boxes."""

    def parts() -> dict[str, Any]:
        things = {str(i): torch.ones(1) for i in range(4000)}
        return {"ema": things, "log": [{"a": i} for i in range(4000)]}

    saved, live = Snapshot(parts()), parts()
    counted: dict[str, int] = defaultdict(int)

    def count(frame: Any, event: str, _: object) -> None:
        if event == "call":
            counted[frame.f_code.co_name] += 1

    sys.setprofile(count)
    try:
        saved.restore(live)
    finally:
        sys.setprofile(None)
    assert max(counted.values()) < 400_000


@pytest.mark.parametrize("value", [{"w": torch.ones(2)}, (torch.ones(1), torch.zeros(1)),
                                   [torch.ones(1)]])  # fmt: skip
def test_a_placeholder_is_filled_with_a_box_of_tensors(value: Any) -> None:
    """`best = None` until there is one: tensors can be made anew."""
    live: dict[str, Any] = {"p": {"best": None}}
    Snapshot({"p": {"best": value}}).restore(live)
    assert type(live["p"]["best"]) is type(value)
    assert len(live["p"]["best"]) == len(value)
