"""The linen modules: two heads trained by gradients, one fitted by EM, and the way from a model to their leaves."""
