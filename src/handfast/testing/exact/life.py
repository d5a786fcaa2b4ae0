"""One rank of a job that is tried out, in a process of its own.

The job is the user's, unchanged. Its Checkpointer is watched: at each ``restore()`` and each
``save()`` the rank's state is printed, whether that save took an image or not; and after the step
at which it is to be killed the rank stands still until it is.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import operator
import os
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import msgspec
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from handfast.errors import HandfastError
from handfast.testing.exact.look import Look
from handfast.testing.exact.moments import Moment, What, write_moment
from handfast.testing.exact.task import HUNG, Task, stand_still, unpack
from handfast.torch import Checkpointer

__all__ = ["live"]


def live(path: str) -> None:
    """Do what the task in this file says. Raises whatever the job raises."""
    with open(path, "rb") as file:
        task = msgspec.msgpack.decode(file.read(), type=Task)
    sys.path[:] = task.search
    with open(os.path.join(task.folder, HUNG), "w", encoding="utf-8") as hung:
        faulthandler.dump_traceback_later(task.limit_s, exit=True, file=hung)
        _seed(task.seed)
        sys.argv = [task.job.file]
        watch = _Watch(task)
        with watch.watching():
            unpack(task.job)(task.run, task.steps)
        watch.close()
        faulthandler.cancel_dump_traceback_later()


def _seed(seed: int) -> None:
    """Seed the streams that a fresh process has by chance: uninterrupted runs then begin alike.

    After a kill they begin otherwise, as they would: nothing may hang on where they begin. CUDA's
    begin alike in every process.
    """
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if "numpy" in sys.modules:
        importlib.import_module("numpy.random").seed(seed)


class _Watch:
    """Prints the state of the one Checkpointer of this process."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._looks: dict[Checkpointer, Look] = {}
        self._stepped: WeakKeyDictionary[Optimizer, None] = WeakKeyDictionary()  # in their order
        self._path = ""
        self._told = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the Checkpointers that are made meanwhile."""
        watch = self
        begin, restore, save = Checkpointer.__init__, Checkpointer.restore, Checkpointer.save

        @functools.wraps(begin)
        def begun(self: Checkpointer, path: Any, state: Any, **options: Any) -> None:
            begin(self, path, state, **options)
            watch.begun(self, os.fspath(path), state, rng=options.get("rng", True))

        @functools.wraps(restore)
        def restored(self: Checkpointer, *args: Any, **options: Any) -> int:
            step = restore(self, *args, **options)
            if not options.get("dry_run"):
                watch.tell(self, "restored", step, self.extra, sys._getframe(1))
            return step

        @functools.wraps(save)
        def saved(self: Checkpointer, step: int, *args: Any, **options: Any) -> Any:
            found = save(self, step, *args, **options)
            extra = options.get("extra")
            watch.tell(self, "saved", step, extra, sys._getframe(1), taken=bool(found))
            return found

        stepped = register_optimizer_step_post_hook(lambda o, *_: self._stepped.setdefault(o))
        with (
            mock.patch.object(Checkpointer, "__init__", begun),
            mock.patch.object(Checkpointer, "restore", restored),
            mock.patch.object(Checkpointer, "save", saved),
        ):
            try:
                yield
            finally:
                stepped.remove()

    def begun(
        self, checkpointer: Checkpointer, path: str, state: Mapping[str, object], *, rng: bool
    ) -> None:
        """Take note of a Checkpointer. Raises HandfastError for a second run in this process."""
        if self._path not in ("", path):
            raise HandfastError(
                f"one run a process can be tried out, and this job makes two: at {self._path} and "
                f"at {path}. What to do: give the job a part of them, or put both into one state"
            )
        self._path = path
        self._looks[checkpointer] = Look(state, rng=rng, run=self._task.run, stepped=self._stepped)

    def tell(
        self,
        checkpointer: Checkpointer,
        what: What,
        step: int,
        extra: object,
        frame: FrameType,
        *,
        taken: bool = False,
    ) -> None:
        """Write a moment down; stand still if the rank is to be killed here."""
        prints = self._looks[checkpointer].prints(extra, frame)
        step = operator.index(step)
        self._told += 1
        write_moment(self._task.folder, self._told, Moment(what, step, taken, prints))
        if what == "saved" and step == self._task.stop:
            stand_still(self._task.folder)

    def close(self) -> None:
        """Close what the job has left open, so that its agent ends. Raises what that raises."""
        for checkpointer in self._looks:
            checkpointer.close()
