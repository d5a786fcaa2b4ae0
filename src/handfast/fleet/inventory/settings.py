"""What the job is told by its environment and by the files that its libraries read.

**NCCL's files are read as NCCL reads them** (src/misc/param.cc and setenv in src/os/linux.cc, NCCL
2.30): `NCCL_CONF_FILE`, or where that is empty `~/.nccl.conf` of the user's entry in the password
database; then `/etc/nccl.conf`. A line `NAME=VALUE` becomes a variable unless it is set; the first
word counts. So a setting is the same fact whether it came from the environment or from a file, and
a file that only names this node's interfaces makes no difference between two nodes. Of the files
themselves the hash is told, for each node.

**Topology and graph files** count by content. NCCL loads /var/run/nvidia-topologyd/
virtualTopology.xml where it is there and NCCL_TOPO_FILE is not set (its guide, NCCL_TOPO_FILE).

**UCX's** have sections that apply to some machines only; they are hashed. Order of places:
ucs_config_parse_config_files in src/ucs/config/parser.c, UCX 1.18. Its compiled-in directory and
the one beside its library can't be seen from outside; /etc/ucx is where distributions put the
first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Final

from handfast.fleet.inventory.collector import Collector
from handfast.fleet.inventory.facts import Fact, Kind, Tier, Want
from handfast.fleet.inventory.host import Host, Unsure, asked
from handfast.fleet.inventory.variables import classify

__all__ = ["ENVIRONMENT", "FILES"]

SYSTEM: Final = "/etc/nccl.conf"
TOPOLOGY: Final = "/var/run/nvidia-topologyd/virtualTopology.xml"
MOST: Final = 16 << 20  # bytes of a topology file

_ENV: Final = Want("env", Tier.JOB, family=True)
_FILE: Final = Want("file", Tier.JOB, family=True)


def _nccl_files(host: Host) -> list[str]:
    """Name the configuration files that NCCL reads, the one that wins first."""
    named = host.environ.get("NCCL_CONF_FILE")
    users = named or (f"{host.home}/.nccl.conf" if host.home else "")
    return [*([users] if users else []), SYSTEM]


def _environment(host: Host) -> Iterator[Fact]:
    settings = {name: (value, "the environment") for name, value in host.environ.items()}
    problem = ""
    for path in _nccl_files(host):
        try:
            text = (host.data(_absolute(host, path), "/") or b"").decode(errors="replace")
        except Unsure as error:
            problem = str(error)
            continue
        for line in text.split("\n"):
            name, equals, value = line.partition("=")
            if equals and not line.startswith("#"):
                settings.setdefault(name, (value, path))
    for name, (value, source) in settings.items():
        kind = classify(name)
        if kind is not None:
            yield _ENV.below(name, kind).known(value, source)
    if problem:  # what is set there, and not here, nobody knows
        yield _ENV.unknown(problem)
    else:
        yield _ENV.known("read", "the environment and NCCL's files")


def _absolute(host: Host, path: str) -> str:
    return path if path.startswith("/") else f"{host.directory.rstrip('/')}/{path}"


def _files(host: Host) -> Iterator[Fact]:
    environ, system = host.environ, _nccl_files(host)
    places = {
        "nccl.conf.system": (SYSTEM, Kind.PER_NODE),
        "nccl.conf.user": (system[0] if len(system) > 1 else "", Kind.PER_NODE),
        "nccl.topology": (environ.get("NCCL_TOPO_FILE") or TOPOLOGY, Kind.EXACT),
        "nccl.graph": (environ.get("NCCL_GRAPH_FILE", ""), Kind.EXACT),
        "ucx.system": ("/etc/ucx/ucx.conf", Kind.EXACT),
        "ucx.home": (_in(environ.get("HOME", "")), Kind.EXACT),
        "ucx.directory": (_in(environ.get("UCX_CONFIG_DIR", "")), Kind.EXACT),
        "ucx.here": (_in(host.directory), Kind.EXACT),
    }
    yield _FILE.known("read", "the files that NCCL and UCX read")
    for part, (path, kind) in places.items():
        want = _FILE.below(part, kind)
        if path:
            yield asked(want, path, partial(_hash, host, path))


def _in(directory: str) -> str:
    return f"{directory.rstrip('/')}/ucx.conf" if directory else ""


def _hash(host: Host, path: str) -> str | None:
    data = host.data(_absolute(host, path), "/", MOST)
    return None if data is None else "sha256:" + hashlib.sha256(data).hexdigest()[:32]


ENVIRONMENT: Final = Collector((_ENV,), _environment)
FILES: Final = Collector((_FILE,), _files)
