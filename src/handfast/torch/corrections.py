"""Corrections: what may be done with a state whose parts are of several epochs, besides going back.

Each is a **heuristic**. None makes of a mixture a state of the training's trajectory, so each
begins a lineage of its own, and how one trains on is measured, not promised (docs/optimizer.md).
Going back to an epoch that is whole is no heuristic, and the default.

    state = {"model": model, "optimizer": optimizer, "applied": Applied(optimizer)}
    with Checkpointer(path, state) as checkpointer:
        if not checkpointer.restore():
            Reset(warmup=100).apply(optimizer)

What is left to do after that, step by step, is state: :class:`Applied` says how it is saved.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Final
from weakref import WeakKeyDictionary, WeakSet, ref

import msgspec
import torch
from torch.optim import SGD, Adafactor, Adam, AdamW, NAdam, Optimizer, RAdam

from handfast.torch.indices import anew

__all__ = ["Applied", "Correction", "Damp", "Rescale", "Reset", "check", "standing", "warn_unsaved"]

logger = logging.getLogger("handfast")

_COUNTING: Final = (Adam, AdamW, NAdam, RAdam, Adafactor)
"""Whose update depends on how many steps the moments have seen."""

_KNOWN: Final = tuple(
    kind for kind in (*_COUNTING, SGD, getattr(torch.optim, "Muon", None)) if kind is not None
)
"""Who makes moments anew where it has none, and steps by ``lr``. Muon came with torch 2.9."""


class Reset(msgspec.Struct, frozen=True, tag="reset"):
    """A heuristic: forget all moments and counters, and warm the learning rate up again.

    The optimizer then has no state, as a new one. Of the next ``warmup`` steps the k-th is taken at
    k / warmup of whatever rate the training sets. For moments that are lost, or of an unknown
    epoch. Raises ValueError for a warmup that is no whole number from 0 up.
    """

    warmup: int

    name: ClassVar[str] = "reset"

    def __post_init__(self) -> None:
        _check_count("warmup", self.warmup, 0, "how many steps it takes")

    @property
    def steps(self) -> int:
        """How many steps are taken at another rate."""
        return self.warmup

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied with in step number ``step``, from 1."""
        return step / self.warmup

    def describe(self) -> str:
        """Say what is done, for a journal or a log."""
        return f"heuristic: moments begun anew, learning rate warmed up over {self.warmup} steps"

    def apply(self, optimizer: Optimizer) -> Applied:
        """Do so, to the optimizer that came with the weights or to one that is made anew. Weights
        that are as they were loaded begin a lineage, ``reset-GENERATION/STEP``, with all that came
        with them, unless they have begun one already.

        Raises TypeError for an optimizer that is not known, and Refused, MIXED, for weights of
        several epochs; then nothing is changed.
        """
        check(self, optimizer)
        anew(optimizer, self.describe())
        applied = _begun(optimizer, self)
        optimizer.state.clear()
        return applied


class Rescale(msgspec.Struct, frozen=True, tag="rescale"):
    """A heuristic: keep the moments, and correct their bias as after ``count`` steps.

    For moments that have seen ``count`` steps beside a counter t' of another epoch. Each update is
    then off by (1-b1^count)/(1-b1^t') * sqrt((1-b2^t')/(1-b2^count)), which
    ``handfast.model.optimizer.step_reset`` gives. Every counter is set to ``count`` (and NAdam's
    product to what it is there), which takes that factor away, with eps and the decay as they
    should be. Exact for the counter; whether moments and parameters belong together it can't know.
    Raises ValueError for a count that is no whole number from 0 up.
    """

    count: int

    name: ClassVar[str] = "rescale"
    steps: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _check_count("count", self.count, 0, "how many steps the moments have seen")

    def describe(self) -> str:
        """Say what is done, for a journal or a log."""
        return f"heuristic: moments kept, their bias corrected as after {self.count} steps"

    def apply(self, optimizer: Optimizer) -> Applied:
        """Do so. Raises TypeError for an optimizer that is not known or has no counter, and
        ValueError for one that has no moments; then nothing is changed.
        """
        if type(optimizer) not in _COUNTING:
            raise TypeError(f"{_refusal(optimizer, _COUNTING)}, which correct a bias by a counter")
        if not any(optimizer.state.values()):
            raise ValueError(
                f"{type(optimizer).__name__} has no moments: restore them first, or begin anew"
            )
        applied = _begun(optimizer, self)
        for group in optimizer.param_groups:
            states = [state for p in group["params"] if (state := optimizer.state.get(p))]
            for state in states:
                state["step"].fill_(self.count)
            if isinstance(optimizer, NAdam) and states:
                product = _product(group, self.count, states[0]["mu_product"])
                for state in states:
                    state["mu_product"].copy_(product)
        return applied


