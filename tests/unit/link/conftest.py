"""Puts the helpers of this room where its tests, and the processes that they start, find them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
