"""The whole demo: an uninterrupted run, the storm, the peers' storms, and the report of it all."""

import os
import platform
import shutil
import signal
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import msgspec

from handfast.demo.agents import agent_pids, end_agents
from handfast.demo.chaos import plan, with_rollback
from handfast.demo.corpus import read
from handfast.demo.job import Job
from handfast.demo.marks import first_seen, lines_seen
from handfast.demo.report import render
from handfast.demo.result import Curve, DemoResult, Kill, Peer, Resume
from handfast.demo.show import Stage
from handfast.demo.storm import Storm
from handfast.demo.witness import Ledger, tally
from handfast.errors import HandfastError

__all__ = ["FULL", "PEERS", "Options", "claim", "run"]

MARKER = ".handfast-demo"

PEERS: dict[str, tuple[str, str]] = {
    "torch.save": (
        "torch.save, one file a rank and latest",
        (
            "Each rank writes its file to a temporary name and renames it over the last one; after "
            "a barrier rank 0 writes latest, the same way. On a restart, if there is a latest, "
            "each rank loads its file, and all go on from the step in rank 0's."
        ),
    ),
    "dcp": (
        "torch.distributed.checkpoint, one directory",
        (
            "dcp.save into one directory, overwriting, which is its default; get_state_dict and "
            "set_state_dict as in PyTorch's recipe."
        ),
    ),
}
_BACK = " In the middle an operator rolls the run back by one save, and it is killed again."

FULL: dict[str, tuple[str, str]] = {
    "torch.save per step": (
        "torch.save, a directory a step",
        "Each rank renames its file into the step's directory; the newest directory with a file "
        "of every rank is resumed, the newest three are kept." + _BACK,
    ),
    "dcp per step": (
        "torch.distributed.checkpoint, a directory a step",
        "dcp.save into a new directory for each step; the newest one with a .metadata file is "
        "resumed, the newest three are kept." + _BACK,
    ),
    "handfast": ("handfast, rolled back", "restore(step=...) once; else as above." + _BACK),
}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What to play. ``kills`` is the storm's, ``peer_kills`` that of each peer."""

    out: Path
    seed: int = 1
    kills: int = 16
    peer_kills: int = 8
    steps: int = 240
    full: bool = False


