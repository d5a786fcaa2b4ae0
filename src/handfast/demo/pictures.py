"""The report's pictures, as inline SVG without a script: colours come from the page's style sheet.

Each picture is drawn at two widths, for a desk and for a phone; the page shows the one that fits.
"""

import math
from collections.abc import Sequence

from handfast.demo.result import DemoResult, Kill, Mark, MarkKind
from handfast.drawing import Scale, frame, rule, tag, text
from handfast.model.spacetime import Arrow, Diagram, Kind, Loaded, Point, draw

__all__ = ["NARROW", "WIDE", "close_up", "closest", "lattice", "losses", "space_time"]

WIDE, NARROW = 1040, 380

GROWTH: dict[MarkKind, float] = {"staged": 8, "persisted": 15, "attested": 22, "certified": 30}
"""How tall an epoch's mark has grown with each fact."""

LANE, GAP = 30, 9

POINTS: dict[MarkKind, Kind] = {
    "staged": "stage",
    "persisted": "persist",
    "attested": "attest",
    "certified": "certificate",
}
"""Which point of a space-time diagram each fact is."""


def _epochs(marks: Sequence[Mark]) -> dict[tuple[str, int, int], dict[MarkKind, float]]:
    found: dict[tuple[str, int, int], dict[MarkKind, float]] = {}
    for mark in marks:
        found.setdefault((mark.domain, mark.generation, mark.step), {})[mark.kind] = mark.at
    return {key: facts for key, facts in found.items() if "staged" in facts}


def _undone(result: DemoResult, at: float, step: int) -> bool:
    """Whether an epoch staged then was above the next resume's line, so that it never counted."""
    later = [r for r in result.resumes if r.at > at and r.outcome != "unseen"]
    return bool(later) and min(later, key=lambda r: r.at).step < step


