"""The recipe: from data to clusters by EM, rounds with an encoder and training by gradients, as configured."""
