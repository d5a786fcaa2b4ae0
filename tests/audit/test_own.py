"""handfast's own runs in an audit: what journals say, roles and counters, and faults."""

import shutil
from functools import partial
from pathlib import Path

import msgspec
import pytest
import torch
import xxhash
from torch import nn

from audit import goldens
from handfast.audit.checks import Look, check
from handfast.audit.extent import Reader
from handfast.audit.finding import Code, Strength
from handfast.audit.formats.own import find
from handfast.audit.found import Clock, Counter, Part, Role
from handfast.audit.place import look
from handfast.store.claims import IdentityFile
from handfast.torch import Checkpointer

GOLDEN = Path(__file__).parents[1] / "golden" / "run1"
only, findings = partial(goldens.only, find), partial(goldens.findings, find)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of a network with a norm, AdamW with a schedule, by the real Checkpointer."""
    path = tmp_path_factory.mktemp("own") / "run"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    with Checkpointer(path, state, every=1) as checkpointer:
        checkpointer.restore()
        for step in range(3):
            optimizer.zero_grad()
            model(torch.randn(5, 8)).square().mean().backward()
            optimizer.step()
            scheduler.step()
            checkpointer.save(step + 1).converged(60)
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of the golden run of two ranks, to be spoilt."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "run1"))


def newest(path: Path, reader: Reader) -> Part:
    """The first part of the newest epoch."""
    return only(path, reader).steps[-1].parts[0]


def domain(run: Path, rank: int = 0) -> Path:
    """A rank's directory."""
    return run / "domains" / f"rank-{rank:05d}"


# Sound ones


def test_the_golden_run_is_sound(reader: Reader) -> None:
    """Two generations, whose epochs are told in order; a restore takes the newest."""
    found = only(GOLDEN, reader)
    assert [(step.path, step.number) for step in found.steps] == [
        ("epoch 1/20", 20),
        ("epoch 2/50", 50),
    ]
    assert [(r.ranks, r.step) for r in found.resume] == [("all ranks", "epoch 2/50")]
    assert findings(GOLDEN, reader) == []
    assert set(look(GOLDEN, reader).files) == found.files


def test_a_part_says_whose_it_is(reader: Reader) -> None:
    """By its stamp: the rank, the run, and what all ranks must agree on."""
    parts = only(GOLDEN, reader).steps[-1].parts
    assert [part.rank for part in parts] == [{"rank": 0}, {"rank": 1}]
    assert {part.run for part in parts} == {"90a1d0"}
    assert parts[0].facts["how many shards there are"] == 2
    assert parts[0].facts["the lineage"] == "main"
    assert list(parts[0].counters) == [Counter(Clock.TRAINER, 50, "stamp/step", updates=False)]


def test_a_trained_run_is_sound(trained: Path, reader: Reader) -> None:
    """Nor has any check of values anything to say."""
    assert findings(trained, reader) == []
    assert only(trained, reader).resume[0].step == "epoch 1/3"


def test_roles_come_from_kinds_and_paths(trained: Path, reader: Reader) -> None:
    """What an optimizer trains is a parameter; a module's other tensors are buffers."""
    found = {t.path: (t.role, t.of, t.group) for t in newest(trained, reader).tensors}
    group = "optimizer/param_groups[0]"
    assert found["model/0.weight"] == (Role.PARAMETER, "0.weight", "")
    assert found["model/1.running_mean"] == (Role.BUFFER, "", "")
    assert found["model/1.num_batches_tracked"] == (Role.BUFFER, "", "")
    assert found["optimizer/state/0.weight/exp_avg"] == (Role.FIRST, "0.weight", group)
    assert found["optimizer/state/0.weight/exp_avg_sq"] == (Role.SECOND, "0.weight", group)
    assert found["optimizer/state/0.weight/step"] == (Role.OTHER, "0.weight", group)
    assert newest(trained, reader).betas == {group: (0.9, 0.999)}


def test_optimizers_and_schedules_count(trained: Path, reader: Reader) -> None:
    """For each parameter, and for each schedule; the stamp's step is the user's."""
    found = newest(trained, reader).counters
    assert Counter(Clock.PARAMETER, 3, "2.bias", updates=False) in found
    assert Counter(Clock.SCHEDULER, 3, "scheduler/last_epoch", updates=False) in found
    assert Counter(Clock.TRAINER, 3, "stamp/step", updates=False) in found
    assert len(found) == 6 + 1 + 1


