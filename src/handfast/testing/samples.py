"""Small epochs to save, for suites and trials that need some; imports no test framework."""

import math
import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import msgspec

from handfast.core.lattice import Epoch
from handfast.store.bulk import Source
from handfast.store.image import Layout, TensorSpec, plan
from handfast.store.manifest import Manifest, Stamp
from handfast.store.port import Tier, Verify, Written

__all__ = ["Owner", "picture", "save"]

MEBI = 1 << 20


class Owner(Protocol):
    """Whose epochs are saved."""

    @property
    def run(self) -> str:
        """The run."""

    @property
    def domain(self) -> str:
        """The domain's id."""

    @property
    def shard(self) -> int:
        """The shard that it holds."""


def picture(seed: int, *, frozen: int = 0, nbytes: int = 3 * MEBI) -> tuple[Layout, bytearray]:
    """A layout and an image of it: `nbytes` of "weights" and some odd tensors besides.

    The bytes follow from `seed`, except the last `frozen` bytes of the weights, which are the
    same for all seeds.
    """
    shapes = {"model/weights": ("uint8", (nbytes,)), "optimizer/step": ("float32", ()),
              "model/empty": ("bfloat16", (0, 3)), "model/bias": ("float32", (7,))}  # fmt: skip
    specs = []
    for path, (dtype, shape) in shapes.items():
        stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        specs.append(TensorSpec(path, dtype, shape, shape, (0,) * len(shape), stride))
    layout = plan(specs)
    image = bytearray(layout.header) + random.Random(seed).randbytes(
        layout.nbytes - len(layout.header)
    )
    if frozen:
        image[-frozen:] = random.Random(0).randbytes(frozen)
    return layout, image


def save(
    tier: Tier,
    home: Owner,
    epoch: Epoch,
    image: bytearray | Source,
    layout: Layout,
    *,
    parent: Manifest | None = None,
    verify: Verify = "sampled",
    changes: Mapping[str, object] = MappingProxyType({}),
) -> Written:
    """Write an epoch with everything that a manifest can hold; `changes` are to its stamp."""
    before = parent.stamp.epoch if parent else None
    stamp = Stamp(
        run=home.run,
        lineage="main",
        generation=epoch.generation,
        step=epoch.step,
        domain=home.domain,
        shard=home.shard,
        shards=home.shard + 1,
        incarnation=tier.incarnation,
        configuration="c0ffee",
        parent=before,
    )
    return tier.write(
        msgspec.structs.replace(stamp, **dict(changes)),
        layout,
        image,
        objects=b"objects of " + str(epoch).encode(),
        aliases={"model/tied": "model/weights"},
        environment={"threads": "2"},
        replicated=("model/bias",),
        structure="5tructure",
        parent=parent,
        verify=verify,
    )