def claim(folder: Path) -> None:
    """Make ``folder`` the demo's, emptying what an earlier demo left there.

    Raises ValueError where it holds anything else: nothing of the user's is ever overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no directory. Choose another one with --out")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise ValueError(
                f"{folder} is not empty and was not made by the demo. Choose another directory "
                "with --out, or empty this one"
            )
        for entry in folder.iterdir():
            if entry.name == MARKER:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def run(options: Options, stage: Stage) -> DemoResult:
    """Play it all; writes ``result.json`` and ``report.html`` into ``options.out``.

    Raises ValueError as :func:`claim`, HandfastError where a run stands still or fails without
    having been struck.
    """
    began = time.monotonic()
    claim(options.out)
    job = Job(run="", seed=options.seed, steps=options.steps)
    stage.begin("1  an uninterrupted run, without checkpoints", job.steps)
    reference = _play(options, "reference", "none", stage)
    stage.begin(f"2  the same run under {options.kills} kills, with handfast", job.steps)
    storm = _storm(options, stage, reference.ledger)
    zero = storm.ledger.began
    peers = _peers(options, stage, reference.ledger)
    settings = _settings(job, options)
    result = DemoResult(
        machine=_machine(),
        settings=settings,
        reference=_curve(reference),
        storm=_curve(storm),
        kills=_kills(storm.kills, zero),
        resumes=_resumes(storm.ledger.resumes, zero),
        tally=tally(storm.ledger.resumes),
        marks=first_seen(storm.events, zero),
        lines=lines_seen(storm.events, zero),
        progress=[
            (event.at - zero, event.step)
            for event in storm.events
            if event.kind == "step" and event.rank == 0
        ],
        repeated=storm.ledger.repeated,
        clashes=storm.ledger.clashes,
        peers=peers,
        seconds=time.monotonic() - began,
    )
    (options.out / "result.json").write_bytes(msgspec.json.encode(result))
    (options.out / "report.html").write_text(render(result), encoding="utf-8")
    return result


def _play(options: Options, name: str, saver: str, stage: Stage) -> Storm:
    job = Job(
        run=str(options.out.absolute() / name), saver=saver, seed=options.seed, steps=options.steps
    )
    storm = Storm(job, (), stage)
    storm.run()
    return storm


def _storm(options: Options, stage: Stage, truth: Ledger) -> Storm:
    job = Job(
        run=str(options.out.absolute() / "storm"),
        saver="handfast",
        seed=options.seed,
        steps=options.steps,
    )
    strikes = plan(options.seed, options.kills, steps=job.steps, every=job.every)
    storm = Storm(job, strikes, stage, truth=truth)
    try:
        storm.run()
    finally:
        end_agents(agent_pids(job), signal.SIGTERM)
    return storm


def _peers(options: Options, stage: Stage, truth: Ledger) -> list[Peer]:
    chosen = {**PEERS, **(FULL if options.full else {})}
    found: list[Peer] = []
    for number, (saver, (name, usage)) in enumerate(chosen.items(), 1):
        # The job is the same to the last argument; only the storm is over sooner.
        short = options.peer_kills * 11
        stage.begin(f"{number + 2}  the same storm over {name}", short)
        job = Job(
            run=str(options.out.absolute() / f"peer-{number}"),
            saver=saver,
            seed=options.seed,
            steps=options.steps,
        )
        strikes = plan(options.seed, options.peer_kills, steps=short, every=job.every, agents=False)
        if saver in FULL:
            strikes = with_rollback(strikes)
        storm = Storm(job, strikes, stage, truth=truth, finish=False)
        try:
            storm.run()
        finally:
            end_agents(agent_pids(job), signal.SIGTERM)
        found.append(_peer(name, usage, storm))
    return found


def _peer(name: str, usage: str, storm: Storm) -> Peer:
    zero = storm.ledger.began
    return Peer(
        name,
        usage,
        _kills(storm.kills, zero),
        _resumes(storm.ledger.resumes, zero),
        tally(storm.ledger.resumes),
        storm.ledger.ended - zero,
    )


def _curve(storm: Storm) -> Curve:
    try:
        return storm.ledger.curve()
    except KeyError as error:
        raise HandfastError(
            f"a run ended without telling all of its steps (missing: {error}). Run the demo again; "
            "if it repeats, the logs in its directory say where a rank stopped"
        ) from error


def _kills(kills: list[Kill], zero: float) -> list[Kill]:
    return [msgspec.structs.replace(kill, at=kill.at - zero) for kill in kills]


def _resumes(resumes: list[Resume], zero: float) -> list[Resume]:
    return [msgspec.structs.replace(resume, at=resume.at - zero) for resume in resumes]


def _settings(job: Job, options: Options) -> dict[str, int | float | str]:
    corpus = read(limit=job.letters)
    return {
        "seed": options.seed,
        "steps": job.steps,
        "world": job.world,
        "parameters": job.parameters(len(corpus.alphabet)),
        "model": f"{job.layers} blocks of width {job.width}, {job.heads} heads, context "
        f"{job.context}, dropout {job.dropout}; AdamW, warm-up and cosine",
        "saved every": f"{job.every} steps",
        "text": f"the standard library of Python {platform.python_version()}: "
        f"{len(corpus.codes)} characters, digest {corpus.digest}",
    }


def _machine() -> dict[str, str]:
    return {
        "processor": f"{os.cpu_count()} x {_first('/proc/cpuinfo', 'model name')}",
        "memory": _first("/proc/meminfo", "MemTotal"),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "torch": _version("torch"),
        "handfast": _version("handfast"),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _first(path: str, key: str) -> str:
    with suppress(OSError), open(path, encoding="utf-8") as file:
        for line in file:
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return "unknown"


def _version(name: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return "not installed"