@pytest.mark.parametrize(
    ("optimizer", "keys"),
    [
        ("SGD", {"momentum_buffer": Role.MOMENTUM}),
        ("RMSprop", {"square_avg": Role.SECOND}),
        ("Adamax", {"exp_avg": Role.MOMENTUM, "exp_inf": Role.OTHER}),
    ],
)
def test_other_optimizers_have_other_moments(
    optimizer: str, keys: dict[str, Role], tmp_path: Path, reader: Reader
) -> None:
    """And no betas, since the bound on moments is Adam's."""
    model = nn.Linear(3, 2)
    extra = {"momentum": 0.9} if optimizer == "SGD" else {}
    trainer = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1, **extra)
    with Checkpointer(tmp_path, {"net": model, "opt": trainer}, every=1) as checkpointer:
        checkpointer.restore()
        model(torch.ones(1, 3)).sum().backward()
        trainer.step()
        checkpointer.save(1).converged(60)
    part = newest(tmp_path, reader)
    found = {t.path: t.role for t in part.tensors}
    assert {key: found[f"opt/state/weight/{key}"] for key in keys} == keys
    assert part.betas == {}


def test_weights_alone_are_parameters(tmp_path: Path, reader: Reader) -> None:
    """Where nothing is trained, any numbers of a module may be; whole numbers are not."""
    with Checkpointer(tmp_path, {"net": nn.BatchNorm1d(3), "list": [1]}, every=1) as checkpointer:
        checkpointer.restore()
        checkpointer.save(1).converged(60)
    found = {t.path: t.role for t in newest(tmp_path, reader).tensors}
    assert found["net/weight"] is Role.PARAMETER
    assert found["net/num_batches_tracked"] is Role.BUFFER


def test_a_run_on_several_disks_is_one(golden: Path, tmp_path: Path, reader: Reader) -> None:
    """Each node's directory has its own domains: they are put together by the run's name."""
    for rank in (0, 1):
        home = tmp_path / f"node{rank}" / "domains"
        shutil.copytree(domain(golden, rank), home / f"rank-{rank:05d}")
    shutil.rmtree(golden)
    found = only(tmp_path, reader)
    assert [step.number for step in found.steps] == [20, 50]
    assert [len(step.parts) for step in found.steps] == [2, 2]
    assert findings(tmp_path, reader) == []


def test_a_copy_of_a_run_is_another_one(golden: Path, tmp_path: Path, reader: Reader) -> None:
    """A backup beside it: each is looked at by itself, and both are sound."""
    shutil.copytree(golden, tmp_path / "backup")
    found = list(find(look(tmp_path, reader)))
    assert [run.root for run in found] == ["backup", "run1"]
    assert [finding for run in found for finding in check(run, Look())] == []


def test_a_run_that_saved_nothing_begins_at_the_beginning(tmp_path: Path, reader: Reader) -> None:
    """It is a run all the same."""
    with Checkpointer(tmp_path, {"net": nn.Linear(1, 1)}, every=1) as checkpointer:
        checkpointer.restore()
    found = only(tmp_path, reader)
    assert found.steps == []
    assert found.resume[0].step.startswith("the beginning")
    assert findings(tmp_path, reader) == []


def test_what_is_no_run_is_none(tmp_path: Path, reader: Reader) -> None:
    """A directory that happens to be called so."""
    (tmp_path / "domains" / "example.org").mkdir(parents=True)
    assert list(find(look(tmp_path, reader))) == []


# Faults


def test_an_epoch_that_one_rank_lacks_is_told(golden: Path, reader: Reader) -> None:
    """Its manifest is gone: the epoch is no longer taken, and who lacks it is named."""
    (domain(golden, 1) / "2" / "manifests" / "2-50.manifest").unlink()
    found = findings(golden, reader)
    assert {finding.code for finding in found} == {Code.MISSING, Code.TRACKER}
    assert only(golden, reader).resume[0].step == "epoch 1/20"


def test_a_rank_whose_directory_is_gone_blocks_a_restore(golden: Path, reader: Reader) -> None:
    """mosaicml/composer#2146 can't happen here: a restore refuses, and so nothing is taken."""
    shutil.rmtree(domain(golden, 1))
    assert Code.MISSING in {finding.code for finding in findings(golden, reader)}
    assert list(only(golden, reader).resume) == []


def test_a_cut_data_file_is_told(run: Path, reader: Reader) -> None:
    """Without reading it, by its length."""
    path = domain(run) / "1" / "chunks" / "1-3.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    found = findings(run, reader)
    assert any("is cut" in finding.says for finding in found)
    assert only(run, reader).resume[0].step == "epoch 1/2"


