"""What many tests of formats need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from handfast.audit.extent import Reader


@pytest.fixture
def reader() -> Iterator[Reader]:
    """Opens files."""
    with Reader() as reader:
        yield reader
