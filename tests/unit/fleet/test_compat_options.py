"""Show that options and results of probes are read as they were meant, or refused by line."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("yaml")

from hypothesis import given
from hypothesis import strategies as st

from handfast.errors import FormatError
from handfast.fleet.compat import options as module
from handfast.fleet.compat.options import Asked, load, load_probed, parse, parse_probed
from handfast.fleet.compat.reading import MOST
from handfast.fleet.compat.reading import parse as parse_rules
from handfast.fleet.compat.rules import Probed

RULES = parse_rules(
    b"""\
format: 1
facts: {a: A, b: B, c: C}
rules:
  one: {source: s, scope: node, exact: [a, b]}
  only: {source: s, scope: fleet, mode: warn, exact: [c]}
  tried: {source: s, scope: fleet, must-probe: {probe: ping, facts: [a, b]}}
""",
    "site.rules",
)
HEAD = "format: 1\nnodes:\n"
RESULT = '{"probe": "ping", "client": ["1", "2"], "server": ["1", "3"], "passed": false}'


def refused(text: str | bytes, match: str) -> None:
    """Read options that are wrong."""
    data = text.encode() if isinstance(text, str) else text
    with pytest.raises(FormatError, match=match) as caught:
        parse(data, "o.yaml", RULES)
    assert str(caught.value).startswith("o.yaml: ")
    assert "What to do: " in str(caught.value)


def test_a_fact_that_fits_a_pattern_is_spoken_of() -> None:
    """A pattern itself is no fact, and nothing that a node could have."""
    rules = parse_rules(
        b"format: 1\nfacts: {env.*: setting}\n"
        b"rules: {s: {source: s, scope: group, exact: [env.X_*]}}",
        "site.rules",
    )
    text = f"{HEAD}  n: {{could: {{env.X_A: [1]}}}}\n"
    assert parse(text.encode(), "o", rules).options == {"n": {"env.X_A": ("1",)}}
    for wrong in ("env.Y_A", "'env.X_*'"):
        with pytest.raises(FormatError, match=r"line 3: node n: "):
            parse(text.replace("env.X_A", wrong).encode(), "o", rules)


def test_options_are_read_as_they_are_written(tmp_path: Path) -> None:
    """Versions stay texts; a range names its nodes; what only is now is the one option."""
    path = tmp_path / "o.yaml"
    path.write_text(
        f"{HEAD}  n-[09-10].x:\n    could: {{a: [1.10, 1.9]}}\n    now: {{a: 1.9, b: NO}}\n"
        "  m: {could: {b: [2]}}\n"
    )
    same = {"a": ("1.10", "1.9"), "b": ("NO",)}
    now = {"a": "1.9", "b": "NO"}
    assert load(str(path), RULES) == Asked(
        {"n-09.x": same, "n-10.x": same, "m": {"b": ("2",)}},
        {"n-09.x": now, "n-10.x": now, "m": {}},
    )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "line 1: the file is empty"),
        ("format: 2\nnodes: {n: {now: {a: 1}}}\n", r"line 1: Invalid .*\$\.format"),
        ("format: 1\n", "line 1: Object missing required field `nodes`"),
        ("format: 1\nnodes: {}\n", "line 1: Expected `object` of length >= 1"),
        ("format: 1\nnodes: {n: {}}\nmore: 1\n", "line 1: Object contains unknown field `more`"),
        (f"{HEAD}  n: 1\n", "line 3: node n: Expected `object`, got `str`"),
        (f"{HEAD}  n: {{can: {{a: [1]}}}}\n", "line 3: node n: .*unknown field `can`"),
        (f"{HEAD}  m: {{now: {{a: 1}}}}\n  n: {{could: {{a: 1}}}}\n", "line 4: node n: .*`array`"),
        (f"{HEAD}  n: {{could: {{a: []}}}}\n", r"line 3: node n: .*length >= 1 .*could"),
        (f"{HEAD}  n: {{could: {{a: [{'1, ' * 201}]}}}}\n", "line 3: node n: .*length <= 200"),
        (f"{HEAD}  n: {{could: {{a: ['']}}}}\n", "line 3: node n: .*length >= 1"),
        (
            f"{HEAD}  n:\n    now: {{a: 1}}\n    could:\n      a: [1]\n      d: [1]\n",
            "line 7: node n: no rule that refuses speaks of d, so there is nothing to choose",
        ),
        (f"{HEAD}  n:\n    now: {{c: 1}}\n", "line 4: node n: no rule that refuses speaks of c"),
        (f"{HEAD}  n: {{}}\n  n: {{}}\n", "line 4: n stands twice; the first is in line 3"),
        (f"{HEAD}  n-[1-3]: {{}}\n  n-2: {{}}\n", "line 4: n-2 stands twice"),
        (f"{HEAD}  n-[3-1]: {{}}\n", r"line 3: n-\[3-1\]: 3 is above 1"),
        (f"{HEAD}  n-[1-100001]: {{}}\n", "line 3: .*: more than 100,000 nodes"),
        (f"{HEAD}  n-[1-99999]: {{}}\n  m-[1-2]: {{}}\n", "line 4: .*: more than 100,000 nodes"),
        (f"{HEAD}  n-[1,3]: {{}}\n", r"line 3: 'n-\[1,3\]' can't name nodes"),
        (f"{HEAD}  n-[1-3]-[1-3]: {{}}\n", "line 3: .* can't name nodes"),
        (f"{HEAD}  n m: {{}}\n", "line 3: 'n m' can't name nodes"),
        (f"{HEAD}  {'n' * 201}: {{}}\n", "line 3: .* can't name nodes"),
        (f"{HEAD}  n: &x {{now: {{a: 1}}}}\n  m: *x\n", r"line 3: an alias \(\*name\) is not read"),
        (f"{HEAD}  n: [\n", "line 4: no YAML: "),
        (b"\xff", "line 1: no YAML: "),
        (b" " * (MOST + 1), "more than 1,048,576 bytes.*the file of options"),
    ],
)
def test_what_can_not_be_meant_is_refused_by_line(text: str | bytes, match: str) -> None:
    """Each with its place and what to do."""
    refused(text, match)


def test_the_bound_counts_nodes_and_not_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are allowed are read, over several ranges."""
    monkeypatch.setattr(module, "NODES", 4)
    asked = parse(f"{HEAD}  n[1-3]: {{}}\n  m: {{}}\n".encode(), "o.yaml", RULES)
    assert list(asked.options) == ["n1", "n2", "n3", "m"]


