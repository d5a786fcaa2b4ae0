"""Shows what live parts remember of where they came from, what ends that, and what a step refuses.

No run and no file is needed: parts are marked as a restore marks them.
"""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import pickletools
import subprocess
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import LBFGS, SGD, Adagrad, AdamW, Optimizer

from handfast.core.verdict import Verdict
from handfast.errors import Refused
from handfast.model.optimizer import Index
from handfast.store.manifest import Fork, Stamp
from handfast.torch import contents, indices
from handfast.torch.apply import _told_of_loads
from handfast.torch.indices import anew, beside, common
from handfast.torch.lineage import History, index_of
from handfast.torch.marked import changes, clear, forgotten, mark, origin
from handfast.torch.origins import Origin, number, numbers
from handfast.torch.tree import Kind, kind_of


def at(step: int, path: str = "model", **fields: Any) -> Origin:
    """An origin of one run; then changed."""
    fields = {"run": "run", "index": Index("main", 1, step, "c"), "path": path} | fields
    return Origin(**fields)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def pair(kind: type[Optimizer] = AdamW, **options: Any) -> tuple[nn.Sequential, Optimizer]:
    model = net()
    return model, kind(model.parameters(), **{"lr": 1e-2, **options})


def other(module: nn.Module, by: float = 1.0) -> dict[str, Tensor]:
    """What a module of that kind might hold, and this one does not."""
    return {name: tensor + by for name, tensor in module.state_dict().items()}


def copied(module: nn.Module) -> dict[str, Tensor]:
    """What it holds, kept apart."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def step(model: nn.Module, *optimizers: Optimizer) -> None:
    """One update."""
    model(torch.randn(4, 3)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What was warned of since the last look."""

    class Said(list[str]):
        def __eq__(self, other: object) -> bool:
            found = [record.getMessage() for record in caplog.records]
            caplog.clear()
            return found == other

        __hash__ = None  # it is looked at, and no key

    with caplog.at_level(logging.WARNING, "handfast"):
        yield Said()


def refused(model: nn.Module, *optimizers: Optimizer) -> Refused:
    """The refusal of a step, which must have changed nothing."""
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(Refused) as caught:
        step(model, *optimizers)
    assert all(map(torch.equal, before, model.parameters()))
    assert caught.value.verdict is Verdict.MIXED
    model.zero_grad()
    return caught.value


# --- what is remembered -------------------------------------------------------------------------


def test_parts_remember_and_other_things_do_not() -> None:
    model, optimizer = pair()
    assert origin(model) is origin(optimizer) is origin("model") is origin(None) is None
    mark([(model, at(3)), (optimizer, at(3, "optimizer")), ({"a": 1}, at(3)), (5, at(3))])
    assert origin(model) == at(3)
    assert str(origin(optimizer)) == "optimizer of main 1/3 (c) of run run"
    assert origin(model[0]) == at(3, follows=True)


def test_memory_ends_with_the_part() -> None:
    """A model that nobody needs is freed, with its hooks; the table keeps nothing alive."""
    model, optimizer = pair()
    mark([(model, at(3)), (optimizer, at(3))])
    step(model, optimizer)
    gone = [weakref.ref(each) for each in (model, model[0], model[0].weight, optimizer)]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4