class _Storm:
    """The big picture: training progress on top, the lattice below, one axis of time."""

    def __init__(self, result: DemoResult, width: int) -> None:
        self.result = result
        self.width = width
        self.narrow = width < 600
        self.left = 30 if self.narrow else 76
        self.domains = sorted({mark.domain for mark in result.marks}) or ["0"]
        end = max([at for at, _ in result.progress], default=1.0)
        self.x = Scale(0.0, end, self.left, width - 10)
        self.top = 46
        self.floor = self.top + 140
        self.y = Scale(0, float(result.settings["steps"]), self.floor, self.top)
        self.lanes = self.floor + 26
        self.bottom = self.lanes + len(self.domains) * (LANE + GAP)
        self.epochs = _epochs(result.marks)
        self.columns: dict[tuple[int, int], float] = {}
        for (_, generation, step), facts in self.epochs.items():
            epoch = (generation, step)
            self.columns[epoch] = min(facts["staged"], self.columns.get(epoch, math.inf))

    def draw(self) -> str:
        parts = [*self._torchrun(), *self._axes(), *self._kills(), *self._progress()]
        parts += [*self._lanes(), *self._lines(), *self._badges()]
        return frame(
            self.width,
            self.bottom + 44,
            "Training steps over time with every kill, and below it each domain's epochs",
            "".join(parts),
        )

    def _torchrun(self) -> list[str]:
        under = [kill for kill in self.result.kills if kill.torchrun]
        if not under:
            return []
        before = [kill.at for kill in self.result.kills if kill.at < under[0].at]
        left, right = self.x(max(before, default=0.0)), self.x(under[-1].at)
        return [
            tag(
                "rect",
                x=left,
                y=self.top - 8,
                width=right - left,
                height=self.bottom - self.top + 4,
                cls="episode",
                rx=4,
            ),
            text(left + 6, self.top + 8, "torchrun", "faint"),
        ]

    def _axes(self) -> list[str]:
        parts: list[str] = []
        for value in self.y.ticks(3):
            y = self.y(value)
            parts.append(rule(self.left, y, self.width - 10, y, "grid"))
            parts.append(text(self.left - 6, y + 3.5, f"{value:g}", "tick", "end"))
        if not self.narrow:
            parts.append(text(0, self.top - 2, "step", "axis"))
        for value in self.x.ticks(4 if self.narrow else 10):
            x = self.x(value)
            parts.append(text(x, self.bottom + 36, f"{value:g} s", "tick", "middle"))
        return parts

    def _progress(self) -> list[str]:
        """The sawtooth: up while it trains, back to the recovery line after a kill."""
        runs: list[list[tuple[float, int]]] = [[]]
        last = 0
        for at, step in self.result.progress:
            if step != last + 1 and runs[-1]:
                runs.append([])
            runs[-1].append((at, step))
            last = step
        parts = []
        for run in runs:
            path = "M" + "L".join(f"{self.x(at):.1f} {self.y(step):.1f}" for at, step in run)
            parts.append(tag("path", d=path, cls="progress"))
        return parts

    def _lanes(self) -> list[str]:
        parts: list[str] = []
        for number, domain in enumerate(self.domains):
            base = self.lanes + number * (LANE + GAP) + LANE
            parts.append(rule(self.left, base + 0.5, self.width - 10, base + 0.5, "base"))
            name = f"r{domain}" if self.narrow else f"rank {domain}"
            parts.append(text(0, base - 10, name, "lane"))
            for (owner, generation, step), facts in self.epochs.items():
                if owner == domain:
                    parts.append(self._bar(base, generation, step, facts))
        return parts

    def _bar(self, base: float, generation: int, step: int, facts: dict[MarkKind, float]) -> str:
        reached: MarkKind = max(facts, key=lambda kind: GROWTH[kind])
        height = GROWTH[reached]
        thick = 2.2 if self.narrow else 4.0
        at = self.columns[generation, step]
        dim = " undone" if _undone(self.result, at, step) else ""
        title = tag("title", f"epoch {generation}/{step}: {reached}{' (undone)' if dim else ''}")
        return tag(
            "rect",
            title,
            x=self.x(at) - thick / 2,
            y=base - height,
            width=thick,
            height=height,
            rx=1,
            cls=f"{reached}{dim}",
        )

    def _column(self, step: int, before: float) -> float | None:
        """When the newest epoch of ``step`` was first staged anywhere, before a time."""
        epochs = [(g, at) for (g, s), at in self.columns.items() if s == step and at < before]
        return max(epochs)[1] if epochs else None

    def _lines(self) -> list[str]:
        """Each recovery line: through all domains, and an arc from the resume back to it."""
        parts: list[str] = []
        for resume in self.result.resumes:
            at = self._column(resume.step, resume.at)
            if resume.outcome in ("first", "unseen", "error") or at is None:
                continue
            x, now, base = self.x(at), self.x(resume.at), self.bottom - 2
            parts.append(rule(x, self.y(resume.step), x, base, "recovery"))
            parts.append(tag("circle", cx=x, cy=self.y(resume.step), r=2.6, cls="recovery-dot"))
            dip = min(22.0, 6 + (now - x) * 0.4)
            low = base + dip
            path = f"M{now:.1f} {base}C{now:.1f} {low:.1f} {x:.1f} {low:.1f} {x:.1f} {base}"
            title = tag("title", f"resumed from step {resume.step} ({resume.outcome})")
            parts.append(tag("path", title, d=path, cls="arc"))
        return parts

    def _kills(self) -> list[str]:
        return [
            rule(
                self.x(kill.at),
                self.top - 10,
                self.x(kill.at),
                self.bottom - GAP,
                f"kill {kill.target}",
            )
            for kill in self.result.kills
        ]

    def _badges(self) -> list[str]:
        """A numbered badge a kill; where they would touch, the next one stands higher."""
        parts: list[str] = []
        radius = 7.0 if self.narrow else 8.5
        taken = [-100.0, -100.0]
        for number, kill in enumerate(self.result.kills, 1):
            x = self.x(kill.at)
            row = 0 if x - taken[0] >= 2 * radius + 1 else 1
            taken[row] = x
            y = self.top - 18 - row * (2 * radius + 1)
            title = tag("title", f"{number}: {describe(kill)}")
            parts.append(tag("circle", title, cx=x, cy=y, r=radius, cls=f"badge {kill.target}"))
            parts.append(text(x, y + 3.2, str(number), "badge-text", "middle"))
        return parts


