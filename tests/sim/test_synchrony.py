"""Partial synchrony: once messages arrive in time all know within the bound, and no later."""

import json

import pytest
from click.testing import CliRunner

from handfast.cli.main import app
from handfast.core.membership import Configuration, Domain
from handfast.sim.scale import job
from handfast.sim.synchrony import PATIENCE, Synchronous, Timed
from mutants import MUTANTS

TICK_US, DELAY_US = 1_000_000, 30_000


def run(size: int, fanout: int, **how: int) -> tuple[Timed, Timed]:
    """An epoch, and the recovery after it."""
    world = Synchronous(
        job(size, fanout=fanout), delay_us=DELAY_US, tick_us=TICK_US, check_us=200_000,
        accept_us=100_000, **how,
    )  # fmt: skip
    return world.converge(), world.restore()


@pytest.mark.parametrize("fanout", [1, 2, 8], ids=["gossip", "deep tree", "flat tree"])
@pytest.mark.parametrize("size", [2, 10, 17])
def test_all_know_within_the_bound(size: int, fanout: int) -> None:
    """Whatever the storm swallowed or kept for later, and whoever came back in it."""
    took = 0
    for seed in range(3):
        for timed in run(size, fanout, back=min(seed, size - 1), bad=seed, seed=seed):
            assert timed.took_us <= timed.bound_us, seed
            took = max(took, timed.took_us)
    assert took > 0


@pytest.mark.parametrize("fanout", [1, 2], ids=["gossip", "tree"])
@pytest.mark.parametrize("size", [2, 9, 17])
def test_the_bound_of_an_epoch_is_reached(size: int, fanout: int) -> None:
    """Shows that it is no slack one: the worst schedule takes all of it, to a hundredth or two."""
    epoch, recovery = run(size, fanout, worst=True)
    assert 0.97 * epoch.bound_us < epoch.took_us <= epoch.bound_us
    assert recovery.took_us <= recovery.bound_us


@pytest.mark.parametrize(("bad", "base"), [(0, "1/20"), (1, "1/10"), (2, "0/0")])
def test_a_recovery_that_descends_keeps_its_bound(bad: int, base: str) -> None:
    """Each candidate that turns out to be damaged costs another reading, and another way round."""
    for size in (2, 10):
        world = Synchronous(
            job(size), delay_us=DELAY_US, tick_us=TICK_US, check_us=3_000_000, bad=bad, worst=True
        )
        world.converge()
        timed = world.restore()
        assert timed.took_us <= timed.bound_us
        assert {str(m.restored.base) for m in world.members if m.restored} == {base}


def test_the_bounds_are_those_of_one_tier() -> None:
    """Between the heads of two a certificate goes a link more."""
    domains = tuple(Domain(f"{tier}{i}", tier, i) for tier in ("dir", "mem") for i in (0, 1))
    two = Configuration("run", 2, domains, (("dir", 1), ("mem", 1)))
    with pytest.raises(ValueError, match="one tier"):
        Synchronous(two, delay_us=1, tick_us=1)


def test_hops_cost_gossip_ticks_and_a_tree_delays() -> None:
    """Shows what the two bounds say of a job whose members are two and more links apart."""
    (gossip, _), (tree, _) = run(17, 1, worst=True), run(17, 2, worst=True)
    assert gossip.bound_us == 2 * (TICK_US + DELAY_US)
    assert tree.bound_us == TICK_US + 2 * 4 * DELAY_US


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("back", [0, 1])
def test_a_recovery_costs_three_ways_round_and_what_is_read(bad: int, back: int) -> None:
    """The bound is what the page says of it, to the microsecond, and no larger one."""
    for size, diameter in ((2, 1), (10, 2), (17, 2)):
        (_, recovery) = run(size, 1, bad=bad, back=back)
        way = diameter * (TICK_US + DELAY_US)
        read = (1 + bad) * 200_000
        assert recovery.bound_us == (3 + bad) * way + read + 100_000 + back * DELAY_US


@pytest.mark.parametrize(
    ("name", "fanout"), [("never_sends_again", 1), ("trusts_that_the_tree_holds", 2)]
)
def test_who_never_says_it_again_breaks_the_bound(
    name: str, fanout: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the measure has teeth, and does not wait for ever."""
    (fault,) = (mutant for mutant in MUTANTS if mutant.name == name)
    fault.plant(monkeypatch)
    world = Synchronous(
        job(5, fanout=fanout), delay_us=DELAY_US, tick_us=TICK_US, worst=True, seed=1
    )
    timed = world.converge()
    assert timed.took_us > timed.bound_us
    assert timed.took_us < (PATIENCE + 2) * TICK_US


def test_the_command_holds_the_bounds() -> None:
    """Shows that anybody can measure it, and under which conditions it is said."""
    command = ["simulate", "--synchrony", "3,10"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0
    assert "Nothing is promised without these" in " ".join(shown.output.split())
    assert shown.output.endswith("every bound held\n")
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert (told["delay_s"], told["tick_s"], told["sound"]) == (0.02, 2.0, True)
    assert [(r["way"], r["domains"]) for r in told["rows"][::2]] == [
        ("tree", 3), ("tree", 10), ("gossip", 3), ("gossip", 10),
    ]  # fmt: skip
    assert all(row["worst_s"] <= row["bound_s"] for row in told["rows"])
    assert CliRunner().invoke(app, ["simulate", "--synchrony", "1"]).exit_code == 2


def test_the_command_tells_of_a_bound_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that it is said which one, and that the exit code is 1."""
    (fault,) = (mutant for mutant in MUTANTS if mutant.name == "never_sends_again")
    fault.plant(monkeypatch)
    told = CliRunner().invoke(app, ["simulate", "--synchrony", "3"])
    assert told.exit_code == 1
    assert "broken: gossip, 3 domains, an epoch converges: later than its bound" in told.output
    assert "every bound held" not in told.output
