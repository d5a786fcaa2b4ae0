"""The conformance suite of the tier port: what any domain must do, wherever its bytes lie.

To judge an implementation, subclass :class:`DirectorySuite` in a test module and define `home`::

    class TestMine(DirectorySuite):
        def home(self, scratch: Path) -> Home:
            return MyHome(scratch)
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Protocol

import pytest

from handfast.core.lattice import Epoch
from handfast.core.verdict import Verdict
from handfast.errors import Damaged, Refused
from handfast.store.port import Tier, Verify
from handfast.testing.samples import Owner, picture, save

__all__ = ["DirectorySuite", "Home", "picture", "save"]

MEBI = 1 << 20


class Home(Owner, Protocol):
    """A domain that a suite may claim again and again."""

    def claim(self) -> Tier:
        """The next incarnation of the domain."""


class DirectorySuite(ABC):
    """Pytest-style test methods over `home`, which a subclass defines."""

    @abstractmethod
    def home(self, scratch: Path) -> Home:
        """A fresh domain under an empty directory."""

    @pytest.mark.parametrize("verify", ["fsync", "sampled", "full"])
    def test_what_was_written_is_what_is_read(self, tmp_path: Path, verify: Verify) -> None:
        """Shows that an epoch comes back byte for byte, with all that its manifest says."""
        home = self.home(tmp_path)
        tier = home.claim()
        layout, image = picture(1)
        seen: list[int] = []
        written = save(tier, home, Epoch(1, 10), image, layout, verify=verify)
        into = bytearray(layout.padded)
        manifest = tier.read(
            Epoch(1, 10),
            into,
            digest=written.digest,
            progress=lambda done, total: seen.append(total - done),
        )
        assert into[: layout.nbytes] == image
        assert manifest == written.manifest
        assert manifest.objects == b"objects of 1/10"
        assert tier.manifests()[Epoch(1, 10)].digest == written.digest
        assert seen == sorted(seen, reverse=True)
        assert seen[-1] == 0

    def test_unchanged_bytes_are_not_written_again(self, tmp_path: Path) -> None:
        """Shows that frozen weights cost nothing, and outlive the epoch that brought them."""
        home = self.home(tmp_path)
        tier = home.claim()
        layout, first = picture(1, frozen=2 * MEBI)
        _, second = picture(2, frozen=2 * MEBI)
        parent = save(tier, home, Epoch(1, 1), first, layout).manifest
        child = save(tier, home, Epoch(1, 2), second, layout, parent=parent)
        same = save(tier, home, Epoch(1, 3), second, layout, parent=child.manifest)
        assert child.bytes_written < child.bytes_total * 3 // 4
        assert same.bytes_written < MEBI
        assert tier.release([Epoch(1, 1), Epoch(1, 2)]) == ()
        into = bytearray(layout.nbytes)
        tier.read(Epoch(1, 3), into)
        assert into == second

    def test_references_cross_incarnations(self, tmp_path: Path) -> None:
        """Shows that a successor's delta may lie in files that its predecessor wrote."""
        home = self.home(tmp_path)
        layout, first = picture(1, frozen=2 * MEBI)
        _, second = picture(2, frozen=2 * MEBI)
        parent = save(home.claim(), home, Epoch(1, 1), first, layout).manifest
        tier = home.claim()
        child = save(tier, home, Epoch(2, 2), second, layout, parent=parent)
        assert child.bytes_written < child.bytes_total * 3 // 4
        for epoch, image in ((Epoch(1, 1), first), (Epoch(2, 2), second)):
            into = bytearray(layout.nbytes)
            tier.read(epoch, into)
            assert into == image

    def test_a_parent_that_is_gone_is_not_referred_to(self, tmp_path: Path) -> None:
        """Shows that a save names no parent that was released since the caller looked."""
        home = self.home(tmp_path)
        tier = home.claim()
        layout, image = picture(1)
        parent = save(tier, home, Epoch(1, 1), image, layout).manifest
        tier.release([Epoch(1, 1)])
        child = save(tier, home, Epoch(1, 2), image, layout, parent=parent, verify="fsync")
        assert child.bytes_written >= child.bytes_total
        tier.read(Epoch(1, 2))

    def test_released_epochs_are_missing_and_others_stay(self, tmp_path: Path) -> None:
        """Shows that release takes what it was told, nothing else, and may be repeated."""
        home = self.home(tmp_path)
        tier = home.claim()
        layout, image = picture(1)
        for step in (1, 2, 3):
            save(tier, home, Epoch(1, step), image, layout)
        for _ in range(2):
            assert tier.release([Epoch(1, 1), Epoch(1, 3), Epoch(7, 7)]) == ()
            assert list(tier.manifests()) == [Epoch(1, 2)]
        tier.read(Epoch(1, 2))
        with pytest.raises(Refused, match="no manifest of epoch 1/1") as refused:
            tier.read(Epoch(1, 1))
        assert refused.value.verdict is Verdict.MISSING

    def test_a_predecessors_epochs_are_not_released(self, tmp_path: Path) -> None:
        """Shows that a new incarnation takes nothing away before it is told that it may."""
        home = self.home(tmp_path)
        layout, image = picture(1)
        save(home.claim(), home, Epoch(1, 1), image, layout)
        tier = home.claim()
        save(tier, home, Epoch(2, 2), image, layout)
        tier.release([Epoch(1, 1)])
        tier.read(Epoch(1, 1))

    def test_records_outlive_their_owner(self, tmp_path: Path) -> None:
        """Shows that each incarnation inherits what all earlier ones recorded, in order."""
        home = self.home(tmp_path)
        expected: tuple[bytes, ...] = ()
        for number in (1, 2, 3):
            tier = home.claim()
            assert tier.incarnation == number
            assert tier.history == expected
            for record in (b"", b"%d" % number):
                tier.journal.append(record)
                expected += (record,)
            tier.journal.sync()
            assert tier.current()

    def test_what_a_superseded_owner_records_is_void(self, tmp_path: Path) -> None:
        """Shows that an owner finds out that it has a successor, and that its words are void."""
        home = self.home(tmp_path)
        old = home.claim()
        old.journal.append(b"before")
        old.journal.sync()
        new = home.claim()
        old.journal.append(b"after")
        old.journal.sync()
        assert not old.current()
        assert new.current()
        assert new.history == (b"before",)
        assert home.claim().history == (b"before",)

    def test_an_epoch_is_written_once(self, tmp_path: Path) -> None:
        """Shows that no second content can stand under an epoch that may have been voted for."""
        home = self.home(tmp_path)
        tier = home.claim()
        layout, image = picture(1)
        save(tier, home, Epoch(1, 1), image, layout)
        with pytest.raises(ValueError, match="written already"):
            save(tier, home, Epoch(1, 1), image, layout)

    def test_an_attested_digest_is_held_against_the_manifest(self, tmp_path: Path) -> None:
        """Shows that a sound epoch with another digest than the voted one is refused."""
        home = self.home(tmp_path)
        tier = home.claim()
        layout, image = picture(1)
        save(tier, home, Epoch(1, 1), image, layout)
        with pytest.raises(Damaged, match="was voted for"):
            tier.read(Epoch(1, 1), digest="0" * 32)

    def test_a_buffer_that_is_too_small_is_refused(self, tmp_path: Path) -> None:
        """Shows that a read never ends in half a buffer."""
        home = self.home(tmp_path)
        tier = home.claim()
        layout, image = picture(1)
        save(tier, home, Epoch(1, 1), image, layout)
        with pytest.raises(ValueError, match="a buffer of"):
            tier.read(Epoch(1, 1), bytearray(layout.nbytes - 1))

    def test_a_foreign_stamp_is_never_written(self, tmp_path: Path) -> None:
        """Shows that a domain stores only its own shard, under its own incarnation."""
        home = self.home(tmp_path)
        home.claim()
        tier = home.claim()
        layout, image = picture(1)
        foreign: tuple[dict[str, object], ...] = (
            {"incarnation": 1},
            {"domain": home.domain + "0"},
            {"run": home.run + "0"},
            {"shard": home.shard + 1, "shards": home.shard + 2},
        )
        for changes in foreign:
            with pytest.raises(ValueError, match="stamp"):
                save(tier, home, Epoch(1, 1), image, layout, changes=changes)
        assert tier.manifests() == {}

    def test_room_is_reported(self, tmp_path: Path) -> None:
        """Shows that a caller can ask for room before it begins."""
        assert self.home(tmp_path).claim().free_bytes() > 0