class Wrapper(nn.Module):
    """A user's own module that holds another one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.module(x)
        return found


def wrapped(model: nn.Module, how: str) -> nn.Module:
    if how == "compiled":
        return torch.compile(model, backend="eager")  # a module
    return nn.DataParallel(model)


@pytest.mark.parametrize("how", ["compiled", "parallel"])
@pytest.mark.parametrize("outside", [True, False], ids=["the wrapper", "what is in it"])
def test_a_wrapper_is_what_it_wraps(how: str, outside: bool, warned: list[str]) -> None:
    """Models are loaded before they are wrapped, and saved after, or the other way round."""
    model, optimizer = pair()
    wrapper = wrapped(model, how)
    mark([(wrapper if outside else model, at(3)), (optimizer, at(2, "optimizer"))])
    assert origin(model) == origin(wrapper) == at(3)
    assert set(map(id, beside([wrapper]))) == set(map(id, beside([model]))) == {id(optimizer)}
    refused(wrapper, optimizer)
    for part in (model, wrapper):
        mark([(part, at(2)), (optimizer, at(2, "optimizer"))])
        step(wrapper, optimizer)
        part.load_state_dict(other(part))
        assert origin(model) is origin(wrapper) is None
        assert [str(came) for came in forgotten([wrapper, model])] == [f"{at(2)}, trained on since"]
    assert warned == []


# --- what ends it -------------------------------------------------------------------------------


def test_whatever_is_loaded_otherwise_is_of_no_known_epoch(warned: list[str]) -> None:
    """A model, an optimizer, and a part of a model; said once, at the next look."""
    model, optimizer = pair()
    for load in (
        lambda: model.load_state_dict(other(model)),
        lambda: model[0].load_state_dict(other(model[0])),
        lambda: model.load_state_dict({"1.running_mean": torch.full((3,), 7.0)}, strict=False),
    ):
        mark([(model, at(3)), (optimizer, at(3, "optimizer"))])
        load()
        assert origin(model) is None
        assert origin(optimizer) == at(3, "optimizer")
        assert list(forgotten([model, optimizer])) == [at(3)]
        assert list(forgotten([model, optimizer])) == []
    mark([(model, at(3)), (optimizer, at(3, "optimizer"))])
    optimizer.load_state_dict(optimizer.state_dict())
    assert origin(model) == at(3)
    assert origin(optimizer) is None
    assert warned == []


def test_a_part_of_two_components_ends_what_is_known_of_both() -> None:
    """A GAN as a whole, and its generator by itself, in one state."""
    whole = nn.ModuleDict({"g": net(), "d": net()})
    for parts in ([whole, whole["g"]], [whole["g"], whole]):
        mark((part, at(3)) for part in parts)
        whole["g"].load_state_dict(other(whole["g"]))
        assert origin(whole) is origin(whole["g"]) is None
        mark((part, at(3)) for part in parts)
        whole["d"].load_state_dict(other(whole["d"]))
        assert origin(whole) is None
        assert origin(whole["g"]) == at(3)


def test_a_load_that_fails_has_changed_something() -> None:
    """Torch copies what fits before it raises."""
    model, _ = pair()
    mark([(model, at(3))])
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"0.weight": torch.ones(3, 3)})
    assert origin(model) is None


def test_what_is_about_to_be_loaded_is_of_no_epoch_until_it_has_come() -> None:
    """A restore that stops half-way leaves nothing that looks sound."""
    model, optimizer = pair()
    mark([(model, at(3)), (optimizer, at(3))])
    clear([model, optimizer])
    assert origin(model) is origin(optimizer) is None
    mark([(model, at(2))])
    assert list(forgotten([model, optimizer])) == [at(3)]


def test_a_copy_has_no_origin_and_its_loads_are_its_own() -> None:
    """An EMA is a deep copy that is loaded again and again."""
    model, optimizer = pair()
    mark([(model, at(3)), (optimizer, at(3))])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert origin(twin) is None
        twin.load_state_dict(model.state_dict())
        assert origin(model) == at(3)
        assert not _told_of_loads(twin), "it would be restored by another way"
        mark([(twin, at(2))])
        twin.load_state_dict(other(model))
        assert origin(twin) is None
    double = copy.deepcopy(optimizer)
    assert origin(double) is None
    double.load_state_dict(optimizer.state_dict())
    assert origin(optimizer) == at(3)
    assert kind_of(double) is kind_of(optimizer) is Kind.OPTIMIZER
    assert not _told_of_loads(model)


def test_a_pickled_model_needs_no_handfast(tmp_path: Any) -> None:
    """Whoever gets it loads it into what they have."""
    layer = nn.Linear(2, 2)
    mark([(layer, at(3))])
    data = pickle.dumps(layer)
    assert "handfast" not in str([arg for _, arg, _ in pickletools.genops(data)])
    file = tmp_path / "model"
    file.write_bytes(data)
    there = (
        "import pickle, sys; sys.modules['handfast'] = None; "
        f"m = pickle.load(open({str(file)!r}, 'rb')); m.load_state_dict(m.state_dict()); "
        "import copy; copy.deepcopy(m).load_state_dict(m.state_dict())"
    )
    subprocess.run([sys.executable, "-c", there], check=True)


def test_the_state_dict_is_as_it_was() -> None:
    """Nothing of ours is in what anybody saves, and nothing is added twice."""
    model, optimizer = pair()
    before = model.state_dict().keys(), optimizer.state_dict()["param_groups"][0].keys()
    for count in range(5):
        mark([(model, at(count)), (optimizer, at(count))])
    after = model.state_dict().keys(), optimizer.state_dict()["param_groups"][0].keys()
    assert before == after
    assert len(model._load_state_dict_post_hooks) == 1
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 1


# --- weights that are swapped, and swapped back -------------------------------------------------


@pytest.mark.parametrize("how", ["itself", "compiled", "parallel", "a layer", "assigned"])
def test_a_load_that_is_taken_back_is_none(how: str, warned: list[str]) -> None:
    """An average takes the weights' place for an evaluation; then the training goes on."""
    model, optimizer = pair()
    mark([(model, at(3)), (optimizer, at(3, "optimizer"))])
    step(model, optimizer)
    part: Any = model
    if how in ("compiled", "parallel"):
        part = wrapped(model, how)
    elif how == "a layer":
        part = model[2]
    for _ in range(2):
        kept = part.state_dict() if how == "assigned" else copied(part)
        part.load_state_dict(other(part), assign=how == "assigned")
        assert origin(model) is None
        part.load_state_dict(kept, assign=how == "assigned")
        assert str(origin(model)) == f"{at(3)}, trained on since"
        step(model, optimizer)
    assert list(forgotten([model, optimizer])) == []
    assert warned == []


