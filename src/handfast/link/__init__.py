"""Links whose every frame is read under the epoch that it was sent under, and no other.

Read in this order: ``frame`` (the outer header, which never changes), ``switch`` (how an open link
changes its epoch), ``trust`` (who signs, and what both know), ``session`` (the handshake),
``records`` (what outlives a process), ``window`` (what came), ``end`` (one end of a link, without
I/O). Agents carry it over TCP (:mod:`handfast.agent.links`), services over TCP and UDP
(:mod:`handfast.fleet.link`).
"""
