"""What a checkpoint costs, beside what the hardware can do and beside the usual ways.

``python -m benchmarks [QUESTION ...]``: each module of this package that has an ``ask`` is one
question. Figures are measured in the run that prints them, and nothing is asserted.
"""
