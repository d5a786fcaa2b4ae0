"""``handfast simulate``: storms over the real protocol in virtual time, one seed each."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

import click
from rich.markup import escape

from handfast.cli.console import (
    DAMAGED,
    Number,
    Whole,
    answer,
    answering,
    as_json,
    fitting,
    out,
    place_for,
)
from handfast.cli.scale import MOST as SCALE_MOST
from handfast.cli.scale import measure
from handfast.cli.swarm import swarm, tell_breach
from handfast.cli.synchrony import MOST as SYNCHRONY_MOST
from handfast.cli.synchrony import hold
from handfast.core.membership import Roster
from handfast.sim.ledger import Breach
from handfast.sim.script import LINE, play
from handfast.sim.storm import Plan, storm

__all__ = ["simulate"]


def seeds_of(_: click.Context, __: click.Parameter, text: str | None) -> range | int | None:
    """Read how many seeds, or A..B: from A up to B, without B."""
    if text is None:
        return None
    parts = re.fullmatch(r"(?:([0-9]{1,18})\.\.)?([0-9]{1,18})", text)
    if parts is None or int(parts[1] or 0) >= int(parts[2]):
        raise click.BadParameter(f"{text!r} is neither a number of seeds (200) nor A..B (200..400)")
    return range(int(parts[1]), int(parts[2])) if parts[1] else int(parts[2])


def sizes_up_to(
    most: int,
) -> Callable[[click.Context, click.Parameter, str | None], tuple[int, ...]]:
    """Read numbers of domains, of which one process can hold so many."""

    def sizes_of(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, ...]:
        if text is None:
            return ()
        found = [int(word) if re.fullmatch("[0-9]{1,18}", word) else 0 for word in text.split(",")]
        if min(found) < 2:
            what = f"{reprlib.repr(text)} is no list of numbers from 2 up: 16,256,1024"
            raise click.BadParameter(what)
        if max(found) > most:
            raise click.BadParameter(f"{max(found):,} domains do not fit: {most:,} at most")
        return tuple(found)

    return sizes_of


ONE, MANY = "--seed N", "--seeds N|A..B or --minutes M"
SCRIPT, SCALE, SYNCHRONY = "--script FILE", "--scale N,N...", "--synchrony N,N..."


@click.command(
    epilog="Exit codes: 0 all holds; 1 a law, a goal, a bound or a script does not; 2 wrong usage; "
    "3 could not look."
)
@click.option("--seeds", callback=seeds_of, metavar="N|A..B", help="Run seeds 0 to N-1, A to B-1.")
@click.option("--seed", type=int, help="Run one seed.")
@click.option("--transcript", is_flag=True, help="With --seed: tell everything that happened.")
@click.option("--thorough", is_flag=True, help="Hold every law after every move; slow.")
@click.option("--jobs", type=Whole(1), help="Processes.  [default: one a core]")
@click.option(
    "--minutes", type=Number(0, 1e6),
    help="Go on with further seeds for so long. With --seeds: whichever is over first ends it.",
)  # fmt: skip
@click.option(
    "--tally", type=click.Path(dir_okay=False, path_type=Path),
    help="Go on with the seeds where a file's figures left off, and add these.",
)  # fmt: skip
@click.option(
    "--script", "scripts", multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Play a scenario, and say where it does not come out as it is written.",
)  # fmt: skip
@click.option(
    "--scale", callback=sizes_up_to(SCALE_MOST), metavar="N,N...",
    help="Measure what an epoch costs jobs of so many domains, and a rack that is lost.",
)  # fmt: skip
@click.option(
    "--synchrony", callback=sizes_up_to(SYNCHRONY_MOST), metavar="N,N...",
    help="Hold the bounds that partial synchrony would give against jobs of so many domains.",
)  # fmt: skip
@click.option(
    "--svg", type=click.Path(file_okay=False, path_type=Path),
    help="With --scale: draw the curves into this directory.",
)  # fmt: skip
@click.option("--rewrite", is_flag=True, help="With --script: write down what comes out.")
@as_json
def simulate(
    seeds: range | int | None,
    seed: int | None,
    transcript: bool,
    thorough: bool,
    jobs: int | None,
    minutes: float | None,
    tally: Path | None,
    scripts: tuple[Path, ...],
    rewrite: bool,
    scale: tuple[int, ...],
    synchrony: tuple[int, ...],
    svg: Path | None,
    as_json: bool,
) -> None:
    """Put the protocol through storms in virtual time, and judge every move and every calm.

    One seed decides everything: the job, what breaks and when. The same seed gives the same digest.
    """
    many = seeds is not None or minutes is not None
    modes = {
        ONE: seed is not None, MANY: many, SCRIPT: bool(scripts), SCALE: bool(scale),
        SYNCHRONY: bool(synchrony),
    }  # fmt: skip
    fitting(
        modes,
        {
            "--transcript": (transcript, [ONE]),
            "--thorough": (thorough, [ONE, MANY]),
            "--jobs": (jobs is not None, [MANY]),
            "--tally": (tally is not None, [MANY]),
            "--rewrite": (rewrite, [SCRIPT]),
            "--svg": (svg is not None, [SCALE]),
        },
    )
    place_for("--tally", tally)
    with answering(as_json):
        if scale:
            measure(scale, svg, as_json)
        elif synchrony:
            if not hold(synchrony, as_json):
                raise click.exceptions.Exit(DAMAGED)
        elif scripts:
            _play(scripts, rewrite, as_json)
        elif seed is not None:
            _one(seed, transcript, thorough, as_json)
        else:
            swarm(seeds, thorough, jobs or os.cpu_count() or 1, minutes, tally, as_json)


def _one(seed: int, transcript: bool, thorough: bool, as_json: bool) -> None:
    outcome = storm(seed, thorough=thorough, transcript=transcript)
    if as_json:
        answer(outcome, sound=not outcome.laws)
    else:
        show = out()
        for line in outcome.tail:
            show.print(escape(line))
        show.print(f"seed {seed}, a job of {_job(outcome.plan)}")
        show.print(f"what troubles it: {', '.join(outcome.plan.kinds) or 'nothing'}")
        show.print(
            f"{outcome.events:,} events, {outcome.turns:,} moves, {outcome.seconds:.0f} virtual "
            f"seconds, digest {outcome.digest}"
        )
        tell_breach(outcome)
    if outcome.laws:
        raise click.exceptions.Exit(DAMAGED)


def _job(plan: Plan) -> str:
    ranks = f"{plan.shards} rank{'s' * (plan.shards != 1)}"
    tiers = []
    for name, copies, need in plan.tiers:
        needed = f" (an epoch needs {need})" if copies > 1 else ""
        tiers.append(f"{copies} in tier {name}{needed}")
    way = "up a tree" if Roster(plan.configuration()).tree else "from neighbour to neighbour"
    return f"{ranks}; copies of each one's shard: {', '.join(tiers)}; votes go {way}"


def _play(scripts: tuple[Path, ...], rewrite: bool, as_json: bool) -> None:
    """Play scripts; exits with 1 where one breaks a law, or comes out otherwise than written.

    None is rewritten before all were played, and none where one of them has a wrong line.
    """
    changed: dict[Path, tuple[str, str]] = {}
    broken: dict[str, tuple[str, ...]] = {}
    silent = []
    for path in scripts:
        text = _read(path)
        try:
            played = play(text)
        except Breach as breach:
            broken[str(path)] = breach.found
            continue
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if LINE not in text.split("\n"):
            silent.append(path)
        if played != text:
            changed[path] = (text, played)
    for path, (text, played) in changed.items():
        if rewrite:
            _rewrite(path, text, played)
        elif not as_json:
            _tell_difference(path, text, played)
    sound = not broken and (rewrite or not changed)
    if as_json:
        names = [str(path) for path in changed]
        answer({"scripts": len(scripts), "changed": names, "broken": broken}, sound=sound)
    else:
        for path in silent:
            line = (
                f"{path}: no block has a line {LINE}, so nothing was compared; see docs/scripts.md"
            )
            out().print(line, markup=False)
        _tell_scripts(len(scripts), len(changed), broken, rewrite)
    if not sound:
        raise click.exceptions.Exit(DAMAGED)


def _read(path: Path) -> str:
    """Read a script; the ends of its lines are those of text, whatever they are in the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no script: byte {error.start} is no UTF-8 text") from error
    if "\0" in text:
        raise ValueError(f"{path} is no script: it holds bytes of 0, as no text does")
    return text


