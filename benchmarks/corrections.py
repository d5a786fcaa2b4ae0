"""How a training goes on from a state whose parts are of several epochs, and what corrections do.

A small transformer learns with AdamW. After some hundred steps its state is spoilt: its moments are
those of 1, 20 or 100 steps before, or are lost (zero, beside a counter that is kept), or their
counter is. It then trains on with the batches that it would have had: as it is, after each
correction that applies, or from the last epoch that was whole (rollback, which takes those steps
again). Each is held against the same training, uninterrupted, at as many steps after the event; and
so is that training with other batches from there, which is what chance alone makes of it.

Values are thousandths of a nat of held-out loss, one for each seed; above 0 is worse. One small
model, early in its training, at a constant rate: what another one does is not in it.

Asked by name alone, since it takes minutes and measures no cost; ``--repeat`` is how many seeds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from benchmarks.common.figures import Figure, Setting
from benchmarks.common.tables import Sheet
from handfast.demo import corpus
from handfast.demo.model import Transformer
from handfast.drawing import Scale, frame, rule, tag, text
from handfast.torch.corrections import Correction, Damp, Rescale, Reset

__all__ = ["ask", "draw", "lay"]

VARIES = ()
UNIT: Final = "mnat"
BETAS: Final = ((0.9, 0.999), (0.9, 0.95))
EVENT: Final = 300
"""Steps before the state is spoilt."""
AFTER: Final = 200
"""Steps that are looked at."""
SKEWS: Final = (1, 20, 100)
WARMUP: Final = 50
LR: Final = 2e-3
BATCH, CONTEXT, WIDTH, LAYERS, HEADS = 8, 32, 32, 1, 2
HELD_OUT: Final = 64
"""Rows of text that the training never sees."""

State = dict[str, Any]
"""What ``state_dict`` gives."""


class Epoch(NamedTuple):
    """Parameters, and the optimizer's state."""

    theta: State
    moments: State


class Way(NamedTuple):
    """How one goes on: from which epoch, and as after how many steps; corrected or not."""

    epoch: Epoch
    step: int
    correction: Correction | None = None
    other: bool = False


def ask(setting: Setting) -> Iterator[Figure]:
    """Measure it."""
    torch.set_num_threads(1)  # more get into each other's way in so small a model
    for betas in BETAS:
        told = [_beyond(Training(seed, betas)) for seed in range(setting.repeat)]
        for (fault, then), curve in told[0].items():
            for step in curve:
                yield Figure(
                    question="corrections",
                    who=then,
                    what=_what(fault, betas),
                    unit=UNIT,
                    values=tuple(each[fault, then][step] for each in told),
                    at={"steps": step},
                )


def _what(fault: str, betas: tuple[float, float]) -> str:
    return f"{fault}, betas {betas}"


def _steps() -> list[int]:
    """After how many steps one looks: often at first."""
    return [step for step in (1, 2, 5, 10) if step < AFTER] + list(range(20, AFTER + 1, 20))


# The training


