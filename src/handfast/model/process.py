"""A small algebra of processes: what they are, and which event leads from each to which.

A part of C. A. R. Hoare's CSP (*Communicating Sequential Processes*, 1985): prefix, choice,
parallel composition, interleaving, hiding, catastrophe and recursion. What a term can do is given
by rules over its shape, the structural operational semantics of A. W. Roscoe (*The Theory and
Practice of Concurrency*, 1997, chapter 7); each ``moves`` below is one operator's rules. Left out,
because nothing here needs them: termination and sequencing, renaming, and divergence.

Terms are frozen, hashable values. An event is any hashable value but :data:`TAU`. Recursion is by
name: a function that is decorated with :func:`process` gives a term that stands for its body, and
the body is asked for only when the term must move. So a recursive process is a finite value, and
has finitely many states wherever its arguments are finitely many.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from enum import Enum
from functools import lru_cache, reduce
from textwrap import shorten
from typing import Final, ParamSpec, TypeAlias

import msgspec

__all__ = [
    "STOP",
    "TAU",
    "Choice",
    "Hidden",
    "Interrupted",
    "Moves",
    "Named",
    "Parallel",
    "Prefix",
    "Process",
    "Silent",
    "Stop",
    "Undecided",
    "choice",
    "interleave",
    "process",
    "transitions",
]


class Silent(Enum):
    """What nobody outside a process can see, nor refuse."""

    TAU = "τ"


TAU: Final = Silent.TAU
Moves: TypeAlias = "tuple[tuple[Hashable, Process], ...]"
P = ParamSpec("P")


class Process(msgspec.Struct, frozen=True, cache_hash=True):
    """A term. ``p | q`` is external choice."""

    def moves(self) -> Moves:
        """Give each event that is possible now with the term that it leads to, in a fixed order.

        Each operator has rules of its own; a bare Process is no term.
        """
        raise NotImplementedError(f"{type(self).__name__} has no rules")

    def __or__(self, other: Process) -> Choice:
        return Choice((self, other))


@lru_cache(maxsize=1 << 16)
def transitions(term: Process) -> Moves:
    """Give what a term can do: (event, term) pairs, each once.

    Raises ValueError where recursion comes back to itself without an event: such a term says
    nothing of what it does (Hoare's condition that recursion be guarded, 1985, chapter 1).
    """
    try:
        return tuple(dict.fromkeys(term.moves()))
    except RecursionError:
        raise ValueError(
            "a process calls itself before its first event: put an event before the call"
        ) from None


class Stop(Process, frozen=True, cache_hash=True):
    """Does nothing more: Hoare's STOP."""

    def moves(self) -> Moves:
        """No rule."""
        return ()


STOP: Final = Stop()


class Prefix(Process, frozen=True, cache_hash=True):
    """``a -> P``: the event first."""

    event: Hashable
    after: Process

    def moves(self) -> Moves:
        """(a -> P) --a--> P."""
        return ((self.event, self.after),)


class Choice(Process, frozen=True, cache_hash=True):
    """``P [] Q``, of any number: whoever is outside chooses, by the first event that it sees."""

    options: tuple[Process, ...]

    def moves(self) -> Moves:
        """A visible event drops the other options; a silent one keeps them."""
        before, after = self.options[:0], self.options
        found: list[tuple[Hashable, Process]] = []
        for option in self.options:
            after = after[1:]
            found += [
                (a, Choice((*before, p, *after)) if a is TAU else p) for a, p in transitions(option)
            ]
            before = (*before, option)
        return tuple(found)


class Undecided(Process, frozen=True, cache_hash=True):
    """``P |~| Q``: the process itself chooses, unseen."""

    left: Process
    right: Process

    def moves(self) -> Moves:
        """(P |~| Q) --tau--> P, and Q."""
        return ((TAU, self.left), (TAU, self.right))


class Parallel(Process, frozen=True, cache_hash=True):
    """``P [| A |] Q``: events in A happen in both at once or not at all, all others in one."""

    left: Process
    right: Process
    shared: frozenset[Hashable] = frozenset()

    def moves(self) -> Moves:
        """Events outside A (and silent ones) of either side; those in A of both."""
        left, right, shared = self.left, self.right, self.shared
        both = tuple(
            (a, Parallel(p, q, shared))
            for a, p in transitions(left)
            if a in shared
            for b, q in transitions(right)
            if a == b
        )
        return (
            *((a, Parallel(p, right, shared)) for a, p in transitions(left) if a not in shared),
            *((a, Parallel(left, q, shared)) for a, q in transitions(right) if a not in shared),
            *both,
        )


class Hidden(Process, frozen=True, cache_hash=True):
    """``P \\ A``: the events in A happen as soon as they can, and are not seen."""

    inside: Process
    events: frozenset[Hashable]

    def moves(self) -> Moves:
        """An event in A becomes silent."""
        events = self.events
        return tuple(
            (TAU if a in events else a, Hidden(p, events)) for a, p in transitions(self.inside)
        )


class Interrupted(Process, frozen=True, cache_hash=True):
    """``P /\\ Q``: P, until the first event of Q, and then Q for ever.

    With a crash as Q's first event it is Hoare's catastrophe (1985, chapter 5).
    """

    inside: Process
    by: Process

    def moves(self) -> Moves:
        """P's events keep Q at the ready; a visible event of Q drops P."""
        inside, by = self.inside, self.by
        return (
            *((a, Interrupted(p, by)) for a, p in transitions(inside)),
            *((a, Interrupted(inside, q) if a is TAU else q) for a, q in transitions(by)),
        )


class Named(Process, frozen=True, cache_hash=True):
    """The body of a definition with these arguments; made by :func:`process`."""

    body: Callable[..., Process]
    arguments: tuple[Hashable, ...]

    def moves(self) -> Moves:
        """Those of the body: N(x) --a--> P where its body does.

        Raises TypeError for a body that gives no process.
        """
        term = self.body(*self.arguments)
        if not isinstance(term, Process):
            raise TypeError(f"{self.body.__name__}{self.arguments} gives {shorten(repr(term), 60)}")
        return transitions(term)


def process(body: Callable[P, Process]) -> Callable[P, Process]:
    """Make a function that gives a term into a definition, which may call itself.

    The arguments must be hashable and given by position: they tell its states apart.
    """

    def call(*arguments: P.args, **more: P.kwargs) -> Process:
        if more:
            raise TypeError(f"{body.__name__}: give the arguments by position")
        return Named(body, arguments)

    return call


def choice(*options: Process) -> Process:
    """Give the external choice of any number of terms; of none it is STOP."""
    return Choice(options) if options else STOP


def interleave(*terms: Process) -> Process:
    """Compose terms that share no event: ``P ||| Q``. Of none it is STOP."""
    return reduce(Parallel, terms) if terms else STOP
