"""Shows that stored objects can be looked at without making any of them."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from handfast.checkpoint.outline import outline
from handfast.errors import FormatError
from handfast.store import objects


def lines(value: object, **options: Any) -> dict[str, tuple[str, str]]:
    """Type and text by path."""
    found = outline(objects.encode(value, **options))
    return {line.path: (line.type, line.text) for line in found}


def test_a_state_is_shown_as_a_tree_of_paths() -> None:
    """Keys make paths as they do in errors and patterns; boxes of plain values are one line."""
    state = {
        "scheduler": {"lr": [0.5, 0.25], "milestones": Counter({10: 1})},
        "a/b": {3: {"x": None}},
        "rng": (3, (1, 2**70, -1), None),
        "model": objects.TensorRef("model/w"),
        "layers": [objects.TensorRef("model/a"), {"deep": 1}],
    }
    assert lines(state) == {
        "scheduler": ("dict", "2 entries"),
        "scheduler/lr": ("list", "(0.5, 0.25)"),
        "scheduler/milestones": ("Counter", "1 entries"),
        "scheduler/milestones[10]": ("int", "1"),
        "a~1b": ("dict", "1 entries"),
        "a~1b[3]": ("dict", "1 entries"),
        "a~1b[3]/x": ("NoneType", "None"),
        "rng": ("tuple", "(3, (1, 1180591620717411303424, -1), None)"),
        "model": ("tensor", "at model/w"),
        "layers": ("list", "2 entries"),
        "layers[0]": ("tensor", "at model/a"),
        "layers[1]": ("dict", "1 entries"),
        "layers[1]/deep": ("int", "1"),
    }


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (1 + 2j, "complex", "(1.0, 2.0)"),
        (Path("/a/b"), "Path", "('/a/b')"),
        (dt.date(2026, 3, 1), "date", "(2026, 3, 1)"),
        ({1, 2}, "set", "(1, 2)"),
        (deque([1], maxlen=4), "deque", "(4, 1)"),
        (OrderedDict(), "OrderedDict", "()"),
        (defaultdict(list, {"k": 1}), "defaultdict", "1 entries"),
        (slice(1, None), "slice", "(1, None, None)"),
        ("\udce4", "str", r"'\udce4'"),
        ("x" * 200, "str", "'" + "x" * 56 + "..."),
        (np.zeros((2, 3), np.float32), "numpy.ndarray", "'<f4' (2, 3)"),
        (np.float64(2), "numpy scalar", "<f8"),
        (np.dtype("i4"), "numpy.dtype", "<i4"),
        (list(range(100)), "list", "(0, 1, 2"),
        (b"\x00" * 500, "bytes", "b'"),
    ],
)
def test_each_type_has_a_line(value: object, kind: str, text: str) -> None:
    """Named as in the format's documentation, and short, however long the value is."""
    found = lines({"v": value})["v"]
    assert found[0] == kind
    assert text in found[1]
    assert len(found[1]) <= 80


class Secret:
    """Something whose making must not happen here."""


def test_nothing_is_made_to_be_shown() -> None:
    """Neither what only another program has registered, nor a pickle."""
    objects.register(Secret, "elsewhere.Secret", lambda _: {"a": 1}, lambda _: 1 / 0)
    state = {"s": Secret(), "flat": [Secret()]}
    shown = lines(state)
    assert shown["s"] == ("elsewhere.Secret", "1 entries")
    assert shown["s/a"] == ("int", "1")
    assert shown["flat[0]"][0] == "elsewhere.Secret"
    pickled = lines({"p": {"f": len}}, pickle=("p/f",))
    assert pickled["p/f"][0] == "pickle"
    assert "not read" in pickled["p/f"][1]


def test_a_registered_type_of_a_plain_value_is_one_line() -> None:
    """torch.Size, say, which this process may never have heard of."""
    objects.register(Secret, "elsewhere.Size", lambda _: [2, 3], lambda _: 1 / 0)
    assert lines({"s": Secret()})["s"] == ("elsewhere.Size", "(2, 3)")


def shown_or_refused(data: bytes) -> None:
    """Lines, or a FormatError that names the file; nothing else may escape."""
    with contextlib.suppress(FormatError):
        outline(data)


@given(st.binary(max_size=40))
def test_hostile_bytes_are_refused(data: bytes) -> None:
    """Whatever the bytes are."""
    shown_or_refused(data)


JUNK = st.recursive(
    st.none() | st.integers(-40, 40) | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
)


NODES = st.builds(lambda tag, parts: [tag, *parts], st.integers(0, 30), st.lists(JUNK, max_size=3))


@given(JUNK | NODES)
@example([22, None])
@example([21, b"\x7f" * 3000])  # more digits than Python turns into decimals at once
def test_trees_that_nobody_wrote_are_refused(tree: object) -> None:
    """Well-formed msgpack that is no node of ours."""
    shown_or_refused(msgspec.msgpack.encode([1, tree]))


def test_a_refusal_names_the_file() -> None:
    """So that somebody knows where to look."""
    with pytest.raises(FormatError, match=r"1-4\.manifest: its objects can't be shown: no objects"):
        outline(b"\xc0", "1-4.manifest")
