"""Fleets of nodes: what runs on them, and who may speak with whom while it changes."""