@pytest.mark.parametrize("how", ["each layer", "a container", "an average that is equal yet"])
def test_each_load_is_taken_back_by_itself(how: str, warned: list[str]) -> None:
    """Layer by layer, through another module that has them, and where a load changes nothing and
    what comes after it does: the statistics of an average, made anew."""
    model, optimizer = pair()
    both = [(model, at(3)), (optimizer, at(3, "optimizer"))]
    mark(both)
    for _ in range(2):
        step(model, optimizer)
        boxes = {"each layer": [*model], "a container": [nn.ModuleList([model[0], model[2]])]}
        parts: list[nn.Module] = boxes.get(how, [model])
        kept = [copied(part) for part in parts]
        by = 0.0 if how not in boxes else 1.0
        for part in parts:
            part.load_state_dict(other(part, by))
            assert (origin(model) is None) is bool(by)
        torch.optim.swa_utils.update_bn([torch.randn(4, 3)], model)
        for part, held in zip(parts, kept, strict=True):
            part.load_state_dict(held)
    assert str(origin(model)) == f"{at(3)}, trained on since"
    step(model, optimizer)
    assert list(forgotten([model])) == []
    assert warned == []


def test_what_is_not_taken_back_whole_is_of_no_known_epoch(warned: list[str]) -> None:
    """One bit of a buffer, the sign of a zero, or a step in between, and it is another state."""
    model, optimizer = pair()
    nn.init.zeros_(model[0].bias)
    kept = copied(model)
    for name, changed in (
        ("1.running_var", torch.nextafter(kept["1.running_var"], torch.tensor(9.0))),
        ("1.num_batches_tracked", kept["1.num_batches_tracked"] + 1),
        ("0.bias", -kept["0.bias"]),
    ):
        mark([(model, at(3))])
        model.load_state_dict(other(model))
        model.load_state_dict(kept | {name: changed})
        assert origin(model) is None
        assert list(forgotten([model])) == [at(3)]
        model.load_state_dict(kept)
        assert origin(model) is None, "that it was lost is told already"
    mark([(model, at(3)), (optimizer, at(3, "optimizer"))])
    model.load_state_dict(other(model))
    step(model, optimizer)
    model.load_state_dict(kept)
    assert origin(model) is None, "the moments have moved"
    assert [str(came) for came in forgotten([model])] == [str(at(3))]
    assert warned == [said(at(3))]


def said(*lost: Origin) -> str:
    """What a step says of parts that were loaded around the guard."""
    return (
        f"{'; '.join(map(str, lost))}: loaded around the guard since, and stepped now: nobody "
        "knows of which epoch it is. What to do: load by restore() or guard.load()"
    )


def test_what_is_loaded_all_the_time_is_not_looked_at_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A target network, or an average that is kept by loads: reading it again each time costs."""
    model, _ = pair()
    looks: list[nn.Module] = []
    real = contents.contents

    def look(module: nn.Module) -> bytes | None:
        looks.append(module)
        return real(module)

    monkeypatch.setattr(contents, "contents", look)
    mark([(model, at(3))])
    for _ in range(20):
        model.load_state_dict(other(model))
    assert [looks.count(layer) for layer in model] == [5] * 3
    assert list(forgotten([model])) == [at(3)]


def test_a_part_of_two_components_is_taken_back_as_both() -> None:
    """The generator by itself, and the whole of which it is a part."""
    whole = nn.ModuleDict({"g": net(), "d": net()})
    for part in (whole, whole["g"]):
        mark((one, at(3)) for one in (whole, whole["g"]))
        kept = copied(part)
        part.load_state_dict(other(part))
        assert origin(whole) is origin(whole["g"]) is None
        part.load_state_dict(kept)
        assert origin(whole) == origin(whole["g"]) == at(3)


def test_tied_weights_are_taken_back_with_all_that_hold_them() -> None:
    """They are loaded with the first layer that has them, before the next is looked at."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    mark([(model, at(3))])
    kept = copied(model)
    model.load_state_dict(other(model))
    assert origin(model) is None
    model.load_state_dict(kept)
    assert origin(model) == at(3)


