"""Shows where two runs are said to part, and what is told first: by moments made by hand."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from handfast.testing.exact.judge import Split, left_of, noise_of, split_of
from handfast.testing.exact.moments import Moment, Print


def leaf(value: object, kind: str = "value", *, stored: bool = True) -> Print:
    """A plain value."""
    return Print(kind, repr(value).encode(), repr(value), stored)


def saved(step: int, **prints: Print) -> Moment:
    return Moment("saved", step, True, prints)


def restored(step: int, **prints: Print) -> Moment:
    return Moment("restored", step, False, prints)


def counts(steps: Sequence[int], **more: Print) -> list[Moment]:
    """A run whose weight is its step."""
    first, *rest = steps
    made = [restored(first, weight=leaf(first, "parameter"), **more)]
    return made + [saved(step, weight=leaf(step, "parameter"), **more) for step in rest]


def split(truth: list[Moment], *starts: list[Moment]) -> Split | None:
    return split_of([truth], [[start] for start in starts])


def test_equal_runs_never_part() -> None:
    """Also where a start has trained some steps again, and where it ended in between."""
    truth = counts([0, 1, 2, 3, 4])
    assert split(truth, counts([0, 1, 2, 3]), counts([2, 3, 4])) is None
    assert noise_of([truth], [truth]) == set()


def test_what_differed_before_is_told_before_what_follows() -> None:
    """A scheduler that begins anew: nothing stored differs until a step has been taken."""
    truth = [
        restored(0, rate=leaf(9), beside=leaf(0, "scheduler", stored=False)),
        *(saved(s, rate=leaf(9 - s), beside=leaf(s, "scheduler", stored=False)) for s in (1, 2, 3)),
    ]
    start = [
        restored(2, rate=leaf(7), beside=leaf(0, "scheduler", stored=False)),
        saved(3, rate=leaf(8), beside=leaf(1, "scheduler", stored=False)),
    ]
    found = split(truth, start)
    assert found is not None
    assert (found.start, found.step) == (0, 3)
    (first,) = found.first
    assert (first.path, first.step, first.restored, first.stored) == ("beside", 2, True, False)
    assert (first.expected, first.found) == ("2", "0")
    assert [d.path for d in found.then] == ["rate"]


def test_what_is_right_again_at_the_next_save_is_no_cause() -> None:
    """A loader that takes its state up only when it is iterated."""
    truth = [restored(0, place=leaf(0), w=leaf(0)), saved(1, place=leaf(1), w=leaf(1)),
             saved(2, place=leaf(2), w=leaf(2))]  # fmt: skip
    late = [restored(1, place=leaf(0), w=leaf(1)), saved(2, place=leaf(2), w=leaf(5))]
    found = split(truth, late)
    assert found is not None
    assert [d.path for d in found.first] == ["w"]
    assert found.then == ()
    assert split(truth, [late[0], saved(2, place=leaf(2), w=leaf(2))]) is None


def test_a_variable_that_never_changes_is_no_state_that_was_lost() -> None:
    """Where the loop began, say: it differs after every resume."""

    def run(begin: int, steps: Sequence[int], off: int = 0) -> list[Moment]:
        beside = leaf(begin, stored=False)
        first, *rest = steps
        return [restored(first, w=leaf(first), begin=beside),
                *(saved(step, w=leaf(step + off), begin=beside) for step in rest)]  # fmt: skip

    found = split(run(0, [0, 1, 2, 3]), run(2, [2, 3], off=1))
    assert found is not None
    assert [d.path for d in found.first] == ["w"]


def test_variables_that_are_not_there_do_not_differ_and_stored_ones_do() -> None:
    """The loop's variables come and go, by the way that it takes; what the state lost is lost."""

    def beside(value: int) -> Print:
        return leaf(value, stored=False)

    truth = [restored(0, w=leaf(0)), saved(1, w=leaf(1), x=beside(1), gone=leaf(1), y=beside(1)),
             saved(2, w=leaf(2), x=beside(2), gone=leaf(1), y=beside(2))]  # fmt: skip
    found = split(truth, [restored(1, w=leaf(1)), saved(2, w=leaf(2), x=beside(2))])
    assert found is not None
    (first,) = found.first
    assert (first.path, first.expected, first.found) == ("gone", "1", "nothing")
    assert found.then == ()


