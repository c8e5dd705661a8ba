"""The former place of what `flax_hmog.networks` has; programs and checkpoints name it."""

from flax_hmog.networks import *  # noqa: F403
