"""The per-node agent: it owns the domains of its node and outlives the trainers that it serves.

Reading order: :mod:`~handfast.agent.speech` (what agents say to each other), ``links`` (a mesh of
gated links), ``local`` (the Unix socket between a trainer and its agent), ``process`` (how an agent
is started once a node, and found again).
"""
