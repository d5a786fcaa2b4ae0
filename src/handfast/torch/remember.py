"""What of a live state has come from an epoch, and what was saved with it and has not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from handfast.store.manifest import Stamp
from handfast.store.objects import child
from handfast.torch.indices import Origin, clear, mark
from handfast.torch.kinds import is_optimizer
from handfast.torch.lineage import History, index_of
from handfast.torch.names import clean, matches
from handfast.torch.saved import Saved
from handfast.torch.tree import Kind, Node

__all__ = ["alone", "remember", "unmark"]


def unmark(parts: Sequence[Node], saved: Saved, only: Sequence[str]) -> None:
    """Let what is about to be loaded be of no known epoch until all has come."""
    clear(node.value for node in _touched(parts, saved, only))


def remember(
    parts: Sequence[Node],
    saved: Saved,
    stamp: Stamp,
    only: Sequence[str],
    history: History,
    *,
    lone: bool,
) -> None:
    """Let each module and optimizer of which anything has come know where it came from.

    With ``lone``, what came without what was saved with it knows that, too.
    """
    came = Origin(stamp.run, index_of(stamp), "", history)
    for node in _touched(parts, saved, only):
        known = alone(parts, saved, only, node) if lone else None
        mark([(node.value, came.loaded(node.path, known))])


def alone(
    parts: Sequence[Node], saved: Saved, only: Sequence[str], node: Node
) -> frozenset[int] | None:
    """Say whether a part comes without what was saved with it: weights without an optimizer that
    had a state, an optimizer without modules. Gives the ids of the parameters that come; else None.
    """
    live = {each.path for each in parts}
    others = is_optimizer if isinstance(node.value, nn.Module) else Kind.MODULE.value.__eq__
    left = [path for path, kind in saved.kinds.items() if others(kind)]
    missing = any(
        not (path in live and matches(path, only)) and len(list(_within(saved, path))) > 1
        for path in left
    )
    return _known(node, saved) if missing else None


def _touched(parts: Sequence[Node], saved: Saved, only: Sequence[str]) -> list[Node]:
    if "**" in only:
        return list(parts)
    return [n for n in parts if any(matches(p, only) for p in _within(saved, n.path))]


def _within(saved: Saved, component: str) -> Iterator[str]:
    """The paths of a component and of all its tensors."""
    yield component
    yield from (path for path in saved.paths() if path.startswith(f"{component}/"))


def _known(node: Node, saved: Saved) -> frozenset[int]:
    """The ids of a module's parameters that the epoch has: neither adapters nor a new head."""
    if not isinstance(node.value, nn.Module):
        return frozenset()
    named = node.value.named_parameters(remove_duplicate=False)
    paths = set(saved.paths())
    return frozenset(
        id(p) for name, p in named if child(node.path, clean(node.value, name)) in paths
    )
