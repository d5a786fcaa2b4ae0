"""Epochs and their order."""

import msgspec

__all__ = ["GENESIS", "Epoch"]


class Epoch(msgspec.Struct, frozen=True, order=True, array_like=True):
    """A generation (one life of the job) and a step (completed optimizer updates)."""

    generation: int
    step: int

    def __str__(self) -> str:
        return f"{self.generation}/{self.step}"


GENESIS = Epoch(0, 0)
