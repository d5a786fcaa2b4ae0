"""Show what a rehearsal finds of real processes, and that it leaves none of them behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import rehearsalkit
from rehearsalkit import job, python

from handfast.fleet.rehearse.child import undisturbed
from handfast.fleet.rehearse.fleet import Fleet, Outcome
from handfast.fleet.rehearse.reading import load
from handfast.fleet.rehearse.rehearsing import Kind, rehearse
from handfast.fleet.rehearse.report import recorded, report

COMMAND = """
import signal
from handfast.cli.rehearse import rehearse
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it may be ignored here, as by `nohup`
rehearse()
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Fleets live below a directory of the test; none, and no process of one, is left there."""
    place = tmp_path / "fleets"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    yield place
    assert list(place.iterdir()) == []
    until = time.monotonic() + 30  # what was killed takes a moment to be gone
    while left(place) and time.monotonic() < until:
        time.sleep(0.01)
    assert left(place) == []


def left(place):
    """The processes that were told of a directory in their environment, by number."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if f'"work":"{place}'.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except (OSError, ValueError):
            continue
    return found


def go(path, **how):
    """Go through a rehearsal; gives what came of it, and that as a report."""
    rehearsal = load(path)
    came = rehearse(rehearsal, **how)
    return came, report(rehearsal, came)


def command(place, *words):
    """Start the command, with its fleets below a directory."""
    argv = [sys.executable, "-c", COMMAND, *words]
    environ = {**os.environ, "TMPDIR": str(place)}
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, env=environ, stdout=pipe, stderr=pipe, text=True)


def histories(came, nodes):
    """At which states each node was restarted: how often each had been moved."""
    found = []
    for trail in came.trails:
        state = dict.fromkeys(nodes, 0)
        for did in trail:
            if did.kind is Kind.RESTART:
                found.append((tuple(state.values()), did.node))
            elif did.node:
                state[did.node] += 1
    return sorted(found)


def test_versions_that_get_on(tmp_path):
    """Every order of two nodes, and each node restarted once at each of nine states."""
    told = []
    came, found = go(rehearsalkit.service(tmp_path), tell=lambda *what: told.append(what))
    assert found.judged
    assert {row.worst for row in found.rows} == {Outcome.WORKS}
    assert [row.versions for row in found.rows] == [("1", "1"), ("1", "2"), ("2", "1"), ("2", "2")]
    assert found.rows[3].by == {"start": "works", "upgrade": "works", "restart": "works"}
    assert (found.breaks, found.refused, found.bad, found.unmade) == ((), 0, 0, 0)
    assert (found.fleets, found.moves) == (2 + 6, 2 + 6 + 2 * 2 + 4 * 4 + 9 * 2)
    every = [((a, b), node) for a in range(3) for b in range(3) for node in "ab"]
    assert histories(came, "ab") == every
    walks = {
        tuple(did.node for did in trail if did.kind in (Kind.UPGRADE, Kind.DOWNGRADE))
        for trail in came.trails
    }
    assert {"".join(walk) for walk in walks} - {""} == {"aa", "bb", "abab", "abba", "baab", "baba"}
    assert told[0] == (Kind.START, "fleet 1: 1, 1: start all")
    assert (Kind.UPGRADE, "fleet 3: 1, 1: upgrade a to 2") in told
    assert len(told) == found.moves


def test_a_downgrade_that_the_older_version_refuses(tmp_path):
    """Once all were upgraded they write what the older one can't read: there is no way back.

    The same mixture works on the way up, and so does a downgrade of one that went alone.
    """
    _, found = go(rehearsalkit.service(tmp_path, notes="raise"))
    assert found.rows[1].by == {"upgrade": "works", "downgrade": "refuses", "restart": "works"}
    assert found.rows[1].sentence == "these are notes of version 2, and this is 1"
    assert found.rows[0].by["downgrade"] == "works"
    assert [each.walk for each in found.breaks] == [
        ("start a 1, b 1", "upgrade b to 2", "upgrade a to 2", "downgrade a to 1"),
        ("start a 1, b 1", "upgrade a to 2", "upgrade b to 2", "downgrade b to 1"),
    ]
    assert [(each.times, each.of) for each in found.breaks] == [(2, 2)] * 2
    assert (found.refused, found.bad) == (2, 0)
    assert found.unmade == 2  # the second downgrade after either
    assert found.tally == {
        "start": {"works": found.fleets},
        "upgrade": {"works": 10},
        "downgrade": {"works": 2, "refuses": 4},
        "restart": {"works": 12},
    }


