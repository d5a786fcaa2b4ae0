"""Shows how ranks meet: what is found is said before anything is made, alike on every rank."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import xxhash
from agentkit import HASTY
from hostkit import Gathering

from handfast.agent import reminder
from handfast.agent.joining import Opened
from handfast.checkpoint.refusal import Hand, lay, read
from handfast.checkpoint.rounds import Meeting, Peek, allocate_in, domain_name, meet, peek, settle
from handfast.core.membership import Configuration, Domain, Formation, RoundRecord
from handfast.core.messages import Configured, Frozen, Report, encode
from handfast.core.verdict import Verdict
from handfast.errors import Blocked, Damaged, HandfastError, Refused, SaveFailed, Superseded
from handfast.store.claims import IdentityFile, domain_path, identify
from handfast.store.directory import claim
from handfast.testing.faults import Crash, Fault, FaultyFiles


@pytest.fixture
def root(tmp_path: Path) -> str:
    """The directory of a run."""
    return str(tmp_path / "run")


def founded(root: str, size: int = 1, run: str = "run-1", generation: int = 4) -> Configuration:
    """Domains of a run that has begun: each has journaled its configuration and a freeze."""
    ids = [identify(HASTY, root, domain_name(n), run=run, shard=n).id for n in range(size)]
    domains = tuple(Domain(name, "directory", n, "node0") for n, name in enumerate(ids))
    configuration = Configuration(run, size, domains, (("directory", 1),))
    for n in range(size):
        directory = claim(HASTY, root, domain_name(n))
        report = Report((), (), None, ())
        frozen = [
            Frozen(n, 1, g, "nonce", configuration.digest(), report)
            for g in range(1, generation + 1)
        ]
        for record in (Configured(configuration, True), *frozen):
            directory.journal.append(encode(record))
            directory.journal.sync()
        directory.close()
    return configuration


def tree(root: str) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()}


# --- what is laid down ---


@pytest.mark.parametrize("told", [True, False])
def test_hands_of_a_thousand_ranks_name_every_domain_once(told: bool) -> None:
    """Each rank knows all domains, and reads what all ranks say: that would be a thousand times a
    thousand names. Who could not know that rank 0 says them (as it peeked too early) says all."""
    names = [f"rank-{n:05d}-0123456789abcdef" for n in range(1000)]
    domains = tuple(Domain(name, "directory", n, "node") for n, name in enumerate(names))
    known = Configuration("run", 1000, domains, (("directory", 1),))
    opened = [Opened(name, 1, 4, known, "node", ("::1", 7)) for name in names]
    digest = known.digest() if told else ""
    laid = [lay(Hand(one), digest if rank else "") for rank, one in enumerate(opened)]
    assert [hand.opened for hand in read(laid)] == opened
    assert (sum(map(len, laid)) < 500_000) == told


# --- a look -----------------------------------------------------------------------------------


def test_a_look_at_nothing_creates_nothing(root: str) -> None:
    found = peek(HASTY, root, "node0", 0)
    assert (found.domain, found.run, found.known, found.problem) == ("", "", "", "")
    assert not os.path.exists(root)


def test_a_look_finds_who_is_there_and_how_far_it_was(root: str) -> None:
    made = identify(HASTY, root, domain_name(0), run="run-1", shard=0)
    found = peek(HASTY, root, "node0", 0)
    assert (found.domain, found.run, found.shard, found.known) == (made.id, "run-1", 0, "")
    configuration = founded(root)
    before = tree(root)
    found = peek(HASTY, root, "node0", 0)
    assert (found.domain, found.known, found.generation) == (made.id, configuration.digest(), 4)
    assert found.problem == ""
    assert tree(root) == before


def test_a_look_beside_leaves_alone_what_can_t_be_a_domain(root: str) -> None:
    """Shows that a copy by hand, where the rank's own domain is not, ends no look."""
    founded(root)
    shutil.copytree(f"{root}/domains/{domain_name(0)}", f"{root}/domains/rank-00000 copy")
    found = peek(HASTY, root, "node1", 1)
    assert (found.problem, found.domain, len(found.others)) == ("", "", 1)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def later_format(path: Path) -> None:
    """The identity of a handfast that does not exist yet, with a right digest."""
    whole = msgspec.json.decode(path.read_bytes(), type=IdentityFile)
    raw = bytes(whole.identity).replace(b'"format":1', b'"format":2')
    check = xxhash.xxh3_128_hexdigest(raw)
    path.write_bytes(msgspec.json.encode(IdentityFile(check, msgspec.Raw(raw))))


