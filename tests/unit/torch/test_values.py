"""Shows that what is read from files into live tensors is all of it, right, and never damaged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from statekit import same_bytes
from torch import Tensor

from handfast.checkpoint import validated
from handfast.checkpoint.validated import Validated
from handfast.core.lattice import Epoch
from handfast.errors import Damaged
from handfast.store.claims import identify
from handfast.store.directory import Directory, claim
from handfast.store.files import Files, Posix
from handfast.store.image import plan
from handfast.store.manifest import Stamp
from handfast.store.port import Written
from handfast.testing.faults import Hasty
from handfast.torch.capture import capture
from handfast.torch.stage import Canvas, stage
from handfast.torch.values import Stored

MEBI = 1 << 20


class Saver:
    """One domain, and epochs of a state in it."""

    def __init__(self, root: Path, files: Files | None = None) -> None:
        self.files = files or Hasty()
        self.identity = identify(self.files, str(root), "rank0", run="run", shard=0)
        self.directory: Directory = claim(self.files, str(root), "rank0")
        self.written: Written | None = None

    def save(self, state: dict[str, object], step: int) -> Validated:
        """Save it; chunks that did not change are those of the epoch before."""
        captured = capture(state, rng=False)
        layout = plan(captured.specs)
        image = bytearray(layout.padded)
        image[: len(layout.header)] = layout.header
        stage(captured, Canvas(layout.slots, image)).wait()
        parent = self.written.manifest if self.written else None
        self.written = self.directory.write(
            Stamp("run", "main", 1, step, self.identity.id, 0, 1, 1, "c", _epoch(parent)),
            layout, image, objects=b"", aliases={}, environment={}, replicated=(), structure="",
            parent=parent,
        )  # fmt: skip
        return Validated(self.directory, self.written.manifest)

    def data(self) -> list[Path]:
        """The data files, the oldest first."""
        return sorted(Path(self.directory.path).glob("1/chunks/*"), key=os.path.getmtime)


def _epoch(parent: Any) -> Epoch | None:
    return parent.stamp.epoch if parent else None


def varied() -> dict[str, Tensor]:
    """Tensors of all kinds of sizes: larger than what is read at once, and as small as none."""
    torch.manual_seed(7)
    made = {f"large{n}": torch.rand(3 * MEBI // 4 * n + n) for n in range(1, 4)}
    made |= {f"small{n}": torch.rand(n % 7, 3) for n in range(300)}
    made |= {
        "double": torch.rand(1000, dtype=torch.float64),
        "half": torch.rand(33).half(),
        "brain": torch.rand(5, 5).bfloat16(),
        "flag": torch.tensor(True),
        "wide": torch.rand(9, dtype=torch.complex128),
        "scalar": torch.tensor(3.5),
    }
    return made


def blank(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {path: torch.zeros_like(tensor) for path, tensor in state.items()}


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("deltas", [False, True])
def test_every_tensor_has_its_values(tmp_path: Path, lanes: int, deltas: bool) -> None:
    """Shows it for one reader and for several, from one file and from those of several epochs."""
    files = Hasty()
    files.lanes = lanes
    state, saver = varied(), Saver(tmp_path, files)
    copy = saver.save(dict(state), 1)
    for step in (2, 3) if deltas else ():
        state[f"large{step - 1}"].add_(1)
        copy = saver.save(dict(state), step)
    assert len(copy.manifest.sources) == (3 if deltas else 1)
    live, values = blank(state), Stored([copy])
    values.fill([(live[path], path) for path in live])
    assert all(same_bytes(live[path], state[path]) for path in state)
    for path in ("large3", "small3", "small0", "half", "scalar"):
        assert same_bytes(values.view(path), state[path])


def test_what_does_not_lie_as_the_image_does_is_filled_too(tmp_path: Path) -> None:
    """Shows it of strides, of a conjugated view, of repeats, of another dtype, and of a tensor
    that was made in inference mode: each has the values, and what lies between them is left."""
    state = {
        "turned": torch.rand(700, 900),
        "conj": torch.rand(40, dtype=torch.complex64),
        "wide": torch.rand(1, 30).expand(20, 30).contiguous(),
        "exact": torch.arange(30.0),
        "own": torch.rand(10),
    }
    copy = Saver(tmp_path).save(dict(state), 1)
    room = torch.full((900, 1400), -1.0)
    with torch.inference_mode():
        own = torch.zeros(10)
    live = {
        "turned": room[:, ::2].t(),
        "conj": torch.zeros(40, dtype=torch.complex64).conj(),
        "wide": torch.zeros(1, 30).expand(20, 30),
        "exact": torch.zeros(30, dtype=torch.float64),
        "own": own,
    }
    Stored([copy]).fill([(live[path], path) for path in live])
    assert all(torch.equal(live[path].to(state[path].dtype), state[path]) for path in state)
    assert (room[:, 1::2] == -1).all()


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """Shows that a part of a state costs a part of the reading."""

    class Counting(Hasty):
        nbytes = 0

        def pread(self, fd: int, into: memoryview, offset: int) -> int:
            self.nbytes += len(into)
            return super().pread(fd, into, offset)

    state = varied()
    files = Counting()
    copy = Saver(tmp_path, files).save(dict(state), 1)
    files.nbytes = 0
    live = torch.zeros_like(state["double"])
    Stored([copy]).fill([(live, "double")])
    assert same_bytes(live, state["double"])
    assert 0 < files.nbytes <= 4 * MEBI


@pytest.mark.parametrize("where", ["large3", "small290"])
def test_damage_between_the_two_reads_stops_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Shows that a chunk which was found valid, and is not any more, is named with its place,
    whether it is read to where it belongs or copied there; and that no tensor but those in that
    chunk has any bytes but its own."""
    monkeypatch.setattr(validated, "PAUSE", 0.0)
    state, saver = varied(), Saver(tmp_path)
    copy = saver.save(dict(state), 1)
    (slot,) = [slot for slot in copy.manifest.slots if slot.spec.path == where]
    (path,) = saver.data()
    data = bytearray(path.read_bytes())
    at = slot.start + slot.nbytes // 2
    data[at] ^= 1
    path.write_bytes(data)
    live = blank(state)
    with pytest.raises(Damaged, match=f"chunk {at // MEBI} of epoch 1/1, at byte .* differs from"):
        Stored([copy]).fill([(live[name], name) for name in live])
    for name, tensor in live.items():
        flat, right = tensor.reshape(-1).view(torch.uint8), state[name].reshape(-1)
        unlike = flat != right.view(torch.uint8)
        assert name == where or not flat[unlike].any(), f"{name} has bytes of no epoch"


