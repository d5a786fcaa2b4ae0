"""Show that a file of rules is read as it was meant, or refused by file, line and rule."""

import subprocess
import sys
from pathlib import Path

import pytest

from handfast.errors import FormatError
from handfast.fleet.compat.known import known_facts
from handfast.fleet.compat.meaning import reads
from handfast.fleet.compat.reading import MOST, load, parse, start
from handfast.fleet.compat.rules import (
    Adjacent,
    Exact,
    Level,
    Matrix,
    Minimum,
    MustProbe,
    Rule,
    Scope,
)

HEAD = "format: 1\nfacts: {a: A, b: B}\nrules:\n"
WELL = """\
format: 1
facts:
  a: the A
  b: the B
brought: {c: the C}
rules:
  same:
    source: who says so
    scope: group
    exact: [a]
    absent-differs: true
  near:
    source: who says so
    scope: link
    mode: warn
    require-known: true
    adjacent: {facts: [a, b], field: 2, width: 3, never-ahead: true}
  low:
    source: who says so
    scope: node
    minimum: {fact: c, by: a, versions: {1.9: 2.10, 1.10: 3.0}}
  pairs:
    source: who says so
    scope: group
    matrix: {client: a, server: b, allow: [[1.10, NO]], deny: [["*", 0x1F]]}
  tried:
    source: who says so
    scope: fleet
    must-probe: {probe: ping, facts: [a, b]}
"""


def refused(text, match, known=()):
    """Read a file that is wrong."""
    with pytest.raises(FormatError, match=match) as caught:
        parse(text.encode() if isinstance(text, str) else text, "compat.yaml", known)
    assert str(caught.value).startswith("compat.yaml: ")
    assert "What to do: " in str(caught.value)


def one(body, name="r", scope="node"):
    """A file with one rule over the facts a and b."""
    return f"{HEAD}  {name}:\n    source: s\n    scope: {scope}\n{body}"


def test_a_file_is_read_as_it_is_written(tmp_path):
    """Texts stay texts: YAML has 1.10 for the number 1.1, NO for false and 0x1F for 31."""
    path = tmp_path / "compat.yaml"
    path.write_text(WELL)
    rules = load(str(path))
    assert rules.words == {"a": "the A", "b": "the B", "c": "the C"}
    assert rules.word("d") == "d"
    said = ("who says so",)
    assert rules.rules == (
        Rule("same", *said, Scope.GROUP, Exact(("a",), absent_differs=True)),
        Rule(
            "near",
            *said,
            Scope.LINK,
            Adjacent(("a", "b"), 3, 2, (), never_ahead=True),
            Level.WARN,
            require_known=True,
        ),
        Rule("low", *said, Scope.NODE, Minimum("c", None, "a", {"1.9": "2.10", "1.10": "3.0"})),
        Rule("pairs", *said, Scope.GROUP, Matrix("a", "b", (("1.10", "NO"),), (("*", "0x1F"),))),
        Rule("tried", *said, Scope.FLEET, MustProbe("ping", ("a", "b"))),
    )


def test_an_inventory_says_which_facts_there_are():
    """Its own, families by their name and a star; and what the site brings."""
    parse(WELL.encode(), "f", {"a", "b"})
    family = HEAD.replace("{a: A, b: B}", "{env.X: X}") + (
        "  r: {source: s, scope: group, exact: [env.X]}"
    )
    parse(family.encode(), "f", {"env.*"})
    refused(family, r"line 4: rule r: no inventory has the fact env\.X", {"env"})
    refused(WELL, "line 12: rule near: no inventory has the fact b", {"a"})
    refused(one("    exact: [a, z]"), "rule r: no inventory has the fact z.*brought", {"a", "b"})
    lost = (
        "line 4: rule r: neither `facts:` nor `brought:` has an entry for z. What to do: write `z: "
    )
    refused(one("    exact: [a, z]"), lost)
    extra = one("    exact: [a, b]").replace("b: B", "b: B, z: Z")
    refused(extra, "line 2: facts has words for z, which no inventory has", {"a", "b"})
    parse(extra.encode(), "f", {"a", "b", "z"})
    refused(
        one("    exact: [a, b]").replace("facts: ", "brought: {z: Z}\nfacts: "),
        "line 2: brought has z, which no rule names",
    )
    refused(
        one("    exact: [a, b]").replace("facts: ", "brought: {b: B}\nfacts: "),
        "line 2: brought has b, .*or `facts:` has too",
    )


