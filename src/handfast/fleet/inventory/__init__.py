"""What runs on a node, as facts that say so where they don't know."""