@pytest.mark.heavy
def test_three_nodes_in_every_order(tmp_path):
    """All 51, and 27 states at which each of the three is restarted; quickly it is 15."""
    path = rehearsalkit.service(tmp_path, nodes="a, b, c")
    came, found = go(path)
    every = [(state, node) for state in product(range(3), repeat=3) for node in "abc"]
    assert histories(came, "abc") == every
    assert (found.fleets, found.moves) == (2 + 51, 2 + 51 + 270 + 81)
    assert (found.unmade, found.bad, found.refused, len(found.rows)) == (0, 0, 0, 8)
    came, found = go(path, quick=True)
    assert histories(came, "abc") == every
    assert (found.fleets, found.moves) == (2 + 15, 2 + 15 + 66 + 81)


@pytest.mark.parametrize(
    ("manner", "outcome", "sentence"),
    [
        ("silent", "hangs", "the probe gave no answer within 1 s, and said nothing"),
        ("brittle", "dies", "b (1) ended with 1: greeted by 2, which 1 has never heard of"),
        ("strict", "refuses", "this is 1, and it speaks to 1 only"),
    ],
)
def test_versions_that_do_not(tmp_path, manner, outcome, sentence):
    """Found at the first mixture; each walk ends there."""
    came, found = go(rehearsalkit.service(tmp_path, manner=manner, probe_s=1))
    assert [row.worst for row in found.rows] == ["works", outcome, outcome, "works"]
    assert found.rows[2].sentence == sentence
    assert [each.outcome for each in found.breaks] == [outcome] * 2
    assert found.breaks[0].walk == ("start a 1, b 1", "upgrade b to 2")
    assert all(did.works for trail in came.trails for did in trail[:-1])
    assert found.unmade == 10 - 2


def test_three_versions_go_by_neighbours(tmp_path):
    """From the first to the second, and from the second to the third."""
    path = Path(rehearsalkit.service(tmp_path, nodes="a", manner="strict"))
    third = '  "3": {manner: strict, notes: plain}\nnodes'
    path.write_text(path.read_text().replace("nodes", third, 1))
    came, found = go(str(path), quick=True)
    assert [row.versions for row in found.rows] == [("1",), ("2",), ("3",)]
    moved = [did.versions[0] for trail in came.trails for did in trail if did.kind != "restart"]
    assert moved == ["1", "2", "3", "1", "2", "1", "2", "3", "2"]


