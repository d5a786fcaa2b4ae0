"""One rank of one start of a job that is tried out: ``python -m handfast.testing.exact FILE``."""

import sys

from handfast.testing.exact.life import live

if __name__ == "__main__":
    live(sys.argv[1])
