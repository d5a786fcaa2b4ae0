"""What a restore must know of a live thing besides its state."""

from hashlib import blake2b

import msgspec
from torch.optim import Optimizer

from handfast.torch import optimizers
from handfast.torch.rng import generator_class
from handfast.torch.tree import Kind, Node

__all__ = ["is_optimizer", "kind_name"]


def kind_name(node: Node, owners: optimizers.Owners) -> str:
    """What a restore needs to know: another class would take the state without a word."""
    about = ""
    if node.kind is Kind.SCHEDULER:
        about = _class_name(node.value)
    elif node.kind is Kind.GENERATOR:
        about = generator_class(node.value)
    elif (
        isinstance(node.value, Optimizer)
        and node.kind is Kind.OBJECT
        and hasattr(node.value, "param_groups")
    ):
        # It goes by the order of its parameters.
        names = optimizers.name_parameters(node.value, owners)
        order = [[names[id(p)] for p in group["params"]] for group in node.value.param_groups]
        digest = blake2b(msgspec.msgpack.encode(order), digest_size=4).hexdigest()
        about = f"{type(node.value).__name__}(parameters {digest})"
    return f"{node.kind.value}:{about}" if about else node.kind.value


def is_optimizer(kind: str) -> bool:
    """Whether a kind, as :func:`kind_name` gives it, is that of an optimizer."""
    return kind == Kind.OPTIMIZER.value or "(parameters " in kind


def _class_name(scheduler: object) -> str:
    """A scheduler's class, and the classes of those that it chains: ``SequentialLR(A, B)``."""
    name, inside = type(scheduler).__name__, getattr(scheduler, "_schedulers", None)
    if not isinstance(inside, list | tuple):
        return name
    return f"{name}({', '.join(map(_class_name, inside))})"
