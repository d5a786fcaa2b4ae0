"""Shows that pipelines are put together as their authors mean them, or refused in words.

And that a place loses in a crash what a file loses, and nothing that was synced.
"""

from __future__ import annotations

from inspect import currentframe, isfunction, signature

import pytest
from msgspec.structs import replace

from handfast.model.boundary import Kind, attack, compose, instants, judged, unread
from handfast.model.network import automaton
from handfast.model.pipeline import (
    KILLED,
    NOTHING,
    POWER,
    STOP,
    TORN,
    WORDS,
    Actor,
    Barrier,
    Claim,
    Event,
    Held,
    Mail,
    Pipeline,
    Place,
    Process,
    Restart,
    Steps,
    alive,
    choice,
    process,
    serve,
)
from handfast.model.process import Prefix, Undecided, transitions

ME, FILE, BACK = Actor("rank 0"), Place("file", ranks=(0,)), Restart(2)


def left(steps: Steps | Event, crash: Event, place: Place = FILE) -> set[int]:
    """All that a place may hold after these steps and a crash."""
    steps = steps if isinstance(steps, Steps) else Steps((steps,))
    reads = tuple(Event(BACK.name, "reads", place.name, value) for value in (-1, 0, 1, 2))
    terms = {serve(place, (*dict.fromkeys(steps), *reads), place.start)}

    def later(terms: set[Process]) -> set[Process]:
        """Whatever the kernel may have done meanwhile."""
        for term in (ahead := list(terms)):
            ahead += [
                after
                for event, after in transitions(term)
                if isinstance(event, Event) and event.who == "the kernel" and after not in ahead
            ]
        return set(ahead)

    for event in (*steps, crash):
        terms = {after for t in later(terms) for a, after in transitions(t) if a == event}
    return {
        a.epoch
        for term in terms
        for a, _ in transitions(term)
        if isinstance(a, Event) and a.does == "reads"
    }


ONE = ME.replaces(FILE, 1)


@pytest.mark.parametrize(
    ("steps", "killed", "power"),
    [
        (ME.puts(FILE, 1), {1}, {1}),
        (ME.writes(FILE, 1), {1}, {NOTHING, TORN, 1}),
        (ME.writes(FILE, 1) >> ME.syncs(FILE, 1), {1}, {1}),
        (ONE >> Event("rank 0", "opens", "file", 2), {TORN}, {1, TORN}),
        (ONE >> ME.writes(FILE, 2), {2}, {1, TORN, 2}),
        (ONE, {1}, {1}),
        (ONE >> ME.drafts(FILE, 2) >> ME.syncs_draft(FILE, 2), {1}, {1}),
        (ONE >> ME.drafts(FILE, 2) >> ME.renames(FILE, 2), {2}, {1, TORN, 2}),
        (ONE >> ME.drafts(FILE, 2) >> ME.syncs_draft(FILE, 2) >> ME.renames(FILE, 2), {2}, {1, 2}),
        (ME.drafts(FILE, 1) >> ME.renames(FILE, 1) >> ME.syncs_name(FILE, 1), {1}, {TORN, 1}),
        (ONE >> ME.deletes(FILE, 1), {NOTHING}, {NOTHING, 1}),
    ],
)
def test_what_a_crash_leaves_of_a_file(
    steps: Steps | Event, killed: set[int], power: set[int]
) -> None:
    """Killed processes leave what was written; a power cut any part of what was not synced."""
    assert left(steps, KILLED) == killed
    assert left(steps, POWER) == power


def test_memory_survives_processes_alone() -> None:
    """A peer's memory holds what the job put there until the machines go."""
    memory = Place("file", lasting=False)
    assert left(ME.puts(memory, 1), KILLED, memory) == {1}
    for steps in (
        ME.puts(memory, 1),
        ME.writes(memory, 1) >> ME.syncs(memory, 1),
        ME.drafts(memory, 1) >> ME.renames(memory, 1),
        ME.replaces(memory, 1),
    ):
        assert left(steps, POWER, memory) == {NOTHING}


