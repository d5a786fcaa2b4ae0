"""Shows that a state copied piece by piece is, byte for byte, the one that is copied at once."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from handfast.store.image import plan
from handfast.torch.capture import capture
from handfast.torch.pieces import Pieces
from handfast.torch.stage import Canvas, stage


def varied() -> dict[str, Tensor]:
    torch.manual_seed(1)
    base = torch.rand(50, 40)
    with torch.inference_mode():
        own = torch.rand(7)
    return {
        "dense": base,
        "turned": torch.rand(30, 70).t(),
        "gaps": torch.rand(20, 90)[:, ::3],
        "conj": torch.rand(33, dtype=torch.complex64).conj(),
        "negative": torch.rand(9, dtype=torch.complex64).conj().imag,
        "repeated": torch.rand(1, 5).expand(8, 5),
        "own": own,
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "flags": torch.rand(77) > 0.5,
        "odd": torch.rand(1, 1).as_strided((1, 1), (7, 9)),
        "brain": torch.rand(11).bfloat16(),
        "eight": torch.rand(13).to(torch.float8_e4m3fn),
        "leaf": torch.rand(3, requires_grad=True),
    }


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("outer", [False, True])
def test_pieces_make_up_the_image(seed: int, outer: bool) -> None:
    """Shows it for whatever borders, in whatever order, some of them twice, also where the training
    is in inference mode."""
    chance = random.Random(seed)
    captured = capture(dict(varied()), rng=False)
    layout = plan(captured.specs)
    image = bytearray(layout.padded)
    image[: len(layout.header)] = layout.header
    stage(captured, Canvas(layout.slots, image)).wait()
    held = {spec.path: t for spec, t in zip(captured.specs, captured.tensors, strict=True)}
    pieces = Pieces(layout, [held[slot.spec.path] for slot in layout.slots])
    cuts = sorted({0, layout.nbytes, *(chance.randrange(layout.nbytes) for _ in range(12))})
    spans = list(itertools.pairwise(cuts))
    spans += chance.sample(spans, 3)
    chance.shuffle(spans)
    found = bytearray(layout.nbytes)
    with torch.inference_mode(outer):
        for start, end in spans:
            pieces.put(start, end, memoryview(found)[start:end])
    assert found == image[: layout.nbytes]
