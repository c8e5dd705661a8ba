"""The stages of a run, exact EM and then training by gradients; each is resumed from its own checkpoints."""

from experiments.stages.em import EMStage
from experiments.stages.gradient import GradientStage
from experiments.stages.run import Run

__all__ = ["EMStage", "GradientStage", "Run"]
