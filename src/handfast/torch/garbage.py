"""When garbage is collected: not in the middle of what makes many objects, and none of it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]


@contextmanager
def uncollected() -> Iterator[None]:
    """Let no garbage be collected, and leave the collector as it was found.

    A look at a large state makes many short-lived lists, so that the collector would go through all
    objects of the process in the middle of it, which takes longer than all the rest. None of them
    is a cycle.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
