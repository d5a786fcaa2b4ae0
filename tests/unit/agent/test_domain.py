"""Shows that a domain at work keeps its order: persist, look, send, apply, and only then show.

Real stores and journals; what is between domains is a function call that may lose messages. A
witness holds everything that leaves a domain against the records that are durable at that moment.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from agentkit import HASTY, begin, looped, until
from meshkit import Mesh

from handfast.agent import domain, hearsay
from handfast.agent.examiner import Examined
from handfast.agent.hearsay import MIXTURE
from handfast.agent.keeper import Keeper
from handfast.agent.snapshot import FORGONE, Snapshot
from handfast.checkpoint import fate
from handfast.core import events
from handfast.core.lattice import GENESIS, Epoch
from handfast.core.messages import Bad, Converged, Frozen, Released, Restored, Skipped, Staged
from handfast.core.retain import Keep
from handfast.store.claims import domain_path
from handfast.store.manifest import Source
from handfast.testing.faults import FaultyFiles, Hasty

ONE, TWO, THREE = Epoch(1, 1), Epoch(1, 2), Epoch(1, 3)


@pytest.fixture
def root(tmp_path: Path) -> str:
    """The directory of a run."""
    return str(tmp_path / "run")


async def opened(root: str, size: int, **options: Any) -> Mesh:
    """A run whose first generation has begun."""
    mesh = Mesh(root, size, **options)
    for n in range(size):
        await mesh.open(n)
    assert await mesh.restore(1) == GENESIS
    return mesh


# --- the order --------------------------------------------------------------------------------


@looped
async def test_nothing_leaves_a_domain_before_it_is_durable(root: str) -> None:
    """Shows that no message, certificate, release, answer or snapshot is ahead of the journal, for
    two generations with saves, a failure and releases, and with syncs that take their time."""
    mesh = await opened(root, 3, slow=0.008)
    for step in range(1, 7):
        await mesh.save(Epoch(1, step))
        await mesh.converged(Epoch(1, step))
    for n in (0, 1):
        mesh.hosts[n].post(events.Forgone(Epoch(1, 7), "no time"))
    await mesh.save(Epoch(1, 7), 2)
    await until(lambda: len(mesh.shown[0].skipped) == 2)
    assert await mesh.restore(2) == Epoch(1, 6)
    await mesh.save(Epoch(2, 7))
    await mesh.converged(Epoch(2, 7))
    said = mesh.journaled(0)
    assert sum(isinstance(record, Released) for record in said) >= 5
    assert sum(isinstance(record, Restored) for record in said) == 2
    assert mesh.witness.seen > 1000
    await mesh.close()


@looped
async def test_a_snapshot_shows_nothing_of_a_sync_that_is_under_way(root: str) -> None:
    """Shows that a rank can't load on a certificate that its agent has not journaled, however
    often it looks."""
    mesh = await opened(root, 2)
    held, reached = threading.Event(), threading.Event()

    class Held(Hasty):
        def fdatasync(self, fd: int) -> None:
            reached.set()
            assert held.wait(20)
            mesh.witness.fdatasync(fd)

    mesh.hosts[0].keeper.directory.journal._files = Held()
    try:
        await mesh.save(ONE, 0)
        await until(reached.is_set)
        now = mesh.hosts[0].snapshot()
        assert (now.retained, now.outcomes, now.persisting) == ((GENESIS,), (), (ONE,))
        assert mesh.hosts[0].busy
    finally:
        held.set()
    await until(lambda: mesh.shown[0].outcomes)
    assert mesh.shown[0].retained == (GENESIS, ONE)
    await mesh.close()


# --- journals that fail -----------------------------------------------------------------------


async def life(mesh: Mesh) -> None:
    """A restore and two saves, as far as they go."""
    await mesh.begin(1)
    for n in mesh.hosts:
        await until(lambda n=n: mesh.shown.get(n) and (failed(mesh) or mesh.shown[n].proposal))
        mesh.hosts[n].post(events.Accept(1, GENESIS, n))
    await until(lambda: failed(mesh) or all(now.resumed for now in mesh.shown.values()))
    for step in (1, 2):
        if failed(mesh):
            return
        taken = await mesh.save(Epoch(1, step))  # answered, whatever becomes of it
        assert taken == [None, None] or failed(mesh)
        await until(lambda step=step: failed(mesh) or mesh_line(mesh) == Epoch(1, step))
    await until(lambda: failed(mesh) or mesh.hosts[0].settled)


def failed(mesh: Mesh) -> str:
    return mesh.hosts[0].failure


def mesh_line(mesh: Mesh) -> Epoch | None:
    """What both know to have converged."""
    lines = [now.line.epoch for now in mesh.shown.values() if now.line]
    return min(lines) if len(lines) == len(mesh.hosts) else None


@pytest.mark.parametrize("kind", ["pwrite", "fdatasync"])
@pytest.mark.parametrize("after", [False, True], ids=["undone", "done"])
@looped
async def test_a_domain_whose_journal_fails_says_no_more(root: str, kind: str, after: bool) -> None:
    """Shows, for every single write and sync of a journal, that its failure stops the domain, that
    a waiting trainer is answered, that peers hear nothing more, and that the next claim goes on
    with nothing lost of what was said."""
    for k in itertools.count(1):
        home = f"{root}-{k}"
        mesh = Mesh(home, 2)
        files = FaultyFiles(
            mesh.witness, error=errno.EIO, kinds=(kind,), path="/journal", after=after
        )
        await mesh.open(0, files)
        await mesh.open(1)
        files.arm(k)
        await life(mesh)
        if not files.fired:
            assert k > 5
            await mesh.close()
            break
        spoken = len([1 for sender, _, _ in mesh.messages if sender == 0])
        assert "journal" in failed(mesh)
        assert mesh.shown[0].failure == failed(mesh)
        refused = await mesh.hosts[0].stage(Epoch(1, 9), mesh.image(9), b"")
        assert refused is not None
        assert refused.reason == failed(mesh)
        mesh.hosts[0].post(events.Tick())
        mesh.hosts[1].post(events.Greet(0))
        await until(lambda host=mesh.hosts[0]: host.settled)
        assert len([1 for sender, _, _ in mesh.messages if sender == 0]) == spoken
        await mesh.hosts[0].close()
        again = await mesh.open(0)
        assert again.member.incarnation == 2
        await go_on(mesh)
        await mesh.close()


async def go_on(mesh: Mesh) -> None:
    """The same round again, with the successor, up to the epochs that were to be saved."""
    await mesh.begin(1)
    await asyncio.gather(*(mesh.accept(n, 1) for n in mesh.hosts))
    for step in (1, 2):
        if (mesh_line(mesh) or GENESIS) < Epoch(1, step):
            await mesh.save(Epoch(1, step))
            await mesh.converged(Epoch(1, step))


@looped
async def test_a_domain_that_was_taken_over_stops_without_a_word(root: str) -> None:
    """Shows that an agent that was taken for dead sends nothing of what it writes afterwards."""
    mesh = Mesh(root, 2)
    taken: list[Keeper] = []
    files = FaultyFiles(
        mesh.witness,
        error=lambda: taken.append(Keeper.claim(HASTY, root, "rank0")[0]),
        kinds=("fdatasync",),
        path="/journal",
    )
    mesh.files = files
    await mesh.open(0)
    await mesh.open(1)
    await mesh.restore(1)
    await until(lambda: all(host.settled for host in mesh.hosts.values()))
    mesh.messages.clear()
    files.arm(1)
    await mesh.save(ONE, 0)
    await until(lambda: mesh.hosts[0].failure)
    assert "a later agent has claimed" in mesh.shown[0].failure
    assert not [message for message in mesh.messages if message[0] == 0]
    assert ONE not in [copy.epoch for copy in mesh.hosts[0].member.retained]
    assert not mesh.shown[0].outcomes
    taken[0].directory.close()
    await mesh.close()


# --- images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("where", ["/chunks", "/manifests"])
@looped
async def test_a_disk_that_fails_costs_one_epoch_and_no_more(
    root: str, where: str, error: int
) -> None:
    """Shows, for every call that persisting makes, that its failure becomes a vote SKIP which
    tells every rank the cause, and that the next epoch converges."""
    mesh = Mesh(root, 2)
    files = FaultyFiles(mesh.witness, error=error, path=where)
    files.fail_at = -1
    mesh.files = files
    await mesh.open(0)
    await mesh.open(1)
    await mesh.restore(1)
    await until(lambda: mesh.hosts[0].settled)
    skips = 0
    for k in itertools.count(1):
        await until(lambda: mesh.hosts[0].settled)
        files.arm(k)
        files.fired = False
        epoch = Epoch(1, 2 * k)
        await mesh.save(epoch)
        await until(lambda epoch=epoch: mesh.shown[0].outcomes[-1:] and outcome(mesh) == epoch)
        files.arm(-1)
        if not mesh.shown[0].outcomes[-1].problem:  # a delta that failed was written in full
            await mesh.converged(epoch)
            if not files.fired:
                break
            continue
        skips += 1
        assert os.strerror(error) in mesh.shown[0].outcomes[-1].problem
        await until(lambda epoch=epoch: any(s.epoch == epoch for s in mesh.shown[1].skipped))
        (skip,) = [skip for skip in mesh.shown[1].skipped if skip.epoch == epoch]
        assert skip.domain == mesh.among.ids[0]
        assert os.strerror(error) in skip.reason
        await mesh.save(Epoch(1, 2 * k + 1))
        await mesh.converged(Epoch(1, 2 * k + 1))
    assert skips > 3
    assert not mesh.hosts[0].failure
    await mesh.close()


def outcome(mesh: Mesh) -> Epoch:
    return mesh.shown[0].outcomes[-1].epoch


@looped
async def test_an_image_that_is_not_its_plan_s_is_skipped(root: str) -> None:
    """Shows that a trainer's mistake costs its epoch and not the domain."""
    mesh = await opened(root, 1)
    wrong = mesh.image(1)
    os.pwrite(wrong.fd, b"\0" * 64, 0)
    assert await mesh.hosts[0].stage(ONE, wrong, b"") is None
    await until(lambda: mesh.shown[0].outcomes)
    assert "lacks the layout's header" in mesh.shown[0].outcomes[0].problem
    await mesh.save(TWO)
    await mesh.converged(TWO)
    await mesh.close()


