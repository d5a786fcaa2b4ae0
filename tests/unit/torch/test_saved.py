"""Shows how the manifests of one epoch become one saved state, and what is refused there."""

from typing import Any

import pytest
import torch
from statekit import shelved
from torch import nn

from handfast.checkpoint.validated import Validated
from handfast.errors import Damaged, FormatError, HandfastError, Poisoned
from handfast.store import objects
from handfast.store.image import plan
from handfast.store.manifest import Left, Manifest
from handfast.torch.apply import apply
from handfast.torch.capture import capture
from handfast.torch.compare import differences, lacking
from handfast.torch.saved import Saved, read_manifests
from handfast.torch.stage import Canvas, map_image, stage
from handfast.torch.tensors import digest
from handfast.torch.values import Stored


def shard(
    state: dict[str, object], number: int, leave_out: tuple[str, ...] = (), **options: Any
) -> Validated:
    """A shard as it is stored and read back."""
    captured = capture(state, **options)
    layout = plan(spec for spec in captured.specs if spec.path not in leave_out)
    buffer = bytearray(layout.padded)
    whole = plan(captured.specs)
    memory = bytearray(whole.padded)
    stage(captured, Canvas(whole.slots, memory))
    kept = map_image(whole.slots, memory)
    views = map_image(layout.slots, buffer)
    for path, view in views.items():
        view.copy_(kept[path])
    specs = {spec.path: spec for spec in captured.specs}
    left = {path: digest(specs[path], kept[path]) for path in leave_out if path in kept}
    digests = b"".join(digest(slot.spec, views[slot.spec.path]) for slot in layout.slots)
    fields = {"left": Left(1 - number, left) if left else None, "digests": digests}
    return shelved(captured, layout, buffer, number, **fields)


def joined(*copies: Validated) -> Saved:
    """What a rank reads: its own, and what it left to the first of its node."""
    return read_manifests(*(copy.manifest for copy in copies))


def test_what_a_node_stores_once_is_read_by_each_of_its_ranks() -> None:
    """Rank 1 has only its own objects and local tensors; the weights lie with rank 0."""
    tied = nn.Linear(2, 2, bias=False)
    model = nn.ModuleDict({"a": tied, "b": tied})
    first: dict[str, object] = {"model": model, "local": torch.zeros(2), "box": {"rank": 0}}
    second = {**first, "local": torch.ones(2), "box": {"rank": 1}}
    known = {"replicated": ("model",)}
    zero = shard(first, 0, **known)
    one = shard(second, 1, leave_out=("model/a.weight",), **known)
    saved = joined(one, zero)
    fresh = nn.Linear(2, 2, bias=False)
    live: dict[str, Any] = {"model": nn.ModuleDict({"a": fresh, "b": fresh})}
    live |= {"local": torch.full((2,), 7.0), "box": {"rank": None}}
    assert differences(capture(live), saved) == []
    apply(live, saved, Stored([one, zero]))
    assert torch.equal(fresh.weight, tied.weight)
    assert live["local"].tolist() == [1, 1]
    assert live["box"] == {"rank": 1}


def test_what_is_a_ranks_own_is_never_replaced() -> None:
    """Another rank may hold to be alike everywhere what this one keeps, or ties, for itself."""
    w = torch.full((2,), 7.0)
    three: dict[str, object] = {"t": torch.full((2,), 3.0), "w": w}
    known = {"replicated": ("t", "w")}
    zero = shard({"t": torch.ones(2), "w": w.clone()}, 0, **known)
    for state, value in (three, 3.0), ({"t": w.view(2), "w": w}, 7.0):
        one = shard(state, 1, replicated=("w",), leave_out=("w",))
        saved = joined(one, zero)
        live: dict[str, Any] = {name: torch.zeros(2) for name in "tw"}
        apply(live, saved, Stored([one, zero]))
        assert [live["t"][0].item(), live["w"][0].item()] == [value, 7.0]


