"""A process with links of its own, for tests that stop and kill one: ME HOST PORT (of agent b)."""

import asyncio
import os
import sys
import tempfile

from handfast.agent.joining import life_of
from handfast.agent.links import Links, Pace
from handfast.agent.speech import Said
from handfast.link.records import Records


async def main(me: str, host: str, port: int) -> None:
    links = Links(
        secret=b"the secret of one run, 32 bytes.",
        run="run",
        me=life_of(me),
        records=Records(os.path.join(tempfile.mkdtemp(), "links")),
        on_said=lambda peer, said: None,
        on_up=lambda peer: print_error(links.send(peer, Said("d", b"%d" % os.getpid()))),
        on_down=lambda peer: None,
        pace=Pace(beat=0.05, silent=60.0, handshake=2.0, backoff=0.01, backoff_most=0.05),
    )
    _, mine = await links.listen("127.0.0.1")
    links.set_peers({"b": (host, port)})
    print(mine, flush=True)
    await asyncio.Event().wait()


def print_error(sent: bool) -> None:
    if not sent:
        print("the first message of a link was dropped", file=sys.stderr)


asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
