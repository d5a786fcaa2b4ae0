"""Shows that bytes that were kept are those that would be made anew."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.store import objects
from handfast.store.kept import Kept
from handfast.store.objects import TensorRef

NAMES = st.lists(st.text(max_size=3) | st.integers() | st.none(), max_size=20)


@given(NAMES, st.dictionaries(st.text(max_size=3), NAMES, max_size=5), st.integers())
def test_a_kept_value_is_encoded_as_any_other(
    names: list[object], table: dict[str, object], first: int
) -> None:
    """At every place where it stands, in the first save and in later ones."""
    kept = Kept([names, table])
    for other in (first, first + 1):
        value = {"a": names, "b": [table, (names, other)], "names": list(names)}
        assert objects.encode(value, kept=kept) == objects.encode(value)
    assert kept.of([names, table])
    assert not kept.of([list(names), table])
    assert not kept.of([names])


@pytest.mark.parametrize("rest", [0, 1, 2])
@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 32_766, 32_767, 32_768])
def test_a_dict_that_begins_with_a_kept_one_is_encoded_as_one(count: int, rest: int) -> None:
    """Whatever the number of entries, which msgpack writes in three ways."""
    begins: dict[str, Any] = {str(n): TensorRef(str(n)) for n in range(count)}
    kept = Kept([begins], begins=begins)
    for other in (1.5, "x"):
        more = {f"more{n}": [other] for n in range(rest)}
        data = objects.encode(more, kept=kept)
        assert data == objects.encode(begins | more)
        assert objects.decode(data) == begins | more
