"""Show that all ranks of a round hear one verdict, whoever is late, gone or of another round."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("yaml")

from gate_scale import members
from gatekit import FLEETS, meet, ranks, read, rules_of

from handfast.errors import Blocked, FormatError
from handfast.fleet.compat.reading import parse
from handfast.fleet.compat.rules import Level
from handfast.fleet.gate import round as rounds
from handfast.fleet.gate.keys import Keys, Memory, Torch
from handfast.fleet.gate.round import (
    Mode,
    Seat,
    Verdict,
    arrive,
    attend,
    decide,
    gather,
    ranks_of,
)

Connect = Callable[[], Keys]

SERVER = """
import sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""

ONE = {"nccl.version": "2.27.5"}
OTHER = {"nccl.version": "2.26.2"}


class Counting(Memory):
    """A store that counts the texts and the bytes that are put."""

    def __init__(self) -> None:
        super().__init__()
        self.puts: list[tuple[str, int]] = []

    def set(self, key: str, text: str) -> None:
        self.puts.append((key, len(text)))
        super().set(key, text)


def seat(rank: int, size: int) -> Seat:
    """A rank, two a node."""
    return Seat(rank, size, f"node-{rank // 2}", rank // 2 * 2, 2)


def judging(size: int, mode: Mode = Mode.ENFORCE) -> Callable[..., Verdict]:
    """A court by the shipped rules, over the whole world."""
    groups = ranks_of("", size)
    return lambda posted, stacks: decide(
        rules_of(""), posted, stacks, size=size, mode=mode, groups=groups, whose="job 17"
    )


def crowd(
    connect: Connect, facts: list[dict[str, str]], away: tuple[int, ...] = ()
) -> list[object]:
    """Hold a round with a thread a rank; what each heard, or the error that it got."""
    size, heard = len(facts), [None] * len(facts)

    def one(rank: int) -> None:
        try:
            keys, mine = connect(), seat(rank, size)
            place = arrive(keys, "0", mine, dict(facts[rank]))
            heard[rank] = attend(keys, place, mine, 0.3, judging(size), Mode.ENFORCE)
        except Blocked as error:
            heard[rank] = error

    threads = [threading.Thread(target=one, args=(r,)) for r in range(size) if r not in away]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for others not long."""
    monkeypatch.setattr(rounds, "GRACE_S", 0.3)


@pytest.fixture(params=["memory", "torch"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Reach one store: ours in memory, or torch's over loopback, with a socket a rank."""
    if request.param == "memory":
        keys = Memory()
        yield lambda: keys
        return
    distributed = pytest.importorskip("torch.distributed")
    served = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield lambda: Torch(distributed.TCPStore("127.0.0.1", served.port, is_master=False))


def test_ten_thousand_ranks_are_judged_by_their_few_stacks() -> None:
    """Facts travel once a stack, and what a rank posts and hears does not grow with the job."""
    keys = Counting()
    found = meet(members(10_000, 4), rules_of(""), keys=keys)
    assert len(found) == 10_000
    assert {verdict.line for verdict in found} == {found[0].line}
    assert "NCCL 2.20.5 on rank 5000 (node-625)" in found[0].line
    assert found[0].stacks == 5
    assert sum("/facts/" in key for key, _ in keys.puts) == 5
    assert max(size for _, size in keys.puts) < 4000


def test_a_setting_of_one_rank_alone_is_named() -> None:
    """By the shipped rules, with the variable and who has which value; it warns, in any mode."""
    who = ranks(read(FLEETS / "legit-one-algorithm.yaml"))
    found = meet(who, rules_of(""))[0]
    assert found.line.startswith(
        "warning: group world runs no NCCL_ALGO on rank 0 (a), NCCL_ALGO Ring on rank 1 (b); "
        "job 17 needs one NCCL_ALGO for all [rule settings: "
    )
    assert len(found.findings) == 1


def test_two_versions_at_one_vendor_are_one_finding() -> None:
    """The rule about processors' vendors has nothing to say of them."""
    found = meet(ranks(read(FLEETS / "mixed-nccl.yaml")), rules_of(""))[0]
    assert [each.rule for each in found.findings] == ["nccl"]


def test_all_findings_are_said_up_to_a_limit() -> None:
    """Each by its own level; a refusal stays one line, with how many more there are."""
    who = [("a", {"nccl.version": "1", "env": "read"}), ("b", {"nccl.version": "2", "env": "read"})]
    for n in range(9):
        who[0][1][f"env.NCCL_{n}"] = "1"
    found = meet(who, rules_of(""), mode=Mode.OBSERVE)[0]
    assert (len(found.findings), found.more) == (8, 2)
    assert found.lines[0].startswith("would be refused: group world runs NCCL 1 on rank 0 (a), ")
    assert found.lines[1].startswith("warning: group world runs no NCCL_0 on rank 1 (b), NCCL_0 1 ")
    assert found.lines[8:] == ("and 2 more",)
    assert found.line == f"{found.lines[0]} (and 9 more)"
    assert meet([("a", ONE)], rules_of(""))[0].lines == ("fine: 1 ranks, 1 stacks",)


def blind(why: str, *stacks: dict[str, str]) -> Verdict:
    """Judge ranks whose nodes told nothing, for a reason."""
    posted, held = {}, {}
    for rank, facts in enumerate(stacks):
        name = rounds.digest(rounds.encode(facts))
        posted[rank], held[name] = rounds.Posted(seat(rank, len(stacks)), name, why), facts
    return judging(len(stacks), Mode.WARN)(posted, held)


def test_why_nodes_told_nothing_is_said_where_a_rule_wants_to_know() -> None:
    """Between what is broken and what is unknown; of a job that needs nothing of it, not at all."""
    nobody = dict.fromkeys(rounds.NODE)
    found = blind("no service", {**nobody, "torch.version": "1"}, {**nobody, "torch.version": "2"})
    told = [each.sentence.partition(";")[0] for each in found.findings]
    assert told[0].startswith("group world runs torch 1 on rank 0 (node-0), torch 2 on rank 1")
    assert told[1] == (
        "rank 0 (node-0) and rank 1 (node-0): what the node runs is unknown: no service"
    )
    assert len(told) > 2
    assert all("unknown" in each for each in told[2:])
    assert blind("no service", ONE, ONE).findings == ()
    (nccl,) = blind("no service", {"nccl.version": None}).findings
    assert "an unknown NCCL" in nccl.sentence


def test_ranks_at_once_hear_one_verdict(connect: Connect) -> None:
    """Over memory and over torch's own store, each rank a thread."""
    heard = crowd(connect, [ONE, ONE, OTHER, ONE])
    assert {each.line for each in heard} == {heard[0].line}
    assert "NCCL 2.26.2 on rank 2 (node-1)" in heard[0].line


@pytest.mark.usefixtures("short")
def test_who_does_not_come_is_named(connect: Connect) -> None:
    """With the node where another rank of it came; also rank 0, whom another judges for."""
    heard = crowd(connect, [ONE] * 6, away=(0, 4, 5))
    told = "refused: ranks 0 (node-0), 4, 5 of 6 did not come to the gate in time"
    assert [each and each.line.partition(" (and")[0] for each in heard] == [
        None, told, told, told, None, None,
    ]  # fmt: skip


@pytest.mark.usefixtures("short")
def test_a_node_is_not_guessed_where_ranks_do_not_lie_in_blocks() -> None:
    """But dealt out like cards: what one says of its neighbour, the neighbour knows better."""
    keys = Memory()
    for rank in (0, 1):
        place = arrive(keys, "0", Seat(rank, 4, f"node-{rank}", rank, 2), ONE)
    missing = gather(keys, place, 4, 0.0)[0]
    found = decide(rules_of(""), missing, {}, size=4, mode=Mode.ENFORCE, groups={})
    assert found.line.startswith("refused: ranks 2, 3 of 4 did not come")


def test_many_that_are_missing_are_counted() -> None:
    """A line stays a line."""
    found = meet([("a", dict(ONE))] * 20, rules_of(""), away=tuple(range(1, 20)))
    assert "ranks 1 (a), 2 (a), 3 (a), 4 (a), 5 (a), 6 (a), 7 (a), 8 (a) and 11 others" in (
        found[0].line
    )


def test_rounds_of_one_store_are_apart(connect: Connect) -> None:
    """The same restart count twice, as when a node was replaced: nobody hears the old verdict."""
    first = crowd(connect, [ONE, OTHER])
    assert {each.refused for each in first} == {True}
    assert {each.level for each in crowd(connect, [ONE, ONE])} == {Level.FINE}
    assert {each.ranks for each in crowd(connect, [ONE, ONE, ONE])} == {3}


def test_a_holder_that_dies_before_its_post_is_missing() -> None:
    """Its stack is unknown to all others that have it, which is never taken for nothing."""
    keys = Memory()
    place = arrive(keys, "0", seat(0, 2), dict(ONE))
    facts = rounds.encode({"nccl.version": "9"})
    keys.claim(f"{place}/holders/{rounds.digest(facts)}")
    arrive(keys, "0", seat(1, 2), {"nccl.version": "9"})
    posted, stacks = gather(keys, place, 2, 0.01)
    found = judging(2)(posted, stacks)
    assert "rank 1 (node-0) runs an unknown NCCL" in " ".join(
        each.sentence for each in found.findings
    )


def test_facts_that_are_not_those_of_their_digest_are_no_facts() -> None:
    """Nor is a post that is no post: all hear that they could not be judged."""
    keys = Memory()
    place = arrive(keys, "0", seat(0, 1), dict(ONE))
    keys.set(f"{place}/facts/{rounds.digest(rounds.encode(dict(ONE)))}", '{"nccl.version":"1"}')
    with pytest.raises(FormatError, match="are those of"):
        gather(keys, place, 1, 0.0)
    keys.set(f"{place}/rank/0", "{")
    found = attend(keys, place, seat(0, 1), 0.0, judging(1), Mode.ENFORCE)
    assert found.refused
    assert "could not be judged: what a rank posted can't be read" in found.line


def test_a_court_that_fails_is_heard_by_all() -> None:
    """A file of rules that is not there, say: the others do not wait for their timeout."""
    keys = Memory()
    places = [arrive(keys, "0", seat(rank, 2), dict(ONE)) for rank in (0, 1)]
    keys.set(f"{places[0]}/heard/all", "1")

    def court(posted: object, stacks: object) -> Verdict:
        open("/nowhere/rules.yaml").close()
        raise AssertionError

    for rank in (0, 1):
        heard = attend(keys, places[rank], seat(rank, 2), 0.01, court, Mode.OBSERVE)
        assert heard.line.startswith("would be refused: this round could not be judged: /nowhere/")


@pytest.mark.usefixtures("short")
def test_a_judge_that_is_late_hears_what_the_others_heard() -> None:
    """Two judges leave one verdict: no rank goes on where another was refused."""
    keys = Memory()
    place = arrive(keys, "0", seat(1, 2), dict(ONE))
    first = attend(keys, place, seat(1, 2), 0.01, judging(2), Mode.ENFORCE)
    assert arrive(keys, "0", seat(0, 2), dict(ONE)) == place
    assert attend(keys, place, seat(0, 2), 0.01, judging(2), Mode.ENFORCE) == first
    assert first.line.startswith("refused: rank 0 (node-0) of 2 did not come")


def leave(keys: Keys, place: str, size: int) -> threading.Thread:
    """Let rank 0 judge, and leave, in a thread of its own; gives that once there is a verdict."""
    court = judging(size)
    whole = (keys, place, seat(0, size), 0.01, court, Mode.ENFORCE)
    thread = threading.Thread(target=attend, args=whole, daemon=True)
    thread.start()
    assert keys.get(f"{place}/verdict", 60)
    return thread


def test_rank_0_stays_until_all_have_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process may hold the store: were it gone, the slower ranks would have no verdict."""
    monkeypatch.setattr(rounds, "GRACE_S", 600.0)
    keys = Memory()
    places = {arrive(keys, "0", seat(rank, 3), ONE) for rank in range(3)}
    (place,) = places
    thread = leave(keys, place, 3)
    for rank in (1, 2):
        thread.join(0.3)
        assert thread.is_alive(), f"rank 0 left before rank {rank} had heard"
        assert attend(keys, place, seat(rank, 3), 0.01, judging(3), Mode.ENFORCE).ranks == 3
    thread.join(60)
    assert not thread.is_alive()


def test_rank_0_does_not_stay_for_those_that_never_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for as many as came, and a job with a rank missing is refused without a delay."""
    monkeypatch.setattr(rounds, "GRACE_S", 600.0)
    keys = Memory()
    places = {arrive(keys, "0", seat(rank, 3), ONE) for rank in (0, 2)}
    (place,) = places
    thread = leave(keys, place, 3)
    heard = attend(keys, place, seat(2, 3), 0.01, judging(3), Mode.ENFORCE)
    assert heard.line.startswith("refused: rank 1 (node-0) of 3 did not come")
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.usefixtures("short")
def test_nobody_waits_for_ever() -> None:
    """Where the one that took the judge's seat is gone, too."""
    keys = Memory()
    place = arrive(keys, "0", seat(1, 2), dict(ONE))
    keys.claim(f"{place}/seat")
    with pytest.raises(Blocked, match="had no verdict"):
        attend(keys, place, seat(1, 2), 0.01, judging(2), Mode.ENFORCE)


def test_groups_are_judged_by_themselves() -> None:
    """Two stacks are a mixture in the world, and none in groups that do not mix them."""
    who = ranks(read(FLEETS / "legit-prefill-decode.yaml"))
    assert meet(who, rules_of(""), groups="prefill=0-3 decode=4-7")[0].level is Level.FINE
    assert meet(who, rules_of(""))[0].refused
    assert ranks_of("a=0-2,5 b=3", 6) == {"a": (0, 1, 2, 5), "b": (3,)}
    assert ranks_of(" ", 2) == {"world": (0, 1)}
    for wrong in ("a", "a=", "a=0 a=1", "a=x", "a=0-9", "a=-1"):
        with pytest.raises(ValueError, match=r"group|ranks"):
            ranks_of(wrong, 6)
    with pytest.raises(ValueError, match=r"a: 7"):
        decide(rules_of(""), {}, {}, size=2, mode=Mode.WARN, groups={"a": (7,)})


def test_a_store_that_is_gone_is_an_error_of_ours() -> None:
    """And not a RuntimeError of torch's."""
    distributed = pytest.importorskip("torch.distributed")
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as served:
        port = int(served.stdout.readline())
        client = Torch(distributed.TCPStore("127.0.0.1", port, is_master=False))
        client.set("there", "1")
        assert client.get("there", 0) == "1"
        assert client.get("not", 0) is None
        assert client.get("not", 0.05) is None
        served.stdin.close()
        served.wait()
        with pytest.raises(Blocked, match="of the rendezvous failed"):
            client.get("there", 0)


# What nobody told


STRICT = """
format: 1
facts: {nccl.version: NCCL}
rules:
  one-nccl: {source: us, scope: group, exact: [nccl.version], require-known: true}
"""


def by(text: str, facts: list[dict[str, str | None]], groups: str = "") -> Verdict:
    """Judge ranks in enforce mode, by rules of their own."""
    members = [(f"node-{rank}", each) for rank, each in enumerate(facts)]
    return meet(members, parse(text.encode(), "us"), groups=groups)[0]


def test_what_one_rank_lists_and_another_does_not_is_unknown_there() -> None:
    """And never absent, of which no rule speaks: a lost collector let mixtures pass so."""
    assert by(STRICT, [{"nccl.version": "2.27.5"}, {}]).refused
    assert not by(STRICT, [{"nccl.version": "2.27.5"}, {"nccl.version": ""}]).refused
    assert by(STRICT, [{}, {}]).level is Level.FINE  # nobody speaks of it: it is not judged


def test_collectors_that_said_nothing_are_a_warning_and_what_they_would_have_said_unknown() -> None:
    """On all ranks alike, too, where there is nothing to compare."""
    found = by(STRICT, [{"collector.nccl": None}, {"collector.nccl": None}])
    assert found.refused
    told = [each.sentence for each in found.findings if each.rule == "collectors"]
    assert told == ["rank 0 (node-0) and rank 1 (node-1): nothing was heard of the collectors nccl"]


def test_a_rank_in_no_group_is_named() -> None:
    """Nobody judged it; a span that runs backwards is no empty group but an error."""
    found = by(STRICT, [{"nccl.version": v} for v in ("1", "1", "2")], "a=0-1")
    assert not found.refused
    assert [each.sentence for each in found.findings] == [
        "rank 2 (node-2): in no group, and so not judged"
    ]
    with pytest.raises(ValueError, match="no ranks of this round"):
        ranks_of("a=3-1", 4)
