#!/usr/bin/env bash
# scikit-learn 1.9.1: BayesianGaussianMixture.lower_bound_, "lower bound value on the model evidence", is none, and the number of
# components that it prefers depends on the units of the data.
#
# Terms of the bound that hold the prior's scale are left out, once per component, and n d log(2 pi) / 2. In other units the
# evidence moves by the same for every K; lower_bound_ moves further, by d^2 log(unit) nats for each component (28 here at 1000),
# so that small units want as many components as are offered and large ones few. Of one component, whose evidence has a closed form, it lies 553 nats above the evidence. Fits
# themselves do not depend on units, and weights_ and predict are as good as ever; only comparing by lower_bound_ is not. It
# may compare restarts (as n_init does), nothing else.
#
# Do instead: held-out log-likelihood, or BIC of GaussianMixture; count the components with weight.
#
# Seen (Python 3.11, x86-64; 600 rows of three clusters, K = 1 to 6):
#   unit 0.001: preferred K = 6
#   unit 1    : preferred K = 3
#   unit 1000 : preferred K = 3
#   K = 6 against K = 3: 82.6 at 0.001, -0.3 at 1, -83.2 at 1000
#   one component, 300 rows: lower_bound_ -309.2, log evidence -862.5
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6 || exit 2
"$work/venv/bin/python" - <<'EOF'
import sys
import warnings

import numpy as np
from scipy.special import multigammaln
from sklearn.mixture import BayesianGaussianMixture

warnings.simplefilter("ignore")  # of convergence
rng = np.random.default_rng(0)


def bound(x, k, **options):
    model = BayesianGaussianMixture(
        n_components=k, max_iter=2000, weight_concentration_prior_type="dirichlet_distribution", random_state=0, **options
    ).fit(x)
    return float(np.ravel(model.lower_bound_)[0]), model


def log_evidence(x, model):
    """Of one Gaussian under the model's Normal-Wishart prior, exactly."""
    (n, d), nu, kappa = x.shape, model.degrees_of_freedom_prior_, model.mean_precision_prior_
    scale, gap = model.covariance_prior_, x.mean(0) - model.mean_prior_
    centred = x - x.mean(0)
    after = scale + centred.T @ centred + kappa * n / (kappa + n) * np.outer(gap, gap)
    determinants = nu / 2 * np.linalg.slogdet(scale)[1] - (nu + n) / 2 * np.linalg.slogdet(after)[1]
    gammas = multigammaln((nu + n) / 2, d) - multigammaln(nu / 2, d)
    return float(-n * d / 2 * np.log(np.pi) + gammas + determinants + d / 2 * np.log(kappa / (kappa + n)))


single = rng.normal(size=(300, 2))
of_one, model = bound(single, 1, tol=1e-9, reg_covar=0)
exact = log_evidence(single, model)
x = rng.normal(size=(600, 2)) + np.array([[0, 0], [4, 0], [0, 4]])[np.arange(600) % 3]
found = {}
for unit in (0.001, 1, 1000):
    found[unit] = [bound(x * unit, k, n_init=3, reg_covar=1e-6 * unit**2)[0] for k in range(1, 7)]
for unit, bounds in found.items():
    print(f"unit {unit:<5}: preferred K = {1 + int(np.argmax(bounds))}")
gaps = [bounds[5] - bounds[2] for bounds in found.values()]
print("K = 6 against K = 3: {:.1f} at 0.001, {:.1f} at 1, {:.1f} at 1000".format(*gaps))
print(f"one component, 300 rows: lower_bound_ {of_one:.1f}, log evidence {exact:.1f}")
depends = np.argmax(found[0.001]) == 5 and np.argmax(found[1000]) == 2 and gaps[0] > 40 and gaps[2] < -40
sys.exit(not (depends and of_one > exact + 500))
EOF
