"""safetensors, single and in shards, that the libraries wrote (golden/write_transformers.py)."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from audit.goldens import (
    GOLDEN,
    codes,
    copied,
    cut,
    flip,
    only,
    part,
    roles,
    seen,
    tensors,
    unclaimed,
    wrong,
)
from handfast.audit.checks.seen import READS
from handfast.audit.extent import Reader
from handfast.audit.finding import Code, Strength
from handfast.audit.formats.safetensors_file import read_safetensors
from handfast.audit.formats.weights import find
from handfast.audit.found import Role
from handfast.audit.place import look
from handfast.audit.run import audit
from handfast.errors import FormatError


def header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a header, and keep the bytes behind it."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    found = json.loads(data[8 : 8 + length])
    change(found)
    text = json.dumps(found).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def index(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change an index."""
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


@pytest.mark.parametrize("variant", ["single", "sharded", "plain"])
def test_sound_files_have_no_findings(variant: str) -> None:
    """Whole, in shards with an index, and with every kind of number."""
    path = GOLDEN / "safetensors" / variant
    assert wrong(find, path) == []
    assert {name for name in unclaimed(find, path) if "config" not in name} == set()


def test_values_are_those_that_safetensors_loads() -> None:
    """Bit for bit, with their dtypes and shapes."""
    path = GOLDEN / "safetensors/plain"
    said = tensors(only(find, path).steps[0])
    loaded = load_file(path / "things.safetensors")
    assert said.keys() == loaded.keys()
    for name, tensor in loaded.items():
        values = said[name].values
        assert (f"torch.{values.dtype}", values.shape) == (str(tensor.dtype), tuple(tensor.shape))
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert b"".join(map(bytes, values.blocks(3))) == raw


def test_shards_are_parts_of_one_step() -> None:
    """Each with its own tensors, and the index beside them."""
    found = only(find, GOLDEN / "safetensors/sharded")
    (one,) = found.steps
    assert found.format == "safetensors with index"
    assert len(one.parts) == 3
    assert roles(one)["model.norm.weight"] == (Role.PARAMETER, "model.norm.weight")


def test_directories_of_a_run_are_its_steps(tmp_path: Path) -> None:
    """By the numbers in their names, in order."""
    for number in (200, 1000):
        shutil.copytree(GOLDEN / "safetensors/sharded", tmp_path / f"step-{number}")
    found = only(find, tmp_path)
    assert [one.number for one in found.steps] == [200, 1000]


# Faults


def test_a_missing_shard_is_found(tmp_path: Path) -> None:
    """By the index; without one by the others' names; torch's own are no different."""
    path = copied("safetensors/sharded", tmp_path)
    os.remove(path / "model-00002-of-00002.safetensors")
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.MISSING, Strength.CERTAIN)
    os.remove(path / "model.safetensors.index.json")
    (finding,) = [each for each in wrong(find, path) if each.code is Code.MISSING]
    assert finding.parts == ("model-00002-of-00002.safetensors",)


def test_an_index_that_is_not_there_is_a_hint(tmp_path: Path) -> None:
    """All shards are, and can be put together by hand; transformers loads none of them."""
    path = copied("safetensors/sharded", tmp_path)
    os.remove(path / "model.safetensors.index.json")
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.INDEX, Strength.HINT)
    assert "model.safetensors.index.json is not there" in finding.says


def test_a_shard_of_another_count_is_found(tmp_path: Path) -> None:
    """Left by an earlier save with other limits."""
    path = copied("safetensors/sharded", tmp_path)
    shutil.copy(
        path / "model-00002-of-00002.safetensors", path / "model-00002-of-00003.safetensors"
    )
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.EXTRA, Strength.STRONG)


def test_a_single_file_beside_shards_is_found(tmp_path: Path) -> None:
    """transformers takes it, whichever of the two is newer."""
    path = copied("safetensors/sharded", tmp_path)
    shutil.copy(GOLDEN / "safetensors/single/model.safetensors", path)
    (finding,) = wrong(find, path)
    assert finding.code is Code.EXTRA
    assert "transformers loads it" in finding.says


