"""Show what is said of nodes: in one sentence a fault, with names, and no more than is known."""

import random
import time

import pytest

from handfast.fleet.compat.judge import judge, natural
from handfast.fleet.compat.reading import parse, start
from handfast.fleet.compat.rules import Level, Place, Probed, Scope

FILE = b"""
format: 1
facts:
  gpu.driver: driver
  fm: Fabric Manager
  nccl: NCCL
  plugin: net plugin
  kubelet: kubelet
  apiserver: kube-apiserver
  slurmd: slurmd
  ctld: slurmctld
  ucx: UCX
  cuda: CUDA
rules:
  fabric-manager: {source: gdc-735, scope: node, exact: [gpu.driver, fm]}
  nccl: {source: init.cc, scope: group, exact: [nccl]}
  plugin: {source: nccl-1634, scope: group, exact: [plugin], absent-differs: true}
  kubelet:
    source: skew policy
    scope: link
    adjacent: {facts: [kubelet, apiserver], field: 2, width: 3, never-ahead: true}
  apiservers: {source: skew policy, scope: link, adjacent: {facts: [apiserver], field: 2}}
  slurm:
    source: upgrades
    scope: fleet
    adjacent: {facts: [slurmd, ctld], releases: [23.11, 24.05, 24.11], never-ahead: true}
  ucx: {source: measured, scope: link, matrix: {client: ucx, server: ucx, deny: [[1.13, 1.22]]}}
  ucx-listed:
    source: measured
    scope: fabric
    matrix: {client: ucx, server: ucx, allow: [["*", 1.18], ["*", 1.22]], deny: [[1.13, 1.22]]}
  ucx-probe: {source: ucx-10376, scope: group, must-probe: {probe: tag, facts: [ucx]}}
  cuda:
    source: cuda
    scope: node
    minimum: {fact: gpu.driver, by: cuda, versions: {12: 525.60.13, 13: 580}}
  driver: {source: us, scope: node, mode: warn, minimum: {fact: gpu.driver, version: 535}}
"""
RULES = parse(FILE, "compat.yaml")


def said(nodes, *places, probed=(), rules=RULES, whose="bundle b7"):
    """Judge, and give levels and sentences without their ends, by rule."""
    found = judge(rules, nodes, places=places, probed=probed, whose=whose)
    return [(r.level, r.sentence.partition(" [rule ")[0]) for r in found.rulings]


def group(*names):
    return Place(Scope.GROUP, "world", names)


def link(nodes, servers):
    return Place(Scope.LINK, "wire", tuple(nodes), tuple(servers))


def strict(name):
    """The rules, one of them with require-known."""
    text = FILE.decode().replace(f"\n  {name}:", f"\n  {name}: ", 1)
    at = text.index(f"\n  {name}: ")
    if text[at:].split("\n")[1].endswith("}"):
        line = text[at:].split("\n")[1]
        text = text.replace(line, line[:-1] + ", require-known: true}")
    return parse(text.encode(), "compat.yaml")


def test_a_driver_and_its_fabric_manager_differ():
    """The sentence of gpu-driver-container#735, for whoever has to mend it."""
    nodes = {"node-17": {"gpu.driver": "580.65", "fm": "590.12"}}
    (ruling,) = judge(RULES, nodes, whose="bundle b7").rulings
    assert ruling.sentence == (
        "node-17 runs driver 580.65 with Fabric Manager 590.12; bundle b7 needs both equal "
        "[rule fabric-manager: gdc-735]"
    )
    assert (ruling.rule, ruling.level, ruling.nodes) == ("fabric-manager", "refuse", ("node-17",))
    assert said(nodes, whose="")[0][1].endswith("; compat.yaml needs both equal")