class Scaled(nn.Linear):
    """One that keeps something beside its tensors."""

    scale = 1.0

    def get_extra_state(self) -> float:
        return self.scale

    def set_extra_state(self, state: float) -> None:
        self.scale = state


class Eager(nn.Linear):
    """One that loads by a method of its own."""

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.loads = True


@pytest.mark.parametrize("kind", [Scaled, Eager, "meta"])
def test_what_can_not_be_seen_whole_is_not_taken_back(kind: Any) -> None:
    """Whatever else such a load may have changed, nobody knows."""
    model = nn.Linear(2, 2, device="meta") if kind == "meta" else kind(2, 2)
    mark([(model, at(3))])
    kept = copied(model) if kind != Scaled else model.state_dict()
    model.load_state_dict(kept)
    assert origin(model) is None
    assert list(forgotten([model])) == [at(3)]


def test_a_load_in_place_is_no_load_that_was_taken_back(warned: list[str]) -> None:
    """``state_dict()``, filled in place by another library, then loaded: what there was is gone
    before anybody could look.
    """
    model, _ = pair()
    mark([(model, at(3))])
    live = model.state_dict()
    with torch.no_grad():
        for tensor in live.values():
            tensor.add_(1)
    model.load_state_dict(live)
    assert origin(model) is None
    assert list(forgotten([model])) == [at(3)]


def test_a_load_of_its_own_with_something_new_is_taken_back() -> None:
    """Some of it is exchanged in what ``state_dict()`` gave, and put back from copies."""
    model, _ = pair()
    mark([(model, at(3))])
    kept = copied(model)
    model.load_state_dict(model.state_dict() | {"2.bias": kept["2.bias"] + 1})
    assert origin(model) is None
    model.load_state_dict(kept)
    assert origin(model) == at(3)


@pytest.mark.parametrize("how", ["head", "adapter", "wrapped", "frozen"])
def test_what_was_put_in_since_is_loaded_as_well(how: str) -> None:
    """A new head, an adapter, layers made anew around the same parameters: what the rest holds
    again says nothing of them. That they hold again what they held does.
    """
    model, optimizer = pair()
    mark([(model, at(3)), (optimizer, at(3, "optimizer"))])
    if how == "head":
        model[2] = nn.Linear(3, 1)
    elif how == "adapter":
        model[0].register_module("low", nn.Linear(1, 1))
    elif how == "wrapped":
        layer = nn.Linear(3, 1)
        layer.weight, layer.bias = model[2].weight, model[2].bias
        model[2] = layer
    else:
        model[2] = nn.Linear(3, 1)
        model[0].requires_grad_(False)
        step(model, AdamW(model[2].parameters()))
        model[2].load_state_dict(other(model[2]))
        assert origin(model) is None, "seen by itself, once it was stepped"
        return
    kept = copied(model)
    changed = {name: held + (name[0] == "2" or "low" in name) for name, held in kept.items()}
    model.load_state_dict(changed)
    assert origin(model) is None
    model.load_state_dict(kept)
    assert origin(model) == at(3)


def test_parts_inside_and_around_follow_what_came_last() -> None:
    """All of a part, or of a whole: it is of that epoch. Of less it stays what it was, and has
    nothing to do any more with what did come.
    """
    whole = nn.ModuleDict({"g": net(), "d": net()})
    mark([(whole, at(1)), (whole["g"], at(1))])
    mark([(whole, at(2, known=numbers(whole.parameters())))])
    came = origin(whole["g"])
    assert came == at(2, known=numbers(whole["g"].parameters()), follows=True)
    mark([(whole["g"], at(3))])
    assert (origin(whole), origin(whole["g"])) == (at(2, known=origin(whole).known), at(3))
    step(whole["g"], AdamW(whole["g"].parameters()))
    mark([(whole["g"], at(4, "g")), (whole["d"], at(4, "d"))])
    assert origin(whole) == at(4, "g", follows=True)
    whole["g"].load_state_dict(other(whole["g"]))
    assert origin(whole) is None
    mark([(whole, at(5))])
    assert origin(whole["g"]) == at(5, follows=True)
    clear([whole], numbers(whole["g"].parameters()))
    assert origin(whole) is origin(whole["g"]) is None


def test_what_was_put_in_since_is_no_part_of_the_whole() -> None:
    """A head of another run in a model of one: the optimizer of the head asks the head alone."""
    model = net()
    mark([(model, at(3))])
    model[2] = nn.Linear(3, 1)
    assert origin(model[2]) is None
    optimizer = AdamW(model[2].parameters())
    mark([(model[2], at(2, run="other")), (optimizer, at(2, "optimizer", run="other"))])
    step(model, optimizer)
    assert origin(model) == at(3)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    assert "this step would be a mixture" in str(refused(model, optimizer))


