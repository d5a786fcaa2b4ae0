"""Imported by the fork server before its first fork: torch and all that a rank's start needs.

What is imported here is imported once and shared by every rank of every start.
"""

import torch.profiler._cupti_monitor  # noqa: F401 - imported for a fork server - the first collective would import it, each time

from handfast.demo import rank  # noqa: F401 - imported for a fork server
from handfast.demo.training import make_deterministic

make_deterministic()