def describe(kill: Kill) -> str:
    """One kill in words."""
    whom = {
        "job": "all ranks",
        "rank": f"rank {kill.rank}",
        "agent": "both agents",
        "node": "all ranks and agents",
    }[kill.target]
    return f"{whom} at step {kill.step}, {kill.phase}"


def lattice(result: DemoResult, width: int) -> str:
    """Steps over time, kills, and each domain's epochs as marks that grow with what is known."""
    return _Storm(result, width).draw()


def closest(result: DemoResult) -> Kill | None:
    """The kill worth a closer look: the one that found the domains furthest apart."""
    epochs = _epochs(result.marks)

    domains = {domain for domain, _, _ in epochs}

    def apart(kill: Kill) -> tuple[int, int]:
        near = {
            key: sum(at <= kill.at for at in facts.values())
            for key, facts in epochs.items()
            if kill.at - 1.0 <= facts["staged"] <= kill.at
        }
        last = max((key[1:] for key in near), default=(0, 0))
        levels = [near.get((domain, *last), 0) for domain in domains]
        return len(set(levels)), sum(levels)

    fatal = [kill for kill in result.kills if kill.target != "agent" and not kill.torchrun]
    return max(fatal, key=apart, default=None)


def close_up(result: DemoResult, kill: Kill, width: int) -> str:
    """The last second before one kill: how each domain's epochs grow at their own pace."""
    narrow = width < 600
    left = 30 if narrow else 76
    x = Scale(kill.at - 1.0, kill.at + 0.04, left, width - 10)
    domains = sorted({mark.domain for mark in result.marks})
    tall = LANE * 1.3
    parts: list[str] = []
    resumed = next((r.step for r in result.resumes if r.at > kill.at), 0)
    epochs = _epochs(result.marks)
    for number, domain in enumerate(domains):
        base = 34 + number * (tall + GAP) + tall
        parts.append(rule(left, base + 0.5, width - 10, base + 0.5, "base"))
        parts.append(text(0, base - 12, f"r{domain}" if narrow else f"rank {domain}", "lane"))
        own = sorted(
            (facts["staged"], step, facts)
            for (owner, _, step), facts in epochs.items()
            if owner == domain and facts["staged"] < kill.at
        )
        starts = [staged for staged, _, _ in own] + [kill.at]
        for i, (staged, step, facts) in enumerate(own):
            if starts[i + 1] < x.low:
                continue
            line = " chosen" if step == resumed else ""
            parts.append(_grown(x, base, facts, starts[i + 1], line))
            if number == 0 and staged > x.low:
                side = "middle" if x(kill.at) - x(staged) > 40 else "end"
                parts.append(text(x(staged), 24, f"step {step}", "tick", side))
    bottom = 34 + len(domains) * (tall + GAP)
    at = x(kill.at)
    parts.append(rule(at, 14, at, bottom, f"kill {kill.target} strong"))
    parts.append(text(at, 10, "SIGKILL", "kill-word", "end"))
    for back in (1.0, 0.5, 0.0):
        shown = "kill" if not back else f"{-back:g} s"
        parts.append(text(x(kill.at - back), bottom + 16, shown, "tick", "middle"))
    return frame(width, bottom + 24, "The last second before one kill", "".join(parts))


