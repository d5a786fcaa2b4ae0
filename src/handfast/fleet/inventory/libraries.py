"""What a rank's process has loaded, or would load: NCCL, its plugins, UCX, libfabric, CUDA, torch.

What is mapped in the process wins. Only where nothing is, that is looked for which would be loaded:
beside torch (its wheels bring NCCL and CUDA along) and where the loader looks. Where these are of
two versions nobody can say which the process will take, and so it is unknown until it has.

A library is asked by a call of its own, in this process, which is thrown away afterwards; the rank
itself calls nothing. None of the calls needs a GPU. A file that was replaced under the process
can't be asked any more: what is at its path is another library.

Calls: `ncclGetVersion` (its user guide, "NCCL API"; before 2.9 the code was 1000, 100 and 1 times
the parts, since then 10000, 100 and 1: nccl.h); `ucp_get_version_string` (ucp.h, UCX 1.22);
`fi_tostr(…, FI_TYPE_VERSION)`, the 19th of fi_type (rdma/fabric.h, fi_tostr.3, libfabric 1.17);
`cudaRuntimeGetVersion` (CUDA Runtime API). The user half of the GPU driver has its version in the
name of its file, `libcuda.so.VERSION`. Plugins tell no version, so their content stands for it, as
a fact of its own: two builds of one plugin are less than a plugin on some ranks only. Names as in
src/plugin/plugin_open.cc, NCCL 2.30.
"""

from __future__ import annotations

import ast
import ctypes
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain
from typing import Final

from handfast.fleet.inventory.collector import Collector
from handfast.fleet.inventory.facts import Fact, Kind, Tier, Want, spell
from handfast.fleet.inventory.host import DELETED, Host, Unsure, asked

__all__ = ["CUDA", "LIBFABRIC", "NCCL", "PLUGINS", "TORCH", "UCX"]

RTLD_DI_LINKMAP: Final = 2  # dlfcn.h of glibc 2.36
FI_TYPE_VERSION: Final = 18
SHOWN: Final = 16  # hex digits of a plugin's hash

NONE: Final = "none"  # of plugins, where NCCL uses its own: what NCCL_NET_PLUGIN is set to for it

_PLUGINS: Final = ("net", "gin", "rma", "tuner", "profiler", "env")


class _LinkMap(ctypes.Structure):
    """The beginning of glibc's struct link_map (link.h): where a library is, and its path."""

    _fields_ = (("address", ctypes.c_void_p), ("name", ctypes.c_char_p))


@dataclass(frozen=True)
class _Library:
    """A library by the names of its files, where torch's wheels have it, and how it is asked."""

    name: str
    soname: str  # what the loader is asked for; none where it differs from version to version
    files: str  # a pattern for the name of a file
    wheels: tuple[str, ...]  # below a directory of sys.path
    ask: Callable[[str], str]  # of a path
    call: bytes = b""  # a function that no other library has
    in_torch: bool = False  # whether torch may have it built in


def _nccl(path: str) -> str:
    code = ctypes.c_int()
    if status := ctypes.CDLL(path).ncclGetVersion(ctypes.byref(code)):
        raise Unsure(f"{path}: ncclGetVersion returned {status}")
    return _parts(code.value, 10000 if code.value >= 10000 else 1000)


def _parts(code: int, first: int) -> str:
    return f"{code // first}.{code % first // 100}.{code % 100}"


def _ucx(path: str) -> str:
    ask = ctypes.CDLL(path).ucp_get_version_string
    ask.restype = ctypes.c_char_p
    return str(ask().decode())


def _fabric(path: str) -> str:
    ask = ctypes.CDLL(path).fi_tostr
    ask.restype = ctypes.c_char_p
    return str(ask(b"1", FI_TYPE_VERSION).decode())


def _cuda(path: str) -> str:
    code = ctypes.c_int()
    if status := ctypes.CDLL(path).cudaRuntimeGetVersion(ctypes.byref(code)):
        raise Unsure(f"{path}: cudaRuntimeGetVersion returned {status}")
    return f"{code.value // 1000}.{code.value % 1000 // 10}"


def _userspace(path: str) -> str:
    version = os.path.realpath(path).partition(".so.")[2]
    if "." not in version:
        raise Unsure(f"{path}: its name has no version of a driver")
    return version


