"""Where an epoch lives: images, manifests, objects, journals and tiers. Imports no framework."""