@pytest.mark.parametrize(
    ("where", "harm", "said"),
    [
        ("domain.json", cut, "not the identity of a domain"),
        ("domain.json", flip, "domain.json"),
        ("domain.json", later_format, "a domain of format 2; this handfast reads format 1"),
        ("1/journal", flip, "journal"),
        ("1/journal", Path.unlink, ""),
    ],
)
def test_what_can_t_be_read_is_said_and_not_raised(
    root: str, where: str, harm: Callable[[Path], object], said: str
) -> None:
    """Shows that a damaged or later directory is named in what all ranks see, so that no rank
    fails alone while the others wait for it."""
    founded(root)
    harm(Path(domain_path(root, domain_name(0))) / where)
    found = peek(HASTY, root, "node0", 0)
    if harm is Path.unlink:  # an incarnation without journal never acted
        assert (found.known, found.problem) == ("", "")
        return
    assert said in found.problem
    assert root in found.problem
    assert "What to do" in found.problem


def test_a_record_of_a_later_handfast_is_named_with_its_place(root: str) -> None:
    founded(root)
    directory = claim(HASTY, root, domain_name(0))
    directory.journal.append(msgspec.msgpack.encode(["enlightened", 7]))
    directory.journal.sync()
    directory.close()
    before = tree(root)
    found = peek(HASTY, root, "node0", 0)
    assert root in found.problem
    assert "enlightened" in found.problem
    assert tree(root) == before


@pytest.mark.parametrize(
    "error",
    [
        errno.EACCES,
        errno.EIO,
    ],
)
def test_every_call_of_a_look_may_fail(root: str, error: int) -> None:
    """Shows that a look never raises, at whichever call the disk fails."""
    founded(root)
    for k in itertools.count(1):
        files = FaultyFiles(HASTY, fail_at=k, error=error)
        found = peek(files, root, "node0", 0)
        if not files.fired:
            break
        assert found.problem or found.domain
        assert not found.problem or os.strerror(error) in found.problem
    assert k > 5


# --- meetings ---------------------------------------------------------------------------------


def at_once(peeks: list[Peek]) -> list[Meeting | HandfastError]:
    """What each rank gets from the meeting."""
    among = Gathering(len(peeks))

    def go(rank: int) -> Meeting | HandfastError:
        try:
            return meet(among.place(rank), peeks[rank])
        except HandfastError as error:
            return error

    with ThreadPoolExecutor(len(peeks)) as pool:
        return list(pool.map(go, range(len(peeks))))


def refusal(peeks: list[Peek]) -> Refused:
    """What all ranks are told: the same."""
    said = at_once(peeks)
    (text,) = {str(error) for error in said}
    first = said[0]
    assert isinstance(first, Refused), text
    assert all(isinstance(e, Refused) and e.verdict is first.verdict for e in said)
    return first


def test_all_ranks_take_rank_0_s_offer_on_a_first_start() -> None:
    met = at_once([Peek("node0", "r")] * 3)
    assert all(isinstance(each, Meeting) for each in met)
    assert len({(m.nonce, m.run, m.secret) for m in met if isinstance(m, Meeting)}) == 1
    again = at_once([Peek("node0", "r")] * 3)
    assert met[0] != again[0]  # each start has a nonce and a secret of its own


def test_a_known_run_keeps_its_name(root: str) -> None:
    founded(root, 2)
    met = at_once([peek(HASTY, root, "node0", n) for n in range(2)])
    assert {m.run for m in met if isinstance(m, Meeting)} == {"run-1"}


def test_one_rank_s_damage_is_every_rank_s_refusal(root: str) -> None:
    founded(root, 2)
    flip(Path(domain_path(root, domain_name(1))) / "1" / "journal")
    said = refusal([peek(HASTY, root, "node0", n) for n in range(2)])
    assert said.verdict is Verdict.CORRUPT
    assert len(said.shards) == 1
    assert said.shards[0].startswith("rank 1: ")
    assert "handfast verify" in said.remedy


