"""Whether a training that is killed goes on bit for bit: tried out on the user's own job.

Reading order: `resume` (the whole test), `task`, `process`, `start` (what runs where), `life`,
`look`, `around` (what a rank says of its state), `moments`, `judge`, `result` (what came of it).

Prints are taken of the live state, and not read from the epochs afterwards: an epoch is released
by and by, there is none of a step that the schedule leaves out, none of the moment right after a
restore, where what was not brought back is alone in differing, and none ever of what the state
leaves out, which is what people forget.
"""

from handfast.testing.exact.result import Difference, ExactResume
from handfast.testing.exact.resume import Nondeterministic, assert_exact_resume, exact_resume
from handfast.testing.exact.start import JobFailed

__all__ = [
    "Difference",
    "ExactResume",
    "JobFailed",
    "Nondeterministic",
    "assert_exact_resume",
    "exact_resume",
]
