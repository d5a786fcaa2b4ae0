"""The catalogue's table in docs/theory.md and its schedules in tests/model/golden/pipelines.

``python -m tests.docs_catalogue`` writes them anew; ``tests/model/test_catalogue.py`` fails where
they are stale. Commit what it writes only if you understand what changed it.
"""

from collections.abc import Sequence
from pathlib import Path

from tests.docs_page import filled

from handfast.model.catalogue import CATALOGUE
from handfast.model.verdicts import HEAD, Verdict, examine, rows, story

PAGE = Path(__file__).parents[1] / "docs" / "theory.md"
GOLDEN = Path(__file__).parent / "model" / "golden" / "pipelines"
MARK = "catalogue: made by tests/docs_catalogue.py"


def table(verdicts: Sequence[Verdict]) -> str:
    """The table, and below it each pipeline's assumptions and source, as Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(verdicts)]
    lines += ["", "What each row takes for granted, and whom it follows:", ""]
    lines += [f"- **{v.about}** (`{v.pipeline}`): {v.assumes}. *{v.source}.*" for v in verdicts]
    return "\n".join([*lines, ""])


def page(text: str, verdicts: Sequence[Verdict]) -> str:
    """Put the table into the page's place for it."""
    return filled(text, MARK, table(verdicts))


def schedules(verdict: Verdict) -> str:
    """All shortest schedules of one pipeline, to be read."""
    return "\n".join(line for finding in verdict.findings for line in story(finding)) + "\n"


if __name__ == "__main__":
    found = [examine(make()) for make in CATALOGUE]
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for each in found:
        (GOLDEN / f"{each.pipeline}.txt").write_text(schedules(each), encoding="utf-8")
