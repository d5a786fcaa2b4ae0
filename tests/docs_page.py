"""The parts of a page in docs/ that are made from the code, and stand between two marks.

Each is made anew by the script that the mark names; a test fails where one is stale.
"""


def filled(text: str, mark: str, made: str) -> str:
    """Put what was made into a page's place for it.

    ``mark`` is ``name: where it comes from``; the place ends at ``/name``.
    """
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark.partition(':')[0]} -->\n"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return before + begin + made + end + after
