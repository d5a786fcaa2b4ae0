"""The half of ``handfast prove`` that attacks pipelines: the catalogue's, and users' own."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from handfast.cli.console import DAMAGED, answer, answering, out
from handfast.errors import HandfastError
from handfast.model.boundary import NOON, instants
from handfast.model.catalogue import CATALOGUE
from handfast.model.paper import torn_at
from handfast.model.pipeline import Pipeline
from handfast.model.promela import export
from handfast.model.spacetime import draw, of_tear
from handfast.model.verdicts import HEAD, Verdict, examine, rows, story, values

__all__ = ["prove_pipelines"]

EVENTS = 13  # how far the paper's checkpoint is followed: one more would show nothing else


def prove_pipelines(file: str | None, svg: str | None, promela: str | None, as_json: bool) -> None:
    """Attack the pipelines of a file, or the catalogue's where none is given."""
    with answering(as_json):
        if file is None:
            _catalogue(as_json)
        else:
            _pipelines(file, svg, promela, as_json)


def _catalogue(as_json: bool) -> None:
    """Attack every pipeline of the catalogue, and every instant of the paper's checkpoint.

    Ends with 1 where no claim of a pipeline that the docs call sound holds, handfast's among them.
    """
    verdicts = [examine(make()) for make in CATALOGUE]
    torn = {n: [k for k in range(EVENTS) if torn_at(n, k)] for n in (1, 2, 3)}
    held = {verdict.pipeline: verdict.sound for verdict in verdicts if verdict.sound}
    sound = {"2pc", "manifest-last", "handfast"} <= held.keys()
    if as_json:
        answer({"catalogue": [values(v) for v in verdicts], "torn_instants": torn, "sound": sound})
    else:
        _show(verdicts)
        for n, after in torn.items():
            words = f"after {', '.join(map(str, after))} events" if after else "at no instant"
            out().print(f"The paper's checkpoint of {n} domain{'s' * (n > 1)}: torn {words}.")
    if not sound:
        raise click.exceptions.Exit(DAMAGED)


def _pipelines(file: str, svg: str | None, promela: str | None, as_json: bool) -> None:
    """Attack the pipelines that a file describes; ends with 1 where a claim of theirs is torn.

    ``svg`` gets the shortest schedule against the first claim that is torn, ``promela`` the model
    of the first pipeline. Raises ValueError where the file describes none that fits together.
    """
    found = _load(file)
    verdicts = [examine(pipeline) for pipeline in found]
    if promela is not None:
        Path(promela).write_text(export(found[0]), encoding="utf-8")
    if svg is not None:
        Path(svg).write_text(_picture(found, verdicts), encoding="utf-8")
    own = [f for verdict in verdicts for f in verdict.findings if f.claim != NOON.words]
    sound = all(finding.sound for finding in own)
    if as_json:
        answer({"pipelines": [values(verdict) for verdict in verdicts], "sound": sound})
    else:
        for finding in own:
            out().print("\n".join(map(escape, story(finding))))
        _show(verdicts)
    if not sound:
        raise click.exceptions.Exit(DAMAGED)


def _load(file: str) -> list[Pipeline]:
    if not Path(file).is_file():
        raise HandfastError(f"{file}: no such file. What to do: name one that describes a pipeline")
    try:
        names = runpy.run_path(file)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{file} can't be run: {type(error).__name__}: {error}") from error
    found = [value for value in names.values() if isinstance(value, Pipeline)]
    if not found:
        raise ValueError(
            f"{file} describes no pipeline. Assign a handfast.model.pipeline.Pipeline to a name"
        )
    return found


def _picture(found: Sequence[Pipeline], verdicts: Sequence[Verdict]) -> str:
    for pipeline, verdict in zip(found, verdicts, strict=True):
        for claim, finding in zip(instants(pipeline), verdict.findings, strict=True):
            if (tear := finding.tear()) is not None:
                return draw(of_tear(pipeline, claim, tear))
    raise ValueError("nothing is torn, so there is nothing to draw")


def _show(verdicts: Sequence[Verdict]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in HEAD:
        table.add_column(name, justify="right" if name == "states" else "left")
    for row in rows(verdicts):
        table.add_row(*(f"[green]{c}[/]" if c == "holds" else escape(c) for c in row))
    out().print(table)