def test_an_error_that_passes_costs_no_restore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that what reads wrong once, and right the next time, is loaded."""
    monkeypatch.setattr(validated, "PAUSE", 0.0)

    class Once(Hasty):
        left = 0

        def pread(self, fd: int, into: memoryview, offset: int) -> int:
            count = super().pread(fd, into, offset)
            if self.left:
                self.left -= 1
                into[0] ^= 1
            return count

    files = Once()
    state = varied()
    copy = Saver(tmp_path, files).save(dict(state), 1)
    files.left = 1
    live = blank(state)
    Stored([copy]).fill([(live[path], path) for path in live])
    assert files.left == 0
    assert all(same_bytes(live[path], state[path]) for path in state)


def test_a_load_counts_as_a_change_to_autograd(tmp_path: Path) -> None:
    """Shows that a backward pass over what was loaded in between is refused, as torch does."""
    saver = Saver(tmp_path, Posix())
    copy = saver.save({"w": torch.rand(4)}, 1)
    live = torch.rand(4, requires_grad=True)
    loss = live.square().sum()
    Stored([copy]).fill([(live.detach(), "w")])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("count", [3, 5])
def test_what_has_another_size_is_never_written_past(tmp_path: Path, count: int) -> None:
    """Shows that a tensor of another shape stops the load, and that its neighbours are left."""
    copy = Saver(tmp_path).save({"w": torch.rand(4)}, 1)
    room = torch.full((9,), -1.0)
    with pytest.raises(RuntimeError):
        Stored([copy]).fill([(room[2 : 2 + count], "w")])
    assert (room == -1).all()


def test_one_stored_tensor_fills_several(tmp_path: Path) -> None:
    """Shows it of small ones and of large ones, of which a part lies in each of several blocks."""
    state = {"small": torch.rand(5), "large": torch.rand(3 * MEBI), "last": torch.rand(5)}
    copy = Saver(tmp_path).save(dict(state), 1)
    live = [(torch.zeros_like(state[path]), path) for path in (*state, *state)]
    Stored([copy]).fill(live)
    assert all(same_bytes(tensor, state[path]) for tensor, path in live)
