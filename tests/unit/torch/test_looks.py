"""Shows that a save sees whatever became of a live tensor since the last one, and holds none."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from statekit import train
from torch import Tensor, nn

from handfast.checkpoint.images import StagingImage
from handfast.errors import Unstorable
from handfast.store import objects
from handfast.torch.capture import capture
from handfast.torch.memory import bytes_of
from handfast.torch.stage import map_image
from handfast.torch.state import TorchState, uncollected


class Saver:
    """Saves one state again and again, into one image while its structure stays."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state
        self.held = TorchState(state, rng=False, replicated=(), pickle=(), verify="fsync")
        self.image: StagingImage | None = None

    def save(self) -> dict[str, Tensor]:
        """What is in the image afterwards, by path: the same as after a first save."""
        plan = self.held.capture(None, False, lambda _, digests: list(digests))
        if self.image is None or self.image.plan is not plan:
            self.close()
            self.image = StagingImage(plan)
        encoded, *_ = self.held.copy(self.image)
        fresh = capture(self.state, rng=False)
        views = map_image(plan.slots, self.image.map)
        assert {slot.spec.path: slot.spec for slot in plan.slots} == {
            spec.path: spec for spec in fresh.specs
        }
        assert plan.aliases == fresh.aliases
        assert encoded == objects.encode(fresh.objects)
        for spec, tensor in zip(fresh.specs, fresh.tensors, strict=True):
            assert torch.equal(bytes_of(views[spec.path]), bytes_of(tensor.detach())), spec.path
        return views

    def close(self) -> None:
        if self.image is not None:
            self.image.close()


@pytest.fixture
def saving() -> Iterator[Callable[[dict[str, Any]], Saver]]:
    made: list[Saver] = []

    def make(state: dict[str, Any]) -> Saver:
        made.append(Saver(state))
        return made[-1]

    yield make
    for saver in made:
        saver.close()


def grid() -> Tensor:
    return torch.arange(16.0).reshape(4, 4)


def twice_as_large(t: Tensor) -> None:
    """Moves its bytes, and leaves the tensor as it was."""
    t.untyped_storage().resize_(1 << 20)


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "values": lambda t: t.add_(1),
    "other data": lambda t: setattr(t, "data", grid() + 7),
    "other dtype, same bytes": lambda t: setattr(t, "data", t.data.view(torch.int32)),
    "float8": lambda t: setattr(t, "data", t.data.to(torch.float8_e4m3fn)),
    "turned": lambda t: t.t_(),
    "turned data": lambda t: setattr(t, "data", t.data.t()),
    "smaller": lambda t: t.resize_(2, 4),
    "larger": lambda t: t.resize_(40, 40).fill_(3),
    "reshaped": lambda t: setattr(t, "data", t.data.view(2, 8)),
    "scalar": lambda t: setattr(t, "data", t.data[0, 0]),
    "empty": lambda t: setattr(t, "data", t.data[:0]),
    "other storage": lambda t: t.set_((grid() + 5).untyped_storage(), 0, (4, 4), (4, 1)),
    "other offset": lambda t: t.set_(t.untyped_storage(), 4, (3, 4), (4, 1)),
    "every other": lambda t: setattr(t, "data", torch.arange(32.0).reshape(4, 8)[:, ::2]),
    "expanded": lambda t: setattr(t, "data", t.data[0].expand(4, 4)),
    "overlapping": lambda t: setattr(t, "data", t.data.as_strided((4, 4), (1, 1))),
    "swapped": lambda t: torch.utils.swap_tensors(t, grid() + 2),
    "moved": twice_as_large,
    "large": lambda t: setattr(t, "data", torch.rand(1 << 16)),
}