def test_an_object_is_created_once() -> None:
    """The second create-only put is refused, whoever makes it."""
    assert left(ME.creates(FILE, 1), POWER) == {1}
    assert left(ME.creates(FILE, 1) >> ME.creates(FILE, 2), POWER) == set()


def test_a_barrier_returns_once_all_have_come() -> None:
    """And to each in its own time; who is early may come to the next one."""
    barrier = Barrier("barrier", ("rank 0", "rank 1"))
    a, b = ME.meets(barrier, 1), Actor("rank 1").meets(barrier, 1)
    term = serve(barrier, (*a, *b), barrier.start)
    (waiting,) = (after for event, after in transitions(term) if event == a[0])
    assert a[1] not in dict(transitions(waiting))
    (open_,) = (after for event, after in transitions(waiting) if event == b[0])
    assert {a[1], b[1]} <= dict(transitions(open_)).keys()


def test_a_message_may_be_heard_late_twice_or_never() -> None:
    """But not before it was sent."""
    mail = Mail("mail")
    sent, heard = ME.sends(mail, 1), Actor("rank 1").hears(mail, 1)
    term = serve(mail, (sent, heard), mail.start)
    assert heard not in dict(transitions(term))
    after = dict(transitions(term))[sent]
    assert dict(transitions(after))[heard] == after


def test_a_crash_ends_an_actor_anywhere() -> None:
    """Whatever it is at: of five states before its end and the end itself, each can be the last."""
    found = automaton(alive(ONE >> STOP))
    ended = found.terms.index(STOP)
    rows = [dict(row) for i, row in enumerate(found.edges) if i != ended]
    assert [(row[KILLED], row[POWER]) for row in rows] == [(ended, ended)] * (len(ONE) + 1)


@pytest.mark.parametrize(
    ("claimed", "loaded", "verdict"),
    [
        (0, (TORN, 1), None),
        (1, (1, 1), None),
        (1, (2, 2), None),
        (1, (TORN, 1), "torn"),
        (1, (2, 1), "mixed"),
        (1, (1, NOTHING), "mixed"),
        (2, (1, 1), "lost"),
        (1, (), "lost"),
    ],
)
def test_what_breaks_a_claim(claimed: int, loaded: tuple[int, ...], verdict: Kind | None) -> None:
    """All ranks resume one epoch, whole, and not an older one than was claimed; or else."""
    assert judged(claimed, loaded) == verdict


def pipeline(**changes: object) -> Pipeline:
    """One rank, one file, one epoch; with changes."""
    given: dict[str, object] = {
        "name": "one",
        "about": "one file",
        "actors": {"rank 0": ME.replaces(FILE, 1) >> ME.does("saved", 1) >> STOP},
        "servers": (FILE,),
        "restart": BACK.reads(FILE, lambda v: BACK.loads((v,))),
        "claims": (Claim("when it is saved", "saved"),),
        "epochs": 1,
    }
    return Pipeline(**{**given, **changes})  # changed fields, by name


def test_one_file_done_right_is_sound() -> None:
    """So the adversary can lose."""
    found = attack(pipeline(), pipeline().claims[0])
    assert (found.sound, found.tear()) == (True, None)


