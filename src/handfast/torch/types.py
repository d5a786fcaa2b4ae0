"""torch's own plain types: known to the objects codec, and the names of dtypes in images."""

from collections.abc import Mapping
from types import MappingProxyType

import torch

from handfast.store import objects
from handfast.store.image import DTYPES

__all__ = ["DTYPE_NAMES", "TORCH_DTYPES"]

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {name: getattr(torch, name) for name in DTYPES if hasattr(torch, name)}
)
"""Every dtype that an image and this torch both know, by its name in an image."""

DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType(
    {dtype: name for name, dtype in TORCH_DTYPES.items()}
)


def _dtype(name: object) -> torch.dtype:
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"this torch ({torch.__version__}) has no dtype {name!r}")
    return found


objects.register(torch.Size, "torch.Size", list, torch.Size)
objects.register(torch.device, "torch.device", str, torch.device)
objects.register(
    torch.dtype, "torch.dtype", lambda dtype: str(dtype).removeprefix("torch."), _dtype
)
