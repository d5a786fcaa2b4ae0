"""Shows that no bytes, whoever wrote them, make an audit fail, hang, or run anything."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.audit.matrix import GOLDEN, VARIANTS, files

from handfast.audit.finding import Code, Strength
from handfast.audit.formats import FORMATS
from handfast.audit.found import Found
from handfast.audit.place import Place
from handfast.audit.run import audit

EACH = 3
HEAVY = 200


def spoiled(data: bytes, chance: random.Random) -> bytes:
    """Bytes with a few of them changed, cut out, doubled, or taken from elsewhere."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        if not made:
            break
        at, span = chance.randrange(len(made)), chance.choice((1, 2, 4, 8, 64))
        match chance.randrange(5):
            case 0:
                made[at : at + span] = chance.randbytes(len(made[at : at + span]))
            case 1:
                del made[at : at + span]
            case 2:
                made[at:at] = made[at : at + span]
            case 3:
                made[at : at + span] = b"\xff" * len(made[at : at + span])
            case _:
                other = chance.randrange(len(made))
                made[at : at + span] = made[other : other + span]
    return bytes(made)


def spoil(variant: str, home: Path, times: int) -> int:
    """Audit a run with one file spoiled, for each of its kinds of files; says how often."""
    chance = random.Random(variant)
    root = home / "run"
    shutil.copytree(GOLDEN / variant, root)
    done = 0
    for name in files(root):
        path, whole = root / name, (root / name).read_bytes()
        for _ in range(times):
            path.write_bytes(spoiled(whole, chance))
            audit(root, deep=True)
            done += 1
        path.write_bytes(whole)
    assert not [path for path in home.rglob("EXECUTED") if path.exists()]
    return done


@pytest.mark.parametrize("variant", VARIANTS.values())
def test_spoiled_files_are_told_and_never_raised(variant: str, tmp_path: Path) -> None:
    """Whatever a file of a format has become: an audit says so, or finds nothing, and ends."""
    assert spoil(variant, tmp_path, EACH) >= EACH


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", VARIANTS.values())
def test_spoiled_files_many_more(variant: str, tmp_path: Path) -> None:
    """The same, with as many as there is time for."""
    assert spoil(variant, tmp_path, HEAVY) >= HEAVY


def test_a_reader_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of this program in one format leaves the other formats as they are."""

    def failing(place: Place) -> Iterator[Found]:
        yield from ()
        raise KeyError(len(place.files))

    monkeypatch.setattr("handfast.audit.run.FORMATS", (failing, *FORMATS))
    shutil.copytree(GOLDEN / "torch/bare", tmp_path / "run")
    told = audit(tmp_path / "run")
    (finding,) = [f for f in told.findings if f.strength is not Strength.HINT]
    assert (finding.code, finding.strength) == (Code.UNREADABLE, Strength.STRONG)
    assert "KeyError" in finding.says
    assert "report this" in finding.says
    assert any(listed.steps for listed in told.found)


class Runs:
    """What runs a command where pickle loads it."""

    def __init__(self, what: object, *args: object) -> None:
        self.what, self.args = what, args

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.what, self.args


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("what", [os.system, eval, subprocess.check_call])
def test_an_entry_that_would_run_code_is_told_of(
    what: object, zipped: bool, tmp_path: Path
) -> None:
    """In a file that is sound otherwise: by name, strong, and not run; its like does no harm."""
    touched = tmp_path / "touched"
    state = {"model": torch.nn.Linear(2, 2).state_dict(), "step": 3}
    command = f"open({str(touched)!r}, 'w')" if what is eval else f"touch {touched}"
    torch.save(
        {**state, "args": Runs(what, command)},
        tmp_path / "step_3.pt",
        _use_new_zipfile_serialization=zipped,
    )
    found = audit(tmp_path)
    (told,) = [each for each in found.findings if each.code is Code.HARMFUL]
    assert told.strength is Strength.STRONG
    assert f".{getattr(what, '__name__', '')}, which runs code" in told.says
    assert not touched.exists()
    torch.save({**state, "args": Runs(sum, [1])}, tmp_path / "step_3.pt")
    assert Code.HARMFUL not in [each.code for each in audit(tmp_path).findings]


def test_odd_files_and_directories_are_no_trouble(tmp_path: Path) -> None:
    """Pipes, sockets, dangling links, loops, names of no text, a million levels' worth of depth."""
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nothing")
    with open(os.fsencode(tmp_path) + b"/\xff\xfe.pt", "wb") as file:
        file.write(b"PK\x03\x04")
    deep = tmp_path
    for _ in range(40):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "model.pt").write_bytes(b"\x80\x02}.")
    (tmp_path / "latest").write_text("../../../../etc/passwd")
    told = audit(tmp_path)
    assert told.sound is False


