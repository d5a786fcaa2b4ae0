"""Shows that no frame is read under another epoch, in every state of two ends; and what would break
it: each wrong link is found by the search."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from handfast.errors import Refused
from handfast.link import switch
from handfast.link.frame import LinkError
from handfast.model.explore import explore
from handfast.model.link import End, Frame, Link, State, calm, talking
from handfast.model.rollouts import PLAN, search_link

GOALS: dict[str, Callable[[State], bool]] = {
    "both took the new epoch": lambda s: talking(s) and s.ends[0].step == 1,
    "an old frame is under way when both are new": lambda s: (
        talking(s) and s.ends[0].step == 1 and any(f.step == 0 for f in s.frames)
    ),
    "one end sends new, the other old": lambda s: any(
        s.ends[i].switch is not None
        and s.ends[i].switch.next is not None
        and s.ends[i].switch.sending == s.ends[i].switch.next.epoch
        and s.ends[1 - i].switch is not None
        and s.ends[1 - i].switch.sending != s.ends[i].switch.sending
        for i in (0, 1)
    ),
}


def real(plan: tuple[tuple[int, str], ...] = PLAN, **bounds: Any) -> Link:
    """The decisions of the fleet's links, as they are."""
    return Link(switch, plan, refused=(LinkError, Refused), **bounds)


def altered(**wrong: Any) -> Any:
    """The real decisions, but for some."""
    return SimpleNamespace(**{**vars(switch), **wrong})


@pytest.mark.parametrize(
    ("plan", "bounds", "states", "depth"),
    [
        pytest.param(PLAN, {"lives": (1, 1)}, 1_892, 32, id="upgrade and rollback"),
        pytest.param(PLAN[:2], {"lives": (2, 1), "alone": True}, 28_068, 30, id="crash"),
        pytest.param(
            PLAN, {"lives": (2, 1), "alone": True}, 226_226, 43, id="all",
            marks=pytest.mark.heavy,
        ),
    ],
)  # fmt: skip
def test_no_frame_is_read_under_another_epoch(
    plan: tuple[tuple[int, str], ...], bounds: Any, states: int, depth: int
) -> None:
    """Every state: loss, doubling, any order, crashes, single stacks, and data that is given up."""
    found = search_link(real(plan, **bounds), GOALS)
    assert found.exhaustive
    assert found.sound, found.breaches or found.unmet
    assert (found.states, found.depth) == (states, depth)


def test_after_a_rollback_both_speak_the_old_bits_under_a_new_number() -> None:
    """Within one session, and nothing that was sent under the first number is read."""
    goal = {"back": lambda s: talking(s) and s.ends[0].step == 2 and s.ends[0].life == 1}
    assert search_link(real(lives=(1, 1)), goal).sound


@pytest.mark.parametrize(
    ("plan", "bounds"),
    [
        pytest.param(PLAN, {"lives": (1, 1)}, id="upgrade and rollback"),
        pytest.param(PLAN[:2], {"lives": (2, 1), "alone": True}, id="crash"),
        pytest.param(PLAN, {"lives": (2, 1), "alone": True}, id="all", marks=pytest.mark.heavy),
    ],
)
def test_whatever_happened_they_can_talk_again(
    plan: tuple[tuple[int, str], ...], bounds: Any
) -> None:
    """From every state, by moves that need no fault; or no epoch is left that both speak."""

    def apart(state: State) -> bool:
        return any(end.step < 0 for end in state.ends) and not (
            set(state.ends[0].disk) & set(state.ends[1].disk)
        )

    found = explore(
        real(plan, **bounds),
        eventually={"talking": lambda s: talking(s) or apart(s)},
        calm=calm,
    )
    assert found.sound, found.breaches[0].trace.labels


class ConnectOnly(Link):
    """The version is checked when a link comes up, and never again."""

    def reads(self, end: End, frame: Frame) -> int | None:
        return None if end.switch is None else end.step


class Volatile(Link):
    """The counter is used before it is durable: a crash takes it back."""

    def number(self, end: End) -> int:
        return end.number


class Stale(Link):
    """A session that ends offers what it offered before, and not what its disk says by now."""

    def _ends(self, state: State, who: int) -> Any:
        for label, after in super()._ends(state, who):
            ends = list(after.ends)
            ends[who] = ends[who]._replace(offer=state.ends[who].offer)
            yield label, after._replace(ends=tuple(ends))


def may_turn_alone(state: switch.Switch) -> bool:
    """Send the new epoch once one's own ACCEPT_BOTH is durable, whatever the peer's is."""
    return state.next is not None and state.durable and state.sending != state.next.epoch


def says_early(state: switch.Switch) -> switch.Word:
    """Say ACCEPT_BOTH before it is durable."""
    word = switch.says(state)
    return replace(word, next=state.next, number=word.number + (state.next is not None))


def may_close_alone(state: switch.Switch, settled: int) -> bool:
    """Take nothing old any more once one's own end has turned."""
    return state.next is not None and state.sending == state.next.epoch


def ask_any(state: switch.Switch, to: switch.Spoken) -> switch.Switch:
    """Take a number again."""
    if state.next is not None or switch.phase(state) is switch.Phase.NEW:
        raise Refused("not yet", verdict=None)
    return replace(state, next=to, durable=False)


def hear_any(state: switch.Switch, word: switch.Word) -> switch.Switch:
    """Take a number again from a peer, too."""
    held = state.peer
    new = held is None or word.number > held.number
    return replace(state, peer=word) if new else state


REUSED = ((1, "a"), (2, "b"), (1, "a"))
REFUSED = (LinkError, Refused)
WRONG: dict[str, tuple[Callable[[], Link], str]] = {
    "version checked only at connect": (
        lambda: ConnectOnly(switch, PLAN[:2], refused=REFUSED), "f10",
    ),
    "epoch number reused at rollback": (
        lambda: Link(
            altered(ask=ask_any, hear=hear_any), REUSED, lives=(1, 1), refused=REFUSED
        ),
        "f10",
    ),
    "session without durable incarnation": (
        lambda: Volatile(switch, PLAN[:2], lives=(2, 2), refused=REFUSED), "own",
    ),
    "send-new before the peer's durable accept-both": (
        lambda: Link(altered(may_turn=may_turn_alone), PLAN[:2], refused=REFUSED), "promised",
    ),
    "accept-both said before it is durable": (
        lambda: Link(altered(says=says_early), PLAN[:2], refused=REFUSED), "promised",
    ),
    "new-only before the peer's last old frame": (
        lambda: Link(altered(may_close=may_close_alone), PLAN[:2], refused=REFUSED), "promised",
    ),
    "a new session offers what the disk does not say": (
        lambda: Stale(switch, PLAN[:2], refused=REFUSED), "promised",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_link_is_found(name: str) -> None:
    """With the law that it breaks, by a shortest way."""
    build, law = WRONG[name]
    link = build()
    found = explore(link, always={law: getattr(link, law)})
    assert found.breaches, found.states
    print(f"\n{name}: {law}, {len(found.breaches[0].trace)} moves, {found.states:,} states")


def test_a_number_that_was_used_is_refused_by_both_ends() -> None:
    """The same plan with the real decisions: the rollback never begins."""
    found = search_link(real(REUSED, lives=(1, 1)))
    assert found.sound
    never = {"back": lambda s: any(end.step == 2 for end in s.ends)}
    assert search_link(real(REUSED, lives=(1, 1)), never).unmet == ("back",)
