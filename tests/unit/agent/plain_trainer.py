"""A trainer that is a plain process: ``plain_trainer.py ROOT RANK``, told what to do line by line.

It finds or starts its node's agent by the environment: PLAIN_SOCKET names the socket of one that is
there, else PLAIN_KEY and PLAIN_LOG say how to start one, and PLAIN_AGENT may name another program.
Each command is answered by one line.
"""

from __future__ import annotations

import os
import sys

from hostkit import Rank

from handfast.agent.local import Client
from handfast.agent.process import connect_or_start
from handfast.checkpoint.collective import Solo
from handfast.core.lattice import Epoch


def connect() -> Client:
    if "PLAIN_SOCKET" in os.environ:
        return Client(os.environ["PLAIN_SOCKET"])
    program = ["-m", "handfast.agent"]
    if "PLAIN_AGENT" in os.environ:
        program = [os.environ["PLAIN_AGENT"]]
    return connect_or_start(
        os.environ["PLAIN_KEY"], os.environ["PLAIN_LOG"], argv=[sys.executable, *program]
    )


def obey(rank: Rank, words: list[str]) -> str:
    match words:
        case ["restore"]:
            return str(rank.restore())
        case ["save", step]:
            return str(rank.save(int(step)))
        case ["persisted", generation, step]:
            rank.session.wait_persisted(Epoch(int(generation), int(step)), 30)
            return "persisted"
        case ["converged", generation, step]:
            return str(rank.converged(Epoch(int(generation), int(step))))
        case ["close"]:
            rank.close()
            return "closed"
        case _:
            raise ValueError(words)


def main() -> None:
    rank = Rank(Solo(), sys.argv[1], connect)
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            print(obey(rank, line.split()), flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
