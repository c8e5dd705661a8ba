"""Files of models: exactly the same model, in both precisions, and numpy alone that scores it."""

import jax
import numpy as np
import pytest
from cases import FEW

from flax_hmog import AnalyticHMoG, fit_em, infer, load, save


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_a_file_gives_exactly_the_same_model(case, dtype, tmp_path):
    with jax.enable_x64(dtype == "float64"):
        natural = case.natural(dtype)
        expected = infer(natural, case.x())
        save(natural, tmp_path / "model.npz")
    loaded = load(tmp_path / "model.npz").natural  # float64 is kept, wherever it is read
    with jax.enable_x64(dtype == "float64"):
        jax.tree.map(np.testing.assert_array_equal, infer(loaded, case.x()), expected)


def rows(unit=1.0, origin=0.0, noise=1.0):
    rng = np.random.default_rng(0)
    z = np.arange(300) % 3
    y = 4 * rng.normal(size=(3, 2))[z] + rng.normal(size=(300, 2))
    return origin + unit * (y @ rng.normal(size=(2, 5)) + noise * rng.normal(size=(300, 5)))


@pytest.mark.parametrize("origin", [0.0, 1e6])
@pytest.mark.parametrize("noise", ["scale", "diagonal", "full"])
def test_ten_lines_of_numpy_score_a_file(noise, origin, tmp_path):
    x = rows(origin=origin)
    fit = fit_em(AnalyticHMoG(lat_dim=2, n_components=3, obs_rep=noise), x, jax.random.key(0))
    assert (fit.natural.frame is None) == (origin == 0)
    save(fit, tmp_path / "model.npz", clusters=[0, 1, 0], columns=list("abcde"), notes={"source": "rows"})
    loaded = load(tmp_path / "model.npz")
    assert (loaded.clusters.tolist(), loaded.columns, loaded.notes) == ([0, 1, 0], tuple("abcde"), {"source": "rows"})
    jax.tree.map(np.testing.assert_array_equal, loaded.natural, fit.natural)

    model = np.load(tmp_path / "model.npz")
    W, b, w = model["loadings"], model["bias"], model["weights"]
    noise = model["noise"]
    psi = np.diag(noise) if noise.ndim == 1 else noise
    covariances = W @ model["covariances"] @ W.T + psi
    gaps = x[:, None] - (model["means"] @ W.T + b)
    squares = np.einsum("nkd,kde,nke->nk", gaps, np.linalg.inv(covariances), gaps)
    log_det = np.linalg.slogdet(covariances)[1]
    joint = np.log(w) - (squares + log_det + x.shape[1] * np.log(2 * np.pi)) / 2
    log_density = np.logaddexp.reduce(joint, axis=1)

    output = infer(fit.natural, x)
    np.testing.assert_allclose(output.log_density, log_density, atol=2e-3)
    np.testing.assert_allclose(np.exp(output.log_responsibilities), np.exp(joint - log_density[:, None]), atol=1e-3)


def test_what_is_no_model_is_named(tmp_path):
    natural = FEW[0].natural("float32")
    save(natural, tmp_path / "model.npz")
    whole = (tmp_path / "model.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    for name in ("half.npz", "other.npz", "none.npz"):
        with pytest.raises(ValueError, match=r"load: `path` must be a file that flax_hmog.save wrote; got .*" + name):
            load(tmp_path / name)
    with pytest.raises(ValueError, match="save: `columns` must have 4 entries; got 1"):
        save(natural, tmp_path / "model.npz", columns=["a"])
    with pytest.raises(TypeError, match="save: `natural` must be Natural"):
        save({"natural": natural}, tmp_path / "model.npz")
    assert (tmp_path / "model.npz").read_bytes() == whole, "a save that failed leaves the file as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.npz", "model.npz", "other.npz"]
