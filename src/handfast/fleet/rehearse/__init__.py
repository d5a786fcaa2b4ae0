"""A rolling upgrade gone through beforehand: a few nodes, every order, and what came of it.

Read in this order: ``reading`` (a rehearsal from a file), ``walks`` (every order, purely),
``running`` (a fleet of real processes), ``rehearsing`` (walk them all), ``report`` (what it says).
"""
