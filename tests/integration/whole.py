"""A deed: a model's weights as a user sees them, whole."""

from __future__ import annotations

from torch import Tensor
from trainers import Desk


def whole(desk: Desk) -> dict[str, Tensor]:
    """Every entry of the model's ``state_dict``, sharded ones put together, by its own name."""
    model = desk.training.model
    model = getattr(model, "module", model)
    found = {}
    for name, value in model.state_dict().items():
        full = value.full_tensor() if hasattr(value, "full_tensor") else value
        found[name] = full.detach().clone()
    return found
