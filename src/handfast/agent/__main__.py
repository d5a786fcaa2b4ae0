"""The agent's process: ``python -m handfast.agent MEETING_PLACE`` (see :mod:`~.process`)."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from typing import Final

from handfast.agent.host import Agent
from handfast.agent.joining import node_label
from handfast.agent.manners import Manners
from handfast.agent.process import Seat, settings, take_seat
from handfast.link.switch import Spoken

SWITCH_S: Final = 0.0005
"""For so long a thread at its own work keeps the loop from an answer; Python's 5 ms are felt."""


def main() -> int:
    """Serve until nobody needs this agent, or until SIGTERM; 0 also where another one serves."""
    level, linger_s, manners, spoken = settings()
    sys.setswitchinterval(SWITCH_S)
    logging.basicConfig(
        level=level,
        format="%(asctime)s agent %(process)d %(levelname)s %(message)s",
    )
    seat = take_seat(sys.argv[1])
    if seat is None:
        return 0
    manners.keep()
    try:
        asyncio.run(_serve(seat, linger_s, manners, spoken))
    finally:
        seat.leave()
    return 0


async def _serve(seat: Seat, linger_s: float, manners: Manners, spoken: tuple[Spoken, ...]) -> None:
    agent = Agent(
        seat.socket, manners.files(), label=node_label(), linger_s=linger_s, spoken=spoken
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, agent.stop)
    await agent.serve()


if __name__ == "__main__":
    sys.exit(main())