_LIBRARIES: Final = {
    each.name: each
    for each in (
        _Library(
            "nccl",
            "libnccl.so.2",
            r"libnccl\.so.*",
            ("nvidia/nccl/lib", "nvidia/cu13/lib"),
            _nccl,
            b"ncclGetVersion",
            in_torch=True,
        ),
        _Library(
            "ucx",
            "libucp.so.0",
            r"libucp(-\w+)?\.so.*",
            ("libucx/lib",),
            _ucx,
            b"ucp_get_version_string",
        ),
        _Library(
            "libfabric",
            "libfabric.so.1",
            r"libfabric(-\w+)?\.so.*",
            (),
            _fabric,
            b"fi_tostr",
        ),
        _Library(
            "cuda.runtime",
            "",
            r"libcudart(-\w+)?\.so\.\d+.*",
            ("nvidia/cuda_runtime/lib", "nvidia/cu13/lib"),
            _cuda,
            b"cudaRuntimeGetVersion",
            in_torch=True,
        ),
        _Library("cuda.driver", "libcuda.so.1", r"libcuda\.so.*", (), _userspace),
    )
}


def _where(library: ctypes.CDLL) -> str:
    """Give the path that the loader found a library at."""
    found = ctypes.POINTER(_LinkMap)()
    dlinfo = ctypes.CDLL(None).dlinfo
    dlinfo.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    if dlinfo(library._handle, RTLD_DI_LINKMAP, ctypes.byref(found)):
        raise Unsure("the loader does not say where it found the library")
    return os.path.realpath(os.fsdecode(found.contents.name))


def _loaded(name: str) -> str | None:
    """Load a library as the loader does, and say where it was; None where there is none."""
    try:
        return _where(ctypes.CDLL(name))
    except OSError as error:
        if "No such file" in str(error) and name in str(error).partition(":")[0]:
            return None
        raise Unsure(f"{name} is there and can't be loaded: {error}") from error


def _mapped(host: Host, files: str) -> list[str]:
    """Find what is mapped by the names of files. Raises Unsure where one was replaced since."""
    found = [
        path
        for path in host.maps
        if re.fullmatch(files, os.path.basename(path).removesuffix(DELETED))
    ]
    if gone := [path for path in found if path.endswith(DELETED)]:
        raise Unsure(f"{gone[0].removesuffix(DELETED)} was replaced since the process loaded it")
    return found


def _ahead(library: _Library) -> list[str]:
    """Find what would be loaded: beside torch, and where the loader looks."""
    homes = [f"{place or '.'}/{wheel}" for place in sys.path for wheel in library.wheels]
    found = [
        f"{home}/{name}"
        for home in homes
        if os.path.isdir(home)
        for name in os.listdir(home)
        if re.fullmatch(library.files, name)
    ]
    system = _loaded(library.soname) if library.soname else None
    return sorted({os.path.realpath(path) for path in [*found, *([system] if system else [])]})


def _collector(*names: str) -> Collector:
    """Make the collector of some libraries' versions and places."""
    wants = {
        name: (Want(f"{name}.version", Tier.JOB), Want(f"{name}.path", Tier.JOB, Kind.PER_NODE))
        for name in names
    }

    def collect(host: Host) -> Iterator[Fact]:
        for name, (version, path) in wants.items():
            yield from _library(host, _LIBRARIES[name], version, path)

    return Collector(tuple(want for pair in wants.values() for want in pair), collect)


def _library(host: Host, library: _Library, version: Want, path: Want) -> Iterator[Fact]:
    try:
        found, source = _find(host, library)
        said = dict.fromkeys(map(library.ask, found))
        if len(said) > 1:
            raise Unsure(f"{' and '.join(said)}, by {' and '.join(found)}: load it, then ask again")
    except (Unsure, OSError, AttributeError) as error:
        yield from (want.unknown(str(error)) for want in (version, path))
        return
    if said:
        yield version.known(spell(said), f"{source}: {found[0]}")
        yield path.known(" ".join(found), source)
    else:
        yield from (want.absent(source) for want in (version, path))


def _find(host: Host, library: _Library) -> tuple[list[str], str]:
    """Find a library that the process has, or would load; also which. Raises Unsure."""
    _live(host)
    if found := _mapped(host, library.files):
        return found, "mapped in the process"
    _elsewhere(host, library)
    return _ahead(library), "what would be loaded"


def _elsewhere(host: Host, library: _Library) -> None:
    """Raise Unsure where the process may have a library under another name than its own.

    Torch may have it built in; and what is preloaded may be called anything.
    """
    if library.in_torch and any("libtorch_cuda" in each for each in host.maps):
        raise Unsure(
            f"torch is loaded, and no {library.soname or library.name}: it may be a part of "
            "torch's own library"
        )
    for name in filter(None, re.split(r"[ :]", host.environ.get("LD_PRELOAD", ""))):
        found = [path for path in host.maps if os.path.basename(path) == os.path.basename(name)]
        for path in found or ([name] if os.path.isfile(name) else []):
            if library.call and library.call in _bytes(path):
                call = library.call.decode()
                raise Unsure(f"{path} is preloaded and has {call}: call it {library.soname}")


