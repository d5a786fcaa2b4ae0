"""Shipped tests: of a training's resume, of storages, of tiers; and files that fail on demand."""

from handfast.testing.exact import (
    Difference,
    ExactResume,
    JobFailed,
    Nondeterministic,
    assert_exact_resume,
    exact_resume,
)

__all__ = [
    "Difference",
    "ExactResume",
    "JobFailed",
    "Nondeterministic",
    "assert_exact_resume",
    "exact_resume",
]
