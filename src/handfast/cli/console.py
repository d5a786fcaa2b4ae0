"""What all commands share: where they write, how they fail, how long work is shown."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import reprlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

import click
import msgspec
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement, measure_renderables
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars
from rich.segment import Segment
from rich.table import Table

from handfast.core.lattice import Epoch
from handfast.core.verdict import Verdict
from handfast.errors import Damaged, HandfastError, Refused
from handfast.store.files import describe, remedy
from handfast.store.port import Progress

__all__ = [
    "Number",
    "Whole",
    "answer",
    "answering",
    "apart",
    "as_json",
    "epoch_of",
    "fitting",
    "is_default",
    "lay",
    "make",
    "out",
    "paths",
    "place_for",
    "showing",
    "step",
    "tabulate",
    "telling_how_far",
    "write_into",
]

DAMAGED: Final = 1
USAGE: Final = 2
NO_LOOK: Final = 3
PIPE: Final = 141
BY_SIGNAL: Final = 128  # and the signal's number, as shells count
MISSING: Final = "it, or a directory on the way to it, is not there: check the path"
RUNS: Final = "RUN: the run's directory; several, globs and '{rank}' templates are joined."
ANY_WIDTH: Final = 10_000
WIDTH: Final = 200  # columns of a table that goes to a file or a pipe


def epoch_of(_: click.Context, __: click.Parameter, text: str | None) -> int | Epoch | None:
    """Read a step, or a whole epoch; anything else is wrong usage (exit code 2)."""
    if text is None:
        return None
    parts = re.fullmatch(r"(?:([0-9]{1,19})/)?([0-9]{1,19})", text)  # 63 bits are 19 digits
    if parts is None:
        what = f"{reprlib.repr(text)} is neither a step (1200) nor an epoch (3/1200)"
        raise click.BadParameter(what)
    return Epoch(int(parts[1]), int(parts[2])) if parts[1] else int(parts[2])


class Whole(click.IntRange):
    """A whole number of some range."""

    name = "whole number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it; anything else is wrong usage (exit code 2), and told with the range."""
        if re.fullmatch(r"-?[0-9]{1,18}", str(value)) is None:
            what = f"{reprlib.repr(value)} is no whole number {_span(self.min, self.max)}"
            self.fail(what, param, ctx)
        return super().convert(value, param, ctx)


class Number(click.FloatRange):
    """A number of some range."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read it; anything else is wrong usage (exit code 2), and told with the range."""
        found = math.nan
        with suppress(ValueError):
            found = float(value)
        if not math.isfinite(found):
            self.fail(f"{value!r} is no number {_span(self.min, self.max)}", param, ctx)
        return super().convert(found, param, ctx)


def _span(least: float | None, most: float | None) -> str:
    return f"from {least} up" if most is None else f"from {least} to {most}"