def test_a_restart_that_does_not_work_hides_nothing(tmp_path):
    """Each was tried once; the walk is gone again without it, so that all moves are made."""
    came, found = go(rehearsalkit.service(tmp_path, manner="fresh", nodes="a"))
    assert histories(came, "a") == [((0,), "a"), ((1,), "a"), ((2,), "a")]
    assert (found.fleets, found.unmade) == (2 + 1 + 3, 0)
    assert found.rows[0].by == {"start": "works", "downgrade": "works", "restart": "dies"}
    assert found.rows[0].sentence == "a (1) ended with 1: nobody steps twice"
    assert [(each.walk[-1], each.times, each.of) for each in found.breaks] == [
        ("restart a", 2, 2),
        ("restart a", 1, 1),
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"node, ": "nobody, "}, "a (1) ended with 1: KeyError: 'nobody'"),
        ({"run: [{python}": "run: [./none"}, "a (1) can't be started: ./none: No such file"),
        ({"bash, -c": "false, -c", "ready-s: 20": "ready-s: 0.2"}, "was not ready within 0.2 s"),
        ({"bash, -c": "none, -c", "ready-s: 20": "ready-s: 0.2"}, "was not ready within 0.2 s"),
        ({", probe]": ", node]"}, "the probe ended with 1: TypeError"),
        ({"[{python}, -IS, {kit}, probe]": "[none]"}, "the probe can't be started: none: No such"),
        ({"probe-s": "setup: [sh, -c, 'echo no room >&2; exit 5']\nprobe-s"},
         "setup ended with 5: no room"),
        ({"probe-s": "setup: [sh, -c, 'kill -9 $$']\nprobe-s"},
         "setup died of Killed (9), and said nothing"),
    ],
)  # fmt: skip
def test_nothing_is_judged_where_one_version_alone_does_not_work(tmp_path, change, sentence):
    """It is the file that is wrong, or the machine; mixtures would tell nothing."""
    path = Path(rehearsalkit.service(tmp_path, nodes="a"))
    text = path.read_text()
    for old, new in change.items():
        there = old.format(python='"{python}"', kit=json.dumps(rehearsalkit.__file__))
        assert there in text
        text = text.replace(there, new)
    path.write_text(text)
    came, found = go(str(path))
    assert not found.judged
    assert len(came.trails) == 2
    assert sentence in found.rows[0].sentence


def test_what_programs_are_told(tmp_path):
    """By their arguments and their environment; a node's own things are the same in its lives."""
    heard = tmp_path / "heard"
    heard.mkdir()
    path = Path(rehearsalkit.service(tmp_path, nodes="a"))
    program = (
        "import json, os, sys; "
        f"open('{heard}/' + str(len(os.listdir('{heard}'))), 'w').write("
        "json.dumps([sys.argv[1:], os.getcwd(), json.loads(os.environ['HANDFAST_REHEARSAL'])]))"
    )
    own = [
        "{node}",
        "{index}",
        "{version}",
        "{dir}",
        "{manner}",
        "{port}",
        "{a.port.0}",
        "{port.3}",
    ]
    argv = [*json.loads(python(program)), *own, "{work}"]
    text = path.read_text()
    lines = [
        f"probe: {{each: node, run: {json.dumps(argv)}}}" if line.startswith("probe:") else line
        for line in text.splitlines()
    ]
    path.write_text("\n".join(lines))
    go(str(path))
    told = [json.loads((heard / str(at)).read_text()) for at in range(len(os.listdir(heard)))]
    walk = told[2:]
    assert [words[2] for words, _, _ in walk] == ["1", "1", "2", "2", "1", "1"]
    assert len({(*words[:2], *words[3:]) for words, _, _ in walk}) == 1
    words, here, rehearsal = walk[0]
    assert words[:2] == ["a", "0"]
    assert words[4] == "mild"
    ports = [int(port) for port in words[5:8]]
    assert ports[0] == ports[1] != ports[2]
    assert here == words[8] == rehearsal["work"]
    assert len(set(rehearsal["ports"]["a"])) == 4
    assert rehearsal["ports"]["a"][0::3] == ports[1:]
    assert rehearsal == {
        "nodes": ["a"],
        "versions": {"a": "1"},
        "ports": rehearsal["ports"],
        "dirs": {"a": words[3]},
        "variables": {"a": {"manner": "mild", "notes": "plain"}},
        "work": here,
    }
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(10_000 <= port < max(low, 10_400) for port in ports)