def test_directories_of_two_runs_are_refused(root: str) -> None:
    founded(root, 2)
    founded(root + "b", 2, run="run-2")
    said = refusal([peek(HASTY, root, "node0", 0), peek(HASTY, root + "b", "node1", 1)])
    assert said.verdict is Verdict.FOREIGN
    assert said.shards == (f"rank 0: run run-1 in {root}", f"rank 1: run run-2 in {root}b")


def test_who_founds_a_run_too_late_is_told_so_and_may_start_again(root: str) -> None:
    """Shows what two first launches at one moment hear: both have looked before either founds."""
    met = at_once([peek(HASTY, root, "node0", 0)]) + at_once([peek(HASTY, root, "node0", 0)])
    first, late = (m.run for m in met if isinstance(m, Meeting))
    identify(HASTY, root, domain_name(0), run=first, shard=0)
    with pytest.raises(Refused, match="another launch has founded that run here since") as caught:
        identify(HASTY, root, domain_name(0), run=late, shard=0)
    assert "start this one again" in caught.value.remedy
    (again,) = at_once([peek(HASTY, root, "node0", 0)])
    assert isinstance(again, Meeting)
    assert again.run == first
    identify(HASTY, root, domain_name(0), run=again.run, shard=0)


def test_two_launches_that_each_founded_half_a_run_leave_nothing_of_worth(root: str) -> None:
    """Shows that what is left of them is refused, and that what the refusal says can be done."""
    for rank, run in enumerate(("run-1", "run-2")):
        identify(HASTY, root, domain_name(rank), run=run, shard=rank)
    said = refusal([peek(HASTY, root, "node0", n) for n in range(2)])
    assert said.verdict is Verdict.FOREIGN
    assert "nothing was saved in them" in said.remedy
    assert "remove their domains/" in said.remedy
    certified(root, "rank-00000-0123456789abcdef")
    assert "domains/" not in refusal([peek(HASTY, root, "node0", n) for n in range(2)]).remedy
    shutil.rmtree(f"{root}/certificates")
    shutil.rmtree(f"{root}/domains")
    met = at_once([peek(HASTY, root, "node0", n) for n in range(2)])
    assert all(isinstance(each, Meeting) for each in met)


def test_an_empty_directory_in_a_known_run_is_missing_and_not_a_first_start(root: str) -> None:
    """Shows that a lost disk is never filled in silence."""
    founded(root, 2)
    said = refusal([peek(HASTY, root, "node0", 0), peek(HASTY, root + "-empty", "node1", 1)])
    assert said.verdict is Verdict.MISSING
    assert said.shards == (f"rank 1: {root}-empty on node1",)
    assert "bring the missing directory back" in said.remedy
    assert not os.path.exists(root + "-empty")


def test_another_world_size_is_refused_with_both_numbers(root: str) -> None:
    founded(root, 2)
    peeks = [peek(HASTY, root, "node0", n) for n in range(3)]
    said = refusal(peeks)
    assert said.verdict is Verdict.FOREIGN
    assert "was saved by 2 ranks, and this job has 3" in str(said)
    assert "handfast export" in said.remedy
    assert "2 ranks, and this job has 1" in str(refusal(peeks[:1]))


def test_a_start_that_was_cut_short_may_begin_again(root: str) -> None:
    """Shows that directories which are identified, and took part in nothing, are no lost run."""
    identify(HASTY, root, domain_name(0), run="run-1", shard=0)
    met = at_once([peek(HASTY, root, "node0", n) for n in range(2)])
    assert {m.run for m in met if isinstance(m, Meeting)} == {"run-1"}


def certified(root: str, *names: str) -> None:
    """What a run shows to people, and what outlives domains that are removed."""
    home = Path(root) / "certificates"
    home.mkdir(parents=True, exist_ok=True)
    for name in names:
        (home / f"{name}.json").write_text("{}")
    (home / "rank-00007.json.1.tmp").touch()  # a publication that was cut short


@pytest.mark.parametrize("disks", ["one", "each its own"])
def test_a_run_of_which_only_certificates_are_left_is_no_first_start(root: str, disks: str) -> None:
    """`rm -r RUN/domains/*`: nobody is restarted from scratch in silence."""
    roots = [root, root if disks == "one" else root + "-1"]
    certified(roots[1], "rank-00001")
    said = refusal([peek(HASTY, home, f"node{n}", n) for n, home in enumerate(roots)])
    assert said.verdict is Verdict.MISSING
    assert "had converged here (certificates of rank-00001), and no domain is left" in str(said)
    assert said.shards == tuple(f"rank {n}: {home} on node{n}" for n, home in enumerate(roots))
    assert "remove certificates/" in said.remedy


