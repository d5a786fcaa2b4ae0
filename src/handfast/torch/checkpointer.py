"""``handfast.torch.Checkpointer``: ten lines in a training script, one process or thousands."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, get_args

import torch.distributed as dist

from handfast.agent import process
from handfast.agent.joining import node_label
from handfast.checkpoint import checkpointer
from handfast.checkpoint.arguments import names, one_of, patterns
from handfast.checkpoint.collective import Place, Solo
from handfast.checkpoint.heard import Compared
from handfast.checkpoint.session import Session
from handfast.core.retain import Keep
from handfast.store import objects
from handfast.store.files import Posix
from handfast.store.port import Verify
from handfast.torch.capture import capture
from handfast.torch.group import Group
from handfast.torch.loaders import warn_of_orders
from handfast.torch.prime import prime
from handfast.torch.state import TorchState
from handfast.torch.validators import find

__all__ = ["Checkpointer"]

WINDOW: Final = 64 << 20
"""Bytes of memory through which a state passes that there is no second one for."""


class Checkpointer(checkpointer.Checkpointer):
    """Checkpoints of a torch training that can be neither torn nor mixed.

    ``path`` is the run's directory and may hold ``{rank}``, ``{local_rank}`` and ``{host}``, for
    disks that are not shared. ``state`` maps names to what makes up one epoch: modules,
    optimizers, schedulers, scalers, loaders, generators, tensors, anything with ``state_dict`` and
    ``load_state_dict``, and boxes of them.

    ``every`` is the schedule, in steps; ``keep`` what is retained (never less than the recovery
    line); ``replicated`` are ``fnmatch`` patterns of paths that all ranks hold alike (DDP's and
    replicated DTensors are found), to be compared in every save; ``rng`` adds the random streams of
    Python, NumPy and torch; ``images`` is how many copies of the state may be in memory: with 0 of
    them a save passes through a window of 64 MiB, and blocks until it is persisted; ``window`` how
    many epochs may be voted and not yet converged; ``busy`` what a save does when it finds no image
    or window free: "wait", "skip" or "raise"; ``on_error`` what becomes of failed saves: "raise" at
    the next call, "retry" at the next step (three times), or "warn"; ``replicas`` what becomes of
    ranks that differ in what they hold alike by design: nothing, "warn" or "raise"; ``verify`` how
    much is read back before an epoch counts: "fsync" (nothing), "sampled" or "full"; ``pickle``
    names paths whose objects may be pickled; ``validators`` are asked of every staged state, in a
    process of their own, before it counts: "finite", "nonnegative", "moments", "masters", "loss",
    or a "module:function" of your own (:mod:`handfast.torch.validators`); ``group`` is the process
    group whose ranks hold this state, if that is not the whole job; ``on_event(name, fields)`` is
    told what happens; ``drain_s`` bounds what is waited for after an exception and at a restart;
    ``patience_s`` bounds waits for other ranks.

    Raises ValueError for arguments that make no sense, Unstorable and TypeError for a state that
    could never be saved.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        state: Mapping[str, object],
        *,
        every: int = 1,
        keep: Keep | None = None,
        replicated: Sequence[str] = (),
        rng: bool = True,
        images: int = 1,
        window: int = 2,
        busy: checkpointer.Busy = "wait",
        on_error: checkpointer.OnError = "raise",
        replicas: Compared = "",
        verify: Verify = "sampled",
        pickle: Sequence[str] = (),
        validators: Sequence[str] = (),
        group: dist.ProcessGroup | None = None,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
        drain_s: float = 30.0,
        patience_s: float | None = 600.0,
    ) -> None:
        one_of("verify", verify, get_args(Verify))
        validators = _found(validators, images)
        if replicas and not images:
            raise ValueError("images=0 leaves nothing to compare ranks by: give images=1")
        replicated, pickle = patterns("replicated", replicated), patterns("pickle", pickle)
        _check_state(state, rng, replicated, pickle)
        run = spelled(path)
        collective = Group(group, run, patience_s) if _distributed() else Solo()
        root = os.path.realpath(root_of(run, collective.place))
        if os.path.isfile(root):
            raise ValueError(f"path={root!r} is a file: give the directory that the run is to have")
        template = os.path.realpath(run)  # one run has one agent a node, by any name
        session = Session(
            collective,
            root,
            Posix(),
            connect=lambda: _connect(template, patience_s),
        )
        held = TorchState(
            state, rng=rng, replicated=replicated, pickle=pickle, verify=verify,
            window=0 if images else WINDOW, validators=validators, compared=bool(replicas),
        )  # fmt: skip
        super().__init__(
            session,
            held,
            every=every,
            keep=keep,
            images=images,
            window=window,
            busy=busy,
            on_error=on_error,
            replicas=replicas,
            on_event=on_event,
            drain_s=drain_s,
            patience_s=patience_s,
        )
        self._live = state
        self._unwatch = held.watch()

    def prime(self, fn: Callable[[], object]) -> None:
        """Run one throwaway forward and backward before :meth:`restore`, and take it back.

        DDP needs it to resume bit for bit (see :mod:`handfast.torch.prime`). Every rank calls it,
        on every start, with an ``fn`` that does one forward and backward on a batch of the right
        shape, ``ckpt.prime(lambda: loss_fn(model(torch.zeros_like(batch))).backward())``, and steps
        no optimizer, scheduler or loader. It is run twice where a DDP module of the state has
        ``static_graph=True``, whose order is settled one iteration later. Parameters, buffers
        and random streams are put back, so that it leaves no trace in them but the order in which
        gradients are reduced from then on; what ``fn`` does to other attributes of modules, a plain
        counter say, stays.

        Raises what ``fn`` raises, and ValueError where ``fn`` stepped a fresh optimizer, or left no
        gradient.
        """
        prime(self._live, fn)

    def _leave(self) -> None:
        self._unwatch()
        super()._leave()


