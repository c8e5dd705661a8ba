#!/usr/bin/env bash
# numpy 2.4.6: Generator.multivariate_normal notices a covariance that is none in large units only: of the same matrix times 1e-9 it
# draws, without a warning, from another distribution.
#
# check_valid compares with tol=1e-8 absolutely. [[1, 2], [2, 1]], whose correlation is 2, gives a RuntimeWarning ("covariance is
# not symmetric positive-semidefinite"), its multiple by 1e-9 none, nor does check_valid="raise" raise; variables of size 1e-5 are
# enough. Draws have covariance [[2, 1], [1, 2]] then, as the sign of the negative eigenvalue is dropped.
#
# Do instead: check correlations, or method="cholesky", which raises LinAlgError in any units.
#
# Seen (Python 3.11, x86-64):
#   unit 1:    check_valid="raise" raises ValueError
#   unit 1e-9: check_valid="raise" draws, with covariance [[2.0, 1.0], [1.0, 2.0]] times 1e-9
#   unit 1e-9: method="cholesky" raises LinAlgError
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    numpy==2.4.6 || exit 2
"$work/venv/bin/python" - <<'EOF'
import sys

import numpy as np

none, rng, found = np.array([[1.0, 2.0], [2.0, 1.0]]), np.random.default_rng(0), []
for unit, options in ((1, {"check_valid": "raise"}), (1e-9, {"check_valid": "raise"}), (1e-9, {"method": "cholesky"})):
    try:
        draws = rng.multivariate_normal([0, 0], unit * none, size=200_000, **options)
        found.append((np.cov(draws.T) / unit).round(1).tolist())
    except (ValueError, np.linalg.LinAlgError) as error:
        found.append(type(error).__name__)
    print(f"unit {unit}, {options}: {found[-1]}")
sys.exit(found != ["ValueError", [[2.0, 1.0], [1.0, 2.0]], "LinAlgError"])
EOF
