"""Shows that nothing which others wrote can steer a terminal, and that two values stay two."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from inventorykit import inventory, machine

from handfast.cli.compat import judge
from handfast.cli.fleet import fleet
from handfast.errors import FormatError
from handfast.fleet.inventory.collect import take
from handfast.fleet.inventory.facts import (
    Fact,
    Kind,
    State,
    Tier,
    Want,
    decode,
    encode,
    gather,
    printable,
)
from handfast.fleet.inventory.host import Host, here
from handfast.fleet.skew import read_fleet

NASTY = "1\x1b[2J\x1b]0;x\x07\r\n2\u202e3\u2028\x9b4"
SPELLED = r"1\x1b[2J\x1b]0;x\x07\r\n2\u202e3\u2028\x9b4"
TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
DRIVER = Want("gpu.driver", Tier.HOST)


def harmless(text: str) -> bool:
    """Whether a terminal only shows it, line by line."""
    return all(unicodedata.category(c) not in {"Cc", "Cs", "Zl", "Zp"} for c in text if c != "\n")


def test_what_is_spelled_is_all_that_a_terminal_obeys_or_does_not_show() -> None:
    """Controls, ends of lines, what turns the direction or has no width; and no letters."""
    spelled = {c for c in map(chr, range(0x110000)) if printable(c) != c}
    for c in map(chr, range(0x110000)):
        category = unicodedata.category(c)
        assert (c in spelled) or category not in {"Cc", "Cs", "Zl", "Zp"}, hex(ord(c))
        assert (c not in spelled) or category[0] in "CZ", hex(ord(c))
    turning = {c for c in map(chr, range(0x110000)) if unicodedata.bidirectional(c) in TURNS}
    assert turning <= spelled
    assert printable(NASTY) == SPELLED
    assert printable("München 580.65.06 \\x1b ~") == "München 580.65.06 \\x1b ~"


@given(st.text(), st.text())
def test_values_are_printable_and_two_stay_two(one: str, other: str) -> None:
    """Whatever they hold; a value that can be printed is left as it is."""
    first, second = (DRIVER.known(value, value) for value in (one, other))
    assert printable(f"{first.value}{first.source}") == f"{first.value}{first.source}"
    assert (first.value == second.value) is (one == other)
    if printable(one) == one and len(one) < 4096:
        assert first.value == one
    assert decode(encode(gather([first])), "x").facts == (first,)


def test_reasons_and_sources_are_printable() -> None:
    """A file's name may hold anything, and so may what a program prints."""
    told = DRIVER.unknown(f"/x/{NASTY}: gone", f"/x/{NASTY}")
    assert (told.problem, told.source) == (f"/x/{SPELLED}: gone", f"/x/{SPELLED}")
    assert DRIVER.absent(NASTY).source == SPELLED


@pytest.mark.parametrize("field", ["value", "source", "problem", "name"])
def test_a_fact_that_could_not_be_printed_can_not_be_made_or_read(field: str) -> None:
    """By whichever release or hand it was written; the refusal itself can be printed."""
    told = {"name": "x", "tier": "host", "kind": "exact", "state": "known", "value": "1"}
    if field == "problem":
        told |= {"state": "unknown", "value": None}
    told[field] = "x\n" if field == "name" else f"{NASTY}x"
    body = {"format": 1, "node": None, "facts": [told]}
    with pytest.raises(FormatError, match="no inventory of a node") as caught:
        decode(msgspec.json.encode(body), "n.json")
    assert printable(str(caught.value)) == str(caught.value)
    if field == "value":
        with pytest.raises(ValueError, match="can't be printed"):
            Fact("x", Tier.HOST, Kind.EXACT, State.KNOWN, NASTY)


def test_a_refusal_that_quotes_what_it_read_can_be_printed() -> None:
    """The decoder names a tier that is none."""
    body = b'{"format": 1, "node": null, "facts": [{"name": "x", "tier": "\\u001b[2J"}]}'
    with pytest.raises(FormatError, match=r"\\x1b\[2J"):
        decode(body, "n.json")


def shown(*arguments: object) -> tuple[int, str]:
    """Run a command; its exit code, and all that a terminal was sent."""
    told = CliRunner().invoke(fleet, [str(each) for each in arguments])
    return told.exit_code, told.output


def test_an_inventory_of_nasty_files_is_shown_as_text(tmp_path: Path) -> None:
    """The machine's name, its firmware."""
    machine("hgx", tmp_path)
    (tmp_path / "proc/sys/kernel/hostname").write_text(f"a{NASTY}\n")
    (tmp_path / "sys/class/dmi/id/bios_version").write_text(f"b{NASTY}\n")
    code, told = shown("inventory", "--root", tmp_path, "--tier", "host")
    assert code == 0
    assert harmless(told)
    assert f"a{SPELLED}" in told
    assert f"b{SPELLED}" in told


def test_a_variable_of_any_bytes_is_a_fact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also one that is no text: it does not cost the inventory, nor does one that nobody reads."""
    monkeypatch.setitem(os.environb, b"NCCL_ALGO", b"Ring\xff\x1b[2J")
    monkeypatch.setitem(os.environb, b"WHATEVER\xfe", b"\xff")
    place = tmp_path / os.fsdecode(b"caf\xe9")
    place.mkdir()
    monkeypatch.chdir(place)
    value = take(here(), tiers=[Tier.JOB]).get("env.NCCL_ALGO").value
    assert value is not None
    assert value.startswith(r"Ring\xff\x1b[2J sha256:")


def test_a_host_that_holds_no_text_can_be_described() -> None:
    """It is sent to the collectors as JSON."""
    told = here(environ={"A": os.fsdecode(b"\xff"), "B": "ä"})
    assert told.environ == {"A": r"\xff", "B": "ä"}
    assert msgspec.json.decode(msgspec.json.encode(told), type=Host) == told


def test_skew_and_judge_send_a_terminal_nothing_of_foreign_files(tmp_path: Path) -> None:
    """Neither values, nor reasons, nor the files' names; what is not counted is said."""
    good = encode(inventory(driver="580"))
    (tmp_path / "a.json").write_bytes(good)
    (tmp_path / "b.json").write_bytes(good.replace(b"580", b"\\u001b[2J580"))
    (tmp_path / f"c{NASTY}.json").write_bytes(good)
    (tmp_path / os.fsdecode(b"d\xff.json")).write_bytes(good)
    code, told = shown("skew", tmp_path)
    assert (code, harmless(told)) == (3, True)
    assert f"not counted c{SPELLED}: " in told
    assert "rename" in told
    judged = CliRunner().invoke(judge, [str(tmp_path)])
    assert (judged.exit_code, harmless(judged.output)) == (3, True)
    answer = json.loads(shown("skew", tmp_path, "--json")[1])
    assert set(answer["unread"]) == {"b", f"c{SPELLED}", r"d\udcff"}
    assert set(read_fleet(str(tmp_path))[0]) == {"a"}