def test_handfasts_own_inventory_holds_the_names():
    """What is mistyped, under `facts` as well, is refused, with the name that is most like it."""
    known = known_facts()
    assert {"gpu.driver", "env", "env.*", "nic.*", "nccl.plugin.net", "bmc.firmware"} <= known
    assert start(known) == start()
    text = one("    exact: [gpu.drivr, imex.version]").replace(
        "{a: A, b: B}", "{gpu.drivr: driver}"
    )
    refused(text, r"rule r: no inventory has the fact gpu\.drivr \(is it gpu\.driver\?\)", known)
    refused(
        text.replace("[gpu.drivr", "[gpu.driver"), "line 2: facts has words for gpu.drivr", known
    )
    alone = text.replace("[gpu.drivr", "[gpu.driver").replace("{gpu.drivr: driver}", "{}")
    assert parse(alone.encode(), "f", known).words == {}


def test_the_example_of_the_docs_is_read():
    """As it stands, against handfast's own inventory; where a setting is unset, that differs."""
    page = (Path(__file__).parents[3] / "docs/fleet/compatibility.md").read_text()
    section = page.partition("\n## A file of rules\n")[2]
    text = section.partition("```yaml\n")[2].partition("```")[0]
    rules = {rule.name: rule for rule in parse(text.encode(), "docs", known_facts()).rules}
    assert len(rules) == 3
    assert rules["nccl-settings"].body == Exact(("env.NCCL_*",), absent_differs=True)


def test_patterns_are_read():
    """They end in a star behind a dot; what a node has not set differs, unless the file says no."""
    text = (
        "format: 1\nfacts: {env.*: setting}\nbrought: {x.one: one}\nrules:\n"
        "  r: {source: s, scope: group, exact: [env.NCCL_*, file.*]}\n"
        "  s: {source: s, scope: group, exact: [env.NCCL_ALGO], absent-differs: false}\n"
        "  t: {source: s, scope: group, exact: [x.*]}\n"
        "  u: {source: s, scope: node, exact: [env.A, env.B]}\n"
    )
    rules = parse(text.encode(), "f", known_facts())
    assert [rule.body for rule in rules.rules] == [
        Exact(("env.NCCL_*", "file.*"), absent_differs=True),
        Exact(("env.NCCL_ALGO",)),
        Exact(("x.*",)),
        Exact(("env.A", "env.B")),
    ]
    words = [rules.word(fact) for fact in ("env.*", "env.NCCL_*", "env.NCCL_ALGO", "file.x")]
    assert words == ["setting", "env.NCCL_*", "NCCL_ALGO", "file.x"]
    refused(text.replace("env.NCCL_*,", "evn.NCCL_*,"), r"no inventory has the fact evn\.NCCL_\*",
            known_facts())  # fmt: skip
    for wrong in ("'*'", "e*", "env*", "env.*_X", "env.**"):
        refused(text.replace("x.*", wrong), "rule t: .*env.NCCL_\\* is every fact that begins so")