paths = click.argument("run", nargs=-1, required=True, metavar="RUN...")
step = click.option(
    "--step",
    callback=epoch_of,
    metavar="N",
    help="A step of the living timeline, or a whole epoch GENERATION/STEP.",
    show_default="the recovery line",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Write one JSON value, for scripts.")


def is_default(ctx: click.Context, name: str) -> bool:
    """Say whether a parameter was left as it is."""
    return ctx.get_parameter_source(name) is click.core.ParameterSource.DEFAULT


def fitting(modes: Mapping[str, bool], parts: Mapping[str, tuple[bool, Sequence[str]]]) -> None:
    """Let a command do one thing at a time. Raises UsageError for anything else.

    ``modes`` says which things are asked for, ``parts`` which options are given, each with the
    modes that it goes with.
    """
    asked = [mode for mode, on in modes.items() if on]
    for part, (on, owners) in parts.items():
        if on and not set(asked) & set(owners):
            raise click.UsageError(f"{part} goes with {' or '.join(owners)}")
    if not asked:
        raise click.UsageError(f"say what to do, one of: {', '.join(modes)}")
    if len(asked) > 1:
        raise click.UsageError(f"{' and '.join(asked)}: one at a time")


def place_for(option: str, file: str | Path | None) -> None:
    """Raise UsageError for a file to be written in a directory that is not there."""
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise click.UsageError(f"{option} {file}: there is no directory {Path(file).parent}")


def apart(files: Mapping[str, str | None]) -> None:
    """Raise UsageError where two options name one file: what is written would replace the other."""
    named: dict[Path, str] = {}
    for option, file in files.items():
        first = named.setdefault(Path(file).resolve(), option) if file is not None else option
        if first != option:
            raise click.UsageError(f"{option} {file} is the file of {first}; name another one")


def make(directory: Path) -> list[str]:
    """Make a directory where there is none. Gives lines that say so."""
    told = [] if directory.is_dir() else [f"made the directory {directory}"]
    directory.mkdir(parents=True, exist_ok=True)
    return told


def write_into(directory: Path, files: Mapping[str, str]) -> list[str]:
    """Write files into a directory, which is made where there is none. Gives lines that say so."""
    told = make(directory)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
        told.append(f"wrote {directory / name}")
    return told


class _Unheard(Exception):
    """The standard output can't be written; this is no error of what was to be told."""


@contextmanager
def _telling() -> Iterator[None]:
    """Keep errors of the standard output apart from all others, but for a closed pipe's."""
    try:
        if sys.stdout is None:  # so Python has it where a command is started with it closed
            raise OSError(errno.EBADF, "it is closed")
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _Unheard(describe(error)) from error


class _Trimmed:
    """What is drawn in lines, without the blanks that rich fills them up with."""

    def __init__(self, whole: Any) -> None:
        self._whole = whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in Segment.split_lines(console.render(self._whole, options)):
            while line and not line[-1].text.strip():
                line.pop()
            if line:
                last = line.pop()
                line.append(Segment(last.text.rstrip(), last.style))
            yield from line
            yield Segment.line()


class _Out(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, but for the blanks that it puts at the ends of lines."""
        drawn = (each if isinstance(each, str) else _Trimmed(each) for each in objects)
        with _telling():
            super().print(*drawn, **options)

    def on_broken_pipe(self) -> None:
        """Leave it to :func:`answering`: rich would end with 1, which means damage here."""
        raise BrokenPipeError


def out() -> Console:
    """The console of this command; made late, so that tests and pipes see their own stream.

    What the stream has no sign for is spelled out: a byte of a path that is no text, say.
    """
    with _telling():
        width = None if sys.stdout.isatty() else WIDTH
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return _Out(highlight=False, width=width, soft_wrap=True)


def tabulate(
    heads: Sequence[str], rows: Iterable[Sequence[str]], words: Collection[int] = (0,)
) -> None:
    """Print rows of markup: columns of ``words``, and all others of figures, on the right.

    Without ``heads`` there is no line of them.
    """
    lines = list(rows)
    table = Table(box=None, pad_edge=False, padding=(0, 1), show_header=bool(heads))
    for at in range(len(lines[0] if lines else heads)):
        side: Literal["left", "right"] = "left" if at in words else "right"
        table.add_column(heads[at] if heads else "", justify=side, no_wrap=at not in words)
    for line in lines:
        table.add_row(*line)
    lay(table)


def lay(table: Table) -> None:
    """Print a table, so that no word and no figure is cut.

    Columns wrap at blanks where the terminal is narrow, but for those with ``no_wrap``. What has no
    room goes on in the terminal's next line.
    """
    show = out()
    anywhere = show.options.update(width=ANY_WIDTH)
    sizes = [
        measure_renderables(show, anywhere, [column.header, *column.cells])
        for column in table.columns
    ]
    widths = [max(1, size.maximum) for size in sizes]
    gaps = Measurement.get(show, anywhere, table).maximum - sum(size.maximum for size in sizes)
    wraps = [at for at, column in enumerate(table.columns) if not column.no_wrap]
    while sum(widths) + gaps > show.width:
        loose = [at for at in wraps if widths[at] > max(1, sizes[at].minimum)]
        if not loose:
            break
        widths[max(loose, key=widths.__getitem__)] -= 1
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    show.width = max(show.width, sum(widths) + gaps)
    show.print(table)


def plain(value: object) -> Any:
    """Turn a value of ours into one of JSON; an epoch has its generation and step by name."""
    if isinstance(value, Epoch):
        return {"generation": value.generation, "step": value.step}
    if isinstance(value, msgspec.Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def answer(value: object, **more: object) -> None:
    """Write the one JSON value of a command."""
    with _telling():
        print(json.dumps(plain(value) | plain(more), indent=2), flush=True)


class Ended(KeyboardInterrupt):
    """The process was told to end by a signal, whose number is the first argument."""


@contextmanager
def ending_well() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the body as Ctrl-C does, so that what it began is taken back.

    One that is ignored (`nohup`) stays ignored. Once told is enough: what comes later does not
    disturb the clearing up.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    ours = [number for number, how in before.items() if how is not signal.SIG_IGN]

    def end(number: int, _: object) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)
        raise Ended(number)

    if threading.current_thread() is not threading.main_thread():  # it has no signals
        ours = []
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


@contextmanager
def answering(as_json: bool) -> Iterator[None]:
    """Turn errors of the body into a message that says what to do, and an exit code."""
    try:
        with _failing(as_json), ending_well():
            yield
    except BrokenPipeError:  # whoever read this, `head` say, has seen enough
        _hush()
        raise click.exceptions.Exit(PIPE) from None
    except _Unheard as error:
        _hush()
        what = f"the answer can't be written to the standard output: {error}. What to do: "
        _fail(what + "send it where there is room for it", as_json=False, code=NO_LOOK)


def _hush() -> None:
    """Let the flush at Python's end succeed, whatever is still to be written."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _failing(as_json: bool) -> Iterator[None]:
    try:
        yield
    except (_Unheard, BrokenPipeError):
        raise
    except (Damaged, Refused) as error:
        verdict = error.verdict if isinstance(error, Refused) else Verdict.CORRUPT
        _fail(str(error), as_json, DAMAGED, verdict)
    except ValueError as error:
        _fail(str(error), as_json, USAGE)
    except HandfastError as error:
        _fail(str(error), as_json, NO_LOOK)
    except OSError as error:
        what = f"{error.filename or 'the system'}: {describe(error)}"
        # the store has errors of its own; this one is of a file that the user has named
        to_do = MISSING if error.errno == errno.ENOENT else remedy(error)
        _fail(f"{what}. What to do: {to_do}", as_json, NO_LOOK)
    except KeyboardInterrupt as told:
        number = told.args[0] if isinstance(told, Ended) else signal.SIGINT
        raise click.exceptions.Exit(BY_SIGNAL + number) from None
    except (click.exceptions.Exit, click.ClickException):
        raise
    except Exception as error:  # a bug of ours must not pass for damage, which is exit code 1
        traceback.print_exc()
        what = f"{type(error).__name__}: {error}. What to do: report this with the lines above"
        _fail(what, as_json, NO_LOOK)


def _fail(message: str, as_json: bool, code: int, verdict: Verdict | None = None) -> NoReturn:
    if as_json:
        answer({"error": message, "verdict": verdict, "exit_code": code})
    else:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"[bold red]error:[/] {escape(message)}")
    raise click.exceptions.Exit(code)


@contextmanager
def showing(what: str) -> Iterator[Progress | None]:
    """Show the progress of long work on a terminal; nothing at all elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def telling_how_far() -> Iterator[Callable[[str], None]]:
    """Show one line on a terminal, for as long as the body works; nothing at all elsewhere.

    The body is given how to change the line, and should print nothing else meanwhile.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("") as line:
        yield lambda words: line.update(escape(words))
