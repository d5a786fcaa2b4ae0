"""Two services and their link: they talk under 1/1, change to 1/2 while it is open, and go back.

Each service has a directory of its own, and is told the key of the other:

    handfast fleet enroll LEFT          # says its key; so for RIGHT
    python examples/links/two.py listen LEFT PORT KEY-OF-RIGHT 1/2
    python examples/links/two.py dial RIGHT PORT KEY-OF-LEFT 1/2

The last argument is the epoch that both are to come to, 1/1 if it is left out. Kill one or both,
start them again, and they go on where they were. To roll back, start both with 1/3: what 1/1 meant,
under a number that was never used.
"""

import asyncio
import hashlib
import sys
from types import SimpleNamespace

import msgspec

from handfast.core.lattice import Epoch
from handfast.errors import HandfastError
from handfast.fleet.identity import life, load
from handfast.fleet.link import End, Keyed, Records, Session, Spoken, Stream
from handfast.link.life import boot_id

# How the epochs write a value; what can't be read is a ValueError.
text = SimpleNamespace(encode=str.encode, decode=bytes.decode)  # 1/1, and 1/3
json = SimpleNamespace(encode=msgspec.json.encode, decode=msgspec.json.Decoder(str).decode)  # 1/2

# A digest says what the bytes of an epoch mean: of the build that reads them, say.
OLD, NEW = (hashlib.sha256(build).hexdigest() for build in (b"text", b"text as JSON"))
ONE, TWO, THREE = Spoken(Epoch(1, 1), OLD), Spoken(Epoch(1, 2), NEW), Spoken(Epoch(1, 3), OLD)
CODECS = {ONE.epoch: text, TWO.epoch: json, THREE.epoch: text}


async def main(role: str, directory: str, port: str, theirs: str, to: str = "1/1") -> None:
    """Be one of the two services, as the command line says."""
    goal = next(each for each in (ONE, TWO, THREE) if str(each.epoch) == to)
    key = load(directory)
    records = Records(f"{directory}/link")  # what the link must not forget, in any life

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        spoken = records.spoken or (ONE,)  # the first life offers the base, all later what is kept
        mine = Session(
            Keyed(key), node, spoken, peers={theirs}, dialer=role == "dial", known=records
        )
        try:
            async with Stream(reader, writer, End(mine, CODECS, order=True), records) as link:
                await link.opened()
                print("opened under", link.end.sending, flush=True)
                if role == "dial":
                    await ask(link)
                if link.end.sending < goal.epoch:  # else an earlier life was through with it
                    await link.change(goal)  # goes on once the peer asks for the same
                if role == "dial":
                    await link.changed()
                    await ask(link)
                while role == "listen":
                    _, value = await link.take()
                    await link.send(f"you said {value}")
        except HandfastError as error:
            print(error, flush=True)

    with life(directory, key, boot_id()) as node:  # one more of this node: durable, and alone
        if role == "dial":
            await talk(*await asyncio.open_connection("127.0.0.1", int(port)))
        else:
            await (await asyncio.start_server(talk, "127.0.0.1", int(port))).serve_forever()


async def ask(link: Stream) -> None:
    """Say something, and print under which epoch the answer came."""
    await link.send("hello")
    print(*await link.take(), flush=True)


asyncio.run(main(*sys.argv[1:]))
