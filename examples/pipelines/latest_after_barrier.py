"""One file a rank, overwritten; a barrier; then `latest`. The usual way by hand, and broken.

    handfast prove --pipeline examples/pipelines/latest_after_barrier.py --svg broken.svg

Every file is replaced as carefully as a file system allows, and `latest` moves last. The trouble is
elsewhere: the next save replaces the very files that `latest` still points to.
"""

from handfast.model.pipeline import (
    NOTHING,
    STOP,
    Actor,
    Barrier,
    Claim,
    Pipeline,
    Place,
    Process,
    Restart,
    process,
)

RANKS, EPOCHS = 2, 2

ranks = [Actor(f"rank {r}") for r in range(RANKS)]
files = [Place(f"rank{r}.pt", ranks=(r,)) for r in range(RANKS)]
latest = Place("latest")
barrier = Barrier("barrier", tuple(rank.name for rank in ranks))
restart = Restart(EPOCHS)


@process
def rank(r: int, epoch: int) -> Process:
    """Save this epoch, then the next one."""
    if epoch > EPOCHS:
        return STOP
    save = ranks[r].replaces(files[r], epoch) >> ranks[r].meets(barrier, epoch)
    if r == 0:
        save = save >> ranks[r].replaces(latest, epoch)
    return save >> rank(r, epoch + 1)


def load(found: int) -> Process:
    """Without `latest`, start from scratch; with it, each rank takes its file."""
    if found == NOTHING:
        return restart.loads(NOTHING for _ in ranks)
    return restart.reads_all(files, restart.loads)


pipeline = Pipeline(
    name="latest-after-barrier",
    about="one file a rank, a barrier, then `latest`",
    actors={actor.name: rank(r, 1) for r, actor in enumerate(ranks)},
    servers=(*files, latest, barrier),
    restart=restart.reads(latest, load),
    claims=(
        Claim("when the barrier returns", does="returns from", what=barrier.name),
        Claim("when `latest` is replaced", does="syncs the name of", what=latest.name),
    ),
    epochs=EPOCHS,
)
