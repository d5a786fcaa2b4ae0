"""What validators cost beside one pass of hashing over the same bytes, both on one thread.

The state is a third each of float32 parameters and AdamW's two moments. Each validator gets it as
the examiner's process does: views of an image that can only be read. ``digests`` are what ranks
compare with ``replicas="warn"``. None of it is in the training's way; it is time of another core.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.figures import Figure, Setting, beside
from handfast.agent.examiner import Known
from handfast.core.lattice import Epoch
from handfast.store import objects
from handfast.store.image import plan
from handfast.store.manifest import hash_chunks, tensor_digest
from handfast.torch.stage import map_image
from handfast.torch.tensors import spec_of
from handfast.torch.validators import SHORT, Staged

VARIES = ("mib",)
HASH = "hash pass"
WIDTH = 1024


def ask(setting: Setting) -> Iterator[Figure]:
    """Measure it, in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        taken: dict[str, list[float]] = {}
        deeds = _deeds(setting.mib)
        for _ in range(setting.repeat + 1):
            for who, deed in deeds.items():
                began = time.perf_counter()
                deed()
                taken.setdefault(who, []).append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    figures = [
        Figure(
            question="validators",
            who=who,
            what="pass",
            unit="s",
            values=tuple(values[1:]),
            at={"mib": setting.mib},
        )
        for who, values in taken.items()
    ]
    yield from beside(figures, HASH, {})


def _deeds(mib: int) -> Mapping[str, Callable[[], object]]:
    rows = max(1, (mib << 20) // (3 * 4 * WIDTH))
    names = [f"{at}.weight" for at in range(12)]
    each = max(1, rows // len(names))
    state: dict[str, Tensor] = {}
    for name in names:
        state[f"model/{name}"] = torch.rand(each, WIDTH)
        state[f"optimizer/state/{name}/exp_avg"] = 1e-3 * torch.rand(each, WIDTH)
        state[f"optimizer/state/{name}/exp_avg_sq"] = 1e-3 + torch.rand(each, WIDTH)
        state[f"optimizer/state/{name}/step"] = torch.tensor(100.0)
    layout = plan(spec_of(path, tensor) for path, tensor in state.items())
    memory = bytearray(layout.padded)
    views = map_image(layout.slots, memory)
    for path, tensor in state.items():
        views[path].copy_(tensor)
    tree: dict[str, Any] = {
        "": {"model": "module", "optimizer": "optimizer"},
        "extra": {"loss": 1.0},
        "optimizer": {"param_groups": [{"betas": (0.9, 0.999), "params": names}]},
    }
    encoded = objects.encode(tree)
    view, known = memoryview(memory), Known(adams=("optimizer",))

    def validate(name: str) -> None:
        if found := SHORT[name](Staged(Epoch(1, 100), views, encoded, known)):
            raise RuntimeError(f"{name} refuses a state that is sound: {found}")

    def digests() -> None:
        for slot in layout.slots:
            tensor_digest(slot.spec, view[slot.start : slot.start + slot.nbytes])

    deeds: dict[str, Callable[[], object]] = {HASH: partial(hash_chunks, view)}
    deeds |= {name: partial(validate, name) for name in ("finite", "nonnegative", "moments")}
    return deeds | {"digests": digests}