class Training:
    """One training: everything follows from its seed."""

    def __init__(self, seed: int, betas: tuple[float, float]) -> None:
        found = corpus.read()
        codes = torch.frombuffer(bytearray(found.codes), dtype=torch.uint8).long()
        cut = len(codes) * 9 // 10
        self._seen, unseen = codes[:cut], codes[cut:]
        self._seed, self._betas = seed, betas
        torch.manual_seed(seed)
        self._model = Transformer(
            len(found.alphabet), CONTEXT, width=WIDTH, layers=LAYERS, heads=HEADS, dropout=0.0
        )
        self._optimizer = self._made()
        self._unseen = _rows(unseen, HELD_OUT, torch.Generator().manual_seed(-1))

    def _made(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(self._model.parameters(), lr=LR, betas=self._betas, fused=True)

    def first(self) -> dict[int, Epoch]:
        """Train to the event; gives the epochs that a splice may take from, by their steps."""
        kept = {EVENT - skew for skew in (0, *SKEWS)}
        found = {}
        for step in range(1, EVENT + 1):
            self._step(step, other=False)
            if step in kept:
                states = (self._model.state_dict(), self._optimizer.state_dict())
                found[step] = Epoch(*copy.deepcopy(states))
        return found

    def curve(self, way: Way) -> dict[int, float]:
        """Go on a way; gives the held-out loss after as many steps."""
        self._model.load_state_dict(way.epoch.theta)
        self._optimizer = self._made()
        self._optimizer.load_state_dict(copy.deepcopy(way.epoch.moments))
        if way.correction is not None:
            way.correction.apply(self._optimizer)
        losses, looked = {}, set(_steps())
        for taken in range(1, AFTER + 1):
            self._step(way.step + taken, way.other)
            if taken in looked:
                with torch.no_grad():
                    losses[taken] = float(self._model(*self._unseen))
        return losses

    def _step(self, step: int, other: bool) -> None:
        drawn = torch.Generator().manual_seed((2 * self._seed + other) * 1_000_000 + step)
        self._optimizer.zero_grad()
        self._model(*_rows(self._seen, BATCH, drawn)).backward()
        self._optimizer.step()


def _rows(codes: Tensor, count: int, drawn: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(codes) - CONTEXT, (count, 1), generator=drawn)
    rows = codes[starts + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


# What is done to it

CHANCE: Final = "other batches"
WHOLE: Final = "whole"
NOTHING, BACK = "as it is", "rollback"


def _faults() -> list[str]:
    return [*map(_behind, SKEWS), "moments lost", "counter lost"]


def _behind(skew: int) -> str:
    return f"moments {skew} {'step' if skew == 1 else 'steps'} behind"


def _ways(epochs: Mapping[int, Epoch]) -> Iterator[tuple[str, str, Way]]:
    """Each fault, what is done then, and how that goes on."""
    now, last = epochs[EVENT], max(SKEWS)
    reset = Way(now, EVENT, Reset(warmup=WARMUP))  # whatever the moments were: they are dropped
    back = {skew: Way(epochs[EVENT - skew], EVENT - skew) for skew in SKEWS}
    yield WHOLE, CHANCE, Way(now, EVENT, other=True)
    for skew in SKEWS:
        mixed, fault = Epoch(now.theta, epochs[EVENT - skew].moments), _behind(skew)
        yield fault, NOTHING, Way(mixed, EVENT)
        yield fault, BACK, back[skew]
        yield fault, f"reset, {WARMUP} steps", reset
        if skew > 1:  # by 1 nothing is divided
            yield fault, f"damp by {skew}", Way(mixed, EVENT, Damp(skew=skew))
    for fault, zeroed, count in (
        ("moments lost", ("exp_avg", "exp_avg_sq"), 0), ("counter lost", ("step",), EVENT),
    ):  # fmt: skip
        mixed = Epoch(now.theta, _zeroed(now.moments, zeroed))
        yield fault, NOTHING, Way(mixed, EVENT)
        yield fault, f"{BACK}, {last} steps", back[last]
        yield fault, f"reset, {WARMUP} steps", reset
        yield fault, f"rescale to {count}", Way(mixed, EVENT, Rescale(count=count))


def _zeroed(moments: State, names: Sequence[str]) -> State:
    made = copy.deepcopy(moments)
    for entry in made["state"].values():
        for name in names:
            entry[name].zero_()
    return made


def _beyond(training: Training) -> dict[tuple[str, str], dict[int, float]]:
    """How far each way's loss is above the uninterrupted training's, in mnat."""
    epochs = training.first()
    whole = training.curve(Way(epochs[EVENT], EVENT))
    ways = list(_ways(epochs))
    one = {id(way): way for *_, way in ways}  # what several faults share is run once
    curves = {
        key: {step: 1000 * (loss - whole[step]) for step, loss in training.curve(way).items()}
        for key, way in one.items()
    }
    return {(fault, then): curves[id(way)] for fault, then, way in ways}


# How it is shown


def lay(question: str, about: str, figures: Sequence[Figure]) -> Sheet:
    """Lay out the worst of each way, and its end, each with the range over the seeds."""
    ways: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        ways.setdefault((figure.what, figure.who), []).append(figure)
    rows: list[tuple[str, ...]] = []
    for (what, who), curve in ways.items():
        worst = [max(values) for values in zip(*(f.values for f in curve), strict=True)]
        rows.append(
            (what, who, _spread(curve[0].values), _spread(worst), _spread(curve[-1].values))
        )
    last = max(figure.at["steps"] for figure in figures)
    heads = ("state", "then", "after 1 step", "the worst of all", f"after {last} steps")
    return Sheet(f"{question}: {about}", heads, rows)


def _spread(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{median(values):+.1f} ({low:+.1f} to {high:+.1f})"


WIDE_PX, HIGH_PX = 760.0, 430.0
TOP, FLOOR = 74.0, 318.0
STYLE: Final = """
svg { background:#fbfaf7; font:12px system-ui,sans-serif; }
text { fill:#1d1c1a; } .title { font-size:15px; font-weight:650; } .soft { fill:#6a6761; }
line { stroke-width:1.8; } line.grid { stroke:#e4e0d8; stroke-width:1; }
line.zero { stroke:#1d1c1a; stroke-width:1; }
path { fill:none; stroke-width:1.8; stroke-linejoin:round; } path.band { stroke:none; opacity:.16; }
.chance { fill:#8f8a80; stroke:#8f8a80; } .nothing { fill:#b3123f; stroke:#b3123f; }
.rollback { fill:#3a56d4; stroke:#3a56d4; } .reset { fill:#b07a00; stroke:#b07a00; }
.damp, .rescale { fill:#0f766e; stroke:#0f766e; } path.line { fill:none; }
"""
CLASSES: Final = {NOTHING: "nothing", CHANCE: "chance"}


def draw(figures: Sequence[Figure]) -> dict[str, str]:
    """Draw each fault: medians over the steps, with bands from the least to the most of all seeds.

    Gives an SVG by a name for its file.
    """
    return {fault.replace(" ", "-"): _picture(fault, figures) for fault in _faults()}


def _picture(fault: str, figures: Sequence[Figure]) -> str:
    panels = [
        [f for f in figures if f.what in (_what(fault, betas), _what(WHOLE, betas))]
        for betas in BETAS
    ]
    shown = [value for panel in panels for figure in panel for value in figure.values]
    y = Scale(min(0.0, *shown), max(0.0, *shown), FLOOR, TOP)
    count = len(panels[0][0].values)
    seeds = f"{count} seeds" if count > 1 else "1 seed"
    parts = [
        text(16, 22, f"{fault[0].upper()}{fault[1:]}: loss beyond the whole training's", "title"),
        text(16, 41, f"held-out loss in mnat, over steps after the event; median and range of "
             f"{seeds}; below 0 is better than uninterrupted", "soft"),
    ]  # fmt: skip
    for number, (betas, panel) in enumerate(zip(BETAS, panels, strict=True)):
        left = 58.0 + number * 358
        x = Scale(0.0, float(AFTER), left, left + 316)
        parts += _panel(f"betas {betas}", panel, x, y)
    at = 16.0
    for who in dict.fromkeys(figure.who for figure in panels[0]):
        parts.append(rule(at, 374, at + 20, 374, _class(who)))
        parts.append(text(at + 26, 378, who))
        at += 44 + 6.6 * len(who)
    told = ("One small model, early in training. It says nothing of another one; the grey band is "
            "what other batches alone do.")  # fmt: skip
    parts.append(text(16, 408, told, "soft"))
    return frame(WIDE_PX, HIGH_PX, f"{fault}: what corrections do", "".join(parts), STYLE)


def _class(who: str) -> str:
    return CLASSES.get(who, who.split()[0].strip(","))


def _panel(title: str, figures: Sequence[Figure], x: Scale, y: Scale) -> Iterator[str]:
    for value in y.ticks(6):
        yield rule(x(0), y(value), x(AFTER), y(value), "grid")
        yield text(x(0) - 6, y(value) + 4, f"{value:g}", "soft", "end")
    for step in x.ticks(4):
        yield text(x(step), FLOOR + 17, f"{step:g}", "soft", "middle")
    yield rule(x(0), y(0), x(AFTER), y(0), "zero")
    yield text(x(0), TOP - 8, title, "soft")
    for who in dict.fromkeys(figure.who for figure in figures):
        curve = [figure for figure in figures if figure.who == who]
        steps = [x(figure.at["steps"]) for figure in curve]
        low, high = ([y(edge(figure.values)) for figure in curve] for edge in (min, max))
        around = [*zip(steps, high, strict=True), *reversed([*zip(steps, low, strict=True)])]
        middle = [*zip(steps, (y(figure.median) for figure in curve), strict=True)]
        yield tag("path", d=f"{_track(around)}Z", cls=f"band {_class(who)}")
        yield tag("path", d=_track(middle), cls=f"line {_class(who)}")


def _track(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
