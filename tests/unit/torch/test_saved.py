"""Shows how the manifests of one epoch become one saved state, and what is refused there."""

from typing import Any

import pytest
import torch
from torch import nn

from handfast.errors import FormatError
from handfast.store import objects
from handfast.store.image import plan
from handfast.store.manifest import CHUNK, Manifest, Piece, Stamp, decode, encode, hash_chunks
from handfast.torch.apply import apply
from handfast.torch.capture import capture
from handfast.torch.compare import differences
from handfast.torch.saved import read_manifests
from handfast.torch.stage import map_image, stage


def shard(
    state: dict[str, object], number: int, leave_out: tuple[str, ...] = (), **options: Any
) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """A shard as it is stored and read back: its manifest, and its views."""
    captured = capture(state, **options)
    layout = plan(spec for spec in captured.specs if spec.path not in leave_out)
    buffer = bytearray(layout.padded)
    kept = map_image(plan(captured.specs).slots, bytearray(plan(captured.specs).padded))
    stage(captured, kept)
    views = map_image(layout.slots, buffer)
    for path, view in views.items():
        view.copy_(kept[path])
    manifest = Manifest(
        stamp=Stamp("run", "main", 1, 5, f"d{number}", number, 2, 1, "c", None),
        slots=layout.slots,
        aliases=captured.aliases,
        objects=objects.encode(captured.objects),
        environment={},
        image_bytes=layout.nbytes,
        chunk_bytes=CHUNK,
        hashes=hash_chunks(buffer[: layout.nbytes]),
        sources=("5.safetensors",),
        pieces=(Piece(0, 1, 0, 0),),
        replicated=captured.replicated,
        structure="",
    )
    return decode(encode(manifest)), views


def test_what_a_node_stores_once_is_read_by_each_of_its_ranks() -> None:
    """Rank 1 has only its own objects and local tensors; the weights lie with rank 0."""
    tied = nn.Linear(2, 2, bias=False)
    model = nn.ModuleDict({"a": tied, "b": tied})
    first: dict[str, object] = {"model": model, "local": torch.zeros(2), "box": {"rank": 0}}
    second = {**first, "local": torch.ones(2), "box": {"rank": 1}}
    known = {"replicated": ("model",)}
    zero, shared = shard(first, 0, **known)
    one, own = shard(second, 1, leave_out=("model/a.weight",), **known)
    saved = read_manifests(one, zero)
    fresh = nn.Linear(2, 2, bias=False)
    live: dict[str, Any] = {"model": nn.ModuleDict({"a": fresh, "b": fresh})}
    live |= {"local": torch.full((2,), 7.0), "box": {"rank": None}}
    assert differences(capture(live), saved) == []
    apply(live, saved, {**shared, **own})
    assert torch.equal(fresh.weight, tied.weight)
    assert live["local"].tolist() == [1, 1]
    assert live["box"] == {"rank": 1}


def test_two_shards_that_both_store_what_one_shares_are_refused() -> None:
    """Which of the two would be right is nobody's to guess."""
    state: dict[str, object] = {"t": torch.ones(2)}
    zero, _ = shard(state, 0, replicated=("t",))
    one, _ = shard(state, 1, replicated=("t",))
    with pytest.raises(FormatError, match="t is stored by shard 1 and by shard 0"):
        read_manifests(one, zero)


def test_what_another_rank_keeps_to_itself_is_not_taken() -> None:
    """Its shards, its loader and its random streams are none of ours."""
    zero, _ = shard({"mine": torch.ones(2), "box": {"rank": 0}}, 0)
    one, _ = shard({"box": {"rank": 1}}, 1)
    saved = read_manifests(one, zero)
    assert list(saved.paths()) == []
    assert saved.objects["box"] == {"rank": 1}


@pytest.mark.parametrize("tree", [[1], {"a": 1}, {"": 3}])
def test_objects_of_something_else_are_refused(tree: object) -> None:
    """A manifest that another front end wrote."""
    manifest, _ = shard({"t": torch.ones(2)}, 0)
    changed = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    with pytest.raises(FormatError, match="no captured torch state"):
        read_manifests(Manifest(**{**changed, "objects": objects.encode(tree)}))