def test_a_run_whose_journals_are_all_gone_is_no_first_start(root: str) -> None:
    """Shows that identities alone, with certificates beside them, are a lost run."""
    founded(root, 2)
    certified(root, "rank-00000", "rank-00001")
    assert all(peek(HASTY, root, "node0", n).certified == () for n in range(2))
    for n in range(2):
        shutil.rmtree(Path(domain_path(root, domain_name(n))) / "1")
    said = refusal([peek(HASTY, root, "node0", n) for n in range(2)])
    assert said.verdict is Verdict.MISSING
    assert "certificates of rank-00000, rank-00001), and no journal" in str(said)


def settled(
    meeting: Meeting, domains: list[tuple[str, Configuration | None]]
) -> Formation | Refused:
    """What every rank decides: the same."""
    among = Gathering(len(domains))
    decided: list[Formation | Refused] = []
    for rank in range(len(domains)):
        try:
            decided.append(settle(among.place(rank), meeting, domains))
        except Refused as error:
            decided.append(error)
    assert len({str(each) for each in decided}) == 1
    return decided[0]


def meeting_of(size: int, run: str = "run-1") -> Meeting:
    return Meeting(tuple(Peek(f"node{n}", "r") for n in range(size)), "nonce", run, bytes(32))


def test_the_first_configuration_is_founded_and_then_kept(root: str) -> None:
    fresh = settled(meeting_of(2), [("a", None), ("b", None)])
    assert isinstance(fresh, Formation)
    assert fresh.founding
    assert [(d.id, d.shard, d.host) for d in fresh.configuration.domains] == [
        ("a", 0, "node0"),
        ("b", 1, "node1"),
    ]
    known = fresh.configuration
    assert settled(meeting_of(2), [("a", known), ("b", known)]) == fresh
    assert settled(meeting_of(2), [("a", known), ("b", None)]) == fresh  # b died before it froze


@pytest.mark.parametrize(
    ("domains", "verdict", "said"),
    [
        (["b", "a"], Verdict.MIXED, "directories have changed ranks"),
        (["a", "stranger"], Verdict.MISSING, "not all of its domains are here"),
    ],
)
def test_domains_that_do_not_fit_their_configuration_are_refused(
    domains: list[str], verdict: Verdict, said: str
) -> None:
    fresh = settled(meeting_of(2), [("a", None), ("b", None)])
    assert isinstance(fresh, Formation)
    found = settled(
        meeting_of(2),
        [(name, fresh.configuration if name in "ab" else None) for name in domains],
    )
    assert isinstance(found, Refused)
    assert found.verdict is verdict
    assert said in str(found)
    assert found.remedy


def test_domains_of_two_configurations_are_foreign() -> None:
    one = settled(meeting_of(2), [("a", None), ("b", None)])
    two = settled(meeting_of(2, "run-2"), [("c", None), ("b", None)])
    assert isinstance(one, Formation)
    assert isinstance(two, Formation)
    found = settled(meeting_of(2), [("a", one.configuration), ("b", two.configuration)])
    assert isinstance(found, Refused)
    assert found.verdict is Verdict.FOREIGN
    assert "several runs" in str(found)


# --- generations ------------------------------------------------------------------------------

ALLOCATE = """
import sys
from handfast.checkpoint.rounds import allocate_in
from handfast.store.files import Posix
print("ready", flush=True)
sys.stdin.readline()
for n in range(5):
    print(allocate_in(Posix(), sys.argv[1], sys.argv[2] + str(n), 0), flush=True)
"""


