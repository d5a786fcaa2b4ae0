"""One module a format: what its files are, in the words of :mod:`handfast.audit.found`.

Each has a function ``find(place)`` that yields a :class:`~handfast.audit.found.Found` for every
run, directory or file of its format in a place. They are asked in the order of ``FORMATS``, and
what one has claimed (``Found.files``) the next ones do not see: the special ones come first.
"""

from collections.abc import Callable, Iterator
from typing import Final

from handfast.audit.formats import (
    accelerate,
    dcp,
    deepspeed,
    flax,
    lightning,
    megatron,
    nvrx,
    orbax,
    own,
    tensorflow,
    torch_save,
    torchtitan,
    trainer,
    weights,
)
from handfast.audit.found import Found
from handfast.audit.place import Place

__all__ = ["FORMATS"]

FORMATS: Final[tuple[Callable[[Place], Iterator[Found]], ...]] = (
    own.find,
    orbax.find,
    tensorflow.find,
    flax.find,
    deepspeed.find,
    nvrx.find,
    megatron.find,
    lightning.find,
    torchtitan.find,
    trainer.find,
    accelerate.find,
    dcp.find,
    weights.find,
    torch_save.find,
)