@pytest.mark.parametrize("where", ["box", "top", "module", "optimizer", "mixed"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_became_of_a_tensor_is_saved(
    saving: Callable[[dict[str, Any]], Saver], change: str, where: str
) -> None:
    """The object stays the same in all of these, and the memory in some; both saves that follow are
    of the new one, the second with all that the first has kept."""
    tensor = grid()
    others = {str(n): torch.rand(3, 2) for n in range(300)}
    if where == "top":
        state: dict[str, Any] = {"t": tensor, **others}
    elif where in ("box", "mixed"):
        state = {"box": {"t": tensor, **others}} | ({"b": {"n": 1}} if where == "mixed" else {})
        if where == "mixed":
            state["box"]["n"] = 1
    else:
        model = nn.Linear(2, 2)
        opt = torch.optim.SGD(model.parameters(), momentum=0.9)
        train(model, opt, width=2)
        state = {"model": model, "opt": opt, "box": others}
        if where == "module":
            model.register_buffer("t", tensor)
        else:
            opt.state[model.weight]["momentum_buffer"] = tensor
    saver = saving(state)
    saver.save()
    saver.save()
    CHANGES[change](tensor)
    saver.save()
    tensor.untyped_storage().fill_(1)
    saver.save()


@pytest.mark.parametrize("name", ["conj", "imag", "one", "dense"])
def test_conjugation_that_comes_and_goes_in_place_is_seen(
    name: str, saving: Callable[[dict[str, Any]], Saver]
) -> None:
    """The same bytes are other values: also negated ones, and of a single element."""
    z, one = torch.tensor([1 + 2j, 3 - 4j, 5 + 6j]), torch.tensor([1 + 2j])
    plain, turned = {
        "conj": (z, z.conj()),
        "imag": (z.imag, z.conj().imag),
        "one": (one.imag, one.conj().imag),
        "dense": (one.imag[0], one.conj().imag[0]),
    }[name]
    live = plain.view_as(plain)
    saver = saving({"box": {"t": live}})
    for data in (plain, turned, plain, turned):
        live.data = data
        assert saver.save()["box/t"].tolist() == data.tolist()


def test_strides_that_change_where_they_mean_nothing_are_seen(
    saving: Callable[[dict[str, Any]], Saver],
) -> None:
    """A row is dense by any stride of its one dimension, and is made anew as it was."""
    row = torch.ones(1, 4)
    saver = saving({"box": {"t": row}})
    saver.save()
    row.data = row.data.as_strided((1, 4), (9, 1))
    saver.save()


def test_another_tensor_at_the_address_of_one_that_is_gone_is_seen(
    saving: Callable[[dict[str, Any]], Saver],
) -> None:
    """An allocator gives the same memory again, to another object, shape and dtype."""
    memory = bytearray(range(64))
    forms: list[Callable[[], Tensor]] = [
        lambda: torch.frombuffer(memory, dtype=torch.float32),
        lambda: torch.frombuffer(memory, dtype=torch.int32),
        lambda: torch.frombuffer(memory, dtype=torch.int32).reshape(4, 4),
        lambda: torch.frombuffer(memory, dtype=torch.int32).reshape(4, 4).t(),
        lambda: torch.frombuffer(memory, dtype=torch.bool, count=8),
    ]
    box = {"t": forms[0](), "other": torch.ones(2)}
    saver = saving({"box": box})
    for form in [*forms, *forms]:
        box["t"] = form()
        saver.save()
        memory[:] = memory[1:] + memory[:1]
        saver.save()


def test_a_hook_that_makes_new_tensors_each_time_is_saved_as_it_is_now(
    saving: Callable[[dict[str, Any]], Saver],
) -> None:
    """The state_dict of a quantizing module, say: what was made for the last save is gone."""
    model = nn.Linear(4, 4)

    def half(module: nn.Module, entries: dict[str, Tensor], *_: Any) -> None:
        entries["weight"] = entries["weight"].detach().half() * 2

    model.register_state_dict_post_hook(half)
    saver = saving({"model": model})
    for _ in range(4):
        with torch.no_grad():
            model.weight.add_(1)
        views = saver.save()
        assert torch.equal(views["model/weight"], (model.weight.half() * 2))


def test_ties_and_groups_and_buffers_that_come_and_go_are_seen(
    saving: Callable[[dict[str, Any]], Saver],
) -> None:
    """One change after the other, with saves in between that keep what they can."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    opt = torch.optim.AdamW([model[0].weight])
    box: dict[str, Any] = {"a": torch.ones(2), "b": torch.ones(2)}
    state: dict[str, Any] = {"model": model, "opt": opt, "box": box, "last": [torch.zeros(3)]}
    saver = saving(state)
    changes: list[Callable[[], object]] = [
        lambda: train(model, opt),
        lambda: opt.add_param_group({"params": [model[1].weight]}),
        lambda: train(model, opt),
        lambda: setattr(model[1].weight, "data", model[0].weight.data),
        lambda: setattr(model[1].weight, "data", model[0].weight.data.clone()),
        lambda: model.register_buffer("extra", torch.ones(3)),
        lambda: model[0].weight.requires_grad_(False),
        lambda: delattr(model, "extra"),
        lambda: box.update(c=torch.ones(3)),
        lambda: box.update(c=5),
        lambda: box.update(c=box["a"]),
        lambda: box.pop("a"),
        lambda: box.update({1: torch.ones(1)}),
        lambda: (box.pop(1), box.update({True: torch.ones(1)})),
        lambda: (box.pop(True), box.update({1: torch.ones(1)})),
        lambda: state["last"].append(torch.ones(1)),
        lambda: state.update(last=tuple(state["last"])),
        lambda: state.update(more=torch.ones(1)),
        lambda: opt.state.pop(model[0].weight),
    ]
    saver.save()
    for change in changes:
        change()
        saver.save()
        model[0].weight.data.add_(1)
        saver.save()


def test_what_became_unstorable_in_place_is_named() -> None:
    """On the meta device, or sparse, at a save that would have kept all."""
    tensor = torch.ones(4)
    held = TorchState({"t": tensor}, rng=False, replicated=(), pickle=(), verify="fsync")
    for changed in (torch.ones(4, device="meta"), torch.ones(4).to_sparse()):
        tensor = torch.ones(4)
        held._state = {"t": tensor}
        held.capture(None, False, lambda *_: None)
        try:
            tensor.data = changed
        except RuntimeError:  # torch does not allow it
            held._state = {"t": changed}
        with pytest.raises(Unstorable) as caught:
            held.capture(None, False, lambda *_: None)
        assert caught.value.path == "t"


def test_nothing_of_the_training_is_held_between_two_saves(
    saving: Callable[[dict[str, Any]], Saver],
) -> None:
    """What it lets go of is free at once, not with the next save: a model is moved, say."""
    box: dict[str, Any] = {"small": torch.ones(2), "large": torch.ones(1 << 16)}
    model = nn.Linear(2, 2)
    saver = saving({"box": box, "model": model, "deep": {"n": 1, "t": torch.ones(3)}})
    saver.save()
    saver.save()
    refs = [weakref.ref(t) for t in (*box.values(), model.weight, saver.state["deep"]["t"])]
    box.clear()
    model.weight = nn.Parameter(torch.ones(2, 2))
    saver.state["deep"]["t"] = torch.ones(3)
    assert [ref() for ref in refs] == [None] * 4


def test_a_capture_is_copied_once(saving: Callable[[dict[str, Any]], Saver]) -> None:
    """Nobody holds the tensors any more, and another may lie where they were."""
    saver = saving({"t": torch.ones(2)})
    saver.save()
    assert saver.image is not None
    with pytest.raises(RuntimeError, match="copied already"):
        saver.held.copy(saver.image)


class Collecting:
    """A thing of the user's that makes garbage while it is read, and may fail."""

    def __init__(self) -> None:
        self.wrong = False

    def state_dict(self) -> dict[str, Any]:
        kept = [[] for _ in range(10_000)]
        assert not gc.isenabled()
        if self.wrong:
            raise RuntimeError("no state now")
        return {"n": len(kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_amid_a_save_and_the_collector_is_left_as_it_was(
    enabled: bool, saving: Callable[[dict[str, Any]], Saver]
) -> None:
    """After a save, and after one that failed; who had turned it off keeps it so."""
    thing = Collecting()
    saver = saving({"thing": thing, "t": torch.ones(2)})
    if not enabled:
        gc.disable()
    try:
        saver.held.capture(None, False, lambda *_: None)
        assert gc.isenabled() is enabled
        thing.wrong = True
        with pytest.raises(RuntimeError, match="no state now"):
            saver.held.capture(None, False, lambda *_: None)
        assert gc.isenabled() is enabled
        with uncollected(), uncollected():
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