def test_eight_processes_that_start_at_once_get_generations_of_their_own(root: str) -> None:
    """Shows that the record is changed under its lock: 40 rounds, 40 numbers, none used twice, and
    rising for each process."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ALLOCATE, root, f"round-{n}-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(8)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    found = []
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in started:
        said, _ = process.communicate(timeout=60)
        found.append([int(line) for line in said.split()])
    assert all(row == sorted(row) and len(row) == 5 for row in found)
    assert sorted(itertools.chain(*found)) == list(range(1, 41))


def test_a_round_that_asks_again_gets_the_same_number(root: str) -> None:
    assert allocate_in(HASTY, root, "a", 0) == 1
    assert allocate_in(HASTY, root, "a", 7) == 1
    assert allocate_in(HASTY, root, "b", 7) == 8  # above what any member reports
    with pytest.raises(Superseded, match=r"a later launch is recorded in .*round\.json"):
        allocate_in(HASTY, root, "a", 0)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'["a"]',
        b'["a", "b"]',
        b"\xff",
        b'["a", 1, ["\xff"]]',
    ],
)
def test_a_damaged_record_names_its_file_and_the_way_out(root: str, data: bytes) -> None:
    allocate_in(HASTY, root, "a", 0)
    path = Path(root) / "round.json"
    path.write_bytes(data)
    with pytest.raises(Damaged) as caught:
        allocate_in(HASTY, root, "b", 3)
    assert str(path) in str(caught.value)
    assert "remove the file" in str(caught.value)
    assert path.read_bytes() == data
    path.unlink()  # as it says: the members' own journals keep numbers from being used twice
    assert allocate_in(HASTY, root, "b", 3) == 4


@pytest.mark.parametrize("fault", ["crash", "short", errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("after", [False, True])
def test_a_record_that_could_not_be_written_whole_allocates_nothing(
    root: str, fault: Fault, after: bool
) -> None:
    """Shows, call by call, that a full or failing disk or a kill in the middle leaves the old
    record or the whole new one, and blocks nobody. A write that falls short is carried on."""
    kinds = ("create", "pwrite", "fsync", "rename", "unlink", "fsync_dir", "close")
    assert allocate_in(HASTY, root, "first", 0) == 1
    allocated = 1
    for at in itertools.count(1):
        files = FaultyFiles(HASTY, at, fault, kinds=() if fault == "short" else kinds, after=after)
        before = allocated
        try:
            allocate_in(files, root, f"round {at}", 0)
        except (Crash, HandfastError):
            assert files.fired
        record = msgspec.json.decode((Path(root) / "round.json").read_bytes(), type=RoundRecord)
        assert record.generation in (before, before + 1)
        allocated = record.generation
        assert fault != "short" or allocated == before + 1
        if not files.fired:
            break
    assert at > (1 if fault == "short" else 5)
    assert allocate_in(HASTY, root, "last", 0) == allocated + 1


def test_who_waits_for_the_lock_gets_it_when_its_holder_dies(root: str) -> None:
    allocate_in(HASTY, root, "a", 0)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, f"{root}/round.lock"], stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    found: list[int] = []
    waiting = threading.Thread(target=lambda: found.append(allocate_in(HASTY, root, "b", 0)))
    waiting.start()
    waiting.join(0.1)
    assert not found
    holder.kill()
    holder.wait()
    holder.stdout.close()
    waiting.join(30)
    assert found == [2]


def test_a_lock_that_nobody_gives_back_is_named(
    root: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A launch that is frozen while it holds it, or a file server that has forgotten whose it is:
    restore() said nothing, for ever."""
    allocate_in(HASTY, root, "a", 0)
    lock = os.open(f"{root}/round.lock", os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(reminder, "REMIND_S", 0.0)
        with pytest.raises(Blocked, match=r"another process has locked .*round\.lock") as caught:
            allocate_in(HASTY, root, "b", 0, patience_s=0.2)
    finally:
        os.close(lock)
    assert caught.value.by == (f"{root}/round.lock",)
    assert "restore has waited" in caplog.text
    assert allocate_in(HASTY, root, "b", 0, patience_s=0.2) == 2


HOLD = """
import fcntl, os, sys, time
fcntl.flock(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def test_a_directory_that_can_t_be_made_is_no_file_that_somebody_took_away() -> None:
    """Not below /proc, and not below a file."""
    for root in ("/proc/runs/gpt", f"{__file__}/run"):
        with pytest.raises(SaveFailed, match=r"the run's directory can't be made: .* look at the"):
            allocate_in(HASTY, root, "a", 0)


def test_a_record_that_can_t_be_locked_is_an_error_that_names_it(root: str) -> None:
    (Path(root) / "round.lock").mkdir(parents=True)
    with pytest.raises(Damaged, match=r"round\.lock"):
        allocate_in(HASTY, root, "a", 0)
