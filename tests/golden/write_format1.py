"""Writes the golden files of format 1, once: every later handfast must read them.

    python tests/golden/write_format1.py

It refuses to overwrite: a file that changes is golden no more. What a later release adds to the
format goes into files of its own, beside these.
"""

import datetime as dt
import hashlib
import json
import random
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from handfast.core.lattice import Epoch
from handfast.store import objects
from handfast.store.image import DTYPES, TensorSpec, plan
from handfast.store.manifest import Manifest, Piece, Stamp, chunk_hash, digest, encode, hash_chunks

HERE = Path(__file__).parent / "format1"
CHUNK = 4096
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (3,), (2, 3))


def state() -> dict[str, Any]:
    """The objects: every type that format 1 knows. Part of the format: never change it."""
    east = dt.timezone(dt.timedelta(hours=5, minutes=45), "NPT")
    return {
        "atoms": [None, True, False, 0, -1, 2**63, 2**64 - 1, -(2**63), 0.0, -0.0, 0.1, 5e-324],
        "infinite": [float("inf"), float("-inf")],
        "large": [2**64, -(2**63) - 1, 2**127, -(2**200), 10**100],
        "text": ["", "ß", "模型", "\0", "\ud800", "x" * 300],
        "bytes": [b"", bytes(range(256))],
        "complex": [1 + 2j, complex(-0.0, float("inf"))],
        "sequences": [(), [], (1, [2, (3,)]), deque([1, 2], 5), deque()],
        "mappings": [
            {"b": 1, "a": 2, 3: "int", 2.5: "float", None: 0, b"k": 1, (1, ("x",)): [], 2**70: 1},
            OrderedDict(z=1, a=2),
            Counter({30: 1, 80: 2}),
            *[defaultdict(made, {"a": 1}) for made in (None, list, int, dict, float, set)],
        ],
        "sets": [set(), {1, "a", None, (1, 2)}, frozenset({b"a", frozenset({1})})],
        "ranges": [slice(1, None, -1), range(10, -5, -3), range(2**70)],
        "paths": [Path("/a/b"), PurePosixPath("a/../b"), PureWindowsPath("C:\\x")],
        "dates": [
            dt.date(2024, 2, 29),
            dt.time(1, 2, 3, 4, fold=1),
            dt.datetime(2024, 1, 2, 3, 4, 5, 6, dt.UTC),
            dt.datetime(2024, 1, 2, tzinfo=east),
            dt.timedelta(-1, 2, 3),
            dt.UTC,
            east,
        ],
        "tensor": objects.TensorRef("float32/2x3"),
        "rng": random.Random(1).getstate(),
        "pcg64": {"state": 2**127 + 1, "inc": 2**128 - 1},
        "scalars": [
            np.bool_(True),
            np.int8(-1),
            np.uint64(2**64 - 1),
            np.float16(0.5),
            np.float32(0.1),
            np.complex128(1j),
            np.str_("ß\0"),
            np.bytes_(b"a\0"),
            np.datetime64("2024-01-02"),
            np.timedelta64(3, "25s"),
            np.void(b"abc"),
        ],
        "arrays": [
            np.arange(6, dtype="<i8").reshape(2, 3),
            np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3)),
            np.zeros((0, 3), "f2"),
            np.array(5, "u1"),
            np.array(["ab", ""]),
            np.array(["2024", "NaT"], "M8[s]"),
            np.array([(1, [2, 3])], [("a", "i1"), ("b", ">f8", (2,))]),
        ],
        "dtypes": [
            np.dtype("f4"),
            np.dtype(">i2"),
            np.dtype([("a", "f4"), ("b", "i1")], align=True),
            np.dtype(("f4", (2, 3))),
        ],
    }


def specs() -> list[TensorSpec]:
    """Every dtype in four shapes, a shard of a larger tensor, and one that fills some chunks."""
    whole = [
        TensorSpec(
            f"{dtype}/{'x'.join(map(str, shape))}",
            dtype,
            shape,
            shape,
            (0,) * len(shape),
            {0: (), 1: (1,), 2: (3, 1)}[len(shape)],
        )
        for dtype in DTYPES
        for shape in SHAPES
    ]
    shard = TensorSpec("model/shard", "bfloat16", (2, 4), (6, 4), (4, 0), (1, 2))
    return [*whole, shard, TensorSpec("model/large", "int8", (20_000,), (20_000,), (0,), (1,))]


def content(path: str, nbytes: int, step: int) -> bytes:
    """A tensor's bytes; between the two steps only the first half of model/large changes."""
    seed = sum(path.encode())
    changed = nbytes // 2 if path == "model/large" and step == 200 else 0
    return bytes((seed + at * at + (at < changed)) % 2 for at in range(nbytes))


def stamp(step: int, parent: Epoch | None) -> Stamp:
    """The stamp of shard 1 of 4."""
    return Stamp("run-7f", "main", 3, step, "rank1-00ff", 1, 4, 2, "c0ffee", parent)


def files() -> dict[str, bytes]:
    """A full image, a delta on it, an image of nothing, and their manifests."""
    layout = plan(specs())
    images = {
        step: layout.header + b"".join(content(s.spec.path, s.nbytes, step) for s in layout.slots)
        for step in (100, 200)
    }
    chunks = -(-layout.nbytes // CHUNK)
    fields: dict[str, Any] = {
        "slots": layout.slots,
        "aliases": {"model/tied": "model/large"},
        "objects": objects.encode(state()),
        "environment": {"torch": "2.13.0", "threads": "2"},
        "image_bytes": layout.nbytes,
        "chunk_bytes": CHUNK,
        "replicated": ("model/large",),
        "structure": "5eed",
    }
    full = Manifest(
        stamp=stamp(100, None),
        hashes=hash_chunks(images[100], CHUNK),
        sources=("full.safetensors",),
        pieces=(Piece(0, chunks, 0, 0),),
        **fields,
    )
    parts = [images[200][at : at + CHUNK] for at in range(0, layout.nbytes, CHUNK)]
    changed = [at for at in range(chunks) if chunk_hash(parts[at]) not in full.hashes]
    first, last = changed[0], changed[-1]
    pieces = (
        Piece(0, first, 0, 0),
        Piece(first, last - first + 1, 1, 0),
        Piece(last + 1, chunks - last - 1, 0, (last + 1) * CHUNK),
    )
    delta = Manifest(
        stamp=stamp(200, Epoch(3, 100)),
        hashes=hash_chunks(images[200], CHUNK),
        sources=("full.safetensors", "delta.delta"),
        pieces=pieces,
        **fields,
    )
    bare = plan([])
    nothing = Manifest(
        stamp=stamp(0, None),
        hashes=hash_chunks(bare.header, CHUNK),
        sources=("nothing.safetensors",),
        pieces=(Piece(0, 1, 0, 0),),
        **fields
        | {"slots": (), "aliases": {}, "replicated": (), "environment": {}}
        | {"objects": objects.encode(None), "image_bytes": bare.nbytes},
    )
    return {
        "full.safetensors": images[100],
        "full.manifest": encode(full),
        "delta.delta": b"".join(parts[first : last + 1]),
        "delta.manifest": encode(delta),
        "nothing.safetensors": bare.header,
        "nothing.manifest": encode(nothing),
    }


def main() -> None:
    """Write the files and, beside them, what they must be."""
    if any(HERE.iterdir()):
        raise SystemExit(f"{HERE} holds golden files already, and they never change")
    index = {}
    for name, data in files().items():
        (HERE / name).write_bytes(data)
        index[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        if name.endswith(".manifest"):
            index[name]["digest"] = digest(data)
    (HERE / "index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    main()
