"""Show what `handfast fleet judge` and `choose` answer, and with which exit code."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import pytest

pytest.importorskip("yaml")

from click.testing import CliRunner, Result
from gatekit import FLEETS, ranks, read, rules_of
from inventorykit import inventory

from handfast.cli.compat import choose, judge
from handfast.fleet.compat import choose as search
from handfast.fleet.compat.judge import natural
from handfast.fleet.compat.meaning import reads
from handfast.fleet.gate.round import ranks_of
from handfast.fleet.gate.stack import Stack, held
from handfast.fleet.inventory.facts import Inventory, Node, Tier, Want, encode, gather
from handfast.fleet.inventory.variables import classify

DRIVERS = {"gpu.driver": "580.65.06", "fabric-manager.version": "580.65.06"}
TORN = {"gpu.driver": "580.65.06", "fabric-manager.version": "570.86.15"}


def judged(fleet: Path, *more: object) -> Result:
    """Run the command over a directory."""
    return CliRunner().invoke(judge, [str(each) for each in (fleet, *more)])


def chosen(folder: Path, text: str, *more: object) -> Result:
    """Run the command over a file of options."""
    path = folder / "options.yaml"
    path.write_text(f"format: 1\nnodes:\n{text}")
    return CliRunner().invoke(choose, [str(each) for each in (path, *more)])


def fleet_of(folder: Path, nodes: Mapping[str, Inventory]) -> Path:
    """Write a fleet."""
    folder.mkdir(exist_ok=True)
    for name, found in nodes.items():
        (folder / f"{name}.json").write_bytes(encode(found))
    return folder


def inventory_of(facts: Stack, wanted: set[str]) -> Inventory:
    """A stack as an inventory, which lists what is absent, too."""
    every = facts | held(facts, {fact for fact in wanted if not fact.endswith("*")})
    wants = {Want(name, Tier.HOST): value for name, value in every.items()}
    return gather(
        want.unknown("a test")
        if value is None
        else want.known(value, "a test")
        if value
        else want.absent("a test")
        for want, value in wants.items()
    )


def site(folder: Path, body: str) -> Path:
    """A file of rules over the facts a and b, which the site brings."""
    path = folder / "site.rules"
    brought = ", ".join(
        f"{fact}: {fact.upper()}" for fact in "ab" if re.search(rf"\b{fact}\b", body)
    )
    path.write_text(f"format: 1\nbrought: {{{brought}}}\nrules:\n{body}")
    return path


@pytest.mark.parametrize("path", sorted(FLEETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_fleets_of_the_gate_are_judged_as_the_gate_judges_them(
    path: Path, tmp_path: Path
) -> None:
    """Those that work are not refused, those that broke jobs are, in the sentence of the gate."""
    fleet = read(path)
    rules = rules_of(fleet.get("rules", ""))
    wanted = set(chain.from_iterable(chain(*reads(rule)) for rule in rules.rules))
    members = ranks(fleet)
    names = [f"rank {n} ({host})" for n, (host, _) in enumerate(members)]
    stacks = (inventory_of(facts, wanted) for _, facts in members)
    folder = fleet_of(tmp_path / "fleet", dict(zip(names, stacks, strict=True)))
    options = ["--rules", FLEETS / "site.rules"] if "rules" in fleet else []
    for group, of in ranks_of(fleet.get("groups", ""), len(members)).items():
        options += ["--place", f"group:{group}={','.join(names[n] for n in of)}"]
    done = judged(folder, *options)
    level = "refuse" if "refused" in fleet else fleet.get("level", "fine")
    assert done.exit_code == (1 if level == "refuse" else 0), done.output
    if level == "refuse":
        subject = fleet["refused"].partition("; job 17")[0]
        assert done.output.startswith(f"refuse: {subject}; ")
    assert json.loads(judged(folder, *options, "--json").output)["level"] == level


def test_one_cause_is_one_sentence_however_many_nodes_have_it(tmp_path: Path) -> None:
    """The sentence, then eight names; --json has all; the odd one that is fine is not named."""
    nodes = {f"n{n}": inventory(**TORN) for n in range(1, 301)} | {"ok": inventory(**DRIVERS)}
    folder = fleet_of(tmp_path, nodes)
    done = judged(folder)
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert lines[0].startswith(
        "refuse: n1, n2, n3 and 297 others run driver 580.65.06 with Fabric Manager 570.86.15; "
        "start.yaml needs both equal [rule nvidia-fabric-manager: "
    )
    assert lines[1] == "  300 nodes: n1, n2, n3, n4, n5, n6, n7, n8 and 292 more"
    assert lines[2].startswith("nothing to judge: aws-ofi-nccl-libfabric, ")
    assert lines[3:] == [
        "301 nodes, 2 kinds of them, 19 rules of start.yaml: 1 refused, 0 warnings"
    ]
    told = json.loads(judged(folder, "--json").output)
    assert [len(each["nodes"]) for each in told["rulings"]] == [300]
    assert (told["level"], told["nodes"], told["unread"]) == ("refuse", 301, {})


def test_many_sentences_of_one_rule_are_counted(tmp_path: Path) -> None:
    """Twelve drivers that each have another Fabric Manager: eight are said."""
    torn = {f"n{n}": TORN | {"gpu.driver": f"580.{n}"} for n in range(12)}
    done = judged(fleet_of(tmp_path, {name: inventory(**facts) for name, facts in torn.items()}))
    assert done.output.count("refuse: n") == 8
    assert "and 4 sentences more of rule nvidia-fabric-manager: see --json" in done.output
    assert "12 refused" in done.output


def test_what_one_inventory_lists_and_another_does_not_is_unknown(tmp_path: Path) -> None:
    """It warns, after what refuses; what none lists is not judged."""
    rules = site(
        tmp_path,
        "  one: {source: s, scope: fleet, exact: [a]}\n"
        "  two: {source: s, scope: group, exact: [b]}\n"
        "  zero: {source: s, scope: node, exact: [a, b]}\n",
    )
    nodes = {"x": inventory(a="1"), "y": inventory(a="2"), "z": inventory(c="3")}
    done = judged(fleet_of(tmp_path / "fleet", nodes), "--rules", rules)
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert lines[0].startswith("refuse: the fleet runs A 1 on x, A 2 on y; ")
    assert lines[1].startswith("warn: z runs an unknown A; ")
    assert lines[2] == "nothing to judge: two, zero"
    fine = judged(fleet_of(tmp_path / "less", {"x": nodes["x"], "z": nodes["z"]}), "--rules", rules)
    assert fine.exit_code == 0
    assert "0 refused, 1 warnings" in fine.output


def test_all_nodes_are_one_of_each_place_until_places_are_given(tmp_path: Path) -> None:
    """A group for each of two halves; the fabric stays one."""
    rules = site(
        tmp_path,
        "  g: {source: s, scope: group, exact: [a]}\n  f: {source: s, scope: fabric, exact: [b]}\n"
        "  l: {source: s, scope: link, adjacent: {facts: [a], field: 1}}\n",
    )
    nodes = {f"{half}{n}": inventory(a=half, b="1") for half in "13" for n in range(2)}
    folder = fleet_of(tmp_path / "fleet", nodes)
    whole = judged(folder, "--rules", rules, "--json")
    assert [each["rule"] for each in json.loads(whole.output)["rulings"]] == ["g", "l", "l"]
    halves = [f"{scope}:{n}={n}*" for scope in ("group", "link") for n in "13"]
    parts = judged(folder, "--rules", rules, *chain(*(("--place", each) for each in halves)))
    assert parts.exit_code == 0, parts.output
    assert parts.output == f"4 nodes, 2 kinds of them, 3 rules of {rules}: 0 refused, 0 warnings\n"


SCOPES = "is no scope that has places: it is one of group, link, fabric"


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("fleet:x=*", SCOPES),
        ("foo:a=n1", SCOPES),
        ("x", SCOPES),
        ("group:=*", "write group:decode=b*,c-17"),
        ("group:x", "write group:decode=b*,c-17"),
        ("group:x=", "write group:decode=b*,c-17"),
    ],
)
def test_a_place_that_is_none_is_wrong_usage(tmp_path: Path, place: str, why: str) -> None:
    """So is one without a node: it would hide a mistake in its pattern."""
    folder = fleet_of(tmp_path, {"x": inventory(a="1")})
    wrong = judged(folder, "--place", place)
    assert wrong.exit_code == 2
    assert why in wrong.output
    lost = judged(folder, "--place", "group:g=y*")
    assert lost.exit_code == 2
    assert "no node has such a name" in lost.output


def test_a_file_that_can_not_be_counted_is_said_and_is_an_exit_code(tmp_path: Path) -> None:
    """3; a rule that the others break goes before. Of two with one key none is counted."""
    folder = fleet_of(tmp_path / "fleet", {"x": inventory(**DRIVERS)})
    (folder / "y.json").write_text("{")
    done = judged(folder)
    assert done.exit_code == 3
    assert done.output.startswith("not counted y: ")
    fleet_of(folder, {"z": inventory(**TORN)})
    assert judged(folder).exit_code == 1
    same = Node("0" * 64, "boot", 1)
    twins = {name: gather(inventory(**TORN).facts, same) for name in "pq"}
    held_twice = judged(fleet_of(tmp_path / "twins", twins | {"x": inventory(**DRIVERS)}), "--json")
    assert held_twice.exit_code == 3
    assert sorted(json.loads(held_twice.output)["unread"]) == ["p", "q"]
    (tmp_path / "empty").mkdir()
    none = judged(tmp_path / "empty")
    assert none.exit_code == 3
    assert none.output.startswith("no inventory to judge: a file NODE.json for each node is looked")


def test_settings_are_compared_by_the_rules_that_are_shipped(tmp_path: Path) -> None:
    """Each variable that has to be equal; not those of each node for itself, nor a node's log."""

    def node(**env: str) -> Inventory:
        every = [Want("env", Tier.JOB, family=True).known("read", "a test")]
        for name, value in env.items():
            kind = classify(name)
            assert kind is not None
            every.append(Want(f"env.{name}", Tier.JOB, kind).known(value, "a test"))
        return gather(every)

    nodes = {
        "a": node(NCCL_DEBUG="INFO", NCCL_SOCKET_IFNAME="eth0"),
        "b": node(NCCL_ALGO="Ring", NCCL_SOCKET_IFNAME="eth1"),
        "c": inventory(**DRIVERS),
    }
    done = judged(fleet_of(tmp_path, nodes))
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert lines[0].startswith(
        "warn: the fleet runs no NCCL_ALGO on a, NCCL_ALGO Ring on b; start.yaml needs one "
    )
    settings = [line for line in lines if "[rule settings" in line]
    assert settings[0] == lines[0]
    assert settings[1].startswith("warn: c runs an unknown setting; start.yaml needs one setting")
    assert len(settings) == 2


