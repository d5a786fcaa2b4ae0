"""The documents that are made from code are those that the code would make."""

import re
from pathlib import Path

import pytest
from tests import docs_theory, docs_vocabulary
from tests.docs_diagram import PAGE, page

from handfast.model import pipeline
from mutants import MUTANTS

CLAIMS = Path(__file__).parents[1] / "docs" / "CLAIMS.md"
GLOSSARY = CLAIMS.with_name("GLOSSARY.md")


def test_the_diagram_of_an_edge_is_that_of_the_table_that_runs() -> None:
    """Shows that docs/protocol.md has the transitions of handfast.core.link; see docs_diagram."""
    text = PAGE.read_text(encoding="utf-8")

    assert text == page(text)


@pytest.mark.parametrize("name", docs_theory.PAGES)
def test_the_figures_of_the_theory_are_those_that_are_worked_out(name: str) -> None:
    """Shows that no table of the theory's pages was typed; see docs_theory."""
    text = (docs_theory.DOCS / name).read_text(encoding="utf-8")

    assert text == docs_theory.page(name, text)


@pytest.mark.parametrize("name", docs_vocabulary.PAGES)
def test_the_vocabularies_are_those_of_the_code(name: str) -> None:
    """Shows that scripts and pipelines can be written by their pages; see docs_vocabulary."""
    text = (docs_vocabulary.DOCS / name).read_text(encoding="utf-8")

    assert text == docs_vocabulary.page(name, text)


def test_all_that_a_pipeline_may_import_is_explained() -> None:
    """Shows that no name of handfast.model.pipeline is left out of docs/pipelines.md."""
    text = (docs_vocabulary.DOCS / "pipelines.md").read_text(encoding="utf-8")
    types = {"Event", "Process", "Server", "Steps", "KILLED", "POWER"}  # not written by hand

    assert [name for name in pipeline.__all__ if f"`{name}" not in text and name not in types] == []


def test_the_glossary_has_each_word_once() -> None:
    """Shows that no word is explained twice, nor those left out by which pages judge."""
    words = re.findall(r"^\*\*(.+?)\.\*\*", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE)

    assert [word for word in words if words.count(word) > 1] == []
    assert {"law", "goal", "breach", "story", "gust", "claim", "move", "step"} <= set(words)


def test_the_pictures_of_the_theory_show_the_formulas(tmp_path: Path) -> None:
    """Shows that the curves in docs/img are those that `handfast plan --svg` draws now."""
    docs_theory.draw(tmp_path)
    drawn = sorted(tmp_path.glob("torn-*.svg"))

    assert len(drawn) == 3
    for path in drawn:
        kept = (docs_theory.IMG / path.name).read_text(encoding="utf-8")
        assert docs_theory.formulas(kept) == docs_theory.formulas(path.read_text(encoding="utf-8"))
        assert "seen" in kept


def test_each_wrong_protocol_stands_beside_a_law_that_it_breaks() -> None:
    """So the table of the laws names all that shows that they have teeth."""
    rows = [line.split("|") for line in CLAIMS.read_text().splitlines() if line.startswith("| ")]
    beside = {
        (row[1].strip().lower(), name)
        for row in rows
        if len(row) > 5
        for name in row[4].split("`")[1::2]
    }
    for fault in MUTANTS:
        assert any((law, fault.name) in beside for law in fault.laws), fault.name
