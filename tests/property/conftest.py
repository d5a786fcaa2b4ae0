"""Let the tests of this directory import the world that they share, and the wrong protocols."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