def test_the_rules_that_are_shipped_name_their_sources():
    """And can be read; none is there twice."""
    rules = start()
    assert len({rule.name for rule in rules.rules}) == len(rules.rules) >= 15
    assert all(rule.source for rule in rules.rules)
    facts = {fact for rule in rules.rules for side in reads(rule) for fact in side}
    assert facts == set(rules.words)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "line 1: the file is empty"),
        ("a: [", "line 1: no YAML: "),
        ("a: 1\n---\nb: 2", "no YAML: "),
        (b"\xff\xfe\xfd", "no YAML: .*UTF-8"),
        ("\0", "no YAML: "),
        ("[" * 5000, "no YAML: "),
        ("- a", "line 1: no mapping"),
        ("format: 1", "it has no rules"),
        ("format: 1\nrules: [a]", "it has no rules"),
        ("format: 2\nrules: {}", "reads format 1"),
        ("rules: {}", "missing required field `format`"),
        ("format: 1\nfoo: 1\nrules: {}", "unknown field `foo`"),
        ("format: 1\nfacts: {a b: c}\nrules: {}", "matching regex"),
        ("format: 1\nrules: {[a]: b}", "line 2: a key that is no text"),
        ("format: 1\nrules: &x {a: *x}", "line 2: an alias"),
        ("format: !!int 1\nrules: {}", "line 1: the tag tag:yaml.org,2002:int is not read"),
        (
            "format: 1\nrules: !!python/object:os.system {}",
            "line 2: the tag .*os.system is not read",
        ),
        ("format: 1\nrules:\n  a: {}\n  b: {}\n  a: {}", "line 5: a stands twice.*line 3"),
        (one("    exact: [a, b]\n    scope: fleet"), "line 8: scope stands twice.*line 6"),
        (one("", name="Big"), "line 4: 'Big' can't name a rule"),
        (one("    exakt: [a, b]"), "line 4: rule r: .*unknown field `exakt`"),
        (one("    exact: a"), "rule r: Expected `array"),
        (one("    exact: []"), "rule r: .*length >= 1"),
        (
            one("    exact: [a, b]", scope="rack"),
            "'rack'.*give one of node, link, group, fabric, fleet",
        ),
        (
            one("    exact: [a, b]\n    mode: fine"),
            "rule r: Invalid enum value 'fine'.*give refuse, or",
        ),
        (one("    exact: [a, b]\n    require-known: maybe"), "rule r: Expected `bool`"),
        (f"{HEAD}  r: {{scope: node, exact: [a, b]}}", "missing required field `source`"),
        (f'{HEAD}  r: {{source: "", scope: node, exact: [a, b]}}', "length >= 1"),
        (one(""), "rule r: it has no kind"),
        (one("    exact: [a, b]\n    minimum: {fact: a, version: 1}"), "exact and minimum"),
        (one("    minimum: {fact: a, version: 1}\n    absent-differs: true"), "absent-differs"),
    ],
)
def test_what_can_not_be_read(text, match):
    """Each with its line, its rule and what to do."""
    refused(text, match)