@looped
async def test_handing_an_image_over_twice_saves_it_once(root: str) -> None:
    """Shows that a trainer which does not know whether its agent heard it may ask again: while the
    image is being persisted, from whichever memory, and afterwards."""
    mesh = await opened(root, 1)
    host, first = mesh.hosts[0], mesh.image(1)
    both = [host.stage(ONE, first, b""), host.stage(ONE, first, b""), mesh.save(ONE)]
    assert await asyncio.gather(*both) == [None, None, [None]]
    await mesh.converged(ONE)
    assert await host.stage(ONE, first, b"") is None
    assert first.busy is None
    assert sum(isinstance(record, Staged) for record in mesh.journaled(0)) == 1
    refused = await host.stage(Epoch(1, 0), first, b"")
    assert refused is not None
    assert "before it" in refused.reason
    await mesh.close()


@looped
async def test_what_has_failed_is_not_refused_to_whoever_asks_again(root: str) -> None:
    """Shows that a trainer which hands an image over once more, because its agent died or had not
    answered, hears what became of it, and not that it comes too late: of the agent that failed to
    persist it, and of its successor, which knows that from the journal; and that what was never
    handed over is refused."""
    mesh = await opened(root, 1)
    wrong = mesh.image(1)
    os.pwrite(wrong.fd, b"\0" * 64, 0)
    for _ in range(2):
        assert await mesh.hosts[0].stage(ONE, wrong, b"") is None
        await until(lambda: mesh.hosts[0].settled)
        assert fate.settled(mesh.hosts[0].snapshot(), ONE)
    mesh.hosts[0].post(events.Forgone(TWO, f"{FORGONE}: the window is full"))
    await until(lambda: mesh.hosts[0].settled)
    await mesh.hosts.pop(0).close()
    await mesh.open(0)
    await mesh.begin(1)
    host = mesh.hosts[0]
    await until(lambda: host.settled)
    assert not host.snapshot().outcomes
    assert await host.stage(ONE, wrong, b"") is None
    (told,) = fate.problems(host.snapshot(), ONE)
    assert "lacks the layout's header" in told
    assert fate.settled(host.snapshot(), ONE)
    refused = await host.stage(TWO, wrong, b"")
    assert refused is not None
    assert "step 2 was saved or restored before it" in refused.reason
    await mesh.close()


@looped
async def test_a_domain_closes_while_its_validators_hang(root: str) -> None:
    """Shows that whoever asks for a domain anew, because its directory was moved or its journal has
    failed, does not wait until the validators run out of patience, and that no vote is cast."""
    mesh = await opened(root, 1)
    host, image = mesh.hosts.pop(0), mesh.image(1)
    asleep = (sys.executable, "-c", "import time; time.sleep(3600)")
    image.plan = msgspec.structs.replace(
        image.plan, examined=Examined(asleep, (), ("finite",), patience_s=3600.0)
    )
    await host.stage(ONE, image, b"")
    examiner = host._persisting._examiner
    await until(lambda: examiner._sock is not None)
    async with asyncio.timeout(60):
        await host.close()
    assert image.busy is None
    assert not any(isinstance(record, Staged | Skipped) for record in mesh.journaled(0))
    await mesh.close()


@looped
async def test_an_image_is_not_free_before_its_vote_is_durable(root: str) -> None:
    """Shows that a trainer can't overwrite what is being persisted, and so mix two epochs."""
    mesh = await opened(root, 1)
    host, one = mesh.hosts[0], mesh.image(1)
    await host.stage(ONE, one, b"")
    refused = await host.stage(TWO, one, b"")
    assert refused is not None
    assert "still being persisted for 1/1" in refused.reason
    await mesh.converged(ONE)
    assert await host.stage(THREE, one, b"") is None
    await mesh.close()


async def save_of(mesh: Mesh, epoch: Epoch, *steps: int) -> None:
    """Save at each domain what was loaded from these steps of another run."""
    for n, step in enumerate(steps):
        held = mesh.image(n)
        came = (Source("model", "base", "main", 1, step),)
        held.plan = msgspec.structs.replace(held.plan, came=came)
        await mesh.hosts[n].stage(epoch, held, b"")


@looped
async def test_what_ranks_have_from_different_epochs_converges_in_no_epoch(root: str) -> None:
    """The first shard's domain hears all before it votes where anything was loaded, and skips; the
    bytes are taken away. Once all are of one epoch it goes on, and asks no more."""
    mesh = await opened(root, 3)
    for epoch in (ONE, TWO):
        await save_of(mesh, epoch, 4, 4, 2)
        await until(lambda: mesh.shown[0].outcomes[-1:] and not mesh.hosts[0].busy, "the vote")
        problem = mesh.shown[0].outcomes[-1].problem
        assert problem.startswith(
            f"{MIXTURE}: model: 1/4 of run base on rank 0, 1 against 1/2 of run base on rank 2"
        )
    await until(lambda: len(mesh.shown[1].skipped) == 2, "the others hear of it")
    assert mesh.shown[0].retained == (GENESIS,)
    await save_of(mesh, THREE, 4, 4, 4)
    await mesh.converged(THREE)
    assert mesh.shown[0].apart is None
    mesh.deaf = True
    await save_of(mesh, Epoch(1, 4), 4, 4, 4)
    await mesh.converged(Epoch(1, 4))
    await mesh.close()