def test_a_lazy_layer_is_no_obstacle() -> None:
    """Not made yet, in a part that is marked: steps and looks pass it by."""
    model, (other_model, optimizer) = net(), pair()
    mark([(model, at(3))])
    model[2] = nn.LazyLinear(1)
    step(other_model, optimizer)
    assert beside([other_model]) == {}
    lazy = nn.Sequential(nn.LazyLinear(1))
    mark([(lazy, at(3))])
    step(other_model, AdamW(other_model.parameters()))
    assert origin(lazy) == at(3)


# --- the first step -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"step": 2},
        {"step": 3, "run": "another"},
        {"step": 3, "index": Index("sft", 1, 3, "c")},
        {"step": 3, "index": Index("main", 2, 3, "c")},
        {"step": 3, "index": Index("main", 1, 3, "d")},
    ],
    ids=["step", "run", "lineage", "generation", "configuration"],
)
def test_moments_of_another_index_are_refused(other: dict[str, Any], warned: list[str]) -> None:
    """At each try, until they are loaded together."""
    model, optimizer = pair()
    mark([(model, at(3)), (optimizer, at(path="optimizer", **other))])
    for _ in range(2):
        error = refused(model, optimizer)
        assert error.shards == (str(at(path="optimizer", **other)), str(at(3)))
        assert "this step would be a mixture" in str(error)
    mark([(optimizer, at(3, "optimizer"))])
    step(model, optimizer)
    step(model, optimizer)
    assert str(origin(model)) == f"{at(3)}, trained on since"
    assert warned == []


def test_weights_that_went_back_without_their_moments_are_refused() -> None:
    """To the very epoch that both came from: one of them has been trained on since."""
    model, optimizer = pair()
    mark([(model, at(3)), (optimizer, at(3, "optimizer"))])
    step(model, optimizer)
    mark([(model, at(3))])
    assert "optimizer of main 1/3 (c) of run run, trained on since" in str(
        refused(model, optimizer)
    )
    mark([(model, at(3)), (optimizer, at(3, "optimizer"))])
    step(model, optimizer)


def test_weights_alone_are_refused_unless_a_lineage_says_so() -> None:
    """Fine-tuning is said, not guessed, whatever is to step them."""
    model, optimizer = pair()
    for one in (optimizer, SGD(model.parameters(), lr=0.1)):
        mark([(model, at(3, known=numbers(model.parameters())))])
        said = "without the optimizer state that was saved with them"
        assert said in str(refused(model, one))
        refused(model, one)
        mark([(model, at(3, history=History("sft"), known=numbers(model.parameters())))])
        step(model, one)


def test_what_was_loaded_around_is_warned_of_once(warned: list[str]) -> None:
    """Of which epoch it is nobody knows, so nothing is refused."""
    model, optimizer = pair()
    step(model, optimizer)
    both = [(model, at(3)), (optimizer, at(3, "optimizer"))]
    for parts in ([model], [optimizer], [optimizer, model]):
        mark(both)
        for part in parts:
            part.load_state_dict(other(part) if part is model else part.state_dict())
        step(model, optimizer)
        step(model, optimizer)
        assert warned == [said(*(came for part, came in reversed(both) if part in parts))]


def came(step: int, model: nn.Module, *optimizers: Optimizer) -> None:
    """Mark parts as an epoch brings them that had moments of all of these parameters."""
    mark([(model, at(step, known=numbers(model.parameters())))])
    for optimizer in optimizers:
        own = numbers(p for group in optimizer.param_groups for p in group["params"])
        mark([(optimizer, at(step, "optimizer", known=own))])


def test_an_optimizer_that_is_made_anew_is_not_the_one_that_was_saved() -> None:
    """Its moments are lost in silence; those that were there would be saved beside what it does.

    Where the one that came has stepped, another may follow it: a second phase.
    """
    model, optimizer = pair()
    step(model, optimizer)
    came(3, model, optimizer)
    new = AdamW(model.parameters())
    assert "without the optimizer state that was saved" in str(refused(model, new))
    head = AdamW(model[2].parameters())
    refused(model, head)
    step(model, optimizer)
    step(model, new, head)
    came(4, model, optimizer)
    model[:2].requires_grad_(False)
    mark([(model, at(4, known=numbers(model[0].parameters())))])
    step(model, head)


