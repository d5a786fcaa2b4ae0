"""A real training, killed over and over, that ends bit for bit where an unkilled one ends.

Reading order: `corpus`, `model`, `training` (what is trained), `savers`, `peers` (who saves it),
`launch`, `chaos`, `storm` (who kills it), `witness` (what was resumed, proved by digests),
`result`, `report` (what is shown), `run` (the whole evening).
"""
