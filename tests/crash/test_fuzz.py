"""Shows that no bytes on a disk or a wire raise anything but the errors that say so.

`fuzz.py` has the decoders and what each may raise. Here each is fed with its samples and with some
thousand changes of them; heavy, atheris looks for more, guided by coverage: ten million in all.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest

CHANGES = 1500
RUNS = 10_000_000


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_changed_bytes_raise_only_what_is_told(name: str) -> None:
    """Shows it for each decoder; sound samples raise nothing."""
    target = fuzz.TARGETS[name]
    chance = random.Random(name)
    for sample in target.samples:
        if name not in ("frames", "messages"):
            target.feed(sample)
        for _ in range(CHANGES // len(target.samples)):
            fuzz.feed(target, fuzz.mutated(sample, chance))
    for length in range(64):
        fuzz.feed(target, chance.randbytes(length))


def test_a_decoder_that_raises_something_else_is_found() -> None:
    """Shows that an error which is none of ours gets through."""
    loose = fuzz.Target(lambda data: data[9], (KeyError,), ())
    assert b"" in {fuzz.mutated(b"x", random.Random(n)) for n in range(100)}
    with pytest.raises(IndexError):
        fuzz.feed(loose, b"")


@pytest.mark.heavy
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_ten_million_executions(name: str, tmp_path: Path) -> None:
    """Shows it for as many inputs as coverage leads to; prints how many a second."""
    pytest.importorskip("atheris", reason="atheris is not installed (pip install atheris)")
    runs = -(-RUNS // len(fuzz.TARGETS))
    runner = Path(__file__).with_name("fuzzer.py")
    argv = [sys.executable, str(runner), name, f"-runs={runs}", "-seed=1", "-max_len=4096"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    print(name, *re.findall(r"Done \d+ runs in \d+ second.*|cov: \d+ ft: \d+", done.stderr)[-2:])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
