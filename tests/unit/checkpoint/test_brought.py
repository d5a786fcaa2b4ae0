"""Shows what is said, and what is refused, where ranks do not have one history."""

from __future__ import annotations

import pytest

from handfast.checkpoint.brought import refuse_mixed, warn
from handfast.core.verdict import Verdict
from handfast.errors import Refused
from handfast.store.provenance import NOTHING, Brought

ONE, OTHER = (Brought("main", {"model": f"main 1/{step} of run a"}) for step in (4, 2))


def test_what_one_rank_alone_has_loaded_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """By ranks, and what it came from; nothing is said where nobody has."""
    warn([NOTHING, NOTHING], "what they bring")
    assert caplog.messages == []
    warn([ONE, NOTHING, NOTHING], "what they bring")
    (said,) = caplog.messages
    assert (
        "what they bring: rank 0: main (model: main 1/4 of run a); rank 1, 2: nothing known. Where"
        in said
    )


def test_what_is_of_two_epochs_is_refused_by_name() -> None:
    """Who has which, a part at a time; what one rank alone has loaded is none."""
    refuse_mixed([ONE, NOTHING, ONE], "what the ranks bring")
    with pytest.raises(Refused) as caught:
        refuse_mixed([ONE, OTHER, ONE], "what the ranks bring")
    assert caught.value.verdict is Verdict.MIXED
    assert caught.value.shards == (
        "model: main 1/4 of run a on rank 0, 2 against main 1/2 of run a on rank 1",
    )
