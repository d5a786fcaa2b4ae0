"""Saving and restoring as one job: rounds, sessions and handles. Knows no framework."""