def _bytes(path: str) -> bytes:
    """Give a file's bytes, in which the names of its symbols stand."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise Unsure(f"{path}: {error.strerror}") from error


def _live(host: Host) -> None:
    if not host.live:
        raise Unsure("libraries can be asked on the machine itself only, in the rank's container")


def _plugins(host: Host) -> Iterator[Fact]:
    for kind, (which, content) in _PLUGIN_WANTS.items():
        named = host.environ.get(f"NCCL_{kind.upper()}_PLUGIN", "")
        source = named or f"libnccl-{kind}.so"
        yield asked(which, source, partial(_which, host, kind, named))
        yield asked(content, source, partial(_content, host, kind, named))


_PLUGIN_WANTS: Final = {
    kind: (
        Want(f"nccl.plugin.{kind}", Tier.JOB),
        Want(f"nccl.plugin.{kind}.content", Tier.JOB),
    )
    for kind in _PLUGINS
}


def _which(host: Host, kind: str, named: str) -> str | None:
    """Name the plugins of a kind; NONE where NCCL has none, and None where there is no NCCL."""
    names = {os.path.basename(path).partition(".so")[0] for path in _files(host, kind, named)}
    if names:
        return " ".join(sorted(names))
    try:
        return NONE if _find(host, _LIBRARIES["nccl"])[0] else None
    except Unsure:  # it may have NCCL, under another name
        return NONE


def _content(host: Host, kind: str, named: str) -> str | None:
    """Identify the plugins of a kind by what is in their files; None where there are none."""
    return " ".join(sorted(map(_identify, _files(host, kind, named)))) or None


def _files(host: Host, kind: str, named: str) -> list[str]:
    _live(host)
    found = _mapped(host, rf"libnccl-{kind}\b.*\.so.*")
    if not found and named.lower() != NONE:
        names = [name.strip() for name in named.split(",")]
        found = [path for name in names if (path := _first(kind, name))]
    return found


def _first(kind: str, name: str) -> str | None:
    """Find a plugin by the names that NCCL tries."""
    tried = [name or f"libnccl-{kind}.so"]
    if name and "/" not in name and not (name.startswith("lib") and name.endswith(".so")):
        tried.append(f"libnccl-{kind}-{name}.so")
    return next((path for each in tried if (path := _loaded(each))), None)


def _identify(path: str) -> str:
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Unsure(f"{path}: {error.strerror}") from error
    return f"sha256:{digest[:SHOWN]}"


_VERSION: Final = Want("torch.version", Tier.JOB)
_BUILD: Final = {
    "cuda": Want("torch.cuda", Tier.JOB),
    "git_version": Want("torch.git", Tier.JOB),
}


def _torch(host: Host) -> Iterator[Fact]:
    """Read torch's own record of its build, without running it."""
    wants = (_VERSION, *_BUILD.values())
    try:
        _live(host)
        source, said = _record()
    except Unsure as error:
        yield from (want.unknown(str(error)) for want in wants)
        return
    loaded = host.modules.get("torch")
    if loaded is not None and said.get("__version__") != loaded:
        yield _VERSION.known(loaded, "loaded in the process")
        reason = f"{loaded} is loaded, and {said.get('__version__', 'none')} is on the disk"
        yield from (want.unknown(reason, source) for want in _BUILD.values())
    elif not said:
        yield from (want.absent(source) for want in wants)
    else:
        yield _VERSION.known(str(said["__version__"]), source)
        for name, want in _BUILD.items():
            value = said.get(name)
            yield want.absent(source) if value is None else want.known(str(value), source)


def _record() -> tuple[str, dict[str, object]]:
    """Read the constants of torch/version.py, and where they are; none where there is no torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return "no module torch", {}
    path = os.path.join(os.path.dirname(spec.origin), "version.py")
    try:
        with open(path, encoding="utf-8") as file:
            lines: Iterable[ast.stmt] = ast.parse(file.read()).body
    except (OSError, SyntaxError) as error:
        raise Unsure(f"{path}: {error}") from error
    said: dict[str, object] = {}
    for line in lines:
        target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
        value = getattr(line, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
            said[target.id] = value.value
    if "__version__" not in said:
        raise Unsure(f"{path}: it names no version")
    return path, said


NCCL: Final = _collector("nccl")
PLUGINS: Final = Collector(tuple(chain.from_iterable(_PLUGIN_WANTS.values())), _plugins)
UCX: Final = _collector("ucx")
LIBFABRIC: Final = _collector("libfabric")
CUDA: Final = _collector("cuda.runtime", "cuda.driver")
TORCH: Final = Collector((_VERSION, *_BUILD.values()), _torch)
