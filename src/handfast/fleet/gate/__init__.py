"""The gate: before a job's first communicator, a mixture of stacks becomes one line on every rank.

Read in this order: ``stack`` (what a rank runs), ``keys`` (where ranks meet), ``round`` (who judges
whom, and how all hear it), ``overrides`` (who may pass all the same), ``node`` (what a node says
when it is admitted), ``wire``, ``serve`` and ``ask`` (what it says while it is up, and who asks).
The entry is :mod:`handfast.gate`.
"""
