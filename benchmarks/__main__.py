"""The command: ask questions of this machine, show what came out, goal by goal.

Nothing is asserted: the exit status is 0 for whatever was measured. What is made on the disk, and
every process, is gone at the end, also of a run that is interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
from rich.console import Console

from benchmarks.common import goals, machine, picture, tables
from benchmarks.common.figures import Figure, Setting
from benchmarks.common.peers import PEERS, missing
from benchmarks.common.processes import as_installed, mark, scratch

QUESTIONS = (
    "blocking", "durable", "restore", "certify", "memory", "tensors", "unchanged", "training",
    "imports", "protocol", "profile", "frontier",
)  # fmt: skip
ALONE = ("corrections", "validators")
"""Asked by name alone: of what is not asked for by default, or minutes long."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask what the arguments say."""
    parser = _parser()
    options = parser.parse_args(arguments)
    written = (options.json, options.picture, options.markdown and options.markdown[0])
    for where in (options.home, *(path.parent for path in written if path)):
        if not where.is_dir():  # said now, and not when all was measured
            parser.error(f"{where} is no directory: make it first, or name another one")
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("interrupted: nothing is left behind", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    console = Console(width=None if sys.stdout.isatty() else 160)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidy up as after Ctrl-C
    mark()
    with scratch(options.home) as compiled:
        as_installed(compiled)
        return _answer(options, console)


def _answer(options: argparse.Namespace, console: Console) -> int:
    absent = {peer: how for peer in options.peers if (how := missing(peer))}
    there = tuple(peer for peer in options.peers if peer not in absent)
    facts = machine.facts(options.home)
    console.print("; ".join(f"{name} {value}" for name, value in facts.items()), markup=False)
    for line in tables.left_out(absent):
        console.print(line, markup=False)
    console.print()
    figures: list[Figure] = []
    drawn: dict[str, str] = {}
    sheets = []
    names = options.questions or QUESTIONS
    modules = {
        name: import_module(f"benchmarks.{name}") for name in names
    }  # what lacks says so now
    for name, module in modules.items():
        began = time.monotonic()
        found = [f for point in _points(module, options, there) for f in _ask(module, point)]
        lay = tables.wide if getattr(module, "WIDE", False) else tables.of
        lay = getattr(module, "lay", lay)
        sheets.append(lay(name, _about(module), found))
        drawn |= module.draw(found) if hasattr(module, "draw") else picture.draw_curves(found)
        tables.show(console, sheets[-1], f"{name} took {time.monotonic() - began:.0f} s")
        figures += found
    judged = list(goals.judge(figures))
    if options.questions:  # of those that were not asked, nothing was to be measured
        judged = [each for each in judged if each.verdict != "unmeasured"]
    if judged:
        sheets.insert(0, tables.goals(judged))
        tables.show(console, sheets[0])
    _write(options, facts, absent, figures, judged, sheets, drawn)
    return 0


def _points(
    module: ModuleType, options: argparse.Namespace, peers: tuple[str, ...]
) -> Iterator[Setting]:
    """Give the points at which a question is asked; one that knows no ranks is asked once."""
    varied = [
        getattr(options, name) if name in module.VARIES else getattr(options, name)[:1]
        for name in ("mib", "ranks")
    ]
    for mib, ranks in itertools.product(*varied):
        yield Setting(
            mib=mib,
            small=options.small,
            ranks=ranks,
            repeat=options.repeat,
            peers=peers,
            tensors=tuple(options.tensors),
            home=options.home,
        )


def _ask(module: ModuleType, setting: Setting) -> list[Figure]:
    """Ask one question in a directory of its own."""
    ask: Callable[[Setting], Iterator[Figure]] = module.ask
    with scratch(setting.home) as home:
        return list(ask(msgspec.structs.replace(setting, home=home)))


def _about(module: ModuleType) -> str:
    return (module.__doc__ or "").split("\n")[0]


def _write(
    options: argparse.Namespace,
    facts: dict[str, str],
    absent: dict[str, str],
    figures: list[Figure],
    judged: list[goals.Judged],
    sheets: list[tables.Sheet],
    drawn: dict[str, str],
) -> None:
    if options.json:
        medians = [
            {**msgspec.to_builtins(f), "median": f.median, "ratio": f.ratio} for f in figures
        ]
        whole: dict[str, Any] = {
            "machine": facts, "left_out": absent, "figures": medians, "goals": judged,
        }  # fmt: skip
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(whole)) + b"\n")
    if options.markdown:
        made = tables.markdown(facts, absent, sheets)
        page, place = options.markdown
        page.write_text(tables.fill(page.read_text(), place, made) if place else made)
    if options.picture:
        if any(figure.ratio for figure in figures):
            options.picture.write_text(picture.bars(figures, facts))
        for name, made in drawn.items():
            options.picture.with_name(f"{options.picture.stem}-{name}.svg").write_text(made)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("questions", nargs="*", metavar="QUESTION", type=_question,
        help=f"all of {', '.join(QUESTIONS)}; or some, or {', '.join(ALONE)}")  # fmt: skip
    add("--mib", type=_numbers, default=[1024], help="MiB of state a rank; 64,1024 for a curve")
    add("--small", type=int, default=4095, help="how many of a rank's tensors are small")
    add("--ranks", type=_numbers, default=[1], help="processes; 1,2,4 for a curve")
    add("--tensors", type=_numbers, default=[1000, 10_000, 100_000],
        help="how many tensors the question of that name is asked for")  # fmt: skip
    add("--repeat", type=int, default=5, help="laps that count; one before them warms up")
    add("--peers", type=_peers, default=list(PEERS), help=f"which of {','.join(PEERS)}; none: ''")
    add("--home", type=Path, default=Path(), help="a directory of the disk that is asked about")
    add("--json", type=Path, metavar="FILE", help="write every value of every lap")
    add("--markdown", type=_place, metavar="FILE[#PLACE]",
        help="write the tables: a new file, or into the place of that name in a page")  # fmt: skip
    add("--picture", type=Path, metavar="FILE.svg",
        help="draw the ratios; and curves beside it, where sizes vary")  # fmt: skip
    return parser


def _question(told: str) -> str:
    known = QUESTIONS + ALONE
    if told not in known:
        raise argparse.ArgumentTypeError(f"{told}: not one of {', '.join(known)}")
    return told


def _numbers(told: str) -> list[int]:
    if not all(each.isdecimal() and int(each) for each in told.split(",")):
        raise argparse.ArgumentTypeError(f"{told}: give whole numbers from 1 up, as 64,1024")
    return [int(each) for each in told.split(",")]


def _place(told: str) -> tuple[Path, str]:
    """Split a page from its place, and see that it is there before anything is measured."""
    path, _, place = told.partition("#")
    if place:
        try:
            tables.fill(Path(path).read_text(), place, "")
        except (OSError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{told}: {error}") from None
    return Path(path), place


def _peers(told: str) -> list[str]:
    names = [name for name in told.split(",") if name]
    if unknown := set(names) - set(PEERS):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(PEERS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
