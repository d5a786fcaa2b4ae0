"""A spliced AdamW state, on real tensors: what it is not, and what nothing in it shows.

Parameters of one epoch with the moments of a later one. The training is small, and every order in
which its batches could have come is run, so that "no step of any trajectory" is looked up, not
argued. docs/optimizer.md says what is a theorem here and what only a stamp can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Final

import msgspec
import torch
from torch import Tensor, nn

from handfast.model.exhibits import Exhibit
from handfast.model.optimizer import AdamW, moment_bound, outside

__all__ = ["Training", "Whole", "exhibit"]

BATCHES: Final = 3
STEPS: Final = 5
BETWEEN: Final = 3
BETAS: Final = (0.9, 0.999)
LR, DECAY, EPS = 0.01, 0.01, 1e-8

Order = tuple[int, ...]


class Whole(msgspec.Struct, frozen=True):
    """All that AdamW's next step depends on: three flat float64 vectors, and the counter."""

    theta: Tensor
    m: Tensor
    v: Tensor
    count: int

    def apart(self, other: Whole) -> float:
        """Give the greatest difference of an element; infinite where the counters differ."""
        if self.count != other.count:
            return float("inf")
        pairs = ((self.theta, other.theta), (self.m, other.m), (self.v, other.v))
        return max(float((a - b).abs().max()) for a, b in pairs)


class Training:
    """A net of 49 parameters, a few batches, and torch's AdamW: float64, one thread, no chance."""

    def __init__(self, seed: int = 0) -> None:
        made = torch.Generator().manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        shapes = [parameter.shape for parameter in self.net.parameters()]
        start = [torch.randn(s, generator=made, dtype=torch.float64) * 0.5 for s in shapes]
        self.batches = [
            (
                torch.randn(8, 4, generator=made, dtype=torch.float64),
                torch.randn(8, 1, generator=made, dtype=torch.float64),
            )
            for _ in range(BATCHES)
        ]
        theta = torch.cat([tensor.flatten() for tensor in start])
        self.start = Whole(theta, torch.zeros_like(theta), torch.zeros_like(theta), 0)

    def loss(self, theta: Tensor, batch: int) -> Tensor:
        """Give the loss of a batch at some parameters, and leave its gradient in the net."""
        # a copy, since the parameters become views of it, and a step would change the state
        nn.utils.vector_to_parameters(theta.clone(), self.net.parameters())
        self.net.zero_grad()
        inputs, targets = self.batches[batch]
        loss: Tensor = nn.functional.mse_loss(self.net(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call] # torch does not annotate it
        return loss.detach()

    def gradient(self, theta: Tensor, batch: int) -> Tensor:
        """Give the gradient of a batch at some parameters, flat."""
        self.loss(theta, batch)
        return torch.cat([p.grad.flatten() for p in self.net.parameters() if p.grad is not None])

    def step(self, state: Whole, batch: int) -> Whole:
        """Put a state into torch's optimizer, take its step, and read it back."""
        self.loss(state.theta, batch)
        named = list(self.net.parameters())
        optimizer = torch.optim.AdamW(
            named, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, foreach=False
        )
        sizes = [parameter.numel() for parameter in named]
        parts = zip(named, torch.split(state.m, sizes), torch.split(state.v, sizes), strict=True)
        for parameter, m, v in parts:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(state.count)),
                "exp_avg": m.clone().view_as(parameter),
                "exp_avg_sq": v.clone().view_as(parameter),
            }
        optimizer.step()
        held = [optimizer.state[parameter] for parameter in named]
        return Whole(
            torch.cat([parameter.detach().flatten() for parameter in named]),
            torch.cat([each["exp_avg"].flatten() for each in held]),
            torch.cat([each["exp_avg_sq"].flatten() for each in held]),
            state.count + 1,
        )

    def along(self, order: Sequence[int]) -> list[Whole]:
        """Give the states of one trajectory, the start first."""
        states = [self.start]
        for batch in order:
            states.append(self.step(states[-1], batch))
        return states

    def every(self, steps: int) -> Iterator[Whole]:
        """Give each state that any order of the batches reaches within so many steps."""
        level = [self.start]
        yield from level
        for _ in range(steps):
            level = [self.step(state, batch) for state, batch in product(level, range(BATCHES))]
            yield from level


