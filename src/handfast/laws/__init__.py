"""What must hold of the protocol, by name, and the truth that it is held against.

Nothing that runs a training imports this room: models, simulations, tests and monitors do.
"""
