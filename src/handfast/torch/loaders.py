"""torchdata's loaders: *when* an iterator is made decides in which order it gives the data.

Making one starts the workers, draws seeds, and asks the sampler for its order; the training tells
the sampler its epoch (``set_epoch``, a seed) just before ``iter(loader)``. But ``state_dict()``
makes an iterator where there is none, and the next ``iter()`` gets that one. So a loader that
nobody has begun is never asked: it has no position, only generators to draw from; and what reads
a restored state back is thrown away, so that the training makes its own.

Other loaders are asked for their ``state_dict()``, as any object is.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch

from handfast.torch.names import loaded
from handfast.torch.rng import read_generator, unmoved_streams, write_generator
from handfast.torch.tree import Kind, nodes

__all__ = [
    "iterated", "load", "may_begin", "not_begun", "of_dataset", "of_sampler", "read",
    "warn_of_orders",
]  # fmt: skip

_LOG = logging.getLogger("handfast")

UNBEGUN: Final = ""
"""The only entry of the state of a loader that was not begun: its generators, by owner."""


def read(loader: Any) -> object:
    """Give a loader's position; nothing is made, started or drawn where it has none yet."""
    if not _known(loader) or loader._iterator is not None:
        return loader.state_dict()
    if loader.next_iter_state is not None:  # loaded, and not begun since
        return loader.next_iter_state
    return {UNBEGUN: _drawn(loader)}


def load(loader: Any, tree: Any) -> None:
    """Put a loader where :func:`read` found one. It may keep the tree."""
    if not not_begun(tree):
        loader.load_state_dict(tree)
    elif _known(loader):
        vars(loader).pop("_get_iterator", None)  # of an earlier restore
        loader.load_state_dict({})
        loader.next_iter_state = None  # which an empty state leaves as it is
        saved = tree[UNBEGUN]
        for name, held in _generators(loader):
            if name in saved:
                write_generator(held, saved[name])


def not_begun(tree: object) -> bool:
    """Say whether the state is that of a loader which nobody had iterated."""
    return isinstance(tree, dict) and tree.keys() == {UNBEGUN}


def of_dataset(path: str) -> bool:
    """Say whether a path in torchdata's state lies in the part that the dataset itself gives.

    Some take theirs up only when they are iterated, Hugging Face's IterableDataset among them.
    """
    return not {"dataset_state", "dataset_iter_state"}.isdisjoint(path.split("/"))


def of_sampler(loader: Any, path: str) -> bool:
    """Say whether a path in torchdata's state is the count of its own distributed sampler.

    That takes up what it was given when its first item is asked for, and shows 0 until then.
    """
    kind = loaded("torchdata.stateful_dataloader.sampler", "StatefulDistributedSampler")
    own = _known(loader) and type(_sampler(loader)) is kind
    return own and path.endswith("/sampler_state/yielded")


def iterated(loader: Any) -> bool:
    """Say whether somebody was given an iterator: ``state_dict()`` makes one of its own."""
    given = getattr(loader, "_iterator", None) is not None
    return given and not getattr(loader, "_initial_iter_for_state_dict", False)


def may_begin(loader: Any, tree: object, path: str) -> None:
    """Let the iterator that reading back has made be made anew when it is asked for.

    ``tree`` is what was loaded, and the loader may keep it. The run that is continued made its
    iterator before the save, so what torchdata draws for this one must move no stream.
    """
    if not _known(loader) or not loader._initial_iter_for_state_dict:
        return
    vars(loader).pop("_get_iterator", None)  # of an earlier restore
    make = loader._get_iterator
    loader.load_state_dict(tree)
    order = getattr(_sampler(loader), "generator", None)
    left = order and read_generator(order)

    def once() -> object:
        del loader._get_iterator
        unseeded = order is not None and read_generator(order) == left
        now = _drawn(loader)
        with unmoved_streams():
            made = make()
        for name, held in _generators(loader):
            write_generator(held, now[name])
        if unseeded and not _stated(loader, made):
            _LOG.warning(
                "%s: its %s has no state, and nobody has seeded its generator since "
                "restore(): but in the first pass over the data the order is another one now, and "
                "data are repeated and skipped. What to do: seed it before every iter(loader), "
                "generator.manual_seed(seed + epoch)",
                path,
                type(_sampler(loader)).__name__,
            )
        return made

    loader._get_iterator = once


def warn_of_orders(state: Mapping[str, object]) -> None:
    """Say which samplers give an order that no resume can find again.

    They have no state, and draw from the stream of the process, which has moved on since.
    """
    for node in nodes(state):
        if node.kind is not Kind.LOADER or not _known(node.value) or _stated(node.value):
            continue
        sampler = _sampler(node.value)
        if getattr(sampler, "generator", sampler) is None:
            _LOG.warning(
                "%s: its %s has no state, and draws its order from the stream of the "
                "process: after a resume in the middle of the data they come in another order, so "
                "that some are repeated and some skipped. What to do: give it a generator= of its "
                "own, and seed it before every iter(loader), generator.manual_seed(seed + epoch)",
                node.path,
                type(sampler).__name__,
            )


def _known(loader: object) -> bool:
    """Whether it is torchdata's, and nobody has changed what its state is."""
    base = loaded("torchdata.stateful_dataloader.stateful_dataloader", "StatefulDataLoader")
    return isinstance(loader, base) and all(
        getattr(type(loader), name) is getattr(base, name)
        for name in ("state_dict", "load_state_dict", "__iter__")
    )


def _sampler(loader: Any) -> Any:
    batches = loader.batch_sampler
    return loader.sampler if batches is None else getattr(batches, "sampler", batches)


def _stated(loader: Any, iterator: object = None) -> bool:
    """Whether the order has a state; else torchdata counts what it gave, and asks for it anew."""
    order = getattr(iterator, "_sampler_iter", None)
    holders = (_sampler(loader), loader.batch_sampler, getattr(order, "sampler_iter", order))
    return any(hasattr(holder, "state_dict") for holder in holders)


def _generators(loader: Any) -> Iterator[tuple[str, torch.Generator]]:
    """The generators that making an iterator may draw from, each once."""
    owners = {"loader": loader, "sampler": _sampler(loader), "batches": loader.batch_sampler}
    seen: set[int] = set()
    for name, owner in owners.items():
        held = getattr(owner, "generator", None)
        if isinstance(held, torch.Generator) and id(held) not in seen:
            seen.add(id(held))
            yield name, held


def _drawn(loader: Any) -> dict[str, object]:
    """How far each of them is."""
    return {name: read_generator(held) for name, held in _generators(loader)}
