"""The table of docs/audit.md: formats, faults, and how many an audit finds.

``python -m tests.docs_audit`` writes it anew; ``tests/audit/test_matrix.py`` fails where it is
stale. Commit what it writes only if you understand what changed it.
"""

from pathlib import Path

from tests.audit.matrix import FAULTS, Cell, cells
from tests.docs_page import filled

PAGE = Path(__file__).parents[1] / "docs" / "audit.md"
MARK = "matrix: made by tests/docs_audit.py"


def table(rows: dict[str, dict[str, Cell]]) -> str:
    """The table, as Markdown: a row a fault, a column a format."""
    lines = ["| fault | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    lines += [
        f"| {fault} | " + " | ".join(str(rows[name][fault]) for name in rows) + " |"
        for fault in FAULTS
    ]
    return "\n".join([*lines, ""])


def page(text: str, rows: dict[str, dict[str, Cell]]) -> str:
    """Put the table into the page's place for it."""
    return filled(text, MARK, table(rows))


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), cells()))
