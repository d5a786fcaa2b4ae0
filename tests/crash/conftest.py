"""Puts the laboratory where the tests of this room find it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
