"""The scenarios in `transcripts` come out as they are written, so they can be read as the protocol.

To change them: `handfast simulate --script FILE --rewrite` for each, and read the diff.
"""

import re
from pathlib import Path

import pytest

from handfast.core import member
from handfast.core.retain import releasable
from handfast.sim.ledger import Breach
from handfast.sim.script import VERBS, play

SCRIPTS = sorted((Path(__file__).parent / "transcripts").glob("*.txt"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_scenario_comes_out_as_it_is_written(path: Path) -> None:
    """Shows what members say, write and do, line by line."""
    assert play(path.read_text()) == path.read_text()


def test_there_are_scenarios() -> None:
    """So that an empty directory does not pass."""
    assert len(SCRIPTS) >= 12


def test_every_verb_is_explained() -> None:
    """Shows that whoever writes a scenario finds how each verb is written."""
    assert [verb for verb, do in VERBS.items() if f"`{verb}" not in (do.__doc__ or "")] == []


def test_the_script_that_is_explained_comes_out_as_it_is_written() -> None:
    """Shows that the example in docs/scripts.md is one."""
    page = Path(__file__).parents[2] / "docs" / "scripts.md"
    _, _, rest = page.read_text(encoding="utf-8").partition("```text\n")
    example, _, _ = rest.partition("```\n")
    assert "deliver a>b" in example
    assert play(example) == example


def test_a_scenario_that_comes_out_otherwise_is_seen() -> None:
    """Shows that a script's outcome is computed, and not copied."""
    assert (
        play("nodes a\n----\nb boots\n")
        == "nodes a\n----\na.1    boots\na.1    sees pins on nothing\n"
    )


@pytest.mark.parametrize(
    ("script", "where"),
    [
        ("launch", "line 1, 'launch': a script begins with `nodes`"),
        ("nodes a b\n\n# so\nlanch", "line 4, 'lanch': no such verb; there are nodes, launch, "),
        ("nodes a b\n----\n\ncrash c", "line 4, 'crash c': no agent of c is up; up: a.1, b.1"),
        ("nodes a b\nlaunch\nsave 0", "line 3, 'save 0': rank 0 has resumed nothing"),
        ("\n\n\nlanch", "line 4, 'lanch': no such verb"),
        ("nodes a\n \t\n\ncrash c", "line 4, 'crash c': no agent of c"),
        ("nodes a\n----\na.1    boots\nlaunch", "line 4, 'launch': below `----` stands what came"),
        ("nodes a\n----\n# why", "line 3, '# why': below `----` stands what came"),
        ("nodes a\n----\n\ncalm\n----\n----", "line 6, '----': below `----` stands what came"),
        ("nodes a\n" + "x" * 999, f"line 2, '{'x' * 80}': no such verb"),
        ("", "there is no command in it; a script begins with `nodes`"),
        ("# to be written\n", "there is no command in it; a script begins with `nodes`"),
    ],
)
def test_a_wrong_command_is_named_with_its_line(script: str, where: str) -> None:
    """Shows that a typing mistake is not taken for the protocol's doing."""
    with pytest.raises(ValueError, match=re.escape(where)):
        play(script)


WRONG = """
nodes                   there is no domain in it
nodes keep=2            there is no domain in it
nodes a a               a configuration names one domain twice
nodes a/9               shard 9 can't be: shards are held from 0 on, without gaps
nodes a/                '' is no whole number from 0 up
nodes a/x               'x' is no whole number from 0 up
nodes /0                '' can't be a name
nodes a.1               'a.1' can't be a name
nodes a>b               'a>b' can't be a name
nodes save              'save' can't be a name: letters, digits, _ and (not first) -, no verb
nodes ---- b            '----' can't be a name
nodes a keep=1 keep=3   keep= is there twice
nodes a tier=           '' can't be a name
nodes a tier=mem        tier 'mem' needs 1 domains a shard; shards [0] have fewer
nodes a need=2          tier 'dir' needs 2 domains a shard; shards [0] have fewer
nodes a need=0          '0' is no whole number from 1 to 999
nodes a keep=           '' is no whole number from 1 to 999
nodes a window=x        'x' is no whole number from 1 to 999
nodes a stores=1000     '1000' is no whole number from 1 to 999
nodes a keeep=3         there is no keeep= here
launch 7                '7' is no rank from 0 to 1
launch - 0              '-' is no rank from 0 to 1
launch want=x           'x' is no whole number from 0 up
launch want=1 want=2    want= is there twice
launch wnat=1           there is no wnat= here
launch store=0          '0' is no store from 1 to 1
launch store=2          '2' is no store from 1 to 1
launch asked=a,zz       no agent of zz is up; up: a.1, b.1
start 7                 '7' is no rank from 0 to 1
start round=2           '2' is no round from 1 to 1
save 7                  '7' is no rank from 0 to 1
save forg               'forg' is no rank from 0 to 1
save 0 round=0          '0' is no round from 1 to 1
kill                    something is missing behind the verb
kill x                  'x' is no rank from 0 to 1
kill 0 0.5              '0.5' is no rank from 0 to 1
decline maybe           'maybe' means nothing here
deliver a-b             'a-b' is no link, as a>b is
deliver a>zz            there is no domain 'zz'; there are a, b
deliver [a>b]           there is no domain '[a'; there are a, b
drop b                  'b' is no link, as a>b is
replay zz*>a            there is no domain 'zz*'; there are a, b
partition               something is missing behind the verb
partition a>*           there is no domain '*'; there are a, b
heal now                'now' is too much
tick zz                 no agent of zz is up; up: a.1, b.1
calm now                'now' is too much
crash                   something is missing behind the verb
crash zz                no agent of zz is up; up: a.1, b.1
crash a keep=x          'x' is no whole number from 0 up
crash a kep=1           there is no kep= here
boot                    something is missing behind the verb
boot a.1                there is no domain 'a.1'; there are a, b
begin zz                no agent of zz is up; up: a.1, b.1
begin a round=x         'x' is no round from 1 to 1
freeze                  something is missing behind the verb
freeze a.2              no agent of a.2 is up; up: a.1, b.1
wake a.                 no agent of a. is up; up: a.1, b.1
disk                    something is missing behind the verb
disk a                  too few words
disk a fulll            a disk can't be 'fulll'
disk zz full            there is no domain 'zz'; there are a, b
disk a full now         'now' is too much
rot a                   too few words
rot a x                 'x' is no epoch, as 1/10 is
rot a 1/10/2            '1/10/2' is no epoch, as 1/10 is
rot a 1/20              a has no copy of 1/20; it has: 1/10
rot a 1/10 b            'b' is too much
vanish zz 1/10          there is no domain 'zz'; there are a, b
vanish a 0/0            a has no copy of 0/0; it has: 1/10
pin                     something is missing behind the verb
pin a 1                 '1' is no epoch, as 1/10 is
fence                   something is missing behind the verb
fence a                 nobody but a holds shard 0: it would be lost
show foo                'foo' can't be shown
show held now           'held now' can't be shown
show journal            'journal' can't be shown
show journal zz         there is no domain 'zz'; there are a, b
"""


@pytest.mark.parametrize("row", WRONG.strip().split("\n"))
def test_what_is_wrong_in_a_line_is_told_and_how_it_is_written(row: str) -> None:
    """Shows that no word is passed over, and that whoever wrote it learns what may stand there."""
    line, told = re.split("  +", row)
    verb = line.split()[0]
    before = "" if verb == "nodes" else "nodes a b\nlaunch\ncalm\nsave\ncalm\n"
    number = before.count("\n") + 1
    with pytest.raises(ValueError, match="it is written") as raised:
        play(f"{before}{line}\n")
    said, _, ways = str(raised.value).partition("; it is written ")
    assert said.startswith(f"line {number}, {line!r}: {told}")
    assert ways.startswith(f"`{verb}")


@pytest.mark.parametrize("verb", VERBS)
def test_whatever_stands_behind_a_verb_is_answered(verb: str) -> None:
    """Shows that a line is played or told to be wrong: no error of Python's comes out."""
    junk = (
        "a",
        "zz",
        "=",
        "a=",
        "a>",
        ">",
        "1/",
        "-1",
        "1/-1",
        "9" * 40,
        "\u0663",
        "*",
        "[",
        "\x1b",
    )
    told = []
    for words in (*junk, *(f"a {word}" for word in junk)):
        try:
            play(f"nodes a\nlaunch\n{verb} {words}\n")
        except ValueError as error:
            told.append(str(error))
    assert len(told) > len(junk)
    assert [words for words in told if not words.startswith(f"line 3, '{verb} ")] == []


def test_every_verb_is_among_the_wrong_lines() -> None:
    """So that a new verb is tried, too."""
    assert {row.split()[0] for row in WRONG.strip().split("\n")} == set(VERBS)


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("kill 0", "nothing was launched yet"),
        ("launch\ncalm\nkill 0\nsave 0", "of round1 these ranks have ended: 0"),
        ("launch\nkill 0 1\nsave", "all ranks of round1 have ended"),
        ("launch\nkill 1\nbegin b", "of round1 these ranks have ended: 1"),
        ("wake a", "a.1 is not frozen"),
        ("crash a b\nfreeze a", "no agent of a is up; up: none"),
        ("nodes c", "a script begins with `nodes`, and has no other"),
    ],
)
def test_what_can_not_be_done_any_more_is_told(script: str, told: str) -> None:
    """Shows that nobody acts who is gone: a killed rank saved."""
    with pytest.raises(ValueError, match=re.escape(told)):
        play(f"nodes a b\n{script}\n")


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("fence b\nboot b", "b is fenced, and b+ in its place"),
        ("fence b b", "b is fenced, and b+ in its place"),
        ("fence a b", "nobody but b holds shard 0: it would be lost"),
        ("launch\ncalm\nfence b\nlaunch\ncalm\nsave\ncalm\nfence a\nlaunch\ncalm", ""),
    ],
)
def test_a_domain_is_fenced_once_and_not_the_last_that_holds_something(
    script: str, told: str
) -> None:
    """Shows that no script gives up what nobody else has (A7): that broke a law, by the script's
    own doing. An heir has nothing at first, and may be the one who holds it later."""
    if told:
        with pytest.raises(ValueError, match=re.escape(told)):
            play(f"nodes a b/0\n{script}\n")
    else:
        assert play(f"nodes a b/0\n{script}\nsave\ncalm\n")


def test_lines_stay_as_somebody_wrote_them() -> None:
    """Shows that only what stands below `----` is made: blanks, remarks and ends are kept."""
    script = "\n\n# a\n  # b\nnodes a \n---- \nold\n \t\n\n tick\n\n\n# end"
    assert play(script) == script.replace("old", "a.1    boots\na.1    sees pins on nothing")


def test_those_that_live_save() -> None:
    """Shows that a killed rank is not among all: it saved, as if nothing had befallen it."""
    came = play("nodes a b\nlaunch\ncalm\nkill 1\nsave\n----\n")
    assert "a.1    is given 1/10" in came
    assert "b.1    is given" not in came


def test_a_scenario_is_held_against_the_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that a broken law ends a scenario, whatever is written below its commands."""
    monkeypatch.setattr(
        member, "releasable", lambda held, **rule: releasable(held, **{**rule, "pinned": ()})
    )
    script = "nodes a\nlaunch\nsave\ncalm\npin a 1/10\nsave\ncalm\nsave\ncalm\nsave\ncalm"
    with pytest.raises(Breach, match="a reader holds it"):
        play(script)
