"""Let the tests of this directory import the wrong protocols."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
