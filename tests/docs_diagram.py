"""The diagram of an edge in docs/protocol.md, drawn from the table that runs.

``python -m tests.docs_diagram`` writes it anew; ``tests/test_docs.py`` fails where it is stale.
"""

from pathlib import Path

from tests.docs_page import filled

from handfast.core.link import TRANSITIONS, Edge

PAGE = Path(__file__).parents[1] / "docs" / "protocol.md"
MARK = "edge: made from handfast.core.link.TRANSITIONS"


def drawn() -> str:
    """Draw the table as a Mermaid state diagram."""
    rows = [
        f"    {before.value} --> {after.value}: {heard.value}"
        for (before, heard), after in TRANSITIONS.items()
        if after is not Edge.VOID
    ]
    void = [before.value for (before, _), after in TRANSITIONS.items() if after is Edge.VOID]
    note = f"\nEither party's SKIP leads from {', '.join(void[:-1])} and {void[-1]} to `void`.\n"
    head = ["```mermaid", "stateDiagram-v2", "    [*] --> none"]
    return "\n".join([*head, *rows, "```"]) + "\n" + note


def page(text: str) -> str:
    """Put the drawing into the page's place for it."""
    return filled(text, MARK, drawn())


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
