"""A torch training state behind the Checkpointer's port: capture, copy, compare, apply."""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress, islice
from typing import Final

import msgspec
import torch
import xxhash
from torch import Tensor

from handfast.agent.keeper import Plan
from handfast.checkpoint.images import Loaded, StagingImage
from handfast.errors import HandfastError
from handfast.store import objects
from handfast.store.image import Layout, TensorSpec, plan
from handfast.store.port import Verify
from handfast.torch import apply as restore
from handfast.torch import compare
from handfast.torch.capture import Captured, capture, could_share
from handfast.torch.gradients import unclean_gradients
from handfast.torch.rng import unmoved_streams
from handfast.torch.saved import GRADS, RNG, Saved, read_manifests
from handfast.torch.stage import map_image, stage

__all__ = ["TorchState", "environment"]

logger = logging.getLogger("handfast")

HINTS: Final = 100


def environment() -> dict[str, str]:
    """Describe what bit-exactness depends on besides the state; differences are only warned of."""
    return {
        "torch": str(torch.__version__),
        "threads": str(torch.get_num_threads()),
        "processor": _processor(),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            names = [
                line.partition(":")[2].strip() for line in info if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


class TorchState:
    """Fills :class:`handfast.checkpoint.checkpointer.State` for torch.

    ``state`` maps component names to modules, optimizers and whatever else is captured.
    """

    def __init__(
        self,
        state: Mapping[str, object],
        *,
        rng: bool,
        replicated: Sequence[str],
        pickle: Sequence[str],
        verify: Verify,
        lineage: str = "main",
    ) -> None:
        self._state = state
        self._rng = rng
        self._declared = tuple(replicated)
        self._pickle = tuple(pickle)
        self._verify: Verify = verify
        self._lineage = lineage
        self._owner, self._agreed = True, False
        self._captured: Captured | None = None
        self._mine: tuple[bool, ...] = ()
        self._layout: Layout | None = None
        self._plan: Plan | None = None

    def alike(self) -> bool:
        """See the port. What can't be walked is not; what is wrong with it the capture says."""
        try:
            return could_share(self._state)
        except (TypeError, HandfastError):
            return False

    def shares(self, owner: bool, agreed: bool) -> None:
        """See the port: the lowest rank of a node stores what all of its ranks hold alike.

        DDP's parameters are known to be alike without asking; optimizer state only if all ranks
        agreed. Then another rank leaves it out if its own look at a save says so too, and the owner
        marks it whatever its own says: what anybody leaves out is marked as stored for the node.
        """
        if (owner, agreed) != (self._owner, self._agreed):
            self._captured, self._layout, self._plan = None, None, None
        self._owner, self._agreed = owner, agreed

    def capture(self, extra: object, grads: bool) -> Plan:
        """See the port."""
        before = self._captured
        now = capture(
            self._state,
            rng=self._rng,
            replicated=self._declared,
            extra=extra,
            grads=grads,
            alike=None if self._agreed and not self._owner else self._agreed,
            previous=before,
        )
        same = before is not None and now.specs is before.specs
        former, self._plan = self._plan, None  # until it is whole: an interrupt leaves none
        self._captured = now
        if same and former is not None:
            self._plan = former
            return former
        shared = set(now.replicated)
        self._mine = tuple(self._owner or spec.path not in shared for spec in now.specs)
        specs = [spec for spec, mine in zip(now.specs, self._mine, strict=True) if mine]
        stored = {spec.path for spec in specs}
        self._layout = layout = plan(specs)
        self._plan = Plan(
            slots=layout.slots,
            header=layout.header,
            nbytes=layout.nbytes,
            padded=layout.padded,
            aliases=now.aliases,  # also to what is left to another rank: it may not have the tie
            replicated=tuple(path for path in now.replicated if path in stored),
            structure=structure(now.specs),
            environment=environment(),
            lineage=self._lineage,
            verify=self._verify,
        )
        return self._plan

    def copy(self, image: StagingImage) -> bytes:
        """See the port. Returns once the bytes are in the image, from CUDA devices too."""
        captured, layout = self._captured, self._layout
        if captured is None or layout is None or image.plan is not self._plan:
            raise RuntimeError("what was captured is of another plan than this image")
        if image.views is None:
            image.views = map_image(layout.slots, image.map)
        kept = captured if all(self._mine) else _only(captured, self._mine)
        staged = stage(kept, image.views)
        encoded = objects.encode(captured.objects, pickle=self._pickle)
        staged.wait()
        return encoded

    def pending(self, grads: bool) -> Sequence[str]:
        """See the port."""
        return unclean_gradients(self._state, stored=grads)

    def compare(self, copies: Sequence[Loaded], only: Sequence[str], strict: bool) -> None:
        """See the port. Differences of the environment are warned of by name.

        With ``strict``, raises ValueError for a pattern that names nothing of this rank.
        """
        saved = self._read(copies)
        shards = [f"shard {copy.manifest.stamp.shard}" for copy in copies]
        if strict:
            compare.check_patterns(saved, only)
        with unmoved_streams():  # a loader's state_dict() may draw the seed of its workers
            live = capture(self._state, rng=False, replicated=self._declared)
        compare.refuse_lacking(compare.lacking(live, saved, only=only), shards)
        found = compare.differences(live, saved, only=only, strict=strict)
        compare.refuse(found, shards[0])
        was, now = copies[0].manifest.environment, environment()
        changed = [f"{k}: was {was[k]}, is {now.get(k)}" for k in was if was[k] != now.get(k)]
        if changed:
            logger.warning("the resume may differ in the last bits: %s", "; ".join(changed))

    def apply(
        self, copies: Sequence[Loaded], only: Sequence[str], keep_live: Sequence[str]
    ) -> object:
        """See the port."""
        saved = self._read(copies)
        if not self._rng:
            saved.objects.pop(RNG, None)
        views: dict[str, Tensor] = {}
        for copy in reversed(copies):
            views |= map_image(copy.manifest.slots, copy.memory)
        return restore.apply(self._state, saved, views, only=only, keep_live=keep_live)

    def _read(self, copies: Sequence[Loaded]) -> Saved:
        manifests = [copy.manifest for copy in copies]
        return read_manifests(manifests[0], *manifests[1:], pickle=self._pickle)

    def replicas(self, copies: Sequence[Loaded]) -> dict[str, bytes]:
        """See the port: whole tensors, neither sharded nor declared, empty nor tiny.

        The first of them only: every rank is told those of all, for a hint.
        """
        manifest = copies[0].manifest
        known = {path for copy in copies for path in copy.manifest.replicated}
        own = (
            slot
            for slot in manifest.slots
            if slot.spec.path not in known
            and not slot.spec.path.startswith(f"{GRADS}/")
            and slot.spec.shape == slot.spec.global_shape
            and slot.nbytes >= 4096
        )
        with memoryview(copies[0].memory) as memory:
            return {
                slot.spec.path: xxhash.xxh3_128_digest(
                    memory[slot.start : slot.start + slot.nbytes]
                )
                for slot in islice(own, HINTS)
            }


def _only(captured: Captured, mine: Sequence[bool]) -> Captured:
    """Leave out what another rank of the node stores."""
    return replace(
        captured,
        specs=tuple(compress(captured.specs, mine)),
        tensors=tuple(compress(captured.tensors, mine)),
    )


def structure(specs: Sequence[TensorSpec]) -> str:
    """Digest paths, dtypes, global shapes and placements: 32 hexadecimal characters."""
    rows = [(s.path, s.dtype, s.global_shape, s.shape, s.offset) for s in specs]
    return hashlib.blake2b(msgspec.msgpack.encode(sorted(rows)), digest_size=16).hexdigest()
