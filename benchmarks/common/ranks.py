"""Real ranks: processes that meet over gloo, do one deed, and give what it came to."""

from __future__ import annotations

import ctypes
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

__all__ = ["Rank", "on_ranks"]

_PRELOAD = ["torch", "torch.distributed.checkpoint", "handfast.torch"]
_PR_SET_PDEATHSIG = 1

T = TypeVar("T")


class Rank(NamedTuple):
    """One process of a job."""

    rank: int
    size: int


def on_ranks(
    size: int, home: Path, deed: Callable[[Rank], T], *, nodes: int = 1, threads: int = 0
) -> list[T]:
    """Let each of ``size`` ranks do a deed at once; gives what each gave, in order.

    They are spread over ``nodes`` that differ by name, so that each has an agent of its own;
    ``threads`` are torch's, if not its own choice. Raises RuntimeError with what a rank raised, or
    with what the ranks said last where one was ended; then the others are ended, too.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    meeting = tempfile.mktemp(prefix="meet-", dir=home)  # noqa: S306 - a store that the ranks make
    output = Path(f"{meeting}.txt")
    output.touch()
    processes: list[Any] = []
    pipes: list[Connection] = []
    try:
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            env = {
                "HANDFAST_NODE": f"node{rank * nodes // size}",
                "HANDFAST_BIND": "127.0.0.1",
                "HANDFAST_LINGER_S": "1",
                "GLOO_SOCKET_IFNAME": "lo",
                "JAX_PLATFORMS": "cpu",
                # DCP's process meets its trainer by these
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "0",
            }
            args = (theirs, Rank(rank, size), meeting, output, env, threads, deed)
            process = context.Process(target=_be, args=args, daemon=False)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        found = _answers(pipes)
        for process in processes:
            process.join()
        return found
    except EOFError as error:
        said = output.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"a rank was ended; they said:\n{said}") from error
    finally:
        for process in processes:
            process.kill()
            process.join()
        for path in (meeting, output):
            with suppress(FileNotFoundError):
                os.unlink(path)


def _answers(pipes: list[Connection]) -> list[Any]:
    """Wait for all; raises EOFError where one has ended without an answer."""
    found: dict[int, Any] = {}
    while len(found) < len(pipes):
        left = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in found}
        for pipe in wait(list(left)):
            rank = left[pipe]  # type: ignore[index]  # - wait gives back what it was given
            problem, found[rank] = pipes[rank].recv()
            if problem:
                raise RuntimeError(f"rank {rank} of {len(pipes)}:\n{problem}")
    return [found[rank] for rank in range(len(pipes))]


def _be(
    pipe: Connection,
    rank: Rank,
    meeting: str,
    output: Path,
    env: dict[str, str],
    threads: int,
    deed: Callable[[Rank], object],
) -> None:
    # A rank must not outlive the run, and is ended by it: Ctrl-C is the run's alone.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 1)  # peers and their processes tell how they fare: not into our tables
    os.dup2(fd, 2)
    os.close(fd)
    os.environ.update(env)
    import torch
    import torch.distributed as dist

    if threads:
        torch.set_num_threads(threads)
    try:
        store = dist.FileStore(meeting, rank.size)
        dist.init_process_group("gloo", store=store, rank=rank.rank, world_size=rank.size)
        answer = deed(rank)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        pipe.send((traceback.format_exc(), None))
    else:
        pipe.send(("", answer))
    os._exit(0)  # what threads of a peer are left is not waited for
