"""New files for each epoch; a barrier, at which rank 0 won't wait for ever; then `latest` is moved.

    handfast prove --pipeline examples/pipelines/barrier_with_timeout.py --svg timeout.svg

Two pipelines, which differ in what rank 0 does when it has waited too long. The hasty one moves
`latest` all the same, to files that need not be there. The careful one gives that epoch up.
"""

from handfast.model.pipeline import (
    NOTHING,
    STOP,
    TORN,
    Actor,
    Barrier,
    Claim,
    Pipeline,
    Place,
    Process,
    Restart,
    choice,
    process,
)

RANKS, EPOCHS = 2, 2

# who acts, and on what: a file for each epoch and rank, a pointer, and a barrier of all ranks
ranks = [Actor(f"rank {r}") for r in range(RANKS)]
files = {
    e: [Place(f"{e}/rank{r}.pt", ranks=(r,)) for r in range(RANKS)] for e in range(1, EPOCHS + 1)
}
latest = Place("latest")
written = Barrier("written", tuple(rank.name for rank in ranks))
restart = Restart(EPOCHS)


@process
def other(r: int, epoch: int) -> Process:
    """Ranks above 0: write the file, say so, go on to the next epoch."""
    if epoch > EPOCHS:
        return STOP
    me = ranks[r]
    return me.replaces(files[epoch][r], epoch) >> me.arrives(written, epoch) >> other(r, epoch + 1)


@process
def first(epoch: int, careful: bool) -> Process:
    """Rank 0: write the file, wait for the others or lose patience, move `latest`."""
    if epoch > EPOCHS:
        return STOP
    me = ranks[0]
    moves = me.replaces(latest, epoch) >> first(epoch + 1, careful)
    gives_up = first(epoch + 1, careful)
    return (
        me.replaces(files[epoch][0], epoch)
        >> me.arrives(written, epoch)
        >> choice(
            me.returns(written, epoch) >> moves,
            me.does("times out", epoch) >> (gives_up if careful else moves),
        )
    )


def load(found: int) -> Process:
    """Go where `latest` points to, and take what is there."""
    if found == TORN:
        return restart.refuses()
    if found == NOTHING:
        return restart.loads(NOTHING for _ in ranks)
    return restart.reads_all(files[found], restart.loads)


def pipeline(name: str, about: str, careful: bool) -> Pipeline:
    """All of it together."""
    others = {ranks[r].name: other(r, 1) for r in range(1, RANKS)}
    return Pipeline(
        name=name,
        about=about,
        actors={ranks[0].name: first(1, careful), **others},
        servers=(*(file for row in files.values() for file in row), latest, written),
        restart=restart.reads(latest, load),
        claims=(Claim("when `latest` is moved", does="syncs the name of", what=latest.name),),
        epochs=EPOCHS,
    )


hasty = pipeline("hasty", "a timeout, and `latest` is moved all the same", careful=False)
careful = pipeline("careful", "a timeout, and the epoch is given up", careful=True)
