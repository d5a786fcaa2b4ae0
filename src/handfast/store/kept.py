"""Values whose encoding is kept from one save to the next."""

from collections.abc import Iterable, Sequence
from operator import is_

import msgspec

__all__ = ["Kept"]


class Kept:
    """Values that are encoded again and again, and that nobody changes: their bytes are kept.

    It goes by identity. They must be containers of what needs no pickle. ``encoded`` has the bytes
    by the id of the value, None before the first time.
    """

    def __init__(self, values: Iterable[object]) -> None:
        self._values = tuple(values)  # held, so that no other value can come to have their ids
        self.encoded: dict[int, msgspec.Raw | None] = {id(value): None for value in self._values}

    def of(self, values: Sequence[object]) -> bool:
        """Whether it is of these very values."""
        return len(self._values) == len(values) and all(map(is_, self._values, values))
