"""What one rank of one start is told: which function to call, and where it is to end."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import os
import pickle
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

import msgspec

__all__ = [
    "HUNG",
    "UNGUARDED",
    "Job",
    "Packed",
    "Task",
    "go_on",
    "pack",
    "stand_still",
    "stands",
    "unpack",
]

Job = Callable[[str, int], object]
"""The user's training: ``job(path, steps)``."""

STOPPED: Final = "stopped"
"""The file by which a rank says that it stands where it is to be killed."""
GO: Final = "go"
"""The file by which it is told to go on."""
HUNG: Final = "hung"
"""The file in which a rank that took too long says where it was."""
MAIN: Final = "__main__"
UNGUARDED: Final = (
    "a process that was started to try out a job imports the script that started it. What to do: "
    'call assert_exact_resume under if __name__ == "__main__":, so that an import does not call it'
)
"""What is wrong with a script that would start itself again and again."""
PAUSE_S: Final = 0.005


class Packed(msgspec.Struct, frozen=True):
    """A function as it travels to a fresh interpreter: by name, with the file that it stands in."""

    pickled: bytes
    module: str
    file: str


class Task(msgspec.Struct, frozen=True):
    """One rank's part. ``run`` and ``steps`` are what the job is called with.

    ``search`` is where its modules are looked for; ``folder`` takes its moments and its marks;
    after ``save(stop)`` it stands still; ``seed`` is that of the streams that a fresh process has
    by chance; after ``limit_s`` seconds it ends by itself, and says where it was.
    """

    job: Packed
    search: tuple[str, ...]
    run: str
    steps: int
    folder: str
    stop: int | None
    seed: int
    limit_s: float


def stand_still(folder: str) -> None:
    """Wait to be killed, or to be told to go on. Ends this process if its parent is gone."""
    parent = os.getppid()
    with open(os.path.join(folder, STOPPED), "wb"):
        pass
    while not os.path.exists(os.path.join(folder, GO)):
        if os.getppid() != parent:
            os._exit(1)
        time.sleep(PAUSE_S)


def stands(folder: str) -> bool:
    """Whether the rank of this folder has come to where it stands still."""
    return os.path.exists(os.path.join(folder, STOPPED))


def go_on(folder: str) -> None:
    """Tell the rank of this folder to go on."""
    with open(os.path.join(folder, GO), "wb"):
        pass


def pack(job: Job) -> Packed:
    """Take a function of a module's top level, or a ``functools.partial`` of one.

    Raises TypeError for what another process could not find by its name.
    """
    given: object = job
    inner: Any = job
    while isinstance(inner, functools.partial):
        inner = inner.func
    module = getattr(inner, "__module__", None) or ""
    file = getattr(sys.modules.get(module), "__file__", None)
    try:
        if not callable(given):
            raise TypeError("it is no function")
        if isinstance(inner, type):
            raise TypeError("it is a class, which trains nothing when it is called")
        if file is None:
            raise TypeError("it stands in no file")
        return Packed(pickle.dumps(job), module, os.path.abspath(file))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"job={job!r} can't be started in a process of its own: {error}. What to do: give a "
            "function of a module's top level, def job(path, steps), or a functools.partial of one"
        ) from error


def unpack(packed: Packed) -> Job:
    """Find the function again. Raises whatever its module raises when it is imported."""
    found: Job = _Finder(packed).load()
    return found


class _Finder(pickle.Unpickler):
    """Looks names up where they stood, also where no ``import`` would find their module."""

    def __init__(self, packed: Packed) -> None:
        super().__init__(io.BytesIO(packed.pickled))
        self._packed = packed
        self._module = _module(packed)

    def find_class(self, module: str, name: str) -> Any:
        """Give the thing of this name."""
        if module != self._packed.module:
            return super().find_class(module, name)
        return functools.reduce(getattr, name.split("."), self._module)


def _module(packed: Packed) -> ModuleType:
    """Import the module by its name, or else by its file: test runners have ways of their own."""
    if packed.module != MAIN:
        try:
            found = importlib.import_module(packed.module)
        except ImportError:  # one of its own is raised again below
            pass
        else:
            if os.path.abspath(found.__file__ or "") == packed.file:
                return found
    name = "__mp_main__" if packed.module == MAIN else packed.module
    spec = importlib.util.spec_from_file_location(name, packed.file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{packed.file} is no Python source", name=name, path=packed.file)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
