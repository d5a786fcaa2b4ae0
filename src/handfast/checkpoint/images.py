"""Memory that a trainer and its agent share: images to be persisted.

No memory is unmapped by hand: it goes with its last view. Frameworks make views that the mapping
does not know of, and a traceback, or whoever prints one, may hold them for long.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import weakref
from collections.abc import Iterator
from typing import Any, Final

from handfast.agent.frames import make_image
from handfast.agent.keeper import Plan
from handfast.core.lattice import Epoch
from handfast.errors import SaveFailed
from handfast.store.files import describe

__all__ = ["StagingImage"]

_MADV_POPULATE_WRITE: Final = 23  # Linux's; Python has no name for it yet
REMEDIES: Final = {
    errno.EFBIG: "raise the limit on file sizes (ulimit -f): shared memory counts as a file",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}
ROOM: Final = (
    "free memory on this node, or raise what this process may have (ulimit -v, its cgroup)"
)


@contextlib.contextmanager
def _memory(nbytes: int) -> Iterator[None]:
    """Turn an OSError of the body into a SaveFailed that names the bytes and what to do."""
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, ROOM)
        raise SaveFailed(
            f"no memory for an image of {nbytes} bytes: {describe(error)}. What to do: {remedy}"
        ) from error


def _populate(memory: mmap.mmap) -> None:
    """Map all pages at once: one by one, as the first save comes to them, takes half as long again.

    They are there already. Linux before 5.14 leaves it to the first save.
    """
    with contextlib.suppress(OSError):
        memory.madvise(_MADV_POPULATE_WRITE)


class StagingImage:
    """One image of a trainer's state, laid out by its plan and reused for every save.

    ``epoch`` is what it holds while that is being persisted, else None; ``objects`` what goes
    into the manifest with it, ``left`` the digests of what is left to another rank; ``unsure``
    whether the agent was asked to take it and has not answered; ``filling`` whether the save that
    fills it is under way; ``views`` what the framework sees the memory as, kept for the next save.
    ``key`` names this very memory to the agent. One of a plan with a window is but that. Raises
    SaveFailed where there is no memory.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.key = os.urandom(8).hex()
        nbytes = plan.window or plan.padded
        with _memory(nbytes), contextlib.ExitStack() as stack:
            self.fd = make_image(nbytes)
            stack.callback(os.close, self.fd)
            self.map = mmap.mmap(self.fd, nbytes, mmap.MAP_SHARED)
            _populate(self.map)
            # once, and also of one that nobody came to hold: its number is soon another file's
            self._close = weakref.finalize(self, os.close, self.fd)
            stack.pop_all()
        if not plan.window:
            self.map[: len(plan.header)] = plan.header
        self.epoch: Epoch | None = None
        self.objects, self.left = b"", b""
        self.unsure = self.filling = False
        self.views: Any = None

    def close(self) -> None:
        """Close the descriptor, and let the memory go with the last view of it."""
        self.views = None
        if self._close.alive:
            del self.map
            self._close()