def test_of_two_that_part_at_once_the_likelier_cause_is_told_first() -> None:
    """Parameters follow from everything else."""
    truth = [restored(0), saved(1, a=leaf(1, "parameter"), b=leaf(1, "moment"),
                                z=leaf(1, "loader position"))]  # fmt: skip
    other = [restored(0), saved(1, a=leaf(2, "parameter"), b=leaf(2, "moment"),
                                z=leaf(2, "loader position"))]  # fmt: skip
    found = split(truth, other)
    assert found is not None
    assert [d.path for d in found.first] == ["z", "b", "a"]


def test_ranks_are_told_apart_and_the_earliest_counts() -> None:
    """One rank's stream differs from the resume on, and all ranks' weights from the next step."""
    truth = [counts([0, 1, 2, 3]), counts([0, 1, 2, 3])]
    one = counts([0, 1, 2])
    for at, moment in enumerate(truth[1]):
        moment.prints["stream"] = leaf(at, "random stream")
    wrong = [restored(1, weight=leaf(1, "parameter"), stream=leaf(7, "random stream")),
             saved(2, weight=leaf(9, "parameter"), stream=leaf(8, "random stream"))]  # fmt: skip
    mine = [restored(1, weight=leaf(1, "parameter")), saved(2, weight=leaf(9, "parameter"))]
    found = split_of(truth, [[one, truth[1][:3]], [mine, wrong]])
    assert found is not None
    assert (found.start, found.step) == (1, 2)
    assert [(d.rank, d.path) for d in found.first] == [(1, "stream")]
    assert [(d.rank, d.path) for d in found.then] == [(0, "weight"), (1, "weight")]


def test_noise_is_left_out() -> None:
    """What differs between undisturbed runs, on its rank, says nothing of a resume."""
    one = [restored(0, at=leaf(0)), saved(1, at=leaf(1), w=leaf(1)), saved(2, at=leaf(2))]
    two = [restored(0, at=leaf(0)), saved(1, at=leaf(5), w=leaf(1)), saved(2, at=leaf(6))]
    noise = noise_of([one], [two])
    assert noise == {(0, "at")}
    assert split_of([one], [[two]], noise) is None
    assert split_of([one], [[two]], {(1, "at")}) is not None


def test_how_far_tensors_are_apart_is_said() -> None:
    """Among the elements that were kept, if both have as many; NaN is far from everything."""

    def tensor(*values: float, size: int = 4) -> Print:
        return Print("moment", repr((values, size)).encode(), "float32[4]", True, values, size)

    cases = [
        (tensor(1.0, 2.0), tensor(1.0, 2.5), 0.5),
        (tensor(1.0), tensor(1.0, size=5), None),
        (leaf(1), leaf(2), None),
        (tensor(float("inf")), tensor(1.0), float("inf")),
    ]
    for was, now, apart in cases:
        found = split([restored(0), saved(1, m=was)], [restored(0), saved(1, m=now)])
        assert found is not None
        assert found.first[0].largest == apart
    nan = [restored(0), saved(1, m=tensor(float("nan")))]
    found = split([restored(0), saved(1, m=tensor(1.0))], nan)
    assert found is not None
    assert str(found.first[0].largest) == "nan"


values = st.dictionaries(st.sampled_from("abc"), st.integers(0, 2), min_size=3, max_size=3)


