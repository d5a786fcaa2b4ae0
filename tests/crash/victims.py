"""Processes to be killed at one of their system calls: forked from this one, which has all loaded.

Told on its standard input, a line each, what to do and where. It forks a child that makes ready and
stops itself; whoever traces it lets it go on. Each line of the answer is one fact that the child
was told (pickled, in hex), "ready PID", or "ended".
"""

import os
import pickle
import signal
import sys

import lab

from handfast.core.lattice import Epoch
from handfast.store.files import Posix
from handfast.store.pins import pin


def tell(fact: object) -> None:
    """Say a fact, by one system call."""
    os.write(1, pickle.dumps(fact).hex().encode() + b"\n")


def ready() -> None:
    """Wait for the tracer."""
    os.write(1, f"ready {os.getpid()}\n".encode())
    os.kill(os.getpid(), signal.SIGSTOP)


def save(root: str) -> None:
    """Save a delta upon a full epoch: written, voted for, published; the first is released."""
    agent = lab.Agent(Posix(), tell, root)
    agent.open(1)
    agent.save(Epoch(1, 1))
    ready()
    agent.save(Epoch(1, 2))


def recover(root: str) -> None:
    """Claim a domain whose last owner saved twice, and begin a generation."""
    agent = lab.Agent(Posix(), tell, root)
    agent.open(1, keep=2)
    agent.save(Epoch(1, 1))
    agent.save(Epoch(1, 2))
    ready()
    lab.Agent(Posix(), tell, root).open(2)


def release(root: str) -> None:
    """Let a pin go, and then the epoch that it held."""
    files = Posix()
    agent = lab.Agent(files, tell, root)
    agent.open(1)
    agent.save(Epoch(1, 1))
    held = pin(files, root, lab.NAME, Epoch(1, 1), "export")
    tell(lab.Pinned(held.path, held.epoch, held=True))
    agent.pinned()
    agent.save(Epoch(1, 2))
    ready()
    tell(lab.Pinned(held.path, held.epoch, held=None))
    held.release()
    tell(lab.Pinned(held.path, held.epoch, held=False))
    agent.pinned()


DEEDS = {"save": save, "recover": recover, "release": release}

if __name__ == "__main__":
    with lab.small_world():
        for line in sys.stdin:
            deed, _, root = line.strip().partition(" ")
            child = os.fork()
            if child == 0:
                DEEDS[deed](root)
                os._exit(0)
            os.waitpid(child, 0)
            os.write(1, b"ended\n")
