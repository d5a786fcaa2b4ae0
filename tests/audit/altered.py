"""Files of torch.save made in a test, where the libraries of their classes are missing."""

from __future__ import annotations

import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Self

import torch


class Stand:
    """Takes the place of a class that can't be imported, and is pickled as what it was."""

    def __new__(cls, *args: Any) -> Self:
        """Take any arguments."""
        self = object.__new__(cls)
        self.__dict__["args of the call"] = args
        return self

    def __init__(self, *_: Any) -> None:
        """Do nothing with them."""

    def __reduce__(self) -> tuple[type, tuple[Any, ...], dict[str, Any]]:
        """As it was read: the class, called, and attributes."""
        state = dict(self.__dict__)
        return type(self), state.pop("args of the call"), state


@contextmanager
def stands() -> Iterator[Callable[[str, str], Any]]:
    """Gives stand-ins by module and name, which pickle finds as long as this lasts."""
    made: dict[str, ModuleType] = {}

    def stand(module: str, name: str) -> Any:
        words = module.split(".")
        for each in (".".join(words[: at + 1]) for at in range(len(words))):
            if each not in sys.modules:
                made[each] = sys.modules[each] = ModuleType(each)
        home = sys.modules[module]
        if not hasattr(home, name):
            setattr(home, name, type(name, (Stand,), {"__module__": module}))
        return getattr(home, name)

    try:
        yield stand
    finally:
        for module in made:
            del sys.modules[module]


def change(path: Path, alter: Callable[[Any], None]) -> None:
    """Load a file, with stand-ins for the classes of other libraries; alter it; save it again."""
    with stands() as stand:

        class Unpickler(pickle.Unpickler):
            """Makes what it can't find."""

            def find_class(self, module: str, name: str) -> Any:
                """The class, or a stand-in under its name."""
                try:
                    return super().find_class(module, name)
                except (ImportError, AttributeError):
                    return stand(module, name)

        loose = SimpleNamespace(Unpickler=Unpickler, load=pickle.load, __name__="loose")
        state = torch.load(path, weights_only=False, pickle_module=loose)
        alter(state)
        torch.save(state, path)


def save(path: Path, module: str, name: str, fields: dict[str, Any]) -> None:
    """Save an object of a class that is not here, with these attributes."""
    with stands() as stand:
        made = stand(module, name)()
        made.__dict__.update(fields)
        torch.save(made, path)


def copied_file(home: Path) -> None:
    """A training of one file a step: all of the file of step 30 under the name of step 40's."""
    shutil.copyfile(home / "ckpt_30.pt", home / "ckpt_40.pt")


def optimizer_of_before(home: Path) -> None:
    """Of the same training: the optimizer of step 30 in the file of step 40."""
    before = torch.load(home / "ckpt_30.pt")["optimizer"]
    change(home / "ckpt_40.pt", lambda saved: saved.update(optimizer=before))