# What would take all memory


def bomb(unit: bytes, nbytes: int) -> bytes:
    """A pickle of a list of what some opcodes make, again and again."""
    row = b"(" + unit * (1 << 12) + b"e"
    return b"\x80\x04cposix\nsystem\n\x940]" + row * (nbytes // len(row)) + b"."


UNITS = {
    "dicts": b"}",
    "lists": b"]",
    "sets": b"\x8f",
    "dicts of one": b"}K\x00Ns",
    "tuples": b"N\x85",
    "puts": b"N\x94",
    "calls": b"h\x00)R",
    "calls with pairs": b"h\x00)RNNs",
    "persistent ids": b"NQ",
    "numbers": b"J\xff\xff\xff\x7f",
    "floats": b"G" + bytes(8),
    "texts": b"\x8c\x02\xc3\xa9",
    "sets of numbers": b"\x8f(" + b"".join(b"J" + struct.pack("<i", n << 9) for n in range(8))
    + b"\x90",
    "buffers": b"\x97",
}  # fmt: skip

SLICE = {"dicts", "puts", "calls with pairs", "texts"}

LOOK = """
import sys
from handfast.audit.run import audit
told = audit(sys.argv[1], deep=True, memory=int(sys.argv[2]))
(peak,) = [int(row.split()[1]) for row in open("/proc/self/status") if row.startswith("VmHWM")]
print(peak, [finding.says for finding in told.findings], sep="\\n")
"""


def peak(path: Path, memory: int) -> tuple[int, str]:
    """The most memory that an audit in a process of its own took, in bytes, and what it said."""
    looked = subprocess.run(
        [sys.executable, "-c", LOOK, str(path), str(memory)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    most, says = looked.stdout.split("\n", 1)
    return int(most) << 10, says


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells no peak of memory")
@pytest.mark.parametrize(
    "kind",
    [kind if kind in SLICE else pytest.param(kind, marks=pytest.mark.heavy) for kind in UNITS],
)
def test_a_pickle_takes_no_more_memory_than_it_may(kind: str, tmp_path: Path) -> None:
    """Millions of small things in some megabytes: as many as fit are read, and more are refused; of
    neither the audit takes more than it was given, beside what it takes for an empty file.
    """
    memory, file = 64 << 20, tmp_path / "model_step_3.pt"

    def written(unit: bytes, nbytes: int) -> None:
        with zipfile.ZipFile(file, "w") as made:
            made.writestr("archive/data.pkl", bomb(unit, nbytes))
            made.writestr("archive/version", "3\n")

    written(b"N", 1)
    least, _ = peak(tmp_path, memory)
    written(UNITS[kind], 1 << 14)
    size = 1 << 14
    while "not read" not in (told := peak(tmp_path, memory))[1] and size < 24 << 20:
        assert told[0] - least < memory + 3 * size, (kind, size)
        size = size * 3 // 2 if size > 1 << 20 else size * 8
        written(UNITS[kind], size)
    assert told[0] - least < memory + 3 * size, (kind, size)
    if size < 24 << 20:
        assert "too many objects: more than 67,108,864 bytes of memory for them" in told[1]
        assert "--memory" in told[1]


def test_what_is_too_much_is_no_damage(tmp_path: Path) -> None:
    """It may be sound, so that it is not certain; with more memory it is read."""
    state = {f"layer.{at}": torch.ones(2) for at in range(2000)}
    torch.save(state, tmp_path / "model_step_3.pt")
    (finding,) = audit(tmp_path, memory=1 << 20).findings
    assert (finding.code, finding.strength) == (Code.UNREADABLE, Strength.STRONG)
    assert audit(tmp_path).sound


def test_a_state_of_ten_thousand_parameters_is_read(tmp_path: Path) -> None:
    """With moments and counts of each, in a time that goes with their number."""
    count = 10_000
    optimizer = {
        "state": {
            at: {"step": 3, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
            for at in range(count)
        },
        "param_groups": [{"params": [*range(count)], "betas": (0.9, 0.99), "amsgrad": False}],
    }
    torch.save({"optimizer": optimizer}, tmp_path / "all_step_3.pt")
    told = audit(tmp_path)
    assert told.sound
    assert sum(step.tensors for listed in told.found for step in listed.steps) == 2 * count
