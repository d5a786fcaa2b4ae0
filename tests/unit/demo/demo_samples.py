"""A made-up demo result: small, with everything in it that a report must show."""

from handfast.demo.result import Curve, DemoResult, Kill, Mark, MarkKind, Peer, Resume, Tally

GROWING: tuple[MarkKind, ...] = ("staged", "persisted", "attested", "certified")


def marks(at: float, generation: int, step: int, *, until: int = 4) -> list[Mark]:
    """An epoch of both domains, grown as far as ``until``."""
    return [
        Mark(at + 0.05 * n, f"{rank}", generation, step, kind)
        for rank in range(2)
        for n, kind in enumerate(GROWING[:until])
    ]


def sample(*, equal: bool = True) -> DemoResult:
    """Four kills, one of each kind and two under torchrun; the last epoch before one is undone."""
    losses = [3.0, 2.5, 2.25, 2.0]
    reference = Curve(losses, "aa" * 16, "bb" * 16, "cc" * 16, 4.0)
    storm = reference if equal else Curve([*losses[:3], 1.9], "dd" * 16, "bb" * 16, "ee" * 16, 9.0)
    kills = [
        Kill(2.0, 1, 2, "job", None, "persisting", "persisting+staging"),
        Kill(4.0, 2, 3, "agent", None, "moment", "between saves"),
        Kill(5.0, 2, 3, "rank", 1, "staging", "staging", torchrun=True),
        Kill(7.0, 3, 3, "node", None, "releasing", "releasing", torchrun=True),
    ]
    resumes = [
        Resume(0.5, 1, 0, 0, "first", True),
        Resume(3.0, 2, 1, 1, "newest", True),
        Resume(6.0, 3, 1, 2, "older", True),
        Resume(8.0, 4, 2, 2, "newest", equal),
    ]
    mixed = Resume(3.0, 2, 1, 1, "mixture", False, "rank 0: 2; rank 1: 1 <script>")
    peer = Peer("a usual way", "as its docs say", kills, [mixed], Tally(newest=3, mixture=1), 5.0)
    return DemoResult(
        machine={"processor": "2 x Test & Sons", "torch": "2.13"},
        settings={"seed": 1, "steps": 4, "world": 2, "parameters": 965380},
        reference=reference,
        storm=storm,
        kills=kills,
        resumes=resumes,
        tally=Tally(newest=2, older=1),
        marks=[*marks(1.0, 1, 1), *marks(1.9, 1, 2, until=2), *marks(3.5, 2, 2)],
        lines=[(1.2, 1, 1), (3.7, 2, 2)],
        progress=[(0.9, 1), (1.8, 2), (3.4, 2), (4.5, 3), (8.5, 3), (9.0, 4)],
        repeated=2,
        clashes=0 if equal else 1,
        peers=[peer],
        seconds=12.0,
    )
