"""Show that versions are ordered where they can be, and that nothing is guessed elsewhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.fleet.compat.versions import Version, compare, read, sort_key, within

ASCENDING = [
    ("580.65", "580.65.06"),
    ("570.211.01", "580.65.06"),
    ("1.9", "1.10"),
    ("2.21.5", "2.21.5-1"),
    ("2.21.5-1", "2.21.5-2"),
    ("5.15.0", "5.15.0-157-generic"),
    ("5.15.0-91-generic", "5.15.0-157-generic"),
    ("24.10-1.1.4.0", "24.10-2.1.8.0"),
    ("v1.34.2", "1.35.0"),
    ("22.39.1002 (MT_0000000838)", "22.39.2048 (MT_0000000838)"),
    ("1.22.0-rc1", "1.22.1"),
]
EQUAL = [("1.13", "1.13.0"), ("580.65.06", "580.65.6"), ("2.4.1+cu121", "2.4.1+cu124")]
UNSAID = [
    ("1.22.0-rc1", "1.22.0"),
    ("1.22.0.post1", "1.22.0"),
    ("5.15.0-157-generic", "5.15.0-157-aws"),
    ("580.65.06-0ubuntu1", "580.65.06"),
    ("deadbeef", "1.0"),
    ("580.65 (7), 590.12 (1)", "580.65"),
    ("", "1"),
]


@pytest.mark.parametrize(("earlier", "later"), ASCENDING)
def test_what_comes_first(earlier, later):
    """Each way round."""
    assert compare(earlier, later) == -1
    assert compare(later, earlier) == 1
    assert sort_key(earlier) < sort_key(later)


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_neither_comes_first_of_two_texts_of_one_version(one, other):
    """A minimum is reached by any of them, though they are not exactly equal."""
    assert compare(one, other) == compare(other, one) == 0


@pytest.mark.parametrize(("one", "other"), UNSAID)
def test_what_can_not_be_said_is_not(one, other):
    """Whether a candidate comes before its release is each project's own affair."""
    assert compare(one, other) is compare(other, one) is None


def test_a_version_in_its_parts():
    """As the order takes it."""
    assert read("5.15.0-157-generic") == Version((5, 15, 0), (157,), "-generic")
    assert read("2.4.1+cu121") == Version((2, 4, 1), (), "")
    assert read("9" * 19) is None
    assert read("of the kernel") is None


def test_a_release_has_its_versions():
    """And not those that only begin with the same letters."""
    assert within("24.11.5", "24.11")
    assert within("24.11.0-0rc1", "24.11")
    assert within("1.22.0-rc1", "1.22.0-rc1")
    assert not within("24.110", "24.11")
    assert not within("24", "24.11")
    assert not within("1.22.0", "1.22.0-rc1")
    assert within("AuthenticAMD", "AuthenticAMD")
    assert not within("AuthenticAMD", "1")


texts = st.builds(
    "{}{}{}".format,
    st.lists(st.integers(0, 3).map(str), min_size=1, max_size=3).map(".".join),
    st.sampled_from(["", "-1", "-2", "-1.2"]),
    st.sampled_from(["", "-generic", "-aws", "rc1", ".el9", "+b"]),
) | st.sampled_from(["x", "y", ""])


@given(texts, texts, texts)
def test_the_order_is_one(a, b, c):
    """The other way round it is the opposite; what is between two is between them; keys agree."""
    forth, back = compare(a, b), compare(b, a)
    assert forth == (None if back is None else -back)
    if forth == -1:
        assert sort_key(a) < sort_key(b)
        if compare(b, c) == -1:
            assert compare(a, c) == -1
