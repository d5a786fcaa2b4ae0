"""Shows that a mixture is proved by digests, and that nothing else is called one."""

from handfast.demo.events import Event
from handfast.demo.result import Tally
from handfast.demo.witness import Ledger, tally

WORLD = 2


class Story:
    """A run told event by event: each rank's digests name the step that they are of."""

    def __init__(self, truth: Ledger | None = None) -> None:
        self.ledger = Ledger(WORLD, truth)
        self.clock = 0.0
        self.launch = 0

    def tell(self, rank: int, kind: str, step: int = 0, **fields: object) -> None:
        self.clock += 1.0
        self.ledger.take(
            Event(at=self.clock, rank=rank, launch=self.launch, kind=kind, step=step, **fields)
        )

    def start(self, claimed: int, *held: dict[str, str]) -> None:
        self.launch += 1
        for rank in range(WORLD):
            self.tell(rank, "resumed", claimed, prints=held[rank])

    def step(self, step: int, loss: float = 1.0) -> None:
        for rank in range(WORLD):
            self.tell(rank, "step", step, loss=loss)

    def save(self, step: int, *, done: int = WORLD, branch: str = "") -> None:
        for rank in range(WORLD):
            self.tell(rank, "saving", step, prints=state(rank, step, branch))
        for rank in range(done):
            self.tell(rank, "saved", step)

    @property
    def last(self) -> str:
        return self.ledger.resumes[-1].outcome


def state(rank: int, step: int, branch: str = "", **other: int) -> dict[str, str]:
    """Digests of a rank's components as of ``step``, some of another one."""
    return {
        name: f"{name} {rank} {other.get(name, step)}{branch}" for name in ("model", "optimizer")
    }


def begun(truth: Ledger | None = None) -> Story:
    story = Story(truth)
    story.start(0, state(0, 0), state(1, 0))
    story.save(10)
    story.save(20, done=1)
    return story


def test_ranks_of_two_steps_are_a_mixture_that_names_them() -> None:
    """The fault that renaming each rank's file invites, whatever step number is claimed."""
    story = begun()
    story.start(10, state(0, 20), state(1, 10))
    assert story.last == "mixture"
    assert story.ledger.resumes[-1].detail == "rank 0: 20; rank 1: 10"


def test_weights_of_one_step_and_moments_of_another_are_a_mixture_within_a_rank() -> None:
    """nvidia-resiliency-ext#376: optimizer step 2, weights step 1."""
    story = begun()
    story.start(20, state(0, 20), state(1, 20, optimizer=10))
    assert story.last == "mixture"
    assert story.ledger.resumes[-1].detail == "rank 0: 20; rank 1: model 20, optimizer 10"


def test_a_whole_state_under_a_wrong_number_is_a_mixture_too() -> None:
    """The pointer says one step and the files hold another: the loop's counter is then wrong."""
    story = begun()
    story.start(10, state(0, 20), state(1, 20))
    assert story.last == "mixture"
    assert "called step 10, but holds step 20" in story.ledger.resumes[-1].detail


def test_a_state_that_never_was_is_a_mixture() -> None:
    """Torn within one component: its digest was never given at any save."""
    story = begun()
    story.start(10, {"model": "half", "optimizer": "optimizer 0 10"}, state(1, 10))
    assert story.last == "mixture"
    assert "?" in story.ledger.resumes[-1].detail


def test_two_timelines_of_the_same_step_are_a_mixture() -> None:
    """Equal numbers are no proof: step 20 of one life and step 20 of another are two states."""
    story = begun()
    story.start(10, state(0, 10), state(1, 10))
    story.save(20, branch=" after another start")
    story.start(20, state(0, 20), state(1, 20, " after another start"))
    assert story.last == "mixture"


def test_a_step_trained_again_to_the_same_bits_is_no_mixture() -> None:
    """Deterministic training gives the same digests in each life; any of them may be resumed."""
    story = begun()
    story.start(10, state(0, 10), state(1, 10))
    story.save(20)
    story.start(20, state(0, 20), state(1, 20))
    assert story.last == "newest"


