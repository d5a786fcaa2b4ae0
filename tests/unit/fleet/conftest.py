"""Puts the helpers of this room where its tests, and the processes that they start, find them."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "link")]