def test_a_state_of_no_step_is_none(warned: list[str]) -> None:
    """Adagrad makes its own when it is made: for a second phase that is begun anew."""
    model, optimizer = pair()
    step(model, optimizer)
    came(3, model, optimizer)
    assert "without the optimizer state" in str(refused(model, Adagrad(model.parameters())))
    step(model, optimizer)
    step(model, Adagrad(model.parameters()))
    assert warned == []


def test_moments_that_were_dropped_are_missed(warned: list[str]) -> None:
    """Unless that was asked for, by name."""
    model, optimizer = pair()
    step(model, optimizer)
    came(3, model, optimizer)
    optimizer.state.clear()
    assert "it was dropped since" in str(refused(model, optimizer))
    anew(optimizer, "reset")
    step(model, optimizer)
    anew(AdamW(model.parameters()), "reset")
    assert warned == []


def test_moments_are_of_the_weights_that_came_with_them() -> None:
    """A part of the weights came, and all moments: the rest of them is of any other state."""
    model, optimizer = pair()
    step(model, optimizer)
    came(3, model, optimizer)
    mark([(model, at(3, known=numbers(model[0].parameters())))])
    assert "moments without the weights" in str(refused(model, optimizer))
    came(3, model)
    step(model, optimizer)


def test_what_keeps_no_state_may_step_between(warned: list[str]) -> None:
    """A perturbation that is taken back, by plain SGD; with momentum it is another optimizer."""
    model, optimizer = pair()
    step(model, optimizer)
    came(3, model, optimizer)
    refused(model, SGD(model.parameters(), 0.1, momentum=0.9))
    step(model, SGD(model.parameters(), 0.1), optimizer)
    assert str(common([model, optimizer], "it")) == f"{at(3)}, trained on since"
    assert warned == []


def test_moments_that_are_left_behind_are_no_state_to_save(warned: list[str]) -> None:
    """Whoever stepped their weights since, if it is not in the state; else it is a phase of it."""
    model, optimizer = pair()
    step(model, optimizer)
    came(3, model, optimizer)
    plain, before = SGD(model.parameters(), 0.1), changes()
    step(model, plain)
    step(model, plain)
    assert changes() == before + 1, "a save asks once more, and no more than once"
    with pytest.raises(Refused, match="stepped, and moments that were not"):
        common([model, optimizer], "it")
    assert common([model, optimizer, plain], "it") == origin(model)
    step(model, optimizer)
    assert common([model, optimizer], "it") == origin(model)
    assert warned == []


def test_what_torch_steps_to_make_a_state_is_no_update(warned: list[str]) -> None:
    """Its own way to describe an optimizer that has none yet; a warm-up from 0 is an update."""
    model, optimizer = pair(AdamW, lr=1e-2)
    came(3, model)
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.state
    came(3, model, optimizer)
    step(model, optimizer)
    came(3, model)
    refused(model, AdamW(model.parameters(), lr=0.0))
    assert warned == []


def test_two_optimizers_may_step_one_model_in_any_order(warned: list[str]) -> None:
    """As in a GAN, or with a rate of its own for the head; also where something else is loaded
    between their first steps."""
    model = net()
    body, head = AdamW(model[0].parameters()), SGD(model[2].parameters(), lr=0.1)
    both = [(model, at(3)), (body, at(3, "body")), (head, at(3, "head"))]
    for first, second in ((body, head), (head, body)):
        mark(both)
        step(model, first)
        step(model, first)
        mark([(net(), at(7))])
        step(model, second)
        step(model, body, head)
    mark([*both[:2], (head, at(2, "head"))])
    step(model, body)
    refused(model, head)
    assert warned == []


def test_a_teacher_of_another_run_is_nobodys_business(warned: list[str]) -> None:
    """It is in the state, in the loss, and in no optimizer; nor is an encoder that is frozen."""
    model, optimizer = pair()
    teacher = net().requires_grad_(False)
    student = [(model, at(3)), (optimizer, at(3, "optimizer"))]
    mark(
        [*student, (teacher, at(9, "teacher", run="another", known=numbers(teacher.parameters())))]
    )
    step(model, optimizer)
    assert common([teacher, model, optimizer], "it") == origin(model)
    assert warned == []


def test_tied_weights_belong_to_all_that_hold_them() -> None:
    """An embedding that two modules share must be of both their epochs."""
    one, other = net(), net()
    other[0].weight = one[0].weight
    optimizer = AdamW(one.parameters())
    mark([(one, at(3)), (other, at(2, "other")), (optimizer, at(3, "optimizer"))])
    refused(one, optimizer)
    mark([(other, at(3, "other"))])
    step(one, optimizer)


