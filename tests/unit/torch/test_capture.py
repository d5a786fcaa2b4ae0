"""Shows what a state is captured as: by which names, stored how often, and what is refused."""

import copy
import random
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from statekit import Snapshot, train
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from handfast.errors import Unstorable
from handfast.store import objects
from handfast.torch.capture import capture


def paths(state: dict[str, object], **options: Any) -> list[str]:
    """The stored paths, in order."""
    return [spec.path for spec in capture(state, **options).specs]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


MODEL = ["model/0.weight", "model/0.bias", "model/2.weight", "model/2.bias"]


def test_capture_neither_steps_nor_fills_a_fresh_optimizer() -> None:
    """DCP's get_optimizer_state_dict steps a fresh AdamW, and gives nothing where grads are."""
    model = net()
    opt = torch.optim.AdamW(model.parameters(), weight_decay=0.5)
    for gradients in (False, True):
        if gradients:
            model(torch.randn(3, 4)).sum().backward()
        before = copy.deepcopy(model.state_dict())
        seeds = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
        assert paths({"model": model, "opt": opt}) == MODEL
        assert not opt.state
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all((p.grad is not None) is gradients for p in model.parameters())
        assert random.getstate() == seeds[0]
        assert torch.equal(torch.get_rng_state(), seeds[1])
        assert (np.random.get_state()[1] == seeds[2]).all()


def test_optimizer_state_goes_by_parameter_name() -> None:
    """Positions change with the order of groups and freezing; names do not."""
    model = net()
    opt = torch.optim.AdamW([{"params": model[2].parameters()}, {"params": [model[0].weight]}])
    train(model, opt)
    captured = capture({"model": model, "opt": opt})
    assert [s.path for s in captured.specs if s.path.startswith("opt")] == [
        f"opt/state/{name}/{key}"
        for name in ("2.weight", "2.bias", "0.weight")
        for key in ("step", "exp_avg", "exp_avg_sq")
    ]
    tree: Any = captured.objects["opt"]
    assert [group["params"] for group in tree["param_groups"]] == [
        ["2.weight", "2.bias"],
        ["0.weight"],
    ]


def test_a_parameter_of_no_module_goes_by_group_and_index() -> None:
    """A loose temperature or prompt that only the optimizer knows is saved as well."""
    model, loose = nn.Linear(4, 4), nn.Parameter(torch.zeros(3))
    opt = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias, loose]}], momentum=1)
    for parameter in (model.weight, model.bias, loose):
        parameter.grad = torch.ones_like(parameter)
    opt.step()
    state = [p for p in paths({"model": model, "opt": opt}) if p.startswith("opt")]
    assert state == [f"opt/state/{n}/momentum_buffer" for n in ("weight", "bias", "1/1")]


def test_one_optimizer_over_two_modules_names_both() -> None:
    """Actor and critic have layers of the same name; neither may hide the other."""
    actor, critic = nn.Linear(4, 4), nn.Linear(4, 4)
    opt = torch.optim.SGD([*actor.parameters(), *critic.parameters()], momentum=0.9)
    train(nn.Sequential(actor, critic), opt)
    names = [p for p in paths({"a": actor, "c": critic, "o": opt}) if p.startswith("o/")]
    keys = ("a.weight", "a.bias", "c.weight", "c.bias")
    assert names == [f"o/state/{key}/momentum_buffer" for key in keys]


def test_one_more_module_in_the_state_renames_nothing() -> None:
    """An EMA copy that is added later must not make the old epochs unreadable."""
    model = net()
    opt = torch.optim.SGD(model.parameters(), momentum=0.9)
    train(model, opt)
    ema = torch.optim.swa_utils.AveragedModel(model)
    before = paths({"model": model, "opt": opt})
    after = paths({"ema": ema, "model": model, "opt": opt})
    assert [path for path in after if not path.startswith("ema/")] == before
    assert "ema/module.0.weight" in after  # the user's own attribute, not a wrapper's


