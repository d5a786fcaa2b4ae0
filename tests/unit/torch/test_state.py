"""Shows what a comparison before a restore refuses, and that it moves nothing."""

import mmap
import random
from typing import Any

import msgspec
import pytest
import torch
from statekit import State
from torch import nn

from handfast.checkpoint.images import Loaded
from handfast.errors import Refused
from handfast.store import objects
from handfast.store.manifest import CHUNK, Manifest, Piece, Stamp, hash_chunks
from handfast.torch.capture import capture
from handfast.torch.state import TorchState


def held(state: State) -> TorchState:
    return TorchState(state, rng=True, replicated=(), pickle=(), verify="fsync")


def saved(state: State) -> Loaded:
    """A copy of the state as an agent would hand it over; its values are zeros."""
    made = held(state).capture(None, grads=False)
    assert made is not None
    memory = mmap.mmap(-1, made.padded)
    manifest = Manifest(
        stamp=Stamp("run", "main", 1, 5, "d0", 0, 1, 1, "c", None),
        slots=made.slots,
        aliases=made.aliases,
        objects=objects.encode(capture(state).objects),
        environment=made.environment,
        image_bytes=made.nbytes,
        chunk_bytes=CHUNK,
        hashes=hash_chunks(memory[: made.nbytes]),
        sources=("5.safetensors",),
        pieces=(Piece(0, 1, 0, 0),),
        replicated=made.replicated,
        structure=made.structure,
    )
    return Loaded(memory, manifest)


def build() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(2, 2))
    opt = torch.optim.AdamW(model.parameters())
    return {"model": model, "optimizer": opt, "box": {"n": 1, "layers": [nn.Linear(1, 1), 2]}}


@pytest.mark.parametrize(
    "pattern",
    ["optimiser/**", "optim", "optimizer/state/**", "model/1.weight", "rng/torch", "extra", "m"],
)
def test_a_pattern_that_names_nothing_is_refused_by_name(pattern: str) -> None:
    """A slip restored nothing of the optimizer, and said nothing."""
    state = build()
    copy = saved(state)
    with pytest.raises(ValueError, match=r"names nothing that was saved") as caught:
        held(state).compare([copy], ("model/**", pattern), strict=True)
    assert f"only={pattern!r}" in str(caught.value)
    assert "box, model, optimizer, rng, box/layers" in str(caught.value)
    held(state).compare([copy], ("model/**", pattern), strict=False)


def test_patterns_that_name_something_are_taken() -> None:
    """Components, tensors, entries of boxes and what stands in them; and all of nothing."""
    state = build()
    names = ("model", "optimizer/**", "rng/*", "model/0.*", "box/n", "box/layers[[]1]", "b*/**")
    held(state).compare([saved(state)], names, strict=True)
    held({}).compare([saved({})], ("**",), strict=True)


class Drawing:
    """Draws the seed of its workers when it is asked for its state, as torchdata's loader does."""

    wrong = False

    def state_dict(self) -> dict[str, Any]:
        if self.wrong:
            random.random()
            raise RuntimeError("no state now")
        return {"seed": int(torch.randint(0, 2**31, ())), "other": random.random()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_a_comparison_moves_no_random_stream() -> None:
    """Whether it agrees, refuses, or an object of the user's raises."""
    drawing = Drawing()
    state: dict[str, Any] = {"model": nn.Linear(2, 2), "d": drawing}
    copy = saved(state)
    streams = torch.get_rng_state(), random.getstate()

    def unmoved() -> bool:
        return torch.equal(torch.get_rng_state(), streams[0]) and random.getstate() == streams[1]

    held(state).compare([copy], ("**",), strict=True)
    assert unmoved()
    other = {"model": nn.Linear(2, 3), "d": drawing}
    streams = torch.get_rng_state(), random.getstate()
    with pytest.raises(Refused):
        held(other).compare([copy], ("**",), strict=True)
    assert unmoved()
    drawing.wrong = True
    with pytest.raises(RuntimeError, match="no state now"):
        held(state).compare([copy], ("**",), strict=True)
    assert unmoved()


def test_a_rank_keeps_its_ties_to_what_it_leaves_to_another() -> None:
    """The rank that stores the weights for the node need not have the tie: then nobody had it."""
    weight = torch.ones(2)
    one = TorchState(
        {"model": {"w": weight}, "best": {"w": weight}},
        rng=False,
        replicated=("model",),
        pickle=(),
        verify="fsync",
    )
    one.shares(False, agreed=False)
    made = one.capture([weight], grads=False)
    assert [slot.spec.path for slot in made.slots] == []
    assert made.aliases == {"best/w": "model/w", "extra[0]": "model/w"}


def test_a_state_that_cant_be_walked_is_not_agreed_upon() -> None:
    """The word is given where all ranks meet, and an error there would keep the others waiting."""
    box: dict[str, object] = {"model": nn.Linear(2, 2)}
    state = TorchState({"box": box}, rng=False, replicated=(), pickle=(), verify="fsync")
    box["optimizer"] = {"state": {}, "param_groups": []}
    assert not state.alike()
    with pytest.raises(TypeError, match="box/optimizer is an optimizer's state_dict"):
        state.capture(None, grads=False)


def test_what_nobody_stored_is_refused_by_name() -> None:
    """All ranks hear of it, and what is to be done, before anything changes."""
    state = build()
    state["optimizer"].state[state["model"][0].weight]["exp_avg"] = torch.ones(2, 2)
    copy = saved(state)
    other = TorchState(state, rng=True, replicated=("optimizer/**",), pickle=(), verify="fsync")
    other.shares(False, agreed=False)
    plan = other.capture(None, grads=False)
    kept = {"slots": plan.slots, "image_bytes": plan.nbytes}
    mine = Loaded(copy.memory, msgspec.structs.replace(copy.manifest, **kept))
    with pytest.raises(Refused, match=r"optimizer/state/0\.weight/exp_avg.*only=") as caught:
        held(state).compare([mine, copy], ("**",), strict=False)
    assert (caught.value.verdict, caught.value.shards) == ("missing", ("shard 0", "shard 0"))
    held(state).compare([mine, copy], ("model",), strict=True)
