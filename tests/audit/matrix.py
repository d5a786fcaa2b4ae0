"""Every format, every fault: which of them an audit finds. Makes the table of docs/audit.md.

    python tests/audit/matrix.py            # each cell, and which files' faults were not found
    python -m tests.docs_audit              # writes the table

The checkpoints are those of `golden/`, which the real libraries wrote. A fault is made in a copy,
in one file after the other (a few of each kind), and is found if anything certain or strong is
said.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from handfast.audit.extent import Reader
from handfast.audit.finding import Strength
from handfast.audit.found import Role
from handfast.audit.place import look
from handfast.audit.run import audit, founds

GOLDEN: Final = Path(__file__).parent / "golden"

VARIANTS: Final = {
    "torch.save": "torch/ranks",
    "torch DCP": "dcp/fsdp2",
    "FSDP full state dict": "fsdp/one",
    "TorchTitan": "torchtitan/two",
    "Hugging Face Trainer": "trainer/alone",
    "Accelerate": "accelerate/alone",
    "Lightning": "lightning/one",
    "DeepSpeed ZeRO 1": "deepspeed/zero1-bf16-dp2",
    "DeepSpeed ZeRO 2": "deepspeed/zero2-fp16-dp3",
    "DeepSpeed ZeRO 3": "deepspeed/zero3-bf16-dp2",
    "Megatron-LM": "megatron/legacy-tp2-dp2",
    "Megatron-Core": "megatron/dist-dp2",
    "NVRx": "megatron/local-pp2-copies",
    "Orbax": "orbax/sharded",
    "flax": "flax/adam",
    "TensorFlow": "tensorflow/managed",
    "safetensors with index": "safetensors/sharded",
    "handfast": "../../golden/run1",
}
"""A run of each format, with several steps and parts where the format has them."""

EACH: Final = 6
"""Files of one run in which a fault is made, at most: of each kind of name the first, then more."""


class Spoiled(NamedTuple):
    """A copy with one fault: where it is, and in which file."""

    root: Path
    file: str


Fault = Callable[[Path, Path], Iterator[Spoiled]]


def files(run: Path) -> list[str]:
    """The files of a run, those of kinds that were not seen yet first."""
    every = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    kinds = {re.sub(r"\d+", "#", path): path for path in reversed(every)}
    first = sorted(kinds.values())
    return (first + [path for path in every if path not in first])[:EACH]


def copy(run: Path, home: Path) -> Path:
    """A fresh copy of a run."""
    root = home / "copy"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(run, root)
    return root


def each(change: Callable[[Path], object]) -> Fault:
    """A fault that is made in one file after the other."""

    def spoil(run: Path, home: Path) -> Iterator[Spoiled]:
        for file in files(run):
            root = copy(run, home)
            if change(root / file) is not False:
                yield Spoiled(root, file)

    return spoil


def cut(path: Path) -> bool:
    """Keep the first half."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return len(data) > 1


def emptied(path: Path) -> bool:
    """Keep nothing, as a full disk does."""
    held = path.stat().st_size > 0
    path.write_bytes(b"")
    return held


def bombed(path: Path) -> bool:
    """Put a pickle there that would run a command."""
    mark = path.parent / "EXECUTED"
    path.write_bytes(b"\x80\x04cos\nsystem\n(V/bin/touch " + os.fsencode(mark) + b"\ntR.")
    return True


def steps(run: Path) -> list[str]:
    """The directories or files of a run's steps, oldest first, as the audit names them."""
    with Reader() as reader:
        return [step.path for found in founds(look(run, reader)) for step in found.steps]


