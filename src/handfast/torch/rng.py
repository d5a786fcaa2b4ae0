"""Random streams: those of the process, and generators that the user holds.

The streams of the process are Python's ``random``, NumPy's global one (only where NumPy was
imported), torch's on the CPU, and one a CUDA device where CUDA is in use. Reading a stream moves
none of them.
"""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from handfast.torch.names import loaded

__all__ = [
    "generator_class",
    "is_generator",
    "read_generator",
    "read_streams",
    "unmoved_streams",
    "write_generator",
    "write_streams",
]


def _pack(state: torch.Tensor) -> bytes:
    return bytes(state.tolist())  # of an untyped storage it takes far longer


def _unpack(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


def _write_numpy(generator: Any, state: Any) -> None:
    generator.bit_generator.state = state


class _Kind(NamedTuple):
    module: str
    name: str
    read: Callable[[Any], object]
    write: Callable[[Any, Any], None]


_KINDS = (
    _Kind(
        "torch",
        "Generator",
        lambda g: _pack(g.get_state()),
        lambda g, state: g.set_state(_unpack(state)),
    ),
    _Kind("random", "Random", lambda g: g.getstate(), lambda g, state: g.setstate(state)),
    _Kind("numpy.random", "Generator", lambda g: g.bit_generator.state, _write_numpy),
    _Kind(
        "numpy.random",
        "RandomState",
        lambda g: g.get_state(legacy=False),
        lambda g, state: g.set_state(state),
    ),
)


def _kind(value: object) -> _Kind | None:
    return next((k for k in _KINDS if isinstance(value, loaded(k.module, k.name))), None)


def generator_class(generator: Any) -> str:
    """Which kind of generator it is: no two of these can take one another's state."""
    inner = getattr(generator, "bit_generator", None)  # NumPy's algorithm
    device = getattr(generator, "device", None)  # where torch's draws
    about = "" if inner is None else type(inner).__name__
    about = about if device is None else device.type
    kind = _kind(generator)
    name = f"{kind.module}.{kind.name}" if kind is not None else type(generator).__name__
    return f"{name}({about})" if about else name


def is_generator(value: object) -> bool:
    """Whether the value is a torch, Python or NumPy generator."""
    return _kind(value) is not None


def read_generator(generator: object) -> object:
    """The generator's state as a plain value. Raises TypeError for anything else."""
    kind = _kind(generator)
    if kind is None:
        raise TypeError(f"{type(generator).__qualname__} is no random generator")
    return kind.read(generator)


def write_generator(generator: object, state: object) -> None:
    """Put back what :func:`read_generator` gave. Raises TypeError for anything else."""
    kind = _kind(generator)
    if kind is None:
        raise TypeError(f"{type(generator).__qualname__} is no random generator")
    kind.write(generator, state)


def _cuda_in_use() -> bool:
    # Asking an unused CUDA for its streams would start it, on every device.
    cuda: Any = torch.cuda
    return bool(cuda.is_available() and cuda.is_initialized())


def read_streams() -> dict[str, object]:
    """The streams of this process: ``python``, ``torch``, and ``numpy``, ``cuda`` if in use."""
    streams: dict[str, object] = {
        "python": random.getstate(),
        "torch": _pack(torch.get_rng_state()),
    }
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        streams["numpy"] = numpy.get_state(legacy=False)
    if _cuda_in_use():
        streams["cuda"] = [_pack(state) for state in torch.cuda.get_rng_state_all()]
    return streams


def write_streams(streams: dict[str, Any]) -> list[str]:
    """Put the streams back; gives a sentence for each one that could not be."""
    left = []
    random.setstate(streams["python"])
    torch.set_rng_state(_unpack(streams["torch"]))
    if "numpy" in streams:
        import numpy.random

        numpy.random.set_state(streams["numpy"])
    elif "numpy.random" in sys.modules:
        left.append("NumPy's stream was not in use at the save and keeps its state")
    saved = streams.get("cuda", [])
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, state in enumerate(saved[:here]):
        torch.cuda.set_rng_state(_unpack(state), device)
    if len(saved) != here:
        left.append(f"{len(saved)} CUDA streams were saved and {here} devices are here")
    return left


@contextmanager
def unmoved_streams() -> Iterator[None]:
    """Put the streams of the process back where they were, whatever is drawn and raised inside."""
    streams = read_streams()
    try:
        yield
    finally:
        write_streams(streams)