def test_rules_and_results_that_can_not_be_read_are_named(tmp_path: Path) -> None:
    """Exit code 3, with the file and what to do; a directory that is not there is wrong usage."""
    folder = fleet_of(tmp_path / "fleet", {"x": inventory(a="1")})
    empty = judged(folder, "--rules", site(tmp_path, ""))
    assert empty.exit_code == 3
    assert "site.rules: line 1: it has no rules" in empty.stderr
    for option in ("--rules", "--probed"):
        lost = judged(folder, option, tmp_path / "lost")
        assert lost.exit_code == 3
        assert "What to do: " in lost.output
    assert judged(tmp_path / "lost").exit_code == 2


def test_what_was_probed_counts(tmp_path: Path) -> None:
    """A pair that was tried in both directions is fine; one direction is not both."""
    nodes = {
        "x": inventory(**{"ucx.version": "1.18.0"}),
        "y": inventory(**{"ucx.version": "1.17.0"}),
    }
    folder = fleet_of(tmp_path / "fleet", nodes)
    results = tmp_path / "probed.jsonl"
    line = '{{"probe": "ucx-tag-send", "client": ["{}"], "server": ["{}"], "passed": true}}\n'
    results.write_text(line.format("1.18.0", "1.17.0"))
    once = judged(folder, "--probed", results)
    assert once.output.startswith("warn: y runs UCX 1.17.0 and talks to x, which runs UCX 1.18.0; ")
    assert "1 warnings" in once.output
    results.write_text(line.format("1.18.0", "1.17.0") + line.format("1.17.0", "1.18.0"))
    assert "0 warnings" in judged(folder, "--probed", results).output


