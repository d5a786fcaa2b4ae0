"""Two tiers: each rank's image goes to a peer's memory at once, and to a shared store later.

    handfast prove --pipeline examples/pipelines/peer_memory.py

The quick tier survives the job and not the power; the slow one survives both, once its manifest is
there. So "saved when the peers have it" holds for as long as only processes die.
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
everybody = tuple(rank.name for rank in ranks)
memory = {
    e: [Place(f"memory {r}/{e}", lasting=False, ranks=(r,)) for r in range(RANKS)] for e in (1, 2)
}
store = {e: [Place(f"store {r}/{e}", ranks=(r,)) for r in range(RANKS)] for e in (1, 2)}
manifest = {e: Place(f"manifest {e}") for e in (1, 2)}
copied, uploaded = Barrier("copied", everybody), Barrier("uploaded", everybody)
restart = Restart(EPOCHS)


@process
def rank(r: int, epoch: int) -> Process:
    """Copy to the peer; once all have, upload; once all have, rank 0 creates the manifest."""
    if epoch > EPOCHS:
        return STOP
    me = ranks[r]
    save = me.puts(memory[epoch][r], epoch) >> me.meets(copied, epoch)
    save = save >> me.puts(store[epoch][r], epoch) >> me.meets(uploaded, epoch)
    if r == 0:
        save = save >> me.creates(manifest[epoch], epoch)
    return save >> rank(r, epoch + 1)


def newest(epoch: int) -> Process:
    """The newest epoch that all peers hold, or else that has a manifest."""
    if epoch == 0:
        return restart.loads(NOTHING for _ in ranks)
    lower = newest(epoch - 1)

    def stored(found: int) -> Process:
        return restart.reads_all(store[epoch], restart.loads) if found == epoch else lower

    return restart.reads_all(
        memory[epoch],
        lambda held: (
            restart.loads(held)
            if all(value == epoch for value in held)
            else restart.reads(manifest[epoch], stored)
        ),
    )


pipeline = Pipeline(
    name="peer-memory",
    about="peers' memory at once, a shared store later",
    actors={actor.name: rank(r, 1) for r, actor in enumerate(ranks)},
    servers=(
        *(place for row in (*memory.values(), *store.values()) for place in row),
        *manifest.values(),
        copied,
        uploaded,
    ),
    restart=newest(EPOCHS),
    claims=(
        Claim("when the peers have it", does="returns from", what=copied.name),
        Claim("when the manifest is created", does="creates"),
    ),
    epochs=EPOCHS,
)
