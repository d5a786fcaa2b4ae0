"""Shows that the page stands alone, says what was found, and says so when it is not equal."""

import re
from html.parser import HTMLParser

import msgspec
import pytest
from demo_samples import sample

from handfast.demo.pictures import NARROW, WIDE, Scale, close_up, closest, lattice, losses
from handfast.demo.report import render
from handfast.demo.result import DemoResult, Tally

VOID = {"meta", "br", "img", "input", "link"}


class Nesting(HTMLParser):
    """Keeps the open elements, and every attribute and word."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def test_the_page_is_well_formed_and_needs_nothing_from_outside() -> None:
    """It is mailed, attached to an issue, opened from a disk without a network."""
    page = render(sample())
    found = Nesting(page)
    assert found.open == []
    outwards = [value for name, value in found.attributes if name in ("href", "src", "action")]
    assert outwards == []
    assert "@import" not in page
    assert "url(" not in page
    assert "<script" not in page


def test_it_tells_the_counts_the_digests_and_the_proof_of_a_mixture() -> None:
    """All that a reader needs to judge, and words of a peer's error are never markup."""
    text = Nesting(render(sample())).text
    for words in (
        "4 kills. 0 mixtures. Equal to the last bit.",
        "aa" * 16,
        "rank 0: 2; rank 1: 1 <script>",
        "2 x Test & Sons",
        "1 from a mixture, in silence",
    ):
        assert words in text.replace(" .", ".")


def test_a_difference_is_in_the_headline_not_in_a_footnote() -> None:
    """The page of a failed demo must not look like that of a good one."""
    result = sample(equal=False)
    assert not result.equal
    page = render(result)
    text = Nesting(page).text
    assert "Not equal." in text
    assert "Equal to the last bit" not in text
    assert 'class="sign bad"' in page


@pytest.mark.parametrize(
    "changed",
    [
        {"clashes": 1},
        {"tally": Tally(mixture=1)},
        {"resumes": [msgspec.structs.replace(sample().resumes[1], exact=False)]},
    ],
)
def test_one_wrong_thing_alone_makes_it_unequal(changed: dict[str, object]) -> None:
    """Equal digests in the end don't excuse a wrong state on the way."""
    assert sample().equal
    assert not msgspec.structs.replace(sample(), **changed).equal


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_every_kill_epoch_and_recovery_line_is_drawn(width: int) -> None:
    """At both widths: a mark for each epoch of each domain, pale where it was undone."""
    result = sample()
    picture = lattice(result, width)
    assert Nesting(picture).open == []
    assert len(re.findall(r'<circle [^>]*class="badge', picture)) == len(result.kills)
    assert (
        len(re.findall(r'class="(?:staged|persisted|attested|certified)( undone)?"', picture)) == 6
    )
    assert len(re.findall(r'class="persisted undone"', picture)) == 2
    assert picture.count('class="arc"') == 3
    assert picture.count("torchrun") == 1


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_the_close_up_shows_the_kill_that_cut_the_most_short(width: int) -> None:
    """There the domains stand at different epochs, which is what the picture is for."""
    result = sample()
    kill = closest(result)
    assert kill == result.kills[0]
    picture = close_up(result, kill, width)
    assert Nesting(picture).open == []
    assert picture.count('class="persisted"') == 2
    assert picture.count('class="certified chosen"') == 2


def test_a_result_without_kills_peers_or_marks_still_makes_a_page() -> None:
    """Nothing to divide by, nothing to choose from."""
    bare: DemoResult = msgspec.structs.replace(
        sample(), kills=[], resumes=[], marks=[], progress=[], peers=[], tally=Tally()
    )
    assert Nesting(render(bare)).open == []


def test_a_loss_that_is_no_number_is_left_out_of_the_curve() -> None:
    """A diverged run is drawn as far as it can be."""
    result = sample()
    curve = msgspec.structs.replace(result.reference, losses=[3.0, float("nan"), 2.0])
    picture = losses(msgspec.structs.replace(result, reference=curve, storm=curve), WIDE)
    assert "nan" not in picture


def test_a_result_is_read_back_from_its_json() -> None:
    """``result.json`` is for whoever wants to draw their own."""
    result = sample()
    assert msgspec.json.decode(msgspec.json.encode(result), type=DemoResult) == result


def test_ticks_are_round_and_inside() -> None:
    """Of any range, the empty one included."""
    assert Scale(0, 300, 0, 1).ticks(3) == [0, 100, 200, 300]
    assert Scale(0.0, 81.3, 0, 1).ticks(10) == [0, 10, 20, 30, 40, 50, 60, 70, 80]
    assert Scale(2.0, 2.0, 0, 1).ticks(4) == [2.0]
