"""Shows that the picture's marks say who knew what when, and no more."""

from handfast.demo.events import Event
from handfast.demo.marks import first_seen, lines_seen

NONE = (0, 0)


def seen(at: float, rank: int, line: tuple[int, int] = NONE, **domains: object) -> Event:
    """What a rank saw of domains d0, d1, ... as (staged, persisted, certified)."""
    named = {name.removeprefix("d"): epochs for name, epochs in domains.items()}
    return Event(at=at, rank=rank, launch=1, kind="lattice", domains=named, line=line)


def test_each_fact_is_marked_when_first_seen() -> None:
    """Staged, persisted and certified by the domain's own rank; attested once another heard."""
    events = [
        seen(10.0, 0, d0=((1, 5), NONE, NONE), d1=(NONE, NONE, NONE)),
        seen(10.5, 0, d0=((1, 5), (1, 5), NONE), d1=(NONE, NONE, NONE)),
        seen(10.6, 1, d0=(NONE, (1, 5), NONE), d1=((1, 5), (1, 5), NONE)),
        seen(11.0, 0, (1, 5), d0=((1, 5), (1, 5), (1, 5)), d1=(NONE, (1, 5), NONE)),
    ]
    marks = {(m.domain, m.kind): m.at for m in first_seen(events, 10.0) if m.domain == "0"}
    assert {key: round(at, 3) for key, at in marks.items()} == {
        ("0", "staged"): 0.0,
        ("0", "persisted"): 0.5,
        ("0", "attested"): 0.6,
        ("0", "certified"): 1.0,
    }
    assert lines_seen(events, 10.0) == [(1.0, 1, 5)]


def test_an_epoch_passed_over_takes_the_time_of_the_later_one() -> None:
    """Two certificates between two glances: the lower epoch was certified by then as well."""
    events = [
        seen(1.0, 0, d0=((1, 5), NONE, NONE)),
        seen(2.0, 0, d0=((1, 10), (1, 5), NONE)),
        seen(3.0, 0, d0=((1, 10), (1, 10), (1, 10))),
    ]
    certified = [(m.step, m.at) for m in first_seen(events, 0.0) if m.kind == "certified"]
    assert certified == [(5, 3.0), (10, 3.0)]


def test_a_fact_of_one_generation_says_nothing_of_another() -> None:
    """After a kill the numbers come again: epoch 2/5 does not certify the dead 1/5."""
    events = [
        seen(1.0, 0, d0=((1, 5), NONE, NONE)),
        seen(2.0, 0, d0=((2, 5), (2, 5), (2, 5))),
    ]
    assert [(m.generation, m.kind) for m in first_seen(events, 0.0)] == [
        (1, "staged"),
        (2, "staged"),
        (2, "persisted"),
        (2, "certified"),
    ]