def test_a_job_is_each_way_to_give_nodes_versions(tmp_path):
    """Three versions, not neighbours only; each ordered pair is asked."""
    probe = python(
        "import sys; a, b = map(int, sys.argv[1:]); d = a - b\n"
        "if d == 1: print('a word before', file=sys.stderr); print('too new', file=sys.stderr)\n"
        "sys.exit(96 if d == 1 else 7 if d == 2 else 0)"
    )
    argv = [*json.loads(probe), "{client.version}", "{server.version}"]
    text = f"probe: {{each: pair, run: {json.dumps(argv)}}}"
    came, found = go(job(tmp_path, text, "{'1': {}, '2': {}, '3': {}}"))
    assert [(*row.versions, row.worst) for row in found.rows] == [
        ("1", "1", "works"), ("1", "2", "refuses"), ("1", "3", "fails"),
        ("2", "1", "refuses"), ("2", "2", "works"), ("2", "3", "refuses"),
        ("3", "1", "fails"), ("3", "2", "refuses"), ("3", "3", "works"),
    ]  # fmt: skip
    assert found.rows[1].sentence == "too new"
    assert found.breaks[0].said == ("a word before", "too new")
    sentence = "the probe b (3) -> a (1) ended with 7, and said nothing"
    assert found.rows[2].sentence == sentence
    assert came.trails[0][0].versions == ("1", "1")
    assert [trail[0].versions[0] == trail[0].versions[1] for trail in came.trails[:3]] == [True] * 3
    assert (found.refused, found.bad, found.moves) == (4, 2, 9)
    assert found.tally == {"start": {"works": 3, "refuses": 4, "fails": 2}}
    # a row has the worst of two directions; here is each, in whichever fleets it was asked
    assert [(each.client, each.server, each.met, each.worked) for each in found.pairs] == [
        ("1", "1", 2, 2), ("1", "2", 2, 2), ("1", "3", 2, 2),
        ("2", "1", 2, 0), ("2", "2", 2, 2), ("2", "3", 2, 2),
        ("3", "1", 2, 0), ("3", "2", 2, 0), ("3", "3", 2, 2),
    ]  # fmt: skip
    worst = {(each.client, each.server): (each.worst, each.sentence) for each in found.pairs}
    assert worst["1", "2"] == (Outcome.WORKS, "")
    assert worst["2", "1"] == (Outcome.REFUSES, "too new")
    assert worst["3", "1"] == (Outcome.FAILS, sentence)


def test_each_node_of_a_job_is_asked(tmp_path):
    """By itself."""
    text = "probe: {each: node, run: [test, '{node}{version}', '!=', b2]}"
    _, found = go(job(tmp_path, text))
    assert not found.judged
    assert found.rows[1].sentence == "the probe b (2) ended with 1, and said nothing"


def test_what_is_set_up_is_always_taken_back(tmp_path):
    """After a setup that broke off, too; and a teardown that does not work is told once."""
    diary = tmp_path / "diary"
    text = (
        f"setup: [sh, -c, 'echo up >> {diary}; test {{a.version}}{{b.version}} != 12']\n"
        f"teardown: [sh, -c, 'echo down >> {diary}; echo busy; exit 3']\n"
        "probe: {each: fleet, run: ['true']}"
    )
    _, found = go(job(tmp_path, text))
    assert diary.read_text().split() == ["up", "down"] * 4
    assert found.rows[1].sentence == "setup ended with 1, and said nothing"
    assert found.untidy == ("teardown ended with 3: busy",)
    assert found.judged


def test_what_broke_is_kept(tmp_path):
    """Of each fleet that did not work: its directory, with what each process said in a file."""
    keep = tmp_path / "keep"
    keep.mkdir()
    _, found = go(rehearsalkit.service(tmp_path, manner="brittle"), keep=str(keep))
    assert [len(each.kept) for each in found.breaks] == [each.times for each in found.breaks]
    kept = [Path(path) for each in found.breaks for path in each.kept]
    assert sorted(kept) == sorted(keep.iterdir())
    assert {path.name for path in (kept[0] / "nodes").iterdir()} == {"a", "b"}
    said = sorted((kept[0] / "said").iterdir())
    assert [path.name for path in said][:2] == ["001-a-1", "002-b-1"]
    assert {"ready-a", "probe", "probe.err", "b-2"} <= {path.name[4:] for path in said}
    every = [path for root in kept for path in (root / "said").iterdir()]
    died = [path.name[4:] for path in every if "has never heard of" in path.read_text()]
    assert sorted(died) == ["b-1", "b-2"]


