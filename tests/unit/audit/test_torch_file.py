"""Shows that files of torch.save are told from all others, and what is wrong with one is found."""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import struct
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torchkit import alike, content, raw, rezipped, same, save, taken

from handfast.audit import pickles, torch_file
from handfast.audit.archive import read_archive
from handfast.audit.extent import Reader
from handfast.audit.pickles import Limits
from handfast.audit.torch_file import Kind, TorchFile, read_torch, recognise
from handfast.audit.tree import leaves, values
from handfast.errors import Damaged, FormatError, HandfastError

OLD = {"_use_new_zipfile_serialization": False}
FORMATS = {"zip": {}, "legacy": OLD}


def state() -> dict[str, Any]:
    """A small training."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 5)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1,
            "rng": torch.get_rng_state(), "name": "ß", "none": None, "at": (1, 2.5)}  # fmt: skip


# What is read


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("form", FORMATS)
def test_what_torch_saved_is_what_it_loads(
    form: str, protocol: int, tmp_path: Path, reader: Reader
) -> None:
    """Shows it bit for bit for a training's state, at each protocol and in both formats."""
    path = save(tmp_path / "a.b.pt", state(), pickle_protocol=protocol, **FORMATS[form])
    found = taken(reader, path)
    assert found.kind is (Kind.ZIP if form == "zip" else Kind.LEGACY)
    assert alike(found.root, torch.load(path, weights_only=False))
    assert [*found.verify_crc()] == []


def test_a_file_says_who_wrote_it(tmp_path: Path, reader: Reader) -> None:
    """Shows the facts of both formats."""
    facts = taken(reader, save(tmp_path / "new.pt", state())).facts
    about = {"version", "byteorder", "format_version", "serialization_id"}
    assert facts.keys() == about | {"name"}
    assert facts["name"] == "new"
    assert facts["byteorder"] == sys.byteorder
    assert taken(reader, save(tmp_path / "old.pt", state(), **OLD)).facts == {"byteorder": "little"}


def test_a_buffer_that_was_saved_to_has_another_directory(tmp_path: Path, reader: Reader) -> None:
    """Shows that the name within the archive does not matter."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(3)}, buffer)
    (tmp_path / "model.pt").write_bytes(buffer.getvalue())
    found = taken(reader, str(tmp_path / "model.pt"))
    assert same(found.root["a"], torch.arange(3))
    assert found.archive is not None
    assert "archive/data.pkl" in found.archive.records


def test_no_storage_is_read_before_its_values_are(
    tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows it for a tensor that is larger than all that may be read for the rest."""
    for form, options in FORMATS.items():
        path = save(tmp_path / f"{form}.pt", {"a": torch.zeros(1 << 22), "b": 1}, **options)
        looked: list[int] = []
        with Reader() as counted:
            real = counted.read
            monkeypatch.setattr(
                counted, "read",
                lambda path, into, at, real=real, looked=looked: (
                    looked.append(len(into)), real(path, into, at)
                ),
            )  # fmt: skip
            found = taken(counted, path)
            assert sum(looked) < 4 << 20
            assert sum(map(len, found.root["a"].blocks(1 << 20))) == 16 << 20


