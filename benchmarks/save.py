"""What a save and a restore cost, beside a plain copy and beside the usual ways, in one run.

``python benchmarks/save.py --mib 256 --repeat 5``: a state of a few large and many small tensors
on the CPU, one rank. Each round runs every contestant once, in turn, so that a drift of the machine
meets all; medians are printed, and their ratios to a warm memory copy of the same bytes. What a
contestant leaves undone is printed beside its figure. Nothing here is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from handfast.torch import Checkpointer


def make_state(mib: int, small: int) -> dict[str, torch.Tensor]:
    """Make 12 large tensors and many small ones, ``mib`` MiB in all."""
    bytes_small = 4 * 256
    large = max((mib << 20) - small * bytes_small, 12 * 4) // 12 // 4
    state = {f"large{i}": torch.rand(large) for i in range(12)}
    return state | {f"small{i}": torch.rand(256) for i in range(small)}


def change(state: dict[str, torch.Tensor]) -> None:
    """Change every byte, as an optimizer's step does, so that no chunk stays the same."""
    for tensor in state.values():
        tensor.add_(1e-3)


def timed(work: Callable[[], object]) -> float:
    """Time one call, in seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Contest:
    """The contestants over one state, each with a directory of its own."""

    def __init__(self, home: Path, state: dict[str, torch.Tensor]) -> None:
        self.home, self.state = home, state
        self.copy = {name: torch.empty_like(tensor) for name, tensor in state.items()}
        self.keeper = Checkpointer(home / "handfast", state, rng=False)
        self.keeper.restore()
        self.step = 0

    def memcpy(self) -> dict[str, float]:
        """Copy into memory that was touched before: the least that any save can block."""
        targets, sources = list(self.copy.values()), list(self.state.values())
        return {"blocked": timed(lambda: torch._foreach_copy_(targets, sources))}

    def handfast(self) -> dict[str, float]:
        """Save; then wait until it is durable, read back and attested, and until it converged."""
        self.step += 1
        began = time.perf_counter()
        save = self.keeper.save(self.step)
        blocked = time.perf_counter() - began
        save.persisted(600)
        durable = time.perf_counter() - began
        save.converged(600)
        return {
            "blocked": blocked,
            "durable": durable,
            "converged": time.perf_counter() - began,
            "load": timed(self.keeper.restore),
        }

    def torch_save(self) -> dict[str, float]:
        """``torch.save`` and an fsync of the file; nothing is hashed, no directory synced."""
        path = self.home / "state.pt"

        def save() -> None:
            with path.open("wb") as file:
                torch.save(self.state, file)
                file.flush()
                os.fsync(file.fileno())

        def load() -> None:
            for name, tensor in torch.load(path, weights_only=True).items():
                self.state[name].copy_(tensor)

        took = timed(save)
        return {"blocked": took, "durable": took, "load": timed(load)}

    def dcp(self) -> dict[str, float]:
        """``dcp.save`` into a new directory: files synced, nothing hashed, no directory synced."""
        path = self.home / "dcp"
        # It is one rank on purpose.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        shutil.rmtree(path, ignore_errors=True)
        took = timed(lambda: dcp.save(self.state, checkpoint_id=path, no_dist=True))
        load = timed(lambda: dcp.load(self.state, checkpoint_id=path, no_dist=True))
        return {"blocked": took, "durable": took, "load": load}


def main() -> int:
    """Run the contest that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--small", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="handfast-bench-", dir="."))
    found: dict[str, dict[str, list[float]]] = {}
    try:
        contest = Contest(home, make_state(options.mib, options.small))
        runs = [contest.memcpy, contest.handfast, contest.torch_save, contest.dcp]
        for number in range(options.repeat + 1):
            for run in runs:
                change(contest.state)
                for what, seconds in run().items():
                    if number:  # the first round warms up
                        found.setdefault(run.__name__, {}).setdefault(what, []).append(seconds)
        contest.keeper.close()
    finally:
        shutil.rmtree(home)
    medians = {
        who: {what: statistics.median(took) for what, took in figures.items()}
        for who, figures in found.items()
    }
    if options.json:
        print(json.dumps({"mib": options.mib, "repeat": options.repeat, "medians_s": medians}))
    else:
        show(options.mib, medians, found)
    return 0


def show(
    mib: int, medians: dict[str, dict[str, float]], found: dict[str, dict[str, list[float]]]
) -> None:
    """Print a table: seconds, the range, and the ratio to the warm copy."""
    base = medians["memcpy"]["blocked"]
    print(f"{mib} MiB on the CPU, one rank; medians, ranges, and ratios to a warm copy")
    for who, figures in medians.items():
        for what, seconds in figures.items():
            low, high = min(found[who][what]), max(found[who][what])
            rate = mib / 1024 / seconds
            print(
                f"{who:11} {what:9} {seconds:8.3f} s ({low:.3f}-{high:.3f})"
                f"  {rate:6.2f} GiB/s  {seconds / base:7.2f} x"
            )
    print("Left undone: torch_save and dcp hash nothing and sync no directory; their loads verify")
    print("nothing. handfast's load is a whole round: freeze, read, verify, agree, copy.")


if __name__ == "__main__":
    sys.exit(main())
