"""TensorFlow's object graph: which variable of a checkpoint is a parameter, a moment, a count.

Every ``tf.train.Checkpoint`` has one (TensorFlow 2.21, core/protobuf/trackable_object_graph.proto),
under the key ``_CHECKPOINTABLE_OBJECT_GRAPH``. Keras 3's optimizers keep their variables in lists
beside the list of those that they train (keras 3.12, ``src/optimizers/``, adam.py, sgd.py,
rmsprop.py, lion.py); older ones have slots (keras 2, ``optimizer_v2/``; TF 1's).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from handfast.audit.formats.optax import Leaf
from handfast.audit.formats.protobuf import Message
from handfast.audit.found import Clock, Role

__all__ = ["GRAPH", "Graph", "read_graph"]

GRAPH: Final = "_CHECKPOINTABLE_OBJECT_GRAPH"
TRAINED: Final = "_trainable_variables"
LISTS: Final = ("_momentums", "_velocities", "momentums")
SLOTS: Final = ("m", "v", "momentum", "rms")
PAIRS: Final = (("_momentums", "_velocities"), ("m", "v"))
"""What are Adam's moments where both are there."""

ALONE: Final[Mapping[str, Role]] = {
    "_velocities": Role.SECOND,  # RMSprop
    "rms": Role.SECOND,
    "_momentums": Role.MOMENTUM,  # Lion
    "momentums": Role.MOMENTUM,  # SGD
    "momentum": Role.MOMENTUM,
    "m": Role.MOMENTUM,
    "v": Role.SECOND,
}
MOVING: Final = ("moving_mean", "moving_variance")
ITERATIONS: Final = ("_iterations", "iterations", "iter")
STEPS: Final = ("step", "global_step", "epoch")
SAVES: Final = "save_counter"


class Graph(NamedTuple):
    """What variables are, and which of them count, by their keys in the checkpoint.

    ``of`` of a leaf is the key of its parameter.
    """

    leaves: Mapping[str, Leaf]
    counts: Mapping[str, Clock]


class _Node(NamedTuple):
    """An object: what it holds, by name; the key of its value, if it is a variable; its slots."""

    children: Sequence[tuple[str, int]]
    key: str
    slots: Sequence[tuple[int, str, int]]


def read_graph(data: bytes, name: str) -> Graph:
    """Read a graph. Raises Damaged for bytes that are none."""
    nodes = [
        _Node(
            [(child.text(2), child.number(1)) for child in node.messages(1)],
            next((part.text(3) for part in node.messages(2)), ""),
            [(slot.number(1), slot.text(2), slot.number(3)) for slot in node.messages(3)],
        )
        for node in Message(data, name).messages(1)
    ]
    leaves: dict[str, Leaf] = {}
    for node in nodes:
        leaves |= dict(_optimizer(nodes, node))
    trained = bool(leaves)
    counts: dict[str, Clock] = {}
    for at, node in enumerate(nodes):
        for label, child in node.children:
            key = _key(nodes, child)
            if not key:
                continue
            if label in MOVING:
                leaves[key] = Leaf(Role.BUFFER, "")
            elif label in ITERATIONS:
                counts[key] = Clock.OPTIMIZER
            elif at == 0 and (label in STEPS or label == SAVES):
                counts[key] = Clock.TRACKER if label == SAVES else Clock.TRAINER
            elif not trained and not label.startswith("_"):
                leaves.setdefault(key, Leaf(Role.PARAMETER, key))
    return Graph(leaves, counts)


def _key(nodes: Sequence[_Node], at: int) -> str:
    return nodes[at].key if at < len(nodes) else ""


def _optimizer(nodes: Sequence[_Node], node: _Node) -> Iterator[tuple[str, Leaf]]:
    """The variables of an optimizer, and those that it trains."""
    held = {
        label: [_key(nodes, part) for _, part in nodes[child].children]
        for label, child in node.children
        if label in (TRAINED, *LISTS) and child < len(nodes)
    }
    trained = held.pop(TRAINED, [])
    there = {label for label, keys in held.items() if keys}
    for key in trained:
        yield key, Leaf(Role.PARAMETER, key)
    for label, keys in held.items():
        role = _role(label, there)
        for key, of in zip(keys, trained, strict=False):
            yield key, Leaf(role, of)
    slots = {slot for _, slot, _ in node.slots}
    for original, slot, child in node.slots:
        of = _key(nodes, original)
        yield of, Leaf(Role.PARAMETER, of)
        if slot in SLOTS:
            yield _key(nodes, child), Leaf(_role(slot, slots), of)


def _role(label: str, there: set[str]) -> Role:
    for first, second in PAIRS:
        if {first, second} <= there and label in (first, second):
            return Role.FIRST if label == first else Role.SECOND
    return ALONE[label]
