"""The documents that are made from code are those that the code would make."""

from tests.docs_diagram import PAGE, page


def test_the_diagram_of_an_edge_is_that_of_the_table_that_runs() -> None:
    """Shows that docs/protocol.md has the transitions of handfast.core.link; see docs_diagram."""
    text = PAGE.read_text(encoding="utf-8")

    assert text == page(text)
