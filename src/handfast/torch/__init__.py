"""handfast for torch: ``from handfast.torch import Checkpointer``."""

from handfast.torch.checkpointer import Checkpointer

__all__ = ["Checkpointer"]