def test_what_a_process_started_is_ended_with_it(tmp_path, place):
    """Of a node that does not listen to SIGTERM, of one that ends at once, and of a probe."""
    path = tmp_path / "stubborn.yaml"
    path.write_text(
        "rehearsal: stubborn\n"
        "versions:\n"
        "  '1': {does: 'trap \"\" TERM; sleep 998 & wait; wait'}\n"
        "  '2': {does: 'sleep 999 & exit 4'}\n"
        "nodes: [a]\n"
        "run: [sh, -c, '{does}']\n"
        "ready: ['true']\n"
        "probe: {each: fleet, run: [sh, -c, 'sleep 997 & exit 0']}\n"
        "stop-s: 0.2\n"
    )
    _, found = go(str(path))
    assert [row.worst for row in found.rows] == ["works", "dies"]
    assert not found.judged
    assert found.rows[1].sentence == "a (2) ended with 4, and said nothing"


def test_a_node_that_ends_after_its_probe_is_missed(tmp_path):
    """At the next move at the latest: to stop it as if it ran would hide that."""
    path = tmp_path / "tired.yaml"
    path.write_text(
        "rehearsal: tired\n"
        "versions: {'1': {for: '99'}, '2': {for: '0.4'}}\n"
        "nodes: [a, b]\n"
        "run: [sh, -c, 'sleep {for}; exit 7']\n"
        "ready: ['true']\n"
        "probe: {each: fleet, run: ['true']}\n"
    )
    rehearsal = load(str(path))
    with TemporaryDirectory(dir=tmp_path) as root:
        fleet = Fleet(rehearsal, root, ("1", "1"))
        assert fleet.start().outcome is Outcome.WORKS
        assert fleet.move("a", "2").outcome is Outcome.WORKS
        while (lost := fleet.lost()).outcome is Outcome.WORKS:
            time.sleep(0.01)
        assert lost.sentence == "a (2) ended with 7, and said nothing"
        assert fleet.lost().outcome is Outcome.WORKS  # it is told once
        assert fleet.close().outcome is Outcome.WORKS