class Damp(msgspec.Struct, frozen=True, tag="damp"):
    """A heuristic: keep all, and take small steps for as long as the parts were apart.

    For parts that are ``skew`` steps apart. The learning rate is divided by ``skew`` in the first
    step, by one less in each later one, and whole from number ``skew`` on. That a rate is divided
    by the staleness of what it applies to is W. Zhang, S. Gupta, X. Lian and J. Liu,
    *Staleness-aware Async-SGD for Distributed Deep Learning*, 2015 (arXiv 1511.05950), for
    gradients of asynchronous workers; that it wears off by one each step is our own reading. Raises
    ValueError for a skew that is no whole number from 1 up.
    """

    skew: int

    name: ClassVar[str] = "damp"

    def __post_init__(self) -> None:
        _check_count("skew", self.skew, 1, "how many steps the parts are apart")

    @property
    def steps(self) -> int:
        """How many steps are taken at another rate."""
        return self.skew - 1

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied with in step number ``step``, from 1."""
        return 1 / (self.skew - step + 1)

    def describe(self) -> str:
        """Say what is done, for a journal or a log."""
        return f"heuristic: learning rate divided by the skew, {self.skew} steps at first"

    def apply(self, optimizer: Optimizer) -> Applied:
        """Do so. Raises TypeError for an optimizer that is not known; then nothing is changed."""
        return _begun(optimizer, self)


Correction = Reset | Rescale | Damp


class _State(msgspec.Struct, frozen=True):
    correction: Correction | None
    done: Annotated[int, msgspec.Meta(ge=0)]


class Applied:
    """What is left of a correction: a factor on the learning rate of the next few steps.

    ``param_groups`` hold the other rate only while the optimizer computes: it is set after the
    closure, if ``step`` has one, and taken back when ``step`` ends. So a scheduler, a log and
    ``optimizer.state_dict()`` never meet it, and whatever rate a scheduler sets is the one that is
    scaled. (A step that fails in the optimizer itself leaves it there until the next one begins; it
    leaves a state that is half stepped, too.) After the last step it does nothing any more. Steps
    are calls of ``step()``: where ``GradScaler`` makes none, none is counted. Decoupled weight
    decay goes with the rate, as it does in a warm-up; Adafactor's rate is a maximum, so it is
    damped only where it binds. A CUDA graph replays no hooks.

    It is state, or a resume in the middle would go on at the whole rate: keep it in the state
    that is saved, beside its optimizer: ``{"optimizer": optimizer, "applied": Applied(optimizer)}``
    from the first. It does nothing until a correction is applied to its optimizer, or its
    ``load_state_dict`` goes on with one, to the bit.

    An optimizer has one of these: what is made or loaded later ends the earlier. Raises TypeError
    for an optimizer other than torch's own Adam, AdamW, NAdam, RAdam, Adafactor, SGD and Muon.
    """

    def __init__(self, optimizer: Optimizer, correction: Correction | None = None) -> None:
        if type(optimizer) not in _KNOWN:
            raise TypeError(f"{_refusal(optimizer, _KNOWN)}: for others go back to a whole epoch")
        self._optimizer = optimizer
        self._watching = False
        self._damped: list[tuple[dict[str, Any], Any, Any]] = []
        self.begin(correction)

    @property
    def name(self) -> str:
        """The correction's name; empty where there was none."""
        return self._correction.name if self._correction is not None else ""

    @property
    def left(self) -> int:
        """How many steps are still to be taken at another rate."""
        return max(0, self._correction.steps - self._done) if self._correction is not None else 0

    def describe(self) -> str:
        """Say what was done, and how many steps are left of it."""
        if self._correction is None:
            return "no correction"
        return f"{self._correction.describe()}; {self.left} steps left"

    def __repr__(self) -> str:
        return f"Applied({type(self._optimizer).__name__}: {self.describe()})"

    def state_dict(self) -> dict[str, Any]:
        """The correction and how many of its steps were taken: plain values."""
        found: dict[str, Any] = msgspec.to_builtins(_State(self._correction, self._done))
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken. Raises ValueError for what none has given."""
        try:
            found = msgspec.convert(state, _State)
        except msgspec.ValidationError as error:
            raise ValueError(f"this is not the state of a correction: {error}") from error
        self.end()
        self.begin(found.correction, found.done)

    def end(self) -> None:
        """Take all further steps at the whole rate."""
        self._put_back()
        self._done += self.left

    def begin(self, correction: Correction | None, done: int = 0) -> None:
        """Go on with a correction of which so many steps are done."""
        earlier = _at_work.get(self._optimizer, lambda: None)()
        if earlier is not None and earlier is not self:
            earlier.end()
        _at_work[self._optimizer] = ref(self)
        self._correction, self._done = correction, done
        if self.left > 0 and not self._watching:
            # They stay, and do nothing at the end: one that removes itself breaks torch's loop
            # over all of them.
            self._optimizer.register_step_pre_hook(self._before)
            self._optimizer.register_step_post_hook(self._after)
            self._watching = True

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._put_back()  # a step that failed ran no hook after it
        if self.left <= 0:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._scale()
            return None

        def then_scale() -> Any:
            # The user's code, and an error in it, still meets the rate as it was set.
            loss = closure()
            self._scale()
            return loss

        others = {key: value for key, value in kwargs.items() if key != "closure"}
        return (optimizer, then_scale, *args[2:]), others

    def _scale(self) -> None:
        if not isinstance(self._correction, Reset | Damp) or self.left <= 0:
            return  # the closure has ended it
        factor = self._correction.factor(self._done + 1)
        for group in self._optimizer.param_groups:
            whole = group["lr"]
            group["lr"] = whole * factor
            self._damped.append((group, whole, group["lr"]))

    def _after(self, *_: object) -> None:
        if self._damped:
            self._put_back()
            self._done += 1

    def _put_back(self) -> None:
        for group, whole, damped in self._damped:
            if group.get("lr") is damped:  # and was not set by a load since
                group["lr"] = whole
        self._damped.clear()


_told: WeakSet[Applied] = WeakSet()

_at_work: WeakKeyDictionary[Optimizer, ref[Applied]] = WeakKeyDictionary()
"""Whose hooks an optimizer has: two would take each other's rate for the training's."""


def _check_count(name: str, value: object, least: int, what: str) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name}={value!r}: give {what}, a whole number from {least} up")


def check(correction: Correction, optimizer: Optimizer) -> None:
    """Raise TypeError for an optimizer that a correction can't be applied to; changes nothing."""
    known = _COUNTING if isinstance(correction, Rescale) else _KNOWN
    if type(optimizer) not in known:
        raise TypeError(f"{_refusal(optimizer, known)}: for others go back to a whole epoch")


