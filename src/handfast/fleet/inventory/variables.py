"""Which environment variables count, and how: a table, each line with its reason and source.

The first line that fits decides. What begins like a variable of NCCL and is in no line is *exact*:
NCCL has far more variables than its guide lists, and most of them change which algorithm, protocol
or transport a rank chooses. Two ranks that choose differently hang (NVIDIA/nccl#1136, #2428). A
line too few in this table costs an operator a warning that names the variable; a line too many
could cost a job. The same holds for UCX, libfabric and the plugins.

Sources: *guide* is NVIDIA's NCCL User Guide, "Environment Variables"; each name of NCCL's was also
found in the library itself, 2.32.3. *UCX* is what `ucx_info -cf` prints, the names found in
1.22.0. *libfabric* are its man pages fabric.7 and fi_PROVIDER.7, 1.17. *torch* is the page
"ProcessGroupNCCL Environment Variables" of its documentation, 2.4. *CUDA* is the CUDA C++
Programming Guide, "CUDA Environment Variables".
"""

from __future__ import annotations

import re
from typing import Final

from handfast.fleet.inventory.facts import Kind

__all__ = ["TABLE", "classify"]

_PER, _OFF, _EXACT = Kind.PER_NODE, Kind.IGNORED, Kind.EXACT

TABLE: Final[tuple[tuple[str, Kind, str, str], ...]] = (
    # names of this node's own interfaces, devices and places
    (r"NCCL_(SOCKET|OOB_NET)_IFNAME", _PER, "names of interfaces", "guide"),
    (r"NCCL_IB_(HCA|(.*_)?GID_INDEX)", _PER, "names and table entries of a node's NICs", "guide"),
    (r"NCCL_HOSTID", _PER, "differs from node to node by its meaning", "guide"),
    (r"NCCL_MNNVL_(UUID|CLIQUE_ID)", _PER, "which NVLink domain and clique a node is in", "guide"),
    (r"NCCL_RAS_ADDR", _PER, "an address", "guide"),
    (r"NCCL_(CONF|TOPO|GRAPH)_FILE", _PER, "a path; what the file says is compared", "guide"),
    (r"UCX_(NET_DEVICES|IB_GID_INDEX|CONFIG_DIR)", _PER, "names of devices, a path", "UCX"),
    (r"FI_[A-Z0-9]+_IFACE", _PER, "names of interfaces", "libfabric"),
    (r"(GLOO|TP)_SOCKET_IFNAME", _PER, "names of interfaces", "torch.distributed"),
    (r"(CUDA|NVIDIA)_VISIBLE_DEVICES", _PER, "which GPUs of its node a rank has", "CUDA"),
    (r"CUDA_(HOME|PATH|CACHE_PATH)", _PER, "paths", "CUDA"),
    (r"LD_(PRELOAD|LIBRARY_PATH)", _PER, "paths; what they lead to is compared", "ld.so(8)"),
    # what is written down, and changes nothing that travels
    (r"NCCL_DEBUG(_.*)?", _OFF, "logging", "guide"),
    (r"NCCL_(TOPO|GRAPH)_DUMP_FILE(_.*)?", _OFF, "writes a file", "guide"),
    (r"NCCL_SET_THREAD_NAME", _OFF, "names of threads", "guide"),
    (r"UCX_(LOG|STATS|PROFILE|WARN)_.*", _OFF, "logging, counters", "UCX"),
    (r"UCX_(HANDLE_ERRORS|ERROR_SIGNALS|DEBUG_SIGNO)", _OFF, "what a crash prints", "UCX"),
    (r"FI_LOG(_.*)?", _OFF, "logging", "libfabric"),
    (r"TORCH_NCCL_(TRACE|DEBUG_INFO|LOG)_.*", _OFF, "the flight recorder, logging", "torch"),
    (r"NVSHMEM_(DEBUG|INFO|VERSION)(_.*)?", _OFF, "logging", "NVSHMEM's guide"),
    (r"SHARP_COLL_LOG_LEVEL", _OFF, "logging", "NVIDIA SHARP's guide"),
    # all others of these families
    (r"NCCL_.*", _EXACT, "may change what ranks choose", "guide"),
    (r"RCCL_.*", _EXACT, "NCCL's sibling for AMD", "RCCL's documentation"),
    (r"UCX_.*", _EXACT, "transports, thresholds", "UCX"),
    (r"FI_.*", _EXACT, "providers, protocols", "libfabric"),
    (r"OFI_NCCL_.*", _EXACT, "the plugin for libfabric", "aws-ofi-nccl's documentation"),
    (r"TORCH_NCCL_.*", _EXACT, "how torch calls NCCL", "torch"),
    (r"TORCH_(DISTRIBUTED_DEBUG|CPP_LOG_LEVEL)", _EXACT, "DETAIL adds collectives", "torch"),
    (r"CUDA_.*", _EXACT, "order of launches, modules, the image's version", "CUDA"),
    (r"NVSHMEM_.*", _EXACT, "transports", "NVSHMEM's guide"),
    (r"SHARP_COLL_.*", _EXACT, "collectives in the switches", "NVIDIA SHARP's guide"),
)

_COMPILED: Final = tuple((re.compile(pattern), kind) for pattern, kind, _, _ in TABLE)


def classify(name: str) -> Kind | None:
    """Say how a variable counts; None for one that is none of ours and is not read."""
    return next((kind for pattern, kind in _COMPILED if pattern.fullmatch(name)), None)
