"""The demo while it runs: a live picture on a terminal, plain lines in a pipe."""

from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from handfast.demo.events import Event
from handfast.demo.result import Kill, Resume

__all__ = ["Picture", "PlainLines", "Stage", "told"]

_LINES = 8
_GOOD = {"newest": "green", "first": "green", "older": "yellow", "unseen": "dim"}


class Stage(Protocol):
    """Where the demo plays: told what begins, and then all that happens."""

    def begin(self, title: str, steps: int) -> None:
        """A run of so many steps begins."""

    def note(self, words: str) -> None:
        """Something worth a line."""

    def event(self, event: Event) -> None:
        """A rank told something."""

    def kill(self, kill: Kill) -> None:
        """A strike fell."""

    def resume(self, resume: Resume) -> None:
        """A start has resumed, or failed to."""


def told(happened: Kill | Resume) -> str:
    """A kill or a resume in words."""
    if isinstance(happened, Kill):
        whom = {"job": "the whole job", "agent": "both agents", "node": "ranks and agents"}
        name = whom.get(happened.target, f"rank {happened.rank}")
        under = ", under torchrun" if happened.torchrun else ""
        return f"SIGKILL to {name} at step {happened.step} ({happened.phase}{under})"
    if happened.outcome == "unseen":
        return "killed before it had resumed"
    if happened.outcome == "error":
        return f"could not resume: {happened.detail}"
    if happened.outcome == "mixture":
        return f"resumed a MIXTURE: {happened.detail}"
    if happened.outcome == "abandoned":
        return f"resumed an ABANDONED timeline: {happened.detail}"
    if happened.outcome == "first":
        return "first start"
    exact = ", bit for bit" if happened.exact else ""
    return f"resumed step {happened.step} ({happened.outcome}{exact})"


class PlainLines:
    """One line for what matters, none that overwrites another."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._every = 1
        self._next = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing is held."""

    def begin(self, title: str, steps: int) -> None:
        """Name the run; its steps are told in tenths."""
        self._every = max(1, steps // 10)
        self._next = self._every
        self.note(title)

    def note(self, words: str) -> None:
        """One line."""
        self._console.print(words, markup=False, highlight=False, soft_wrap=True)

    def event(self, event: Event) -> None:
        """A line every tenth of the way."""
        if event.kind == "step" and event.rank == 0 and event.step >= self._next:
            self._next = event.step - event.step % self._every + self._every
            self.note(f"  step {event.step:4}  loss {event.loss:.3f}")

    def kill(self, kill: Kill) -> None:
        """A line."""
        self.note(f"  {told(kill)}")

    def resume(self, resume: Resume) -> None:
        """A line."""
        self.note(f"  {told(resume)}")


class Picture:
    """Progress, loss, the lattice by domain, the converged line, and the last kills."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._title = ""
        self._steps = 1
        self._step = 0
        self._loss = 0.0
        self._kills = 0
        self._domains: dict[str, tuple[tuple[int, int], ...]] = {}
        self._line = (0, 0)
        # Drawn in a thread of the live display: what it reads is replaced whole, never changed.
        self._said: tuple[Text, ...] = ()
        self._live = Live(
            console=console, get_renderable=self._draw, refresh_per_second=8, transient=True
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def begin(self, title: str, steps: int) -> None:
        """Clear the stage for another run."""
        self._title, self._steps, self._step, self._kills = title, steps, 0, 0
        self._domains, self._line = {}, (0, 0)
        self._said = ()

    def note(self, words: str) -> None:
        """A line that stays, above the picture."""
        self._console.print(words, markup=False, highlight=False)

    def event(self, event: Event) -> None:
        """Take what the picture shows."""
        if event.kind == "step" and event.rank == 0:
            self._step, self._loss = event.step, event.loss or 0.0
        elif event.kind == "lattice":
            own = event.domains.get(str(event.rank))
            if own:
                self._domains = {**self._domains, str(event.rank): own}
            self._line = max(self._line, event.line)

    def kill(self, kill: Kill) -> None:
        """A line among the last ones."""
        self._kills += 1
        self._say(Text(f"{self._kills:3}  {told(kill)}", style="red"))

    def resume(self, resume: Resume) -> None:
        """A line among the last ones."""
        style = _GOOD.get(resume.outcome, "bold magenta")
        self._say(Text(f"     {told(resume)}", style=style))

    def _say(self, line: Text) -> None:
        self._said = (*self._said, line)[-_LINES:]

    def _draw(self) -> RenderableType:
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(self._title, style="bold"),
            ProgressBar(total=self._steps, completed=self._step, width=30),
            Text(f"step {self._step}/{self._steps}"),
            Text(f"loss {self._loss:.3f}"),
            Text(f"{self._kills} kills", style="red" if self._kills else "dim"),
        )
        parts: list[RenderableType] = [Text(), head]
        if self._domains:
            parts.append(self._lattice())
        return Group(*parts, *self._said)

    def _lattice(self) -> Table:
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for word in ("domain", "staged", "persisted", "certified"):
            table.add_column(word)
        for domain, epochs in sorted(self._domains.items()):
            cells = [Text(f"{generation}/{step}") for generation, step in epochs]
            cells[-1].stylize("green")
            table.add_row(f"rank {domain}", *cells)
        generation, step = self._line
        table.add_row("converged", "", "", Text(f"{generation}/{step}", style="bold green"))
        return table