def _found(validators: Sequence[str], images: int) -> tuple[str, ...]:
    """Take names of validators that are there. Raises ValueError."""
    for name in (taken := names("validators", validators)):
        find(name)
    if taken and not images:
        raise ValueError("images=0 leaves validators nothing to look at: give images=1")
    return taken


def _check_state(
    state: object, rng: bool, replicated: tuple[str, ...], pickle: tuple[str, ...]
) -> None:
    """Say now what can't be stored. Raises ValueError, Unstorable, TypeError."""
    if not isinstance(state, Mapping) or not state:
        raise ValueError("state: give a dict of what makes up one epoch, {'model': model, ...}")
    found = capture(state, rng=rng, replicated=replicated)
    objects.encode(found.objects, pickle=pickle)
    warn_of_orders(state)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def spelled(path: str | os.PathLike[str]) -> str:
    """Give a path as text. Raises ValueError for one that can't be the directory of a run."""
    given = os.fspath(path)
    if not given:
        raise ValueError("path='': give the run's directory ('.' is the current one)")
    if not _is_text(given):
        raise ValueError(f"path={given!r}: give a str in UTF-8; rename the directory if need be")
    real = os.path.realpath(given)
    if not _is_text(real):
        raise ValueError(f"path={given!r} is {real!r}: rename that directory; names must be UTF-8")
    return given


def _is_text(path: str) -> bool:
    try:
        return b"\0" not in path.encode()
    except (UnicodeEncodeError, AttributeError):
        return False


def root_of(template: str, place: Place) -> str:
    """Fill a path's ``{rank}``, ``{local_rank}`` and ``{host}``.

    Raises ValueError for anything else in braces, and for braces that are no pair.
    """
    try:
        return template.format(rank=place.rank, local_rank=place.local_rank, host=place.node)
    except (KeyError, IndexError) as error:
        why = f"{{{error.args[0]}}} is not known in a path"
    except (ValueError, AttributeError, TypeError) as error:
        why = f"its braces can't be filled: {error}"
    raise ValueError(
        f"{template}: {why}; {{rank}}, {{local_rank}} and {{host}} are, also as {{rank:05d}}; a "
        "brace that is part of a name is written twice"
    )


def _connect(template: str, patience_s: float | None) -> Any:
    """Find this node's agent for the run, or start it.

    One that is there has half of the patience: the other ranks wait that long for this one's word.
    """
    key = f"{template}\n{node_label()}"
    log = os.path.join(process.meeting_place(key), "log")
    soon = None if patience_s is None else patience_s / 2
    return process.connect_or_start(key, log, patience_s=soon)