def _grown(x: Scale, base: float, facts: dict[MarkKind, float], until: float, line: str) -> str:
    """One epoch in one domain: a stair that rises with each fact, up to ``until``."""
    stairs = sorted((at, kind) for kind, at in facts.items() if at <= until)
    parts: list[str] = []
    for i, (at, _) in enumerate(stairs):
        end = stairs[i + 1][0] if i + 1 < len(stairs) else until
        start = max(at, x.low)
        if end <= start:
            continue
        reached = max((seen for _, seen in stairs[: i + 1]), key=lambda seen: GROWTH[seen])
        top = GROWTH[reached] * 1.3
        title = tag("title", reached)
        parts.append(
            tag(
                "rect",
                title,
                x=x(start),
                y=base - top,
                width=x(end) - x(start),
                height=top,
                cls=f"{reached}{line}",
            )
        )
    return "".join(parts)


def space_time(result: DemoResult, kill: Kill, width: int) -> str:
    """That second as a space-time diagram: facts as points, hearing of them as arrows."""
    domains = sorted({mark.domain for mark in result.marks})
    resumed = next((r.step for r in result.resumes if r.at > kill.at), 0)
    epochs = _epochs(result.marks)
    near = [m for m in result.marks if kill.at - 1.0 <= m.at <= kill.at]
    near = [m for m in near if (m.domain, m.generation, m.step) in epochs]
    first = min((mark.at for mark in near), default=kill.at - 1.0)
    since = first - 0.05 * (kill.at - first)
    points, arrows = [], []
    for mark in near:
        own, by = domains.index(mark.domain), domains.index(mark.by or mark.domain)
        durable = _durable(epochs[mark.domain, mark.generation, mark.step])
        at = durable if mark.kind == "persisted" else mark.at
        words = f"step {mark.step} of rank {mark.domain}: {mark.kind}"
        points.append(Point(by, at, POINTS[mark.kind], words))
        if by != own and durable >= since:
            arrows.append(Arrow(own, durable, by, at))
    loaded = []
    for line, domain in enumerate(domains):
        born = [_durable(f) for (d, _, step), f in epochs.items() if (d, step) == (domain, resumed)]
        shown = [(line, at) for at in born if since <= at <= kill.at]
        words = f"step {resumed}" if resumed else "from scratch"
        loaded.append(Loaded(line, shown[-1] if shown else None, words))
    lines = tuple(f"rank {domain}" for domain in domains)
    seen = Diagram(
        "", "", lines, since, kill.at, "SIGKILL", tuple(points), tuple(arrows), tuple(loaded)
    )
    return draw(seen, float(width))


def _durable(facts: dict[MarkKind, float]) -> float:
    """When an epoch was first seen to be durable: another rank may see it before its own does."""
    return min((at for kind, at in facts.items() if kind != "staged"), default=math.inf)


def losses(result: DemoResult, width: int) -> str:
    """Both loss curves in one picture: the uninterrupted one broad, the killed one on top of it."""
    narrow = width < 600
    left, top, bottom = (30 if narrow else 44), 14, 236
    both = [v for v in result.reference.losses + result.storm.losses if math.isfinite(v)]
    steps = max(len(result.reference.losses), len(result.storm.losses), 2)
    x = Scale(1, steps, left, width - 10)
    y = Scale(min(both, default=0.0) * 0.95, max(both, default=1.0), bottom, top)
    parts: list[str] = []
    for value in y.ticks(4):
        at = y(value)
        parts.append(rule(left, at, width - 10, at, "grid"))
        parts.append(text(left - 6, at + 3.5, f"{value:g}", "tick", "end"))
    parts += [
        text(x(value), bottom + 28, f"{value:g}", "tick", "middle")
        for value in x.ticks(4 if narrow else 8)
    ]
    for values, cls in ((result.reference.losses, "truth"), (result.storm.losses, "killed")):
        points = "L".join(
            f"{x(step):.1f} {y(loss):.1f}"
            for step, loss in enumerate(values, 1)
            if math.isfinite(loss)
        )
        if points:
            parts.append(tag("path", d="M" + points, cls=cls))
    at_kill = [(x(max(1, kill.step)), kill.target) for kill in result.kills]
    parts += [rule(at, bottom + 3, at, bottom + 11, f"kill {who} strong") for at, who in at_kill]
    return frame(width, bottom + 34, "Loss over steps of both runs", "".join(parts))
