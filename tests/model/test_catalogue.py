"""Shows which claimed instants are torn, in how few moves, and which hold: for known pipelines.

A finding is not believed on the search's word: every schedule is followed again through the rules
of the algebra alone, and where a pipeline is small all its states are counted again through them.
"""

from __future__ import annotations

from functools import cache

import pytest
from tests import docs_catalogue

from handfast.model.boundary import NOON, Finding, attack, compose, instants
from handfast.model.catalogue import CATALOGUE, handfast, manifest_last, two_phase
from handfast.model.network import automaton
from handfast.model.pipeline import Pipeline
from handfast.model.process import transitions
from handfast.model.verdicts import Verdict, examine

PIPELINES = {make().name: make() for make in CATALOGUE}
SMALL = 2_000  # states that the algebra's own rules walk over in a second or two


@cache
def verdict(name: str) -> Verdict:
    """What was found of a pipeline, worked out once."""
    return examine(PIPELINES[name])


def finding(name: str, words: str) -> Finding:
    """What was found of one claim."""
    return next(f for f in verdict(name).findings if words in f.claim)


HOLD = {
    "dcp-new-directory": {"job killed": ("when .metadata is renamed", "when dcp.save returns")},
    "2pc": {"always": ("when the coordinator decides",)},
    "manifest-last": {"always": ("when the manifest is created",)},
    "handfast": {"always": ("when a member holds the certificate",)},
}


@pytest.mark.parametrize("name", PIPELINES)
def test_claims_hold_or_are_torn_as_expected(name: str) -> None:
    """Three claims stand whatever crashes, two more where only processes die; all others fall."""
    hold = HOLD.get(name, {})
    assert verdict(name).sound == hold.get("always", ())
    killed = {f.claim for f in verdict(name).findings if f.tear("killed") is None}
    assert killed == {*hold.get("always", ()), *hold.get("job killed", ())}
    assert all(f.reached for f in verdict(name).findings)


@pytest.mark.parametrize("name", PIPELINES)
def test_an_instant_that_hangs_on_nothing_is_no_boundary(name: str) -> None:
    """At 12:00 nothing is sure to be saved, whatever saves it: one move, and then a crash."""
    noon = finding(name, NOON.words)
    assert [(t.fault, t.kind, t.moves) for t in noon.tears][:2] == [
        ("killed", "lost", 1),
        ("power", "lost", 1),
    ]


@pytest.mark.parametrize("name", PIPELINES)
def test_schedules_are_those_that_are_kept(name: str) -> None:
    """A change of a model shows in what its shortest schedules are; see docs_catalogue."""
    kept = (docs_catalogue.GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
    assert docs_catalogue.schedules(verdict(name)) == kept


def test_no_schedule_is_kept_of_what_is_gone() -> None:
    """One file a pipeline."""
    kept = {path.stem for path in docs_catalogue.GOLDEN.glob("*.txt")}
    assert kept == set(PIPELINES)


def test_the_table_of_the_theory_is_the_one_that_was_found() -> None:
    """Shows that no cell of docs/theory.md was typed; see docs_catalogue."""
    text = docs_catalogue.PAGE.read_text(encoding="utf-8")
    assert text == docs_catalogue.page(text, [verdict(name) for name in PIPELINES])


@pytest.mark.parametrize("name", PIPELINES)
def test_every_schedule_can_be_followed_by_the_rules_of_the_algebra(name: str) -> None:
    """Step by step through the whole system as one term, to what the restart loads."""
    pipeline = PIPELINES[name]
    for claim, found in zip(instants(pipeline), verdict(name).findings, strict=True):
        whole = compose(pipeline, claim).term()
        for tear in found.tears:
            term = whole
            for event in tear.events:
                (term,) = (after for a, after in transitions(term) if a == event)
            ((said, _),) = transitions(term)
            broken = f"the claim is {tear.kind} after {tear.fault} (epoch {tear.claimed})"
            assert str(said) == broken


@pytest.mark.parametrize("name", PIPELINES)
def test_the_algebra_counts_as_many_states(name: str) -> None:
    """The network that is searched has as many states as the term that it stands for."""
    pipeline = PIPELINES[name]
    for claim, found in zip(instants(pipeline), verdict(name).findings, strict=True):
        if found.states <= SMALL:
            assert len(automaton(compose(pipeline, claim).term()).terms) == found.states


def test_to_block_is_another_matter_than_to_tear() -> None:
    """Two-phase commit is sound and waits for its coordinator; with a timeout neither."""
    assert verdict("2pc").waits["coordinator"] == ("rank 0", "rank 1")
    assert verdict("2pc-timeout").waits["coordinator"] == ()
    assert not finding("2pc-timeout", "decides").sound
    waits = verdict("handfast").waits
    assert waits["rank 1"] == ("agent 0", "agent 1")
    assert waits["agent 0"] == ()


def test_in_silence_or_aloud() -> None:
    """Overwriting one directory mixes; a new directory a step loses, and only without power."""
    assert {t.kind for t in finding("dcp-overwriting", "returns").tears} == {
        "torn", "mixed", "lost",
    }  # fmt: skip
    assert {(t.fault, t.kind) for t in finding("dcp-new-directory", "returns").tears} == {
        ("power", "lost")
    }


LARGER = {
    "handfast": handfast(3, 3),
    "manifest-last": manifest_last(4, 3),
    "2pc": two_phase(4, 3),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", LARGER)
def test_what_holds_holds_for_more_ranks_and_epochs(name: str) -> None:
    """The sound claims at larger sizes, searched to the end."""
    pipeline: Pipeline = LARGER[name]
    found = attack(pipeline, pipeline.claims[-1])
    print(f"\n{name}: {found.states:,} states in {found.seconds:.0f} s")
    assert found.sound
