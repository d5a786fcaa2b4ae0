"""handfast for torch: ``from handfast.torch import Checkpointer``."""

from handfast.torch.garbage import uncollected

with uncollected():  # torch has left so much that a collection takes longer than these imports
    from handfast.torch import corrections, guard
    from handfast.torch.checkpointer import Checkpointer
    from handfast.torch.load import load

__all__ = ["Checkpointer", "corrections", "guard", "load"]