def _rewrite(path: Path, text: str, played: str) -> None:
    """Replace a script as a whole, with the line ends, the owner and the rights that it has.

    Whatever goes wrong, the old one or the new one is there. What a link names is replaced, not
    the link. Raises ValueError for one that is no longer what was played, that is not to be
    written, or whose lines end in more than one way: it stays as it is.
    """
    file = path.resolve()
    held, ends = file.stat(), _ends(file)
    why = (
        "has changed while it was played" if _read(path) != text
        else "is read-only" if not held.st_mode & 0o222
        else "ends its lines in more than one way" if ends is None
        else ""
    )  # fmt: skip
    if why:
        raise ValueError(f"{path} {why}, and was not rewritten. What to do: mend that, and again")
    draft = Path(mkdtemp(prefix=".handfast-", dir=file.parent)) / file.name
    try:
        draft.write_text(played, encoding="utf-8", newline=ends)
        shutil.copymode(file, draft)
        if (held.st_uid, held.st_gid) != (os.geteuid(), os.getegid()):
            os.chown(draft, held.st_uid, held.st_gid)
        draft.replace(file)
    finally:
        shutil.rmtree(draft.parent)


def _ends(file: Path) -> str | None:
    """Find how the lines of a file end, if all end alike."""
    data = file.read_bytes()
    lines, pairs = data.count(b"\n"), data.count(b"\r\n")
    if data.count(b"\r") != pairs or pairs not in (0, lines):
        return None
    return "\r\n" if pairs else "\n"


def _tell_difference(path: Path, text: str, played: str) -> None:
    diff = difflib.unified_diff(
        text.splitlines(), played.splitlines(), f"{path}, as written", "what came out", lineterm=""
    )
    for line in diff:
        out().print(escape(line))


def _tell_scripts(
    count: int, changed: int, broken: dict[str, tuple[str, ...]], rewrite: bool
) -> None:
    show = out()
    for name, found in broken.items():
        for law in found:
            show.print(f"{escape(name)}: [bold red]broken:[/] {escape(law)}")
    scripts = f"{count} script{'s' * (count != 1)}"
    if rewrite:
        show.print(f"{changed} of {scripts} rewritten; read what has changed, and why")
    elif changed:
        show.print(f"{changed} of {scripts} came out otherwise than written")
    elif not broken:
        show.print(f"{scripts} came out as written; no law was broken")
