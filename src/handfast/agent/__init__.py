"""The per-node agent: it owns the domains of its node and outlives the trainers that it serves.

Reading order: :mod:`~handfast.agent.wire` (bytes between two agents), ``links`` (a mesh of such
connections), ``local`` (the Unix socket between a trainer and its agent), ``process`` (how an agent
is started once a node, and found again).
"""
