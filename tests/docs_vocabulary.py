"""The vocabularies of docs/scripts.md and docs/pipelines.md, from the docstrings of what runs.

``python -m tests.docs_vocabulary`` writes them anew; ``tests/test_docs.py`` fails where they are
stale.
"""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.docs_page import filled

from handfast.model.pipeline import (
    Actor,
    Barrier,
    Claim,
    Event,
    Mail,
    Pipeline,
    Place,
    Restart,
    choice,
    process,
)
from handfast.sim.script import VERBS

DOCS = Path(__file__).parents[1] / "docs"
WHOLE = DOCS.parent / "examples" / "pipelines" / "barrier_with_timeout.py"
SAMPLES = {
    "place": Place("file"),
    "barrier": Barrier("barrier", ("rank 0",)),
    "mail": Mail("mail"),
    "epoch": 1,
    "what": "anything",
}


def table(head: list[str], rows: Iterator[list[str]]) -> str:
    """A table of Markdown; what would end a cell is spelled out."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in line)} |\n"
                   for line in lines)  # fmt: skip


def words(thing: Any) -> str:
    """All that a docstring says, in one line of Markdown."""
    return " ".join((inspect.getdoc(thing) or "").replace("``", "`").split())


def written(name: str, thing: Callable[..., Any]) -> str:
    """How a thing is called: its arguments by name, with their defaults."""
    parameters = inspect.signature(thing).parameters.values()
    given = [str(p.replace(annotation=p.empty)) for p in parameters if p.name != "self"]
    return f"`{name}({', '.join(given)})`"


def methods(owner: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What a class of the vocabulary lets one write, in the order of its source."""
    for name, method in vars(owner).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            yield name, method


def said(name: str) -> str:
    """The events of a verb, by what a Claim calls them."""
    verb = getattr(Actor("rank 0"), name)
    made = verb(*(SAMPLES[p] for p in inspect.signature(verb).parameters))
    events = [made] if isinstance(made, Event) else list(made)
    return ", then ".join(f"`{event.does}`" for event in events)


def script() -> str:
    """The verbs of scripts."""
    return table(["verb", ""], ([f"`{name}`", words(do)] for name, do in VERBS.items()))


def things() -> str:
    """What a pipeline is made of."""
    made = (Actor, Place, Barrier, Mail, Restart, Claim, Pipeline, process, choice)
    return table(["", ""], ([written(t.__name__, t), words(t)] for t in made))


def acts() -> str:
    """What an actor does, and by which words a claim names it."""
    rows = ([written(name, do), words(do), said(name)] for name, do in methods(Actor))
    return table(["an actor", "", "its events"], rows)


def restarts() -> str:
    """What a restart does."""
    rows = ([written(name, do), words(do)] for name, do in methods(Restart))
    return table(["a restart", ""], rows)


def whole() -> str:
    """A file to copy, which `tests/model/test_prove_pipelines.py` runs."""
    return f"```python\n{WHOLE.read_text(encoding='utf-8')}```\n"


PAGES: dict[str, tuple[tuple[str, Callable[[], str]], ...]] = {
    "scripts.md": (("verbs: made from handfast.sim.script", script),),
    "pipelines.md": (
        ("things: made from handfast.model.pipeline", things),
        ("acts: made from handfast.model.pipeline", acts),
        ("restarts: made from handfast.model.pipeline", restarts),
        ("file: made from examples/pipelines/barrier_with_timeout.py", whole),
    ),
}


def page(name: str, text: str) -> str:
    """Put the tables into a page's places for them."""
    for mark, made in PAGES[name]:
        text = filled(text, mark, made())
    return text


if __name__ == "__main__":
    for each in PAGES:
        path = DOCS / each
        path.write_text(page(each, path.read_text(encoding="utf-8")), encoding="utf-8")