def test_many_nodes_with_one_fault_are_one_sentence():
    """With a count, and the first names as people count."""
    nodes = {f"node-{n}": {"gpu.driver": "580.65", "fm": "590.12"} for n in range(40)}
    ((_, sentence),) = said(nodes)
    assert sentence.startswith("node-0, node-1, node-2 and 37 others run driver 580.65 with")
    ((_, sentence),) = said(dict(list(nodes.items())[:4]))
    assert sentence.startswith("node-0, node-1, node-2 and node-3 run driver")
    assert natural(["n10", "n9", "a", "n1b", "10", "9"]) == ["9", "10", "a", "n1b", "n9", "n10"]


def test_unknown_warns_and_refuses_where_the_rule_requires_it():
    """A gate that refused what nobody can tell would be an outage."""
    nodes = {"n": {"gpu.driver": "580.65", "fm": None}}
    ((level, sentence),) = said(nodes)
    assert level is Level.WARN
    assert sentence == (
        "n runs driver 580.65 with an unknown Fabric Manager; bundle b7 needs both equal, which "
        "can't be told: it is unknown"
    )
    assert said(nodes, rules=strict("fabric-manager")) == [(Level.REFUSE, sentence)]
    assert judge(RULES, nodes).level is Level.WARN


def test_what_is_not_there_is_not_judged():
    """A node without NVSwitches has no Fabric Manager; the rules that judged nothing are named."""
    found = judge(RULES, {"n": {"gpu.driver": "580.65"}})
    assert found.rulings == ()
    assert found.level is Level.FINE
    assert "fabric-manager" in found.unjudged
    assert "driver" not in found.unjudged
    assert judge(RULES, {}).unjudged == tuple(sorted(rule.name for rule in RULES.rules))


def test_a_group_needs_one_nccl():
    """All values in one sentence, the most frequent first; other groups are other stacks."""
    nodes = {f"r{n}": {"nccl": "2.20.5"} for n in range(8)} | {"r8": {"nccl": "2.19.3"}}
    ((level, sentence),) = said(nodes, group(*nodes))
    assert level is Level.REFUSE
    assert sentence == (
        "group world runs NCCL 2.20.5 on r0, r1, r2 and 5 others, NCCL 2.19.3 on r8; "
        "bundle b7 needs one NCCL for all"
    )
    assert said(nodes, group(*list(nodes)[:8]), Place(Scope.GROUP, "other", ("r8",))) == []
    many = {f"r{n}": {"nccl": f"2.{n}"} for n in range(6)}
    assert said(many, group(*many))[0][1].partition(";")[0].endswith(", 3 others elsewhere")
    ((level, sentence),) = said({**nodes, "r9": {"nccl": None}}, group("r0", "r9"))
    assert level is Level.WARN
    assert sentence == (
        "r9 runs an unknown NCCL; bundle b7 needs one NCCL for all, which can't be told: it is "
        "unknown"
    )


def test_a_plugin_on_some_ranks_only_is_a_mixture():
    """nccl#1634: the rest of the ranks fall back on the internal one, and all hang."""
    nodes = {"r0": {"plugin": "x.so"}, "r1": {}, "r2": {}}
    ((level, sentence),) = said(nodes, group(*nodes))
    assert level is Level.REFUSE
    assert sentence.startswith(
        "group world runs no net plugin on r1 and r2, net plugin x.so on r0;"
    )
    assert said(nodes, group("r1", "r2")) == []
    assert "plugin" in judge(RULES, nodes, places=[group("r1", "r2")]).unjudged


def test_a_kubelet_may_be_behind_and_never_ahead():
    """The direction counts, and so does what is too far."""
    nodes = {
        "w1": {"kubelet": "1.31.4"},
        "w2": {"kubelet": "1.35.0"},
        "w3": {"kubelet": "1.34.9"},
        "cp": {"apiserver": "v1.34.2"},
    }
    assert said(nodes, link(["w3"], ["cp"])) == []
    assert said(nodes, link(["w1", "w3"], ["cp"])) == []
    ((level, sentence),) = said(nodes, link(["w1", "w2", "w3"], ["cp"]))
    assert level is Level.REFUSE
    assert sentence == (
        "w2 runs kubelet 1.35.0 beside cp, which runs kube-apiserver v1.34.2; bundle b7 needs the "
        "first at most 3 behind, in field 2, and never ahead"
    )
    nodes["w1"] = {"kubelet": "1.30.1"}
    assert len(said(nodes, link(["w1", "w2", "w3"], ["cp"]))) == 2
    nodes["cp"] = {"apiserver": "2.34.2"}  # another major version is not adjacent
    assert len(said(nodes, link(["w1", "w2", "w3"], ["cp"]))) == 3
    servers = {"a": {"apiserver": "1.34.2"}, "b": {"apiserver": "1.36.0"}}
    assert len(said(servers, Place(Scope.LINK, "ha", ("a", "b")))) == 2  # each with the other


