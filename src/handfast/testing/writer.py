"""A writer that is killed, or whose plug is pulled, and what is left of what it had attested.

:func:`plug` writes until it is stopped, and tells how far it came each time that all is synced;
:func:`after` looks what is left of that, behind a power loss or from another host. Run by itself
this module is the writer that the trial of killed writers kills.
"""

import itertools
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec

from handfast.core.lattice import Epoch
from handfast.errors import UNREADABLE, HandfastError
from handfast.store.claims import identify
from handfast.store.directory import claim
from handfast.store.files import Files, Posix, read_file, write_file
from handfast.store.pins import Holder
from handfast.store.shelf import Shelf
from handfast.testing.samples import picture, save

__all__ = ["HOLDER", "Trial", "after", "lost", "plug", "write"]

NAME, RUN = "rank0", "crashtest"
NBYTES: Final = 1 << 20
LEFT: Final = "handfast-crashtest"  # what `plug` leaves, for `after` to find and to remove
HELD: Final = 3  # epochs that a writer keeps; older ones are released
HOLDER: Final = "holder.json"  # who made a directory, as pins have it


class Trial(NamedTuple):
    """One thing that was tried: whether it held, what was seen, and what rests on it."""

    name: str
    holds: bool
    seen: str
    rests: str


class _Home(NamedTuple):
    run: str
    domain: str
    shard: int


def _picture(step: int) -> bytearray:
    return picture(step, nbytes=NBYTES)[1]


def write(root: str, tell: Callable[[str], None], files: Files) -> None:
    """Save epoch after epoch, and tell of each that is attested; never ends by itself."""
    identity = identify(files, root, NAME, run=RUN, shard=0)
    tier = claim(files, root, NAME)
    layout, _ = picture(0, nbytes=NBYTES)
    last = max((int(record) for record in tier.history), default=0)
    tell("writing")
    for step in itertools.count(last + 1):
        home = _Home(RUN, identity.id, 0)
        save(tier, home, Epoch(tier.incarnation, step), _picture(step), layout)
        tier.journal.append(b"%d" % step)
        tier.journal.sync()
        if tier.current():
            tell(str(step))
        if step > HELD:
            tier.may_clean = True
            tier.release([epoch for epoch in tier.manifests() if epoch.step <= step - HELD])


def lost(root: str, told: int) -> str:
    """What is missing or torn of all up to the last that was told; empty where nothing is.

    Each is recorded, and the last that are recorded are there: those before were released.
    """
    files = Posix()
    shelf = Shelf(files, root, NAME)
    recorded = [int(record) for record in shelf.records()]
    last = max(recorded, default=0)
    if told > last:
        return (
            f"attested and not in the journals: {told - last} epochs from {last + 1} on, unless "
            f"{told} is more than was ever told"
        )
    if missing := sorted(set(range(1, last + 1)).difference(recorded)):
        return f"attested and not in the journals: {_few(missing)}"
    found = shelf.manifests()
    layout, _ = picture(0, nbytes=NBYTES)
    there = {epoch.step for epoch in found}
    if gone := [step for step in recorded[-HELD:] if step not in there]:
        return f"attested, and the manifest is gone: {_few(gone)}"
    for epoch in found:
        into = bytearray(layout.nbytes)
        shelf.read(epoch, into)
        if into != _picture(epoch.step):
            return f"epoch {epoch} reads well and holds other bytes than were written"
    return ""


def _few(steps: Sequence[int]) -> str:
    more = f" and {len(steps) - 5} more" if len(steps) > 5 else ""
    return ", ".join(map(str, steps[:5])) + more


# Pulling the plug, and looking from elsewhere


def plug(path: str, tell: Callable[[str], None]) -> None:
    """Save below a directory until this process is ended; tell of each epoch that is durable.

    What it leaves stays for :func:`after`. Raises HandfastError, also where an earlier one left
    something, and OSError.
    """
    left = f"{path}/{LEFT}"
    if os.path.lexists(left):
        raise HandfastError(
            f"{left} is there, from an earlier --plug. What to do: look what is left of it "
            "with --after N, which removes it where all is well; or remove it"
        )
    os.mkdir(left)
    write_file(Posix(), f"{left}/{HOLDER}", msgspec.json.encode(Holder.here("crashtest --plug")))
    Posix().fsync_dir(left)
    Posix().fsync_dir(path)
    write(left, lambda line: None if line == "writing" else tell(line), Posix())


def after(path: str, step: int) -> Trial:
    """Look whether all up to the last epoch that `plug` told of is there; if so, remove it.

    Raises HandfastError where nothing of `plug` is there: nobody can tell from that whether it was
    ever begun.
    """
    root = f"{path}/{LEFT}"
    if not os.path.isdir(root):
        raise HandfastError(
            f"{root} is not there: --plug was never begun in this directory, or all that it wrote "
            "is gone, and then this storage can't be trusted with a power loss. What to do: see "
            "that it is mounted, and that this is the directory; begin with --plug"
        )
    rests = _shows(root)
    try:
        problem = lost(root, step)
    except HandfastError as error:
        problem = str(error)
    if not problem:
        shutil.rmtree(root)
    seen = problem or f"all {step} epochs that were told of are recorded, and the last are whole"
    return Trial("after the plug", not problem, seen, rests)


def _shows(root: str) -> str:
    """Say what it shows that all is there: by who looks, and since when."""
    try:
        data = read_file(Posix(), f"{root}/{HOLDER}")
        writer = msgspec.json.decode(data, type=Holder)
    except (HandfastError, *UNREADABLE):
        return "what was synced is there; who wrote it can't be read"
    here = Holder.here("crashtest --after")
    if writer.boot and writer.boot == here.boot:
        return (
            "what was synced is there once its writer has ended. This machine runs as it did then: "
            "of a power loss that shows nothing, unless it was another machine's that has the disk"
        )
    if writer.host == here.host:
        return "what was synced is there behind a restart: a power loss, if the plug was pulled"
    return "what was synced is there, seen from another host"


def main() -> None:
    """Write until killed, or until nobody hears it any more; what goes wrong is said in a line."""

    def tell(line: str) -> None:
        os.write(1, f"{line}\n".encode())  # past all buffers, which would complain at the end

    try:
        write(sys.argv[1], tell, Posix())
    except BrokenPipeError:
        pass
    except (HandfastError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
