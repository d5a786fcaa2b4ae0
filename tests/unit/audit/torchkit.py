"""What torch writes, for tests of what reads it, and what torch reads of it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from handfast.audit.extent import SIZES, Extent, Reader
from handfast.audit.torch_file import TorchFile, read_torch


def save(path: Path, value: object, **options: Any) -> str:
    """Save something with torch."""
    torch.save(value, path, **options)
    return str(path)


def taken(reader: Reader, path: str) -> TorchFile:
    """Read a file in which nothing is wrong."""
    found = read_torch(reader, path)
    assert found.damage == ()
    return found


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's elements, row-major."""
    tensor = tensor.detach()
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy().tobytes()
    start = tensor.storage_offset() * tensor.itemsize
    return whole[start : start + tensor.numel() * tensor.itemsize]


def content(values: Extent, most: int = 1000) -> bytes:
    """All bytes of some values."""
    return b"".join(bytes(block) for block in values.blocks(most))


def same(values: Any, tensor: torch.Tensor) -> bool:
    """Whether values are a tensor's, by dtype, shape and bit."""
    return (
        type(values) is Extent
        and values.dtype == str(tensor.dtype).removeprefix("torch.")
        and values.shape == tuple(tensor.shape)
        and content(values) == raw(tensor)
        and len(raw(tensor)) == tensor.numel() * SIZES[values.dtype]
    )


def alike(found: Any, loaded: Any) -> bool:
    """Whether what we read is what torch loaded: containers, atoms and tensors."""
    if isinstance(loaded, torch.Tensor):
        return same(found, loaded)
    if isinstance(loaded, dict):
        return (
            type(found) is dict
            and list(found) == list(loaded)
            and all(alike(found[key], part) for key, part in loaded.items())
        )
    if isinstance(loaded, (list, tuple)):
        return len(found) == len(loaded) and all(map(alike, found, loaded))
    return type(found) is type(loaded) and found == loaded


def rezipped(
    source: str, target: Path, *, without: str = "", instead: dict[str, bytes] | None = None,
    method: int = zipfile.ZIP_STORED,
) -> str:  # fmt: skip
    """A copy of an archive without a record, or with other bytes in some, named by their ends."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for info in old.infolist():
            end = info.filename.partition("/")[2]
            if end != without:
                new.writestr(info.filename, (instead or {}).get(end, old.read(info)))
    return str(target)
