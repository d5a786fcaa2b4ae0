"""How small an epoch gets for how much of the processor: where bandwidth is scarce, not time.

A small transformer learns with AdamW, and its state at a step is squeezed as epochs of it would
be: chunk by chunk, alone or against the chunk of an epoch 1, 10 or 100 steps before. Parameters
are float32, and bfloat16 as a mixed-precision training keeps them beside those; the moments are
float32. It is early in a training, at a constant rate: later on less changes from step to step.

``size`` is what is left, in hundredths of the chunk. ``in`` and ``out`` are MB of it a second, on
one core, of bytes that lie in memory. A link ``pays below`` so many MB a second, one way: up to
there squeezing first and sending then takes less time than sending all, though nothing overlaps.
No tier squeezes; figures of a disk or of a network are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Final, NamedTuple

import torch
from torch import Tensor

from benchmarks.common.contest import timed
from benchmarks.common.figures import Figure, Setting
from benchmarks.common.squeeze import expand, squeeze
from handfast.demo import corpus
from handfast.demo.model import Transformer
from handfast.store.manifest import CHUNK

VARIES = ()
WIDE = True
LEVELS: Final = (1, 3, 9)
STEPS: Final = (1, 10, 100)
"""How many steps the parent is behind."""
BATCH, CONTEXT = 8, 64
PARTS: Final = {"float32": 4, "bfloat16": 2, "exp_avg": 4, "exp_avg_sq": 4}
"""What is told apart, and the bytes of its elements."""
UNITS: Final = {"size": "%", "in": "MB/s", "out": "MB/s", "pays below": "MB/s"}

Epochs = dict[int, dict[str, list[bytes]]]
"""The chunks of each part, by how many steps they are behind the last."""


class Way(NamedTuple):
    """A way to squeeze; ``steps`` is 0 for one that needs no parent."""

    name: str
    split: bool
    steps: int
    level: int


WAYS: Final = (
    *(Way("zstd alone", False, 0, level) for level in LEVELS),
    *(Way("planes", True, 0, level) for level in LEVELS),
    *(Way("XOR, planes", True, steps, level) for steps, level in product(STEPS, LEVELS)),
)


def ask(setting: Setting) -> Iterator[Figure]:
    """Measure it."""
    epochs = train()
    every = list(product(PARTS, WAYS))
    laps = [[_turn(part, way, epochs) for part, way in every] for _ in range(setting.repeat + 1)]
    for (part, way), *turns in zip(every, *laps[1:], strict=True):
        for what, unit in UNITS.items():
            yield Figure(
                question="frontier",
                who=f"{part}: {way.name}, level {way.level}",
                what=what,
                unit=unit,
                values=tuple(turn[what] for turn in turns),
                at={"steps": way.steps} if way.steps else {},
            )


def train() -> Epochs:
    """Train for a while."""
    text = corpus.read()
    codes = torch.frombuffer(bytearray(text.codes), dtype=torch.uint8).long()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more get into each other's way in so small a model
    model = Transformer(len(text.alphabet), CONTEXT, width=128, layers=5, heads=4, dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    last, found = 2 * max(STEPS), {}
    for step in range(1, last + 1):
        starts = torch.randint(len(codes) - CONTEXT, (BATCH, 1))
        drawn = codes[starts + torch.arange(CONTEXT + 1)]
        optimizer.zero_grad()
        model(drawn[:, :-1], drawn[:, 1:]).backward()
        optimizer.step()
        if last - step in (0, *STEPS):
            found[last - step] = _parts(list(model.parameters()), optimizer)
    return found


def _parts(
    parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, list[bytes]]:
    moments = [optimizer.state[parameter] for parameter in parameters]
    parts = {
        "float32": parameters,
        "bfloat16": [parameter.bfloat16() for parameter in parameters],
        **{name: [each[name] for each in moments] for name in ("exp_avg", "exp_avg_sq")},
    }
    return {name: _chunks(tensors) for name, tensors in parts.items()}


def _chunks(tensors: Sequence[Tensor]) -> list[bytes]:
    """Lay tensors back to back, as an image does, and cut them into chunks."""
    whole = torch.cat([tensor.detach().flatten() for tensor in tensors])
    image = whole.view(torch.uint8).numpy().tobytes()
    return [image[at : at + CHUNK] for at in range(0, len(image), CHUNK)]


def _turn(part: str, way: Way, epochs: Epochs) -> dict[str, float]:
    """Squeeze a part and expand it; raises RuntimeError unless every bit comes back."""
    chunks = epochs[0][part]
    parents = epochs[way.steps][part] if way.steps else [None] * len(chunks)
    width = PARTS[part] if way.split else 1
    pairs = list(zip(chunks, parents, strict=True))
    made: list[bytes] = []
    back: list[bytes] = []

    def squeeze_all() -> None:
        made.extend([squeeze(*pair, width, way.level) for pair in pairs])

    def expand_all() -> None:
        told = zip(made, pairs, strict=True)
        back.extend([expand(each, parent, len(chunk)) for each, (chunk, parent) in told])

    whole = sum(map(len, chunks))
    rate, again = whole / timed(squeeze_all) / 1e6, whole / timed(expand_all) / 1e6
    if back != chunks:
        raise RuntimeError(f"{part} does not come back as it was: {way}")
    left = sum(map(len, made)) / whole
    saved = max(0.0, 1 - left)
    return {"size": 100 * left, "in": rate, "out": again, "pays below": saved * rate}
