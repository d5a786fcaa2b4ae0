"""DeepSpeed's universal checkpoints: a directory a parameter, a file a state.

``ds_to_universal`` makes them of a ZeRO checkpoint: ``zero/PARAMETER/fp32.pt``, ``exp_avg.pt`` and
so on, each whole, with ``step.pt``; beside them the files of the model. A load takes whatever files
lie in a parameter's directory, so one that is missing is a state that starts anew. Facts: DeepSpeed
0.19.8, checkpoint/ds_to_universal.py, checkpoint/universal_checkpoint.py
(``load_hp_checkpoint_state``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from handfast.audit.finding import Code, Finding, Strength
from handfast.audit.formats.deepspeed_parts import Model
from handfast.audit.formats.parts import checked, torch_part, untold
from handfast.audit.formats.states import number
from handfast.audit.formats.zero import ROLES, Shapes, betas_of, settled
from handfast.audit.found import Clock, Counter, Part, Role, Tensor
from handfast.audit.place import Place
from handfast.audit.tree import values

__all__ = ["Universal", "inside", "ours", "read"]

COMMON: Final = "optimizer_state.pt"
MASTER: Final = "fp32"
STEP: Final = "step"
SLICES: Final = "tmp"


class Universal(NamedTuple):
    """What there is: a part a parameter, the files that are missing, and left-overs."""

    parts: list[Part]
    missing: list[tuple[str, str]]
    findings: list[Finding]


def inside(place: Place, folder: str) -> bool:
    """Whether a directory is a universal checkpoint, or one that is being made."""
    return any(f"{folder}/{name}".lstrip("/") in place.folders for name in ("zero", SLICES))


def ours(folder: str, path: str) -> bool:
    """Whether a file below a directory belongs to a universal checkpoint in it."""
    top = f"{folder}/" if folder else ""
    if path.startswith(f"{top}zero/"):
        return path.endswith(".pt")
    return path.startswith(f"{top}{SLICES}/")


def read(place: Place, folder: str, models: Sequence[Model], scaled: bool) -> Universal:
    """Read a universal checkpoint. ``models`` are the files of the model beside it."""
    top = f"{folder}/zero" if folder else "zero"
    shapes: Shapes = next((found for m in models if (found := m.shapes) is not None), [])
    kept = [m.root.get("buffer_names") for m in models[:1]]
    named = (name for names in kept if type(names) is list for name in names)
    buffers = {name for name in named if type(name) is str}
    counts = bool(models) and settled(models[0].root.get("ds_version"))
    step = Counter(Clock.OPTIMIZER, 0, "the step of its parameters", counts, scaled)
    group_of = {name: at for at, named in enumerate(shapes) for name in named}
    parts, betas = [], {}
    if (path := f"{top}/{COMMON}") in place.files:
        common = torch_part(place, path)
        common.part.tensors, common.part.counters, common.part.betas = (), (), {}
        common.part.untold = untold(common.said, ())
        parts.append(common.part)
        betas = _betas(common.root)
    states: dict[str, set[str]] = {}
    for inner in place.within(top):
        if inner in place.folders:
            name = inner.removeprefix(f"{top}/")
            master = Role.BUFFER if name in buffers else Role.MASTER
            part, states[name] = _parameter(place, inner, name, step, master)
            if name in group_of:
                part.betas = betas.get(group_of[name], {})
            parts.append(part)
    findings = []
    left = list(place.below(f"{folder}/{SLICES}".lstrip("/")))
    if left:
        says = (
            f"ds_to_universal did not come to its end in {folder}: its slices of parameters "
            f"({len(left)} files) are still there"
        )
        findings.append(Finding(Code.LEFTOVER, Strength.STRONG, "", says, tuple(left[:6])))
    return Universal(parts, list(_missing(top, shapes, states)), findings)


def _betas(root: Any) -> dict[int, Mapping[str, tuple[float, float]]]:
    """The betas of each group, as ``optimizer_state.pt`` has them."""
    groups = root.get("param_groups") if type(root) is dict else None
    found: dict[int, Mapping[str, tuple[float, float]]] = {}
    for at, group in enumerate(groups if type(groups) is list else ()):
        if type(group) is dict and (betas := betas_of(group)) is not None:
            found[at] = {"": betas}
    return found


def _parameter(
    place: Place, folder: str, name: str, step: Counter, master: Role
) -> tuple[Part, set[str]]:
    """A parameter's directory as one part, and which states it has."""
    part = Part(folder)
    tensors, problems = [], []
    paths = [path for path in place.within(folder) if path in place.files]
    states = {path.rpartition("/")[2].removesuffix(".pt"): path for path in paths}
    for state, path in states.items():
        part.nbytes += place.files[path].nbytes
        part.saved = max(part.saved, place.files[path].saved)
        found = torch_part(place, path)
        if found.part.problem:
            problems.append(found.part.problem)
        if state == STEP:
            value = number(found.root)
            if value is not None:
                part.counters = [
                    msgspec.structs.replace(step, value=value),
                    Counter(Clock.PARAMETER, value, name, updates=False),
                ]
            continue
        root = found.root
        node = values(root.get("param") if type(root) is dict else root)
        if node is not None:
            role = master if state == MASTER else ROLES.get(state, Role.OTHER)
            if role is Role.FIRST and "exp_avg_sq" not in states:
                role = Role.MOMENTUM
            tensors.append(Tensor(f"{name}/{state}", role, checked(node), name))
        elif root is not None:
            problems.append(
                f"{place.absolute(path)}: no parameter is in it, so DeepSpeed did not write it. "
                "What to do: take it from a copy"
            )
    part.tensors, part.problem = tensors, "; ".join(problems[:3])
    return part, set(states)


def _missing(top: str, shapes: Shapes, states: Mapping[str, set[str]]) -> Iterator[tuple[str, str]]:
    """The states that a parameter lacks and others of its group have."""
    for at, named in enumerate(shapes):
        usual: dict[str, int] = defaultdict(int)
        for name in named:
            for state in states.get(name, {MASTER}):
                usual[state] += 1
        for name in named:
            for state in sorted(usual.keys() - states.get(name, set())):
                why = f"the model trains {name}, and others of its group {at} have one"
                yield f"{top}/{name}/{state}.pt", why