def exhibit(seed: int = 0) -> Exhibit:
    """Splice, and look for the result among all trajectories of the training; some two seconds."""
    training = Training(seed)
    order = tuple(i % BATCHES for i in range(STEPS))
    states = training.along(order)
    early, late = states[BETWEEN], states[STEPS]
    splice = Whole(early.theta, late.m, late.v, late.count)
    known = list(training.every(STEPS + 1))
    after = [training.step(splice, batch) for batch in range(BATCHES)]
    nearest = min(splice.apart(state) for state in known)
    next_ = min(new.apart(state) for new in after for state in known)
    moved = min(float((n.theta - s.theta).abs().max()) for n in after for s in known)
    rerun = max(a.apart(b) for a, b in zip(states, training.along(order), strict=True))
    back, true, strange = _fiction(training, states, splice)
    bound = moment_bound(*BETAS, STEPS)
    broken = outside(tuple(splice.m.tolist()), tuple(splice.v.tolist()), bound)
    found = min(nearest, next_, moved)
    return Exhibit(
        "a spliced AdamW state is no state of any trajectory of its training, and its next step "
        "is no step of one; its values break no bound that trajectories keep",
        rerun == 0.0 and found > 1e-6 and not broken and back + true < 1e-9 and strange > 1e-3,
        {
            "parameters": splice.theta.numel(),
            "trajectories": BATCHES ** (STEPS + 1),
            "states of them": len(known),
            "the same run twice: apart by": rerun,
            "the splice and the nearest state: apart by": nearest,
            "its next state and the nearest: apart by": next_,
            "its next parameters and the nearest: apart by": moved,
            "elements that break |m| <= K sqrt(v)": broken,
            "and with m of the early epoch, v of the late one": outside(
                tuple(early.m.tolist()), tuple(late.v.tolist()), bound
            ),
            "led there by recorded gradients from other first parameters: apart by": back,
            "the loss's gradients on that way, from those recorded: apart by, relative": strange,
            "on the true way": true,
        },
        "trajectories of this training: its first parameters, gradients of its loss at the "
        "parameters of the moment, its batches in any order. With free gradients and a free start "
        "any parameters fit any moments",
    )


def _fiction(
    training: Training, states: Sequence[Whole], splice: Whole
) -> tuple[float, float, float]:
    """Lead to the splice by the gradients that were recorded, from other first parameters.

    Gives how far from it that ends, and how far from the recorded gradients those are that the
    loss has along the way: on the true trajectory, and on this one.
    """
    rule = AdamW(LR, *BETAS, EPS, DECAY)
    path = [tuple(splice.theta.tolist())]
    for state in reversed(states[1:]):
        m, v = tuple(state.m.tolist()), tuple(state.v.tolist())
        path.append(rule.before(path[-1], m, v, state.count))
    path.reverse()
    theta = path[0]
    for state in states[1:]:
        theta = rule.moved(theta, tuple(state.m.tolist()), tuple(state.v.tolist()), state.count)
    back = max(abs(a - b) for a, b in zip(theta, splice.theta.tolist(), strict=True))
    true = _strange(training, states, lambda i: states[i].theta)
    made = [torch.tensor(each, dtype=torch.float64) for each in path]
    return back, true, _strange(training, states, lambda i: made[i])


def _strange(training: Training, states: Sequence[Whole], at: Callable[[int], Tensor]) -> float:
    """How far the recorded gradients are from the loss's own, at most, relative to their norm."""
    worst = 0.0
    for i in range(len(states) - 1):
        recorded = (states[i + 1].m - BETAS[0] * states[i].m) / (1 - BETAS[0])
        own = training.gradient(at(i), i % BATCHES)
        worst = max(worst, float((recorded - own).norm() / recorded.norm()))
    return worst