@given(st.lists(values, min_size=2, max_size=5), st.integers(1, 4))
def test_the_step_that_is_told_is_the_first_that_differs(
    run: list[dict[str, int]], change: int
) -> None:
    """Whatever the values: one that is changed from a save on is found there, and nowhere else."""

    def moments(given: list[dict[str, int]]) -> list[Moment]:
        made = [{name: leaf(value) for name, value in each.items()} for each in given]
        return [restored(0, **made[0]), *(saved(s, **m) for s, m in enumerate(made[1:], 1))]

    at = min(change, len(run) - 1)
    changed = [each if step < at else each | {"a": 9} for step, each in enumerate(run)]
    found = split(moments(run), moments(changed))
    assert found is not None
    assert (found.step, [d.path for d in found.first]) == (at, ["a"])
    assert split(moments(run), moments(run)) is None


def test_what_is_trained_counts_wherever_it_is() -> None:
    """A model that nobody saves begins anew, and nothing that is saved ever tells."""

    def run(steps: Sequence[int], off: int = 0, kind: str = "parameter") -> list[Moment]:
        first, *rest = steps
        made = [restored(first, model=leaf(first - off, kind, stored=False))]
        return made + [saved(s, model=leaf(s - off, kind, stored=False)) for s in rest]

    truth = run([0, 1, 2, 3, 4])
    found = split(truth, run([2, 3, 4], off=2))
    assert found is not None
    assert (found.step, found.then) == (3, ())
    (first,) = found.first
    assert (first.path, first.step, first.restored, first.stored) == ("model", 2, True, False)
    assert split(run([0, 1, 2, 3], kind="value"), run([2, 3], off=2, kind="value")) is None
    assert split(truth, [run([2], off=2)[0], *run([2, 3, 4])[1:]]) is None, "it came back later"


def test_a_frozen_model_beside_the_state_is_no_state_that_was_lost() -> None:
    """What never moves is data, whatever it begins as after a resume."""
    here = {"teacher": leaf(1, "parameter", stored=False)}
    there = {"teacher": leaf(2, "parameter", stored=False)}
    assert split(counts([0, 1, 2, 3], **here), counts([2, 3], **there)) is None


def test_what_could_be_loaded_and_stays_another_one_counts() -> None:
    """An average beside the state, of which nothing that is stored tells; and it is told before
    what else is beside it. One that is right again later has only been late, one that may differ
    is noise, and undisturbed runs are not held to it.
    """

    def run(steps: Sequence[int], *off: int) -> list[Moment]:
        first, *rest = steps
        made = [(restored, first), *((saved, step) for step in rest)]
        return [
            how(step, ema=Print("object", str(step - by).encode(), "", False, loadable=True),
                at=leaf(step - by, "loader position", stored=False))
            for (how, step), by in zip(made, off, strict=True)
        ]  # fmt: skip

    truth = run([0, 1, 2, 3, 4], 0, 0, 0, 0, 0)
    lost = run([2, 3, 4], 2, 2, 1)
    found = split(truth, lost)
    assert found is not None
    assert (found.step, [d.path for d in found.first], found.then) == (3, ["ema", "at"], ())
    assert found.first[0].loadable
    assert split(truth, run([2, 3, 4], 2, 2, 0)) is None
    assert split_of([truth], [[lost]], {(0, "ema")}) is None
    assert split_of([truth], [[lost]], loadable=False) is None


def test_what_is_left_beside_the_state_is_told_of_the_end() -> None:
    """Of the first start that leaves something: what moves, is not stored, and is not noise."""

    def run(steps: Sequence[int], off: int = 0, still: int = 0) -> list[Moment]:
        first, *rest = steps
        made = [(restored, first), *((saved, step) for step in rest)]
        return [
            how(step, w=leaf(step), best=leaf(step - off, stored=False),
                begun=leaf(still, stored=False))
            for how, step in made
        ]  # fmt: skip

    truth = run([0, 1, 2, 3])
    for start in (run([2, 3], off=2, still=5), run([1, 2], off=2)):
        (left,) = left_of([truth], [[run([0, 1])], [start]])
        assert (left.path, left.restored) == ("best", True)
    assert left_of([truth], [[run([2, 3], off=2)]], {(0, "best")}) == ()
    assert left_of([truth], [[run([1, 2, 3])], [[]]]) == ()
