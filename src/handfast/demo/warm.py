"""Imported by the fork server before its first fork: torch and all that a rank's start needs.

What is imported here is imported once and shared by every rank of every start.
"""

import contextlib
import importlib

from handfast.demo.training import make_deterministic

importlib.import_module("handfast.demo.rank")
with contextlib.suppress(ImportError):  # some builds of torch import this with their first
    importlib.import_module("torch.profiler._cupti_monitor")  # collective, in each rank anew
make_deterministic()
