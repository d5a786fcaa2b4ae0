"""What a training loop can reach besides the state that is saved: there, what was forgotten lives.

Looked at are the variables of the functions that are under way, those of their modules, and what
hangs on these: attributes of the user's objects, boxes, closures, generators that are under way.
"""

from __future__ import annotations

import sys
import types
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from types import FrameType
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import Optimizer

from handfast.torch.rng import is_generator
from handfast.torch.tensors import local
from handfast.torch.tree import Kind, Node, entries, kind_of

__all__ = ["SCALARS", "Around", "Held"]

DEEP: Final = 4
MANY: Final = 64
"""So deep, and in boxes of so many, is looked."""
MOST: Final = 4096
"""So many values are looked at, at most."""
SCALARS: Final = (type(None), bool, int, float, complex, str, bytes)
FOREIGN: Final = frozenset({"torch", "torchdata", "numpy", "handfast", "pytest", "_pytest"})
HOLDERS: Final = ("types.SimpleNamespace", "argparse.Namespace")


class Held:
    """What a state holds: its things with their parts, its boxes, the memory of its tensors.

    ``found`` are its live things, ``tensors`` what was captured of them; ``stepped`` are the
    optimizers that were stepped so far, in their order.
    """

    def __init__(
        self,
        state: Mapping[str, object],
        found: Sequence[Node],
        tensors: Iterable[Tensor],
        stepped: Collection[Optimizer] = (),
    ) -> None:
        self.ids = {id(state), *(id(node.value) for node in found)}
        self.ids |= {box for value in state.values() for box in _boxes(value)}
        self._memory = {_memory(tensor) for tensor in tensors}
        self._known: set[int] = set()
        self._optimizers = stepped
        self._stepped = {_memory(p) for optimizer in stepped for p in _trained(optimizer)}
        self._modules = [(n.path, n.value) for n in found if n.kind is Kind.MODULE]
        self._shapes: dict[str, set[tuple[int, ...]]] = defaultdict(set)
        for _, module in self._modules:
            self.ids |= {id(part) for part in module.modules()}
            for name, parameter in module.named_parameters():
                self._shapes[name].add(tuple(parameter.shape))

    def has(self, value: object) -> bool:
        """Whether a live thing is made of what is in the state, and of nothing else."""
        if isinstance(value, Tensor):
            return _memory(value) in self._memory
        if isinstance(value, nn.Module):  # a wrapper, or what has no tensors at all
            parts = [*value.parameters(), *value.buffers()]
            return all(_memory(tensor) in self._memory for tensor in parts)
        return False

    def reached(self, tensors: Iterable[Tensor]) -> None:
        """Take note of what was found beside it, and needs no other name."""
        self._known |= set(map(_memory, tensors))

    def is_stepped(self, tensor: Tensor) -> bool:
        """Whether one of the optimizers trains what lies there, whatever it looks like."""
        return _memory(tensor) in self._stepped

    def looks_trained(self, name: str, value: object) -> bool:
        """Whether a tensor in a box has the name and the shape there that a parameter of the state
        has: an average that is made by hand, say.
        """
        key = name.rpartition("['")[2].removesuffix("']")
        return isinstance(value, Tensor) and tuple(value.shape) in self._shapes.get(key, ())

    def unreached(self) -> Iterator[tuple[str, str, Tensor]]:
        """What the optimizers train, and neither it has nor anything beside it.

        By the optimizer's name, and the place there.
        """
        known = self._memory | self._known
        named: Counter[str] = Counter()
        for optimizer in self._optimizers:
            name = type(optimizer).__name__
            named[name] += 1
            again = f" {named[name]}" if named[name] > 1 else ""
            for number, parameter in enumerate(_trained(optimizer)):
                if _memory(parameter) not in known:
                    yield f"{name}{again}", f"/params[{number}]", local(parameter)

    def unkept(self) -> Iterator[tuple[str, Tensor]]:
        """The buffers of its modules that no ``state_dict()`` shows, by path."""
        for path, module in self._modules:
            for name, buffer in module.named_buffers():
                if _memory(buffer) not in self._memory:
                    yield f"{path}/{name}", local(buffer)


def _boxes(box: object) -> Iterator[int]:
    inside = list(entries(box))
    if inside:
        yield id(box)
    for _, item in inside:
        yield from _boxes(item)


def _trained(optimizer: Optimizer) -> Iterator[Tensor]:
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


def _memory(tensor: Any) -> int:
    """Where a tensor's storage lies; what has none, or an empty one, is nobody else's."""
    with suppress(RuntimeError, NotImplementedError):  # what torch raises where there is none
        return local(tensor).untyped_storage().data_ptr() or id(tensor)
    return id(tensor)


class Around:
    """Walks what is around a state. It calls nothing of the user's, no property either."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self._seen = set(held.ids)
        self._left = MOST

    def reach(self, frame: FrameType | None) -> Iterator[tuple[str, object]]:
        """Plain values and live things that are not in the state, by the names that code has.

        ``frame`` is the innermost one; the nearest names come first.
        """
        frames = []
        while frame is not None:
            if not _foreign(str(frame.f_globals.get("__name__", ""))):
                frames.append(frame)
            frame = frame.f_back
        for each in frames:
            yield from self._variables(each.f_locals)
        for each in frames:
            yield from self._variables(each.f_globals)

    def _variables(self, names: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
        for name, value in list(names.items()):
            if not name.startswith("__"):
                yield from self._visit(name, value, 0)

    def _visit(self, name: str, value: Any, depth: int) -> Iterator[tuple[str, object]]:
        self._left -= 1
        if self._left < 0:
            return
        if type(value) in SCALARS:
            yield name, value
            return
        if id(value) in self._seen or depth > DEEP:
            return
        self._seen.add(id(value))
        if _is_thing(value):
            if not self._held.has(value):
                yield name, value
            return
        for key, item in _inside(value):
            yield from self._visit(name + key, item, depth + 1)


def _is_thing(value: object) -> bool:
    kind = type(value)
    if isinstance(value, Tensor) or is_generator(value) or kind.__module__ == "numpy":
        return True
    return hasattr(kind, "state_dict") and kind_of(value) is not None


def _inside(value: Any) -> Iterable[tuple[str, object]]:
    """What a value holds, by what code writes behind its name."""
    inside = list(entries(value))
    if inside:
        return [(f"[{key!r}]", item) for key, item in inside] if len(inside) <= MANY else ()
    if isinstance(value, types.MethodType):
        return [("", value.__self__)]
    if isinstance(value, types.FunctionType):
        return () if _foreign(value.__module__ or "") else _closure(value)
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        return [] if frame is None else [(f".{k}", item) for k, item in frame.f_locals.items()]
    kind = type(value)
    known = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, type) or (_foreign(kind.__module__) and known not in HOLDERS):
        return ()
    own: dict[str, object] = {}
    with suppress(AttributeError):  # it has slots alone
        own |= object.__getattribute__(value, "__dict__")
    return [(f".{key}", item) for key, item in chain(own.items(), _slots(value))]


def _slots(value: object) -> Iterator[tuple[str, object]]:
    for kind in type(value).__mro__:
        for name, slot in vars(kind).items():
            if isinstance(slot, types.MemberDescriptorType):
                with suppress(AttributeError):  # nothing is in it yet
                    yield name, slot.__get__(value)


def _closure(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # nothing is in it yet
            yield f".{name}", cell.cell_contents


def _foreign(module: str) -> bool:
    """Whether a module is a library's, and none of the training's own."""
    root = module.partition(".")[0]
    return root in FOREIGN or root in sys.stdlib_module_names
