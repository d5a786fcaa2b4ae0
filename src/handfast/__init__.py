"""handfast: state that provably converges."""
