"""Shows that torch's own plain types are stored as what they are."""

import pytest
import torch

from handfast.errors import FormatError
from handfast.store import objects
from handfast.store.image import DTYPES
from handfast.torch.types import DTYPE_NAMES, TORCH_DTYPES


@pytest.mark.parametrize(
    "value",
    [torch.Size([2, 0, 3]), torch.Size([]), torch.device("cpu"), torch.device("cuda", 3)],
    ids=str,
)
def test_sizes_and_devices_come_back(value: object) -> None:
    """They stand in configurations that users keep beside their weights."""
    back = objects.decode(objects.encode({"a": [value]}))
    assert back == {"a": [value]}
    assert type(back["a"][0]) is type(value)


def test_every_dtype_comes_back() -> None:
    """The ones too that no image can hold."""
    for dtype in vars(torch).values():
        if isinstance(dtype, torch.dtype):
            assert objects.decode(objects.encode(dtype)) is dtype


def test_a_dtype_of_another_torch_is_named() -> None:
    """A newer torch may have one that this one lacks."""
    data = objects.encode(torch.float64).replace(b"float64", b"float99")
    with pytest.raises(FormatError, match="no dtype 'float99'"):
        objects.decode(data)


def test_names_of_dtypes_are_those_of_images() -> None:
    """And their sizes agree, or every offset would be wrong."""
    assert {DTYPE_NAMES[dtype] for dtype in TORCH_DTYPES.values()} == set(TORCH_DTYPES)
    assert all(dtype.itemsize == DTYPES[name][0] for name, dtype in TORCH_DTYPES.items())
