"""One module per experiment; `EXPERIMENTS` names their configurations."""

from experiments.configs.digits import Digits

EXPERIMENTS = {"digits": Digits}
