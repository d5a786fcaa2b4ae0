"""Show that the search finds each wrong protocol, by a named law and with a shortest trace.

The traces are kept in `golden/`; after a change that is meant, `--rewrite` writes them anew. Only
commit them if you understand what changed them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from handfast.core.retain import Keep
from handfast.model.place import Bounds
from handfast.model.scenarios import SCENARIOS, Found, Launch, Scenario, search
from mutants import MUTANTS, Mutant

GOLDEN = Path(__file__).parent / "golden"

BY_STORMS = {
    "puts_copies_of_a_run_together", "blames_nobody", "waits_ever_longer_to_say_it_again",
    "rolls_up_what_a_block_lacks", "counts_a_block_twice", "takes_a_block_of_another_generation",
    "rolls_up_the_epoch_before_with_this_one", "rolls_up_a_skip_as_if_it_were_a_vote",
    "keeps_a_block_under_another_root", "speaks_to_one_neighbour_beside_the_tree",
    "takes_an_heir_for_a_past_life",
}  # fmt: skip
"""What needs a larger world than is searched: copies of a whole run, a member that is away for
good, a long storm and a count of exchanges after it, a member of two lives that is fenced, and a
tree of four with a SKIP, two epochs, two rounds, or two members away. Storms catch them:
`tests/property/test_mutants.py`."""

SEARCHED = {
    "votes_before_the_sync": "window",
    "forgets_its_acceptance": "crash",
    "skips_after_a_freeze": "late",
    "forgoes_for_a_past_generation": "late",
    "forgets_what_had_converged": "window",
    "calls_a_damaged_copy_valid": "rot",
    "knows_from_its_own_edges": "path",
    "counts_one_copy_where_two_are_promised": "both",
    "lets_a_restore_certify_every_tier": "tiers",
    "takes_words_of_a_past_incarnation": "any order crash",
    "takes_words_of_a_past_generation": "stale",
    "takes_words_of_another_round": "tie",
    "lets_one_bad_copy_refute": "either",
    "keeps_the_last_k_without_a_certificate": "crash",
    "overlooks_pins": "pins",
    "releases_as_soon_as_it_boots": "reader",
    "lets_skipped_epochs_fill_the_window": "retry",
    "lets_tries_that_nobody_will_join_fill_the_window": "passed by",
    "admits_what_is_beyond_the_window": "window",
    "saves_a_step_again": "again",
    "saves_what_it_was_restored_from": "resaved",
    "refuses_a_skip_for_a_full_window": "forgone",
    "tells_a_trainer_that_begins_again_nothing": "again",
    "lets_a_round_begin_that_is_past_in_silence": "overlap",
    "keeps_to_itself_that_others_are_beyond": "overlap",
    "writes_what_it_knows_once_more": "again",
    "never_trusts_again_what_was_bad_once": "misread",
    "skips_after_a_timeout": "network",
    "never_sends_again": "window",
    "never_falls_silent": "path",
    "keeps_its_identity_with_an_empty_disk": "crash",
    "judges_a_copy_again_in_a_new_life": "crash",
    "accepts_again_in_a_new_life": "crash",
    "forgets_its_freezes_in_a_crash": "crash",
    "takes_saves_of_a_past_generation": "overlap",
    "restores_without_every_report": "change",
    "releases_on_the_certificate_of_an_orphan": "orphans",
    "releases_below_its_own_vote": "window",
    "releases_below_what_a_neighbour_has": "path",
    "rolls_up_without_its_own_vote": "tree of four",
    "rolls_up_the_second_half_first": "tree",
    "trusts_that_the_tree_holds": "tree",
    "skips_for_a_cadence": "window",
    "publishes_what_it_refuses": "window",
    "takes_a_change_in_the_middle_of_a_restore": "change",
    "votes_before_its_first_freeze_is_written": "window",
    "counts_on_what_is_lost": "loss",
}
"""Where each is looked for: the smallest scenario that shows it; else one domain's "rollback"."""


def wider(name: str, bounds: Bounds, **wishes: Any) -> Scenario:
    """A scenario with bounds in which it has too many states to be searched to its end."""
    wide = replace(SCENARIOS[name], name=f"{name}, wider", bounds=bounds, **wishes)
    return replace(wide, soup=True, alike=False)


