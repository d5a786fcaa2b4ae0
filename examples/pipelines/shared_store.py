"""One object store that all ranks write to: the pieces, then a manifest that is created once.

    handfast prove --pipeline examples/pipelines/shared_store.py --promela model.pml

Sound, and without any protocol: the store is a register that commits. What it hangs on is said in
the pipeline's `assumes`; `handfast.model.pipeline` says what it takes for granted of all.
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

RANKS, EPOCHS = 3, 2

ranks = [Actor(f"rank {r}") for r in range(RANKS)]
pieces = {e: [Place(f"{e}/{r}", ranks=(r,)) for r in range(RANKS)] for e in (1, 2)}
manifest = {e: Place(f"{e}/manifest") for e in (1, 2)}
uploaded = Barrier("uploaded", tuple(rank.name for rank in ranks))
restart = Restart(EPOCHS)


@process
def rank(r: int, epoch: int) -> Process:
    """Rank 0 alone waits for the others; they go on to the next epoch."""
    if epoch > EPOCHS:
        return STOP
    me = ranks[r]
    if r > 0:
        return me.puts(pieces[epoch][r], epoch) >> me.arrives(uploaded, epoch) >> rank(r, epoch + 1)
    save = me.puts(pieces[epoch][0], epoch) >> me.meets(uploaded, epoch)
    return save >> me.creates(manifest[epoch], epoch) >> rank(r, epoch + 1)


def newest(epoch: int) -> Process:
    """The newest epoch with a manifest."""
    if epoch == 0:
        return restart.loads(NOTHING for _ in ranks)
    lower = newest(epoch - 1)
    return restart.reads(
        manifest[epoch],
        lambda found: restart.reads_all(pieces[epoch], restart.loads) if found else lower,
    )


pipeline = Pipeline(
    name="shared-store",
    about="manifest last, by a create-only put",
    actors={actor.name: rank(r, 1) for r, actor in enumerate(ranks)},
    servers=(*(place for row in pieces.values() for place in row), *manifest.values(), uploaded),
    restart=newest(EPOCHS),
    claims=(Claim("when the manifest is created", does="creates"),),
    epochs=EPOCHS,
    assumes="a put is durable and seen by all once it returns; no name is written twice",
)
