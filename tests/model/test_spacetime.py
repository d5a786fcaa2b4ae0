"""Shows that a space-time diagram says what its schedule says, stands alone, is well-formed."""

from __future__ import annotations

import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from handfast.demo import pictures
from handfast.demo.result import Curve, DemoResult, Kill, Mark, Resume, Tally
from handfast.model.boundary import Tear, attack, instants
from handfast.model.catalogue import CATALOGUE
from handfast.model.pipeline import Claim, Pipeline
from handfast.model.spacetime import Diagram, draw, of_tear

SVG = "{http://www.w3.org/2000/svg}"
PIPELINES = {make().name: make() for make in CATALOGUE}


def torn(name: str, words: str, fault: str, kind: str) -> tuple[Pipeline, Claim, Tear]:
    """One schedule of the catalogue."""
    pipeline = PIPELINES[name]
    claim = next(claim for claim in instants(pipeline) if words in claim.words)
    tears = attack(pipeline, claim).tears
    return pipeline, claim, next(t for t in tears if (t.fault, t.kind) == (fault, kind))


def test_every_event_is_a_point_on_its_actors_line() -> None:
    """In their order, with the claimed instant marked and a message as an arrow."""
    pipeline, claim, tear = torn("2pc-timeout", "decides", "killed", "lost")
    diagram = of_tear(pipeline, claim, tear)
    before = tear.events[: tear.moves]
    assert [p.words for p in diagram.points] == [str(event) for event in before]
    assert [diagram.lines[p.line] for p in diagram.points] == [event.who for event in before]
    assert sum(p.kind == "certificate" for p in diagram.points) == 1
    sent = [i for i, event in enumerate(before) if event.does == "sends"]
    assert sorted(arrow.at for arrow in diagram.arrows) == [float(i) for i in sent]
    assert all(arrow.at < arrow.then for arrow in diagram.arrows)


def test_the_recovery_line_runs_through_what_is_loaded() -> None:
    """To the point where each piece came to be; to the line's beginning where there is none."""
    pipeline, claim, tear = torn("dcp-overwriting", "returns", "killed", "mixed")
    diagram = of_tear(pipeline, claim, tear)
    born = [each.born for each in diagram.loaded]
    events = [tear.events[int(at)] for _, at in filter(None, born)]
    assert [(e.does, e.what, e.epoch) for e in events] == [
        ("writes", "__0_0.distcp", 2),
        ("writes", "__1_0.distcp", 1),
    ]
    assert [each.words for each in diagram.loaded] == ["epoch 2", "epoch 1"]

    scratch = of_tear(*torn("rename-each", "rename", "killed", "mixed"))
    assert [each.born is None for each in scratch.loaded] == [False, True]
    piece = of_tear(*torn("dcp-overwriting", "returns", "killed", "torn"))
    assert [each.words for each in piece.loaded] == ["torn", "epoch 1"]
    refused = of_tear(*torn("dcp-overwriting", "returns", "power", "lost"))
    assert {each.words for each in refused.loaded} == {"refused"}


def test_memory_is_never_drawn_as_durable() -> None:
    """What a peer's memory holds is written, and not durable, however it was put there."""
    file = Path(__file__).resolve().parents[2] / "examples" / "pipelines" / "peer_memory.py"
    pipeline = runpy.run_path(str(file))["pipeline"]
    (tear,) = attack(pipeline, pipeline.claims[0]).tears
    drawn = of_tear(pipeline, pipeline.claims[0], tear).points
    assert [p.kind for p in drawn if "puts memory" in p.words] == ["stage", "stage"]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_schedule_can_be_drawn_and_stands_alone(name: str) -> None:
    """Well-formed, with its paper and its style, without a script, a link outwards, or a colour
    that only a page would have."""
    pipeline = PIPELINES[name]
    for claim in instants(pipeline):
        for tear in attack(pipeline, claim).tears:
            picture = draw(of_tear(pipeline, claim, tear), alone=True)
            assert "var(" not in picture
            root = ET.fromstring(picture)  # noqa: S314 - our own text
            kinds = {element.tag.removeprefix(SVG) for element in root.iter()}
            assert kinds <= {"svg", "style", "g", "text", "line", "path", "circle", "rect", "title"}
            assert "http" not in picture.replace(SVG.strip("{}"), "")
            titles = [t.text for t in root.iter(f"{SVG}title")]
            assert [str(event) for event in tear.events[: tear.moves]] == titles[: tear.moves]


def demo(marks: list[Mark]) -> DemoResult:
    """What a demo with one kill found, in the parts that pictures look at."""
    curve = Curve([1.0], "", "", "", 1.0)
    return DemoResult(
        machine={},
        settings={"steps": 10, "world": 2, "parameters": 1},
        reference=curve,
        storm=curve,
        kills=[Kill(5.0, 1, 8, "job", None, "moment", "")],
        resumes=[Resume(6.0, 2, 5, 5, "newest")],
        tally=Tally(),
        marks=marks,
        lines=[],
        progress=[],
        repeated=0,
        clashes=0,
        peers=[],
        seconds=1.0,
    )


@pytest.mark.parametrize("width", [pictures.WIDE, pictures.NARROW])
def test_the_demo_shows_a_kill_in_space_and_time(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Facts on the line of whoever knows them, arrows to who has heard, the resume's line."""
    marks = [
        Mark(4.2, "0", 1, 5, "staged"),
        Mark(4.3, "1", 1, 5, "staged"),
        Mark(4.4, "0", 1, 5, "persisted"),
        Mark(4.5, "1", 1, 5, "attested", "0"),
        Mark(4.6, "1", 1, 5, "persisted"),
        Mark(4.7, "0", 1, 5, "attested", "1"),
        Mark(4.8, "0", 1, 5, "certified"),
    ]
    drawn: list[Diagram] = []
    monkeypatch.setattr(pictures, "draw", lambda d, w: drawn.append(d) or draw(d, w))
    result = demo(marks)
    picture = pictures.space_time(result, result.kills[0], width)
    ET.fromstring(picture)  # noqa: S314 - our own text
    (diagram,) = drawn
    # that domain 1 was heard of shows that it was durable before its own rank had seen it
    assert [each.born for each in diagram.loaded] == [(0, 4.4), (1, 4.5)]
    assert [(a.line, a.at, a.to, a.then) for a in diagram.arrows] == [
        (1, 4.5, 0, 4.5),
        (0, 4.4, 1, 4.7),
    ]
    assert len(diagram.points) == len(marks)
