"""Shows that whoever watches, on a terminal or through a pipe, is told the same."""

import io

from demo_samples import sample
from rich.console import Console

from handfast.demo.events import Event
from handfast.demo.result import Resume
from handfast.demo.show import Picture, PlainLines, told


def perform(stage: Picture | PlainLines) -> None:
    stage.begin("a run", 20)
    stage.event(Event(at=1.0, rank=0, launch=1, kind="step", step=2, loss=3.25))
    stage.event(
        Event(
            at=1.0,
            rank=1,
            launch=1,
            kind="lattice",
            domains={"1": ((1, 5), (1, 5), (0, 0))},
            line=(1, 0),
        )
    )
    stage.kill(sample().kills[2])
    stage.resume(sample().resumes[1])
    stage.note("done")


def test_a_pipe_gets_plain_lines() -> None:
    """No escape sequences, no line that overwrites another: a log in CI must be readable."""
    text = io.StringIO()
    with PlainLines(Console(file=text)) as stage:
        perform(stage)
    said = text.getvalue()
    assert "\x1b" not in said
    assert "\r" not in said
    assert "step    2  loss 3.250" in said
    assert "SIGKILL to rank 1 at step 3 (staging, under torchrun)" in said
    assert "resumed step 1 (newest, bit for bit)" in said


def test_a_terminal_gets_the_lattice() -> None:
    """Progress, each domain's epochs, the kills, and the converged line."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    with Picture(console) as stage:
        perform(stage)
        console.print(stage._draw())
    said = text.getvalue()
    for words in ("step 2/20", "loss 3.250", "1 kills", "rank 1", "1/5", "converged", "SIGKILL"):
        assert words in said


def test_every_outcome_has_words() -> None:
    """A mixture shouts; an error says why; a kill before the restore says nothing of the saver."""

    def said(outcome: str) -> str:
        return told(Resume(1.0, 2, 5, 10, outcome, False, "why"))

    assert said("mixture") == "resumed a MIXTURE: why"
    assert said("error") == "could not resume: why"
    assert said("abandoned") == "resumed an ABANDONED timeline: why"
    assert said("unseen") == "killed before it had resumed"
    assert said("older") == "resumed step 5 (older)"