def test_a_version_that_no_list_and_no_field_has_is_said():
    """Once for the value, and not for each pair that it is in."""
    nodes = {
        "w": {"slurmd": "25.05.1"},
        "v": {"slurmd": "24.05.1"},
        "c": {"ctld": "24.11.5"},
    }
    ((level, sentence),) = said(nodes)
    assert level is Level.WARN
    assert sentence == (
        "w runs slurmd 25.05.1; bundle b7 needs the first at most 1 behind, in the list of "
        "releases, and never ahead, which can't be told: 25.05.1 is none of the releases that "
        "the rule lists"
    )
    nodes = {"w": {"kubelet": "latest"}, "cp": {"apiserver": "1.34"}}
    ((level, sentence),) = said(nodes, link(["w"], ["cp"]))
    assert level is Level.WARN
    assert sentence.endswith("latest has no field 2 that is a number")


def test_a_matrix_has_a_direction():
    """UCX: 1.13 to 1.22 fails over loopback, while the reverse works."""
    nodes = {"old": {"ucx": "1.13.1"}, "new": {"ucx": "1.22.0"}}
    assert said(nodes, link(["new"], ["old"])) == []
    ((level, sentence),) = said(nodes, link(["old"], ["new"]))
    assert level is Level.REFUSE
    assert sentence == (
        "old runs UCX 1.13.1 and talks to new, which runs UCX 1.22.0; bundle b7 needs a pair that "
        "its matrix allows, in this direction"
    )


def test_a_pair_that_no_matrix_has_is_unknown():
    """With both lists; with one list alone the rest follows from it."""
    nodes = {"a": {"ucx": "1.22"}, "b": {"ucx": "1.18"}, "c": {"ucx": "1.17"}}
    fabric = Place(Scope.FABRIC, "f", ("a", "b"))
    assert said(nodes, fabric) == []
    found = said(nodes, Place(Scope.FABRIC, "f", ("a", "c")))
    assert {level for level, _ in found} == {Level.WARN}
    assert len(found) == 2  # a to c, and c to itself; c to a is in the list
    assert found[0][1].endswith("can't be told: the matrix has no such pair")


def test_a_probe_settles_what_versions_do_not():
    """One result for the values and the direction; what failed once has failed."""
    nodes = {"a": {"ucx": "1.17"}, "b": {"ucx": "1.18"}, "c": {"ucx": "1.18"}}
    assert len(said(nodes, group(*nodes))) == 2
    there = Probed("tag", ("1.17",), ("1.18",), passed=True)
    back = Probed("tag", ("1.18",), ("1.17",), passed=True)
    ((level, sentence),) = said(nodes, group(*nodes), probed=[there])
    assert level is Level.REFUSE
    assert sentence == (
        "b and c run UCX 1.18 and talk to a, which runs UCX 1.17; bundle b7 needs probe tag to "
        "have passed for these values, in this direction"
    )
    assert said(nodes, group(*nodes), probed=[there, back]) == []
    failed = Probed("tag", ("1.18",), ("1.17",), passed=False)
    assert len(said(nodes, group(*nodes), probed=[failed, there, back])) == 1
    assert said(nodes, group("b", "c")) == []  # equal values need none
    alone = FILE.replace(b"scope: group, must-probe", b"scope: node, must-probe")
    rules = parse(alone, "compat.yaml")
    assert len(said(nodes, rules=rules)) == 2
    fine = [Probed("tag", (v,), (v,), passed=True) for v in ("1.17", "1.18")]
    assert said(nodes, rules=rules, probed=fine) == []


