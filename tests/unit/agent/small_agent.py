"""The smallest agent that there can be, for tests of its plumbing: its meeting place is argv[-1].

An argument ``old`` before it makes it speak only version 9 of the local protocol; ``late`` lets it
take its seat late; ``fails`` lets it end at once.
"""

import asyncio
import os
import signal
import sys
import time
from typing import Any

from handfast.agent.process import take_seat
from handfast.agent.server import Server, Trainer


async def main(place: str, versions: tuple[int, int]) -> None:
    seat = take_seat(place)
    if seat is None:
        print("another agent is here", flush=True)
        return
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)

    async def on_call(
        trainer: Trainer, name: str, fields: dict[str, Any], fds: list[int]
    ) -> dict[str, Any]:
        match name:
            case "who":
                names = [os.readlink(f"/proc/self/fd/{fd}") for fd in open_fds()]
                return {"pid": os.getpid(), "sid": os.getsid(0), "cwd": os.getcwd(), "open": names}
            case "stop":
                ended.set()
            case "wait":
                await asyncio.Event().wait()
        return {}

    def open_fds() -> list[int]:
        return [
            int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")
        ]

    server = Server(
        seat.socket,
        on_call=on_call,
        on_gone=lambda trainer: print(f"gone {trainer.pid}", flush=True),
        versions=versions,
    )
    print(f"agent {os.getpid()}", flush=True)
    await ended.wait()
    await server.close()
    seat.leave()
    print("left", flush=True)


if "fails" in sys.argv:
    sys.exit("this agent fails on purpose")
if "late" in sys.argv:
    time.sleep(0.3)
asyncio.run(main(sys.argv[-1], (9, 9) if "old" in sys.argv else (1, 1)))
