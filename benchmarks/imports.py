"""How long ``import handfast`` takes, and what ``import handfast.torch`` adds to torch's own time.

Each time is a fresh interpreter's, measured inside it. The first lap, which does not count, leaves
compiled files, as an installation does. The limit of ``handfast.torch`` is ``import torch`` in the
same lap.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from benchmarks.common.figures import Figure, Setting

VARIES = ()
PACKAGES = ("handfast", "torch", "handfast.torch")


def ask(setting: Setting) -> Iterator[Figure]:
    """Measure it, in turn, twice as often as else."""
    laps = [
        {package: _import(package) for package in PACKAGES} for _ in range(2 * setting.repeat + 1)
    ][1:]
    for package in PACKAGES:
        values = tuple(each[package] for each in laps)
        yield _figure(package, "import", values)
    beyond = tuple(each["handfast.torch"] - each["torch"] for each in laps)
    yield _figure("handfast.torch", "import, beyond torch", beyond)


def _figure(who: str, what: str, values: tuple[float, ...]) -> Figure:
    return Figure(question="imports", who=who, what=what, unit="ms", values=values, at={})


def _import(package: str) -> float:
    code = (
        "import time; began = time.perf_counter(); "
        f"import {package}; print((time.perf_counter() - began) * 1e3)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    return float(told)