RISING = """\
  gpu-[01-12]:
    now: {gpu.driver: 570.86.15, fabric-manager.version: 570.86.15}
    could:
      gpu.driver: [570.86.15, 580.65.06, 580.95.05]
      fabric-manager.version: [570.86.15, 580.65.06]
  old:
    now: {gpu.driver: 590.48.01, nccl.version: 2.27.5}
    could: {gpu.driver: [570.86.15]}
"""


def test_the_greatest_choice_is_told_with_what_it_raises(tmp_path: Path) -> None:
    """Alike nodes once; what has no options stays; what goes down is said, too."""
    done = chosen(tmp_path, RISING)
    assert done.exit_code == 0, done.output
    names = ", ".join(f"gpu-0{n}" for n in range(1, 9))
    assert [line.split() for line in done.output.splitlines()] == [
        ["the", "greatest", "choice:", "no", "other", "has", "any", "version", "higher"],
        f"{names} and 4 more".split(),
        ["fact", "now", "choice"],
        ["Fabric", "Manager", "fabric-manager.version", "570.86.15", "580.65.06", "raised"],
        ["driver", "gpu.driver", "570.86.15", "580.65.06", "raised"],
        ["old"],
        ["fact", "now", "choice"],
        ["driver", "gpu.driver", "590.48.01", "570.86.15", "lowered"],
        ["NCCL", "nccl.version", "2.27.5", "2.27.5"],
    ]
    told = json.loads(chosen(tmp_path, RISING, "--json").output)
    assert (told["rules"], told["greatest"]) == ("start.yaml", True)
    assert [len(kind["nodes"]) for kind in told["kinds"]] == [12, 1]
    assert told["kinds"][1]["facts"][1] == {
        "fact": "nccl.version", "now": "2.27.5", "to": "2.27.5", "move": "",
    }  # fmt: skip


