"""From what ranks saw of the lattice to marks on a time line: who knew what of which epoch when."""

from collections.abc import Iterable

from handfast.demo.events import Event
from handfast.demo.result import Mark, MarkKind

__all__ = ["first_seen", "lines_seen"]

_OWN: tuple[MarkKind, ...] = ("staged", "persisted", "certified")


def first_seen(events: Iterable[Event], zero: float) -> list[Mark]:
    """Each fact of each domain at the time that it was first seen, counted from ``zero``.

    A domain's own rank sees it stage, persist and learn the certificate; that it is *attested* is
    what another rank has heard of it. An epoch passed over between two glances (a later one was
    certified already) takes the later one's time.
    """
    marks: dict[tuple[str, int, int, MarkKind], Mark] = {}
    staged: dict[str, set[tuple[int, int]]] = {}

    def note(domain: str, epoch: tuple[int, int], kind: MarkKind, at: float, by: str = "") -> None:
        for generation, step in staged.get(domain, ()):
            key = (domain, generation, step, kind)
            if generation == epoch[0] and step <= epoch[1] and key not in marks:
                marks[key] = Mark(at - zero, domain, generation, step, kind, by)

    for event in events:
        if event.kind != "lattice":
            continue
        for domain, seen in event.domains.items():
            if domain == f"{event.rank}":
                staged.setdefault(domain, set()).add(seen[0])
                for kind, epoch in zip(_OWN, seen, strict=True):
                    note(domain, epoch, kind, event.at)
            else:
                note(domain, seen[1], "attested", event.at, f"{event.rank}")
    return sorted((m for m in marks.values() if m.step), key=lambda m: (m.at, m.generation, m.step))


def lines_seen(events: Iterable[Event], zero: float) -> list[tuple[float, int, int]]:
    """When each converged epoch was first known by any rank: (at, generation, step)."""
    found: dict[tuple[int, int], float] = {}
    for event in events:
        if event.kind == "lattice" and event.line[1]:
            found.setdefault(event.line, event.at - zero)
    return sorted((at, *epoch) for epoch, at in found.items())