@pytest.mark.parametrize("tied", [0, 1])
def test_a_tie_of_one_rank_is_none_of_another(tied: int) -> None:
    """The best weights so far, kept without a clone on the rank whose last ones are the best."""
    weight = torch.full((2,), 7.0)
    best = [weight.view(2) if rank == tied else torch.full((2,), 3.0) for rank in range(2)]
    known = {"replicated": ("model",)}
    shards = []
    for rank in range(2):
        state: dict[str, object] = {"model": {"w": weight}, "best": Holder(best[rank])}
        leave_out = ("model/w",) if rank else ()
        shards.append(shard(state, rank, leave_out, extra=[best[rank]], **known))
    zero, one = shards
    for rank, copies in enumerate([(zero,), (one, zero)]):
        saved = joined(*copies)
        live: dict[str, Any] = {"model": {"w": torch.zeros(2)}, "best": Holder(torch.zeros(2))}
        assert lacking(capture(live), saved) == []
        (extra,) = apply(live, saved, Stored(copies))
        expected = [best[rank].tolist()] * 2
        assert [live["best"].held.tolist(), extra.tolist()] == expected
        assert live["model"]["w"].tolist() == [7, 7]


def test_what_all_hold_alike_is_stored_where_it_is_tied_to_what_they_do_not() -> None:
    """The first of two tied paths was stored for all; on other ranks it is none of the pair."""
    weight = torch.ones(2)
    captured = capture({"a": weight, "b": weight}, replicated=("b",))
    assert captured.replicated == ("b",)
    assert captured.aliases == {"a": "b"}


def test_ties_of_both_ranks_lead_to_what_is_stored() -> None:
    """Rank 1 ties two of what rank 0 ties three of, and left the one that it keeps to rank 0."""
    t = torch.full((2,), 5.0)
    zero = shard({"a": t, "b": t, "c": t}, 0, replicated=("a", "b"))
    other = t.clone()
    one = shard({"a": t, "b": other, "c": other}, 1, ("a", "b"), replicated=("a", "b"))
    saved = joined(one, zero)
    assert saved.aliases == {"c": "b"}
    live = {name: torch.zeros(2) for name in "abc"}
    apply(live, saved, Stored([one, zero]))
    assert [value[0].item() for value in live.values()] == [5, 5, 5]


def test_a_tie_of_the_first_rank_does_not_lead_to_what_another_keeps() -> None:
    """Rank 0 ties what rank 1 left to it, to a path that rank 1 holds otherwise."""
    t = torch.full((2,), 5.0)
    zero = shard({"a": t, "b": t}, 0, replicated=("b",))
    one = shard({"a": torch.full((2,), 3.0), "b": t.clone()}, 1, ("b",), replicated=("b",))
    assert zero.manifest.aliases == {"a": "b"}
    for first in zero, shard({"a": t, "b": t}, 0, replicated=("a",)):
        assert one.manifest.apart(first.manifest) == ()
        live = {name: torch.zeros(2) for name in "ab"}
        apply(live, joined(one, first), Stored([one, first]))
        assert [live["a"][0].item(), live["b"][0].item()] == [3, 5]


def test_what_was_left_and_is_held_otherwise_is_found() -> None:
    """By digest, through the other's ties; what the other does not have is none it holds alike."""
    t = torch.full((2,), 5.0)
    first = shard({"a": t, "b": t, "c": torch.ones(2)}, 0).manifest
    alike = shard({"a": t, "b": t.clone()}, 1, ("a", "b")).manifest
    assert alike.apart(first) == ()
    other = shard({"a": t, "b": torch.ones(2), "z": t.clone()}, 1, ("a", "b", "z")).manifest
    assert other.apart(first) == ("b", "z")
    minus = shard({"a": -t * 0}, 1, ("a",)).manifest
    zero = shard({"a": t * 0}, 0).manifest
    assert minus.apart(zero) == ("a",)  # 0.0 and -0.0 are equal, and not the same
    nothing = shard({}, 0).manifest
    assert minus.apart(nothing) == ("a",)
    for other_zero in torch.zeros(2, dtype=torch.int32), torch.zeros(1, 2), torch.zeros(2, 1).t():
        of_other_shape = shard({"a": other_zero}, 1, ("a",)).manifest
        assert of_other_shape.apart(zero) == ("a",)
    empty = shard({"a": torch.zeros(0, 3)}, 0).manifest
    assert shard({"a": torch.zeros(0, 5)}, 1, ("a",)).manifest.apart(empty) == ("a",)


class Holder:
    """An object of the user's with one tensor."""

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held = state["held"]