def test_shards_that_changed_places_are_found(tmp_path: Path) -> None:
    """The index says which tensors are in which: it is another save's, or the file is."""
    path = copied("safetensors/sharded", tmp_path)
    one, two = (path / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    shutil.copy(one, two)
    assert codes(find, path) == {Code.INDEX}


def test_an_index_that_speaks_of_other_bytes_is_a_hint(tmp_path: Path) -> None:
    """Some writers count tied tensors twice."""
    path = copied("safetensors/sharded", tmp_path)
    index(path / "model.safetensors.index.json", lambda f: f["metadata"].update(total_size=9))
    (finding,) = wrong(find, path)
    assert (finding.code, finding.strength) == (Code.INDEX, Strength.HINT)


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_unreadable(text: str, tmp_path: Path) -> None:
    """And the shards are reported all the same."""
    path = copied("safetensors/sharded", tmp_path)
    (path / "model.safetensors.index.json").write_text(text)
    assert codes(find, path) == {Code.UNREADABLE}
    assert len(only(find, path).steps[0].parts) == 3


@pytest.mark.parametrize("left", [0, 7, 8, 100, 2400 - 1])
def test_a_file_that_was_cut_is_found(left: int, tmp_path: Path) -> None:
    """Before its header, within it, and behind it; safetensors refuses each."""
    path = copied("safetensors/sharded", tmp_path) / "model-00001-of-00002.safetensors"
    cut(path, left)
    with pytest.raises((SafetensorError, OSError)):
        load_file(path)
    bad = [finding for finding in wrong(find, path.parent) if finding.code is Code.TRUNCATED]
    assert {finding.parts for finding in bad} == {("model-00001-of-00002.safetensors",)}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda f: f["a"].update(shape=[2, 2]), "its shape does not take"),
        (lambda f: f["a"].update(dtype="Q7"), "not known here"),
        (lambda f: f["half"].update(data_offsets=[0, 6]), "where the one before it ends"),
        (lambda f: f.pop("one"), "where the one before it ends"),
    ],
)
def test_a_header_that_breaks_its_rules_is_found(
    change: Callable[[dict[str, Any]], None], what: str, tmp_path: Path
) -> None:
    """What safetensors refuses is told, and what can still be read is."""
    path = copied("safetensors/plain", tmp_path) / "things.safetensors"
    header(path, change)
    with pytest.raises(SafetensorError):
        load_file(path)
    (finding, *_) = wrong(find, path.parent)
    assert finding.strength is Strength.CERTAIN
    assert what in finding.says
    assert tensors(only(find, path.parent).steps[0])


@pytest.mark.parametrize(
    "text", [b"[]", b"{", b'{"a": {"dtype": "F32"}}', b'{"__metadata__": {"a": 1}}', b"\xff"]
)
def test_a_header_that_is_none_is_unreadable(text: bytes, tmp_path: Path) -> None:
    """As safetensors has it."""
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "a.safetensors")
    assert codes(find, tmp_path) == {Code.UNREADABLE}


def test_a_header_that_claims_to_be_huge_is_unreadable(tmp_path: Path) -> None:
    """So that no audit reserves what a hostile file asks for."""
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    assert codes(find, tmp_path) == {Code.UNREADABLE}


def test_bytes_behind_the_last_tensor_are_found(tmp_path: Path) -> None:
    """safetensors refuses them, too."""
    path = copied("safetensors/plain", tmp_path) / "things.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(SafetensorError):
        load_file(path)
    assert codes(find, path.parent) == {Code.UNREADABLE}


def test_a_flipped_bit_or_another_steps_shard_cannot_be_seen(tmp_path: Path) -> None:
    """The format has neither checksums (safetensors/safetensors#220) nor counts."""
    path = copied("safetensors/sharded", tmp_path) / "model-00001-of-00002.safetensors"
    flip(path, -1)
    assert not torch.equal(
        load_file(path)["model.layers.0.self_attn.v_proj.weight"],
        load_file(GOLDEN / "safetensors/sharded" / path.name)[
            "model.layers.0.self_attn.v_proj.weight"
        ],
    )
    assert wrong(find, path.parent) == []


def test_numbers_that_share_bytes_are_read_as_bytes(tmp_path: Path) -> None:
    """Of four or six bits, which torch has no dtype of its own for."""
    save_file({"a": torch.zeros(4, dtype=torch.uint8)}, tmp_path / "a.safetensors")
    header(tmp_path / "a.safetensors", lambda f: f["a"].update(dtype="F4", shape=[8]))
    assert wrong(find, tmp_path) == []
    (one,) = only(find, tmp_path).steps
    assert tensors(one)["a"].values.shape == (4,)
    assert part(one, "a.safetensors").problem == ""


@given(st.binary(max_size=60))
def test_no_header_raises_but_as_it_says(
    tmp_path_factory: pytest.TempPathFactory, text: bytes
) -> None:
    """Whatever is in a file, it is read or it is a FormatError."""
    folder = tmp_path_factory.mktemp("any")
    for data in (text, struct.pack("<Q", len(text)) + text):
        (folder / "a.safetensors").write_bytes(data)
        with suppress(FormatError):
            read_safetensors(look(folder, Reader()), "a.safetensors")
        assert len(seen(find, folder)) == 1


def test_a_stretch_of_a_file_under_a_thousand_names_is_read_a_few_times(tmp_path: Path) -> None:
    """safetensors refuses it; an audit says so, and does not read the whole a thousand times."""
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.rand(30_000)}, path)
    header(path, lambda found: found.update({f"w{at}": found["w"] for at in range(1000)}))
    with pytest.raises(SafetensorError):
        load_file(path)
    assert codes(find, tmp_path) == {Code.UNREADABLE}
    assert Code.UNREAD in codes(find, tmp_path, Strength.HINT)
    assert audit(tmp_path, deep=True).nbytes <= (READS + 1) * path.stat().st_size
