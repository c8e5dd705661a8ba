"""What a HMoG is: its three coordinate systems, the kinds of its matrices, and the closed forms between them."""
