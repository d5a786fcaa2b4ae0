"""What is audited: the files below a path, as they were at one look; nothing of them is changed."""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from handfast.audit.extent import Reader
from handfast.audit.room import BEYOND
from handfast.errors import FormatError, HandfastError
from handfast.store.files import describe

__all__ = ["File", "Place", "look"]

SMALL: Final = 64 << 20
"""Bytes of an index, a tracker or the like that are read at most."""

DEEP: Final = 16
"""Levels of directories that are gone into."""

LINKED: Final = "not followed: a link to a directory"
BURIED: Final = f"not looked at: deeper than {DEEP} levels"


class File(NamedTuple):
    """A file: its length in bytes, and when it was last written, in seconds since 1970."""

    nbytes: int
    saved: float


class Place:
    """Files by their paths relative to ``root``, with "/" between names, in order of their names.

    ``folders`` are the directories, empty ones too; "" is the root. ``reader`` opens files.
    ``unseen`` are directories that were not gone into, and why.
    """

    def __init__(
        self,
        root: str,
        files: Mapping[str, File],
        folders: Collection[str],
        reader: Reader,
        unseen: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.root = root
        self.files = dict(sorted(files.items()))
        self.folders = tuple(sorted(folders))
        self.reader = reader
        self.unseen = dict(sorted(unseen.items()))
        self._within: dict[str, list[str]] = defaultdict(list)
        for path in (*self.files, *filter(None, self.folders)):
            self._within[os.path.dirname(path)].append(path)

    def within(self, folder: str) -> list[str]:
        """The paths of files and directories that lie in a directory itself, in order."""
        return sorted(self._within.get(folder, ()))

    def below(self, folder: str) -> Iterator[str]:
        """The paths of all files below a directory, at any depth."""
        return (path for path in self.files if not folder or path.startswith(f"{folder}/"))

    @property
    def called(self) -> str:
        """What the directory is called that is looked at; "" where one file is."""
        return self.root.rpartition("/")[2] if self.folders else ""

    def absolute(self, path: str) -> str:
        """The path for the system."""
        return os.path.join(self.root, path)

    def bytes(self, path: str, most: int = SMALL) -> bytes:
        """Read a small file whole, as long as it was when it was looked at.

        Raises FormatError where it is larger, Damaged where it is gone or shorter by now, and
        HandfastError where it can't be read.
        """
        size = self.files[path].nbytes
        if size > most:
            raise FormatError(
                f"{self.absolute(path)}: {BEYOND}: {size:,} bytes, and of such a file {most:,} are "
                "read at most. What to do: if you trust its writer, save less structure"
            )
        return self.reader.bytes(self.absolute(path), 0, size)

    def without(self, files: Collection[str]) -> Place:
        """The same place without some files, which are somebody's already."""
        left = {path: file for path, file in self.files.items() if path not in files}
        return Place(self.root, left, self.folders, self.reader, self.unseen)


def look(path: str | os.PathLike[str], reader: Reader) -> Place:
    """Look at a directory, or at one file. Links to files are followed, those to directories not.

    A link to a directory that is looked at by its own name is not among the ``unseen``.
    Raises HandfastError where the path is not there or can't be looked at.
    """
    given = os.path.abspath(os.fspath(path))
    try:
        found = os.stat(given)
        if not stat.S_ISDIR(found.st_mode):
            root, name = os.path.split(given)
            return Place(root, {name: File(found.st_size, found.st_mtime)}, (), reader)
        files: dict[str, File] = {}
        folders = [""]
        links: list[str] = []
        unseen: dict[str, str] = {}
        for folder in folders:  # grows while it is gone through
            for entry in _entries(os.path.join(given, folder)):
                inside = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    if inside.count("/") < DEEP:
                        folders.append(inside)
                    else:
                        unseen[inside] = BURIED
                elif entry.is_dir():
                    links.append(inside)
                elif entry.is_file():
                    status = entry.stat()
                    files[inside] = File(status.st_size, status.st_mtime)
    except OSError as error:
        raise HandfastError(
            f"{error.filename or given}: can't be looked at: {describe(error)}. What to do: see "
            "whether it is there, and whether this user may read it"
        ) from error
    unseen |= {link: LINKED for link in links if not _within(given, link, folders)}
    return Place(given, files, folders, reader, unseen)


def _within(root: str, link: str, folders: Collection[str]) -> bool:
    """Whether a link leads to a directory that is looked at anyway."""
    whole = os.path.realpath(os.path.join(root, link))
    inside = os.path.relpath(whole, os.path.realpath(root))
    return inside in folders or inside == os.curdir


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """A directory's entries; none of one that was removed since it was listed."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []
