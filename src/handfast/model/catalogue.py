"""Pipelines that people use, as their documentation or sources say, and three that are sound.

Each is a model of an *order of events*, not of a library: what is left out (formats, resharding,
retries) can't tear anything here. All ranks are on the steps of one synchronous training, so pieces
of one epoch fit together, and what is at stake is only which pieces are left. Two ranks and two
epochs unless said otherwise, three epochs where it takes one more to show the matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from handfast.model.pipeline import (
    NOTHING,
    STOP,
    TORN,
    Actor,
    Barrier,
    Claim,
    Mail,
    Pipeline,
    Place,
    Process,
    Restart,
    Steps,
    choice,
    process,
)

__all__ = ["CATALOGUE"]

RETURNS: Final = "returns from"
Row = tuple[Place, ...]


def _ranks(n: int) -> tuple[Actor, ...]:
    return tuple(Actor(f"rank {r}") for r in range(n))


def _row(names: str, n: int) -> Row:
    """A place for each rank's piece."""
    return tuple(Place(names.format(r=r), ranks=(r,)) for r in range(n))


def _each(names: str, epochs: int) -> dict[int, Place]:
    """A place for each epoch, which holds no piece."""
    return {e: Place(names.format(e=e)) for e in range(1, epochs + 1)}


def _table(names: str, n: int, epochs: int) -> dict[int, Row]:
    """A place for each epoch and rank's piece."""
    return {
        e: tuple(Place(names.format(r=r, e=e), ranks=(r,)) for r in range(n))
        for e in range(1, epochs + 1)
    }


def _all(table: dict[int, Row]) -> Row:
    return tuple(place for row in table.values() for place in row)


def _barrier(name: str, me: tuple[Actor, ...]) -> Barrier:
    return Barrier(name, tuple(actor.name for actor in me))


def _saves(n: int, epochs: int, save: Callable[[int, int], Steps]) -> dict[str, Process]:
    """Let each rank save epoch after epoch: ``save(rank, epoch)`` gives its steps."""

    @process
    def rank(r: int, e: int) -> Process:
        after: Process = save(r, e) >> rank(r, e + 1) if e <= epochs else STOP
        return after

    return {f"rank {r}": rank(r, 1) for r in range(n)}


def _pointed(back: Restart, pointer: Place, pieces: dict[int, Row]) -> Process:
    """Load what a pointer names; where there is none, start from scratch; refuse what is torn or
    lacks a piece."""

    def take(held: tuple[int, ...]) -> Process:
        return back.refuses() if NOTHING in held else back.loads(held)

    def go(found: int) -> Process:
        if found == TORN:
            return back.refuses()
        if found == NOTHING:
            return back.loads(NOTHING for _ in pieces[1])
        return back.reads_all(pieces[found], take)

    return back.reads(pointer, go)


def _marked(back: Restart, marks: dict[int, Place], pieces: dict[int, Row], e: int) -> Process:
    """Load the pieces of the greatest epoch, from ``e`` down, that bears a whole mark."""
    if e == 0:
        return back.loads(NOTHING for _ in pieces[1])
    lower = _marked(back, marks, pieces, e - 1)
    return back.reads(
        marks[e], lambda v: back.reads_all(pieces[e], back.loads) if v == e else lower
    )


def _common(back: Restart, pieces: dict[int, Row], e: int) -> Process:
    """Load the greatest epoch, from ``e`` down, of which every piece is there: recovery line."""
    if e == 0:
        return back.loads(NOTHING for _ in pieces[1])
    lower = _common(back, pieces, e - 1)
    return back.reads_all(
        pieces[e], lambda held: back.loads(held) if held == (e,) * len(held) else lower
    )


def dcp_overwriting(n: int = 2, epochs: int = 2) -> Pipeline:
    """torch.distributed.checkpoint into one directory, again and again."""
    me, back = _ranks(n), Restart(epochs)
    shard, metadata = _row("__{r}_0.distcp", n), Place(".metadata")
    written, done = _barrier("the gathering of results", me), _barrier("dcp.save", me)

    def save(r: int, e: int) -> Steps:
        steps = me[r].writes(shard[r], e) >> me[r].syncs(shard[r], e)
        return steps >> _finish(me[r], metadata, written, e) >> me[r].meets(done, e)

    def load(found: int) -> Process:
        there = found not in (TORN, NOTHING)
        return back.reads_all(shard, back.loads) if there else back.refuses()

    return Pipeline(
        name="dcp-overwriting",
        about="torch DCP, one directory overwritten",
        actors=_saves(n, epochs, save),
        servers=(*shard, metadata, written, done),
        restart=back.reads(metadata, load),
        claims=(
            Claim("when .metadata is renamed", "renames", metadata.name),
            Claim("when dcp.save returns", RETURNS, done.name),
        ),
        epochs=epochs,
        assumes="every save has the same names and offsets, so old metadata fit new shards",
        source="torch 2.13 (run) and 2.15 (read): filesystem.py opens final names for writing, "
        "syncs them, replaces .metadata last; overwrite=True is the default",
    )


def _finish(who: Actor, metadata: Place, written: Barrier, e: int) -> Steps:
    """DCP's end of a save: rank 0 waits for all results and replaces the metadata."""
    if who.name != "rank 0":
        return Steps((who.arrives(written, e),))
    return (
        who.meets(written, e)
        >> who.drafts(metadata, e)
        >> who.syncs_draft(metadata, e)
        >> who.deletes(metadata, e)
        >> who.renames(metadata, e)
    )


def dcp_new_directory(n: int = 2, epochs: int = 2) -> Pipeline:
    """torch.distributed.checkpoint into a new directory a step; the newest complete one wins."""
    me, back = _ranks(n), Restart(epochs)
    shard, metadata = _table("{e}/__{r}_0.distcp", n, epochs), _each("{e}/.metadata", epochs)
    written, done = _barrier("the gathering of results", me), _barrier("dcp.save", me)

    def save(r: int, e: int) -> Steps:
        steps = me[r].writes(shard[e][r], e) >> me[r].syncs(shard[e][r], e)
        return steps >> _finish(me[r], metadata[e], written, e) >> me[r].meets(done, e)

    return Pipeline(
        name="dcp-new-directory",
        about="torch DCP, a new directory a step",
        actors=_saves(n, epochs, save),
        servers=(*_all(shard), *metadata.values(), written, done),
        restart=_marked(back, metadata, shard, epochs),
        claims=(
            Claim("when .metadata is renamed", "renames"),
            Claim("when dcp.save returns", RETURNS, done.name),
        ),
        epochs=epochs,
        assumes="one timeline: after a rollback the newest directory may be of an abandoned one, "
        "which this model leaves out; the directory is never synced",
        source="as above; that the newest with .metadata wins is TorchTitan's rule",
    )


def pointer_before_barrier(n: int = 2, epochs: int = 2) -> Pipeline:
    """DeepSpeed's order: rank 0 writes `latest` when its own files are written, then a barrier."""
    me, back = _ranks(n), Restart(epochs)
    shard, latest = _table("{e}/rank{r}.pt", n, epochs), Place("latest")
    done = _barrier("the barrier", me)

    def save(r: int, e: int) -> Steps:
        steps = me[r].writes(shard[e][r], e)
        if r == 0:
            steps = steps >> me[r].writes(latest, e)
        return steps >> me[r].meets(done, e)

    return Pipeline(
        name="pointer-before-barrier",
        about="`latest` written before the barrier",
        actors=_saves(n, epochs, save),
        servers=(*_all(shard), latest, done),
        restart=_pointed(back, latest, shard),
        claims=(
            Claim("when `latest` is written", "writes", latest.name),
            Claim("when the barrier returns", RETURNS, done.name),
        ),
        epochs=epochs,
        assumes="torch.save syncs nothing; an empty `latest` can't be loaded from; a missing piece "
        "is refused (earlier releases warned and went on with fresh optimizer state, which is a "
        "mixture: gpt-neox#750)",
        source="DeepSpeed, runtime/engine.py, save_checkpoint (read): rank 0 opens `latest` for "
        "writing, then dist.barrier(); no sync",
    )


def pointer_after_barrier(n: int = 2, epochs: int = 2) -> Pipeline:
    """Megatron-LM's order, synchronous and in the torch format: barrier, tracker, barrier."""
    me, back = _ranks(n), Restart(epochs)
    shard, tracker = _table("iter_{e}/rank{r}.pt", n, epochs), Place("tracker")
    first, second = _barrier("the first barrier", me), _barrier("save_checkpoint", me)

    def save(r: int, e: int) -> Steps:
        steps = me[r].writes(shard[e][r], e) >> me[r].meets(first, e)
        if r == 0:
            steps = steps >> me[r].writes(tracker, e)
        return steps >> me[r].meets(second, e)

    return Pipeline(
        name="pointer-after-barrier",
        about="the tracker written after the barrier",
        actors=_saves(n, epochs, save),
        servers=(*_all(shard), tracker, first, second),
        restart=_pointed(back, tracker, shard),
        claims=(
            Claim("when the barrier returns", RETURNS, first.name),
            Claim("when the tracker is written", "writes", tracker.name),
            Claim("when save_checkpoint returns", RETURNS, second.name),
        ),
        epochs=epochs,
        assumes="torch.save syncs nothing; a torn tracker and a missing piece are refused",
        source="Megatron-LM, training/checkpointing.py, save_checkpoint (read): the tracker is "
        "opened for writing after a barrier, and not synced; asynchronous users have had it before "
        "the data, or of another step (verl#4638, Megatron-Bridge#3267)",
    )


def pointer_at_dispatch(n: int = 2, epochs: int = 2) -> Pipeline:
    """An asynchronous save whose `latest` moves when the save is handed over."""
    me, back = _ranks(n), Restart(epochs)
    writers = tuple(Actor(f"writer {r}") for r in range(n))
    orders = tuple(Mail(f"orders {r}") for r in range(n))
    shard, latest = _table("{e}/rank{r}.pt", n, epochs), Place("latest")

    def save(r: int, e: int) -> Steps:
        order = Steps((me[r].sends(orders[r], e),))
        return order >> me[r].replaces(latest, e) if r == 0 else order

    @process
    def writer(r: int, e: int) -> Process:
        if e > epochs:
            return STOP
        steps = writers[r].hears(orders[r], e) >> writers[r].writes(shard[e][r], e)
        return steps >> writers[r].syncs(shard[e][r], e) >> writer(r, e + 1)

    return Pipeline(
        name="pointer-at-dispatch",
        about="`latest` moved when an asynchronous save is dispatched",
        actors=_saves(n, epochs, save) | {f"writer {r}": writer(r, 1) for r in range(n)},
        servers=(*_all(shard), latest, *orders),
        restart=_pointed(back, latest, shard),
        claims=(Claim("when `latest` is moved", "syncs the name of", latest.name),),
        epochs=epochs,
        assumes="`latest` itself is replaced as well as it can be; writers sync all they write; a "
        "missing piece is refused",
        source="KempnerForge#102 (thread): the symlink advanced at dispatch",
    )


def keep_last_k(n: int = 2, epochs: int = 3, k: int = 2) -> Pipeline:
    """Each rank keeps its own newest k, on its own disk; the newest that all hold is loaded."""
    me, back = _ranks(n), Restart(epochs)
    shard, log = _table("rank {r}/{e}", n, epochs), Actor("the log")
    told = tuple(Mail(f"rank {r} saved") for r in range(n))

    def save(r: int, e: int) -> Steps:
        steps = me[r].puts(shard[e][r], e) >> me[r].sends(told[r], e)
        return steps >> me[r].deletes(shard[e - k][r], e - k) if e > k else steps

    @process
    def note(e: int) -> Process:
        if e > epochs:
            return STOP
        return (
            Steps(log.hears(mail, e) for mail in told)
            >> log.does("notes as saved", e)
            >> note(e + 1)
        )

    return Pipeline(
        name="keep-last-k",
        about=f"each rank keeps its newest {k}",
        actors=_saves(n, epochs, save) | {"the log": note(1)},
        servers=(*_all(shard), *told),
        restart=_common(back, shard, epochs),
        claims=(Claim("when all ranks have told that they saved it", "notes as saved"),),
        epochs=epochs,
        assumes="a save is durable once it returns; ranks save without waiting for each other; "
        "the restart looks for the newest epoch that all ranks still hold",
        source="independent checkpointing and its domino effect (Randell 1975), and no one library",
    )


def rename_each(n: int = 2, epochs: int = 2) -> Pipeline:
    """Each rank replaces its own file, flawlessly; a barrier follows."""
    me, back = _ranks(n), Restart(epochs)
    shard, done = _row("rank{r}.pt", n), _barrier("the barrier", me)

    def save(r: int, e: int) -> Steps:
        return me[r].replaces(shard[r], e) >> me[r].meets(done, e)

    return Pipeline(
        name="rename-each",
        about="each rank renames its own file into place",
        actors=_saves(n, epochs, save),
        servers=(*shard, done),
        restart=back.reads_all(shard, back.loads),
        claims=(
            Claim("when the rename happens", "renames"),
            Claim("when the barrier returns", RETURNS, done.name),
        ),
        epochs=epochs,
        assumes="every file is drafted, synced, renamed, and its directory synced; a rank without "
        "one starts from scratch (LlamaFactory#655)",
        source="the usual advice for one file, taken n times; 13 and 33 of 50 kills mixed epochs "
        "when it was run",
    )


def manifest_last(n: int = 2, epochs: int = 2) -> Pipeline:
    """One store that all share: the pieces first, then a manifest that is created once."""
    me, back = _ranks(n), Restart(epochs)
    piece, manifest = _table("{e}/{r}", n, epochs), _each("{e}/manifest", epochs)
    put = _barrier("the barrier", me)

    def save(r: int, e: int) -> Steps:
        steps = Steps((me[r].puts(piece[e][r], e),))
        if r == 0:
            return steps >> me[r].meets(put, e) >> me[r].creates(manifest[e], e)
        return steps >> me[r].arrives(put, e)

    return Pipeline(
        name="manifest-last",
        about="manifest last, by a create-only put in one store",
        actors=_saves(n, epochs, save),
        servers=(*_all(piece), *manifest.values(), put),
        restart=_marked(back, manifest, piece, epochs),
        claims=(
            Claim("when the barrier returns", RETURNS, put.name),
            Claim("when the manifest is created", "creates"),
        ),
        epochs=epochs,
        assumes="the store is one register: a put is durable and seen by all once it returns, and "
        "no name is ever written twice",
        source="Orbax's commit_success.txt and _SUCCESS files are of this kind; handfast's docs "
        "name it as the better choice where there is such a store",
    )