def everything() -> dict[str, Any]:
    """A state that refers to tensors from each place that can."""
    model = nn.Linear(2, 2)
    opt = torch.optim.SGD(model.parameters(), momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    opt.step()
    held = torch.ones(2)
    return {
        "box": {"t": torch.ones(2), "in": [Holder(torch.ones(2))]},
        "holder": Holder(held),
        "model": model,
        "opt": opt,
        "plain": held.view(2),
    }


LACKING = [
    "box/in[0]/held",
    "box/t",
    "extra[0]",
    "grads/model~1bias",
    "holder/held",
    "opt/state/weight/momentum_buffer",
    "plain",
]


def test_what_no_shard_stores_is_found_before_anything_changes() -> None:
    """Each rank took it for alike and left it to the other: a KeyError, once the model was new."""
    state = everything()
    options: dict[str, Any] = {"extra": [torch.ones(2)], "grads": True}
    assert lacking(capture(state), joined(shard(state, 1, **options))) == []
    left_out = tuple(path for path in LACKING if path != "plain")
    copies = shard(state, 1, left_out, **options), shard({"x": torch.ones(1)}, 0)
    saved = joined(*copies)
    assert lacking(capture(state), saved) == LACKING
    assert lacking(capture(state), saved, only=("model", "opt/**")) == [
        "extra[0]",
        "grads/model~1bias",
        "opt/state/weight/momentum_buffer",
    ]
    assert lacking(capture({"model": state["model"]}), saved, only=("opt",)) == ["extra[0]"]
    with pytest.raises(Poisoned, match="the restore stopped at"):
        apply(state, saved, Stored(copies))


def test_extra_that_is_not_there_poisons() -> None:
    """It is read last, when the live state has changed already."""
    one = shard({"t": torch.ones(2)}, 0, ("extra[0]",), extra=[torch.ones(2)])
    with pytest.raises(Poisoned, match="stopped at extra"):
        apply({"t": torch.zeros(2)}, joined(one), Stored([one]))


def test_what_another_rank_keeps_to_itself_is_not_taken() -> None:
    """Its shards, its loader and its random streams are none of ours."""
    zero = shard({"mine": torch.ones(2), "box": {"rank": 0}}, 0)
    one = shard({"box": {"rank": 1}}, 1)
    saved = joined(one, zero)
    assert list(saved.paths()) == []
    assert saved.objects["box"] == {"rank": 1}


@pytest.mark.parametrize("tree", [[1], {"a": 1}, {"": 3}])
def test_objects_of_something_else_are_refused(tree: object) -> None:
    """A manifest that another front end wrote."""
    manifest = shard({"t": torch.ones(2)}, 0).manifest
    changed = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    with pytest.raises(FormatError, match="no captured torch state"):
        read_manifests(Manifest(**{**changed, "objects": objects.encode(tree)}))


@pytest.mark.parametrize("whose", ["own", "other"])
def test_damage_to_what_another_stores_is_no_verdict_on_the_own_copy(whose: str) -> None:
    """Where copies are judged as they are read: the own one is by all of its bytes, and the other
    rank's only by its own rank. What is right of both is there, with what is not live yet."""
    w = torch.rand(500)
    zero = shard({"w": w.clone()}, 0, replicated=("w",))
    one = shard({"w": w, "mine": torch.ones(3)}, 1, ("w",), replicated=("w",))
    stored, live = Stored([one, zero]), torch.zeros(500)
    stored.preload({"w": live}, ["w", "mine"])
    assert torch.equal(live, w)
    assert stored.adopt("w") is None
    assert torch.equal(stored.view("w"), w)
    mine = stored.adopt("mine")
    assert mine is not None
    assert mine.tolist() == [1, 1, 1]
    assert stored.adopt("mine") is None
    hurt = one if whose == "own" else zero
    shelf = hurt._shelf
    fd = shelf.files.open(f"{shelf.path}/5.safetensors")
    shelf.files.pwrite(fd, b"\xff", hurt.manifest.image_bytes - 1)
    with pytest.raises(HandfastError, match="differs from its hash") as caught:
        Stored([one, zero]).preload({"w": live}, ["w", "mine"])
    assert isinstance(caught.value, Damaged) == (whose == "own")
