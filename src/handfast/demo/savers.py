"""What the demo asks of anything that saves a training: handfast and its peers alike."""

from typing import Protocol

__all__ = ["Nothing", "Saver"]


class Saver(Protocol):
    """One rank's way to save and to resume one live training."""

    def restore(self) -> int:
        """Bring the live state back to the newest checkpoint; the step it is of, 0 if none."""

    def save(self, step: int) -> object:
        """Save the live state as of ``step`` completed updates."""

    def close(self) -> None:
        """Wait for what is being saved."""


class Nothing:
    """Saves nothing: the uninterrupted run that all others are held against."""

    def restore(self) -> int:
        """Always a first start."""
        return 0

    def save(self, step: int) -> None:
        """Nothing is kept of ``step``."""

    def close(self) -> None:
        """Nothing is under way."""
