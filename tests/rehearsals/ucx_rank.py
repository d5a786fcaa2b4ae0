"""A rank of a job of two that trade messages over UCX's listener; it says each step ahead of it.

    ucx_rank.py LIBRARIES VERSION

Started with the environment that torchrun gives, in a network namespace of its own, where rank 0
has MASTER_ADDR. Rank 0 listens and tells in torch's store at which port; rank 1 dials, and sends
first. `ucx_end.py` has the calls. Exit code 0: every byte came, both ways. 1: it did not, or UCX
said no.
"""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from typing import Any

from torch.distributed.rendezvous import rendezvous
from ucx_end import SIZES, End, No


class Told:
    """Takes what the end that listens says, `listening PORT`, for the other rank."""

    def __init__(self, store: Any) -> None:
        self._store, self._said = store, ""

    def write(self, text: str) -> None:
        self._said += text

    def flush(self) -> None:
        self._store.set("port", self._said.split()[-1])


def message(size: int, rank: int) -> bytes:
    """Bytes that no two ranks share; 251 is prime, so no block repeats another."""
    return (bytes(range(251)) * (size // 251 + 2))[rank:][:size]


def say(step: str) -> None:
    """Say what comes next."""
    print(step, flush=True)


def trade(end: End, rank: int) -> str | None:
    """Send and receive a message of each size; gives what came otherwise than it was sent."""
    for size in SIZES:
        for sender in (1, 0):
            if rank == sender:
                say(f"sends {size:,} bytes")
                end.send(message(size, rank))
            else:
                say(f"waits for {size:,} bytes")
                if end.receive(size) != message(size, sender):
                    return f"other bytes came than were sent ({size:,})"
    return None


def main(libraries: str, version: str) -> str | None:
    """Meet the other rank, and trade; gives what went wrong."""
    rank, address = int(os.environ["RANK"]), os.environ["MASTER_ADDR"]
    store, _, _ = next(rendezvous("env://"))
    try:
        say(f"begins with UCX {version}")
        end = End(libraries, version)
        if rank:
            end.meet_at_listener("dial", address, int(store.get("port")))
        else:
            with redirect_stdout(Told(store)):
                end.meet_at_listener("listen", address, 0)
        if wrong := trade(end, rank):
            return wrong
    except No as error:
        return f"UCX says no: {error}"
    say("has all messages")
    end.close()
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