def test_a_minimum_by_itself_and_by_another_fact():
    """A rule in mode warn never refuses; two builds of a version both reach it."""
    nodes = {"a": {"gpu.driver": "525.60.13", "cuda": "12.4"}}
    assert said(nodes) == [(Level.WARN, "a runs driver 525.60.13; bundle b7 needs at least 535")]
    nodes = {"a": {"gpu.driver": "570.1", "cuda": "13.0.1"}}
    ((level, sentence),) = said(nodes)
    assert level is Level.REFUSE
    assert sentence == (
        "a runs driver 570.1 with CUDA 13.0.1; bundle b7 needs driver at least 580 from CUDA 13 on"
    )
    assert said({"a": {"gpu.driver": "535.0", "cuda": "11.8"}}) == []
    assert said({"a": {"gpu.driver": "535+b", "cuda": "12.0"}}) == []
    for odd in ({"gpu.driver": "580-rc1", "cuda": "13"}, {"gpu.driver": "580", "cuda": "13rc1"}):
        ((level, sentence),) = said({"a": odd})
        assert level is Level.WARN
        assert "can't be compared" in sentence
        assert ("525.60.13 from CUDA 12 on" in sentence) == (odd["cuda"] == "13rc1")
    mixed = {"a": {"gpu.driver": "580.65 (7), 590.12 (1)", "cuda": "13"}}
    assert {level for level, _ in said(mixed)} == {Level.WARN}


SETTINGS = parse(
    b"""
format: 1
facts: {env.*: setting, file.*: file of settings}
rules:
  settings: {source: s, scope: group, mode: warn, exact: [env.NCCL_*, env.*, file.*]}
""",
    "compat.yaml",
)


def test_a_pattern_stands_for_the_facts_that_are_there():
    """A sentence for each that differs, with its name and each value; not set is a value, too."""
    nodes = {f"r{n}": {"env.NCCL_ALGO": "Tree", "env.UCX_TLS": "tcp"} for n in range(4)}
    assert said(nodes, group(*nodes), rules=SETTINGS) == []
    nodes["r2"] = {"env.NCCL_ALGO": "Ring", "file.nccl.graph": "sha256:7"}
    found = judge(SETTINGS, nodes, places=[group(*nodes)], whose="job 17")
    assert [ruling.sentence.partition(";")[0] for ruling in found.rulings] == [
        "group world runs NCCL_ALGO Tree on r0, r1 and r3, NCCL_ALGO Ring on r2",
        "group world runs UCX_TLS tcp on r0, r1 and r3, no UCX_TLS on r2",
        "group world runs no file.nccl.graph on r0, r1 and r3, file.nccl.graph sha256:7 on r2",
    ]
    assert {(ruling.rule, ruling.level) for ruling in found.rulings} == {("settings", "warn")}
    assert "; job 17 needs one NCCL_ALGO for all [rule settings: s]" in found.rulings[0].sentence
    assert found.unjudged == ()
    assert judge(SETTINGS, {"a": {"b": "1"}}, places=[group("a")]).unjudged == ("settings",)


def test_a_family_that_is_unknown_is_said_once():
    """And not for each variable that others have set; what is known all the same is compared."""
    nodes = {f"r{n}": {"env.NCCL_ALGO": "Tree", "env.UCX_TLS": "tcp"} for n in range(3)}
    nodes["r1"] = {"env.*": None, "env.NCCL_*": None, "env.NCCL_ALGO": "Ring", "env.UCX_TLS": None}
    nodes["r2"] |= {"env.UCX_TLS": None}
    assert [told.partition(";")[0] for _, told in said(nodes, group(*nodes), rules=SETTINGS)] == [
        "group world runs NCCL_ALGO Tree on r0 and r2, NCCL_ALGO Ring on r1",
        "r1 runs an unknown env.NCCL_*",
        "r1 runs an unknown setting",
        "r2 runs an unknown UCX_TLS",
    ]


