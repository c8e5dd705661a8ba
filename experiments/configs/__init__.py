"""One module per experiment, with its question, command and expected result; `EXPERIMENTS` names them and presets."""

import importlib
import pkgutil

from experiments import images, sentences  # noqa: F401  register their data sets
from flax_hmog.recipe.config import Experiment
from flax_hmog.recipe.presets import PRESETS

MODULES = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
EXPERIMENTS: dict[str, Experiment] = PRESETS | {module.__name__.rsplit(".", 1)[1]: module.CONFIG for module in MODULES}