def test_newest_older_and_all_lost_are_told_apart() -> None:
    """Newest is what all ranks had finished; what only one had finished does not count."""
    story = begun()
    story.start(10, state(0, 10), state(1, 10))
    assert story.last == "newest"
    story.save(20)
    story.start(10, state(0, 10), state(1, 10))
    assert story.last == "older"
    story.start(0, state(0, 0), state(1, 0))
    assert story.last == "scratch"
    assert tally(story.ledger.resumes) == Tally(newest=1, older=1, scratch=1)


def test_a_start_that_raised_is_an_error_and_one_killed_early_is_not() -> None:
    """An honest count: a kill before the restore ended says nothing of the saver."""
    story = begun()
    story.launch += 1
    story.tell(0, "resumed", 10, prints=state(0, 10))
    story.ledger.over(story.launch, story.clock)
    assert story.last == "unseen"
    story.launch += 1
    story.tell(1, "error", text="EOFError: cut")
    assert story.ledger.failed(story.launch)
    story.ledger.over(story.launch, story.clock)
    assert (story.last, story.ledger.resumes[-1].detail) == ("error", "EOFError: cut")


def test_an_error_after_the_resume_is_no_failed_resume() -> None:
    """A rank that loses its peer raises in a collective; that is the kill's doing."""
    story = begun()
    story.tell(0, "error", text="connection closed by peer")
    assert not story.ledger.failed(story.launch)


def test_a_resume_is_exact_only_if_every_component_is_the_true_one() -> None:
    """After a mixture has been trained on, whole checkpoints are whole copies of a wrong state."""
    true = begun().ledger
    story = begun(true)
    story.start(10, state(0, 10), state(1, 10))
    assert story.ledger.resumes[-1].exact is True
    story.save(20, branch=" bent")
    story.start(20, state(0, 20, " bent"), state(1, 20, " bent"))
    assert (story.last, story.ledger.resumes[-1].exact) == ("newest", False)


def test_a_loss_that_differs_from_the_true_one_or_from_itself_is_a_clash() -> None:
    """By the last bit, on any rank, at any time; equal repetitions are only counted."""
    true = begun()
    true.step(1, 2.0)
    true.step(2, 1.5)
    story = begun(true.ledger)
    story.step(1, 2.0)
    story.step(1, 2.0)
    assert (story.ledger.repeated, story.ledger.clashes) == (1, 0)
    story.step(2, 1.5000000000000002)
    assert story.ledger.clashes == 1


def test_a_step_that_is_trained_again_to_another_loss_is_a_clash_without_any_truth() -> None:
    """A run that disagrees with itself needs no other to be found out."""
    story = begun()
    story.step(1, 2.0)
    story.step(1, 2.5)
    assert story.ledger.clashes == 1


def test_what_was_given_up_by_a_rollback_is_abandoned_for_ever() -> None:
    """DCP 7 and TorchSnapshot 34 of 50: "the newest complete" is of the timeline given up."""
    story = begun()
    story.save(20)
    story.ledger.rolled_back(10)
    story.start(10, state(0, 10), state(1, 10))
    assert story.last == "newest"  # as asked for
    story.save(20, branch=" anew")
    story.start(20, state(0, 20, " anew"), state(1, 20, " anew"))
    assert story.last == "newest"
    story.start(20, state(0, 20), state(1, 20))
    assert story.last == "abandoned"
    assert tally(story.ledger.resumes) == Tally(newest=2, abandoned=1)


def test_the_curve_covers_the_loss_of_every_rank_at_every_step() -> None:
    """Two runs whose means agree and whose ranks do not must not get one digest."""

    def curve(*losses: float) -> str:
        story = begun()
        for rank, loss in enumerate(losses):
            story.tell(rank, "step", 1, loss=loss)
            story.tell(rank, "final", 1, prints=state(rank, 1))
        found = story.ledger.curve()
        assert found.losses == [2.0]
        return found.digest

    assert curve(1.0, 3.0) != curve(3.0, 1.0)
    assert curve(1.0, 3.0) == curve(1.0, 3.0)