@looped
async def test_one_that_loads_later_by_itself_is_heard_of_once_it_is_saved(root: str) -> None:
    """The first shard's domain does not wait where its own rank has loaded nothing since."""
    mesh = await opened(root, 2)
    await save_of(mesh, ONE, 4, 4)
    await mesh.converged(ONE)
    await save_of(mesh, TWO, 4, 2)
    await mesh.converged(TWO)
    await until(lambda: mesh.shown[0].apart is not None, "the words")
    await mesh.close()


@looped
async def test_a_word_that_is_lost_costs_the_first_vote_a_moment(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no epoch, here or where a rank skips: it waits no longer than others may still vote."""
    monkeypatch.setattr(hearsay, "PATIENCE_S", 1e9)
    mesh = await opened(root, 2)
    mesh.deaf = True
    await save_of(mesh, ONE, 4, 4)
    await mesh.converged(ONE)
    await save_of(mesh, TWO, 2)
    mesh.hosts[1].post(events.Forgone(TWO, FORGONE))
    await until(lambda: not mesh.hosts[0].busy, "the vote")
    assert mesh.shown[0].outcomes[-1].problem == ""
    monkeypatch.setattr(hearsay, "PATIENCE_S", 0.0)
    await save_of(mesh, THREE, 3)  # and for no rank for ever that is silent
    await until(lambda: not mesh.hosts[0].busy, "the vote")
    await mesh.close()


@looped
@pytest.mark.parametrize("end", ["begin", "close"])
async def test_who_waits_for_words_is_in_nobody_s_way(
    root: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank died before it said one: the next generation waits for none, nor who ends."""
    monkeypatch.setattr(hearsay, "PATIENCE_S", 1e9)
    mesh = await opened(root, 2)
    await save_of(mesh, ONE, 4)
    await until(lambda: bool(mesh.hosts[0].busy), "the waiting")
    await asyncio.sleep(0.2)
    assert mesh.hosts[0].busy
    async with asyncio.timeout(60):
        if end == "begin":
            await mesh.begin(2, 0, drain_s=1e9)
            assert ONE in [copy.epoch for copy in mesh.hosts[0].member.retained]
        else:
            await mesh.hosts.pop(0).close()
    await mesh.close()


@looped
async def test_a_trainer_that_goes_away_while_it_asks_stops_nothing(root: str) -> None:
    """Shows that an image that was handed over is persisted, and a read is finished, though nobody
    waits for either."""
    mesh = await opened(root, 1)
    asking = asyncio.create_task(mesh.hosts[0].stage(ONE, mesh.image(1), b""))
    await asyncio.sleep(0)
    asking.cancel()
    await mesh.converged(ONE)
    reading = asyncio.create_task(mesh.hosts[0].judge(ONE))
    await asyncio.sleep(0)
    reading.cancel()
    assert mesh.hosts[0].busy
    await until(lambda: not mesh.hosts[0].busy)
    shutil.rmtree(f"{domain_path(root, 'rank0')}/1/chunks")
    assert (await mesh.hosts[0].judge(ONE)).stamp.epoch == ONE  # the read that nobody waited for
    await mesh.close()


# --- recovery ---------------------------------------------------------------------------------


def damage(root: str, n: int, epoch: Epoch) -> None:
    """Flip one bit in a copy's data."""
    name = f"{epoch.generation}-{epoch.step}.safetensors"
    (path,) = Path(domain_path(root, f"rank{n}")).glob(f"*/chunks/{name}")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@looped
async def test_a_damaged_copy_is_judged_bad_and_the_job_takes_the_epoch_before(root: str) -> None:
    """Shows that a flipped bit is found before anything is loaded, with its reason in the record,
    and that no copy takes memory of the node's."""
    mesh = Mesh(root, 2)
    for n in range(2):
        await mesh.open(n)
    await mesh.restore(1, keep=Keep(newest=9))
    for epoch in (ONE, TWO):
        await mesh.save(epoch)
        await mesh.converged(epoch)
    damage(root, 1, TWO)
    before = memories()
    await mesh.begin(2)
    await until(lambda: all(now.proposal for now in mesh.shown.values()))
    assert {now.proposal.epoch for now in mesh.shown.values() if now.proposal} == {ONE}
    assert memories() == before
    (bad,) = [record for record in mesh.journaled(1) if isinstance(record, Bad)]
    assert bad.epoch == TWO
    assert "differs from its hash" in bad.reason
    await asyncio.gather(*(mesh.accept(n, 2) for n in mesh.hosts))
    assert mesh.shown[0].resumed is not None
    assert mesh.shown[0].resumed.base == ONE
    assert memories() == before
    await mesh.close()


def memories() -> int:
    """How many memfds this process holds."""
    held = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            held += os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:handfast")
        except FileNotFoundError:
            continue
    return held


@looped
async def test_where_every_copy_is_bad_each_rank_hears_why(root: str) -> None:
    mesh = await opened(root, 2)
    await mesh.save(ONE)
    await mesh.converged(ONE)
    damage(root, 0, ONE)
    await mesh.begin(2)
    await until(lambda: all(now.stuck for now in mesh.shown.values()))
    for now in mesh.shown.values():
        assert now.stuck is not None
        assert now.stuck.phase == "exhausted"
        assert any("differs from its hash" in reason for reason in now.stuck.reasons)
        assert now.resumed is None
    await mesh.close()


@looped
async def test_a_node_without_memory_refutes_no_epoch(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the newest epoch is not given up for an older one because it can't be read now."""
    mesh = await opened(root, 1)
    await mesh.save(ONE)
    await mesh.converged(ONE)

    def none(*_: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("handfast.store.bulk.mmap.mmap", none)
    await mesh.begin(2)
    await until(lambda: mesh.shown[0].failure)
    assert "free memory on this node" in mesh.shown[0].failure
    assert not [record for record in mesh.journaled(0) if isinstance(record, Bad)]
    monkeypatch.undo()
    await mesh.hosts[0].close()
    await mesh.open(0)
    assert await mesh.restore(2) == ONE
    await mesh.close()


@looped
async def test_each_generation_judges_by_reading(root: str) -> None:
    """Shows that what one restore had found sound is not believed by the next."""
    mesh = await opened(root, 1)
    await mesh.save(ONE)
    await mesh.converged(ONE)
    await mesh.begin(2)
    await until(lambda: mesh.shown[0].proposal)
    damage(root, 0, ONE)
    await mesh.begin(3)
    await until(lambda: mesh.shown[0].stuck)
    await mesh.close()


@pytest.mark.parametrize("kind", ["rename", "unlink", "listdir"])
@looped
async def test_what_can_t_be_swept_costs_space_only(root: str, kind: str) -> None:
    """Shows that a disk which can't take files away does not stop the saves, and that they are
    taken away once it can."""
    mesh = Mesh(root, 1)
    await mesh.open(0)
    await mesh.restore(1)
    for epoch in (ONE, TWO):
        await mesh.save(epoch)
        await mesh.converged(epoch)
    await until(lambda: mesh.hosts[0].settled)
    files = FaultyFiles(mesh.witness, error=errno.EIO, kinds=(kind,), path="manifests")
    files.fail_at = 1
    mesh.hosts[0].keeper.directory.files = files
    if kind == "unlink":
        files.path = "chunks"
    await mesh.save(THREE)
    if kind != "rename":
        await until(lambda: files.fired)
    await until(lambda: mesh.shown[0].outcomes[-1].epoch == THREE)
    await until(lambda: not mesh.hosts[0].busy)
    files.arm(-1)
    await mesh.save(Epoch(1, 4))
    await mesh.converged(Epoch(1, 4))
    assert await mesh.restore(2) == Epoch(1, 4)
    await until(lambda: mesh.hosts[0].settled)
    names = {p.name for p in Path(root).rglob("*.safetensors*")}
    assert names == {"1-4.safetensors"}
    await mesh.close()


# --- time -------------------------------------------------------------------------------------


@looped
async def test_a_lossy_network_delays_and_changes_nothing(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that four domains converge though half of all messages are lost, and then fall silent:
    once all know, no timer sends again."""
    monkeypatch.setattr(domain, "TICK_MOST_S", 0.05)
    mesh = Mesh(root, 4)
    chance = random.Random(4)
    mesh.lose = lambda *_: chance.random() < 0.5
    for n in range(4):
        await mesh.open(n)
    assert await mesh.restore(1) == GENESIS
    for step in (1, 2, 3):
        await mesh.save(Epoch(1, step))
        await mesh.converged(Epoch(1, step))
    await until(lambda: all(host.settled for host in mesh.hosts.values()))
    count = len(mesh.messages)
    for host in mesh.hosts.values():
        host.post(events.Tick())
    await until(lambda: all(host.settled for host in mesh.hosts.values()))
    assert len(mesh.messages) == count
    await mesh.close()


@looped
async def test_who_waits_for_a_dead_peer_asks_ever_more_rarely(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that ticks back off to a bound, and that news begins them anew."""
    mesh = Mesh(root, 2)
    loop, pauses = asyncio.get_running_loop(), []
    real = loop.call_later

    def call_later(delay: float, callback: Any, *args: Any, **more: Any) -> asyncio.TimerHandle:
        if getattr(callback, "__name__", "") == "_tock":
            pauses.append(delay)
            delay *= 0.02
        return real(delay, callback, *args, **more)

    monkeypatch.setattr(loop, "call_later", call_later)
    await mesh.open(0)
    await mesh.begin(1)
    await until(lambda: len(pauses) > 14)
    assert pauses == sorted(pauses) or max(pauses) > domain.TICK_MOST_S / 2
    early, late = pauses[:4], pauses[8:14]
    assert max(early) < min(late)
    assert all(domain.TICK_MOST_S / 2 <= pause <= domain.TICK_MOST_S for pause in late)
    to_dead = [m for m in mesh.messages if m[:2] == (0, 1)]
    assert len(to_dead) <= len(pauses) + 2
    await mesh.open(1)
    count = len(pauses)
    await mesh.restore(1)
    await until(lambda: all(host.settled for host in mesh.hosts.values()))
    assert min(pauses[count:]) < max(early)
    await mesh.close()


class Slow(Hasty):
    """Images are written only when they may be."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.writing = threading.Event()

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        if "/chunks/" in os.readlink(f"/proc/self/fd/{fd}"):
            self.writing.set()
            assert self.may.wait(30)
        return super().pwrite(fd, data, offset)


async def with_a_slow_disk(root: str) -> tuple[Mesh, Slow]:
    """A run of one domain that has one image under way."""
    files = Slow()
    mesh = await opened(root, 1)
    mesh.hosts[0].keeper.directory.files = files
    await mesh.save(ONE)
    await until(files.writing.is_set)
    return mesh, files


@looped
async def test_a_new_generation_waits_for_what_is_being_persisted(root: str) -> None:
    mesh, files = await with_a_slow_disk(root)
    beginning = asyncio.create_task(mesh.begin(2))
    await asyncio.sleep(0.02)
    assert not beginning.done()
    assert mesh.hosts[0].member.generation == 1
    files.may.set()
    await beginning
    await mesh.accept(0, 2)
    kinds = [type(record) for record in mesh.journaled(0)]
    assert kinds.index(Staged) < len(kinds) - 1 - kinds[::-1].index(Frozen)
    assert mesh.shown[0].resumed is not None
    assert mesh.shown[0].resumed.base == ONE
    await mesh.close()


@looped
async def test_what_is_not_persisted_in_time_is_abandoned_for_good(root: str) -> None:
    """Shows that after the freeze nothing of the old generation is journaled, though its write goes
    on and ends well; and that the trainer is not told that it was persisted."""
    mesh, files = await with_a_slow_disk(root)
    await mesh.begin(2, drain_s=0.02)
    await until(lambda: mesh.shown[0].generation == 2)
    files.may.set()
    await mesh.accept(0, 2)
    await until(lambda: mesh.hosts[0].settled and mesh.shown[0].outcomes)
    said = mesh.journaled(0)
    frozen = next(i for i, r in enumerate(said) if isinstance(r, Frozen) and r.generation == 2)
    assert not [r for r in said if isinstance(r, Staged | Skipped)]
    assert all(isinstance(record, Frozen | Restored) or i < frozen or "2" in str(record)
               for i, record in enumerate(said))  # fmt: skip
    (told,) = mesh.shown[0].outcomes
    assert "had ended before" in told.problem
    assert mesh.shown[0].resumed is not None
    assert mesh.shown[0].resumed.base == GENESIS
    mesh.witness.breaches.clear()  # of the outcome: it is a problem without a vote, rightly
    await mesh.save(Epoch(2, 1))
    await mesh.converged(Epoch(2, 1))
    mesh.witness.breaches.clear()
    await mesh.close()


# --- what trainers see ------------------------------------------------------------------------


@looped
async def test_snapshots_are_bounded_and_the_newest_tells_all(root: str) -> None:
    """Shows that a trainer which looks late sees where things stand, and that a run of any length
    has snapshots of a bounded size."""
    mesh = await opened(root, 1)
    told = 0

    def count(now: Snapshot) -> None:
        nonlocal told
        told += 1
        mesh.shown[0] = now

    mesh.hosts[0]._notify = count
    for step in range(1, 81):
        await mesh.save(Epoch(1, step))
        await mesh.converged(Epoch(1, step))
    now = mesh.shown[0]
    assert len(now.outcomes) == domain.OUTCOMES
    assert now.outcomes[-1].epoch == Epoch(1, 80)
    assert now.retained == (Epoch(1, 80),)
    assert now.line is not None
    assert now.line.epoch == Epoch(1, 80)
    assert told <= 80 * 6
    skips = domain.OUTCOMES + 10
    for step in range(81, 81 + skips):
        mesh.hosts[0].post(events.Forgone(Epoch(1, step), "no time"))
        await until(lambda step=step: mesh.shown[0].skipped[-1:] and skip(mesh) == Epoch(1, step))
    assert len(mesh.shown[0].skipped) == domain.OUTCOMES
    await mesh.close()


def skip(mesh: Mesh) -> Epoch:
    return mesh.shown[0].skipped[-1].epoch


@looped
async def test_an_older_round_is_told_that_it_was_overtaken(root: str) -> None:
    mesh = await opened(root, 1)
    assert await mesh.restore(3) == GENESIS
    mesh.hosts[0].post(begin(mesh.among, 2))
    await until(lambda: mesh.shown[0].overtaken == 3)
    assert mesh.hosts[0].member.generation == 3
    mesh.hosts[0].post(begin(mesh.among, 3, "another-round"))
    await until(lambda: not mesh.hosts[0].busy)
    assert mesh.hosts[0].member.round == "round-3"
    assert not [r for r in mesh.journaled(0) if isinstance(r, Converged)]
    await mesh.close()


@looped
async def test_a_message_that_is_refused_is_counted(root: str) -> None:
    mesh = await opened(root, 2)
    await until(lambda: all(host.settled for host in mesh.hosts.values()))
    _, _, message = mesh.messages[-1]
    before = mesh.hosts[0].snapshot()
    stale = [
        {"generation": 0},
        {"round": "another"},
        {"configuration": "0" * 32},
        {"incarnation": 0},
        {"sender": 7},
        {"sender": 0},
    ]
    for n, change in enumerate(stale, 1):
        sender = {"sender": 1, "incarnation": 1} | change
        mesh.hosts[0].post(events.Received(msgspec.structs.replace(message, **sender)))
        await until(lambda n=n: mesh.hosts[0].rejected == n, f"the refusal of {change}")
    assert mesh.hosts[0].snapshot() == before
    await mesh.close()
