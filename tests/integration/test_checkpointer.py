"""Shows what a training script of one process sees: saves, handles, restores, failures, ends."""

from __future__ import annotations

from collections.abc import Callable

import deeds
from trainers import Job

Launch = Callable[..., Job]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(launch: Launch, tmp_path) -> None:
    """Model, moments, schedule, streams, loader, scaler and user's object, to the last bit."""
    path = str(tmp_path / "run")
    model = {"full": True, "norm": True}
    (one,) = launch()
    one.do(deeds.build, **model)
    straight = one.do(deeds.train, 8, save=False)
    (two,) = launch()
    assert two.do(deeds.resume, path, model=model) == 0
    assert two.do(deeds.train, 4) == straight[:4]
    two.do(deeds.converged)
    two.kill()
    (three,) = launch()
    assert three.do(deeds.resume, path, model=model) == 4
    assert three.do(deeds.digest) == straight[3]
    assert three.do(deeds.train, 8) == straight[4:]
    three.do(deeds.close)
