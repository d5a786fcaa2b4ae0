"""Show that a rehearsal is read as it was written, or refused by file and line."""

import re
import sys
from pathlib import Path

import pytest

from handfast.errors import FormatError
from handfast.fleet.compat.reading import MOST
from handfast.fleet.rehearse.reading import Each, Probe, Record, fill, load, parse

WELL = """\
rehearsal: greeters
versions:
  "1.9": {bin: "{here}/one", way: "{env.WAY}"}
  "1.10": {bin: "{here}/{version}", way: NO}
nodes: [x, y]
setup: [mk, "{work}", "{x.port.1}"]
teardown: [rm, "{y.dir}"]
run: ["{bin}", "{dir}", "{{plain}}", "{port}", "{y.version}", "{here}"]
ready: [ask, "{node}", "{index}", "{port.3}"]
probe:
  each: pair
  run: ["{python}", "{client.bin}", "{server.port.0}", "{env.WAY}", "{work}"]
record: {probe: ping, facts: {ucx.version: "{version}", way: "{way}!"}}
stop-s: 1.5
"""
LEAST = "rehearsal: r\nversions: {'1': {}, '2': {}}\n"
JOB = LEAST + "probe: {each: fleet, run: [a]}\n"
PAIRS = LEAST + "probe: {each: pair, run: [a]}\n"


def test_a_file_is_read_as_it_is_written(tmp_path):
    """Texts stay texts; what is known beforehand is filled, and the rest is kept to be filled."""
    path = tmp_path / "r.yaml"
    path.write_text(WELL)
    found = load(str(path), {"WAY": "{odd}"})
    here = str(tmp_path)
    assert found.versions == {
        "1.9": {"bin": f"{here}/one", "way": "{odd}"},
        "1.10": {"bin": f"{here}/1.10", "way": "NO"},
    }
    assert found.run == ("{bin}", "{dir}", "{{plain}}", "{port}", "{y.version}", here)
    probe = (sys.executable, "{client.bin}", "{server.port.0}", "{{odd}}", "{work}")
    assert found.probe == Probe(Each.PAIR, probe)
    assert fill(found.probe.run[3], {}) == "{odd}"
    assert found.record == Record("ping", {"ucx.version": "{version}", "way": "{way}!"})
    assert [found.facts(version) for version in found.versions] == [
        ("1.9", "{odd}!"),
        ("1.10", "NO!"),
    ]
    assert (found.stop_s, found.ready_s, found.nodes) == (1.5, 20, ("x", "y"))


