"""One self-contained page that shows what the demo found: no script, no font, no link outwards."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape

from handfast.demo import pictures
from handfast.demo.pictures import NARROW, WIDE
from handfast.demo.result import Curve, DemoResult, Kill, Resume, Tally
from handfast.demo.style import CSS

__all__ = ["render"]

OUTCOMES = {
    "newest": "the newest checkpoint",
    "older": "an older one",
    "scratch": "nothing: all was lost in silence",
    "abandoned": "an abandoned timeline",
    "error": "an error, and began again from nothing",
    "mixture": "a mixture, in silence",
}


def render(result: DemoResult) -> str:
    """The page, as HTML text."""
    sections = [
        _header(result),
        _facts(result),
        _digests(result),
        _storm(result),
        _close(result),
        _curves(result),
        _peers(result),
        _log(result),
        _honesty(),
        _ran(result),
    ]
    title = f"handfast demo: {len(result.kills)} kills, {'equal' if result.equal else 'DIFFERENT'}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
        + "".join(sections)
        + "</main></body></html>\n"
    )


def _count(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}s"


def _header(result: DemoResult) -> str:
    kills = _count(len(result.kills), "kill")
    mixtures = _count(result.tally.mixture, "mixture")
    ending = "Equal to the last bit." if result.equal else "Not equal."
    bad = "" if result.equal else ' class="bad"'
    return (
        '<header><div class="mark">handfast <span>demo</span></div>'
        f"<h1{bad}>{kills}. {mixtures}. <em>{ending}</em></h1>"
        f'<p class="lead">A {_millions(result)} character transformer was trained on '
        f"{result.settings['world']} ranks, sharded by FSDP2, once without interruption and once "
        "under a storm of SIGKILLs, resumed by handfast after each. What must come out the same: "
        "every loss on the way, and every weight, moment and random stream at the end.</p></header>"
    )


def _millions(result: DemoResult) -> str:
    return f"{float(result.settings['parameters']) / 1e6:.2g}-million-parameter"


def _facts(result: DemoResult) -> str:
    hit: Counter[str] = Counter(kill.target for kill in result.kills)
    named = {"job": "all ranks", "rank": "one rank", "agent": "agents", "node": "both"}
    targets = [f"{name} {hit[target]}" for target, name in named.items() if hit[target]]
    resumes = [r for r in result.resumes if r.outcome not in ("first", "unseen")]
    exact = sum(r.exact is True for r in resumes)
    tally = result.tally
    boxes = [
        (
            f"{len(result.kills)}",
            f"kills: {', '.join(targets)}",
            "",
        ),
        (
            f"{len(resumes)}",
            f"resumes: {tally.newest} from the newest epoch"
            + (f", {tally.older} from an older" if tally.older else ""),
            "",
        ),
        (
            f"{exact}/{len(resumes)}",
            "resumed states equal to the unkilled run's, bit for bit",
            "none" if exact == len(resumes) else "some",
        ),
        (
            f"{tally.mixture + tally.scratch + tally.error}",
            "mixtures, errors or losses of all",
            "some" if tally.mixture + tally.scratch + tally.error else "none",
        ),
        (
            f"{result.repeated}",
            f"steps trained again; {result.clashes} with another loss",
            "some" if result.clashes else "",
        ),
    ]
    cells = "".join(
        f'<div class="{cls}"><b>{value}</b><span>{escape(words)}</span></div>'
        for value, words, cls in boxes
    )
    return f'<section class="card facts">{cells}</section>'


def _digests(result: DemoResult) -> str:
    rows = [
        (
            '<span></span><span class="head">uninterrupted</span><span></span>'
            f'<span class="head">killed {len(result.kills)} times</span>'
        )
    ]
    pick: list[tuple[str, Callable[[Curve], str]]] = [
        ("Final weights", lambda curve: curve.weights),
        ("Final state, all components", lambda curve: curve.state),
        ("Loss of every rank at every step", lambda curve: curve.digest),
    ]
    for name, get in pick:
        one, other = get(result.reference), get(result.storm)
        sign = '<span class="sign">=</span>' if one == other else '<span class="sign bad">≠</span>'
        rows.append(
            f'<span class="head row">{name}</span><code>{escape(one)}</code>{sign}'
            f"<code>{escape(other)}</code>"
        )
    return f'<section class="card digests">{"".join(rows)}</section>'


def _both(draw: Callable[[int], str]) -> str:
    return f'<div class="wide">{draw(WIDE)}</div><div class="narrow">{draw(NARROW)}</div>'


def _swatch(style: str, words: str) -> str:
    return f'<li><i style="{style}"></i>{words}</li>'


def _legend(*, lines: bool) -> str:
    growth = [
        _swatch(f"width:5px;height:{height / 2 + 3:g}px;background:var(--{kind})", words)
        for (kind, height), words in zip(
            pictures.GROWTH.items(),
            (
                "staged: copied",
                "persisted: on disk, read back",
                "attested: a peer has heard of it",
                "certified: this domain knows that all hold it",
            ),
            strict=True,
        )
    ]
    if lines:
        round_ = "width:9px;height:9px;border-radius:50%;background:var(--{})"
        growth += [
            _swatch(round_.format("kill"), "SIGKILL: job, rank or node"),
            _swatch(round_.format("agent"), "SIGKILL: agents only"),
            _swatch(
                "width:14px;height:2px;background:var(--line)",
                "recovery line, and the resume from it",
            ),
        ]
    return f'<ul class="legend">{"".join(growth)}</ul>'


def _storm(result: DemoResult) -> str:
    return (
        "<section><h2>The storm</h2><p>Above, training goes up step by step, and falls back after "
        "a kill. Below, each rank is a domain of its own: a mark is an epoch, and it grows with "
        "what is known of it. Pale marks were above the recovery line when the job died: nobody "
        "had been told that they would last, and nobody resumed them.</p>"
        f'<div class="card">{_legend(lines=True)}'
        f"{_both(lambda width: pictures.lattice(result, width))}</div></section>"
    )


def _close(result: DemoResult) -> str:
    kill = pictures.closest(result)
    if kill is None:
        return ""
    number = result.kills.index(kill) + 1
    after = next((r for r in result.resumes if r.at > kill.at and r.outcome != "unseen"), None)
    went = f"All ranks resumed step {after.step}, outlined." if after else ""
    last = max((mark.step for mark in result.marks if mark.at < kill.at), default=0)
    if after and after.step == last and kill.target != "node":
        went += " The agents outlived the ranks, and finished it."
    return (
        f"<section><h2>Kill {number}, up close</h2><p>The last second before a SIGKILL of "
        f"{escape(pictures.describe(kill))}. Domains persist at their own pace, so at most moments "
        "they stand at different epochs. That is normal, and harmless: what is resumed is an epoch "
        f"that every domain holds. {went}</p>"
        f'<div class="card">{_legend(lines=False)}'
        f"{_both(lambda width: pictures.close_up(result, kill, width))}</div>"
        "<p>Its end, in space and time: each rank a line, each fact a point where it was first "
        "seen, an arrow where another rank has heard of what is durable here (upright where both "
        "were seen at once). The blue line joins what was resumed; from the edge, where that was "
        "durable before.</p>"
        f'<div class="card">{_both(lambda width: pictures.space_time(result, kill, width))}</div>'
        "</section>"
    )


def _curves(result: DemoResult) -> str:
    pairs = list(zip(result.reference.losses, result.storm.losses, strict=False))
    gaps = [abs(a - b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
    legend = (
        '<ul class="legend">'
        + _swatch("width:16px;height:6px;background:var(--persisted)", "uninterrupted")
        + _swatch(
            "width:16px;height:2px;background:var(--ink)",
            "killed and resumed",
        )
        + _swatch("width:2px;height:10px;background:var(--kill)", "a kill")
        + "</ul>"
    )
    return (
        "<section><h2>The loss</h2><p>The mean over the ranks. Largest difference at any step: "
        f"<b>{max(gaps, default=0.0):g}</b>. A loss curve alone proves little: most mixtures do "
        "not show in it. The digests above do the proving.</p>"
        f'<div class="card">{legend}{_both(lambda width: pictures.losses(result, width))}</div>'
        "</section>"
    )


def _peers(result: DemoResult) -> str:
    if not result.peers:
        return ""
    rows = [
        _peer(
            "handfast",
            "The ten lines of the README, and a directory for each rank. An older epoch is resumed "
            "where the newest was not yet durable in every domain.",
            result.kills,
            result.resumes,
            result.tally,
        )
    ]
    rows += [_peer(p.name, p.usage, p.kills, p.resumes, p.tally) for p in result.peers]
    return (
        "<section><h2>The same storm over the usual ways</h2><p>The same training, the same model, "
        "the same kind of kills; only what saves it differs. Each is used as its documentation "
        "says. What was resumed is proved by digests that each rank gave to an independent log "
        "when it saved, and again after it resumed. Most kills are aimed into a save, so the "
        "shares say what can happen, not how often it does.</p>"
        f'<div class="card peers">{"".join(rows)}</div></section>'
    )


def _peer(
    name: str, usage: str, kills: Sequence[Kill], resumes: Sequence[Resume], tally: Tally
) -> str:
    counts = [(key, int(getattr(tally, key))) for key in OUTCOMES]
    bar = "".join(
        f'<span class="{key}" style="flex:{count}" title="{OUTCOMES[key]}">{count}</span>'
        for key, count in counts
        if count
    )
    words = ", ".join(
        f'<span class="{_mood(key, count)}"><b>{count}</b> from {OUTCOMES[key]}</span>'
        if key != "error"
        else f"<b>{count}</b> ended in {OUTCOMES[key]}"
        for key, count in counts
        if count or key == "mixture"
    )
    first = next((r for r in resumes if r.outcome in ("mixture", "scratch", "error")), None)
    proof = ""
    if first is not None:
        proof = f'<p class="proof">start {first.launch}: {escape(first.detail)}</p>'
    return (
        f'<div class="peer"><h3>{escape(name)}</h3><p>{escape(usage)}</p>'
        f'<div class="bar">{bar}</div><div class="counts">{_count(len(kills), "kill")}; resumed: '
        f"{words}.</div>{proof}</div>"
    )


def _mood(outcome: str, count: int) -> str:
    if outcome not in ("mixture", "scratch", "abandoned"):
        return ""
    return "hot" if count else "calm"


def _log(result: DemoResult) -> str:
    rows = []
    for number, kill in enumerate(result.kills, 1):
        until = min((k.at for k in result.kills if k.at > kill.at), default=math.inf)
        after = next((r for r in result.resumes if kill.at < r.at < until), None)
        went = "went on" if after is None else f"step {after.step} ({after.outcome})"
        under = ", under torchrun" if kill.torchrun else ""
        rows.append(
            f"<tr><td>{number}</td><td>{kill.at:.1f} s</td><td>{kill.step}</td>"
            f"<td>{kill.target if kill.rank is None else f'rank {kill.rank}'}{under}</td>"
            f"<td>{escape(kill.aim)}</td><td>{escape(kill.phase)}</td><td>{went}</td></tr>"
        )
    head = "".join(
        f"<th>{word}</th>"
        for word in ("", "time", "step", "killed", "aimed at", "under way", "resumed")
    )
    return (
        '<section><h2>Every kill</h2><details class="card"><summary>'
        f'{_count(len(result.kills), "kill")}, one by one</summary><div class="scroll"><table>'
        f"<tr>{head}</tr>{''.join(rows)}</table></div></details></section>"
    )


def _honesty() -> str:
    points = [
        (
            "SIGKILL is not a power cut: what was written, but not yet synced, survives it. The "
            "guarantee covers a power cut too (files and directories are synced, then read back), "
            "but this page does not show it."
        ),
        (
            "All ranks ran on one machine; the nodes are played, each with an agent and "
            "directories of its own."
        ),
        (
            "Bit-exactness is claimed for an equal number of ranks, threads, the same torch build "
            "and processor, and only there."
        ),
        (
            "No instant is consistent here, and none is claimed to be. An epoch counts once every "
            "domain holds it and each can know that."
        ),
        (
            "A job with one shared object store and nothing node-local does not need this "
            "protocol: writing the manifest last, with a create-only put, is enough."
        ),
    ]
    items = "".join(f"<li>{point}</li>" for point in points)
    return (
        "<section><h2>What this does not show</h2>"
        f'<div class="card"><ul class="plain">{items}</ul></div></section>'
    )


def _ran(result: DemoResult) -> str:
    entries = {**result.machine, **{k: str(v) for k, v in result.settings.items()}}
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in entries.items())
    return (
        f'<section><h2>What was run</h2><div class="card"><dl>{rows}</dl></div></section>'
        f"<footer>Made by <code>handfast demo</code> in {result.seconds:.0f} s. All numbers of "
        "this page lie beside it in result.json.</footer>"
    )
