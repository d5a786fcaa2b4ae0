"""A rank's script: the calls of NCCL that need no GPU, by the version that the rank was given.

    nccl_rank.py VERSION

Calls: ncclGetVersion, ncclGetErrorString and ncclGetUniqueId (nccl.h, 2.19 to 2.27). The last one
opens the socket that ranks would meet at; a communicator itself needs a GPU.
"""

from __future__ import annotations

import ctypes
import os
import sys


def main(version: str) -> str | None:
    """Load the library as torch would, and ask it; gives what is not as it was told."""
    name = "libnccl.so.2"
    beside = (f"{place}/nvidia/nccl/lib/{name}" for place in sys.path)
    nccl = ctypes.CDLL(next(filter(os.path.exists, beside), name))  # by its name: the preloaded one
    code, job = ctypes.c_int(), ctypes.create_string_buffer(128)  # NCCL_UNIQUE_ID_BYTES
    nccl.ncclGetErrorString.restype = ctypes.c_char_p
    for status in (nccl.ncclGetVersion(ctypes.byref(code)), nccl.ncclGetUniqueId(job)):
        if status:
            return f"NCCL says: {nccl.ncclGetErrorString(status).decode()}"
    found = f"{code.value // 10000}.{code.value % 10000 // 100}.{code.value % 100}"
    return None if found == version else f"it has NCCL {found}, and not {version}"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
