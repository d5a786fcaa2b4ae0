"""What still tells of a run whose domains are gone: the certificates that were published.

Nothing is restored from them. But where they lie and no journal knows of a run, it was lost, and
is neither a first start nor idle.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from handfast.core.verdict import Verdict
from handfast.errors import Refused
from handfast.store.files import Files

__all__ = ["certificates", "lost"]

SUFFIX: Final = ".json"


def certificates(files: Files, root: str) -> tuple[str, ...]:
    """Name the domains whose certificates lie in ``ROOT/certificates``. Raises OSError."""
    home = f"{root}/certificates"
    names = files.listdir(home) if files.exists(home) else []
    return tuple(sorted(name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)))


def lost(names: Iterable[str], what: str, shards: Sequence[str]) -> Refused:
    """Say that a run was here; ``what`` is gone of it, ``shards`` are where it was looked for."""
    return Refused(
        f"epochs had converged here (certificates of {', '.join(sorted(set(names)))}), and {what}",
        verdict=Verdict.MISSING,
        shards=shards,
        remedy="put the directories below domains/ back; or, to begin anew, remove certificates/ "
        "or give a fresh path",
    )
