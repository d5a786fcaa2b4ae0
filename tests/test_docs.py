"""The documents that are made from code are those that the code would make."""

from pathlib import Path

import pytest
from tests import docs_theory
from tests.docs_diagram import PAGE, page


def test_the_diagram_of_an_edge_is_that_of_the_table_that_runs() -> None:
    """Shows that docs/protocol.md has the transitions of handfast.core.link; see docs_diagram."""
    text = PAGE.read_text(encoding="utf-8")

    assert text == page(text)


@pytest.mark.parametrize("name", docs_theory.PAGES)
def test_the_figures_of_the_theory_are_those_that_are_worked_out(name: str) -> None:
    """Shows that no table of the theory's pages was typed; see docs_theory."""
    text = (docs_theory.DOCS / name).read_text(encoding="utf-8")

    assert text == docs_theory.page(name, text)


def test_the_pictures_of_the_theory_show_the_formulas(tmp_path: Path) -> None:
    """Shows that the curves in docs/img are those that `handfast plan --svg` draws now."""
    docs_theory.draw(tmp_path)
    drawn = sorted(tmp_path.glob("torn-*.svg"))

    assert len(drawn) == 3
    for path in drawn:
        kept = (docs_theory.IMG / path.name).read_text(encoding="utf-8")
        assert docs_theory.formulas(kept) == docs_theory.formulas(path.read_text(encoding="utf-8"))
        assert "seen" in kept