def test_a_job_is_short(tmp_path):
    """Three nodes, and no more than versions and a probe."""
    found = parse(JOB.encode(), "r.yaml", str(tmp_path), {})
    assert found.nodes == ("a", "b", "c")
    assert (found.run, found.setup, found.record) == ((), (), None)
    assert found.facts("1") == ()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "line 1: the file is empty"),
        ("a: [", "line 1: no YAML: "),
        ("a: 1\n---\nb: 2", "no YAML: "),
        (b"\xff\xfe\xfd", "no YAML: .*UTF-8"),
        ("[" * 900, "no YAML: "),
        ("- a", "line 1: Expected `object`"),
        ("{[a]: b}", "a key that is no text"),
        ("!!int 1: b", "line 1: the tag"),
        ("a: &x b\nc: *x", "an alias"),
        ("a: !!int 1", "line 1: the tag tag:yaml.org,2002:int is not read"),
        ("a: b\nc: d\na: e", "line 3: a stands twice; the first is in line 1"),
        ("rehearsal: r", "missing required field `versions`"),
        (JOB + "foo: 1", "line 4: Object contains unknown field `foo`"),
        (LEAST + "probe:\n  run: [a]\n  each: pair\n  ran: a", "line 6: .*unknown field `ran`"),
        (LEAST + "probe:\n  each: rack\n  run: [a]", "line 4: Invalid enum value 'rack'"),
        (LEAST + "probe:\n  each: node\n  run: a", "line 5: Expected `array`"),
        (LEAST + "probe:\n  each: node\n  run: []", "line 5: .*length >= 1"),
        (LEAST + 'probe:\n  each: node\n  run:\n  - a\n  - "\\0"', "line 5: .*regex"),
        (JOB.replace("'2'", "'2 '"), "line 2: .*regex"),
        (JOB.replace(", '2': {}", ""), "line 2: .*length >= 2"),
        (JOB.replace("'1': {}", "'1': {A: b}"), "line 2: .*regex"),
        (JOB + "nodes: [a, b, c, d, e, f]", "line 4: .*length <= 5"),
        (JOB + "nodes: [a, a]", "line 4: a node stands twice"),
        (JOB + "nodes: [a, client]", "line 4: client has a meaning of its own"),
        (JOB.replace("{}", "{work: x}"), "line 2: work has a meaning of its own"),
        (JOB.replace("'1': {}", "'1': {x: y}"), "versions 1 and 2 differ in the variable x"),
        (JOB + "run: [a]", "line 4: it has run and no ready"),
        (JOB + "ready: [a]", "line 4: it has ready and no run"),
        (JOB + "stop-s: nan", "line 4: "),
        (JOB + "stop-s: 0", "line 4: Expected `float` > 0"),
        (JOB + "probe-s: 1e9", "line 4: Expected `float` <= 3600"),
        (JOB.replace("{'1'", "{'0': {}, '1'") + "nodes: [a, b, c, d, e]", None),
        (JOB.replace("{'1'", "{'0': {}, '3': {}, '1'") + "nodes: [a, b, c, d, e]", "1,000 ways"),
        (PAIRS + "nodes: [a]", "line 4: one node is no pair"),
        (JOB + "record: {probe: p, facts: {v: '1'}}", "line 4: only what is found of pairs"),
        (PAIRS + "record: {probe: p, facts: {}}", "line 4: .*length >= 1"),
        (PAIRS + "record:\n  probe: p\n  facts:\n    v: '{x}'", "line 7: nothing fills {x} here"),
        (JOB.replace("[a]", "['{x}']"), "line 3: nothing fills {x} here"),
        (JOB.replace("[a]", "['{node}']"), "line 3: nothing fills {node} here"),
        (JOB.replace("[a]", "['{port}']"), "line 3: nothing fills {port} here"),
        (JOB.replace("[a]", "['{a.port.4}']"), "nothing fills {a.port.4} here"),
        (JOB.replace("[a]", "['{client.node}']"), "nothing fills {client.node} here"),
        (PAIRS.replace("[a]", "['{version}']"), "nothing fills {version} here"),
        (JOB + "setup: ['{dir}']", "line 4: nothing fills {dir} here"),
        (JOB + "teardown:\n- a\n- '{env.NONE}'", "line 4: .*{env.NONE} here.*set it in the env"),
        (JOB.replace("{}", "{x: '{dir}'}"), "line 2: nothing fills {dir} here"),
        (JOB.replace("[a]", "['{']"), "line 3: a single { in '{'"),
        (JOB.replace("[a]", "['a}b']"), "line 3: a single } in 'a}b'"),
    ],
)
def test_what_can_not_be_read(text, match):
    """Each with its line and what to do; nothing was started."""
    data = text.encode() if isinstance(text, str) else text
    if match is None:
        assert parse(data, "r.yaml", "/", {})
        return
    with pytest.raises(FormatError, match=match) as caught:
        parse(data, "r.yaml", "/", {})
    assert str(caught.value).startswith("r.yaml: line ")
    assert "What to do: " in str(caught.value)


def test_only_the_beginning_of_a_long_file_is_read(tmp_path):
    """Somebody may have named another file."""
    path = tmp_path / "log"
    path.write_bytes(b"#" * (MOST + 2))
    with pytest.raises(FormatError, match=r"log: more than .* give the file of rehearsals"):
        load(str(path))


def test_the_files_of_the_page_can_be_read():
    """Whoever copies one has a rehearsal."""
    page = (Path(__file__).parents[3] / "docs/fleet/rehearse.md").read_text()
    first, second = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    found = parse(first.encode(), "rehearse.md", "/here", {})
    assert (found.versions["2"]["bin"], found.nodes[1]) == ("/here/greeter-2", "b")
    named = f"rehearsal: pairs\n{second}"
    assert parse(named.encode(), "rehearse.md", "/here", {}).facts("1.22") == ("1.22",)


def test_the_shipped_rehearsals_can_be_read():
    """Those of real programs, which other tests run where these programs are."""
    files = sorted((Path(__file__).parents[2] / "rehearsals").glob("*.yaml"))
    assert files
    for file in files:
        names = [part.partition("}")[0] for part in file.read_text().split("{env.")[1:]]
        assert load(str(file), dict.fromkeys(names, "somewhere"))