def test_what_can_not_be_compared_is_only_changed(tmp_path: Path) -> None:
    """And where nothing is said of today, nothing moves."""
    rules = site(tmp_path, "  one: {source: s, scope: group, exact: [a]}\n")
    done = chosen(
        tmp_path,
        "  x: {now: {a: 1-rc1}, could: {a: [1]}}\n  y: {could: {a: [1]}}\n",
        "--rules",
        rules,
    )
    assert [line.split() for line in done.output.splitlines()[1:]] == [
        ["x"], ["fact", "now", "choice"], ["A", "a", "1-rc1", "1", "changed"],
        ["y"], ["fact", "now", "choice"], ["A", "a", "1"],
    ]  # fmt: skip


def test_a_clash_is_told_need_by_need(tmp_path: Path) -> None:
    """With what the nodes have to choose from; nothing that could be spared is among them."""
    text = (
        "  x: {now: {cuda.runtime.version: 13.0}, could: {cuda.driver.version: [570, 575]}}\n"
        "  y: {could: {gpu.driver: [580], fabric-manager.version: [580, 590]}}\n"
    )
    done = chosen(tmp_path, text)
    assert done.exit_code == 1
    assert done.output == (
        "no choice keeps all of these; without any one of them there is one:\n"
        "  x: libcuda at least 580 from CUDA 13 on, of libcuda 570 or 575 with CUDA 13.0 [rule "
        "cuda-driver: docs.nvidia.com/deploy/cuda-compatibility/"
        "minor-version-compatibility.html]\n"
    )
    told = json.loads(chosen(tmp_path, text, "--json").output)
    assert [(part["rule"], part["nodes"]) for part in told["parts"]] == [("cuda-driver", ["x"])]


