"""The scenarios in `transcripts` come out as they are written, so they can be read as the protocol.

To change them: `handfast simulate --script FILE --rewrite` for each, and read the diff.
"""

from pathlib import Path

import pytest

from handfast.core import member
from handfast.core.retain import releasable
from handfast.sim.ledger import Breach
from handfast.sim.script import VERBS, play

SCRIPTS = sorted((Path(__file__).parent / "transcripts").glob("*.txt"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_scenario_comes_out_as_it_is_written(path: Path) -> None:
    """Shows what members say, write and do, line by line."""
    assert play(path.read_text()) == path.read_text()


def test_there_are_scenarios() -> None:
    """So that an empty directory does not pass."""
    assert len(SCRIPTS) >= 12


def test_every_verb_is_explained() -> None:
    """Shows that whoever writes a scenario finds how each verb is written."""
    assert [verb for verb, do in VERBS.items() if f"`{verb}" not in (do.__doc__ or "")] == []


def test_the_script_that_is_explained_comes_out_as_it_is_written() -> None:
    """Shows that the example in docs/scripts.md is one."""
    page = Path(__file__).parents[2] / "docs" / "scripts.md"
    _, _, rest = page.read_text(encoding="utf-8").partition("```text\n")
    example, _, _ = rest.partition("```\n")
    assert "deliver a>b" in example
    assert play(example) == example


def test_a_scenario_that_comes_out_otherwise_is_seen() -> None:
    """Shows that a script's outcome is computed, and not copied."""
    assert (
        play("nodes a\n----\nb boots\n")
        == "nodes a\n----\na.1    boots\na.1    sees pins on nothing\n"
    )


@pytest.mark.parametrize(
    ("script", "where"),
    [
        ("launch", "line 1, 'launch': a script begins with `nodes`"),
        ("nodes a b\n\n# so\nlanch", "line 4, 'lanch': no such verb"),
        ("nodes a b\n----\n\ncrash c", "line 4, 'crash c': no agent of c is up"),
        ("nodes a b\nlaunch\nsave 0", "line 3, 'save 0': rank 0 has resumed nothing"),
    ],
)
def test_a_wrong_command_is_named_with_its_line(script: str, where: str) -> None:
    """Shows that a typing mistake is not taken for the protocol's doing."""
    with pytest.raises(ValueError, match=where.replace("(", r"\(")):
        play(script)


def test_a_scenario_is_held_against_the_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that a broken law ends a scenario, whatever is written below its commands."""
    monkeypatch.setattr(
        member, "releasable", lambda held, **rule: releasable(held, **{**rule, "pinned": ()})
    )
    script = "nodes a\nlaunch\nsave\ncalm\npin a 1/10\nsave\ncalm\nsave\ncalm\nsave\ncalm"
    with pytest.raises(Breach, match="a reader holds it"):
        play(script)