def test_a_flipped_bit_is_told(run: Path, reader: Reader) -> None:
    """By the hash of its chunk, when values are read; DCP, torch.load and Orbax load it."""
    path = domain(run) / "1" / "chunks" / "1-3.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    (finding,) = findings(run, reader)
    assert finding.code is Code.CORRUPT
    assert "differs from its hash" in finding.evidence[0]


def test_bytes_of_another_epoch_are_told(run: Path, reader: Reader) -> None:
    """NVIDIA-NeMo/Megatron-Bridge#5604: an older file under the newer one's name."""
    chunks = domain(run) / "1" / "chunks"
    shutil.copy(chunks / "1-2.safetensors", chunks / "1-3.safetensors")
    (finding,) = findings(run, reader)
    assert "epoch 1/3" in finding.evidence[0]


def test_a_manifest_of_another_epoch_is_told(run: Path, reader: Reader) -> None:
    """Its stamp says whose it is."""
    manifests = domain(run) / "1" / "manifests"
    shutil.copy(manifests / "1-2.manifest", manifests / "1-3.manifest")
    codes = {finding.code for finding in findings(run, reader)}
    assert codes == {Code.EXTRA, Code.TRACKER}


def test_a_domain_of_another_run_is_told(
    golden: Path, run: Path, tmp_path: Path, reader: Reader
) -> None:
    """LMResiliency/lm-resiliency#77: another run's shard is no candidate, and is named."""
    shutil.copytree(domain(run), golden / "domains" / "rank-00002")
    shutil.rmtree(run)
    found = findings(golden, reader)
    assert [finding.code for finding in found] == [Code.EXTRA]
    assert only(golden, reader).resume[0].step == "epoch 2/50"


def test_a_damaged_journal_is_told(golden: Path, reader: Reader) -> None:
    """Whoever wrote it takes no part, and a restore waits for it."""
    path = domain(golden, 1) / "2" / "journal"
    data = bytearray(path.read_bytes())
    data[40] ^= 0xFF
    path.write_bytes(data)
    assert findings(golden, reader)


def test_a_run_that_can_not_be_looked_at_is_reported(golden: Path, reader: Reader) -> None:
    """Domains of two runs in one directory, one of each: which one is meant nobody can say."""
    path = domain(golden, 1) / "domain.json"
    path.write_bytes(path.read_bytes().replace(b"90a1d0", b"90a1d1"))
    envelope = msgspec.json.decode(path.read_bytes(), type=IdentityFile)
    check = xxhash.xxh3_128_hexdigest(envelope.identity)
    path.write_bytes(msgspec.json.encode(IdentityFile(check, envelope.identity)))
    found = findings(golden, reader)
    assert [finding.code for finding in found] == [Code.UNREADABLE]
    assert only(golden, reader).files


def test_a_run_of_another_format_is_reported(golden: Path, reader: Reader) -> None:
    """Where no domain can be read, that is what is told."""
    for rank in (0, 1):
        (domain(golden, rank) / "domain.json").write_text("{}")
    found = findings(golden, reader)
    assert {finding.code for finding in found} == {Code.CORRUPT}
    assert "domain.json" in found[0].says
    assert set(look(golden, reader).files) == only(golden, reader).files


def test_an_epoch_that_never_became_whole_is_a_hint(golden: Path, reader: Reader) -> None:
    """One rank has it, and the other never did: no restore takes it, and none need."""
    shutil.rmtree(domain(golden, 1) / "2")
    last = only(golden, reader).steps[-1]
    assert last.number == 50
    assert Strength.HINT in {finding.strength for finding in last.findings}


def test_objects_that_are_no_plain_values_are_left_alone(tmp_path: Path, reader: Reader) -> None:
    """A pickle, asked for by name: it is not read, and the rest is."""
    state = {"net": nn.Linear(2, 2), "odd": {"one": Odd()}}
    with Checkpointer(tmp_path, state, every=1, pickle=("odd/one",)) as checkpointer:
        checkpointer.restore()
        checkpointer.save(1).converged(60)
    Odd.made = 0
    found = {t.path: t.role for t in newest(tmp_path, reader).tensors}
    assert found["net/weight"] is Role.PARAMETER
    assert Odd.made == 0


class Odd:
    """Counts how often one is made of a pickle."""

    made = 0

    def __setstate__(self, state: object) -> None:
        type(self).made += 1

    def __getstate__(self) -> object:
        return {"a": 1}
