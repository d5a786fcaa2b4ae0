"""Shows a spliced AdamW state on real tensors: off every trajectory, and with nothing to show it.

And that the algebra's AdamW is torch's, so that what is derived of the one holds of the other.
"""

import pytest
import torch

from handfast.model.optimizer import AdamW, moments_zeroed, step_reset
from handfast.torch.splice import BATCHES, BETAS, DECAY, EPS, LR, Training, Whole, exhibit


@pytest.mark.parametrize("seed", [0, 1])
def test_a_spliced_state_is_on_no_trajectory(seed: int) -> None:
    """None of those that the batches allow, in any order; far beyond rounding."""
    shown = exhibit(seed)
    assert shown.holds, shown
    assert shown.figures["states of them"] == sum(BATCHES**i for i in range(7))
    assert shown.figures["elements that break |m| <= K sqrt(v)"] == 0


def test_a_true_state_is_found_among_them() -> None:
    """By the same look-up, to the last bit: it is no search that finds nothing."""
    training = Training()
    known = list(training.every(3))
    for order in ((0, 1, 2), (2, 2, 0), (1,)):
        state = training.along(order)[-1]
        assert min(state.apart(other) for other in known) == 0.0
    spliced = Whole(known[1].theta, known[-1].m, known[-1].v, known[-1].count)
    assert min(spliced.apart(other) for other in known) > 1e-6


def test_the_algebra_steps_as_torch_does() -> None:
    """To the rounding of float64, through twelve steps of a real loss."""
    training, rule = Training(), AdamW(LR, *BETAS, EPS, DECAY)
    state = training.start
    theta, m, v = (tuple(part.tolist()) for part in (state.theta, state.m, state.v))
    for i in range(12):
        gradient = training.gradient(torch.tensor(theta, dtype=torch.float64), i % BATCHES)
        m, v = rule.moments(m, v, tuple(gradient.tolist()))
        theta = rule.moved(theta, m, v, i + 1)
        state = training.step(state, i % BATCHES)
        for ours, torchs in ((theta, state.theta), (m, state.m), (v, state.v)):
            assert torch.tensor(ours, dtype=torch.float64).allclose(torchs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95)])
def test_torch_scales_its_step_by_the_derived_factors(betas: tuple[float, float]) -> None:
    """A constant gradient for long, then the counter set to 0, or the moments."""

    def next_step(**changed: torch.Tensor) -> float:
        parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=betas, eps=0.0, weight_decay=0.0)
        one = torch.ones(1, dtype=torch.float64)
        old = {"step": torch.tensor(1e5), "exp_avg": one.clone(), "exp_avg_sq": one.clone()}
        optimizer.state[parameter] = old | changed
        parameter.grad = one
        optimizer.step()
        return -parameter.item()

    zero = torch.zeros(1, dtype=torch.float64)
    assert next_step() == pytest.approx(1.0)
    assert next_step(step=torch.tensor(0.0)) == pytest.approx(step_reset(*betas))
    zeroed = next_step(exp_avg=zero.clone(), exp_avg_sq=zero.clone())
    assert zeroed == pytest.approx(moments_zeroed(*betas))
