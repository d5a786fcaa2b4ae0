"""Shows that a look at a training sees each leaf of its state, and what was left out of it."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from handfast.testing.exact.look import Look
from handfast.testing.exact.moments import SAMPLE, Print


def look(
    state: Mapping[str, object], extra: object = None, *, rng: bool = True
) -> dict[str, Print]:
    """Prints of a state, from where this function was called."""
    return Look(state, rng=rng, run="/runs/one").prints(extra, sys._getframe(1))


class Scaled(nn.Module):
    """A parameter, a buffer, one that is not kept, and a state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that has moments."""
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_each_leaf_of_a_state_is_named_by_what_it_is() -> None:
    """Parameters, buffers, moments, counters, rates, schedulers, scalers, streams, boxes, extra."""
    model = Scaled()
    optimizer = stepped(model)
    state = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2),
        "scaler": torch.amp.GradScaler("cpu", init_scale=4.0),
        "drawn": torch.Generator(),
        "box": {"seen": 5, "mean": torch.zeros(3)},
    }
    found = look(state, {"best": 0.5})
    kinds = {
        "model/weight": "parameter",
        "model/mean": "buffer",
        "model/_extra_state/calls": "module state",
        "model/cache": "buffer",
        "optimizer/state/weight/exp_avg": "moment",
        "optimizer/state/weight/step": "step counter",
        "optimizer/param_groups[0]/lr": "hyperparameter",
        "scheduler/last_epoch": "scheduler",
        "scaler/scale": "scaler",
        "drawn": "random stream",
        "box/seen": "value",
        "box/mean": "tensor",
        "extra/best": "extra",
        "rng/torch": "random stream",
        "rng/python": "random stream",
        "rng/numpy": "random stream",
    }
    assert {path: found[path].kind for path in kinds} == kinds
    assert found["model/cache"].stored is False
    assert [path for path in kinds if not found[path].stored] == ["model/cache"]
    assert (found["box/seen"].text, found["extra/best"].text) == ("5", "0.5")
    assert found["model/weight"].text == "float32[2]"
    assert found["optimizer/state/weight/step"].text == "1"


class Drawing:
    """A user's object that draws when it is asked for its state."""

    def state_dict(self) -> dict[str, float]:
        return {"salt": torch.rand(1).item() * 0}

    def load_state_dict(self, state: dict[str, float]) -> None:
        pass


def test_a_look_changes_nothing() -> None:
    """No stream moves, whatever the state draws, and a second look finds the same."""
    model = Scaled()
    state = {"model": model, "optimizer": stepped(model), "drawing": Drawing()}
    before = torch.get_rng_state(), random.getstate()
    assert look(state) == look(state)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(-1.5),
        torch.zeros(0, 3),
        torch.arange(200.0).reshape(10, 20).t(),
        torch.ones(5, dtype=torch.bfloat16),
        torch.ones(5).to(torch.float8_e4m3fn),
        torch.ones(3, dtype=torch.complex64).conj(),
        torch.tensor([True, False]),
        torch.tensor([float("nan"), float("inf")]),
    ],
    ids=["scalar", "empty", "transposed", "bfloat16", "float8", "complex", "bool", "nan"],
)
def test_tensors_of_every_kind_are_printed(tensor: torch.Tensor) -> None:
    """A bit that differs shows; how a tensor lies in memory does not."""
    found = look({"t": tensor})["t"]
    assert found.size == tensor.numel()
    assert len(found.sample) <= 2 * SAMPLE
    assert found.digest == look({"t": tensor.clone().contiguous()})["t"].digest
    if tensor.numel():
        other = tensor.clone()
        bits = other.resolve_conj().contiguous().reshape(-1).view(torch.uint8)
        bits[0] ^= 1
        changed = bits.view(tensor.dtype).reshape(tensor.shape)
        assert look({"t": changed})["t"].digest != found.digest


def test_types_of_values_count() -> None:
    """1, 1.0 and True are equal in Python, and are not the same state."""
    digests = {look({"box": {"v": value}})["box/v"].digest for value in (1, 1.0, True)}
    assert len(digests) == 3


