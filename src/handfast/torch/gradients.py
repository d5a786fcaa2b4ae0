"""Whether a save would fall into the middle of gradient accumulation.

An epoch holds no gradients unless asked to, so it is taken right only where none are pending: after
an optimizer's step, or where the gradients are zero or None. Each step leaves a mark on the
gradients that it has consumed, which says their version; a gradient without the mark, or with a
later version, has changed since, and is clean only if it is zero.

What is seen: accumulation by autograd, into new and into old gradients; all in-place operations
that count versions, clipping and ``zero_grad`` among them; a step that ``GradScaler.step`` skipped;
FSDP2's unsharded gradients under ``set_requires_gradient_sync(False)``, and those that are reduced
in part under ``set_requires_all_reduce(False)``; a scaler between ``unscale_``, ``step`` and
``update``.

What is not: a skipped step of a scaler that came into the state since the last save (that save is
refused); gradients of parameters that no optimizer in the state has (:func:`unowned` names them);
what a step has consumed and the next backward pass adds to, unzeroed; changes behind autograd's
back (``grad.data``, collectives and kernels that do not count versions, the replay of a captured
CUDA graph) to a gradient that carries a mark; optimizers deep inside of the user's own objects; and
gradients that lie in buffers of another library. A gradient that one optimizer's backward left to
another's parameters (a GAN's two losses) is pending: ``zero_grad()`` before the save.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from types import MemberDescriptorType, SimpleNamespace
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from handfast.store.objects import child
from handfast.torch.alike import parts_of
from handfast.torch.capture import Walk, parameters_of
from handfast.torch.marks import MARK, Mark, gradients, mark_consumed, version_of
from handfast.torch.names import clean, loaded, matches
from handfast.torch.optimizers import parameters
from handfast.torch.saved import GRADS, Source
from handfast.torch.tensors import local, place_of
from handfast.torch.tree import Kind, Node, nodes

__all__ = [
    "Watch",
    "drop_gradients",
    "optimizers_of",
    "restore_gradients",
    "unclean_gradients",
    "unowned",
]

DEEP: Final = 4
MANY: Final = 64
"""So deep, and in collections of so many, optimizers are looked for in the user's objects."""


class Watch:
    """Marks what steps consume, until it has ended.

    Of every optimizer of the process: one that comes into the state later may have stepped before
    anybody could look. The scalers of the state are watched by a ``step`` of their own, because a
    skipped step calls nothing else; those that have come since from the next :meth:`look` on.
    """

    def __init__(self, state: Mapping[str, object]) -> None:
        self._steps: list[_Step] = []
        self._hook = register_optimizer_step_post_hook(mark_consumed)
        self.look(nodes(state))

    def look(self, found: Iterable[Node]) -> None:
        """Watch the scalers that the state has now, and no other."""
        live = [node.value for node in found if isinstance(node.value, torch.amp.GradScaler)]
        for gone in [step for step in self._steps if step.scaler not in live]:
            self._steps.remove(gone)
            gone.end()
        known = [step.scaler for step in self._steps]
        self._steps += [_Step(scaler) for scaler in live if scaler not in known]

    def end(self) -> None:
        """Leave nothing behind."""
        self._hook.remove()
        while self._steps:
            self._steps.pop().end()


