"""Lets the tests of this room use the agents and ranks of the agent's room."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "agent"))