def test_wrappers_leave_no_trace_in_names() -> None:
    """A run saved compiled, or with activation checkpointing, loads without, and back."""
    plain = net()
    wrapped = nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))
    compiled = torch.compile(net(), backend="eager")
    inner = net()
    inner[0] = torch.compile(checkpoint_wrapper(inner[0]), backend="eager")
    parallel = nn.DataParallel(net())
    for model in (plain, wrapped, compiled, inner, parallel):
        assert paths({"model": model}) == MODEL
    saved = Snapshot({"model": compiled})
    for model in (plain, wrapped, inner, parallel):
        saved.restore({"model": model})
        pairs = zip(model.state_dict().values(), compiled.state_dict().values(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_a_users_own_module_called_module_keeps_its_name() -> None:
    """Only what a wrapper adds is dropped; names alone would merge two different layers."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2, bias=False)
            self.weight = nn.Parameter(torch.zeros(2))

    expected = ["model/weight", "model/module.weight"]
    assert paths({"model": Own()}) == expected
    assert paths({"model": nn.DataParallel(Own())}) == expected


def test_a_slash_in_a_name_makes_no_level() -> None:
    """Two layers must never meet under one path because of how they are called."""
    model = nn.ModuleDict({"a/b": nn.Linear(1, 1, bias=False), "a~1b": nn.Linear(1, 1, bias=False)})
    assert paths({"model": model}) == ["model/a~1b.weight", "model/a~01b.weight"]


def test_equal_paths_are_refused() -> None:
    """One of the two would be lost in silence."""
    inner = {"b": torch.ones(1)}
    with pytest.raises(ValueError, match=r"two things have the path a\[1\]"):
        capture({"a": {1: torch.ones(1)}, "a[1]": torch.zeros(1), "x": inner})


def test_tied_parameters_are_stored_once() -> None:
    """The output layer that shares the embedding's weights, in one module and across two."""
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False)})
    model["out"].weight = model["embed"].weight
    captured = capture({"model": model, "head": model["out"]})
    assert [spec.path for spec in captured.specs] == ["model/embed.weight"]
    assert captured.aliases == {
        "model/out.weight": "model/embed.weight",
        "head/weight": "model/embed.weight",
    }


def test_overlapping_views_that_are_not_equal_are_stored_apart() -> None:
    """A view of the first rows, a transposed view and an empty one are tensors of their own."""
    base = torch.arange(16.0).reshape(4, 4)
    state: dict[str, object] = {
        "base": base,
        "rows": base[:2],
        "turned": base.t(),
        "none": base[:0],
    }
    saved = Snapshot({**state, "none2": torch.empty(0, 4)})
    assert not saved.captured.aliases
    assert torch.equal(saved.views["rows"], base[:2])
    assert torch.equal(saved.views["turned"], base.t())


def test_a_second_capture_keeps_the_plan_while_the_structure_stays() -> None:
    """A save every step can't afford to name ten thousand tensors anew."""
    model = net()
    opt = torch.optim.AdamW(model.parameters())
    state: dict[str, object] = {"model": model, "opt": opt, "gen": torch.Generator()}
    first = capture(state)
    grown = capture(state, previous=first)
    assert grown.specs is first.specs
    train(model, opt)
    grown = capture(state, previous=first)
    assert len(grown.specs) == len(first.specs) * 4  # the optimizer has its state now
    train(model, opt)
    again = capture(state, previous=grown)
    assert again.specs is grown.specs
    assert all(one is other for one, other in zip(again.tensors, grown.tensors, strict=True))
    assert again.objects["gen"] is not grown.objects["gen"]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m[0].weight, "data", torch.ones(4, 5)),
        lambda m: setattr(m[0].weight, "data", torch.ones(4, 4, dtype=torch.bfloat16)),
        lambda m: setattr(m[0].weight, "data", torch.ones(4, 4).t()),
        lambda m: setattr(m[0].weight, "data", torch.ones(1, 4).expand(4, 4)),
        lambda m: setattr(m[0], "weight", m[2].weight),
        lambda m: m.append(nn.Linear(2, 1)),
        lambda m: m[0].register_buffer("extra", torch.ones(1)),
        lambda m: setattr(m[0], "bias", None),
    ],
    ids=["shape", "dtype", "stride", "repeats", "tie", "layer", "buffer", "gone"],
)
def test_a_changed_structure_is_seen(change: Any) -> None:
    """A stale plan would put values under another tensor's name."""
    model = net()
    first = capture({"model": model})
    change(model)
    second = capture({"model": model}, previous=first)
    fresh = capture({"model": model})
    assert second.specs == fresh.specs != first.specs
    assert second.aliases == fresh.aliases


def test_a_tie_that_comes_or_goes_under_the_same_parameters_is_seen() -> None:
    """Through `.data` the parameters stay the same objects, and a stale tie would lose one."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    apart = capture({"model": model})
    model[1].weight.data = model[0].weight.data
    tied = capture({"model": model}, previous=apart)
    assert tied.aliases == {"model/1.weight": "model/0.weight"}
    model[1].weight.data = model[0].weight.data.t()
    turned = capture({"model": model}, previous=tied)
    assert (turned.aliases, len(turned.specs)) == ({}, 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")  # a prototype
@pytest.mark.parametrize("name", ["meta", "masked"])
def test_what_became_unstorable_is_seen(name: str) -> None:
    """A model may be moved to the meta device between two saves, or a tensor be replaced."""
    make, why = UNSTORABLE[name]
    first = capture({"t": torch.ones(2)})
    with pytest.raises(Unstorable, match=why):
        capture({"t": make()}, previous=first)


def test_renamed_tensors_of_the_same_shapes_are_seen() -> None:
    """Two layers that change places have the same shapes, and other names."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    opt = torch.optim.SGD(model.parameters(), momentum=0.9)
    train(model, opt, width=2)
    state: dict[str, object] = {"model": model, "opt": opt}
    first = capture(state)
    model[0], model[1] = model[1], model[0]
    second, fresh = capture(state, previous=first), capture(state)
    assert second.specs == fresh.specs
    assert list(map(id, second.tensors)) == list(map(id, fresh.tensors))
    assert second.specs != first.specs


