"""One rank of the demo's job: as a forked child of a warm parent, or as torchrun starts it."""

import ctypes
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import msgspec
import torch.distributed as dist

from handfast.demo import peers
from handfast.demo.events import Log
from handfast.demo.job import Job
from handfast.demo.keeper import Handfast, place
from handfast.demo.savers import Nothing, Saver
from handfast.demo.training import Training, make_deterministic, train

__all__ = ["forked", "main", "open_saver"]

FAILED = 3
"""The exit status of a rank whose restore or training raised; the log says what."""

_PATIENCE = timedelta(seconds=120)
_PR_SET_PDEATHSIG = 1


def open_saver(training: Training, log: Log) -> Saver:
    """The saver that the job names, over this rank's live state."""
    name = training.job.saver
    if name == "none":
        return Nothing()
    if name == "handfast":
        return Handfast(training, log)
    return peers.SAVERS[name](training)


def forked(job: Job, rank: int) -> None:
    """Be ``rank`` of ``job`` in a process just forked; its output goes to a file of the run."""
    # A rank must not outlive the demo: when the warm parent goes, the kernel ends its children.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _redirect(Path(job.run, "output", f"{job.launch:04}-{rank}.txt"))
    meeting = Path(job.run, "meetings")
    meeting.mkdir(parents=True, exist_ok=True)
    # A file for each start: a key left by a killed one would be taken for an answer.
    store = dist.FileStore(str(meeting / f"{job.launch:04}"), job.world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=job.world, timeout=_PATIENCE)
    _work(job, rank)


def main() -> None:
    """Be the rank that torchrun's environment says, of the job in the first argument."""
    job = Job.decode(sys.argv[1])
    told = os.environ
    restarts = int(told["TORCHELASTIC_RESTART_COUNT"])
    make_deterministic()
    # torchrun (seen in torch 2.13) keeps one store over its restarts: without a prefix of its own a
    # restarted gloo group takes the addresses of the dead for those of the living.
    served = dist.TCPStore(told["MASTER_ADDR"], int(told["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(f"start-{restarts}", served)
    rank, world = int(told["RANK"]), int(told["WORLD_SIZE"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    _work(msgspec.structs.replace(job, launch=job.launch + restarts), rank)


def _work(job: Job, rank: int) -> None:
    place(job, rank)
    log = Log(job.run, job.launch, rank)
    log.tell("start")
    try:
        training = Training(job, rank)
        train(training, open_saver(training, log), log)
    except BaseException as error:  # DCP's CheckpointException is no Exception
        log.tell("error", text=_brief(error))
        raise SystemExit(FAILED) from error
    dist.destroy_process_group()


def _brief(error: BaseException) -> str:
    """An error in a line: DCP's messages hold the tracebacks of all ranks, the cause at the end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = f" ... {lines[-1][:200]}" if len(lines) > 1 else ""
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}{cause}"


def _redirect(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(fd, standard)
    os.close(fd)


if __name__ == "__main__":
    main()