def test_closures_and_scalers_are_asked() -> None:
    """Each way to step goes through the one hook; a step that a scaler leaves out does not."""
    model, optimizer = pair(LBFGS)
    mark([(model, at(3)), (optimizer, at(2, "optimizer"))])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(torch.ones(4, 3)).square().mean()
        loss.backward()
        return loss

    with pytest.raises(Refused):
        optimizer.step(closure)
    mark([(optimizer, at(3, "optimizer"))])
    optimizer.step(closure)

    model, optimizer = pair()
    mark([(model, at(3)), (optimizer, at(2, "optimizer"))])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(torch.full((4, 3), torch.inf)).mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    scaler.scale(model(torch.ones(4, 3)).mean()).backward()
    with pytest.raises(Refused):
        scaler.step(optimizer)


class Accelerated(Optimizer):
    """As Accelerate wraps one: an Optimizer by name, whose parts are those of another."""

    def __init__(self, inner: Optimizer) -> None:
        self.optimizer = inner

    @property
    def state(self) -> Any:  # as Accelerate's
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:  # as Accelerate's
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # as Accelerate's
        self.optimizer.step(closure)


class Later(Optimizer):
    """One whose groups come with the first batch."""

    def __init__(self) -> None:
        pass


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # dynamo's own imports
def test_a_compiled_step_is_asked() -> None:
    """Dynamo breaks its graph at optimizers' hooks, and runs them."""
    model, optimizer = pair()
    mark([(model, at(3)), (optimizer, at(2, "optimizer"))])
    compiled = torch.compile(optimizer.step, backend="eager")
    model(torch.ones(4, 3)).sum().backward()
    with pytest.raises(Refused):
        compiled()
    mark([(optimizer, at(3, "optimizer"))])
    compiled()
    assert "trained on since" in str(origin(model))


def test_wrapped_optimizers_are_known_by_their_wrapper(warned: list[str]) -> None:
    """That is what people save; torch's hooks are not there, and the one inside is stepped."""
    model, inner = pair()
    outer = Accelerated(inner)
    step(model, outer)
    mark([(model, at(3)), (outer, at(3, "optimizer")), (Later(), at(3, "later"))])
    step(model, outer)
    assert [str(origin(part)).endswith("trained on since") for part in (model, outer)] == [True] * 2
    mark([(model, at(2))])
    refused(model, outer)
    mark([(model, at(3)), (outer, at(3, "optimizer"))])
    step(model, outer)
    assert list(beside([model])) == [outer]
    assert warned == []


def test_an_optimizer_that_nobody_knows_is_left_alone(warned: list[str]) -> None:
    """Of other modules, of bare tensors, and of a model that was never loaded."""
    model, optimizer = pair()
    stranger = net()
    mark([(stranger, at(3, known=numbers(stranger.parameters())))])
    step(model, optimizer)
    weight = nn.Parameter(torch.ones(2))
    bare = SGD([weight], lr=0.1)
    weight.grad = torch.ones(2)
    bare.step()
    assert warned == []


