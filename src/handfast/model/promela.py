"""A pipeline in Promela, so that a checker of other people's making can confirm what ours found.

Each part of the network is a number, its state; each event is one indivisible command over the
numbers of those who share it. So spin (G. J. Holzmann, *The Spin Model Checker*, 2003) computes the
parallel composition and the search anew, from the parts alone, and its count of states can be held
against ours. What it does not check is how parts come out of a pipeline's Python.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from handfast.model.boundary import WATCH, broken, compose, instants
from handfast.model.network import Network
from handfast.model.pipeline import Pipeline

__all__ = ["export", "laws"]


def laws(pipeline: Pipeline) -> tuple[tuple[str, str, str], ...]:
    """Give (claim, fault, kind) of each assertion, in the order of their numbers from 1 on."""
    return tuple(
        (claim.words, fault, kind)
        for claim in instants(pipeline)
        for fault, kind in broken(compose(pipeline, claim))
    )


def export(pipeline: Pipeline) -> str:
    """Give a Promela model that chooses one of the pipeline's claims and attacks it.

    Assertion ``n == 0`` fails where law n of :func:`laws` is broken. Verify with ``spin -a``, then
    ``pan -E`` (a schedule may end). The states stored are those of all claims' searches together,
    and one before the choice.
    """
    claims = instants(pipeline)
    networks = [compose(pipeline, claim) for claim in claims]
    names = list(dict.fromkeys(name for network in networks for name in network.parts))
    most = max(len(part.terms) for network in networks for part in network.parts.values())
    kind = "byte" if most < 256 else "int"  # a part has no more than 50,000 states
    lines = [f"/* {pipeline.name}: {pipeline.about}. Made by handfast prove --promela. */"]
    lines += [f"{kind} p{i} = 0; /* {_plain(name)} */" for i, name in enumerate(names)]
    lines += ["", "init {", "\tif"]
    lines += [f"\t:: goto claim{k} /* {_plain(claim.words)} */" for k, claim in enumerate(claims)]
    lines += ["\tfi;"]
    number = 0
    for k, (claim, network) in enumerate(zip(claims, networks, strict=True)):
        order = [names.index(name) for name in network.parts]
        lines += [f"claim{k}:", "\tdo"]
        watcher = f"p{names.index(WATCH)}"
        for (fault, what), states in broken(network).items():
            number += 1
            lines.append(
                f"\t:: atomic {{ {_among(watcher, sorted(states))} -> assert({number} == 0) }} "
                f"/* {_plain(claim.words)}: {what} after {fault} */"
            )
        lines += list(_commands(network, order))
        lines.append("\t:: false")  # where a schedule ends, nothing can be done
        lines.append("\tod;")
    return "\n".join([*lines, "\tskip", "}", ""])


def _plain(words: str) -> str:
    return words.replace("*/", "* /")


def _among(variable: str, states: Sequence[int]) -> str:
    return "(" + " || ".join(f"{variable} == {state}" for state in states) + ")"


def _commands(network: Network, order: Sequence[int]) -> Iterator[str]:
    """One command for each event: whoever shares it allows it, and all go on."""
    parts = list(network.parts.values())
    alphabets = list(network.alphabets.values())
    rows: dict[Hashable, list[dict[int, list[int]]]] = {}
    for i, part in enumerate(parts):
        for state, row in enumerate(part.edges):
            for event, target in row:
                ways = rows.setdefault(event, [{} for _ in parts])
                ways[i].setdefault(state, []).append(target)
    for event, ways in rows.items():
        sharers = [i for i, alphabet in enumerate(alphabets) if event in alphabet]
        if all(ways[i] for i in sharers):
            guards = [_among(f"p{order[i]}", list(ways[i])) for i in sharers]
            updates = [_update(f"p{order[i]}", ways[i]) for i in sharers]
            certain = all(len(after) == 1 for i in sharers for after in ways[i].values())
            block = "d_step" if certain else "atomic"
            steps = "; ".join([" && ".join(guards), *(u for u in updates if u)])
            yield f"\t:: {block} {{ {steps} }} /* {_plain(str(event))} */"


def _update(variable: str, ways: dict[int, list[int]]) -> str:
    """Assign a part's next state; nothing where it stays as it is."""
    by_target: dict[int, list[int]] = {}
    for state, targets in ways.items():
        for target in targets:
            by_target.setdefault(target, []).append(state)
    if all(targets == [state] for state, targets in ways.items()):
        return ""
    if len(by_target) == 1:
        return f"{variable} = {next(iter(by_target))}"
    options = (f":: {_among(variable, s)} -> {variable} = {t}" for t, s in by_target.items())
    return f"if {' '.join(options)} fi"
