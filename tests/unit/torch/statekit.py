"""What the tests of this room share: a save and a restore through a real image, in memory."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import multiprocessing as mp

from handfast.checkpoint.validated import Validated
from handfast.store import objects
from handfast.store.claims import identify
from handfast.store.image import Layout, plan
from handfast.store.manifest import CHUNK, Manifest, Piece, Stamp, decode, encode, hash_chunks
from handfast.store.shelf import Shelf
from handfast.testing.powerloss import Disk
from handfast.torch import gradients
from handfast.torch.apply import apply, live_tensors, look
from handfast.torch.boxes import changes
from handfast.torch.capture import Captured, capture
from handfast.torch.compare import Difference, differences, torn
from handfast.torch.saved import Saved
from handfast.torch.stage import Canvas, map_image, stage
from handfast.torch.tree import nodes
from handfast.torch.values import Stored

State = Mapping[str, object]

PRELOAD = [
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch._dynamo",
    "handfast.torch.compare",
]


def shelved(
    captured: Captured, layout: Layout, buffer: bytearray, shard: int = 0, **fields: Any
) -> Validated:
    """An image as it lies in a domain's files, on a disk in memory."""
    data = memoryview(buffer)[: layout.nbytes]
    fields = {"objects": fields.get("objects") or objects.encode(captured.objects), **fields}
    manifest = Manifest(
        stamp=Stamp("run", "main", 1, 5, f"d{shard}", shard, max(2, shard + 1), 1, "c", None),
        slots=layout.slots,
        aliases=captured.aliases,
        image_bytes=layout.nbytes,
        chunk_bytes=CHUNK,
        hashes=hash_chunks(data),
        sources=("5.safetensors",),
        pieces=(Piece(0, -(-layout.nbytes // CHUNK), 0, 0),),
        **{"environment": {}, "replicated": captured.replicated, "structure": "", **fields},
    )
    disk = Disk("/disk")
    identify(disk, "/disk", "rank", run="run", shard=shard)
    shelf = Shelf(disk, "/disk", "rank")
    fd = disk.create(f"{shelf.path}/5.safetensors")
    disk.pwrite(fd, data, 0)
    return Validated(shelf, decode(encode(manifest)))


class Snapshot:
    """A state as it was at one moment: the image's bytes, and the objects encoded and decoded."""

    def __init__(self, state: State, pickle: tuple[str, ...] = (), **options: Any) -> None:
        self.captured: Captured = capture(state, **options)
        layout = plan(self.captured.specs)
        self.buffer = bytearray(layout.padded)
        self.views: dict[str, Tensor] = map_image(layout.slots, self.buffer)
        self.canvas = Canvas(layout.slots, self.buffer)
        stage(self.captured, self.canvas).wait()
        self._objects = objects.encode(self.captured.objects, pickle=pickle)
        tree: Any = objects.decode(self._objects, pickle=pickle)
        specs = {slot.spec.path: slot.spec for slot in layout.slots}
        self.saved = Saved(specs, self.captured.aliases, tree)
        self._layout = layout

    @property
    def values(self) -> Stored:
        """What the image holds now, written to files and read back."""
        held = shelved(self.captured, self._layout, self.buffer, objects=self._objects)
        return Stored([held])

    def differences(self, live: State, **options: Any) -> list[Difference]:
        """What a restore into `live` would get wrong."""
        now = capture(live)
        found = differences(now, self.saved, **options)
        walked, source = look(live, self.saved, self.values)
        only = options.get("only", ("**",))
        away = changes(now, self.saved, only).gone
        return found or torn(live_tensors(walked), source, only, away)

    def restore(self, live: State, **options: Any) -> object:
        """A restore that finds no difference; gives what was saved as extra."""
        assert self.differences(live) == []
        return apply(live, self.saved, self.values, **options)

    def paths(self) -> set[str]:
        """Every path at which a tensor can be found."""
        return set(self.saved.paths())


def unclean_gradients(state: State, **options: Any) -> tuple[str, ...]:
    """The gradients of a state that are pending."""
    return gradients.unclean_gradients(nodes(state), **options)


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits, NaNs too."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pair = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*pair)


def train(model: nn.Module, *opts: torch.optim.Optimizer, steps: int = 1, width: int = 4) -> None:
    """Some steps on random data."""
    for _ in range(steps):
        for opt in opts:
            opt.zero_grad()
        model(torch.randn(3, width)).square().sum().backward()
        for opt in opts:
            opt.step()


def ranks(count: int, body: Callable[..., None], path: Path) -> None:
    """Run `body(rank)` on gloo ranks: processes that fork from a helper which has torch loaded.

    Not from this process: autograd and gloo have threads here, which a fork would lose.
    """
    mp.get_context("forkserver").set_forkserver_preload(PRELOAD)
    where = f"file://{path}/{body.__name__}{count}"
    mp.start_processes(_rank, (count, where, body), count, start_method="forkserver")


def _rank(rank: int, count: int, where: str, body: Callable[..., None]) -> None:
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=count)
    try:
        body(rank)
    finally:
        torch.distributed.destroy_process_group()
