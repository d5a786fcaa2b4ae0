"""handfast for torch: ``from handfast.torch import Checkpointer``."""

from handfast.torch.checkpointer import Checkpointer
from handfast.torch.load import load

__all__ = ["Checkpointer", "load"]
