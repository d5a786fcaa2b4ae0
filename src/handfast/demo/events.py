"""What each rank tells while it trains: one line of JSON an event, one file a rank and start.

A rank may be killed inside a write, so a reader takes whole lines only; a start has files of its
own, so a cut line is never continued by a successor. The log is for the demo's eyes: no saver
reads it.
"""

import os
import time
from pathlib import Path
from typing import Literal

import msgspec

__all__ = ["Event", "Kind", "Log", "Tail"]

Kind = Literal["start", "resumed", "step", "saving", "saved", "lattice", "final", "error"]


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """``at`` is CLOCK_MONOTONIC in seconds, which all processes of a machine share.

    ``prints`` are digests of the state by component; ``domains`` and ``line`` are what a rank saw
    of the lattice: domain -> (staged, persisted, certified) as (generation, step), and the
    converged epoch.
    """

    at: float
    rank: int
    launch: int
    kind: Kind
    step: int = 0
    loss: float | None = None
    pid: int = 0
    text: str = ""
    prints: dict[str, str] = {}
    domains: dict[str, tuple[tuple[int, int], ...]] = {}
    line: tuple[int, int] = (0, 0)


class Log:
    """Appends the events of one rank in one start; each line is one write, never buffered."""

    def __init__(self, run: str, launch: int, rank: int) -> None:
        folder = Path(run, "events")
        folder.mkdir(parents=True, exist_ok=True)
        self._rank = rank
        self._launch = launch
        self._fd = os.open(
            folder / f"{launch:04}-{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
        )

    def tell(
        self,
        kind: Kind,
        step: int = 0,
        *,
        loss: float | None = None,
        text: str = "",
        prints: dict[str, str] | None = None,
        domains: dict[str, tuple[tuple[int, int], ...]] | None = None,
        line: tuple[int, int] = (0, 0),
    ) -> None:
        """Append one event, stamped with the time and this process."""
        event = Event(
            at=time.monotonic(),
            rank=self._rank,
            launch=self._launch,
            kind=kind,
            step=step,
            loss=loss,
            pid=os.getpid(),
            text=text,
            prints=prints or {},
            domains=domains or {},
            line=line,
        )
        os.write(self._fd, msgspec.json.encode(event) + b"\n")


class Tail:
    """Reads what was appended since it last looked, in all files of a run."""

    def __init__(self, run: str) -> None:
        self._folder = Path(run, "events")
        self._read: dict[str, int] = {}
        self._decoder = msgspec.json.Decoder(Event)

    def poll(self) -> list[Event]:
        """All new whole events, in order of time."""
        if not self._folder.is_dir():
            return []
        fresh: list[Event] = []
        for entry in sorted(os.scandir(self._folder), key=lambda entry: entry.name):
            seen = self._read.get(entry.name, 0)
            if entry.stat().st_size == seen:
                continue
            with open(entry.path, "rb") as file:
                file.seek(seen)
                whole = file.read().rpartition(b"\n")[0]
            if whole:
                self._read[entry.name] = seen + len(whole) + 1
                fresh += [self._decoder.decode(line) for line in whole.split(b"\n")]
        return sorted(fresh, key=lambda event: event.at)
