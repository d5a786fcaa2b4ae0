"""The half of ``handfast prove`` that attacks pipelines: the catalogue's, and users' own."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb
from typing import Final

import click
import msgspec
from rich.markup import escape

from handfast.cli.console import DAMAGED, answer, answering, out, tabulate
from handfast.errors import HandfastError
from handfast.model.boundary import NOON, Kind, instants
from handfast.model.catalogue import CATALOGUE
from handfast.model.paper import torn_at
from handfast.model.pipeline import Pipeline
from handfast.model.promela import export
from handfast.model.spacetime import draw, of_tear
from handfast.model.verdicts import HEAD, Verdict, examine, rows, story, values

__all__ = ["prove_pipelines"]

WORST: Final[tuple[Kind, ...]] = ("mixed", "torn", "lost")  # in silence, in part, by what is gone
EVENTS = 13  # how far the paper's checkpoint is followed: one more would show nothing else


class Written(msgspec.Struct, frozen=True):
    """A file that was written: of which pipeline, and what it shows."""

    path: str
    pipeline: str
    what: str


def prove_pipelines(
    file: str | None, svg: str | None, claim: str, promela: str | None, as_json: bool
) -> None:
    """Attack the pipelines of a file, or the catalogue's where none is given."""
    with answering(as_json):
        if file is None:
            _catalogue(as_json)
        else:
            _pipelines(file, svg, claim, promela, as_json)


def _catalogue(as_json: bool) -> None:
    """Attack every pipeline of the catalogue, and every instant of the paper's checkpoint.

    Ends with 1 where no claim of a pipeline that the docs call sound holds, handfast's among them.
    """
    verdicts = [examine(make()) for make in CATALOGUE]
    broken = {n: [k for k in range(EVENTS) if torn_at(n, k)] for n in (1, 2, 3)}
    held = {verdict.pipeline: verdict.sound for verdict in verdicts if verdict.sound}
    sound = {"2pc", "manifest-last", "handfast"} <= held.keys()
    if as_json:
        answer(
            {"catalogue": [values(v) for v in verdicts], "torn_instants": broken, "sound": sound}
        )
    else:
        _show(verdicts)
        for n, after in broken.items():
            words = f"after {', '.join(map(str, after))} events" if after else "at no instant"
            out().print(f"The paper's checkpoint of {n} domain{'s' * (n > 1)}: broken {words}.")
        out().print(f"(Of each the first {EVENTS - 1} events were followed.)")
    if not sound:
        raise click.exceptions.Exit(DAMAGED)


def _pipelines(file: str, svg: str | None, claim: str, promela: str | None, as_json: bool) -> None:
    """Attack the pipelines that a file describes; ends with 1 where a claim of theirs is broken.

    ``svg`` gets a shortest schedule against a claim that says ``claim``, ``promela`` the model of
    the first pipeline; which one it is of is told. Raises ValueError where the file describes none
    that fits together.
    """
    found = _load(file)
    with _blaming(file):
        verdicts = [examine(pipeline) for pipeline in found]
        model = export(found[0]) if promela is not None else ""
    written = []
    if promela is not None:
        Path(promela).write_text(model, encoding="utf-8")
        written.append(Written(promela, found[0].name, "its model for spin"))
    if svg is not None:
        drawn, picture = _picture(found, verdicts, claim)
        Path(svg).write_text(picture, encoding="utf-8")
        written.append(Written(svg, *drawn))
    own = [f for verdict in verdicts for f in verdict.findings if f.claim != NOON.words]
    sound = all(finding.sound for finding in own)
    if as_json:
        told = [values(verdict) for verdict in verdicts]
        answer({"pipelines": told, "written": written, "sound": sound})
    else:
        for verdict in verdicts:
            _tell(verdict)
        _show(verdicts)
        for each in written:
            line = f"wrote {each.path}: pipeline {each.pipeline}, {each.what}"
            out().print(line, markup=False)
    if not sound:
        raise click.exceptions.Exit(DAMAGED)


def _tell(verdict: Verdict) -> None:
    """Tell what became of a pipeline's own claims, and of what its restart takes no notice."""
    for finding in verdict.findings:
        if finding.claim != NOON.words:
            out().print("\n".join(map(escape, story(finding))))
    if verdict.unread:
        places = ", ".join(verdict.unread)
        out().print(f"{verdict.pipeline}: its restart never reads {places}", markup=False)


def _load(file: str) -> list[Pipeline]:
    if not Path(file).is_file():
        what = "is a directory" if Path(file).is_dir() else "no such file"
        raise HandfastError(f"{file}: {what}. What to do: name a file that describes a pipeline")
    beside = str(Path(file).resolve().parent)
    sys.path.insert(0, beside)  # as Python does for a file that it runs
    try:
        names = runpy.run_path(file)
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{_where(file, error)}: it can't be run: {why}") from error
    finally:
        sys.path.remove(beside)
    found = [value for value in names.values() if isinstance(value, Pipeline)]
    if not found:
        raise ValueError(
            f"{file} describes no pipeline. Assign a handfast.model.pipeline.Pipeline to a name"
        )
    return found


def _where(file: str, error: BaseException) -> str:
    """Name a file, and the last line of it that led to an error, if any did."""
    own = [at for at in extract_tb(error.__traceback__) if at.filename == file]
    return f"{file}, line {own[-1].lineno}" if own else file


@contextmanager
def _blaming(file: str) -> Iterator[None]:
    """Tell an error of what a file describes as one of the file, with its line where it has one.

    A process is only called when it is followed, so what it does wrong shows late.
    """
    try:
        yield
    except (ValueError, HandfastError):  # in words already
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{_where(file, error)}: a process that can't be followed: {why}. What to do: "
            "give events, joined by >>, and at the end STOP or a call; docs/pipelines.md"
        ) from error


def _picture(
    found: Sequence[Pipeline], verdicts: Sequence[Verdict], text: str
) -> tuple[tuple[str, str], str]:
    """Draw the worst that was found against claims that say a text: mixed, torn, then lost.

    Gives the pipeline's name and what is drawn, then the picture. What the clock claims is drawn
    only where nothing else is broken, or where it is asked for. Raises ValueError where there is
    nothing to draw.
    """
    claims = [
        (pipeline, claim, finding)
        for pipeline, verdict in zip(found, verdicts, strict=True)
        for claim, finding in zip(instants(pipeline), verdict.findings, strict=True)
    ]
    chosen = [one for one in claims if text in one[1].words]
    if not chosen:
        known = ", ".join(repr(claim.words) for _, claim, _ in claims)
        raise ValueError(f"no claim says {text!r}. What to do: name a part of one of {known}")
    ways = [(pipeline, claim, tear) for pipeline, claim, f in chosen for tear in f.tears]
    if not ways:
        raise ValueError(f"nothing breaks {chosen[0][1].words!r}, so there is nothing to draw")
    worst = min(
        ways, key=lambda way: (way[1] is NOON, WORST.index(way[2].kind), len(way[2].events))
    )
    pipeline, broken, tear = worst
    return (pipeline.name, f"saved {broken.words}: {tear.kind}"), draw(of_tear(*worst), alone=True)


def _show(verdicts: Sequence[Verdict]) -> None:
    lines = [
        [f"[green]{cell}[/]" if cell == "holds" else escape(cell) for cell in row]
        for row in rows(verdicts)
    ]
    tabulate(HEAD, lines, [at for at, name in enumerate(HEAD) if name != "states"])