def test_an_interrupt_waits_until_what_is_started_is_known():
    """A process that was started when Ctrl-C came would be lost; so would the rest of an end."""
    reached = []

    def body():
        with undisturbed(), undisturbed():
            signal.raise_signal(signal.SIGINT)
            reached.append("the end")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        body()
    assert reached == ["the end"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_thread_may_rehearse(tmp_path):
    """It hears no signals, and can't hold them up."""
    path = job(tmp_path, "probe: {each: fleet, run: ['true']}")
    with ThreadPoolExecutor(1) as pool:
        _, found = pool.submit(go, path).result()
    assert [row.worst for row in found.rows] == ["works"] * 4


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_who_is_interrupted_leaves_nothing_behind(tmp_path, place, number, code):
    """In the middle of a probe that hangs, with nodes that run; what was set up is taken back."""
    diary = tmp_path / "diary"
    more = f"teardown: [sh, -c, 'echo down >> {diary}']\n"
    path = rehearsalkit.service(tmp_path, manner="silent", probe_s=600, more=more)
    told = command(place, path, "--json")
    try:
        for at, versions in enumerate(("1, 1", "2, 2", "1, 1"), 1):
            assert told.stderr.readline() == f"fleet {at}: {versions}: start all\n"
        before: list[int] = []
        while len(before) < 3 or before != left(place):  # two nodes and a probe that stay
            assert told.poll() is None
            before = left(place)
            time.sleep(0.3)
        told.send_signal(number)
        answer, _ = told.communicate(timeout=60)
        assert told.returncode == code
    finally:
        told.kill()
        told.wait()
    assert diary.read_text().split()[-1] == "down"
    found = json.loads(answer)
    assert (found["cut"], found["judged"], found["bad"]) == (True, True, 0)
    assert [row["versions"] for row in found["rows"]] == [["1", "1"], ["2", "2"]]
    assert {row["worst"] for row in found["rows"]} == {"works"}  # what hung is not in it
    assert found["tally"]["start"]["works"] >= 2


def test_who_is_interrupted_often_takes_back_no_less(tmp_path, place):
    """Before the first fleet served, while its node does not want to end, and in the teardown."""
    diary = tmp_path / "diary"
    path = tmp_path / "slow.yaml"
    path.write_text(
        "rehearsal: slow\nversions: {'1': {}, '2': {}}\nnodes: [a]\n"
        f'run: [sh, -c, \'trap "echo asked >> {diary}" TERM; echo up >> {diary}; '
        "while true; do sleep 0.1; done']\n"
        "ready: ['false']\nprobe: {each: fleet, run: ['true']}\nstop-s: 2\nready-s: 600\n"
        f"teardown: [sh, -c, 'echo back >> {diary}; sleep 0.5; echo down >> {diary}']\n"
    )

    def wait_for(word):
        while not (diary.exists() and word in diary.read_text()):
            assert told.poll() is None
            time.sleep(0.01)

    told = command(place, str(path))
    try:
        wait_for("up")
        told.send_signal(signal.SIGINT)
        for word in ("asked", "back"):
            wait_for(word)
            told.send_signal(signal.SIGINT)
        answer, _ = told.communicate(timeout=60)
        assert told.returncode == 130
    finally:
        told.kill()
        told.wait()
    assert diary.read_text().split() == ["up", "asked", "back", "down"]
    assert answer.startswith("slow: nothing was tried (0 fleets, ")
    assert answer.splitlines()[-1] == "cut off: it was interrupted, and the rest was not tried"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_what_is_still_mounted_is_left_alone_and_named(tmp_path, place):
    """A teardown that fails must not cost what was mounted: it is not the rehearsal's to remove."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("years of work")
    mount = f"mkdir -p {{work}}/there && mount --bind {precious} {{work}}/there"
    text = (
        f"setup: [sh, -c, '{mount}']\nteardown: ['false']\nprobe: {{each: fleet, run: ['true']}}\n"
    )
    try:
        came, found = go(job(tmp_path, text, nodes="a"))
        assert (precious / "file").read_text() == "years of work"
        assert any("is still mounted, so" in each for each in came.untidy)
        assert found.bad == 0
    finally:
        for each in place.glob("*/*/there"):
            subprocess.run(["umount", each], check=True)
        for each in place.iterdir():
            shutil.rmtree(each)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a file immutable")
def test_what_can_not_be_removed_is_named(tmp_path, place):
    """It stays on the machine, so a rehearsal that leaves it behind must not look tidy."""
    text = (
        "setup: [sh, -c, 'touch {work}/rock && chattr +i {work}/rock']\n"
        "probe: {each: fleet, run: ['true']}\n"
    )
    try:
        came, found = go(job(tmp_path, text, nodes="a"))
        if any("chattr" in did.found.sentence for trail in came.trails for did in trail):
            pytest.skip("this file system has no immutable files")
        assert came.untidy
        for what in came.untidy:
            assert re.match(rf"{re.escape(str(place))}/\S+ could not be removed whole", what)
        assert found.bad == 0
    finally:
        for rock in place.glob("*/*/rock"):
            subprocess.run(["chattr", "-i", rock], check=False)
        for each in place.iterdir():
            shutil.rmtree(each)


def test_a_pair_whose_mixture_died_before_it_was_probed_has_not_passed(tmp_path):
    """It worked where it was probed, and a node that was restarted in it died."""
    pair = "probe: {each: pair, run: ['true']}"
    path = rehearsalkit.service(tmp_path, manner="fresh")
    text = Path(path).read_text()
    start = text.index("probe: {each: fleet")
    Path(path).write_text(
        text[:start] + pair + text[text.index("\n", start) :]
        + "record: {probe: ping, facts: {ucx.version: '{version}'}}\n"
    )  # fmt: skip
    rehearsal = load(path)
    came = rehearse(rehearsal)
    done = [
        did for trail in came.trails for did in trail if did.versions in [("1", "2"), ("2", "1")]
    ]
    assert {did.found.outcome for did in done} == {"works", "dies"}
    assert all(each.found.outcome == "works" for did in done for each in did.pairs)
    passed = {(p.client[0], p.server[0]): p.passed for p in recorded(rehearsal, came)}
    assert not passed[("1", "2")]
    assert not passed[("2", "1")]