def test_an_instant_that_never_comes_proves_nothing() -> None:
    """A claim that can't come true is not called sound: its rank waits for a message for ever."""
    never, mail = Actor("rank 1"), Mail("mail")
    actors = {"rank 1": never.hears(mail, 1) >> never.does("saved", 1) >> STOP}
    actors["rank 0"] = choice(ONE >> STOP, ME.sends(mail, 2) >> STOP)
    back = BACK.reads(FILE, lambda v: BACK.loads((v,)))
    stuck = pipeline(actors=actors, servers=(FILE, mail), restart=back, epochs=2)
    found = attack(stuck, stuck.claims[0])
    assert (found.reached, found.tears, found.sound) == (False, (), False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"servers": (FILE, FILE)}, "names used twice: file"),
        ({"servers": (FILE, Barrier("rank 0", ("rank 0",)))}, "names used twice: rank 0"),
        ({"servers": (FILE, Place("the clock"))}, "names used twice: the clock"),
        ({"servers": (Place("other"),)}, "in no server: file"),
        ({"claims": (Claim("when", "vanishes", "file"),)}, "no actor ever vanishes file"),
        ({"actors": {"rank 0": Event("rank 0", "eats", "file", 1) >> STOP}}, "by 'eats'"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, object], words: str) -> None:
    """With the pipeline's or the place's name."""
    broken = pipeline(**changes)
    claim = Claim("", "eats") if "actors" in changes else broken.claims[0]
    with pytest.raises(ValueError, match=words):
        compose(broken, claim)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 3}, r"goes on from epochs 1 to 2 in file, and `epochs` is 3"),
        ({"restart": BACK.reads(FILE, lambda v: STOP if v == 1 else BACK.loads((v,)))},
         r"after `the restart reads file and finds epoch 1` it neither loads nor refuses"),
        ({"restart": STOP}, "loads nothing on any way"),
        ({"restart": BACK.refuses()}, "loads nothing on any way"),
        ({"restart": BACK.loads(())}, r"always as many, not \[0\]"),
        ({"restart": BACK.reads(FILE, lambda v: BACK.loads((v,) * (2 + v)))},
         r"not \[1, 2, 3, 4\]"),
        ({"restart": ME.does("saved", 1) >> BACK.reads(FILE, lambda v: BACK.loads((v,)))},
         "the restart has `rank 0 saved .epoch 1.` in it"),
        ({"claims": Claim("when it is saved", "saved")}, "claims is to be a tuple of one or more"),
        ({"servers": ()}, "servers is to be a tuple of one or more"),
        ({"actors": {}}, "it needs actors"),
        ({"epochs": 0}, "at least one epoch"),
    ],
    ids=["epochs", "dead end", "nothing", "refusal", "nobody", "uneven", "of actors", "comma",
         "none", "actors", "zero"],
)  # fmt: skip
def test_a_restart_that_could_come_to_nothing_is_refused(
    changes: dict[str, object], words: str
) -> None:
    """It would be judged by nothing, and the claim would hold whatever was torn."""
    broken = pipeline(**changes)
    with pytest.raises(ValueError, match=words):
        compose(broken, Claim("when it is saved", "saved"))


@pytest.mark.parametrize(
    ("restart", "words"),
    [
        (BACK.loads((1,)), "`the restart loads rank 0: epoch 1` comes at once, and no read"),
        (BACK.reads(FILE, lambda v: BACK.loads((2 if v == 1 else v,))),
         "epoch 2` comes after `the restart reads file and finds epoch 1`, and no read"),
        (BACK.reads(FILE, lambda v: BACK.loads((TORN if v == NOTHING else v,))),
         "a torn piece` comes after `the restart reads file and finds nothing`, and no read"),
        (Undecided(BACK.loads((NOTHING,)), Event(BACK.name, "guesses", "", 1) >> BACK.loads((1,))),
         "comes after `the restart guesses .epoch 1.`, and no read"),
        (BACK.reads(FILE, lambda v: Event(BACK.name, "waits", "", 1) >> BACK.loads((TORN,))),
         "comes after `the restart waits .epoch 1.`, and no read"),
        (Event(BACK.name, "puts", "file", 1) >> BACK.loads((1,)), "after `the restart puts file"),
    ],
    ids=["at once", "another epoch", "torn", "unseen", "by another way", "written by itself"],
)  # fmt: skip
def test_a_load_of_what_no_read_has_found_is_refused(restart: Process, words: str) -> None:
    """Or the claim would hold whatever is there; with what came before it."""
    with pytest.raises(ValueError, match=words):
        compose(pipeline(restart=restart), pipeline().claims[0])