WIDER = {
    "forgets_the_certificates_of_others":
        wider("crash", Bounds(), keep=Keep(2), launches=(Launch(), Launch(want=0), Launch())),
    "keeps_torn_saves_as_history":
        wider("window", Bounds(epochs=4, failures=1), keep=Keep(2), window=2),
    "admits_whatever_was_passed_by": wider("window", Bounds(epochs=6, crashes=1)),
    "keeps_the_chain_of_bases_in_its_own_journal_alone":
        wider("change", Bounds(epochs=2, changes=1), keep=Keep(2),
              launches=(Launch(), Launch(want=1), Launch(changed=True))),
}  # fmt: skip
"""What is found over a soup, where a wrong protocol shows long before the whole is searched."""

SLOW = {"lets_one_bad_copy_refute", "admits_whatever_was_passed_by"}


def scenario(fault: Mutant) -> Scenario:
    return WIDER.get(fault.name) or SCENARIOS[SEARCHED.get(fault.name, "rollback")]


def hunt(fault: Mutant) -> Found:
    """Search the scenario in which a fault shows, with the fault planted."""
    with pytest.MonkeyPatch.context() as patch:
        fault.plant(patch)
        return search(scenario(fault))


def told(found: Found) -> str:
    """Write down what a search found, one line a move."""
    return "\n".join((f"{found.scenario}: {found.breach}", *found.story, ""))


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=fault.name, marks=[pytest.mark.heavy] * (fault.name in SLOW))
        for fault in MUTANTS
        if fault.name not in BY_STORMS
    ],
)
def test_a_wrong_protocol_is_found(fault: Mutant, request: pytest.FixtureRequest) -> None:
    """By a law that forbids it, after the shortest story there is; and the right one is not."""
    found = hunt(fault)
    laws = {word.split("_")[0] for word in found.breach.partition(":")[0].split()}
    assert laws & fault.laws, found.breach
    golden = GOLDEN / f"{fault.name}.txt"
    if request.config.getoption("--rewrite"):
        golden.write_text(told(found))
    assert told(found) == golden.read_text()


def test_there_are_as_many_stories_as_wrong_protocols() -> None:
    """At least thirty are found by search, the few others by storms, and no story is left over."""
    names = {fault.name for fault in MUTANTS}
    assert names >= {*SEARCHED, *WIDER, *BY_STORMS}
    assert {path.stem for path in GOLDEN.glob("*.txt")} == names - BY_STORMS
    assert len(names - BY_STORMS) >= 30


ADMISSION = {
    "takes_words_of_a_past_incarnation", "takes_words_of_a_past_generation",
    "takes_words_of_another_round", "keeps_to_itself_that_others_are_beyond",
}  # fmt: skip
"""Over a soup only words of the own round are heard: that the others are refused is what the exact
network shows, and S10 of each step."""

SENDING = {"never_sends_again", "never_falls_silent"}
"""Over a soup nothing needs to be sent."""


def seen_over_a_soup() -> Iterator[Mutant]:
    for fault in MUTANTS:
        if fault.name not in BY_STORMS | SLOW | ADMISSION | SENDING | {*WIDER}:
            where = scenario(fault)
            if len(where.job.domains) > 1 and not (where.job.fanout or where.bounds.declines):
                yield fault


@pytest.mark.parametrize("fault", [*seen_over_a_soup()], ids=lambda fault: fault.name)
def test_a_wrong_protocol_is_found_over_a_soup_as_well(fault: Mutant) -> None:
    """So what the soup forgets is nothing that a law needs; what it can't see is listed above. Only
    faults that show among two or three, who hear each other."""
    with pytest.MonkeyPatch.context() as patch:
        fault.plant(patch)
        found = search(replace(scenario(fault), soup=True, links=None, stale=False, ordered=True))
    laws = {word.split("_")[0] for word in found.breach.partition(":")[0].split()}
    assert laws & fault.laws, found.breach


@pytest.mark.heavy
def test_the_table_of_wrong_protocols() -> None:
    """Prints each fault, the law that it breaks, the length of its story, and where it is found."""
    print()
    for fault in MUTANTS:
        if fault.name in BY_STORMS:
            print(f"{fault.name:50} {'/'.join(sorted(fault.laws)):12}     -           - storms")
            continue
        found = hunt(fault)
        law = found.breach.partition(":")[0].split("_")[0]
        print(f"{fault.name:50} {law:12} {len(found.story):5} {found.states:>11,} {found.scenario}")
