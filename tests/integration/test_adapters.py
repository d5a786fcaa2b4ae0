"""Shows what epochs cost of which most stays as it is: adapters on frozen weights."""

from __future__ import annotations

from pathlib import Path

import torch
from test_calls import PATIENT
from torch import Tensor, nn

from handfast.torch import Checkpointer


class Adapted(nn.Module):
    """A frozen layer, and a small one beside it that is trained, as LoRA has it."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width, bias=False).requires_grad_(False)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Both, added up."""
        return torch.relu(self.base(x) + self.up(self.down(x)))


def test_frozen_weights_between_adapters_are_not_written_again(run: str) -> None:
    """Shows that an epoch costs what is trained, though by their names frozen and trained tensors
    take turns: what changes lies together, so that few chunks hold some of both."""
    torch.manual_seed(1)
    model = nn.Sequential(*(Adapted(1024, 8) for _ in range(20)))
    opt = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    def step() -> None:
        opt.zero_grad()
        model(torch.randn(2, 1024)).square().mean().backward()
        opt.step()

    trained = 3 * sum(p.nbytes for p in model.parameters() if p.requires_grad)  # and two moments
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert trained < 0.06 * frozen
    with Checkpointer(run, {"model": model, "opt": opt}, **PATIENT) as ckpt:
        ckpt.restore()
        step()
        ckpt.save(1)
        step()
        ckpt.save(2).converged(30.0)
    (full,) = Path(run).glob("domains/*/1/chunks/1-1.safetensors")
    (delta,) = Path(run).glob("domains/*/1/chunks/1-2.delta")
    assert full.stat().st_size > frozen
    assert delta.stat().st_size < trained + (3 << 20)