def ragged(*parts: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor(list(parts), layout=torch.jagged)


UNSTORABLE = {
    "meta": (lambda: torch.ones(2, device="meta"), "meta device"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "layout"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "unbind"),
    "jagged": (lambda: ragged(torch.ones(2), torch.ones(3)), "unbind"),
    "lazy": (nn.UninitializedParameter, "first forward"),
    "function": (lambda: {"fn": len}, "code"),
    "lambda": (lambda: {"a": [{"fn": lambda: 0}]}, "code"),
    "object": (lambda: {"a": object()}, "no encoding"),
    "masked": (lambda: torch.masked.masked_tensor(torch.ones(2), torch.ones(2) > 0), "subclass"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of (MaskedTensors|nested)")  # prototypes
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated, and used
@pytest.mark.parametrize("name", UNSTORABLE)
def test_what_cannot_be_stored_is_named(name: str) -> None:
    """The error says where it stands, and what to do, before anything is written."""
    make, why = UNSTORABLE[name]
    with pytest.raises(Unstorable, match=why) as caught:
        objects.encode(capture({"ok": torch.ones(1), "bad": make()}).objects)
    assert caught.value.path.startswith("bad")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated, and used
def test_a_quantized_buffer_is_named() -> None:
    """Its scales are not in its bytes."""
    model = nn.Module()
    model.register_buffer("q", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    with pytest.raises(Unstorable, match="qint8") as caught:
        capture({"model": model})
    assert caught.value.path == "model/q"


def test_state_that_contains_itself_is_refused() -> None:
    """It has no end, so it can't be written."""
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(Unstorable, match="nested"):
        capture({"loop": loop})


@pytest.mark.parametrize("value", [3, "name", None, (torch.ones(1), 3), object(), len])
def test_a_value_that_cannot_be_restored_in_place_is_refused_at_once(value: object) -> None:
    """Not at the first restore, after days of saves."""
    with pytest.raises(TypeError, match=r"state: step.* can't change in place.*extra="):
        capture({"step": value})


def test_the_habit_of_torch_save_is_refused() -> None:
    """A fresh optimizer's state_dict() is empty: a resume would train on without any moments."""
    model = nn.Linear(2, 2)
    state = {"model": model, "opt": torch.optim.AdamW(model.parameters()).state_dict()}
    with pytest.raises(TypeError, match=r"opt is an optimizer's state_dict.*the optimizer itself"):
        capture(state)


def test_a_plain_loader_is_refused_with_a_way_out() -> None:
    """A DataLoader has no position that could be saved."""
    loader = torch.utils.data.DataLoader([1, 2])
    with pytest.raises(TypeError, match="StatefulDataLoader"):
        capture({"loader": loader})


@pytest.mark.parametrize("name", ["rng", "extra", "grads", ""])
def test_reserved_component_names_are_refused(name: str) -> None:
    """They are entries of the capture's own."""
    with pytest.raises((ValueError, TypeError), match="name"):
        capture({name: torch.ones(1)})


def test_state_of_a_parameter_that_was_taken_out_is_refused() -> None:
    """It has no name any more, and dropping it in silence would lose it."""
    model = nn.Linear(4, 4)
    opt = torch.optim.SGD(model.parameters(), momentum=0.9)
    train(model, opt)
    opt.param_groups[0]["params"].pop()
    with pytest.raises(Unstorable, match="none of its param_groups"):
        capture({"model": model, "opt": opt})


def test_nothing_is_replicated_unless_declared_or_known() -> None:
    """Equal looking is not knowledge: a dropout mask or an expert may differ by rank."""
    model = net()
    state: dict[str, object] = {"model": model, "ema": {"w": torch.ones(2)}}
    assert capture(state).replicated == ()
    assert capture(state, replicated=("ema",)).replicated == ("ema/w",)
    assert capture(state, replicated=("model/*.bias",)).replicated == (MODEL[1], MODEL[3])
    first = capture(state, replicated=("ema/**",))
    assert capture(state, replicated=("model",), previous=first).replicated == tuple(sorted(MODEL))


def test_containers_keep_their_types_and_order() -> None:
    """A tree of plain values is captured as it is, with references where tensors were."""
    box = {"b": OrderedDict(z=1, a=(2, 3)), "t": (torch.ones(1), 5), 7: {"deep": [torch.ones(2)]}}
    captured = capture({"box": box})
    assert captured.objects["box"] == {
        "b": OrderedDict(z=1, a=(2, 3)),
        "t": (objects.TensorRef("box/t[0]"), 5),
        7: {"deep": [objects.TensorRef("box[7]/deep[0]")]},
    }
