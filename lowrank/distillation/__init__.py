"""Train a compressed model towards the dense one that it was made from."""
