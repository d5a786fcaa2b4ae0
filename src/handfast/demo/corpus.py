"""The text that every machine has: the sources of Python's own standard library."""

import sysconfig
from pathlib import Path
from typing import NamedTuple

import xxhash

from handfast.errors import HandfastError

__all__ = ["LIMIT", "Corpus", "read"]

LIMIT = 1 << 18
"""Characters taken at most."""


class Corpus(NamedTuple):
    """The training text, one small number a character.

    ``codes`` holds one byte a character, an index into ``alphabet``; ``digest`` names the text, so
    that two runs know whether they learned from the same one.
    """

    alphabet: str
    codes: bytes
    digest: str


def read(folder: Path | None = None, limit: int = LIMIT) -> Corpus:
    """Read the top-level modules of ``folder`` in order of name, up to ``limit`` characters.

    Only printable ASCII and line ends are kept: the alphabet is then below a hundred characters
    on every machine. ``folder`` is the standard library's unless given. Raises HandfastError where
    there are no sources (an interpreter that ships byte code alone).
    """
    source = folder or Path(sysconfig.get_paths()["stdlib"])
    parts: list[str] = []
    room = limit
    for path in sorted(source.glob("*.py")):
        if room <= 0:
            break
        text = path.read_text(encoding="utf-8", errors="ignore")
        kept = "".join(c for c in text if " " <= c <= "~" or c == "\n")[:room]
        parts.append(kept)
        room -= len(kept)
    text = "".join(parts)
    if not text:
        raise HandfastError(
            f"{source} holds no Python sources, so there is nothing to train on. Run the demo with "
            "an interpreter that has its standard library's .py files"
        )
    alphabet = "".join(sorted(set(text)))
    index = {c: i for i, c in enumerate(alphabet)}
    codes = bytes(index[c] for c in text)
    digest = xxhash.xxh3_128_hexdigest(text.encode("ascii"))
    return Corpus(alphabet, codes, digest)