@pytest.mark.parametrize(
    ("body", "scope", "match"),
    [
        ("exact: [a, a]", "node", "names a fact twice"),
        ("exact: [a]", "node", "a fact equals itself"),
        ("exact: [a, b]", "group", r"which facts equal which.*or a pattern"),
        ("exact: [env.*, a]", "node", "on one node a pattern does not say which"),
        ("adjacent: {facts: [a, b], field: minor}", "link", "of 1.31.4 it is 31 in field 2"),
        ("must-probe: {probe: p, facts: [a], about: [a]}", "node", "on one node nothing differs"),
        ("must-probe: {probe: p, facts: [a], about: [b]}", "link", "about b, which is none of its"),
        ("exact: [a, b]\n    absent-differs: true", "node", "for rules over several nodes"),
        ("adjacent: {facts: [a, b]}", "node", "either a field or a list"),
        ("adjacent: {facts: [a, b], field: 1, releases: [x]}", "node", "either a field or a list"),
        ("adjacent: {facts: [a], field: 1}", "node", "needs two facts"),
        ("adjacent: {facts: [a, a], field: 1}", "group", "names a fact twice"),
        ("adjacent: {facts: [a], field: 1, never-ahead: true}", "group", "behind each other one"),
        ("adjacent: {facts: [a], releases: [1.2, 1.3, 1.2.5]}", "group", "1.2 and 1.2.5 overlap"),
        ("adjacent: {facts: [a], field: 0}", "group", ">= 1"),
        ("adjacent: {facts: [a], field: 1, width: x}", "group", "Expected `int`"),
        ("minimum: {fact: a, version: 1}", "group", "each node's own"),
        ("minimum: {fact: a}", "node", "either a version, or by"),
        ("minimum: {fact: a, version: 1, by: b, versions: {1: 2}}", "node", "either a version"),
        ("minimum: {fact: a, by: b}", "node", "either a version, or by"),
        ("minimum: {fact: a, by: a, versions: {1: 2}}", "node", "measures a fact by itself"),
        ("minimum: {fact: a, version: newest}", "node", "'newest' can't be ordered"),
        ("minimum: {fact: a, by: b, versions: {1: old}}", "node", "'old' can't be ordered"),
        ("minimum: {fact: a, by: b, versions: {1.0: 2, 1: 3}}", "node", "1.0 and 1 can't be"),
        ("minimum: {fact: a, by: b, versions: {1rc: 2, 1: 3}}", "node", "1rc and 1 can't be"),
        ("matrix: {client: a, server: b}", "node", "it has no pair"),
        ("matrix: {client: a, server: a, allow: [[1, 1]]}", "node", "needs two facts"),
        ("matrix: {client: a, server: b, allow: [[1, 1], [1, 1]]}", "node", "stands twice"),
        ("matrix: {client: a, server: b, allow: [[1, 2]], deny: [[1, 2]]}", "link", "and denied"),
        ("matrix: {client: a, server: b, allow: [[1]]}", "link", "length 2"),
        ("must-probe: {probe: p, facts: [a, a]}", "group", "names a fact twice"),
        ("must-probe: {probe: p, facts: []}", "group", ">= 1"),
    ],
)
def test_what_no_rule_can_mean(body, scope, match):
    """A rule that holds always, never, or of nothing is a slip of the pen."""
    refused(one(f"    {body}", scope=scope), f"line 4: rule r: .*{match}")


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        (
            "adjacent: {facts: [a], releases: [x, y, z]}",
            "adjacent: {facts: [a, b], releases: [z, x]}",
            "line 5: rule two: it has release z before x.* in rule one",
        ),
        (
            "minimum: {fact: a, version: 25.05}",
            "adjacent: {facts: [a], releases: [23.11, 24.05]}",
            "line 5: rule two: every release of a that it lists is below the 25.05 that rule one",
        ),
        (
            "matrix: {client: b, server: a, allow: [[1, 1.1], [2, 1.2]]}",
            "minimum: {fact: a, version: 2.0}",
            "line 4: rule one: every release of a .* below the 2.0 that rule two",
        ),
    ],
)
def test_rules_that_contradict_each_other(first, second, match):
    """No node could keep both, or their order differs; found before a node is looked at."""
    scopes = ["node" if "minimum" in body else "group" for body in (first, second)]
    text = HEAD + "".join(
        f"  {name}: {{source: s, scope: {scope}, {body}}}\n"
        for name, scope, body in zip(("one", "two"), scopes, (first, second), strict=True)
    )
    refused(text, match)


def test_rules_that_only_look_contradictory_are_read():
    """A minimum within a release that is listed, or within reach of any."""
    for listed in ("allow: [[1, 1.13]]", "allow: [[1, '*']]", "deny: [[1, 1.1]]"):
        text = (
            f"{HEAD}  one: {{source: s, scope: node, minimum: {{fact: a, version: 1.13.5}}}}\n"
            f"  two: {{source: s, scope: group, matrix: {{client: b, server: a, {listed}}}}}\n"
            "  three: {source: s, scope: group, adjacent: {facts: [b], releases: [1, 2]}}\n"
            "  four: {source: s, scope: group, adjacent: {facts: [a], releases: [1, 2]}}\n"
        )
        assert len(parse(text.encode(), "f").rules) == 4


def test_a_file_that_is_too_long_is_not_read_to_its_end(tmp_path):
    """Somebody may have named another file."""
    path = tmp_path / "log"
    path.write_bytes(b"#" * (MOST + 2))
    with pytest.raises(FormatError, match="more than 1,048,576 bytes"):
        load(str(path))
    with pytest.raises(FileNotFoundError):
        load(str(tmp_path / "none"))


def test_without_pyyaml_an_error_says_what_to_install():
    """The core needs no YAML, so the package comes with an extra."""
    program = (
        "import sys; sys.modules['yaml'] = None\n"
        "from handfast.fleet.compat.reading import start\n"
        "try: start()\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("FormatError start.yaml: rules are YAML")
    assert "pip install 'handfast[fleet]'" in done.stdout
