"""What the tests of formats share: copies of goldens to be spoilt, and what is found in them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from handfast.audit.checks import Look, check
from handfast.audit.extent import Reader
from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.found import Counter, Found, Part, Role, Step, Tensor
from handfast.audit.place import Place, look

GOLDEN = Path(__file__).parent / "golden"

Find = Callable[[Place], Iterator[Found]]


def copied(variant: str, tmp_path: Path, golden: Path = GOLDEN) -> Path:
    """A copy of a golden, to be spoilt; its times are those of the originals."""
    return Path(shutil.copytree(golden / variant, tmp_path / Path(variant).name))


def seen(find: Find, path: Path, reader: Reader | None = None) -> list[Found]:
    """What a format has at a path."""
    return list(find(look(path, reader or Reader())))


def only(find: Find, path: Path, reader: Reader | None = None) -> Found:
    """The one thing that a format has at a path."""
    (found,) = seen(find, path, reader)
    return found


def last(find: Find, path: Path, reader: Reader | None = None) -> Step:
    """Its last step."""
    return only(find, path, reader).steps[-1]


def findings(find: Find, path: Path, reader: Reader | None = None) -> list[Finding]:
    """What is wrong with that, by the format and by all checks, but for hints."""
    found = check(only(find, path, reader), Look(deep=True))
    return [finding for finding in found if finding.strength is not Strength.HINT]


def wrong(find: Find, path: Path) -> list[Finding]:
    """All that is wrong there, by the format and by all checks, hints too; but for times, which
    a checkout of this repository gives the goldens anew.
    """
    found = [each for one in seen(find, path) for each in check(one, Look(deep=True))]
    return [finding for finding in found if finding.code is not Code.TIMES]


def late(find: Find, path: Path) -> list[Finding]:
    """What times say there."""
    found = [each for one in seen(find, path) for each in check(one, Look(deep=True))]
    return [finding for finding in found if finding.code is Code.TIMES]


def codes(find: Find, path: Path, *strengths: Strength) -> set[Code]:
    """The kinds of what is wrong, of some strengths; without any, of all but hints."""
    wanted = strengths or (Strength.CERTAIN, Strength.STRONG)
    return {finding.code for finding in wrong(find, path) if finding.strength in wanted}


def certain(find: Find, path: Path) -> set[Code]:
    """The kinds of what is certain there."""
    return codes(find, path, Strength.CERTAIN)


def unclaimed(find: Find, path: Path) -> set[str]:
    """The files that a format leaves to others."""
    place = look(path, Reader())
    return set(place.files).difference(*(found.files for found in find(place)))


def step(found: Found, number: int) -> Step:
    """A step by its number."""
    return next(step for step in found.steps if step.number == number)


def part(step: Step, name: str) -> Part:
    """A part by how its path ends."""
    return next(part for part in step.parts if part.path.endswith(name))


def counters(step: Step) -> dict[str, Counter]:
    """The counters of a step by their paths."""
    return {counter.path: counter for part in step.parts for counter in part.counters}


def tensors(step: Step) -> dict[str, Tensor]:
    """The tensors of a step by their paths; of pieces the last."""
    return {tensor.path: tensor for part in step.parts for tensor in part.tensors}


def roles(step: Step) -> dict[str, tuple[Role, str]]:
    """What each tensor is, and whose."""
    return {path: (tensor.role, tensor.of) for path, tensor in tensors(step).items()}


def cut(path: Path, nbytes: int) -> None:
    """Leave only so many bytes of a file."""
    os.truncate(path, nbytes)


def flip(path: Path, at: int) -> None:
    """Turn one bit round."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


class Bomb:
    """Makes a file when it is unpickled by anything that executes pickles."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        """What a hostile pickle would call."""
        return os.mkdir, (str(self.mark),)
