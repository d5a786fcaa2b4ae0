"""What lies in a domain's directory that no epoch needs: the one place that says so.

Data that no manifest of any incarnation refers to, names that were never published, and manifests
that were renamed away. To take it away is for who has claimed the domain alone (see
:meth:`handfast.store.directory.Directory.release`): a save in progress looks like litter, too.
"""

from collections.abc import Collection
from typing import Final

from handfast.core.lattice import Epoch
from handfast.errors import FormatError
from handfast.store import manifest as codec
from handfast.store.claims import incarnations
from handfast.store.files import TEMPORARY, Files
from handfast.store.shelf import named_epoch, read_manifest

__all__ = ["KINDS", "RELEASED", "litter", "references"]

RELEASED: Final = ".released"  # the end of a manifest's name that was taken away
KINDS: Final = ("chunks", "manifests")  # in the order in which litter goes


def references(files: Files, path: str, held: Collection[Epoch] = ()) -> set[str] | None:
    """All that some manifest in a domain's directory refers to, relative to that.

    Of the epochs that readers have ``held``, a manifest that was renamed away counts, too, and is
    among these itself: they get it back. None where a manifest is damaged, for then it is not
    known. Raises OSError or HandfastError where one can't be looked at.
    """
    used: set[str] = set()
    for number in incarnations(files, path):
        where = f"{number}/manifests"
        for name in files.listdir(f"{path}/{where}") if files.exists(f"{path}/{where}") else ():
            back = named_epoch(name.removesuffix(RELEASED)) in held
            if named_epoch(name) is None and not back:
                continue
            used.add(f"{where}/{name}")
            try:
                data = read_manifest(files, f"{path}/{where}/{name}")
                used.update(codec.decode(data, f"{path}/{where}/{name}").sources)
            except FormatError:
                return None
    return used


def litter(files: Files, path: str, number: int, kind: str, used: set[str]) -> list[str]:
    """What one of an incarnation's directories holds that is not used, relative to the domain's.

    Raises OSError.
    """
    where = f"{path}/{number}/{kind}"  # a power loss may leave an incarnation with one of the kinds
    return [
        stray
        for name in (files.listdir(where) if files.exists(where) else ())
        if kind == "chunks" or name.endswith((TEMPORARY, RELEASED))
        if (stray := f"{number}/{kind}/{name}") not in used
    ]
