"""Shards of FSDP in a checkpoint of Accelerate's, and so of Trainer's.

``pytorch_model_fsdp_0`` and ``optimizer_0`` are distributed checkpoints of torch by themselves
(accelerate 1.15, utils/fsdp_utils.py, ``save_fsdp_model`` and ``save_fsdp_optimizer`` with
SHARDED_STATE_DICT).
"""

from __future__ import annotations

import re
from typing import Final

from handfast.audit.formats import dcp
from handfast.audit.formats.names import joined
from handfast.audit.formats.weights import Weights
from handfast.audit.place import Place

__all__ = ["files_of_shards", "read_shards", "shards"]

_FOLDER: Final = re.compile(r"(pytorch_model_fsdp|optimizer)_\d+")


def shards(place: Place, folder: str) -> list[str]:
    """The directories of shards in a checkpoint's."""
    inner = [path for path in place.within(folder) if path not in place.files]
    return [path for path in inner if _FOLDER.fullmatch(path.rpartition("/")[2])]


def files_of_shards(place: Place, folder: str) -> set[str]:
    """The files in them."""
    return {path for inner in shards(place, folder) for path in dcp.own_files(place, inner)}


def read_shards(place: Place, folder: str) -> Weights:
    """Read them, in the words of the step that they are of."""
    found = Weights()
    for inner in shards(place, folder):
        step = dcp.read_step(place, inner)
        found.parts += step.parts
        found.missing += step.missing
        found.extra += step.extra
        found.findings += step.findings
        if not step.committed:
            found.missing.append((joined(inner, dcp.INDEX), "its shards have no index"))
    return found
