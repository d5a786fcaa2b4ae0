"""Shows that labels are valid, that metrics can be read, and that no two values collide."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inventorykit import fact, inventory

from handfast.fleet.inventory.facts import Kind, Tier, Want, gather
from handfast.fleet.inventory.spelling import labels, metrics

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
texts = st.text(max_size=120)


def fits(text: str) -> bool:
    """Whether Kubernetes takes it for a label's value."""
    return len(text) <= 63 and (text == "" or NAME.fullmatch(text) is not None)


@given(texts, texts)
def test_every_label_is_valid_and_two_values_stay_two(one: str, other: str) -> None:
    """Whatever a vendor writes into its version."""
    first, second = (labels(inventory(driver=value))["handfast/driver"] for value in (one, other))
    assert fits(first)
    assert (first == second) is (one == other)


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}", fullmatch=True))
def test_every_key_is_valid(name: str) -> None:
    """Whatever a board is called."""
    for key in labels(inventory(**{name: "1"})):
        prefix, _, rest = key.partition("/")
        assert prefix == "handfast"
        assert rest
        assert fits(rest)


def test_labels_are_of_the_node_and_of_what_is_compared() -> None:
    """No job's facts, no names; three states that no value can be taken for."""
    taken = gather(
        [
            fact("a", "580.65.06"),
            fact("b", "absent"),
            Want("c", Tier.HOST).absent("x"),
            Want("d", Tier.FABRIC).unknown("x"),
            fact("e", "1", Tier.JOB),
            fact("f", "gpu-17", kind=Kind.PER_NODE),
        ]
    )
    told = labels(taken)
    digests = {f"handfast/digest.{t}": taken.digest(t).hex()[:32] for t in (Tier.HOST, Tier.FABRIC)}
    assert told == digests | {
        "handfast/a": "580.65.06",
        "handfast/b": told["handfast/b"],
        "handfast/c": "absent",
        "handfast/d": "unknown",
    }
    assert re.fullmatch(r"absent-[0-9a-f]{8}", told["handfast/b"])


@given(texts)
def test_metrics_are_read_back_by_prometheus_own_parser(value: str) -> None:
    """Quotes and backslashes in a value, too."""
    parser = pytest.importorskip("prometheus_client.parser")
    taken = gather([fact("gpu.driver", value), Want("x", Tier.JOB).unknown("y")])
    families = {each.name: each for each in parser.text_string_to_metric_families(metrics(taken))}
    by_name = {each.labels["name"]: each.labels for each in families["handfast_fact"].samples}
    assert by_name["gpu.driver"]["value"] == taken.get("gpu.driver").value
    assert (by_name["x"]["state"], by_name["x"]["value"]) == ("unknown", "")
    unknown = families["handfast_unknown_facts"].samples
    assert {each.labels["tier"]: each.value for each in unknown} == {
        "host": 0,
        "fabric": 0,
        "job": 1,
    }
    digests = {each.labels["tier"]: each.labels["digest"] for each in
               families["handfast_digest"].samples}  # fmt: skip
    assert digests == {str(tier): taken.digest(tier).hex() for tier in Tier}