def test_what_was_found_may_be_written_out_and_nothing_need_be_found() -> None:
    """It is the way to a load that counts, and not how its epochs are spelled."""
    scratch, one = BACK.loads((NOTHING,)), BACK.loads((1,))
    restart = BACK.reads(FILE, lambda v: one if v == 1 else scratch)
    assert attack(pipeline(restart=restart), pipeline().claims[0]).sound


def test_of_two_loads_that_are_alike_the_wrong_ones_line_is_told() -> None:
    """Both are one state of the search; only one of them comes without a read that found it."""
    here = currentframe()
    assert here is not None
    line = here.f_lineno
    fine = BACK.loads((1,))
    wrong = BACK.loads((1,))
    assert fine == wrong
    restart = BACK.reads(FILE, lambda v: fine if v == 1 else wrong)
    with pytest.raises(ValueError, match=rf"test_pipeline\.py, line {line + 2}: `the"):
        compose(pipeline(restart=restart), pipeline().claims[0])


YOU, YOURS, LATEST = Actor("rank 1"), Place("yours", ranks=(1,)), Place("latest")


@pytest.mark.parametrize(
    "restart",
    [
        BACK.reads(LATEST, lambda f: BACK.loads((f, f))),
        BACK.reads(LATEST, lambda f: BACK.reads(FILE, lambda v: BACK.loads((v, v)))),
        BACK.reads(LATEST, lambda f: BACK.reads(YOURS, lambda v: BACK.loads((f, v)))),
        BACK.reads(
            LATEST,
            lambda f: (
                BACK.loads((f, f))
                if f != NOTHING
                else BACK.reads_all((FILE, YOURS), lambda v: BACK.loads((NOTHING, NOTHING)))
            ),
        ),
        BACK.reads_all((FILE, YOURS), lambda v: BACK.loads((max(v), max(v)))),
        BACK.reads_all((FILE, YOURS), lambda v: BACK.loads((v[1], v[0]))),
    ],
    ids=["it alone", "and one piece", "and the other", "on this way", "the newest", "crossed"],
)
def test_a_pointer_alone_is_no_piece(restart: Process) -> None:
    """Of each rank a piece is read, on the very way to the load, that is of what it loads.

    Rank 1 is never waited for, so all of these tear; a restart that reads each rank's piece is
    told so.
    """
    torn = pipeline(
        actors={
            "rank 0": ONE >> ME.replaces(LATEST, 1) >> STOP,
            "rank 1": YOU.replaces(YOURS, 1) >> STOP,
        },
        servers=(FILE, YOURS, LATEST),
        restart=restart,
        claims=(Claim("when it moves", "syncs the name of", "latest"),),
    )
    with pytest.raises(
        ValueError, match=r"found that for rank [01], whose piece is in (file|your)"
    ):
        compose(torn, torn.claims[0])
    honest = replace(torn, restart=BACK.reads_all((FILE, YOURS), BACK.loads))
    assert {tear.kind for tear in attack(honest, honest.claims[0]).tears} == {"mixed"}


def test_one_piece_for_all_and_a_log_that_nothing_reads_are_sound() -> None:
    """Rank 0 saves one model for both; what is no piece is asked of nobody, and named."""
    whole, log = Place("whole", ranks=(0, 1)), Place("log")
    saves = ME.replaces(whole, 1) >> ME.puts(log, 1) >> ME.does("saved", 1)
    both = pipeline(
        actors={"rank 0": saves >> STOP},
        servers=(whole, log),
        restart=BACK.reads(whole, lambda v: BACK.loads((v, v))),
    )
    assert attack(both, both.claims[0]).sound
    assert unread(both) == ("log",)


def test_a_piece_is_said_to_be_one() -> None:
    """Of a rank whose piece is nowhere nothing could be found; and ranks are numbers."""
    bare = pipeline(servers=(Place("file"),))
    with pytest.raises(ValueError, match=r"piece of rank 0\. What to do: .*ranks=\(0,\)\)"):
        compose(bare, bare.claims[0])
    with pytest.raises(TypeError, match=r"file: give the ranks .*, not \(-1,\)"):
        Place("file", ranks=(-1,))