def test_after_the_first_step_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the hot path: parameters are not gone through again until something is loaded."""
    model, optimizer = pair()
    mark([(model, at(3)), (optimizer, at(3, "optimizer"))])
    asked: list[object] = []
    real = indices._weights_of

    def counted(one: Optimizer) -> Iterator[nn.Module]:
        asked.append(one)
        return real(one)

    monkeypatch.setattr(indices, "_weights_of", counted)
    for _ in range(3):
        step(model, optimizer)
    assert len(asked) == 1
    other = net()
    mark([(other, at(3))])
    for _ in range(3):
        step(model, optimizer)
    assert len(asked) == 2
    model[0].requires_grad_(False)
    mark([(other, at(4))])
    for thawed in (False, False, True, True):
        model[0].requires_grad_(thawed)
        step(model, optimizer)
    assert len(asked) == 4, "once more, when something thaws"


def test_parameters_that_are_taken_in_later_are_no_mixture() -> None:
    """Layers that thaw: of the same epoch, untouched until now, in an optimizer that has moved."""
    body, head = net(), nn.Linear(1, 1)
    optimizer = AdamW(head.parameters())
    mark([(body, at(3, "body")), (head, at(3, "head")), (optimizer, at(3, "optimizer"))])
    step(nn.Sequential(body, head), optimizer)
    optimizer.add_param_group({"params": list(body.parameters())})
    step(nn.Sequential(body, head), optimizer)


# --- beside, common -----------------------------------------------------------------------------


def test_beside_is_what_shares_parameters() -> None:
    """And is marked: optimizers with their models, models with models they are tied to."""
    model, optimizer = pair()
    stranger, _ = pair()
    mark([(model, at(3)), (optimizer, at(3, "optimizer")), (stranger, at(1))])
    assert list(beside([model]).values()) == [at(3, "optimizer")]
    assert list(beside([optimizer]).values()) == [at(3)]
    assert beside([model, optimizer]) == {}
    assert list(beside([model[0]]).values()) == [at(3), at(3, "optimizer")]
    assert beside([net(), object()]) == {}


def test_beside_is_what_shares_memory() -> None:
    """Another module over the same memory: what is loaded into one is in both."""
    model, optimizer = pair()
    twin = net()
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        its.data = mine.data
    mark([(model, at(3)), (optimizer, at(3, "optimizer"))])
    assert list(beside([twin]).values()) == [at(3), at(3, "optimizer")]
    mark([(twin, at(2))])
    refused(model, optimizer)
    odd = nn.Linear(3, 3, device="meta")
    mark([(odd, at(1))])
    assert beside([odd]) == {}


def test_a_number_is_given_once() -> None:
    """An id, and an address, are given out again: a new head would be what an old one was."""
    given = set()
    for _ in range(20):
        parameter = nn.Parameter(torch.ones(2))
        given.add(number(parameter))
        assert number(parameter) in given
    assert len(given) == 20


def test_a_run_goes_on_from_what_is_trained() -> None:
    """Its lineage leads, wherever it stands in the state; and a mixture is none to go on from."""
    model, optimizer = pair()
    teacher = net()
    assert common([model, optimizer], "it") is None
    mark([(teacher, at(9, run="another"))])
    assert common([teacher, model, optimizer], "it") == origin(teacher)
    mark([(model, at(3))])
    assert common([teacher, model, optimizer], "it") == at(3)
    mark([(optimizer, at(2, "optimizer"))])
    with pytest.raises(Refused, match="it would be a mixture"):
        common([teacher, model, optimizer], "it")


# --- lineages -----------------------------------------------------------------------------------

STAMP = Stamp("run-1", "sft", 3, 1200, "d", 0, 1, 1, "c", None, (Fork("sft", "r", "main", 1, 9),))


def test_a_fork_names_where_it_began() -> None:
    """And all that came before it, oldest first."""
    history = History.of(STAMP)
    assert history == History("sft", STAMP.forks)
    after = history.onward("dpo", "run-1", index_of(STAMP), "preferences")
    assert after.lineage == "dpo"
    assert after.forks == (*STAMP.forks, Fork("dpo", "run-1", "sft", 3, 1200, "preferences"))
    assert index_of(STAMP) == Index("sft", 3, 1200, "c")


@pytest.mark.parametrize("name", ["", "sft"])
def test_a_lineage_that_is_named_again_goes_on(name: str) -> None:
    """A script says at each start what it said at the first; it begins nothing anew."""
    assert History.of(STAMP).onward(name, "run-1", index_of(STAMP), "") == History.of(STAMP)


def test_a_name_that_was_borne_before_is_refused() -> None:
    """Two histories under one name could not be told apart; "main" is where "sft" began."""
    with pytest.raises(ValueError, match="lineage='main': epoch 3/1200 came from"):
        History.of(STAMP).onward("main", "run-1", index_of(STAMP), "")


def test_a_lineage_may_begin_with_several_epochs() -> None:
    """Each is one of its beginnings, once; those of another lineage are none of it."""
    one, two = (
        History().onward("vlm", run, Index("main", 1, step, ""), "guard.load of model")
        for run, step in (("a", 3), ("b", 5))
    )
    both = one.joined([two, one, History("sft", STAMP.forks)])
    assert both == History("vlm", (*one.forks, *two.forks))
    assert both.joined([]) == both
    assert both.began() == both.forks
    assert History.of(STAMP).onward("dpo", "r", index_of(STAMP), "").began()[0].of == "sft"
    assert History().began() == ()


@pytest.mark.parametrize("first", ["a", "b", "new"])
def test_what_is_trained_of_several_epochs_names_them_all(first: str) -> None:
    """Whichever stands first, and a new part beside them, which began here."""
    parts = {name: nn.Linear(2, 2) for name in sorted(["a", "b", "new"], key=first.__ne__)}
    optimizer = AdamW([p for part in parts.values() for p in part.parameters()])
    indices.begin([*((part, name) for name, part in parts.items()), (optimizer, "o")], History())
    for count, name in enumerate(("a", "b")):
        where = Index("main", 1, count, "")
        history = History().onward("vlm", name, where, "guard.load of model")
        mark([(parts[name], Origin(name, where, "model", history))])
    optimizer.step()
    led = common([optimizer, *parts.values()], "it")
    assert led is not None
    assert led.history.lineage == "vlm"
    assert sorted(fork.run for fork in led.history.forks) == ["a", "b"]
    assert "begun here, going on as vlm, trained on since" in str(origin(optimizer))
