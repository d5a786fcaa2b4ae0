"""A disk on which a file is written in place: under its own name from the first byte on.

The store makes a file under a temporary name, syncs it, and gives it its name by a `rename` or a
`link`. :class:`InPlace` takes that away from the files of one kind, and nothing else: what goes to
the temporary name goes into the file itself, the one that is there if there is one, every sync is
made, and the naming does nothing.
"""

from __future__ import annotations

import re
import traceback

import deletion

from handfast.testing.powerloss import Disk

SITES = {
    f"{site.path}:{site.line}"
    for site in deletion.sites({"rename", "link"})
    if "temporary" in site.call.lower()
}
"""The lines of the source that give a file its name; `rename` also takes manifests away."""

KINDS = {
    "agent/keeper.py publish: the certificate": r"/certificates/[^/]+\.json",
    "checkpoint/export.py new_file: the export": r"/tmp[^/]*/\d",
    "checkpoint/rounds.py _write: the round": r"/round\.json",
    "fleet/identity.py enroll: the key": r"/node\.key",
    "link/life.py count: the counter": r"/counter",
    "link/records.py _anew: the records of links": r"/links",
    "store/claims.py _create_identity: the identity": r"/domain\.json",
    "store/directory.py _write_data: the image": r"/chunks/[^/]+",
    "store/directory.py _write_manifest: the manifest": r"/manifests/[^/]+",
    "store/pins.py pin: the pin": r"/pins/[^/]+",
}
"""What is written so, by how its final name ends."""

TEMPORARY = re.compile(r"(\.[0-9a-f]+)?\.tmp$")  # what a name has behind it until it is published


class InPlace(Disk):
    """A disk for a story, on which files of one kind, or none, are written in place.

    `named` is which line of the source gave which file its name.
    """

    def __init__(self, *there: str, kind: str = "") -> None:
        super().__init__(*there)
        self.named: set[tuple[str, str]] = set()
        self._kind = re.compile(f".*{KINDS[kind]}" if kind else "(?!)")
        self._unnamed: set[str] = set()

    def create(self, path: str) -> int:
        final = self._final(path)
        if final == path:
            return super().create(path)
        if super().exists(final):
            return super().open(final)
        self._unnamed.add(final)
        return super().create(final)

    def open(self, path: str) -> int:
        return super().open(self._final(path))

    def exists(self, path: str) -> bool:
        return path not in self._unnamed and super().exists(path)

    def unlink(self, path: str) -> None:
        if self._final(path) == path:
            super().unlink(path)

    def rename(self, source: str, target: str) -> None:
        if not self._names(source, target):
            super().rename(source, target)

    def link(self, source: str, target: str) -> None:
        if not self._names(source, target):
            super().link(source, target)

    def _final(self, path: str) -> str:
        final = TEMPORARY.sub("", path)
        return final if self._kind.fullmatch(final) else path

    def _names(self, source: str, target: str) -> bool:
        """Note who names a file; say whether it has that name already."""
        if source.endswith(".tmp"):
            self.named.add((_line(), target))
        self._unnamed.discard(target)
        return self._final(source) == target


def _line() -> str:
    """The line of the shipped source that is being run."""
    for frame, line in traceback.walk_stack(None):
        path = frame.f_code.co_filename.removeprefix(f"{deletion.SOURCE}/")
        if path != frame.f_code.co_filename and not path.startswith("testing/"):
            return f"{path}:{line}"
    raise AssertionError("nobody of the source is here")
