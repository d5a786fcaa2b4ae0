"""Export: an epoch's whole tensors in one file that needs no handfast to be read.

A file is written under a temporary name beside its own, synced, and only then named, without
replacing anything: what has the name is whole. Each byte was held against its hash on the way.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec

from handfast.checkpoint.location import Location
from handfast.checkpoint.weights import Weights, reading_weights
from handfast.checkpoint.whole import Whole, runs
from handfast.core.lattice import Epoch
from handfast.errors import HandfastError
from handfast.store.files import TEMPORARY, Files, closing, discard, write_all, writing
from handfast.store.image import BLOCK, DTYPES, TensorSpec, plan
from handfast.store.port import Progress

__all__ = ["FORMATS", "Exported", "Writer", "export", "new_file"]

Writer = Callable[[Files, str, Weights], int]
"""Writes weights to a new file of this name; gives its bytes."""


class Exported(msgspec.Struct, frozen=True):
    """What an export wrote."""

    path: str
    format: str
    epoch: Epoch
    tensors: int
    tied: int
    nbytes: int


def export(
    location: Location,
    dest: str | os.PathLike[str],
    step: int | Epoch | None = None,
    *,
    format: str = "safetensors",  # noqa: A002 - the word that users look for
    component: str = "",
    only: Sequence[str] = ("**",),
    progress: Progress | None = None,
) -> Exported:
    """Write an epoch's whole tensors to a new file; see :meth:`Run.export`."""
    path = os.path.abspath(os.fspath(dest))
    writer = FORMATS.get(format)
    if writer is None:
        known = ", ".join(FORMATS)
        raise ValueError(
            f"no format {format!r}; there are {known} ('torch' comes with `import handfast.torch`)"
        )
    _check_new(location.files, path)
    purpose = f"export to {path}".encode(errors="backslashreplace").decode()
    with reading_weights(
        location, step, component=component, only=only, purpose=purpose, progress=progress
    ) as weights:
        nbytes = writer(location.files, path, weights)
        return Exported(
            path, format, weights.epoch, len(weights.tensors), len(weights.tied), nbytes
        )


def _check_new(files: Files, path: str) -> None:
    home = os.path.dirname(path)
    if not os.path.isdir(home):
        raise HandfastError(f"{home} is no directory. What to do: make it, or choose another one")
    if files.exists(path):
        raise HandfastError(
            f"{path} is there already, and an export replaces nothing. What to do: choose another "
            "name, or move that file away"
        )


@contextmanager
def new_file(files: Files, path: str) -> Iterator[str]:
    """Give a temporary name to write a file under, and name it when the body has ended well.

    The body makes the file; it is synced here. Raises SaveFailed where the system refuses.
    """
    temporary = f"{path}.{os.urandom(4).hex()}{TEMPORARY}"
    try:
        yield temporary
        with writing("export", path):
            with closing(files, files.open(temporary)) as fd:
                files.fsync(fd)
            _name(files, temporary, path)
            files.fsync_dir(os.path.dirname(path))
    finally:
        discard(files, temporary)


def _name(files: Files, temporary: str, path: str) -> None:
    """Give the file its name, by a link: a rename would replace what came there meanwhile."""
    try:
        files.link(temporary, path)
    except FileExistsError:
        _check_new(files, path)
        raise
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS):
            raise
        _check_new(files, path)  # this file system has no links
        files.rename(temporary, path)


def write_safetensors(files: Files, path: str, weights: Weights) -> int:
    """Write one safetensors file, as ``safetensors.torch.save_model`` would.

    Tied tensors are written once; their other names are in the metadata, where ``load_model``
    looks for them. Raises ValueError for dtypes that the container has no name for.
    """
    foreign = [w for w in weights.tensors if DTYPES[w.dtype][1] is None]
    if foreign:
        named = ", ".join(f"{w.name} ({w.dtype})" for w in foreign[:5])
        raise ValueError(
            f"safetensors has no dtype for {len(foreign)} of the tensors: {named}. What to do: "
            "export to torch, or choose a component without them"
        )
    header, starts = _header(weights)
    end = len(header) + sum(_nbytes(whole) for whole in weights.tensors)
    with (
        new_file(files, path) as temporary,
        writing("export", path),
        closing(files, files.create(temporary)) as fd,
    ):
        write_all(files, fd, header, 0)
        for whole, block, data in weights.blocks():
            start = len(header) + starts[whole.name]
            for at, begin, count in runs(block.slot):
                write_all(files, fd, data[begin : begin + count], start + at)
    return end


def _header(weights: Weights) -> tuple[bytes, dict[str, int]]:
    """The file's header, and where each tensor's data begin behind it."""
    layout = plan(
        TensorSpec(w.name, w.dtype, w.shape, w.shape, (0,) * len(w.shape), (0,) * len(w.shape))
        for w in weights.tensors
    )
    entries = msgspec.json.decode(layout.header[8:])
    entries["__metadata__"] = {"format": "pt", "epoch": str(weights.epoch), **weights.tied}
    text = msgspec.json.encode(entries)
    size = -(-(8 + len(text)) // BLOCK) * BLOCK - 8
    starts = {slot.spec.path: slot.start - len(layout.header) for slot in layout.slots}
    return size.to_bytes(8, "little") + text.ljust(size), starts


def _nbytes(whole: Whole) -> int:
    count = DTYPES[whole.dtype][0]
    for size in whole.shape:
        count *= size
    return count


FORMATS: Final[dict[str, Writer]] = {"safetensors": write_safetensors}
"""Writers by format. A framework's room adds its own when it is imported."""
