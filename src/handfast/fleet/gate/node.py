"""What a node says of itself when it is admitted: written once by its prolog, read by its ranks.

A rank is another user in another image than its node, and often can't see the driver, the firmware
or the Fabric Manager. So `handfast fleet admit` writes the host and fabric tiers to a file. Where a
node's service answers (:mod:`~handfast.fleet.gate.serve`) nobody reads it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Final

from handfast.errors import FormatError
from handfast.fleet.compat.judge import Verdicts, judge
from handfast.fleet.compat.meaning import reads
from handfast.fleet.compat.rules import Probed, Rules, Scope
from handfast.fleet.gate.stack import held, stack
from handfast.fleet.inventory.facts import Inventory, decode, encode

__all__ = ["AGE", "PATH", "admit", "read_node", "trusted", "write_node"]

PATH: Final = "/run/handfast/node.json"  # gone with the boot that it was true of
AGE: Final = timedelta(days=1)
OVERFLOW: Final = "/proc/sys/kernel/overflowuid"
MOST: Final = 4 << 20  # bytes; an inventory has some twenty thousand


def admit(rules: Rules, node: Inventory, name: str, probed: Iterable[Probed] = ()) -> Verdicts:
    """Judge one node by the rules about nodes; those that need a rank's facts say nothing yet."""
    alone = tuple(rule for rule in rules.rules if rule.scope is Scope.NODE)
    wanted = {fact for rule in alone for fact in chain(*reads(rule))}
    facts = held(stack(node, node), wanted)
    return judge(Rules(rules.name, alone, rules.words), {name: facts}, probed=probed)


def write_node(path: str, node: Inventory) -> None:
    """Put a node's inventory where its ranks read it, whole or not at all. Raises OSError."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o755, exist_ok=True)
    beside = f"{path}.{os.getpid()}"
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with open(fd, "wb") as file:
            file.write(encode(node))
        os.rename(beside, path)
    except OSError:
        os.unlink(beside)
        raise


def read_node(path: str, at: datetime, age: timedelta = AGE) -> Inventory | None:
    """Read what this node said; None where it said nothing.

    Raises FormatError for a file that another user than root or this one could have written, that
    is older than ``age`` at the time ``at``, or from after it, and for one that can't be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _distrust(path, error.strerror or str(error)) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _distrust(path, "it is no plain file")
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        written = datetime.fromtimestamp(found.st_mtime, UTC)
        if not trusted(found.st_uid):
            raise _distrust(path, f"it is of user {found.st_uid}, and neither root's nor ours")
        if found.st_mode & 0o022:
            raise _distrust(path, "others may write it")
        if not at - age <= written <= at + timedelta(minutes=1):
            raise _distrust(path, f"it is from {written:%Y-%m-%dT%H:%M:%SZ}")
        data = file.read(MOST + 1)
    if len(data) > MOST:
        raise _distrust(path, f"it has more than {MOST} bytes")
    return decode(data, path)


def trusted(uid: int) -> bool:
    """Whether a rank believes what is this user's: root's, or its own.

    In a user namespace all users that it does not map look like one (user_namespaces(7), "Unmapped
    user and group IDs"); that one is nobody's own.
    """
    try:
        with open(OVERFLOW, encoding="ascii") as file:
            unmapped = int(file.read(16))
    except (OSError, ValueError):
        unmapped = 65534
    return uid in {0, os.geteuid()} - {unmapped}


def _distrust(path: str, why: str) -> FormatError:
    return FormatError(
        f"{path} does not count: {why}. What to do: write it in the prolog, as root, with "
        "`handfast fleet admit`"
    )