def test_a_long_pickle_of_the_old_format_is_read_on(
    tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that what does not end within the first window is read with a larger one."""
    monkeypatch.setattr(torch_file, "WINDOW", 64)
    saved = {"text": "x" * 5000, "a": torch.arange(7), "list": [*range(500)]}
    path = save(tmp_path / "a.pt", saved, **OLD)
    assert alike(taken(reader, path).root, saved)
    with pytest.raises(FormatError, match=r"not read: too many objects: .* 1,000 bytes"):
        read_torch(reader, path, Limits(nbytes=1000))


def test_checksums_that_torch_left_out_are_no_damage(tmp_path: Path, reader: Reader) -> None:
    """Shows it for files that were saved without."""
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path / "a.pt", state())
    finally:
        torch.serialization.set_crc32_options(True)
    found = taken(reader, path)
    assert alike(found.root, torch.load(path, weights_only=False))
    assert [*found.verify_crc()] == []


def test_storages_that_are_to_be_filled_later_are_no_damage(tmp_path: Path, reader: Reader) -> None:
    """Shows it for a file that torch left holes in, beyond four gigabytes."""
    with torch.serialization.skip_data():
        saved = {"a": torch.empty((4 << 30) + 5, dtype=torch.int8), "b": torch.arange(3)}
        path = save(tmp_path / "a.pt", saved)
    with open(path, "r+b") as file:
        record = read_archive(reader, path).records["a/data/1"]
        file.seek(record.start)
        file.write(raw(saved["b"]))
    with Reader() as again:
        found = taken(again, path)
        assert found.root["a"].shape == ((4 << 30) + 5,)
        assert same(found.root["b"], saved["b"])
        assert [*found.verify_crc()] == []


def test_storages_of_big_endian_machines(tmp_path: Path, reader: Reader) -> None:
    """Shows that they are turned round as torch does it; an order that is none is refused."""
    saved = {
        name: torch.arange(6).to(getattr(torch, name))
        for name in ("int16", "float32", "float64", "bfloat16", "complex64", "uint8", "uint16")
    }
    source = save(tmp_path / "little.pt", saved)
    path = rezipped(source, tmp_path / "big.pt", instead={"byteorder": b"big"})
    found = taken(reader, path)
    assert alike(found.root, torch.load(path))
    assert content(found.root["int16"]) == bytes(b for n in range(6) for b in (0, n))
    path = rezipped(source, tmp_path / "none.pt", without="byteorder")
    assert alike(taken(reader, path).root, saved)
    path = rezipped(source, tmp_path / "odd.pt", instead={"byteorder": b"odd"})
    with pytest.raises(FormatError, match=r"odd\.pt: the record byteorder says 'odd'"):
        read_torch(reader, path)


# What it is

OTHERS: dict[str, Kind] = {}


def other(kind: Kind) -> Any:
    """Make a function write a file of some kind."""

    def register(write: Any) -> Any:
        OTHERS[write.__name__] = kind
        globals()[write.__name__] = write
        return write

    return register


@other(Kind.SCRIPT)
def script(path: Path) -> None:
    """A module of TorchScript."""
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), str(path))


@other(Kind.EXPORTED)
def exported(path: Path) -> None:
    """A program of torch.export."""
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, str(path))


@other(Kind.PACKAGE)
def packaged(path: Path) -> None:
    """A package with a tensor in it."""
    with torch.package.PackageExporter(str(path)) as made:
        made.save_pickle("model", "model.pkl", torch.arange(3))


@other(Kind.OTHER_ZIP)
def arrays(path: Path) -> None:
    """NumPy's arrays."""
    with path.open("wb") as file:
        np.savez(file, a=np.arange(3))


@other(Kind.TAR)
def tar(path: Path) -> None:
    """What torch.save wrote before 0.1.10, as far as it tells itself by."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as made:
        for name in ("storages", "tensors", "pickle"):
            made.addfile(tarfile.TarInfo(name))


@other(Kind.PICKLE)
def pickled(path: Path) -> None:
    """A pickle."""
    path.write_bytes(pickle.dumps({"a": np.arange(300)}))


@other(Kind.PICKLE)
def small_pickle(path: Path) -> None:
    """A number that is none of torch's."""
    path.write_bytes(pickle.dumps(1))


@other(Kind.SAFETENSORS)
def safetensors(path: Path) -> None:
    """A file of safetensors."""
    save_file({"a": torch.arange(3)}, path)


@other(Kind.EMPTY)
def empty(path: Path) -> None:
    """Nothing."""
    path.write_bytes(b"")


@other(Kind.UNKNOWN)
def text(path: Path) -> None:
    """Text."""
    path.write_text('{"a": 1}' * 100)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # by torch.package itself
@pytest.mark.filterwarnings("ignore:`torch.jit")  # torch's own word that it is deprecated
@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_told_apart(name: str, tmp_path: Path, reader: Reader) -> None:
    """Shows that each is named for what it is, and refused with a way out."""
    globals()[name](tmp_path / "a.pt2")
    path = str(tmp_path / "a.pt2")
    assert recognise(reader, path) is OTHERS[name]
    with pytest.raises(FormatError, match=f"this is {OTHERS[name]}, and no.*What to do") as raised:
        read_torch(reader, path)
    assert isinstance(raised.value, Damaged) is (name == "empty")


# What is wrong


def damage_of(path: str) -> list[str]:
    """What is found of a file without reading its storages."""
    with Reader() as reader:
        found = read_torch(reader, path)
        return [str(error) for error in found.damage]


def test_a_storage_that_is_missing_or_of_another_length(tmp_path: Path, reader: Reader) -> None:
    """Shows that the record is named, the other tensors are read, and it says so again itself."""
    saved = {"a": torch.arange(3), "tied": torch.arange(3), "c": torch.arange(2)}
    saved["tied"] = saved["a"][1:]
    source = save(tmp_path / "a.pt", saved)
    for path, says in (
        (rezipped(source, tmp_path / "b.pt", without="data/0"), "data/0 is missing, and a storage"),
        (rezipped(source, tmp_path / "c.pt", instead={"data/0": bytes(23)}), "data/0 has 23 bytes"),
    ):
        found = read_torch(reader, path)
        (error,) = found.damage
        assert f"{path}: the record {says}" in str(error)
        assert same(found.root["c"], saved["c"])
        for name in ("a", "tied"):
            with pytest.raises(Damaged, match=says):
                content(found.root[name])


def test_a_storage_that_is_compressed(tmp_path: Path, reader: Reader) -> None:
    """Shows that the rest is read, and the way out is told; where the pickle is, nothing is."""
    saved = {"a": torch.arange(300), "b": torch.arange(3)}
    source = save(tmp_path / "a.pt", saved)
    path = tmp_path / "b.pt"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            packed = info.filename.endswith("data/0")
            method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
            new.writestr(info.filename, old.read(info), method)
    found = read_torch(reader, str(path))
    (error,) = found.damage
    assert re.search(r"b\.pt: a/data/0: it is compressed.*zip -0", str(error))
    assert same(found.root["b"], saved["b"])
    with pytest.raises(FormatError, match="it is compressed"):
        content(found.root["a"])
    path = tmp_path / "c.pt"
    rezipped(source, path, method=zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match="it is compressed"):
        read_torch(reader, str(path))


def test_a_tensor_that_leaves_its_storage(tmp_path: Path, reader: Reader) -> None:
    """Shows it for a shape in the pickle that the storage is too small for."""
    source = save(tmp_path / "a.pt", {"a": torch.zeros(77, dtype=torch.int8)})
    with zipfile.ZipFile(source) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith("data.pkl"))
        data = archive.read(name)
    assert data.count(b"K\x4d\x85") == 1
    changed = data.replace(b"K\x4d\x85", b"K\x4e\x85")
    path = rezipped(source, tmp_path / "b.pt", instead={"data.pkl": changed})
    found = read_torch(reader, path)
    (error,) = found.damage
    assert "ends at byte 78, but there are 77 bytes" in str(error)
    with pytest.raises(Damaged, match="ends at byte 78"):
        content(found.root["a"])


