"""The pure core: the mathematics of epochs and the convergence protocol.

Nothing in this package reads a clock, does I/O, draws a random number or iterates over a set.
The door is :func:`handfast.core.member.step`.
"""
