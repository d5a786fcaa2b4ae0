"""The state of a PyTorch training: captured, staged into an image, and put back in place."""