def test_a_flipped_bit_is_found_by_the_deep_check(tmp_path: Path, reader: Reader) -> None:
    """Shows that a storage's is, and that one in the pickle is found at once."""
    path = Path(save(tmp_path / "a.pt", {"a": torch.arange(300)}))
    found = taken(reader, str(path))
    assert found.archive is not None
    whole = bytearray(path.read_bytes())
    for name, deep in (("a/data/0", True), ("a/data.pkl", False)):
        spoilt = bytearray(whole)
        spoilt[found.archive.records[name].start + 10] ^= 1
        other = tmp_path / "other.pt"
        other.write_bytes(spoilt)
        with Reader() as again:
            if deep:
                (error,) = taken(again, str(other)).verify_crc()
                assert f"{name}: its bytes" in str(error)
            else:
                with pytest.raises(Damaged, match=f"{name}: its bytes"):
                    read_torch(again, str(other))


def legacy(path: Path) -> tuple[str, dict[str, Any], list[int]]:
    """A file of the old format, what is in it, and where each storage begins."""
    saved = {
        name: torch.arange(size, dtype=torch.int32)
        for name, size in zip("abc", (5, 0, 9), strict=True)
    }
    source = save(path, saved, **OLD)
    whole, at = path.read_bytes(), 0
    for _ in range(5):
        at = pickles.read(whole, at).end
    begins = []
    while at < len(whole):
        begins.append(at)
        at += 8 + 4 * struct.unpack_from("<q", whole, at)[0]
    assert len(begins) == 3
    return source, saved, begins


def test_an_old_file_is_cut_at_every_byte(tmp_path: Path) -> None:
    """Shows that the first storage that is not whole is named, and those before it are read."""
    source, saved, begins = legacy(tmp_path / "a.pt")
    whole = Path(source).read_bytes()
    path = tmp_path / "cut.pt"
    sizes = [len(whole) if n == 3 else begins[n] for n in range(4)]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with Reader() as reader:
            if length < begins[0]:
                with pytest.raises(FormatError, match=r"cut\.pt: .*What to do"):
                    read_torch(reader, str(path))
                continue
            found = read_torch(reader, str(path))
            number = max(n for n in range(3) if sizes[n] <= length)
            (error,) = found.damage
            assert f"byte {begins[number]:,}: " in str(error)
            assert f"{3 - number} storages are lost" in str(error)
            intact = [key for key, tensor in saved.items() if same_or_lost(found.root[key], tensor)]
            assert len(intact) >= number


