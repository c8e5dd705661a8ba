"""The model: its three coordinate systems, the kinds of its matrices, and the closed forms between them."""
