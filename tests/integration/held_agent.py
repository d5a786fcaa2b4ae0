"""An agent whose disk can be stopped: ``python held_agent.py MEETING_PLACE``.

While the file named by HELD_AGENT exists, every call that it names waits; that one does is shown
by a file beside it. All else is the agent as it is.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

from handfast.agent.host import Agent
from handfast.agent.joining import node_label
from handfast.agent.process import take_seat
from handfast.store.files import Posix

HELD = Path(os.environ["HELD_AGENT"])


def wait(call: str, path: str) -> None:
    """Wait while this call on this path is held."""
    while True:
        try:
            held, _, where = HELD.read_text().partition(" ")
        except FileNotFoundError:
            return
        if held != call or where not in path:
            return
        HELD.with_suffix(".reached").touch()
        time.sleep(0.005)


class Held(Posix):
    """The real calls, some of them late."""

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        wait("pwrite", os.readlink(f"/proc/self/fd/{fd}"))
        return super().pwrite(fd, data, offset)

    def pread(self, fd: int, into: memoryview, offset: int) -> int:
        wait("pread", os.readlink(f"/proc/self/fd/{fd}"))
        return super().pread(fd, into, offset)

    def fsync(self, fd: int) -> None:
        wait("fsync", os.readlink(f"/proc/self/fd/{fd}"))
        super().fsync(fd)

    def rename(self, source: str, target: str) -> None:
        wait("rename", target)
        super().rename(source, target)


async def serve(place: str) -> None:
    """What ``python -m handfast.agent`` does."""
    seat = take_seat(place)
    if seat is None:
        return
    agent = Agent(seat.socket, Held(), label=node_label())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, agent.stop)
    await agent.serve()
    seat.leave()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
