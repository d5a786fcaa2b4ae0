"""Shows that random streams are read without moving them, and put back as they were."""

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from handfast.store import objects
from handfast.torch.rng import (
    is_generator,
    read_generator,
    read_streams,
    write_generator,
    write_streams,
)


def stored(value: Any) -> Any:
    """What comes back from a manifest."""
    return objects.decode(objects.encode(value))


def draw() -> list[Any]:
    return [random.gauss(0, 1), np.random.standard_normal(), torch.randn(2).tolist()]


def test_streams_come_back() -> None:
    """The cached half of a Gaussian pair too: Python's and NumPy's generators make two at once."""
    random.gauss(0, 1)
    np.random.standard_normal()
    streams = stored(read_streams())
    expected = draw()
    draw()
    assert write_streams(streams) == []
    assert draw() == expected
    assert "cuda" not in streams


@pytest.mark.parametrize(
    "make",
    [
        torch.Generator,
        lambda: random.Random(1),
        lambda: np.random.default_rng(2),
        lambda: np.random.Generator(np.random.Philox(3)),
        lambda: np.random.RandomState(4),
    ],
    ids=["torch", "python", "pcg64", "philox", "randomstate"],
)
def test_generators_come_back(make: Any) -> None:
    """PCG64's state has 128 bits, which no fixed-width integer holds."""

    def some(generator: Any) -> list[float]:
        if isinstance(generator, torch.Generator):
            return list(torch.rand(3, generator=generator))
        return [generator.random() for _ in range(3)]

    one, other = make(), make()
    assert is_generator(one)
    some(one)
    state = stored(read_generator(one))
    expected = some(one)
    write_generator(other, state)
    assert some(other) == expected


def test_anything_else_is_no_generator() -> None:
    """A stray object must not be taken for one."""
    for value in (object(), 3, np, random):
        assert not is_generator(value)
        with pytest.raises(TypeError, match="no random generator"):
            read_generator(value)
        with pytest.raises(TypeError, match="no random generator"):
            write_generator(value, b"")


def test_streams_that_cannot_be_put_back_are_named() -> None:
    """A resume on other hardware draws other numbers: it says so."""
    streams = stored(read_streams())
    del streams["numpy"]
    streams["cuda"] = [bytes(16)] * 2
    numpy, cuda = write_streams(streams)
    assert "NumPy" in numpy
    assert "2 CUDA streams were saved and 0 devices are here" in cuda


def test_numpy_is_not_imported_for_its_stream() -> None:
    """A job without NumPy has no stream of it, and need not pay for the import."""
    code = """if True:
        import sys
        sys.modules["numpy"] = None
        from handfast.torch.rng import read_streams
        assert sorted(read_streams()) == ["python", "torch"], read_streams()
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