def test_long_lists_of_plain_values_are_one_leaf_and_short_ones_are_not() -> None:
    """An order of a million indices is no million leaves."""
    found = look({"box": {"order": list(range(99)), "pair": [3, 4], "none": []}})
    assert found["box/order"].text.startswith("list ")
    assert (found["box/pair[0]"].text, found["box/none"].text) == ("3", "[]")
    assert "box/order[0]" not in found


def test_streams_that_the_checkpointer_leaves_out_are_seen_all_the_same() -> None:
    """With rng=False they live beside the state."""
    assert look({"t": torch.zeros(1)}, rng=False)["rng/torch"].stored is False


# --- what lives beside the state -------------------------------------------------------------


def beside(state: Mapping[str, object], **variables: object) -> dict[str, Print]:
    """What a loop with these variables is seen to have besides its state.

    In a thread of its own, so that nothing of this test and its runner is around it.
    """
    scope: dict[str, Any] = {**variables, "look": look, "state": state}
    with ThreadPoolExecutor(1) as pool:
        pool.submit(exec, "found = look(state)", {"__name__": "users"}, scope).result()
    found: dict[str, Print] = scope["found"]
    return {path: leaf for path, leaf in found.items() if not leaf.stored}


class Trainer:
    """A user's object without a state of its own."""

    def __init__(self, **things: object) -> None:
        vars(self).update(things)

    def fit(self) -> None:
        """A method that somebody holds."""


def counting() -> Iterator[int]:
    seen = 7
    yield seen