def two_phase(n: int = 2, epochs: int = 2, *, patient: bool = True) -> Pipeline:
    """Two-phase commit over local disks; impatient ranks discard what they prepared and go on."""
    me, back, chief = _ranks(n), Restart(epochs), Actor("coordinator")
    prepared, decided = _table("rank {r}/{e}", n, epochs), _each("coordinator/{e}", epochs)
    yes, commit = (tuple(Mail(f"{w} {r}") for r in range(n)) for w in ("yes from", "commit to"))

    @process
    def rank(r: int, e: int) -> Process:
        if e > epochs:
            return STOP
        vote = me[r].puts(prepared[e][r], e) >> me[r].sends(yes[r], e)
        commits = me[r].hears(commit[r], e) >> rank(r, e + 1)
        gives_up = me[r].does("times out", e) >> me[r].deletes(prepared[e][r], e)
        return vote >> (commits if patient else choice(commits, gives_up >> rank(r, e + 1)))

    @process
    def coordinator(e: int) -> Process:
        if e > epochs:
            return STOP
        votes = Steps(chief.hears(mail, e) for mail in yes)
        tells = Steps(chief.sends(mail, e) for mail in commit)
        return votes >> chief.puts(decided[e], e) >> tells >> coordinator(e + 1)

    name, words = ("2pc", "blocks") if patient else ("2pc-timeout", "times out after its vote")
    return Pipeline(
        name=name,
        about=f"two-phase commit that {words}",
        actors={f"rank {r}": rank(r, 1) for r in range(n)} | {"coordinator": coordinator(1)},
        servers=(*_all(prepared), *decided.values(), *yes, *commit),
        restart=_decided(back, decided, prepared, epochs),
        claims=(
            Claim("when a rank has prepared", "puts", who="rank"),
            Claim("when the coordinator decides", "puts", who="coordinator"),
        ),
        epochs=epochs,
        assumes="the coordinator's log is read at the restart, and its disk is not lost"
        + ("" if patient else "; a rank that waits too long discards what it prepared"),
        source="Gray 1978; Bernstein, Hadzilacos and Goodman 1987, chapter 7"
        + ("" if patient else ", which forbid it; XA calls it a heuristic rollback"),
    )


def _decided(back: Restart, marks: dict[int, Place], pieces: dict[int, Row], e: int) -> Process:
    """Load the greatest epoch, from ``e`` down, that was decided and of which all is there."""
    if e == 0:
        return back.loads(NOTHING for _ in pieces[1])
    lower = _decided(back, marks, pieces, e - 1)
    every = back.reads_all(
        pieces[e], lambda held: back.loads(held) if held == (e,) * len(held) else lower
    )
    return back.reads(marks[e], lambda v: every if v == e else lower)


def handfast(n: int = 2, epochs: int = 2) -> Pipeline:
    """Bilateral convergence, to its bones: attest what is durable, certify, only then release."""
    me, back = _ranks(n), Restart(epochs)
    agents = tuple(Actor(f"agent {r}") for r in range(n))
    image = _table("rank {r}/{e}", n, epochs)
    certificate = {e: tuple(Place(f"cert {r}/{e}") for r in range(n)) for e in image}
    staged = {(r, to): Mail(f"STAGED {r} to {to}") for r in range(n) for to in range(n)}

    def save(r: int, e: int) -> Steps:
        votes = Steps(me[r].sends(staged[r, to], e) for to in range(n))
        return me[r].puts(image[e][r], e) >> votes

    @process
    def agent(r: int, e: int) -> Process:
        if e > epochs:
            return STOP
        heard = Steps(agents[r].hears(staged[of, r], e) for of in range(n))
        knows = heard >> agents[r].puts(certificate[e][r], e)
        if e > 1:
            knows = knows >> agents[r].deletes(image[e - 1][r], e - 1)
        return knows >> agent(r, e + 1)

    return Pipeline(
        name="handfast",
        about="handfast: an epoch counts once a certificate is held",
        actors=_saves(n, epochs, save) | {f"agent {r}": agent(r, 1) for r in range(n)},
        servers=(*_all(image), *_all(certificate), *staged.values()),
        restart=_common(back, image, epochs),
        claims=(
            Claim("when a rank's image is durable", "puts", who="rank"),
            Claim("when a member holds the certificate", "puts", who="agent"),
        ),
        epochs=epochs,
        assumes="an image is durable and read back before the vote; the rest of the protocol "
        "(generations, orphans, damage) is checked over the real member, not here",
        source="docs/protocol.md",
    )


CATALOGUE: Final[tuple[Callable[[], Pipeline], ...]] = (
    dcp_overwriting,
    dcp_new_directory,
    pointer_before_barrier,
    pointer_after_barrier,
    pointer_at_dispatch,
    keep_last_k,
    rename_each,
    lambda: two_phase(patient=False),
    two_phase,
    manifest_last,
    handfast,
)
