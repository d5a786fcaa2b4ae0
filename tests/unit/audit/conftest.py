"""Puts the helpers of this room where its tests can import them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from handfast.audit.extent import Reader

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def reader() -> Iterator[Reader]:
    """A reader of files."""
    with Reader() as made:
        yield made
