"""The stages of a run, each resumed from its own checkpoints: exact EM, rounds of clusters, training by gradients."""

from experiments.stages.em import EMStage
from experiments.stages.gradient import GradientStage
from experiments.stages.rounds import RoundStage
from experiments.stages.run import LinearFit, Run, Start

__all__ = ["EMStage", "GradientStage", "LinearFit", "RoundStage", "Run", "Start"]
