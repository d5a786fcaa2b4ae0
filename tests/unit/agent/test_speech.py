"""Shows that what agents say has one form an epoch, now and in every later release."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.agent.speech import CODECS, SPOKEN, Said, told, words_at
from handfast.core.lattice import Epoch
from handfast.errors import HandfastError

FIRST, SECOND = (each.epoch for each in SPOKEN)
MESSAGE, WORD = Said("d0", b"hi"), Said("d0", b"hi", word=True)
GOLDEN = {
    (FIRST, MESSAGE): "92a26430c4026869",
    (SECOND, MESSAGE): "9300a26430c4026869",
    (SECOND, WORD): "9301a26430c4026869",
}
DIGESTS = [
    "f419928ecbb6f83379c376afd62e17b0a1b8777e80808cb7681d1e5e12536c43",
    "f0e6413a97afd3af869c33a747c87409d3f79f62321e7be5de237bfd30e0491f",
]


@pytest.mark.parametrize(("under", "value"), GOLDEN)
def test_each_epoch_has_one_form(under: Epoch, value: Said) -> None:
    """Golden: byte for byte."""
    assert CODECS[under].encode(value).hex() == GOLDEN[under, value]
    assert CODECS[under].decode(bytes.fromhex(GOLDEN[under, value])) == value


def test_an_epochs_digest_never_changes() -> None:
    """One number for two forms would be refused by every other agent."""
    assert [each.digest for each in SPOKEN] == DIGESTS
    assert [each.epoch for each in SPOKEN] == [Epoch(1, 1), Epoch(1, 2)]


def test_what_one_epoch_says_another_does_not_read() -> None:
    """Not by chance either: the forms differ, so a wrong codec would be seen."""
    for (under, _), form in GOLDEN.items():
        other = SECOND if under == FIRST else FIRST
        with pytest.raises(ValueError, match="nothing that an agent says"):
            CODECS[other].decode(bytes.fromhex(form))
    with pytest.raises(ValueError, match="kind 2 is said by no agent"):
        CODECS[SECOND].decode(bytes.fromhex("9302a26430c4026869"))
    assert [words_at(epoch) for epoch in (FIRST, SECOND)] == [False, True]


@given(st.binary(max_size=60))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    """Under either epoch."""
    for codec in CODECS.values():
        with contextlib.suppress(ValueError):
            codec.decode(data)


def test_epochs_are_offered_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """And an error names the variable where that means nothing."""
    monkeypatch.delenv("HANDFAST_SPEAKS", raising=False)
    assert told() == SPOKEN
    for text, offered in (("", SPOKEN), ("1-2", SPOKEN), ("1", SPOKEN[:1]), ("2", SPOKEN[1:])):
        monkeypatch.setenv("HANDFAST_SPEAKS", text)
        assert told() == offered
    for text in ("0", "3", "2-1", "1-3", "1-2-3", "one", "-", "1-", "-2", "¹"):
        monkeypatch.setenv("HANDFAST_SPEAKS", text)
        with pytest.raises(HandfastError, match=r"HANDFAST_SPEAKS=.* What to do: set 1, 2 or 1-2"):
            told()