def test_things_that_are_not_in_the_state_are_found_wherever_they_hang() -> None:
    """Variables, attributes, boxes, closures, methods, generators under way, namespaces."""
    model = nn.Linear(2, 2)
    optimizer = stepped(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    under_way = counting()
    next(under_way)

    def closed(drawn: torch.Generator) -> Callable[[], torch.Tensor]:
        return lambda: torch.randn(2, generator=drawn)

    found = beside(
        {"model": model},
        opt=optimizer,
        mean=torch.zeros(3),
        seen=3,
        array=np.zeros(2),
        trainer=Trainer(scheduler=scheduler, ema={"a": torch.ones(1)}),
        draw=closed(torch.Generator()),
        fit=Trainer(lowest=1.5).fit,
        under_way=under_way,
        space=SimpleNamespace(rate=0.1),
        args=argparse.Namespace(width=8),
    )
    kinds = {
        "opt/state/0/0/exp_avg": "moment",
        "mean": "tensor",
        "seen": "value",
        "array": "value",
        "trainer.scheduler/last_epoch": "scheduler",
        "trainer.ema['a']": "tensor",
        "draw.drawn": "random stream",
        "under_way.seen": "value",
        "fit.lowest": "value",
        "space.rate": "value",
        "args.width": "value",
    }
    assert {path: found[path].kind for path in kinds if path in found} == kinds


class Slots:
    """A user's object without a dict."""

    __slots__ = ("model", "unset")


class More(Slots):
    """One that has both, and a slot of a name of its own."""

    __slots__ = ("__dict__", "__own")

    def __init__(self) -> None:
        self.model, self.seen, self.__own = nn.Linear(1, 1), 3, 5


def test_slots_are_looked_into() -> None:
    """Those of the class and of what it inherits from; what nothing was put into is not there."""
    found = beside({"t": torch.zeros(1)}, held=More())
    assert set(found) == {
        "held.model", "held.model/weight", "held.model/bias", "held.seen", "held._More__own",
    }  # fmt: skip


def test_what_is_trained_has_a_name_of_its_own() -> None:
    """Under that of another thing in the state, or of another one beside it."""
    state = {"model": nn.Linear(1, 1), "SGD": {"params": [torch.zeros(1)]}}
    other, hidden = nn.Linear(1, 1), torch.zeros(1)
    frame = SimpleNamespace(
        f_locals={"model": other, "SGD": 3},
        f_globals={"__name__": "train", "model": nn.Linear(1, 1), "SGD": 4},
        f_back=None,
    )
    optimizer = torch.optim.SGD([hidden], 0.1)
    held: Any = Look(state, rng=False, run="", stepped=[optimizer])
    found = held.prints(None, frame)
    trained = {path for path, leaf in found.items() if leaf.kind == "parameter"}
    assert trained == {
        *("model/weight", "model (2)/weight", "model (3)/weight"),
        *("model/bias", "model (2)/bias", "model (3)/bias"),
        "SGD (2)/params[0]",
    }
    assert found["SGD/params[0]"].stored
    assert found["SGD"].text == "3", "of other things the nearest counts"


def test_what_is_in_the_state_is_not_beside_it_by_another_name() -> None:
    """The state itself, its boxes, parts of its modules, wrappers of these, views of its memory."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    box = {"seen": 3}
    state = {"model": model, "box": box}
    found = beside(
        state,
        box=box,
        first=model[0],
        wrapper=nn.Sequential(model),
        loss=nn.MSELoss(),
        row=model[0].weight[0],
        same=state,
        parameters=list(model.parameters()),
    )
    assert found == {}


def test_what_can_not_be_read_and_what_is_a_librarys_is_left_out() -> None:
    """Nothing beside the state can make a look fail."""

    class Broken:
        def state_dict(self) -> dict[str, object]:
            raise RuntimeError("not now")

        def load_state_dict(self, state: dict[str, object]) -> None:
            pass

    class Slotted:
        __slots__ = ("x",)

        @property
        def y(self) -> object:
            raise RuntimeError("nobody asks a property")

    found = beside(
        {"t": torch.zeros(1)},
        broken=Broken(),
        slotted=Slotted(),
        sparse=torch.zeros(3).to_sparse(),
        module=torch,
        kind=Broken,
        many=[0] * 1000,
        parser=argparse.ArgumentParser(),
    )
    assert found == {}


def test_the_path_of_the_run_is_not_a_difference() -> None:
    """It is another one in each run."""
    found = beside({"t": torch.zeros(1)}, where="/runs/one/logs")
    assert found["where"].text == "'RUN/logs'"


def test_what_an_optimizer_trains_is_seen_wherever_it_is() -> None:
    """In the state, beside it, or nowhere within reach: then by what steps it, in its order."""
    model, near, far = nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(2, 1)
    leaf = torch.zeros(2, requires_grad=True)
    parts = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, near, far)]
    plain = torch.zeros(2)
    leaves = [torch.optim.SGD([leaf, plain], 0.1), torch.optim.SGD([far.weight], 0.1)]
    hidden = {"optimizers": [*parts, *leaves], "far": far}
    frame = SimpleNamespace(
        f_locals={"near": near, "leaf": leaf, "plain": plain},
        f_globals={"__name__": "train"},
        f_back=None,
    )
    held: Any = Look({"model": model}, rng=False, run="", stepped=hidden["optimizers"])
    found = held.prints(None, frame)
    trained = {path for path, made in found.items() if made.kind == "parameter"}
    assert trained == {
        "model/weight", "model/bias", "near/weight", "near/bias", "leaf", "plain",
        "SGD 3/params[0]", "SGD 3/params[1]", "SGD 5/params[0]",
    }  # fmt: skip
    assert {path for path in trained if found[path].stored} == {"model/weight", "model/bias"}


class Kept:
    """A user's object that gives and takes a state."""

    def state_dict(self) -> dict[str, int]:
        return {"n": 3}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


class Given(Kept):
    """One that only gives it."""

    load_state_dict = None  # it is taken away


class Numbers(Kept, torch.utils.data.Dataset[int]):
    """Data with a position."""


class Walked(Kept):
    """What is iterated."""

    def __iter__(self) -> Iterator[int]:
        return iter(())


def test_what_could_be_in_the_state_by_itself_is_told_from_the_rest() -> None:
    """Things that give and take a state, but for those that say where the data stand."""
    found = beside(
        {"t": torch.zeros(1)},
        kept=Kept(),
        given=Given(),
        data=Numbers(),
        walked=Walked(),
        norm=nn.BatchNorm1d(2),
        scaler=torch.amp.GradScaler("cpu"),
        drawn=torch.Generator(),
        plain=torch.ones(1),
        seen=3,
    )
    loadable = {path.partition("/")[0] for path, leaf in found.items() if leaf.loadable}
    assert loadable == {"kept", "norm", "scaler"}
    assert {"data/n", "walked/n", "drawn", "plain", "seen"} <= found.keys()
    assert not look({"kept": Kept()})["kept/n"].loadable, "it is"