def _begun(optimizer: Optimizer, correction: Correction) -> Applied:
    """Begin a correction in the :class:`Applied` that the optimizer has, which may be in the state
    already, or in a new one. Raises TypeError where that does.
    """
    found = _at_work.get(optimizer, lambda: None)()
    if found is None:
        return Applied(optimizer, correction)
    found.end()
    found.begin(correction)
    return found


def warn_unsaved(parts: Sequence[object]) -> None:
    """Warn, once each, of what is left of a correction of an optimizer among some parts that are
    saved, and is none of them.
    """
    for part in parts:
        found = _at_work.get(part, lambda: None)() if isinstance(part, Optimizer) else None
        if found is None or not found.left or found in _told or any(found is p for p in parts):
            continue
        _told.add(found)
        logger.warning(
            "%r is not in the state that is saved: a resume goes on at the whole rate. What to do: "
            "keep guard.Applied(optimizer) in the state, beside the optimizer, from the first",
            found,
        )


def standing(optimizer: Optimizer) -> Applied:
    """What is left of the correction of an optimizer: its :class:`Applied`, or one that waits for
    its ``load_state_dict``. Raises TypeError where that does.
    """
    found = _at_work.get(optimizer, lambda: None)()
    return Applied(optimizer) if found is None else found


def _refusal(optimizer: object, kinds: tuple[type, ...]) -> str:
    names = ", ".join(kind.__name__ for kind in kinds)
    return f"{type(optimizer).__qualname__} can't be corrected: it is none of torch's {names}"


def _product(group: dict[str, Any], count: int, like: torch.Tensor) -> torch.Tensor:
    """NAdam's product of its first momenta, by torch's arithmetic (``torch/optim/nadam.py``)."""
    product = torch.ones_like(like)
    for step in range(1, count + 1):
        decayed = 0.96 ** (step * group["momentum_decay"])
        product *= group["betas"][0] * (1.0 - 0.5 * decayed)
        if not product:  # it has come to 0, and stays there
            break
    return product
