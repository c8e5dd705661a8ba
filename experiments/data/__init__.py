"""Data sets as rows that are read when needed: `load` finds them, `Inputs` turns them into what a model takes."""

from experiments.data.inputs import Batches, Inputs, prepare_inputs
from experiments.data.load import data_shape, load
from experiments.data.parts import Dataset, Part

__all__ = ["Batches", "Dataset", "Inputs", "Part", "data_shape", "load", "prepare_inputs"]
