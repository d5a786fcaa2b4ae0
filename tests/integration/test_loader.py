"""Shows that torchdata's own loader is one epoch with the model: the real one, workers and all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import loading
import pytest
from trainers import Job

Launch = Callable[..., Job]


@pytest.mark.parametrize(
    ("workers", "samplers"),
    [
        (0, [""]),
        (2, [""]),
        (0, ["distributed"]),
        (2, ["distributed"]),
        (0, ["seeded"]),
        (2, ["seeded"]),
        (0, ["stateful"]),
        (2, ["stateful"]),
        (0, ["", ""]),
        (2, ["distributed", ""]),
        (2, ["", "distributed"]),
        (0, ["distributed", "seeded"]),
    ],
)
def test_a_loader_goes_on_behind_the_last_batch_consumed(
    workers: int, samplers: list[str], launch: Launch, tmp_path: Path
) -> None:
    """In the middle of the data, where they begin anew, and in the middle once more: batches, masks
    and losses are the same, also where the sampler hears of its epoch only behind the restore, and
    where a second loader begins only after the save."""
    (straight,) = launch()
    other = str(tmp_path / "other")
    _, expected = straight.do(loading.over_a_loader, other, workers, 1, 9, *samplers)
    straight.kill()
    for at in (3, 5, 7):  # in the data, where they end, and in them again
        path = str(tmp_path / f"run{at}")
        (first,) = launch()
        assert first.do(loading.over_a_loader, path, workers, 1, at, *samplers) == (
            0,
            expected[:at],
        )
        first.kill()
        (second,) = launch()
        assert second.do(loading.over_a_loader, path, workers, 2, 9, *samplers) == (
            at,
            expected[at:],
        )
        second.kill()
