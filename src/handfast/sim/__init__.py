"""A seeded world in virtual time around the real members: networks, disks, agents, engines, ranks.

One seed decides everything, and the same seed gives the same digest of everything that happened.
"""
