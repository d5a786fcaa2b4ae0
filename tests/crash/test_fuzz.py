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

import handfast

CHANGES = 1500
RUNS = 10_000_000


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_changed_bytes_raise_only_what_is_told(name: str) -> None:
    """Shows it for each decoder; sound samples raise nothing."""
    target = fuzz.TARGETS[name]
    chance = random.Random(name)
    for sample in target.samples:
        if name not in ("frames", "messages", "newer"):
            target.feed(sample)
        for _ in range(CHANGES // len(target.samples)):
            fuzz.feed(target, fuzz.mutated(sample, chance))
    for length in range(64):
        fuzz.feed(target, chance.randbytes(length))


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_what_is_nested_too_deep_is_refused_as_well(name: str) -> None:
    """Shows it for a value more in each sample, boxes in boxes: in JSON, in arrays, in maps."""
    target = fuzz.TARGETS[name]
    for sample in target.samples:
        for data in fuzz.nested(sample):
            fuzz.feed(target, data)


FED = {
    "agent/frames.py": ("local",),
    "agent/hearsay.py": ("word",),
    "agent/speech.py": ("said-1", "said-2"),
    "checkpoint/outline.py": ("outline",),
    "checkpoint/rounds.py": ("round",),
    "core/messages.py": ("records", "messages"),
    "fleet/compat/options.py": ("options", "probed"),
    "fleet/compat/reading.py": ("rules",),
    "fleet/gate/overrides.py": ("overrides",),
    "fleet/gate/round.py": ("posted",),
    "fleet/gate/stack.py": ("stack",),
    "fleet/gate/wire.py": ("node-request", "node-reply"),
    "fleet/identity.py": ("statement",),
    "fleet/inventory/collect.py": ("collected",),
    "fleet/inventory/facts.py": ("inventory",),
    "fleet/rehearse/reading.py": ("rehearsal",),
    "link/end.py": ("link", "link-word"),
    "link/records.py": ("link-records",),
    "link/session.py": ("link-offer",),
    "store/claims.py": ("identity", "identity-inner", "seal"),
    "store/manifest.py": ("manifest", "manifest-body", "newer"),
    "store/objects.py": ("objects",),
    "store/pins.py": ("pins",),
}
"""The targets of each module that decodes."""

BY_OUR_OWN = {
    "agent/host.py": "what a frame or a wire has carried: from a trainer of this node, or an agent",
    "agent/snapshot.py": "what a frame has carried: from the agent of this node",
    "checkpoint/checkpointer.py": "what ranks gather of each other, over the job's own collective",
    "checkpoint/connection.py": "what a frame has carried: from the agent of this node",
    "checkpoint/export.py": "the header that was just written",
    "checkpoint/refusal.py": "what ranks gather of each other, over the job's own collective",
    "checkpoint/session.py": "what ranks gather of each other, over the job's own collective",
    "cli/swarm.py": "the user's file of a tally, for which the command's tests are",
    "fleet/inventory/bmc.py": "what a node's BMC answers: tests/unit/fleet has a real server",
    "fleet/inventory/child.py": "what the parent of the collector's process has written",
    "testing/exact/life.py": "what the trial's own process has written for its rank",
    "testing/exact/moments.py": "what a rank of the trial has written, in a directory of its own",
    "testing/storage.py": "the note of an earlier run, which is left alone if it can't be read",
    "testing/writer.py": "the note of an earlier run; that it can't be read is said",
    "torch/corrections.py": "what a checkpoint held, which was validated before it is loaded",
    "torch/examine.py": "what the agent of this node asks its examiner",
    "torch/staged.py": "objects that the trainer has just encoded",
}
"""What else decodes, and why no stranger's bytes come there."""


def test_no_decoder_is_overlooked() -> None:
    """Whatever in the package reads with msgspec is fed here, or reads what we have just written;
    apart from the demo, which only reads its own, and the audit, which tests/audit/test_hostile.py
    feeds with whole files."""
    root = Path(handfast.__file__).parent
    calls = re.compile(r"msgspec\.(convert\(|(json|msgpack)\.(decode\(|Decoder))")
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if calls.search(path.read_text())
        and path.relative_to(root).parts[0] not in ("audit", "demo")
    }
    assert found == {*FED, *BY_OUR_OWN}
    listed = {target for targets in FED.values() for target in targets}
    assert listed | {"journal", "frames"} == {*fuzz.TARGETS}


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