def test_patterns_are_judged_by_distinct_values():
    """d values of each fact, whatever n is."""
    looks = set()
    for count in (10, 1000):
        nodes = {f"r{n}": {"env.NCCL_ALGO": f"{n % 3}", "env.UCX_TLS": "x"} for n in range(count)}
        looks.add(judge(SETTINGS, nodes, places=[group(*nodes)]).looks)
    assert len(looks) == 1


def test_a_probe_that_is_about_one_fact_is_not_asked_for_where_that_is_equal():
    """Two versions at one vendor are another rule's; what is recorded has all of the values."""
    text = (
        b"format: 1\nfacts: {v: vendor, n: NCCL}\nrules:\n  vendors: {source: s, scope: group, "
        b"must-probe: {probe: p, facts: [v, n], about: [v]}}\n"
    )
    rules = parse(text, "f")
    nodes = {"a": {"v": "x", "n": "1"}, "b": {"v": "x", "n": "2"}}
    assert said(nodes, group("a", "b"), rules=rules) == []
    assert (
        len(said(nodes, group("a", "b"), rules=parse(text.replace(b", about: [v]", b""), "f"))) == 2
    )
    nodes["b"] = {"v": "y", "n": "2"}
    there = Probed("p", ("x", "1"), ("y", "2"), passed=True)
    ((_, sentence),) = said(nodes, group("a", "b"), rules=rules, probed=[there])
    assert sentence.startswith("b runs vendor y with NCCL 2 and talks to a, which runs")


def test_over_a_link_clients_are_held_against_servers():
    """Servers that differ are no fault of a client whose version nobody knows; it is said once."""
    text = FILE.replace(b"{source: init.cc, scope: group, exact", b"{source: x, scope: link, exact")
    rules = parse(text, "compat.yaml")
    nodes = {"c": {"nccl": None}, "s": {"nccl": "2.20"}, "t": {"nccl": "2.19"}}
    ((level, sentence),) = said(nodes, link(["c"], ["c", "s", "t"]), rules=rules)
    assert level is Level.WARN
    assert sentence.startswith("c runs an unknown NCCL;")
    nodes["c"] = {"nccl": "2.20"}
    ((level, sentence),) = said(nodes, link(["c"], ["s", "t"]), rules=rules)
    assert level is Level.REFUSE
    assert sentence.startswith("link wire runs NCCL 2.20 on c and s, NCCL 2.19 on t;")
    assert said({**nodes, "c": {}}, link(["c"], ["s", "t"]), rules=rules) == []


def test_the_worst_stands_first_and_gives_the_level():
    """Whoever reads one line reads the refusal."""
    nodes = {"a": {"gpu.driver": "530", "fm": "530.1"}, "b": {"gpu.driver": "530", "fm": None}}
    found = judge(RULES, nodes)
    assert [ruling.level for ruling in found.rulings] == ["refuse", "warn", "warn"]
    assert [ruling.unknown for ruling in found.rulings] == [False, False, True]
    assert found.level is Level.REFUSE


def test_a_place_with_a_node_that_nobody_described_is_an_error():
    """To leave it out in silence would let it pass."""
    with pytest.raises(ValueError, match="group world has the node r9, which is not among"):
        judge(RULES, {"r0": {}}, places=[group("r0", "r9")])