def same_or_lost(found: Any, tensor: torch.Tensor) -> bool:
    """Whether values are a tensor's; if not, they can't be read at all."""
    try:
        return same(found, tensor)
    except Damaged:
        return False


def test_an_old_file_whose_storages_do_not_fit(tmp_path: Path) -> None:
    """Shows it for a count that differs, a negative one, and a list that names others."""
    source, _, begins = legacy(tmp_path / "a.pt")
    whole = bytearray(Path(source).read_bytes())
    path = tmp_path / "b.pt"
    struct.pack_into("<q", whole, begins[0], -1)
    path.write_bytes(whole)
    (error,) = damage_of(str(path))
    assert f"byte {begins[0]:,}: " in error
    sizes = [struct.unpack_from("<q", Path(source).read_bytes(), at)[0] for at in begins]
    at = begins[sizes.index(0)]
    shorter = bytearray(Path(source).read_bytes())
    long = sizes.index(5)
    struct.pack_into("<q", shorter, begins[long], 4)
    del shorter[begins[long] + 8 : begins[long] + 12]
    path.write_bytes(shorter)
    (error,) = damage_of(str(path))
    assert f"it has 16 bytes from byte {begins[long] + 8:,} on, and should have 20" in error
    assert at >= begins[0]
    keys_at = Path(source).read_bytes()
    start = 0
    for _ in range(4):
        start = pickles.read(keys_at, start).end
    keys = pickles.read(keys_at, start).value
    for listed, says in (
        (keys[:1], "the file does not list it"),
        (["1", *keys], "a storage begins there that nothing speaks of"),
        ({}, "no list of storages"),
    ):
        path.write_bytes(keys_at[:start] + pickle.dumps(listed, 2) + keys_at[begins[0] :])
        if type(listed) is dict:
            with pytest.raises(FormatError, match=says):
                damage_of(str(path))
        else:
            assert any(says in problem for problem in damage_of(str(path)))


def test_an_old_file_of_another_protocol_is_refused(tmp_path: Path) -> None:
    """Shows it for a number that no torch ever wrote."""
    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps(torch_file.LEGACY_MAGIC, 2) + pickle.dumps(1002, 2))
    with pytest.raises(FormatError, match="whose protocol is not 1001"):
        damage_of(str(path))


@given(form=st.sampled_from(sorted(FORMATS)), data=st.data())
def test_a_changed_file_raises_only_what_is_told(
    form: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Shows it for files of which a few bytes were changed, and then read as far as can be."""
    path = tmp_path_factory.mktemp("changed") / "a.pt"
    save(path, {"a": torch.arange(9), "b": [torch.zeros(2, 3).t(), np.arange(3)]}, **FORMATS[form])
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.sampled_from((0, 0xFF, whole[at] ^ 1, whole[at] ^ 0x80)))
    path.write_bytes(whole)
    with Reader() as reader, contextlib.suppress(HandfastError):
        read_all(read_torch(reader, str(path)))
    path.unlink()


def read_all(found: TorchFile) -> None:
    """Read the values of all tensors; those that are damaged say so."""
    for _, leaf in leaves(found.root):
        part = values(leaf)
        if part is not None:
            with contextlib.suppress(FormatError):
                content(part)


def test_nothing_in_a_file_is_run(tmp_path: Path, reader: Reader) -> None:
    """Shows it for a module that was pickled whole, with a command in the place of its state."""
    ran = tmp_path / "ran"
    for form, options in FORMATS.items():
        path = save(tmp_path / f"{form}.pt", {"a": torch.arange(3), "trap": Trap(ran)}, **options)
        found = taken(reader, path)
        assert found.root["trap"].type == "posix.system"
        assert not ran.exists()
        torch.load(path, weights_only=False)
        assert ran.exists()
        ran.unlink()


class Trap:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.path}",)


def test_raw_is_what_torch_says() -> None:
    """Shows that the yardstick of these tests is right: bytes in row-major order."""
    tensor = torch.tensor([[1, 2], [3, 4]], dtype=torch.int16).t()
    assert raw(tensor) == struct.pack("<4h", 1, 3, 2, 4)