def test_results_are_read_line_by_line(tmp_path: Path) -> None:
    """Of other probes, too, which no rule asks for here; empty lines are passed over."""
    other = RESULT.replace("ping", "other").replace('"1", ', "")
    path = tmp_path / "probed"
    path.write_text(f"{RESULT}\n\n{other}\n")
    found = load_probed(str(path), RULES)
    assert [(each.probe, each.client, each.server, each.passed) for each in found] == [
        ("ping", ("1", "2"), ("1", "3"), False),
        ("other", ("2",), ("3",), False),
    ]
    assert all(isinstance(each, Probed) for each in found)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "line 1: no result of a probe: "),
        (f"{RESULT}\n1", "line 2: no result of a probe: "),
        (RESULT.replace("false", "0"), "line 1: no result of a probe: .*`bool`"),
        (RESULT.replace('"passed"', '"at": 1, "passed"'), "line 1: .*unknown field `at`"),
        (RESULT.replace('"1", ', ""), "probe ping has 1 values of a client and 1 .*rules have 2"),
        (RESULT.replace('"1", "2"', '"1"'), "probe ping has 1 values of a client and 2 of a"),
        (RESULT.replace('"1", "2"', '"1"').replace("ping", "x"), "probe x has 1 values"),
        (" " * (MOST + 1), "more than 1,048,576 bytes.*the file of results"),
    ],
)
def test_a_result_that_is_none_is_refused_by_line(text: str, match: str) -> None:
    """A result that is read otherwise than it was meant could let a mixture in."""
    with pytest.raises(FormatError, match=match) as caught:
        parse_probed(text.encode(), "probed", RULES)
    assert str(caught.value).startswith("probed: ")
    assert "What to do: " in str(caught.value)


@given(st.binary(max_size=60) | st.text("nab[]{}:-1, \n&*!?'", max_size=60).map(str.encode))
def test_whatever_the_bytes_only_a_format_error_is_raised(data: bytes) -> None:
    """By both readers, also behind a beginning that is right."""
    said = []
    for reader in (parse, parse_probed):
        for given_bytes in (data, HEAD.encode() + b"  " + data):
            with suppress(FormatError):
                said.append(reader(given_bytes, "x", RULES))
    assert all(isinstance(each, Asked | tuple) for each in said)
