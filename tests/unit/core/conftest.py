"""Let the tests of this directory share the members that they drive."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
