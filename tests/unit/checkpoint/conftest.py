"""Lets the tests of this room use what stands beside them, and the agents of the agent's room."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "agent")]