class _Step:
    """A scaler's ``step`` that marks what was consumed, until it has ended."""

    def __init__(self, scaler: Any) -> None:
        self.scaler = scaler
        self._before = vars(scaler).get("step")  # of another watch, or of the user
        self._step = scaler.step
        self._ended = False
        scaler.step = self

    def __call__(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        result = self._step(optimizer, *args, **kwargs)
        if not self._ended:
            mark_consumed(optimizer, args, kwargs)
        return result

    def end(self) -> None:
        """Take it away, or leave it without effect below one that is still in use."""
        self._ended = True
        own = vars(self.scaler)
        while isinstance(top := own.get("step"), _Step) and top._ended:
            if top._before is None:
                del own["step"]
            else:
                own["step"] = top._before


@torch.no_grad()
def unclean_gradients(found: Sequence[Node], *, stored: bool = False) -> tuple[str, ...]:
    """The parameters whose gradients changed since their optimizer's last step; empty if clean.

    ``found`` are the things of a state, of which boxes of mere tensors may be left out.
    With ``stored`` gradients are saved, and only those count that can't be: of parameters that no
    module has, what FSDP2 has not reduced yet, and what a scaler knows of them. Names are those of
    the first module in the state that has the parameter. Costs a look at each parameter, and a pass
    over the values of those gradients that changed. Without a :class:`Watch` before, each gradient
    that is not zero counts as changed.
    """
    modules = [(node.path, node.value) for node in found if isinstance(node.value, nn.Module)]
    held = {id(p) for _, module in modules for p in module.parameters()} if stored else set()
    changed = [pair for pair in _changed(found) if id(pair[0]) not in held]
    pending = {}
    for (parameter, gradient), nonzero in zip(changed, _nonzero(changed), strict=True):
        if nonzero:
            pending[id(parameter)] = tuple(parameter.shape)
        else:
            # So that its values are read once. It was zeroed, and so it lasts.
            setattr(gradient, MARK, Mark(version_of(gradient), True))
    unreduced = [held.name for path, module in modules for held in _unreduced(path, module)]
    return (*_named(pending, modules), *unreduced, *_between(found))


def _between(found: Iterable[Node]) -> Iterator[str]:
    """Scalers that are in the middle of a step: they know more than their state says."""
    for node in found:
        if isinstance(node.value, torch.amp.GradScaler):
            states = _stages(node.value).values()
            for stage in sorted({state["stage"].name for state in states} - {"READY"}):
                due = "update()" if stage == "STEPPED" else "step()"
                yield f"{node.path} (its {due} is still to come)"


def _stages(scaler: Any) -> dict[int, dict[str, Any]]:
    """What a scaler knows of each optimizer, by id, until its next update: no public way to it."""
    return getattr(scaler, "_per_optimizer_states", {})


@torch.no_grad()
def unowned(found: Sequence[Node]) -> tuple[str, ...]:
    """The parameters of modules that have a gradient, and that no optimizer of the state has."""
    modules = [(node.path, node.value) for node in found if isinstance(node.value, nn.Module)]
    parts = chain.from_iterable(parts_of(module) for _, module in modules)
    held = {id(p): p for part in parts for p in part._parameters.values() if p is not None}
    graded = [(p, p.grad) for p in held.values() if p.grad is not None]
    owned = _owned(optimizers_of(found)) if graded else set()
    left: list[tuple[Tensor, Any]] = [pair for pair in graded if id(pair[0]) not in owned]
    nonzero = zip(left, _nonzero(left), strict=True)
    pending = {id(p): tuple(p.shape) for (p, _), some in nonzero if some}
    return tuple(_named(pending, modules))


def _owned(opts: Iterable[Optimizer]) -> set[int]:
    return {id(p) for optimizer in opts for p in parameters(optimizer)}


def _changed(found: Iterable[Node]) -> list[tuple[Tensor, Any]]:
    """Parameters of optimizers, with a gradient that changed since the last step."""
    return [
        (parameter, gradient)
        for optimizer in optimizers_of(found)
        for parameter, gradient in gradients(optimizer)
        if (mark := getattr(gradient, MARK, None)) is None or mark.version != version_of(gradient)
    ]


def optimizers_of(found: Iterable[Node]) -> Iterator[Optimizer]:
    """The optimizers of a state, with those that the user's own objects hold: once each.

    Nothing of the user's is called on the way, neither properties nor what proxies stand for, but
    for the groups of what is an optimizer itself: one that is not made yet has none.
    """
    layer: list[object] = [
        node.value
        for node in found
        if isinstance(node.value, Optimizer) or node.kind is Kind.OBJECT
    ]
    seen: set[int] = set()
    for _ in range(DEEP + 1):  # the nearest first: what is near and far is near
        below: list[object] = []
        for value in layer:
            if id(value) in seen:
                continue
            seen.add(id(value))
            if not issubclass(type(value), Optimizer):
                below += _inside(value)
            elif hasattr(value, "param_groups"):  # a wrapper's may be a property
                yield cast(Optimizer, value)
        layer = below


def _inside(value: Any) -> Iterable[object]:
    """What a collection or an object holds, if it may hold optimizers, and is no large one."""
    if type(value) in (list, tuple, set, deque):
        return list(value) if len(value) <= MANY else ()
    if type(value) in (dict, OrderedDict):
        return list(value.values()) if len(value) <= MANY else ()
    kind = type(value)
    if not hasattr(kind, "state_dict") and kind is not SimpleNamespace:
        return ()
    if issubclass(kind, nn.Module | type):
        return ()
    slots = [
        member
        for base in kind.__mro__
        for name, member in vars(base).items()
        if type(member) is MemberDescriptorType and name != "__dict__"
    ]
    held = [item for slot in slots if (item := _slot(slot, value)) is not None]
    with suppress(AttributeError):  # it has slots alone
        held += object.__getattribute__(value, "__dict__").values()
    return held


def _slot(slot: MemberDescriptorType, value: object) -> object:
    try:
        return slot.__get__(value)
    except AttributeError:  # nothing is in it yet
        return None


def drop_gradients(
    live: Walk, restored: Sequence[Node], source: Source, only: Sequence[str] = ("**",)
) -> None:
    """Drop what is of another moment, once optimizers are ``restored``, plain ones by ``write``.

    That are the gradients of those in objects, and of parameters that no optimizer has; what FSDP2
    has not reduced yet; and at which point of a step scalers are. An optimizer of the state that is
    not restored itself keeps all, whoever else holds it.
    """
    plain = {id(node.value): node for node in live.nodes if node.kind is Kind.OPTIMIZER}
    kept = plain.keys() - {id(node.value) for node in restored}
    opts = [optimizer for optimizer in optimizers_of(restored) if id(optimizer) not in kept]
    for optimizer in opts:
        if id(optimizer) not in plain:
            _drop_own(optimizer)
    owned = _owned(optimizers_of(live.nodes))
    nobodys = [
        parameter
        for path, parameter in parameters_of(live)
        if id(parameter) not in owned and matches(path, only) and source.saved.spec(path)
    ]
    for parameter in nobodys:
        parameter.grad = None
    _drop_hidden(live, restored, opts, _owned(opts).union(map(id, nobodys)))


def _drop_own(optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    # Accelerate's does nothing in the middle of an accumulation.
    held = list(gradients(optimizer))
    for (parameter, _), nonzero in zip(held, _nonzero(held), strict=True):
        if nonzero:
            parameter.grad = None


def _drop_hidden(
    live: Walk, restored: Sequence[Node], opts: Sequence[Optimizer], dropped: set[int]
) -> None:
    """Drop what modules hold of these parameters' gradients, and scalers of the optimizers'."""
    whole = {id(node.value) for node in restored}
    for node in live.nodes:
        if isinstance(node.value, nn.Module):
            for part in _unreduced(node.path, node.value):
                if not dropped.isdisjoint(map(id, part.parameters)):
                    part.drop()
        elif isinstance(node.value, torch.amp.GradScaler):
            stages = _stages(node.value)
            for key in list(stages) if id(node.value) in whole else map(id, opts):
                stages.pop(key, None)


def restore_gradients(live: Walk, source: Source, only: Sequence[str] = ("**",)) -> None:
    """Put saved gradients in place, once the restored optimizers have dropped those that they had.

    Only epochs that were saved in the middle of an accumulation hold any.
    """
    saved: Any = source.saved.objects.get(GRADS, {})
    for path, parameter in parameters_of(live) if saved else ():
        if path in saved and matches(path, only):
            parameter.grad = source.tensor(saved[path].path, place_of(parameter))


def _nonzero(changed: list[tuple[Tensor, Any]]) -> list[bool]:
    """Whether each gradient has a value that is not zero; one wait for the device in all."""
    flags = []
    for _, gradient in changed:
        part = local(gradient)
        flags.append((part._values() if part.is_sparse else part).any())
    if len({flag.device for flag in flags}) > 1:
        flags = [flag.cpu() for flag in flags]
    return torch.stack(flags).tolist() if flags else []


def _named(
    pending: dict[int, tuple[int, ...]], modules: list[tuple[str, nn.Module]]
) -> Iterator[str]:
    left = dict(pending)
    for path, module in modules if pending else ():
        for name, parameter in module.named_parameters():
            if left.pop(id(parameter), None) is not None:
                yield f"{path}/{clean(module, name)}"
    yield from (f"a parameter of shape {shape} in no module" for shape in left.values())


class _Unreduced(NamedTuple):
    """A gradient that FSDP2 holds back, of which parameters, and where."""

    name: str
    parameters: Sequence[Tensor]
    holder: Any
    attribute: str

    def drop(self) -> None:
        """Forget it."""
        setattr(self.holder, self.attribute, None)


def _unreduced(path: str, root: nn.Module) -> Iterator[_Unreduced]:
    """FSDP2 keeps gradients that it has not reduced yet out of ``grad``, in places of its own.

    There is no public way to them.
    """
    fsdp = loaded("torch.distributed.fsdp", "FSDPModule")
    kinds = set(map(type, parts_of(root)))
    found = root.named_modules() if any(issubclass(kind, fsdp) for kind in kinds) else ()
    for name, module in found:
        for group in _groups(module) if isinstance(module, fsdp) else ():
            for held in group.fsdp_params:
                where = f"{name}.{held._module_info.param_name}".lstrip(".")
                label = f"{path}/{clean(root, where)} (not reduced yet)"
                own = getattr(held, "_unsharded_param", None)
                if held.unsharded_accumulated_grad is not None:
                    yield _Unreduced(label, [held.sharded_param], held, _ACCUMULATED)
                if getattr(own, "grad", None) is not None:
                    yield _Unreduced(label, [held.sharded_param], own, "grad")
            if getattr(group, _PARTIAL, None) is not None:
                label = f"{child(path, name) if name else path} (not reduced by all yet)"
                every = [held.sharded_param for held in group.fsdp_params]
                yield _Unreduced(label, every, group, _PARTIAL)


_ACCUMULATED: Final = "unsharded_accumulated_grad"
_PARTIAL: Final = "_partial_reduce_output"
"""Of all parameters of a group, under ``set_requires_all_reduce(False)``."""


def _groups(module: Any) -> Sequence[Any]:
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)  # older torch has one at most
    groups = several if several is not None else [state._fsdp_param_group]
    return [group for group in groups if group is not None]
