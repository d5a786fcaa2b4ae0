"""What may run beside what: rules over the facts of nodes, verdicts in words, greatest versions.

Read in this order: ``rules`` (the vocabulary), ``versions`` (their order), ``meaning`` (what a rule
says of two values), ``reading`` (from a file) and ``known`` (which facts there are), ``judge`` (of
what is), ``plan`` and ``choose`` (of what could be).
"""