def test_legitimate_mixtures_pass_the_rules_that_are_shipped():
    """Mixed processor vendors, drivers, hosts without NVSwitches, a rolling upgrade of Slurm."""
    nodes = {
        f"n{n}": {
            "gpu.driver": "580.65.06" if n % 2 else "570.211.01",
            "fabric-manager.version": "580.65.06" if n % 2 else "570.211.01",
            "cpu.vendor": "AuthenticAMD" if n % 3 else "GenuineIntel",
            "nccl.version": "2.27.3",
            "cuda.runtime.version": "12.8",
            "cuda.driver.version": "580.65.06" if n % 2 else "570.211.01",
            "slurm.slurmd": "24.05.4" if n % 2 else "24.11.5",
        }
        for n in range(12)
    }
    nodes["n11"].pop("fabric-manager.version")
    nodes["head"] = {"slurm.slurmctld": "25.05.1", "slurm.slurmdbd": "25.11.0"}
    places = [
        Place(Scope.GROUP, "world", tuple(f"n{n}" for n in range(12))),
        Place(Scope.LINK, "slurm", tuple(f"n{n}" for n in range(12)), ("head",)),
        Place(Scope.LINK, "accounting", ("head",), ("head",)),
    ]
    found = judge(start(), nodes, places=places)
    assert found.level is Level.WARN
    assert {ruling.rule for ruling in found.rulings} == {"nccl-cpu-vendors"}


@pytest.mark.parametrize(
    ("name", "nodes", "scope"),
    [
        (
            "nvidia-fabric-manager",
            {"a": {"gpu.driver": "580.126.09", "fabric-manager.version": "590.48.01"}},
            None,
        ),
        ("nccl", {"a": {"nccl.version": "2.20.5"}, "b": {"nccl.version": "2.19.3"}}, Scope.GROUP),
        (
            "nccl-net-plugin",
            {"a": {"nccl.plugin.net": "x"}, "b": {"nccl.plugin.net": "none"}},
            Scope.GROUP,
        ),
        (
            "cuda-driver",
            {"a": {"cuda.runtime.version": "13.0", "cuda.driver.version": "570.211.01"}},
            None,
        ),
        (
            "slurm-nodes",
            {"a": {"slurm.slurmd": "24.11.1"}, "b": {"slurm.slurmctld": "24.05.4"}},
            Scope.LINK,
        ),
        ("etcd", {"a": {"etcd.version": "3.4.23"}, "b": {"etcd.version": "3.6.1"}}, Scope.LINK),
    ],
)
def test_known_mixtures_are_refused_by_the_rules_that_are_shipped(name, nodes, scope):
    """Those that threads report, as far as versions tell."""
    places = (
        [Place(scope, "p", ("a",) if scope is Scope.LINK else tuple(nodes), ())] if scope else []
    )
    if scope is Scope.LINK:
        places = [Place(scope, "p", ("a",), ("b",))]
    found = judge(start(), nodes, places=places)
    assert found.level is Level.REFUSE
    assert {ruling.rule for ruling in found.rulings} == {name}


def test_ten_thousand_nodes_are_judged_by_their_distinct_values(capsys):
    """d values and d^2 pairs of them, whatever n is; the time is printed, not judged."""
    rng = random.Random(6)
    stacks = [
        {
            "gpu.driver": driver,
            "fm": driver,
            "cuda": "12.8",
            "nccl": "2.27.3",
            "ucx": ucx,
            "slurmd": slurmd,
        }
        for driver, ucx, slurmd in [
            ("570.1", "1.17", "24.05.1"),
            ("580.1", "1.18", "24.05.4"),
            ("580.2", "1.22", "24.11.1"),
        ]
    ]
    looks = {}
    for count in (100, 10_000):
        nodes = {f"n{n}": dict(stacks[n % 3]) for n in range(count - 1)}
        nodes["bad"] = {**stacks[0], "fm": "590.1", "nccl": "2.19.3"}
        names = list(nodes)
        rng.shuffle(names)
        began = time.perf_counter()
        found = judge(RULES, nodes, places=[group(*names)])
        took = time.perf_counter() - began
        with capsys.disabled():
            print(
                f"\n{count} nodes, {found.distinct} distinct, {len(RULES.rules)} rules: "
                f"{found.looks} looks, {len(found.rulings)} sentences, {took:.3f} s"
            )
        assert found.distinct == 4
        looks[count] = found.looks
        assert {r.rule for r in found.rulings} == {"fabric-manager", "nccl", "ucx-probe"}
    assert looks[100] == looks[10_000] < 50
