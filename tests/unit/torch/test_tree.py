"""Shows what is said of paths and names alone."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from handfast.torch.names import clean, cleaned
from handfast.torch.tree import above


@given(st.lists(st.text("ab/[]", max_size=9), max_size=9))
def test_the_boxes_above_are_those_that_each_cut_of_a_path_names(paths: list[str]) -> None:
    """Shows it of any text, roots and doubled marks too."""
    wanted = {path[: cut.start()] for path in paths for cut in re.finditer(r"[/\[]", path)}
    assert above(paths) == wanted


def test_keys_are_cleaned_at_once_as_they_are_one_by_one() -> None:
    """Shows it of a model with a wrapper deep inside, and of one whose own child is called so."""
    plain = nn.ModuleDict({"module": nn.Sequential(nn.Linear(1, 1)), "b": nn.Linear(1, 1)})
    wrapped = nn.ModuleDict({"a": nn.DataParallel(nn.Linear(1, 1)), "module": nn.Linear(1, 1)})
    for model in (plain, wrapped):
        keys = [*model.state_dict(), "a.of.nothing"]
        assert cleaned(model, keys) == [clean(model, key) for key in keys]
    assert cleaned(plain, plain.state_dict()) == list(plain.state_dict())
    assert "a.weight" in cleaned(wrapped, wrapped.state_dict())