def test_places_hold_in_a_choice_too(tmp_path: Path) -> None:
    """Two groups may have an NCCL each; one group may not."""
    text = "  p-[1-2]: {could: {nccl.version: [2.26.2]}}\n  d: {could: {nccl.version: [2.27.5]}}\n"
    assert chosen(tmp_path, text).exit_code == 1
    apart = ("--place", "group:p=p-*", "--place", "group:d=d")
    assert chosen(tmp_path, text, *apart).exit_code == 0


def test_probes_split_a_choice_and_results_join_it(tmp_path: Path) -> None:
    """Without results one side has to be lower, and the answer says that this is a choice."""
    rules = site(tmp_path, "  t: {source: s, scope: group, must-probe: {probe: t, facts: [a]}}\n")
    text = "  x: {could: {a: [1, 2]}}\n  y: {could: {a: [1]}}\n"
    alone = chosen(tmp_path, text, "--rules", rules)
    assert alone.output.startswith("a choice: another with a version higher has another one lower")
    results = tmp_path / "results"
    both = [{"probe": "t", "client": [a], "server": [b], "passed": True} for a, b in ("12", "21")]
    results.write_text("\n".join(map(json.dumps, both)))
    tried = chosen(tmp_path, text, "--rules", rules, "--probed", results, "--json")
    assert json.loads(tried.output)["greatest"] is True


def test_too_much_to_look_through_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In words, with exit code 1, and not looked through for ever."""
    rules = site(tmp_path, "  t: {source: s, scope: group, must-probe: {probe: t, facts: [a]}}\n")
    text = "".join(f"  {n}: {{could: {{a: [1.{n}, 2.{n}, 3.{n}]}}}}\n" for n in range(4))
    monkeypatch.setattr(search, "TRIES", 3)
    done = chosen(tmp_path, text, "--rules", rules, "--json")
    assert done.exit_code == 1
    assert "more than 3 ways to look through" in json.loads(done.output)["error"]
    monkeypatch.undo()
    many = "".join(f"  n{n}: {{could: {{a: [1.{n}]}}}}\n" for n in range(401))
    kinds = chosen(tmp_path, many, "--rules", rules)
    assert kinds.exit_code == 1
    assert "401 kinds of nodes" in kinds.stderr


def test_options_that_can_not_be_read_are_exit_code_3(tmp_path: Path) -> None:
    """And a file that is not there is wrong usage."""
    done = chosen(tmp_path, "  x: {could: {gpu.drivr: [1]}}\n")
    assert done.exit_code == 3
    assert "options.yaml: line 3: node x: no rule that refuses speaks of gpu.drivr" in done.stderr
    assert CliRunner().invoke(choose, [str(tmp_path / "lost")]).exit_code == 2


def test_names_that_count_alike_have_one_order(tmp_path: Path) -> None:
    """node-1 and node-01 are two nodes; which comes first hangs on nothing but their names."""
    assert natural(["node-1", "node-01"]) == natural(["node-01", "node-1"]) == ["node-01", "node-1"]
    text = "  n-1: {could: {nccl.version: [1]}}\n  n-01: {could: {nccl.version: [1]}}\n"
    assert chosen(tmp_path, text).output.splitlines()[1] == "n-01, n-1"


def test_the_example_of_the_docs_is_what_the_command_says(tmp_path: Path) -> None:
    """Word by word, from the options that stand there."""
    page = (Path(__file__).parents[3] / "docs/fleet/compatibility.md").read_text()
    section = page.partition("\n## `handfast fleet choose`\n")[2]
    text = section.partition("```yaml\nformat: 1\nnodes:\n")[2].partition("```")[0]
    shown = section.partition("```\n$ handfast fleet choose options.yaml\n")[2].partition("```")[0]
    assert shown
    assert chosen(tmp_path, text).output == shown
