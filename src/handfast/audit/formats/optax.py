"""What the leaves of a JAX training's state are, by their paths: parameters, moments and counts.

A checkpoint keeps the names of a state's fields, and not its classes. So an optimizer's state is
known by which fields stand beside each other (optax 0.2.8, ``_src/transform.py``, ``transforms/``),
and a training's by ``opt_state`` beside ``step`` (flax 0.12.8, ``training/train_state.py``,
``nnx/training/optimizer.py``).
"""

from __future__ import annotations

from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Final, NamedTuple

from handfast.audit.found import Clock, Role

__all__ = ["Count", "Leaf", "Meaning", "Path", "meaning"]

Path = tuple[str, ...]

STATES: Final[Mapping[frozenset[str], Mapping[str, Role]]] = {
    frozenset(fields): {name: role for name, role in fields.items() if role is not None}
    for fields in (
        {"count": None, "mu": Role.FIRST, "nu": Role.SECOND},
        {"count": None, "mu": Role.FIRST, "nu": Role.SECOND, "nu_max": None},
        {"count": None, "mu": Role.MOMENTUM},  # Lion
        {"count": None, "mu": Role.MOMENTUM, "ns_coeffs": None},  # Muon
        {"count": None, "nu": Role.SECOND},  # RMSProp
        {"nu": Role.SECOND},
        {"trace": Role.MOMENTUM},  # SGD
        {"count": None, "v_row": None, "v_col": None, "v": None},  # Adafactor
    )
}
"""What each field of an optimizer's state holds, by all its fields.

AdaBelief, Yogi, Adamax and NovoGrad have Adam's fields, and |m| <= K sqrt(v) does not hold for all
of them: no betas are told.
"""

SCHEDULES: Final = (
    frozenset({"count"}),
    frozenset({"count", "hyperparams", "inner_state"}),
    frozenset({"count", "hyperparams", "hyperparams_states", "inner_state"}),
)
"""Fields of a schedule's state, and of injected hyperparameters'."""

SEVERAL: Final = frozenset({"mini_step", "gradient_step", "inner_opt_state"})
"""MultiSteps: what is within counts an update where what is around counts several."""

FINITE: Final = frozenset({"notfinite_count", "last_finite", "total_notfinite", "inner_state"})
"""apply_if_finite: what is within does not count what was not finite."""

AT_TIMES: Final = (frozenset({"inner_state", "step"}), frozenset({"adv_state", "steps_since_sync"}))
"""conditionally_transform, conditionally_mask and SAM: what is within is not updated each time."""


class Leaf(NamedTuple):
    """What a tensor is, and which parameter it belongs to ("" where that is not known)."""

    role: Role
    of: str


class Count(NamedTuple):
    """A leaf that counts; see :class:`handfast.audit.found.Counter`."""

    path: Path
    clock: Clock
    updates: bool
    skips: bool


class Meaning(NamedTuple):
    """What a tree's leaves are. ``scaled``: updates may be skipped that a training counts."""

    leaves: Mapping[Path, Leaf]
    counts: tuple[Count, ...]
    scaled: bool


def meaning(arrays: Mapping[Path, str], empty: Collection[Path] = ()) -> Meaning:
    """Say what the arrays of a tree are, by path and dtype. ``empty`` are leaves without values.

    A last key ``value`` of a leaf is a wrapper's (nnx), and does not count as a field.
    """
    bare = {_bare(path): path for path in arrays}
    fields: dict[Path, set[str]] = defaultdict(set)
    for path in (*bare, *map(_bare, empty)):
        for at, name in enumerate(path):
            fields[path[:at]].add(name)
    moments = _moments(bare, fields)
    leaves = _leaves(bare, arrays, moments)
    counts = _counts(bare, arrays, fields)
    scaled = any(names >= FINITE or "dynamic_scale" in names for names in fields.values())
    return Meaning(
        {bare[path]: leaf for path, leaf in leaves.items()},
        tuple(count._replace(path=bare[count.path]) for count in counts),
        scaled,
    )


def _bare(path: Path) -> Path:
    return path[:-1] if len(path) > 1 and path[-1] == "value" else path


class _Moment(NamedTuple):
    """A leaf of an optimizer's state: its role, whose state it is, its parameter's path in that."""

    role: Role
    scope: Path
    own: Path


