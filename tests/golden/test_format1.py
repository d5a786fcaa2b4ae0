"""Shows that files of format 1 are read by every later handfast, byte for byte."""

import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open

from handfast.core.lattice import Epoch
from handfast.store import objects
from handfast.store.image import DTYPES
from handfast.store.manifest import Manifest, chunk_hash, decode, digest

HERE = Path(__file__).parent
FILES = HERE / "format1"
INDEX: dict[str, Any] = json.loads((FILES / "index.json").read_text())


def read(name: str) -> Manifest:
    """A golden manifest."""
    return decode((FILES / name).read_bytes(), name)


def image_of(manifest: Manifest) -> bytes:
    """The image, put together from its pieces, every chunk held against its hash."""
    chunk, image = manifest.chunk_bytes, b""
    for piece in manifest.pieces:
        source = (FILES / manifest.sources[piece.source]).read_bytes()
        image += source[piece.at : piece.at + piece.count * chunk]
    image = image[: manifest.image_bytes]
    assert len(image) == manifest.image_bytes
    hashes = [chunk_hash(image[at : at + chunk]) for at in range(0, len(image), chunk)]
    assert b"".join(hashes) == manifest.hashes
    return image


@pytest.mark.parametrize("name", INDEX)
def test_the_files_are_the_golden_ones(name: str) -> None:
    """Whoever rewrites one to make a test pass fails here; digests of votes don't change."""
    data = (FILES / name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == INDEX[name]["sha256"]
    if name.endswith(".manifest"):
        assert digest(data) == INDEX[name]["digest"]


def test_the_index_is_complete() -> None:
    """No golden file that nothing checks."""
    assert {path.name for path in FILES.iterdir()} == {*INDEX, "index.json"}


@pytest.mark.parametrize(("name", "step"), [("full.manifest", 100), ("delta.manifest", 200)])
def test_tensors_of_every_dtype_are_read(name: str, step: int, writer: ModuleType) -> None:
    """Full images and deltas: each tensor's bytes, shape, place and stride."""
    manifest = read(name)
    image = image_of(manifest)
    assert {slot.spec for slot in manifest.slots} == set(writer.specs())
    for slot in manifest.slots:
        stored = image[slot.start : slot.start + slot.nbytes]
        assert stored == writer.content(slot.spec.path, slot.nbytes, step)


def test_stamps_and_the_rest_are_read(writer: ModuleType) -> None:
    """Provenance, aliases, environment, structure."""
    delta = read("delta.manifest")
    assert delta.stamp == writer.stamp(200, Epoch(3, 100))
    assert delta.aliases == {"model/tied": "model/large"}
    assert delta.environment == {"torch": "2.13.0", "threads": "2"}
    assert (delta.replicated, delta.structure) == (("model/large",), "5eed")
    assert (len(delta.sources), len(delta.pieces)) == (2, 3)
    nothing = read("nothing.manifest")
    assert (nothing.slots, nothing.stamp.parent) == ((), None)
    assert len(image_of(nothing)) == nothing.image_bytes == 4096


def test_objects_of_every_type_are_read(writer: ModuleType) -> None:
    """By type and value; the bytes of what is written today are those of then."""
    stored = read("full.manifest").objects
    value, state = objects.decode(stored), writer.state()
    assert value.pop("sets") == state.pop("sets")  # their order is the process's own
    assert repr(value) == repr(state)
    value = objects.decode(stored)
    assert objects.encode(value) == objects.encode(writer.state()) == stored


def test_the_full_image_opens_with_safetensors() -> None:
    """Shapes and dtypes as the library sees them."""
    with safe_open(str(FILES / "full.safetensors"), "pt") as opened:
        for slot in read("full.manifest").slots:
            tensor = opened.get_tensor(slot.spec.path)
            if DTYPES[slot.spec.dtype][1] is None:
                assert (tensor.dtype, tensor.shape) == (torch.uint8, (slot.nbytes,))
            else:
                expected = (getattr(torch, slot.spec.dtype), slot.spec.shape)
                assert (tensor.dtype, tensor.shape) == expected
    with safe_open(str(FILES / "nothing.safetensors"), "pt") as opened:
        assert list(opened.keys()) == []