def twins(run: Path, differ: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """Pairs of files whose names are one but for what ``differ`` takes out, with other bytes."""
    groups: dict[str, list[str]] = {}
    for path in sorted(run.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(run))
            groups.setdefault(differ(name), []).append(name)
    told = 0
    for group in groups.values():
        one, other = group[0], group[-1]
        if one != other and (run / one).read_bytes() != (run / other).read_bytes():
            yield one, other
            told += 1
            if told >= EACH:
                return


def of_another_step(run: Path, home: Path) -> Iterator[Spoiled]:
    """A file of the last step is that of an earlier one: what a save that was cut short leaves."""
    known = steps(run)

    def without_step(name: str) -> str:
        inside = [step for step in known if step and name.startswith(f"{step}/")]
        return f"#/{name[len(inside[0]) + 1 :]}" if inside else name

    for old, new in twins(run, without_step):
        root = copy(run, home)
        shutil.copyfile(run / old, root / new)
        yield Spoiled(root, new)


def of_another_rank(run: Path, home: Path) -> Iterator[Spoiled]:
    """A file is that of another rank of the same step."""

    def without_rank(name: str) -> str:
        folder, _, last = name.rpartition("/")
        return f"{folder}/{re.sub(r'[0-9]+', '#', last)}"

    for one, other in twins(run, without_rank):
        root = copy(run, home)
        shutil.copyfile(run / one, root / other)
        yield Spoiled(root, other)


def repeated(run: Path, home: Path) -> Iterator[Spoiled]:
    """All files of the last step are those of the first: a stale state saved again."""
    known = [step for step in steps(run) if step and (run / step).is_dir()]
    if len(known) > 1:
        root = copy(run, home)
        shutil.rmtree(root / known[-1])
        shutil.copytree(run / known[0], root / known[-1])
        yield Spoiled(root, known[-1])


def half_deleted(run: Path, home: Path) -> Iterator[Spoiled]:
    """Of the last step only the first file is left."""
    known = [step for step in steps(run) if step and (run / step).is_dir()]
    for step in known[-1:]:
        root = copy(run, home)
        there = sorted(path for path in (root / step).rglob("*") if path.is_file())
        for path in there[1:]:
            path.unlink()
        if len(there) > 1:
            yield Spoiled(root, step)


def gone_step(run: Path, home: Path) -> Iterator[Spoiled]:
    """The step that a tracker names is gone."""
    known = [step for step in steps(run) if step]
    if len(known) > 1:
        root = copy(run, home)
        for path in [*root.rglob("*")]:
            name = str(path.relative_to(root))
            if path.is_file() and name.startswith((f"{known[-1]}/", f"{known[-1]}.")):
                path.unlink()
            elif name == known[-1]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield Spoiled(root, known[-1])


def values(change: Callable[[bytes], bytes], roles: Sequence[Role], dtypes: Sequence[str]) -> Fault:
    """A fault in the values of one tensor, wherever its bytes lie as they are."""

    def spoil(run: Path, home: Path) -> Iterator[Spoiled]:
        told = 0
        with Reader() as reader:
            every = [
                (part.path, tensor)
                for found in founds(look(run, reader))
                for step in found.steps
                for part in step.parts
                for tensor in part.tensors
                if tensor.role in roles and tensor.values.dtype in dtypes
            ]
            for path, tensor in every[:: max(1, len(every) // EACH)]:
                data = b"".join(bytes(block.cast("B")) for block in tensor.values.blocks(1 << 20))
                places = _places(run, data) if len(data) >= 16 and any(data) else []
                if not places:
                    continue
                root = copy(run, home)
                for file, at in places:
                    with open(root / file, "r+b") as opened:
                        opened.seek(at)
                        opened.write(change(data))
                yield Spoiled(root, f"{path}: {tensor.path}")
                told += 1
                if told >= EACH:
                    return

    return spoil


def _places(run: Path, data: bytes) -> list[tuple[str, int]]:
    """Where these bytes lie, in every file: some formats have them twice."""
    return [
        (str(path.relative_to(run)), at)
        for path in sorted(run.rglob("*"))
        if path.is_file() and (at := path.read_bytes().find(data)) >= 0
    ]


def with_nan(data: bytes) -> bytes:
    """The first float32 is a NaN."""
    return b"\x00\x00\xc0\x7f" + data[4:]


def one_bit(data: bytes) -> bytes:
    """The lowest bit of the first mantissa is another one."""
    return bytes([data[0] ^ 1]) + data[1:]


FAULTS: Final[dict[str, Fault]] = {
    "a file is gone": each(Path.unlink),
    "a file is cut": each(cut),
    "a file is empty": each(emptied),
    "a file of an earlier step": of_another_step,
    "a file of another rank": of_another_rank,
    "the last step repeats the first": repeated,
    "the last step is half deleted": half_deleted,
    "the newest step is gone": gone_step,
    "NaN in a moment": values(with_nan, (Role.FIRST, Role.SECOND), ("float32",)),
    "one bit of a value": values(one_bit, tuple(Role), ("float32", "bfloat16", "float16")),
    "a file is a hostile pickle": each(bombed),
}


class Cell(NamedTuple):
    """How many of how many faults were found, and the files of those that were not."""

    found: int
    made: int
    missed: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.found}/{self.made}" if self.made else ""


def cell(variant: str, fault: Fault) -> Cell:
    """Make one kind of fault in copies of one run."""
    run = GOLDEN / variant
    found, missed = 0, []
    with tempfile.TemporaryDirectory() as home:
        for spoiled in fault(run, Path(home)):
            told = audit(spoiled.root, deep=True)
            seen = any(finding.strength is not Strength.HINT for finding in told.findings)
            seen = seen or not any(listed.steps for listed in told.found)
            if seen:
                found += 1
            else:
                missed.append(spoiled.file)
            if any(spoiled.root.rglob("EXECUTED")):
                raise RuntimeError(f"{variant}: a pickle in {spoiled.file} was executed")
    return Cell(found, found + len(missed), tuple(missed))


def cells() -> dict[str, dict[str, Cell]]:
    """The whole table, by format and fault."""
    return {
        name: {fault: cell(variant, make) for fault, make in FAULTS.items()}
        for name, variant in VARIANTS.items()
    }


def main() -> int:
    """Print what was not found."""
    for name, row in cells().items():
        for fault, told in row.items():
            print(f"{name}: {fault}: {told}")
            for file in told.missed:
                print(f"    not found: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