def _moments(bare: Collection[Path], fields: Mapping[Path, set[str]]) -> dict[Path, _Moment]:
    found = {}
    for path in bare:
        for at in range(len(path) - 1, -1, -1):
            roles = STATES.get(frozenset(fields[path[:at]]))
            if roles is not None:
                scope = path[: path.index("opt_state")] if "opt_state" in path[:at] else ()
                role = roles.get(path[at], Role.OTHER)
                found[path] = _Moment(role, scope, path[at + 1 :])
                break
    return found


def _leaves(
    bare: Mapping[Path, Path], arrays: Mapping[Path, str], moments: Mapping[Path, _Moment]
) -> dict[Path, Leaf]:
    """Parameters are what has the moments' paths, below one prefix; else what is in ``params``."""
    tails: dict[Path, set[Path]] = defaultdict(set)
    for moment in moments.values():
        if moment.role is not Role.OTHER:
            tails[moment.scope].add(moment.own)
    prefixes: dict[Path, Tally[Path]] = {}
    others = [path for path in bare if path not in moments and "opt_state" not in path]
    for scope, tail in tails.items():
        near = [path for path in others if path[: len(scope)] == scope]
        for paths in (near, others):  # nnx has its model beside the optimizer
            found = Tally(
                path[:at] for path in paths for at in range(len(path)) if path[at:] in tail
            )
            if found:
                prefixes[scope] = found
                break
    homes = {
        max(tally, key=lambda prefix: (tally[prefix], "params" in prefix, -len(prefix))): scope
        for scope, tally in prefixes.items()
    }
    leaves = {}
    for path in bare:
        if path in moments:
            moment = moments[path]
            known = moment.role is not Role.OTHER
            of = ".".join((*moment.scope, *moment.own)) if known else ""
            leaves[path] = Leaf(moment.role, of)
        else:
            leaves[path] = _leaf(path, homes, arrays[bare[path]])
    return leaves


def _leaf(path: Path, homes: Mapping[Path, Path], dtype: str) -> Leaf:
    if "batch_stats" in path:
        return Leaf(Role.BUFFER, "")
    real = dtype.startswith(("float", "bfloat", "complex"))
    if not real or "opt_state" in path:
        return Leaf(Role.OTHER, "")
    for at in range(len(path)):
        if path[:at] in homes:
            return Leaf(Role.PARAMETER, ".".join((*homes[path[:at]], *path[at:])))
    if not homes and "params" in path[:-1]:
        return Leaf(Role.PARAMETER, ".".join(path[path.index("params") + 1 :]))
    return Leaf(Role.OTHER, "")


def _counts(
    bare: Mapping[Path, Path], arrays: Mapping[Path, str], fields: Mapping[Path, set[str]]
) -> list[Count]:
    """All that counts updates, or steps of a training.

    Within ``MultiSteps`` an update takes several steps of the training: then its own count is held
    against those within, and the training's against none.
    """
    several = [path for path, names in fields.items() if names >= SEVERAL]
    found = []
    for path in bare:
        if not arrays[bare[path]].startswith(("int", "uint")) or not path:
            continue
        home, name = path[:-1], path[-1]
        clock = _clock(home, name, fields)
        if clock is None:
            continue
        around = [frozenset(fields[path[:at]]) for at in range(len(path))]
        unsure = any(names == AT_TIMES[0] or names >= AT_TIMES[1] for names in around)
        inside = clock is not Clock.TRAINER and any(path[: len(at)] == at for at in several)
        alike = not several or (len(several) == 1 and inside)
        skips = clock is not Clock.TRAINER and any(
            names >= FINITE or "dynamic_scale" in names for names in around
        )
        found.append(Count(path, clock, alike and not unsure, skips))
    return found


def _clock(home: Path, name: str, fields: Mapping[Path, set[str]]) -> Clock | None:
    names = frozenset(fields[home])
    if name == "count" and names in SCHEDULES:
        return Clock.SCHEDULER if "opt_state" in home else None
    if (name == "count" and names in STATES) or (name == "gradient_step" and names >= SEVERAL):
        return Clock.OPTIMIZER
    return Clock.TRAINER if name == "step" and "opt_state" in names else None
