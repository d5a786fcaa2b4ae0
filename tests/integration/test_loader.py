"""Shows that torchdata's own loader is one epoch with the model: the real one, workers and all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import loading
import pytest
from trainers import Job

Launch = Callable[..., Job]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_behind_the_last_batch_consumed(
    workers: int, launch: Launch, tmp_path: Path
) -> None:
    """In the middle of the data, and where they begin anew: batches, masks, losses are the same."""
    (straight,) = launch()
    other = str(tmp_path / "other")
    _, expected = straight.do(loading.over_a_loader, other, workers, 1, 9)
    straight.kill()
    for at in (3, 5):  # in the data, and where they end
        path = str(tmp_path / f"run{at}")
        (first,) = launch()
        assert first.do(loading.over_a_loader, path, workers, 1, at) == (0, expected[:at])
        first.kill()
        (second,) = launch()
        assert second.do(loading.over_a_loader, path, workers, 2, 9) == (at, expected[at:])
        second.kill()
