"""A torch training state behind the Checkpointer's port: capture, copy, compare, apply."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, compress
from operator import not_
from typing import Final, NamedTuple
from weakref import WeakKeyDictionary

import msgspec
import torch
from torch import nn
from torch.optim import Optimizer

from handfast.agent.examiner import Examined
from handfast.agent.keeper import Plan
from handfast.checkpoint.images import StagingImage
from handfast.checkpoint.port import Copied, Prove
from handfast.checkpoint.spelling import some
from handfast.checkpoint.validated import Validated
from handfast.errors import Unstorable
from handfast.store import objects
from handfast.store.image import Layout, TensorSpec, plan
from handfast.store.kept import Kept
from handfast.store.port import Verify
from handfast.store.provenance import Brought
from handfast.torch import apply as restore
from handfast.torch import boxes, compare, optimizers
from handfast.torch.capture import Captured, Names, capture, walk
from handfast.torch.corrections import warn_unsaved
from handfast.torch.garbage import uncollected
from handfast.torch.gradients import Watch, unclean_gradients, unowned
from handfast.torch.hints import own_digests
from handfast.torch.indices import begin, brought, common, refuse_trained_apart, sources
from handfast.torch.lineage import History, index_of
from handfast.torch.marked import changes, forgotten
from handfast.torch.names import matches
from handfast.torch.origins import HERE, Origin
from handfast.torch.pieces import Pieces
from handfast.torch.remember import known, refuse_torn, remember, rests, unmark, warn_undone
from handfast.torch.rng import unmoved_streams
from handfast.torch.saved import EXTRA, GRADS, KINDS, RNG, Saved, read_manifests
from handfast.torch.stage import Canvas, stage
from handfast.torch.tensors import digest, local
from handfast.torch.tree import Kind, Node, nodes, survey
from handfast.torch.validators import free
from handfast.torch.values import Stored

__all__ = ["TorchState", "environment"]

logger = logging.getLogger("handfast")

WHOLE: Final = ("**",)
LOOKS: Final = 8
"""So many saves look for gradients that no optimizer has."""


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
    """Fills :class:`handfast.checkpoint.port.State` for torch.

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
        window: int = 0,
        validators: Sequence[str] = (),
        compared: bool = False,
        ways: compare.Ways = compare.RESTORE,
    ) -> None:
        self._state = state
        self._ways = ways
        self._window = window
        self._rng = rng
        self._declared = tuple(replicated)
        self._pickle = tuple(pickle)
        self._verify: Verify = verify
        self._history = History()
        self._came = sources(())
        self._seen = 0
        self._validators = tuple(validators)
        self._comparing = compared
        self._rank = 0
        self._node: tuple[int, ...] = (0,)
        self._kept: frozenset[str] = frozenset()
        self._proven: frozenset[str] = frozenset()
        self._captured: Captured | None = None
        self._encoded = Kept(())
        self._mine: tuple[bool, ...] = ()
        self._layout: Layout | None = None
        self._plan: Plan | None = None
        self._watch: Watch | None = None
        self._looks = LOOKS
        self._given: WeakKeyDictionary[Optimizer, optimizers.Given] | None = None
        self._compared: _Compared | None = None
        self._whole = False
        self._rests: dict[str, Origin] = {}

    def watch(self) -> Callable[[], None]:
        """Watch what steps consume from now on, for :meth:`pending`; gives what ends it."""
        self._watch = Watch(self._state)
        return self._watch.end

    def shares(self, rank: int, node: Sequence[int]) -> None:
        """See the port."""
        if self._given is None:  # before the first restore, when nothing was trained
            self._given = WeakKeyDictionary()
            # what is wrong with the state is said when it is read, and the other ranks are told
            with suppress(TypeError, ValueError, Unstorable):
                opts = [n.value for n in nodes(self._state) if n.kind is Kind.OPTIMIZER]
                self._given.update({opt: optimizers.given_to(opt) for opt in opts})
        if (rank, tuple(node)) != (self._rank, self._node):
            self._forget()
            self._proven = frozenset()
        self._rank, self._node = rank, tuple(node)

    @property
    def _leads(self) -> bool:
        """Whether this rank stores all that it has: the first of its node does."""
        return self._rank == self._node[0] or self._window > 0

    def keeps(self, paths: Collection[str]) -> None:
        """See the port. Each is named in a warning, once."""
        fresh = sorted(set(paths) - self._kept)
        if fresh:
            self._kept |= set(fresh)
            self._forget()
            logger.warning(
                "%s seemed to be alike on all ranks, and is not: each rank stores its own from "
                "now on, and no epoch converges in which it was still left to another",
                some(fresh, 3),
            )

    def _forget(self) -> None:
        self._captured, self._layout, self._plan = None, None, None

    @uncollected()
    def capture(self, extra: object, grads: bool, prove: Prove) -> Plan:
        """See the port."""
        before = self._captured
        now = capture(
            self._state, rng=self._rng, replicated=self._declared, extra=extra, grads=grads,
            previous=before,
        )  # fmt: skip
        same = before is not None and now.specs is before.specs
        former, self._plan = self._plan, None  # until it is whole: an interrupt leaves none
        self._captured = now
        proven = self._prove(now, prove)
        if same and proven and former is not None:
            self._plan = former
            return former
        left = set() if self._leads else self._proven.intersection(now.replicated) - self._kept
        self._mine = tuple(spec.path not in left for spec in now.specs)
        specs = list(compress(now.specs, self._mine))
        apart = left | self._kept
        self._layout = layout = plan(specs, now.still)
        self._plan = Plan(
            slots=layout.slots,
            header=layout.header,
            nbytes=layout.nbytes,
            padded=layout.padded,
            aliases=now.aliases,  # also to what is left to another rank: it may not have the tie
            # what comes piece by piece can't be held against what other ranks of the node have
            replicated=tuple(p for p in now.replicated if p not in apart and not self._window),
            structure=structure(now.specs),
            environment=environment(),
            lineage=self._history.lineage,
            forks=self._history.forks,
            verify=self._verify,
            left=tuple(spec.path for spec in now.specs if spec.path in left),
            left_to=self._node[0],
            leads=self._leads and len(self._node) > 1 and not self._window,
            window=self._window,
            compared=self._should_be_alike(now) if self._comparing else (),
            examined=self._examined(now),
            came=self._came,
        )
        return self._plan

    def _should_be_alike(self, now: Captured) -> tuple[str, ...]:
        """What ranks that go apart must not differ in, whoever stores it: between two forward
        passes that is none of the buffers which DDP broadcasts, unless they were declared.
        """
        passing = frozenset[int]().union(*(r.buffers for r in chain(*now.names.replicas)))
        alike = set(now.replicated)
        return tuple(
            spec.path
            for spec, tensor in zip(now.specs, now.tensors, strict=True)
            if spec.path in alike
            and (id(tensor) not in passing or matches(spec.path, self._declared))
        )

    def _examined(self, now: Captured) -> Examined | None:
        """What is to be looked at before a vote."""
        if not self._validators:
            return None
        argv = (sys.executable, "-m", "handfast.torch.examine")
        path = tuple(os.path.abspath(entry) for entry in sys.path)
        return Examined(argv, path, self._validators, free(nodes(self._state), now))

    def _prove(self, now: Captured, prove: Prove) -> bool:
        """Ask of what seems alike on this node's ranks whether it is; says if nothing was asked.

        What is proven is compared in every save from then on, before it counts.
        """
        fresh = set(now.replicated) - self._proven - self._kept
        if self._leads or not fresh:
            return True
        digests = {
            spec.path: digest(spec, tensor)
            for spec, tensor in zip(now.specs, now.tensors, strict=True)
            if spec.path in fresh
        }
        same = prove(self._node[0], digests)
        if same is None:
            logger.warning(
                "rank %d, the first of this node, was not heard in time: rank %d stores all of its "
                "own in this epoch, and asks again with the next",
                self._node[0],
                self._rank,
            )
            return True
        self._proven |= set(same)
        self._kept |= fresh.difference(same)
        return False

    @uncollected()
    def copy(self, image: StagingImage) -> Copied:
        """See the port. Returns once the bytes are in the image, from CUDA devices too."""
        captured, layout = self._captured, self._layout
        if captured is None or layout is None or image.plan is not self._plan:
            raise RuntimeError("what was captured is of another plan than this image")
        if len(captured.tensors) < len(captured.specs):  # its addresses may be anybody's by now
            raise RuntimeError("what was captured was copied already")
        if self._window:
            held = dict(zip((spec.path for spec in captured.specs), captured.tensors, strict=True))
            pieces = Pieces(layout, [held[slot.spec.path] for slot in layout.slots])
            self._captured = replace(captured, tensors=())
            return Copied(self._encode(captured), b"", pieces.put)
        if image.views is None:
            image.views = Canvas(layout.slots, image.map)
        staged = stage(captured, image.views)
        encoded = self._encode(captured)
        left = compress(zip(captured.specs, captured.tensors, strict=True), map(not_, self._mine))
        digests = b"".join(digest(spec, tensor) for spec, tensor in left)
        staged.wait()
        # between two saves nothing of the training is held that it may want to let go of
        self._captured = replace(captured, tensors=())
        return Copied(encoded, digests)

    def _encode(self, captured: Captured) -> bytes:
        """Encode the objects; what is made of names alone once, while they stay."""
        if not self._encoded.of(captured.fixed):
            self._encoded = Kept(captured.fixed, begins=captured.whole)
        tree = captured.objects
        if captured.whole is not None:
            tree = {key: tree[key] for key in (EXTRA, GRADS, KINDS, RNG) if key in tree}
        return objects.encode(tree, pickle=self._pickle, kept=self._encoded)

    @uncollected()
    def pending(self, grads: bool) -> Sequence[str]:
        """See the port."""
        before = self._captured
        found = survey(self._state, before.names.trays if before else ())
        things = [item for item in found if isinstance(item, Node)]
        if self._watch is not None:
            self._watch.look(things)
        self._follow()
        values = [node.value for node in things]
        refuse_trained_apart(values, "this epoch")
        warn_unsaved(values)
        for came in forgotten(values):
            logger.warning(
                "%s was loaded around the guard since: what is saved from here on bears the name "
                "of lineage %s, and holds values that are not of it. What to do: load by restore() "
                "or guard.load(), and give what begins so a lineage of its own; where weights were "
                "swapped for an evaluation load those back first, bit for bit",
                came,
                self._history.lineage,
            )
        self._looks -= 1
        if self._looks >= 0 and not grads and (left := unowned(things)):
            self._looks = 0
            logger.warning(
                "%s: no optimizer of the state has these parameters, and they have gradients, "
                "which are not saved. All is well if nothing uses them after the step. Else a "
                "resume goes on otherwise (where their norm is clipped, say): put what steps them "
                "into the state, or freeze them with requires_grad_(False)",
                some(left, 3),
            )
        return unclean_gradients(things, stored=grads)

    @uncollected()
    def compare(self, copies: Sequence[Validated], only: Sequence[str], strict: bool) -> None:
        """See the port. Differences of the environment are warned of by name.

        With ``strict``, raises ValueError for a pattern that names nothing of this rank.
        """
        self._compared = None
        saved, stored = self.read(copies), Stored(copies)
        shards = [f"shard {copy.manifest.stamp.shard}" for copy in copies]
        if strict:
            compare.check_patterns(saved, only)
        with unmoved_streams():  # a loader's state_dict() may draw the seed of its workers
            before = self._captured
            walked = walk(self._state, before.names if before else None)
            live = capture(
                self._state,
                rng=False,
                replicated=self._declared,
                previous=before,
                walked=walked,
            )
            if any(node.kind is Kind.LOADER for node in walked.nodes):
                walked, source = restore.look(self._state, saved, stored, walked.names)
            else:  # the other walk would find the same
                source = restore.placed(walked, saved, stored)
        for copy in copies[1:]:
            compare.refuse_unlike(copies[0].manifest, copy.manifest, only)
        compare.refuse_lacking(compare.lacking(live, saved, only=only), shards, self._ways)
        compare.refuse_homeless(compare.homeless(live, source, only=only), shards[0], self._ways)
        found = compare.differences(live, saved, only=only, strict=strict)
        gone = boxes.changes(live, saved, only).gone
        tensors = restore.live_tensors(walked)
        found = found or compare.torn(tensors, source, only, gone)
        compare.refuse(found, shards[0], self._ways)
        was, now = copies[0].manifest.environment, environment()
        changed = [f"{k}: was {was[k]}, is {now.get(k)}" for k in was if was[k] != now.get(k)]
        if changed:
            logger.warning("the resume may differ in the last bits: %s", "; ".join(changed))
        self._rests = rests(self._parts(), saved, only)
        self._compared = _Compared(tuple(copies), saved, stored, walked.names, strict)

    @uncollected()
    def preload(self, copies: Sequence[Validated], only: Sequence[str]) -> None:
        """See the port; what is not there yet, such as moments, is made and kept until then."""
        known = self._compared
        if known is None or known.copies != tuple(copies):
            raise RuntimeError("what is to be read was not compared")
        walked = walk(self._state, known.names, without=frozenset({Kind.LOADER}))
        saved = known.saved
        unmark(self._parts(), saved, only)
        live = {
            saved.aliases.get(path, path): local(tensor)
            for path, tensor in restore.live_tensors(walked).items()
            if matches(path, only)
        }
        known.stored.preload(live, [path for path in saved.specs if matches(path, only)])

    def apply(
        self, copies: Sequence[Validated], only: Sequence[str], keep_live: Sequence[str]
    ) -> object:
        """See the port."""
        known, self._compared = self._compared, None  # what is applied may be changed by it
        only = WHOLE if self._whole else only
        if known is None or known.copies != tuple(copies):
            known = _Compared(tuple(copies), self.read(copies), Stored(copies), None, True)
        if not self._rng:
            known.saved.objects.pop(RNG, None)
        unmark(self._parts(), known.saved, only)
        return restore.apply(
            self._state,
            known.saved,
            known.stored,
            only=only,
            keep_live=keep_live,
            given=self._given or {},
            names=known.names,
        )

    def brought(self) -> Brought:
        """See the port."""
        return brought(lambda: [node.value for node in self._parts()])

    def begins(self, copies: Sequence[Validated], only: Sequence[str], lineage: str) -> None:
        """See the port. Raises ValueError for the name of a lineage that this came from.

        A lineage that the copies are of goes on, and whole: ``only`` said what it began with.
        """
        self._whole = bool(copies) and lineage == copies[0].manifest.stamp.lineage
        if self._whole and "**" not in only and self._compared is not None:
            logger.warning(
                "epoch %s is of lineage %s already, which goes on whole: only=%s said what it "
                "began with",
                copies[0].manifest.stamp.epoch,
                lineage,
                tuple(only),
            )
            self.compare(copies, WHOLE, self._compared.strict)
        if copies and not self._seen and "**" in only:  # nothing was saved since the start
            warn_undone(self._parts(), copies[0].manifest.stamp)
        history = self._onward(copies, only, lineage)
        if copies and history == History.of(copies[0].manifest.stamp):
            stamp, saved = copies[0].manifest.stamp, self.read(copies)
            refuse_torn(self._parts(), saved, stamp, only, self._rests)

    def _onward(self, copies: Sequence[Validated], only: Sequence[str], lineage: str) -> History:
        if copies:
            stamp = copies[0].manifest.stamp
            was, why = History.of(stamp), f"restore(only={only})"
            history = was.onward(lineage, stamp.run, index_of(stamp), why)
            stays = [rest for rest in self._rests.values() if rest.run != HERE and history != was]
            return history.joined(r.history.onward(lineage, r.run, r.index, why) for r in stays)
        came = common([node.value for node in self._parts()], "the first epoch of this run")
        if came is None:
            return History(lineage or "main")
        return came.history.onward(lineage, came.run, came.index, "restore() of a first start")

    def began(
        self, copies: Sequence[Validated], only: Sequence[str], lineage: str, run: str
    ) -> None:
        """See the port."""
        self._history, self._plan = self._onward(copies, only, lineage), None
        if copies:
            stamp, saved = copies[0].manifest.stamp, self.read(copies)
            only = WHOLE if self._whole else only
            remember(self._parts(), saved, stamp, only, self._history, self._rests)
        else:
            begin([(node.value, node.path) for node in self._parts()], self._history, run)

    def known(self, copies: Sequence[Validated]) -> dict[str, frozenset[int]]:
        """Give what comes with each part by path, of what the epoch has weights and moments of."""
        return known(self._parts(), self.read(copies), WHOLE)

    def _follow(self) -> None:
        """Go on as what was loaded since. Raises Refused for a mixture."""
        if self._seen == changes():
            return
        parts = [node.value for node in self._parts()]
        came, former = common(parts, "this epoch"), (self._history, self._came)
        self._seen, self._came = changes(), sources(parts)
        self._history = came.history if came is not None and came.run != HERE else former[0]
        if (self._history, self._came) != former:
            self._plan = None

    def _parts(self) -> list[Node]:
        """The modules and optimizers of the state."""
        return [n for n in nodes(self._state) if isinstance(n.value, nn.Module | Optimizer)]

    def read(self, copies: Sequence[Validated]) -> Saved:
        """What was saved of this rank's shard. Raises FormatError for what can't be read."""
        manifests = [copy.manifest for copy in copies]
        return read_manifests(manifests[0], *manifests[1:], pickle=self._pickle)

    def replicas(self, copies: Sequence[Validated]) -> dict[str, bytes]:
        """See the port; of what comes piece by piece nothing is anybody else's."""
        return {} if self._window else own_digests(copies)


class _Compared(NamedTuple):
    """What a comparison has read, for the restore that follows it."""

    copies: tuple[Validated, ...]
    saved: Saved
    stored: Stored
    names: Names | None
    strict: bool


def structure(specs: Sequence[TensorSpec]) -> str:
    """Digest paths, dtypes, global shapes and placements: 32 hexadecimal characters."""
    rows = [(s.path, s.dtype, s.global_shape, s.shape, s.offset) for s in specs]
    return hashlib.blake2b(msgspec.msgpack.encode(sorted(rows)), digest_size=16).hexdigest()
