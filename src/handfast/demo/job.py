"""What is to be trained, by whom it is saved and where: plain values that travel to each rank."""

import msgspec

__all__ = ["SAVERS", "Job"]

SAVERS = ("none", "handfast", "torch.save", "dcp", "torch.save per step", "dcp per step")
"""Every way to save that the demo knows; "none" is the uninterrupted run's."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One training. Two jobs that differ only in ``run``, ``saver`` and ``launch`` must end equal.

    ``run`` is the folder of the run, ``every`` the steps between two saves, ``launch`` counts the
    starts of this run from 1, ``nodes`` are played on one machine. ``rollback`` is a
    step that an operator goes back to with this start; 0: none, it is to find its own way.
    """

    run: str
    saver: str = "none"
    launch: int = 1
    rollback: int = 0
    world: int = 4
    nodes: int = 2
    seed: int = 1
    steps: int = 300
    every: int = 5
    width: int = 160
    layers: int = 3
    heads: int = 4
    context: int = 32
    batch: int = 2
    dropout: float = 0.1
    rate: float = 2e-3
    warmup: int = 20
    letters: int = 1 << 18
    """Characters of the text that are used."""

    @property
    def disks(self) -> str:
        """handfast's path: a directory of its own for each rank."""
        return f"{self.run}/checkpoints/rank-{{rank}}"

    def node(self, rank: int) -> str:
        """The node that ``rank`` plays to run on."""
        return f"node-{rank * self.nodes // self.world}"

    def parameters(self, alphabet: int) -> int:
        """How many parameters the model has over an alphabet of so many letters."""
        width = self.width
        block = 12 * width * width + 13 * width
        return width * (alphabet + self.context + 2) + (width + 1) * alphabet + self.layers * block

    def encode(self) -> str:
        """As one line of JSON, for a command line."""
        return msgspec.json.encode(self).decode()

    @staticmethod
    def decode(line: str) -> "Job":
        """The inverse of `encode`. Raises msgspec.ValidationError on anything else."""
        return msgspec.json.decode(line, type=Job)
