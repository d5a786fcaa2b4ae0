"""Space-time diagrams: who did what in which order, what was under way, and what a restart takes.

Lamport's (1978): each domain is a line, time runs along it, a message is an arrow between lines. A
crash is a stroke through all of them. The *recovery line* (Randell 1975) joins, on each line, the
point at which what is loaded had become what it is: where it is straight in epochs all is well,
where it runs back to a line's beginning or through points of different epochs it is not.

Pictures are plain SVG, without a script. In a page they take its colours where it has them; one
that stands alone has its own paper, and nothing in it that only browsers understand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final, Literal

import msgspec

from handfast.drawing import Scale, frame, rule, tag, text
from handfast.model.boundary import Tear
from handfast.model.pipeline import NOTHING, TORN, Claim, Event, Pipeline, Place

__all__ = ["Arrow", "Diagram", "Loaded", "Point", "draw", "of_tear"]

Kind = Literal["stage", "persist", "attest", "certificate", "other"]

WORDS: Final[Mapping[Kind, str]] = {
    "stage": "written, not durable",
    "persist": "durable",
    "attest": "sent or heard",
    "certificate": "claimed, or certified",
}
KINDS: Final[Mapping[str, Kind]] = {
    **dict.fromkeys(("opens", "writes", "drafts", "renames", "deletes"), "stage"),
    **dict.fromkeys(("syncs", "syncs the draft of", "syncs the name of"), "persist"),
    **dict.fromkeys(("puts", "creates", "writes back"), "persist"),
    **dict.fromkeys(("sends", "hears", "arrives at", "returns from"), "attest"),
}
BECOMES: Final = ("opens", "writes", "renames", "puts", "creates")

LANE, TOP, STEP, LEFT, RIGHT, NARROWEST = 96.0, 96.0, 38.0, 100.0, 120.0, 720.0
LETTERS: Final = 24  # of a label; all of it is shown when pointed at
STYLE: Final = """
.st { font:11px system-ui,sans-serif; } .st text { fill:var(--ink,#1d1c1a); }
.st .st-soft { fill:var(--soft,#6a6761); } .st .st-name { font-weight:650; }
.st .st-title { font-size:14px; font-weight:650; }
.st-line { stroke:var(--rule,#cfcac0); stroke-width:1.4; } .st-paper { fill:var(--card,#fff); }
.st-stage { fill:var(--card,#fff); stroke:var(--attested,#56aa9d); stroke-width:1.8; }
.st-persist { fill:var(--attested,#56aa9d); }
.st-attest { fill:var(--soft,#8d8880); } .st-other { fill:var(--soft,#8d8880); }
.st-certificate { fill:var(--certified,#0d6b60); stroke:var(--card,#fff); stroke-width:1.2; }
.st-arrow { stroke:var(--soft,#8d8880); stroke-width:1; fill:none; }
.st-head { fill:var(--soft,#8d8880); }
.st-crash { stroke:var(--kill,#c8401a); stroke-width:2; }
.st .st-crash-word { fill:var(--kill,#c8401a); font-weight:700; }
.st-recovery { stroke:var(--line,#3a56d4); stroke-width:2; fill:none; stroke-linejoin:round; }
.st-dot { fill:none; stroke:var(--line,#3a56d4); stroke-width:2; }
.st .st-loaded { fill:var(--line,#3a56d4); font-weight:650; }
"""


class Point(msgspec.Struct, frozen=True):
    """What happened on a line at a time; ``label`` stands beside it, ``words`` when pointed at."""

    line: int
    at: float
    kind: Kind
    words: str
    label: str = ""


class Arrow(msgspec.Struct, frozen=True):
    """A message: from a line and time to another line and time."""

    line: int
    at: float
    to: int
    then: float


class Loaded(msgspec.Struct, frozen=True):
    """What a line's domain resumes from, in words, and where that came to be.

    ``born`` is (line, time): None where it never did, and it starts from scratch.
    """

    line: int
    born: tuple[int, float] | None
    words: str


class Diagram(msgspec.Struct, frozen=True):
    """All of a picture. Times are on one scale from ``since`` to ``crash``, in any unit."""

    title: str
    under: str
    lines: tuple[str, ...]
    since: float
    crash: float
    crash_words: str
    points: tuple[Point, ...]
    arrows: tuple[Arrow, ...]
    loaded: tuple[Loaded, ...]


def of_tear(pipeline: Pipeline, claim: Claim, tear: Tear) -> Diagram:
    """Draw a schedule of the adversary: one place along the line for each event."""
    names = tuple(dict.fromkeys([*pipeline.actors, *(e.who for e in _schedule(tear))]))
    lines = tuple(name for name in names if name != "the kernel")
    memory = [s for s in pipeline.servers if isinstance(s, Place) and not s.lasting]
    fleeting = {place.name for place in memory}
    points: list[Point] = []
    sent: dict[tuple[str, int], list[tuple[int, float]]] = {}
    arrows: list[Arrow] = []
    owner: dict[str, int] = {}
    for i, event in enumerate(_schedule(tear)):
        at = float(i)
        line = owner[event.what] if event.who == "the kernel" else lines.index(event.who)
        owner[event.what] = line
        kind = "certificate" if claim.matches(event) else KINDS.get(event.does, "other")
        if kind == "persist" and event.what in fleeting:  # memory keeps nothing, however it is put
            kind = "stage"
        points.append(Point(line, at, kind, str(event), _label(event)))
        came = sent.setdefault((event.what, event.epoch), [])
        if event.does in ("sends", "arrives at"):
            came.append((line, at))
        elif event.does in ("hears", "returns from"):
            arrows += [Arrow(*origin, line, at) for origin in came if origin[0] != line]
    return Diagram(
        title=pipeline.about,
        under=f"Saved {claim.words}? No: {tear.kind}.",
        lines=lines,
        since=-1.0,
        crash=float(tear.moves),
        crash_words=str(tear.events[tear.moves]),
        points=tuple(points),
        arrows=tuple(arrows),
        loaded=tuple(_loaded(tear, points, lines)),
    )


def _schedule(tear: Tear) -> tuple[Event, ...]:
    return tear.events[: tear.moves]


def _label(event: Event) -> str:
    epoch = f"· {event.epoch}" if event.epoch > 0 else ""
    words = " ".join(word for word in (event.does, event.what) if word)
    return f"{words if len(words) <= LETTERS else words[: LETTERS - 1] + '…'} {epoch}".strip()


def _loaded(tear: Tear, points: list[Point], lines: tuple[str, ...]) -> Iterator[Loaded]:
    """Where what each rank loads had come to be, by the pieces that the restart read last."""
    loads = tear.events[-1]
    read = [event for event in tear.events if event.does == "reads"][-len(loads.of) :]
    found = tuple(event.epoch for event in read) == loads.of
    for rank, value in enumerate(loads.of):
        line = lines.index(f"rank {rank}")
        words = {TORN: "torn", NOTHING: "from scratch"}.get(value, f"epoch {value}")
        born = [
            (point.line, point.at)
            for point, event in zip(points, _schedule(tear), strict=True)
            if found and event.what == read[rank].what and event.does in BECOMES
            if value in (TORN, event.epoch)
        ]
        yield Loaded(line, born[-1] if born else None, words)
    if not loads.of:
        yield from (
            Loaded(i, None, "refused") for i, name in enumerate(lines) if name.startswith("rank ")
        )


def draw(diagram: Diagram, width: float | None = None, *, alone: bool = False) -> str:
    """Draw a diagram as SVG, as wide as its events need or as it is told (in pixels).

    It is for a page, whose colours it takes, or to stand ``alone``, as a file.
    """
    span = diagram.crash - diagram.since
    wide = max(NARROWEST, LEFT + span * STEP + RIGHT) if width is None else width
    left = LEFT if wide >= 600 else 44.0
    x = Scale(diagram.since, diagram.crash, left, wide - (RIGHT if wide >= 600 else 84.0))
    labelled = any(point.label for point in diagram.points)
    lane, top = (LANE, TOP) if labelled else (46.0, 0.0)
    ys = [top + 40 + i * lane for i in range(len(diagram.lines))]
    floor = ys[-1] + 28
    body = [text(0, 16, diagram.title, "st-title")] if diagram.title else []
    body += [text(0, 34, diagram.under, "st-soft")] if diagram.under else []
    for name, y in zip(diagram.lines, ys, strict=True):
        body.append(text(0, y + 4, name if wide >= 600 else name.replace("rank ", "r"), "st-name"))
        body.append(rule(left, y, x(diagram.crash), y, "st-line"))
    body += [_arrow(a, x, ys) for a in diagram.arrows]
    body += _recovery(diagram, x, ys)
    body += [part for point in diagram.points for part in _point(point, x(point.at), ys)]
    crash = x(diagram.crash)
    body.append(rule(crash, ys[0] - 26, crash, floor, "st-crash"))
    body.append(text(crash, floor + 14, diagram.crash_words, "st-crash-word", "middle"))
    keys, floor = _legend(wide, floor + 40)
    inner = tag("g", "".join([*body, *keys]), cls="st")
    if alone:
        inner = tag("rect", width=wide, height=floor + 8, cls="st-paper") + inner
    style = re.sub(r"var\(--\w+,(#\w+)\)", r"\1", STYLE) if alone else STYLE
    return frame(wide, floor + 8, diagram.title or "A space-time diagram", inner, style)


def _point(point: Point, x: float, ys: list[float]) -> Iterator[str]:
    y = ys[point.line]
    title = tag("title", point.words)
    cls = f"st-{point.kind}"
    if point.kind == "attest":
        yield tag("path", title, d=f"M{x:.1f} {y - 4}l4 4l-4 4l-4 -4z", cls=cls)
    elif point.kind == "certificate":
        yield tag("rect", title, x=x - 6, y=y - 6, width=12, height=12, rx=2, cls=cls)
    else:
        radius = 2.5 if point.kind == "other" else 4.5
        yield tag("circle", title, cx=x, cy=y, r=radius, cls=cls)
    if point.label:
        turn = f"translate({x + 3:.1f} {y - 9:.1f}) rotate(-38)"
        yield tag("g", text(0, 0, point.label, "st-soft"), transform=turn)


def _arrow(arrow: Arrow, x: Scale, ys: list[float]) -> str:
    x1, y1, x2, y2 = x(arrow.at), ys[arrow.line], x(arrow.then), ys[arrow.to]
    length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5 or 1.0
    ux, uy = (x2 - x1) / length, (y2 - y1) / length
    ex, ey = x2 - 6 * ux, y2 - 6 * uy
    head = (
        f"M{ex:.1f} {ey:.1f}L{ex - 7 * ux - 3 * uy:.1f} {ey - 7 * uy + 3 * ux:.1f}"
        f"L{ex - 7 * ux + 3 * uy:.1f} {ey - 7 * uy - 3 * ux:.1f}z"
    )
    return rule(x1, y1, ex, ey, "st-arrow") + tag("path", d=head, cls="st-head")


def _recovery(diagram: Diagram, x: Scale, ys: list[float]) -> Iterator[str]:
    """The recovery line, from line to line, and what each resumes from behind the crash."""
    places = [
        (x(diagram.since), ys[each.line])
        if each.born is None
        else (x(each.born[1]), ys[each.born[0]])
        for each in diagram.loaded
    ]
    if places:
        path = "L".join(f"{at:.1f} {y:.1f}" for at, y in places)
        yield tag("path", d=f"M{path}", cls="st-recovery")
    for (at, y), each in zip(places, diagram.loaded, strict=True):
        yield tag("circle", cx=at, cy=y, r=8, cls="st-dot")
        yield text(x(diagram.crash) + 10, ys[each.line] + 4, each.words, "st-loaded")


def _legend(width: float, y: float) -> tuple[list[str], float]:
    """What the signs mean, in as many rows as it takes; and where the last row stands."""
    parts: list[str] = []
    at = 6.0
    for kind, words in (*WORDS.items(), (None, "what a restart takes")):
        need = 26 + 6.2 * len(words)
        if at > 6.0 and at + need > width:
            at, y = 6.0, y + 18
        if kind is None:
            parts.append(rule(at - 5, y - 4, at + 5, y - 4, "st-recovery"))
        else:
            parts += _point(Point(0, 0.0, kind, words), at, [y - 4])
        parts.append(text(at + 10, y, words, "st-soft"))
        at += need
    return parts, y