def vocabulary() -> set[str]:
    """What is done by methods of actors and restarts, by kernels, and by a crash."""
    given = {"place": FILE, "barrier": Barrier("met", ("rank 0",)), "mail": Mail("m"), "epoch": 1}
    found = {KILLED.does, POWER.does}
    for name, method in vars(Actor).items():
        if isfunction(method) and name not in ("does", "__init__"):
            made = method(ME, *(given[p] for p in list(signature(method).parameters)[1:]))
            found |= {e.does for e in (made if isinstance(made, Steps) else (made,))}
    for state in (Held(seen=1, kept=1), Held(seen=1), Held(seen=1, whole=False)):
        found |= {word for word, _ in FILE.lazily(state)}
    ends = BACK.reads(FILE, lambda v: BACK.loads((v,)) if v else BACK.refuses())
    for row in automaton(ends).edges:
        found |= {event.does for event, _ in row if isinstance(event, Event)}
    return found


def test_no_actor_does_by_itself_what_is_a_word_already() -> None:
    """A rank that "loads" a batch would be taken for a restart's load, or wait for it for ever."""
    assert vocabulary() == WORDS
    for word in WORDS:
        with pytest.raises(
            ValueError, match=rf"test_pipeline\.py, line \d+: rank 0 can't .*{word}"
        ):
            ME.does(word, 1)


def test_a_claim_is_of_what_actors_do() -> None:
    """Not of what the restart reads and loads once all is over."""
    for word in ("reads", "loads"):
        with pytest.raises(ValueError, match=f"no actor ever {word}"):
            compose(pipeline(), Claim("", word))


@pytest.mark.parametrize("epoch", [-1, 0, 2])
def test_an_epoch_that_is_none_is_refused(epoch: int) -> None:
    """It would never be loaded, and its claim never be judged; or be torn bytes, or nothing."""
    broken = pipeline(actors={"rank 0": ONE >> ME.does("saved", epoch) >> STOP})
    with pytest.raises(ValueError, match=rf"rank 0 saved for epoch {epoch}; epochs are 1 to 1\."):
        compose(broken, broken.claims[0])


def test_names_that_do_not_fit_are_refused() -> None:
    """Who acts by another's name, a barrier that waits for nobody, or who is not awaited."""
    you, met = Actor("rank 1"), Barrier("met", ("rank 0",))
    saves = ME.does("saved", 1)
    for actors, barrier, words in (
        ({"rank 0": you.does("saved", 1) >> STOP}, met, "is done by actors..rank 0..."),
        ({"rank 0": saves >> STOP}, Barrier("met", ("rank 2",)), "met waits for rank 2"),
        (
            {"rank 0": saves >> ME.arrives(met, 1) >> STOP, "rank 1": you.meets(met, 1) >> STOP},
            met,
            "rank 1 arrives at met, and is no member of it",
        ),
    ):
        broken = pipeline(actors=actors, servers=(FILE, barrier))
        with pytest.raises(ValueError, match=words):
            compose(broken, broken.claims[0])


def test_epochs_without_end_are_refused() -> None:
    """A rank that saves for ever has too many states, and is told what to do."""

    @process
    def forever(epoch: int) -> Process:
        return ME.does("saved", epoch) >> forever(epoch + 1)

    with pytest.raises(ValueError, match="bound its epochs"):
        compose(pipeline(actors={"rank 0": forever(1)}), instants(pipeline())[0])


def test_events_read_as_sentences() -> None:
    """What a person is shown."""
    assert str(ME.puts(FILE, 2)) == "rank 0 puts file (epoch 2)"
    assert str(Event("the restart", "reads", "file", TORN)) == (
        "the restart reads file and finds a torn piece"
    )
    loads = BACK.loads((2, NOTHING))
    assert isinstance(loads, Prefix)
    assert str(loads.event) == "the restart loads rank 0: epoch 2, rank 1: nothing"
